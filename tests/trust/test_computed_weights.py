"""Layers that compute their weight before each call: the older utilities of torch.nn.utils, and parametrizations."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel

import fedmef_fx
from fedmef_fx import Config, freeze, masks, set_masks, transform

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")

UTILITIES: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "pruned twice": lambda layer: prune.random_structured(
        prune.l1_unstructured(layer, "weight", 0.5), "weight", 0.5, dim=0
    ),
    "pruned bias": lambda layer: prune.l1_unstructured(prune.l1_unstructured(layer, "bias", 0.5), "weight", 0.5),
    "parametrized weight_norm": parametrizations.weight_norm,
    "parametrized spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}
CONFIGS = {
    storage: Config(density=0.5, activation_sparsity=0.5, weight_storage=storage)  # type: ignore[arg-type]
    for storage in ("dense", "packed")
}


class _Branch(nn.Module):
    """Its forward depends on values, so that Python calls the layers."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first = layer
        self.second = nn.Linear(16, 4)
        self.third = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu())
        return self.third(x) if x.mean() > -9 else x


MODELS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "one graph": lambda layer: nn.Sequential(layer, nn.ReLU(), nn.Linear(16, 4)),
    "branch": _Branch,
}
CASES = pytest.mark.parametrize(  # every pair of a model and a utility, and of a configuration and a utility
    "case",
    [
        (utility, *rest)
        for row, utility in enumerate(UTILITIES)
        for rest in zip(MODELS, list(CONFIGS)[:: (-1) ** row], strict=True)
    ],
    ids="-".join,
)


def _trained(case: tuple[str, str, str]) -> tuple[nn.Module, Tensor]:
    utility, model, config = case
    sparse = transform(MODELS[model](UTILITIES[utility](nn.Linear(8, 16))), CONFIGS[config])
    x = torch.randn(6, 8)
    _step(sparse, x)
    return sparse, x


def _step(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@CASES
def test_copies_compute_the_same_and_share_nothing(case: tuple[str, str, str]) -> None:
    sparse, x = _trained(case)
    copied = copy.deepcopy(sparse).eval()
    held = copy.deepcopy(nn.ModuleDict({"model": sparse}))["model"].eval()
    expected = sparse.eval()(x)
    assert torch.equal(copied(x), expected)
    assert torch.equal(held(x), expected)
    _step(copied.train(), x)
    assert torch.equal(sparse(x), expected)


@CASES
def test_averages_follow_weights_and_masks(case: tuple[str, str, str]) -> None:
    sparse, x = _trained(case)
    averages: list[Any] = [AveragedModel(sparse), fedmef_fx.averaged(sparse, 0.5)]
    _step(sparse, x)
    set_masks(sparse, {name: mask.roll(1, 0) for name, mask in masks(sparse).items()})
    for average in averages:
        average.update_parameters(sparse)
        assert all(torch.equal(mask, masks(sparse)[name]) for name, mask in masks(average.module).items())
        assert torch.equal(average.eval()(x), average.module(x))
    assert torch.equal(averages[0](x), sparse.eval()(x))  # the first update is a copy


@CASES
def test_a_frozen_model_is_plain(case: tuple[str, str, str]) -> None:
    sparse, x = _trained(case)
    expected = sparse.eval()(x)
    plain = freeze(sparse)
    torch.testing.assert_close(plain(x), expected)
    assert torch.equal(sparse(x), expected)  # it is as it was, and trains on
    _step(sparse.train(), x)
    for module in plain.modules():
        assert not module._forward_pre_hooks
        assert not parametrize.is_parametrized(module)
    torch.testing.assert_close(copy.deepcopy(plain)(x), expected)
    stream = io.BytesIO()
    torch.save(plain, stream)
    assert b"fedmef" not in stream.getvalue()


@CASES
def test_it_pickles_where_torch_can(case: tuple[str, str, str]) -> None:
    sparse, x = _trained(case)
    if any(parametrize.is_parametrized(module) for module in sparse.modules()):
        pytest.skip("torch pickles no parametrized modules")
    assert torch.equal(pickle.loads(pickle.dumps(sparse)).eval()(x), sparse.eval()(x))  # noqa: S301


def test_the_magnitudes_of_a_weight_norm_are_not_pruned() -> None:
    sparse = transform(nn.Sequential(weight_norm(nn.Linear(8, 16)), nn.ReLU(), nn.Linear(16, 4)), CONFIGS["dense"])
    assert sorted(masks(sparse)) == ["0.weight_v", "2.weight"]


class _Cached(nn.Module):
    """Keeps what it computed last, as attention maps are kept for a look at them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 4)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        self.seen = [x]
        return self.second(x)


def test_a_model_that_keeps_activations_can_be_copied() -> None:
    sparse, x = transform(_Cached(), CONFIGS["dense"]), torch.randn(6, 8)
    _step(sparse, x)
    copied = copy.deepcopy(sparse)
    assert torch.equal(copied.eval()(x), sparse.eval()(x))
    assert not copied.seen[0].requires_grad or copied.seen[0].grad_fn is not None
