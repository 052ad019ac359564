"""torch.compile around transformed models: training and inference give the numbers that they give without it."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedmef_fx
from fedmef_fx import Config, Extrusion, set_masks, transform
from fedmef_fx.packing import available_backends, using_backend
from fedmef_fx.sparse_model.masks import masks

# What the compiler warns of is no concern of this package.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _no_compiled_code() -> Iterator[None]:
    yield
    torch._dynamo.reset()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.block, self.block_norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.head(F.max_pool2d(F.relu(x + self.block_norm(self.block(x))), 2).mean((2, 3)))


class Inverted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand, self.expand_norm = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16)
        self.depthwise, self.norm = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16)
        self.project = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norm(self.depthwise(F.relu6(self.expand_norm(self.expand(x))))))
        return self.head(F.hardswish(self.project(x)).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation="gelu", batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


class Branching(nn.Module):
    """Python between several regions, and an LSTM whose weights are masked by hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.first = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 16)
        self.lstm = nn.LSTM(16, 8, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.patch(x).flatten(2).transpose(1, 2)).relu()
        if x.mean() > -9:
            x = self.lstm(x)[0]
        return self.head(x.mean(1))


ARCHITECTURES = [Residual, Inverted, Attention, Branching]


def batch(size: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3, 8, 8), torch.randint(0, 4, (size,))


def twins(kind: type[nn.Module] = Residual, storage: Any = "dense") -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    config = Config(density=0.3, activation_sparsity=0.5, weight_storage=storage)
    model = transform(kind(), config, example_inputs=(batch()[0],))
    return model, copy.deepcopy(model)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(model: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss


def change_masks(*models: nn.Module) -> None:
    changed = {name: mask.roll(1, 0) for name, mask in masks(models[0]).items()}
    for model in models:
        set_masks(model, changed)


def assert_same(plain: nn.Module, compiled: nn.Module) -> None:
    """Up to rounding: what lies between graphs may be computed in another order by compiled code."""
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(compiled.get_parameter(name), parameter, rtol=0, atol=1e-5, msg=name)
    for (name, mask), (_, other) in zip(masks(plain).items(), masks(compiled).items(), strict=True):
        assert torch.equal(mask, other), name
    for name, parameter in fedmef_fx.dense_state_dict(compiled).items():
        if name in masks(compiled):
            assert not parameter[~masks(compiled)[name]].any(), name


@pytest.mark.parametrize("storage", ["dense", "packed"])
@pytest.mark.parametrize(("compiler", "kind"), [("eager", Residual), *(("aot_eager", kind) for kind in ARCHITECTURES)])
def test_a_compiled_model_trains_as_without(compiler: str, kind: type[nn.Module], storage: str):
    plain, other = twins(kind, storage)
    compiled = torch.compile(other, backend=compiler)
    optimizers = optimizer_of(plain), optimizer_of(other)
    for size in (6, 6, 4):  # the last batch of an epoch is smaller
        x, y = batch(size)
        train(plain, optimizers[0], x, y)
        train(compiled, optimizers[1], x, y)
    assert_same(plain, other)
    change_masks(plain, other)
    x, y = batch()
    train(plain, optimizers[0], x, y)
    train(compiled, optimizers[1], x, y)
    assert_same(plain, other)
    torch.testing.assert_close(compiled.eval()(x), plain.eval()(x), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("packing", available_backends())
@pytest.mark.parametrize("storage", ["dense", "packed"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_default_settings_train_as_without(kind: type[nn.Module], storage: str, packing: Any):
    with using_backend(packing):
        plain, other = twins(kind, storage)
        compiled = torch.compile(other)
        optimizers = optimizer_of(plain), optimizer_of(other)
        for _ in range(3):
            x, y = batch()
            train(plain, optimizers[0], x, y)
            train(compiled, optimizers[1], x, y)
        assert_same(plain, other)


@pytest.mark.parametrize("storage", ["dense", "packed"])
@pytest.mark.parametrize("kind", [Residual, Branching])
def test_a_compiled_training_step_trains_as_without(kind: type[nn.Module], storage: str):
    plain, other = twins(kind, storage)
    optimizers = optimizer_of(plain), optimizer_of(other)
    compiled = torch.compile(train, backend="aot_eager")
    for size in (6, 6, 4):
        x, y = batch(size)
        expected = train(plain, optimizers[0], x, y)
        torch.testing.assert_close(compiled(other, optimizers[1], x, y), expected)
    assert_same(plain, other)


def test_extrusion_counts_and_pulls_in_compiled_code_as_without():
    plain, other = twins()
    x, y = batch()
    steps = {plain: train, other: torch.compile(train, backend="aot_eager")}
    for model, step in steps.items():
        optimizer = optimizer_of(model)
        with Extrusion(model, optimizer, budget_steps=4, strength=0.1) as extrusion:
            for _ in range(3):
                step(model, optimizer, x, y)
        assert extrusion.step == 3
    assert_same(plain, other)


@pytest.mark.parametrize("how", ["in place", "dynamic shapes", "a part of a model", "under autocast", "no gradients"])
def test_other_ways_to_compile_compute_the_same(how: str):
    plain, other = twins()
    if how == "in place":
        other.compile(backend="aot_eager")
    elif how == "a part of a model":
        plain, other = nn.Sequential(nn.Conv2d(3, 3, 1), plain), nn.Sequential(nn.Conv2d(3, 3, 1), other)
        other.load_state_dict(plain.state_dict())
    compiled = other if how == "in place" else torch.compile(other, backend="aot_eager", dynamic=how.startswith("dyn"))
    for size in (6, 3, 1):
        x, _ = batch(size)
        with torch.autocast("cpu", enabled=how == "under autocast"), torch.set_grad_enabled(how != "no gradients"):
            torch.testing.assert_close(compiled(x), plain(x))


def test_one_whole_graph_is_refused_with_the_remedy():
    model, _ = twins()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"freeze first: fedmef_fx\.freeze\(model\)"):
        torch.compile(model, backend="eager", fullgraph=True)(batch()[0])
    frozen = fedmef_fx.freeze(model)
    x, _ = batch()
    torch.testing.assert_close(torch.compile(frozen, backend="eager", fullgraph=True)(x), frozen(x))


def test_a_compiled_model_is_taken_for_the_model(tmp_path: Path):
    plain, other = twins()
    compiled, (x, y) = torch.compile(other, backend="aot_eager"), batch()
    train(plain, optimizer_of(plain), x, y)
    train(compiled, optimizer_of(compiled), x, y)
    fedmef_fx.save(compiled, tmp_path / "model.safetensors")
    assert_same(plain, fedmef_fx.load(tmp_path / "model.safetensors", Residual()))
    fedmef_fx.load(tmp_path / "model.safetensors", compiled)
    assert fedmef_fx.dense_state_dict(compiled).keys() == fedmef_fx.dense_state_dict(plain).keys()
    assert fedmef_fx.density(compiled) == fedmef_fx.density(plain)
    expected = plain.eval()(x)
    torch.testing.assert_close(fedmef_fx.freeze(compiled)(x), expected)
    torch.testing.assert_close(fedmef_fx.compact(compiled, (x,))(x), expected)
    torch.testing.assert_close(copy.deepcopy(compiled).eval()(x), expected)


def test_masks_hold_under_matrix_optimizers_in_compiled_copies():
    _, other = twins()  # a copy that never ran before it is compiled
    compiled, (x, y) = torch.compile(other, backend="aot_eager"), batch()
    matrices = [parameter for parameter in other.parameters() if parameter.dim() == 2]
    train(compiled, torch.optim.Muon(matrices, lr=0.02), x, y)
    for name, mask in masks(other).items():
        assert not other.get_parameter(name)[~mask].any(), name
