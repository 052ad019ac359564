"""accelerate: prepare, accumulate, clip, save and resume, unwrap."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

accelerate = pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

import fedmef_fx
from fedmef_fx import Config, Extrusion, coverage, growth_candidates
from tests.ecosystem.networks import CONFIG, PACKED, check_same_state, check_sparse, images, loss_of, sparse_net


@pytest.fixture
def accelerator() -> Any:
    """One on the CPU; its states are process-wide."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(cpu=True)


def _loader() -> Any:
    return DataLoader(TensorDataset(*images(16)), batch_size=4)


@pytest.mark.parametrize("config", [CONFIG, PACKED], ids=["dense", "packed"])
def test_prepare_clip_and_unwrap(accelerator: Any, config: Config) -> None:
    model = sparse_net(config)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    prepared, wrapped, loader, schedule = accelerator.prepare(model, optimizer, _loader(), schedule)
    for x, y in loader:
        wrapped.zero_grad()
        accelerator.backward(loss_of(prepared, x, y))
        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        wrapped.step()
        schedule.step()
    unwrapped = accelerator.unwrap_model(prepared)
    assert coverage(unwrapped).rows
    check_sparse(unwrapped, images()[0], expected_density=0.4)


def test_accumulate_equals_a_larger_batch() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    config = CONFIG.replace(activation_sparsity=0.0)
    model, other = sparse_net(config), sparse_net(config)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    prepared, wrapped, loader = accelerator.prepare(model, optimizer, _loader())
    for x, y in loader:
        with accelerator.accumulate(prepared):
            accelerator.backward(loss_of(prepared, x, y))
            wrapped.step()
            wrapped.zero_grad()
    plain = torch.optim.SGD(other.parameters(), 0.1)
    for x, y in DataLoader(TensorDataset(*images(16)), batch_size=8):
        plain.zero_grad()
        loss_of(other, x, y).backward()
        plain.step()
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_extrusion_takes_the_wrapped_optimizer(accelerator: Any) -> None:
    model = sparse_net()
    prepared, wrapped, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.05), _loader())
    with Extrusion(model, wrapped, budget_steps=4) as extrusion:
        for x, y in loader:
            wrapped.zero_grad()
            accelerator.backward(loss_of(prepared, x, y))
            wrapped.step()
    assert extrusion.step == 4
    found = growth_candidates(model, lambda net, batch: loss_of(net, *batch), [images()])
    assert found
    check_sparse(model, images()[0], expected_density=0.4)


@pytest.mark.parametrize("config", [CONFIG, PACKED], ids=["dense", "packed"])
@pytest.mark.parametrize("safe", [True, False])
def test_save_state_and_load_state(accelerator: Any, tmp_path: Path, config: Config, *, safe: bool) -> None:
    model = sparse_net(config)
    prepared, wrapped, loader = accelerator.prepare(model, torch.optim.Adam(model.parameters(), 0.01), _loader())

    def epoch() -> None:
        for x, y in loader:
            wrapped.zero_grad()
            accelerator.backward(loss_of(prepared, x, y))
            wrapped.step()

    epoch()
    accelerator.save_state(str(tmp_path), safe_serialization=safe)
    epoch()
    expected = {name: value.clone() for name, value in fedmef_fx.dense_state_dict(model).items()}
    accelerator.load_state(str(tmp_path))
    epoch()
    for name, value in fedmef_fx.dense_state_dict(model).items():
        assert torch.equal(value, expected[name]), name
    check_sparse(model, images()[0], expected_density=0.4)


def test_bf16_mixed_precision() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = sparse_net()
    prepared, wrapped, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.05), _loader())
    for x, y in loader:
        wrapped.zero_grad()
        accelerator.backward(loss_of(prepared, x, y))
        wrapped.step()
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    check_sparse(unwrapped, images()[0], expected_density=0.4)
    assert unwrapped(images()[0]).dtype == torch.float32


def test_save_model_loads_into_another(accelerator: Any, tmp_path: Path) -> None:
    model = sparse_net()
    prepared = accelerator.prepare(model)
    accelerator.save_model(prepared, str(tmp_path))
    other = sparse_net(CONFIG.replace(seed=5))
    accelerate.load_checkpoint_in_model(other, str(tmp_path))
    check_same_state(other, model)
