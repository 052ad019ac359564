"""Packed weights through topology changes: parameters stay the same objects, optimizers stay valid."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW

from fedmef_fx import Extrusion, masks, set_masks
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.training.clipping import clip_gradients
from tests.dense_and_packed import (
    OPTIMIZERS,
    TIGHT,
    assert_same_weights,
    change_topology,
    dense_and_packed,
    relative,
    step,
)


def test_extrusion_follows_a_topology_change_inside_of_it() -> None:
    dense, packed, x, y = dense_and_packed("conv")
    for model in (dense, packed):
        optimizer = SGD(model.parameters(), lr=0.02, momentum=0.9)
        with Extrusion(model, optimizer, budget_steps=6, strength=0.05):
            step(model, optimizer, x, y)
            set_masks(model, {name: mask.roll(1) for name, mask in masks(model).items()})
            step(model, optimizer, x, y)
    assert_same_weights(dense, packed)


def test_only_active_values_have_gradients_and_optimizer_state() -> None:
    _, packed, x, y = dense_and_packed("conv")
    optimizer = Adam(packed.parameters(), lr=1e-3)
    step(packed, optimizer, x, y)
    for _ in range(2):
        for parameter in masked_parameters(packed).values():
            active = int(parameter.mask.sum())
            assert parameter.parameter.shape == parameter.parameter.grad.shape == (active,)
            assert optimizer.state[parameter.parameter]["exp_avg"].shape == (active,)
            assert optimizer.state[parameter.parameter]["exp_avg_sq"].shape == (active,)
        change_topology(packed, packed, x, y, uneven=True)
        step(packed, optimizer, x, y)


@pytest.mark.parametrize("optimizer", [lambda p: SGD(p, lr=0.1, momentum=0.9), lambda p: AdamW(p, amsgrad=True)])
def test_momentum_of_survivors_is_kept_and_of_grown_weights_zero(optimizer) -> None:
    _, packed, x, y = dense_and_packed("conv")
    opt = optimizer(packed.parameters())
    for _ in range(3):
        step(packed, opt, x, y)
    parameter = masked_parameters(packed)["conv2.weight"]
    before = {k: parameter.expand(v) for k, v in opt.state[parameter.parameter].items() if v is not None and v.dim()}
    count = opt.state[parameter.parameter].get("step")
    old, new = parameter.mask, torch.rand(parameter.shape) < 0.5
    set_masks(packed, {"conv2.weight": new})
    opt.param_groups[0]["lr"] = 0.0
    for group in opt.param_groups:
        group["weight_decay"] = 0.0
    weights = parameter.values()
    opt.zero_grad(set_to_none=True)  # a step without gradients moves nothing, but the state is brought up to date
    opt.step()
    assert torch.equal(parameter.values(), weights)
    for key, value in before.items():
        after = parameter.expand(opt.state[parameter.parameter][key])
        assert torch.equal(after, torch.where(old & new, value, 0.0))
    assert opt.state[parameter.parameter].get("step") == count


def test_set_masks_keeps_objects_weights_and_gradients() -> None:
    _, packed, x, y = dense_and_packed("conv")
    F.cross_entropy(packed(x), y).backward()
    parameter = masked_parameters(packed)["conv3.weight"]
    weight, gradient, old = parameter.dense(), parameter.expand(parameter.parameter.grad), parameter.mask
    new = torch.rand(parameter.shape) < 0.6
    set_masks(packed, {"conv3.weight": new})
    after = masked_parameters(packed)["conv3.weight"]
    assert after.parameter is parameter.parameter
    assert torch.equal(after.mask, new)
    assert torch.equal(after.dense(), torch.where(old & new, weight, 0.0))
    assert torch.equal(after.expand(after.parameter.grad), torch.where(old & new, gradient, 0.0))


def test_a_graph_of_an_earlier_topology_does_not_get_in_the_way() -> None:
    dense, packed, x, y = dense_and_packed("conv")
    kept = []  # as a training loop that keeps its losses for logging does
    for model in (dense, packed):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        kept.append(loss)
        set_masks(model, {name: ~mask for name, mask in masks(model).items()})
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
    for key, parameter in masked_parameters(packed).items():
        assert (
            relative(parameter.expand(parameter.parameter.grad), masked_parameters(dense)[key].parameter.grad) < TIGHT
        )


def test_layers_without_active_weights_and_dense_ones_train() -> None:
    dense, packed, x, y = dense_and_packed("conv")
    empty = {name: torch.zeros_like(mask) for name, mask in masks(packed).items()}
    full = {name: torch.ones_like(mask) for name, mask in masks(packed).items()}
    optimizers = [OPTIMIZERS["adamw"](model) for model in (dense, packed)]
    for changed in (empty, full, {**full, "conv2.weight": empty["conv2.weight"]}):
        for model in (dense, packed):
            set_masks(model, changed)
        losses = [step(model, opt, x, y) for model, opt in zip((dense, packed), optimizers, strict=True)]
        for model in (dense, packed):
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            clip_gradients(model, 0.01)
        assert float((losses[0] - losses[1]).abs()) < TIGHT
    assert_same_weights(dense, packed)


def test_distributed_training_between_topology_changes(tmp_path: Path) -> None:
    dense, packed, x, y = dense_and_packed("conv")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        optimizers = [OPTIMIZERS["sgd"](model) for model in (dense, packed)]
        for number in range(2):
            parallel = [nn.parallel.DistributedDataParallel(model) for model in (dense, packed)]
            for _ in range(3):
                losses = [step(model, opt, x, y) for model, opt in zip(parallel, optimizers, strict=True)]
            assert float((losses[0] - losses[1]).abs()) < TIGHT
            del parallel
            for model, opt in zip((dense, packed), optimizers, strict=True):
                opt.zero_grad()
                uneven = {name: mask.roll(3) & mask for name, mask in masks(model).items()}
                set_masks(model, uneven if number else {name: ~mask for name, mask in uneven.items()})
    finally:
        torch.distributed.destroy_process_group()
