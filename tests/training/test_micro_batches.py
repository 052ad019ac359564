"""Parts of a batch give the gradients of the batch, and what cannot be cut is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedmef_fx
from fedmef_fx import Config, micro_batches
from fedmef_fx.errors import ConfigError
from fedmef_fx.models import digits_cnn
from fedmef_fx.training.micro_batches import batch_statistics_in


def gradients(model: nn.Module, x: Tensor, y: Tensor, size: int) -> list[Tensor]:
    model.zero_grad()
    for (inputs, targets), scale in micro_batches((x, y), size, model=model):
        (F.cross_entropy(model(inputs), targets) * scale).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("size", [1, 3, 4, 10, 99])
def test_gradients_of_parts_add_up_to_those_of_the_batch(size: int) -> None:
    model = fedmef_fx.transform(digits_cnn(), Config(activation_sparsity=0.0, weight_storage="dense")).double()
    x, y = torch.randn(10, 1, 8, 8, dtype=torch.float64), torch.randint(0, 10, (10,))
    F.cross_entropy(model(x), y).backward()
    whole = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    parts = gradients(model, x, y, size)
    # Only the order of additions differs: a few roundings of 1e-16 each.
    for part, expected in zip(parts, whole, strict=True):
        assert (part - expected).norm() <= 1e-12 * expected.norm()


def test_with_pruned_activations_the_difference_is_within_that_of_pruning() -> None:
    torch.manual_seed(0)
    model = digits_cnn()
    x, y = torch.randn(64, 1, 8, 8), torch.randint(0, 10, (64,))
    exact = gradients(fedmef_fx.transform(model, Config(activation_sparsity=0.0, weight_storage="dense")), x, y, 64)
    config = Config(activation_sparsity=0.9, weight_storage="dense")
    pruned = gradients(fedmef_fx.transform(model, config), x, y, 64)
    parts = gradients(fedmef_fx.transform(model, config), x, y, 16)

    def distance(first: list[Tensor], second: list[Tensor]) -> float:
        return float(sum((a - b).square().sum() for a, b in zip(first, second, strict=True)) ** 0.5)

    assert distance(parts, exact) < 1.1 * distance(pruned, exact)
    assert 0 < distance(parts, pruned) < 0.5 * distance(pruned, exact)


def test_trees_and_sums() -> None:
    batch = {"x": torch.arange(5), "pair": (torch.ones(5, 2), "name"), "none": None}
    parts = list(micro_batches(batch, 2, reduction="sum"))
    assert [scale for _, scale in parts] == [1.0, 1.0, 1.0]
    assert [part["x"].tolist() for part, _ in parts] == [[0, 1], [2, 3], [4]]
    assert parts[0][0]["pair"][1] == "name"
    assert parts[2][0]["pair"][0].shape == (1, 2)
    assert parts[0][0]["x"].untyped_storage().data_ptr() == batch["x"].untyped_storage().data_ptr(), "views"


@pytest.mark.parametrize("size", [0, -1, 1.5, True, None])
def test_sizes_that_are_none(size: Any) -> None:
    with pytest.raises(ConfigError, match="integer >= 1"):
        micro_batches(torch.ones(4), size)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.ones(4, 2), torch.ones(3)), r"batch\[0\]: 4, batch\[1\]: 3"),
        ((torch.ones(4), torch.tensor(1.0)), "no dimension"),
        (torch.ones(0, 3), "batch: 0"),
        (["a"], "holds no tensor"),
    ],
)
def test_batches_that_cannot_be_cut(batch: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        next(micro_batches(batch, 2))


def test_batch_statistics_are_refused_by_name() -> None:
    model = digits_cnn()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert batch_statistics_in(model) == names
    with pytest.raises(ConfigError, match=f"'{names[0]}'.*nsconv"):
        micro_batches(torch.ones(4), 2, model=model)
    assert batch_statistics_in(model.eval()) == []
    model.train()
    assert batch_statistics_in(fedmef_fx.transform(model)) == []
    kept = fedmef_fx.transform(model, Config(normalization="keep", weight_storage="dense"))
    assert batch_statistics_in(kept) == names


def test_a_reduction_that_is_none() -> None:
    with pytest.raises(ConfigError, match="'mean'"):
        micro_batches(torch.ones(4), 2, reduction="max")  # type: ignore[arg-type]  # on purpose
