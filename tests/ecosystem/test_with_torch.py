"""What torch itself puts around a model: optimizers, averages, precision, processes, memory formats."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import swa_utils

import fedmef_fx
from fedmef_fx import Extrusion, density, masks, transform
from tests import forked
from tests.ecosystem.networks import (
    CONFIG,
    PACKED,
    Branch,
    check_same_state,
    check_sparse,
    image_net,
    images,
    loss_of,
    move_masks,
    sparse_net,
    train,
    vectors,
)

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "ASGD": {},
    "Adadelta": {"lr": 0.5},
    "Adafactor": {},
    "Adagrad": {},
    "Adam": {"amsgrad": True},
    "AdamW": {"foreach": True},
    "Adamax": {},
    "NAdam": {"decoupled_weight_decay": True, "weight_decay": 0.1},
    "RAdam": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Rprop": {},
    "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
}


@pytest.mark.parametrize("config", [CONFIG, PACKED], ids=["dense", "packed"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer(name: str, config: Any) -> None:
    model, (x, y) = sparse_net(config), images()
    before = {key: value.clone() for key, value in model.named_parameters()}
    optimizer = getattr(torch.optim, name)(model.parameters(), **OPTIMIZERS[name])
    train(model, optimizer, x, y)
    move_masks(model)
    losses = train(model, optimizer, x, y)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert any(not torch.equal(value, before[key]) for key, value in model.named_parameters() if key in before)
    check_sparse(model, x, expected_density=0.4)


@pytest.mark.parametrize("config", [CONFIG, PACKED], ids=["dense", "packed"])
def test_lbfgs(config: Any) -> None:
    model, (x, y) = sparse_net(config), images()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        return loss

    first = float(optimizer.step(closure).detach())
    move_masks(model)
    optimizer.step(closure)
    assert float(loss_of(model, x, y).detach()) < first
    check_sparse(model, x, expected_density=0.4)


def test_muon() -> None:
    model, (x, y) = transform(Branch(), CONFIG), vectors()
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    optimizer = torch.optim.Muon(matrices, lr=0.02)
    train(model, optimizer, x, y)
    move_masks(model)
    train(model, optimizer, x, y)
    check_sparse(model, x, expected_density=0.4)


def test_sparse_adam_beside_another() -> None:
    model, (x, y) = sparse_net(), images()
    table = nn.Embedding(4, 4, sparse=True)
    table_optimizer = torch.optim.SparseAdam(table.parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    F.mse_loss(model(x), table(y)).backward()
    optimizer.step()
    table_optimizer.step()
    check_sparse(model, x, expected_density=0.4)


@pytest.mark.parametrize("config", [CONFIG, PACKED], ids=["dense", "packed"])
def test_swa_over_a_topology_change(config: Any) -> None:
    model, (x, y) = sparse_net(config), images()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    average = swa_utils.AveragedModel(model)
    schedule = swa_utils.SWALR(optimizer, 0.01, anneal_epochs=2)
    seen = []
    for epoch in range(3):
        train(model, optimizer, x, y, 1)
        if epoch == 1:
            move_masks(model)
        average.update_parameters(model)
        schedule.step()
        seen.append(fedmef_fx.dense_state_dict(model)["7.bias"].clone())
    swa_utils.update_bn([(x, y)], average)
    assert torch.allclose(fedmef_fx.dense_state_dict(average.module)["7.bias"], torch.stack(seen).mean(0), atol=1e-6)
    assert all(torch.equal(mask, masks(model)[name]) for name, mask in masks(average.module).items())
    check_sparse(average.module, x, expected_density=0.4)


@pytest.mark.parametrize("use_buffers", [True, False])
def test_ema_over_a_topology_change(*, use_buffers: bool) -> None:
    model, (x, y) = sparse_net(), images()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    for _ in range(3):
        train(model, optimizer, x, y, 1)
        move_masks(model)
        average.update_parameters(model)
    assert all(torch.equal(mask, masks(model)[name]) for name, mask in masks(average.module).items())
    check_sparse(average.module, x, expected_density=0.4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_scaler(dtype: torch.dtype) -> None:
    model, (x, y) = sparse_net(), images()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    first = float(loss_of(model, x, y).detach())
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = loss_of(model, x, y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert float(loss_of(model, x, y).detach()) < first
    check_sparse(model, x, expected_density=0.4)


def test_channels_last_computes_the_same() -> None:
    model, (x, y) = sparse_net(), images()
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x_last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(other(x_last), model(x))
    train(other, torch.optim.SGD(other.parameters(), 0.05), x_last, y)
    check_sparse(other, x, expected_density=0.4)


def test_schedulers_and_param_groups() -> None:
    model, (x, y) = sparse_net(), images()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, 1e-2)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4),
        ],
        [2],
    )
    with Extrusion(model, optimizer, budget_steps=6) as extrusion:
        for _ in range(6):
            train(model, optimizer, x, y, 1)
            schedule.step()
    assert extrusion.step == 6
    check_sparse(model, x, expected_density=0.4)


def test_gradient_accumulation_equals_one_batch() -> None:
    model, (x, y) = sparse_net(CONFIG.replace(activation_sparsity=0.0)), images()
    whole = copy.deepcopy(model)
    loss_of(whole, x, y).backward()
    for part in range(2):
        (loss_of(model, x[part::2], y[part::2]) / 2).backward()
    for left, right in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-4, atol=1e-5)


def test_state_of_model_and_optimizer_resumes_exactly(tmp_path: Path) -> None:
    (x, y), model = images(), sparse_net()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    train(model, optimizer, x, y)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "last.pt")
    train(model, optimizer, x, y)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    resumed = sparse_net()
    resumed.load_state_dict(state["model"])
    again = torch.optim.Adam(resumed.parameters(), 0.01)
    again.load_state_dict(state["optimizer"])
    train(resumed, again, x, y)
    check_same_state(resumed, model)


def test_teacher_and_student() -> None:
    student, (x, _) = sparse_net(), images()
    teacher = image_net().eval().requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.kl_div(student(x).log_softmax(-1), teacher(x).log_softmax(-1), log_target=True, reduction="batchmean")
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    check_sparse(student, x, expected_density=0.4)


def test_torch_func_functional_call() -> None:
    model, (x, _) = sparse_net(), images()
    model.eval()
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert torch.equal(torch.func.functional_call(model, state, (x,)), model(x))


def _data_parallel(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        model, (x, y) = sparse_net(CONFIG.replace(activation_sparsity=0.0)), images()
        # The bias of a convolution in front of a BatchNorm is not read any more.
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for round_ in range(2):
            train(parallel, optimizer, x[rank::2], y[rank::2], 2)
            if round_ == 0:
                move_masks(model)
        check_sparse(model, x, expected_density=0.4)
        torch.save(fedmef_fx.dense_state_dict(model), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    forked.run_in_two(_data_parallel, tmp_path, folder=tmp_path)
    left, right = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(value, right[name]) for name, value in left.items())
    model, (x, y) = sparse_net(CONFIG.replace(activation_sparsity=0.0)), images()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    train(model, optimizer, x, y, 2)
    move_masks(model)
    train(model, optimizer, x, y, 2)
    for name, value in fedmef_fx.dense_state_dict(model).items():
        torch.testing.assert_close(left[name], value, rtol=1e-4, atol=1e-5)
    assert density(model) > 0.3
