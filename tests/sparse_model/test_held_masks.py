"""Masked weights are 0 wherever they are read, whatever wrote to them: all readers agree on what the model computes."""

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

from fedmef_fx import Config, coverage, dense_state_dict, density, freeze, load, masks, save, transform

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(6) % 3


class Branches(nn.Module):
    """Python control flow around an opaque module and weights that are used by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 16)
        self.by_hand = nn.Parameter(torch.randn(16, 16) * 0.2)
        self.lstm = nn.LSTM(16, 8, batch_first=True)
        self.cell = nn.GRUCell(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        if h.mean() > -9:
            h = F.linear(h, self.by_hand).relu() + F.linear(x, self.a.weight)
        return self.head(self.cell(self.lstm(h[:, None])[0][:, -1]))


class OpaqueInside(nn.Module):
    """One graph that calls an opaque module."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 16)
        self.lstm = nn.LSTM(16, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.a(x)[:, None])[0][:, 0])


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)),
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 3),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "branches": Branches,
    "opaque": OpaqueInside,
    "convolutional": convolutional,
}


class Orthogonal(Optimizer):
    """Replaces each gradient by the closest orthogonal matrix, as Muon does."""

    def __init__(self, parameters, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None or p.dim() < 2:
                    continue
                u, _, v = torch.linalg.svd(p.grad.flatten(1), full_matrices=False)
                p.sub_((u @ v).view_as(p), alpha=group["lr"])


class Perturbed(SGD):
    """Takes its gradient at weights that noise moved, and puts the weights back, as SAM does."""

    @torch.no_grad()
    def step(self, closure):
        before = [p.clone() for p in self.param_groups[0]["params"]]
        for p in self.param_groups[0]["params"]:
            p.add_(torch.randn_like(p), alpha=0.05)
        with torch.enable_grad():
            closure()
        for p, old in zip(self.param_groups[0]["params"], before, strict=True):
            p.data = old + 0.01
        return super().step()


def train(model: nn.Module, optimizer: Optimizer, *, noise: float = 0.0) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        for p in model.parameters():
            if p.grad is not None:
                p.grad.add_(torch.randn_like(p), alpha=noise)
        return loss

    for _ in range(2):
        if isinstance(optimizer, Perturbed | torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def train_with_gradient_hooks(model: nn.Module) -> None:
    for p in model.parameters():
        p.register_hook(lambda gradient: gradient + torch.randn_like(gradient))
    train(model, SGD(model.parameters(), 0.1))


STEPS: dict[str, Callable[[nn.Module], object]] = {
    "matrices": lambda m: train(m, Orthogonal(m.parameters())),
    "muon": lambda m: train(m, torch.optim.Muon([p for p in m.parameters() if p.dim() == 2], lr=0.02)),
    "lbfgs": lambda m: train(m, torch.optim.LBFGS(m.parameters(), lr=0.1)),
    "perturbed": lambda m: train(m, Perturbed(m.parameters(), 0.1)),
    "noise": lambda m: train(m, SGD(m.parameters(), 0.1, momentum=0.9), noise=0.1),
    "fused": lambda m: train(m, AdamW(m.parameters(), 0.01, fused=True), noise=0.1),
    "foreach": lambda m: train(m, AdamW(m.parameters(), 0.01, foreach=True), noise=0.1),
    "gradient hooks": train_with_gradient_hooks,
}
"""Writes of optimizers: masked weights are 0 right afterwards."""


@torch.no_grad()
def initialize(model: nn.Module) -> None:
    model.apply(lambda module: [nn.init.normal_(p) for p in module.parameters(recurse=False)])


@torch.no_grad()
def clamp(model: nn.Module) -> None:
    for p in model.parameters():
        p.clamp_(0.02, 0.1)


def add_to_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.add_(0.3)


def replace_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = torch.randn_like(p)


def not_a_number(model: nn.Module) -> None:
    for name, mask in masks(model).items():
        model.get_parameter(name).data[~mask] = float("nan")


def single_weight(model: nn.Module) -> None:
    for name, mask in masks(model).items():
        model.get_parameter(name).data.view(-1)[(~mask).flatten().nonzero()[:1]] = 7.0


def new_parameters(model: nn.Module) -> None:
    for name in masks(model):
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._parameters[leaf] = nn.Parameter(torch.randn_like(model.get_parameter(name)))


def load_dense(model: nn.Module) -> None:
    model.load_state_dict(
        {k: v + 0.3 * v.is_floating_point() for k, v in dense_state_dict(model).items()}, strict=False
    )


def load_parts(model: nn.Module) -> None:
    for part in [part for part in model.children() if list(part.children()) or list(part.parameters())]:
        part.load_state_dict({k: v + 0.3 if v.is_floating_point() else v for k, v in part.state_dict().items()})


@torch.no_grad()
def add_to_all(model: nn.Module) -> None:
    torch._foreach_add_(list(model.parameters()), 0.3)


def write_vector(model: nn.Module) -> None:
    nn.utils.vector_to_parameters(torch.randn(sum(p.numel() for p in model.parameters())), model.parameters())


WRITES = {
    function.__name__: function
    for function in (
        initialize,
        clamp,
        add_to_data,
        replace_data,
        not_a_number,
        single_weight,
        new_parameters,
        load_dense,
        load_parts,
        add_to_all,
        write_vector,
    )
}
"""Writes from outside: masked weights are 0 at every later read."""


def leak(model: nn.Module, kept: dict[str, Tensor]) -> float:
    """The largest masked weight, read from the parameters themselves."""
    return max(float((model.get_parameter(name).detach() * ~mask).abs().max()) for name, mask in kept.items())


def sparse_model(name: str, config: Config) -> nn.Module:
    return transform(MODELS[name](), config, example_inputs=(X,))


CONFIGS = {
    "nsconv": Config(density=0.3, activation_sparsity=0.5, weight_storage="dense"),
    "keep": Config(density=0.3, activation_sparsity=0.0, normalization="keep", weight_storage="dense"),
}


@pytest.mark.parametrize("write", [*STEPS, *WRITES])
@pytest.mark.parametrize("name", MODELS)
def test_all_readers_agree(name: str, write: str, tmp_path: Path) -> None:
    config = CONFIGS["nsconv" if name == "convolutional" else "keep"]
    model = sparse_model(name, config)
    kept, before = masks(model), density(model)
    (STEPS | WRITES)[write](model)
    if write in STEPS:
        assert leak(model, kept) == 0

    # Each reader gets a copy of its own, where no other one has been before it.
    def unread() -> nn.Module:
        return copy.deepcopy(model).eval()

    with torch.no_grad():
        expected = unread()(X)
        plain = freeze(unread())
        torch.testing.assert_close(plain(X), expected, rtol=0, atol=1e-5)  # BatchNorms are folded
        save(unread(), tmp_path / "model.safetensors")
        loaded = load(tmp_path / "model.safetensors", MODELS[name](), example_inputs=(X,)).eval()
        assert torch.equal(loaded(X), expected)
    state = unread().state_dict()
    assert not any(state[key][~mask].any() for key, mask in kept.items())
    own = unread()
    assert density(own) == before
    assert leak(own, kept) == 0
    if config.normalization == "keep":
        active = sum(int(p.count_nonzero()) for key, p in plain.named_parameters() if key in kept)
        assert active <= sum(int(mask.count_nonzero()) for mask in kept.values())


@pytest.mark.parametrize("name", MODELS)
def test_a_look_between_forward_and_backward_disturbs_neither(name: str) -> None:
    model = sparse_model(name, CONFIGS["keep"])
    twin = copy.deepcopy(model)
    for m in (model, twin):
        loss = F.cross_entropy(m(X), Y)
        if m is twin:
            masks(m), density(m), m.state_dict()
        loss.backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("name", MODELS)
def test_copies_hold_their_masks(name: str) -> None:
    model = sparse_model(name, CONFIGS["nsconv"])
    twin = copy.deepcopy(model)
    train(twin, Orthogonal(twin.parameters()))
    assert leak(twin, masks(model)) == 0
    model.load_state_dict(twin.state_dict(), assign=True)
    train(model, Orthogonal(model.parameters()))
    assert leak(model, masks(twin)) == 0


def test_parts_that_are_called_on_their_own_are_0_where_masked() -> None:
    model = sparse_model("branches", CONFIGS["keep"])
    assert {row.name: row.tier for row in coverage(model).rows}["lstm.weight_ih_l0"] == "hook"
    inputs = torch.randn(2, 3, 16)
    initialize(model)
    got = model.lstm(inputs)[0]
    masks(model)
    assert torch.equal(got, model.lstm(inputs)[0])


def test_biases_of_channels_that_are_off_stay_0() -> None:
    model = transform(
        nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)),
        Config(
            density=0.5, granularity="channel", normalization="keep", activation_sparsity=0.0, weight_storage="dense"
        ),
    )
    off = ~masks(model)["0.weight"].any(1)
    assert off.any()
    train(model, Orthogonal(model.parameters()), noise=0.1)
    add_to_data(model)
    hidden = []
    model.get_submodule("1").register_forward_hook(lambda _, args, output: hidden.append(args[0]))
    model(X)
    assert not model.get_parameter("0.bias")[off].any()
    assert torch.equal(freeze(model)(X), model.eval()(X))


def test_the_registry_keeps_no_model_alive() -> None:
    model = sparse_model("branches", CONFIGS["keep"])
    model(X)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
