"""timm: its models, averages, optimizers and schedules."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm")

from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV2, ModelEmaV3, dispatch_clip_grad

from fedmef_fx import Config, Extrusion, density, masks, transform
from fedmef_fx.errors import ConfigError
from tests.ecosystem.networks import CONFIG, PACKED, check_sparse, images, loss_of, move_masks, sparse_net, train

MODELS: dict[str, dict[str, Any]] = {
    "resnet10t": {},
    "mobilenetv3_small_050": {},
    "tf_mobilenetv3_small_minimal_100": {},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 2, "embed_dim": 48, "patch_size": 8},
}


def _model(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=4, **MODELS[name], **options)


def _batch(number: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(number, 3, 32, 32, generator=generator), torch.randint(0, 4, (number,), generator=generator)


@pytest.mark.parametrize("name", MODELS)
def test_models_train_and_freeze(name: str) -> None:
    x, y = _batch()
    model = transform(_model(name), CONFIG, example_inputs=(x,))
    train(model, torch.optim.AdamW(model.parameters(), 1e-3), x, y, 2)
    check_sparse(model, x, expected_density=0.4)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_features_and_head(name: str) -> None:
    x, _ = _batch()
    model = transform(_model(name), CONFIG, example_inputs=(x,)).eval()
    with torch.no_grad():
        torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_reset_classifier(name: str) -> None:
    x, _ = _batch()
    model = transform(_model(name), CONFIG, example_inputs=(x,))
    model.reset_classifier(7)
    assert model(x).shape == (4, 7)
    train(model, torch.optim.SGD(model.parameters(), 0.01), x, torch.tensor([6, 5, 4, 3]), 2)
    check_sparse(model, x)


def test_set_grad_checkpointing() -> None:
    x, y = _batch()
    config = CONFIG.replace(activation_sparsity=0.0)
    model = transform(_model("vit_tiny_patch16_224"), config, example_inputs=(x,))
    plain = copy.deepcopy(model)
    model.set_grad_checkpointing(True)
    for each in (model, plain):
        loss_of(each, x, y).backward()
    for left, right in zip(model.parameters(), plain.parameters(), strict=True):
        if right.grad is not None:
            torch.testing.assert_close(left.grad, right.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [CONFIG, PACKED], ids=["dense", "packed"])
@pytest.mark.parametrize("kind", [ModelEmaV2, ModelEmaV3])
def test_averages_obey_the_newest_masks(kind: Any, config: Config) -> None:
    model, (x, y) = sparse_net(config), images()
    average = kind(model, decay=0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(3):
        train(model, optimizer, x, y, 1)
        move_masks(model)
        average.update(model)
    assert all(torch.equal(mask, masks(model)[name]) for name, mask in masks(average.module).items())
    check_sparse(average.module, x, expected_density=0.4)
    average.set(model)
    assert torch.equal(average.module.eval()(x), model.eval()(x))


@pytest.mark.parametrize("opt", ["sgd", "adamw", "lamb", "lion", "adopt", "nadamw", "lookahead_adamw", "muon", "adan"])
@pytest.mark.parametrize("config", [CONFIG, PACKED], ids=["dense", "packed"])
def test_optimizers(opt: str, config: Config) -> None:
    model, (x, y) = sparse_net(config), images()
    optimizer = create_optimizer_v2(model, opt=opt, lr=0.01, weight_decay=0.05)
    if opt == "muon" and config is PACKED:
        with pytest.raises(ConfigError, match='weight_storage="dense"'):
            train(model, optimizer, x, y)
        return
    train(model, optimizer, x, y)
    move_masks(model)
    train(model, optimizer, x, y)
    check_sparse(model, x, expected_density=0.4)


def test_extrusion_around_lookahead() -> None:
    model, (x, y) = sparse_net(), images()
    optimizer = create_optimizer_v2(model, opt="lookahead_adamw", lr=0.01)
    with Extrusion(model, optimizer, budget_steps=3) as extrusion:
        train(model, optimizer, x, y)
    assert extrusion.step == 3


def test_layer_decay_and_schedule() -> None:
    x, y = _batch()
    model = transform(_model("vit_tiny_patch16_224"), CONFIG, example_inputs=(x,))
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, layer_decay=0.7)
    schedule = CosineLRScheduler(optimizer, t_initial=4, warmup_t=1, warmup_lr_init=1e-5)
    rates = set()
    for epoch in range(3):
        train(model, optimizer, x, y, 1)
        schedule.step(epoch + 1)
        rates |= {group["lr"] for group in optimizer.param_groups}
    assert len(rates) > 2
    check_sparse(model, x, expected_density=0.4)


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_gradient_clipping(mode: str) -> None:
    model, (x, y) = sparse_net(), images()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        dispatch_clip_grad(model.parameters(), 0.1, mode=mode)
        optimizer.step()
    check_sparse(model, x, expected_density=0.4)
    assert density(model) > 0.3
