"""Layers that users replace, remove, wrap or prune after `transform`: the model follows."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import fedmef_fx
from fedmef_fx import Config, transform
from fedmef_fx.errors import ConfigError
from tests.later_models import CONFIGS, Net, X


class Lora(nn.Module):
    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.down = nn.Conv2d(8, 2, 3, bias=False)
        self.up = nn.Conv2d(2, 8, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


def sequential() -> nn.Sequential:
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(8 * 16, 4))


def check(sparse: nn.Module, tmp_path: Path) -> None:
    """Training keeps masks; freeze, save, load, inspect and copies say what the model computes."""
    optimizer = torch.optim.SGD(sparse.parameters(), 0.05, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        sparse(X).square().mean().backward()
        optimizer.step()
    parameters = dict(sparse.named_parameters())
    for name, mask in fedmef_fx.masks(sparse).items():
        assert parameters[name].shape != mask.shape or not parameters[name][~mask].any()
    sparse.eval()
    expected = sparse(X)
    plain = fedmef_fx.freeze(sparse)
    torch.testing.assert_close(plain(X), expected, rtol=1e-4, atol=1e-4)  # folding rounds
    assert not any("Transformed" in type(module).__name__ for module in plain.modules())
    assert set(fedmef_fx.masks(sparse)) == {r.name for r in fedmef_fx.coverage(sparse).rows if r.masked}
    assert str(fedmef_fx.inspect(sparse, (X,)))
    fedmef_fx.save(sparse, tmp_path / "model.safetensors")
    again = fedmef_fx.load(tmp_path / "model.safetensors", copy.deepcopy(sparse))
    again.load_state_dict(sparse.state_dict())
    assert torch.equal(again(X), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_new_head_and_none(name: str, tmp_path: Path) -> None:
    sparse = transform(Net(), CONFIGS[name]).eval()
    features, before = sparse.forward_features(X), sparse(X)
    torch.testing.assert_close(sparse.head(features), before)

    sparse.reset_classifier(0)
    torch.testing.assert_close(sparse(X), features)
    sparse.reset_classifier(7)
    assert "head.weight" not in fedmef_fx.masks(sparse)
    assert sparse(X).shape == (4, 7)
    assert sparse.graph is not None
    check(sparse, tmp_path)


def replace(model: nn.Sequential) -> None:
    model[-1] = nn.Linear(8 * 16, 9)


def remove(model: nn.Sequential) -> None:
    del model[-1]


def insert(model: nn.Sequential) -> None:
    model.insert(0, nn.Identity())


def append(model: nn.Sequential) -> None:
    model.append(nn.Linear(4, 2))


def wrap(model: nn.Sequential) -> None:
    model[3] = Lora(model[3])  # type: ignore[arg-type]  # a convolution


def other_norm(model: nn.Sequential) -> None:
    model[1] = nn.BatchNorm2d(8)


def no_norm(model: nn.Sequential) -> None:
    model[1] = nn.Identity()


def other_stem(model: nn.Sequential) -> None:
    model[0] = nn.Conv2d(3, 8, 3)


EVERY_PAIR = [
    (change, name, (row + column) % 2 == 0)
    for row, change in enumerate([replace, remove, insert, append, wrap, other_norm, no_norm, other_stem])
    for column, name in enumerate(CONFIGS)
]


@pytest.mark.parametrize(("change", "name", "is_called_before"), EVERY_PAIR)
def test_changed_layers(
    change: Callable[[nn.Sequential], None], name: str, is_called_before: bool, tmp_path: Path
) -> None:
    sparse = transform(sequential(), CONFIGS[name])
    if is_called_before:
        sparse(X)

    change(sparse)
    weights = {n for n, p in sparse.named_parameters() if "weight" in n and f"{n}_mask" in dict(sparse.named_buffers())}
    if name != "packed":
        assert set(fedmef_fx.masks(sparse)) == weights
    check(sparse, tmp_path)


@pytest.mark.parametrize("name", ["dense", "keep"])
def test_pruned_further_with_torch(name: str) -> None:
    sparse = transform(sequential(), CONFIGS[name])
    mask = fedmef_fx.masks(sparse)["3.weight"]

    prune.l1_unstructured(sparse[3], "weight", amount=0.8)
    sparse(X).sum().backward()
    further = fedmef_fx.masks(sparse)["3.weight_orig"]
    assert not further[~mask].any()
    assert further.float().mean() < 0.3
    prune.remove(sparse[3], "weight")
    sparse(X)
    assert torch.equal(fedmef_fx.masks(sparse)["3.weight"], further & (sparse[3].weight != 0))


def test_packed_weights_refuse_pruning_of_torch() -> None:
    sparse = transform(sequential(), CONFIGS["packed"])
    prune.l1_unstructured(sparse[3], "weight", amount=0.5)

    with pytest.raises(ConfigError, match=r'stored packed.*weight_storage="dense"'):
        sparse(X)


def test_parametrized_since_is_masked_where_it_is_read() -> None:
    sparse = transform(sequential(), CONFIGS["dense"])
    nn.utils.parametrizations.weight_norm(sparse[6])

    assert sparse(X).shape == (4, 4)
    assert "6.weight" not in fedmef_fx.masks(sparse)
    sparse.eval()
    torch.testing.assert_close(fedmef_fx.freeze(sparse)(X), sparse(X), rtol=1e-4, atol=1e-4)
    sparse(X)  # freezing leaves the parametrization alone


def test_regions_inside_a_model() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            return self.head(x if x.sum() > 1e9 else x.relu())

    x = torch.randn(4, 8)
    sparse = transform(Branch(), Config(density=0.5, weight_storage="dense"), example_inputs=(x,))
    sparse.body[2] = nn.Linear(8, 8)
    sparse.head = nn.Linear(8, 5)

    sparse.eval()
    assert sparse(x).shape == (4, 5)
    torch.testing.assert_close(sparse(x), sparse.head(sparse.body[2](sparse.body[:2](x)).relu()))
    assert list(fedmef_fx.masks(sparse)) == ["body.0.weight"]


@pytest.mark.parametrize("name", CONFIGS)
def test_new_layers_are_masked_on_request(name: str, tmp_path: Path) -> None:
    sparse = transform(sequential(), CONFIGS[name])
    sparse(X)
    sparse[-1] = head = nn.Linear(8 * 16, 9)
    fedmef_fx.mask_layers(sparse, ["6"], density=0.25)

    assert sparse[-1].weight is head.weight
    assert fedmef_fx.masks(sparse)["6.weight"].sum() == 8 * 16 * 9 / 4
    check(sparse, tmp_path)
    sparse.train()
    sparse[-1](torch.randn(2, 8 * 16)).sum().backward()  # where Python calls it, too
    assert not head.weight.grad[~fedmef_fx.masks(sparse)["6.weight"]].any()


@pytest.mark.parametrize(("name", "message"), [("7", "no module"), ("2", "ReLU"), ("0", "set_masks")])
def test_what_gets_no_mask(name: str, message: str) -> None:
    sparse = transform(sequential(), CONFIGS["dense"])

    with pytest.raises(ConfigError, match=message):
        fedmef_fx.mask_layers(sparse, [name])


def test_frozen_base_weights_under_lora() -> None:
    model = sequential()
    model[3] = Lora(model[3])  # type: ignore[arg-type]  # a convolution
    frozen = "3.base_layer.weight"

    assert frozen not in fedmef_fx.masks(transform(model, Config(density=0.3, weight_storage="dense")))
    sparse = transform(model, Config(density=0.3, mask_frozen=True, weight_storage="dense"))
    assert frozen in fedmef_fx.masks(sparse)
    assert not sparse[3].base_layer.weight.requires_grad
    sparse(X).sum().backward()
    assert sparse[3].base_layer.weight.grad is None
