"""Optimizers that look at more than one coordinate at a time, around changes of masks and on packed weights."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import LBFGS, Optimizer

from fedmef_fx import Config, masks, set_masks, transform
from fedmef_fx.errors import ConfigError

X, Y = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 8


def model_of(storage: str) -> nn.Module:
    config = Config(density=0.3, activation_sparsity=0.0, weight_storage=storage)
    return transform(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), config)


class Preconditioned(Optimizer):
    """Keeps a statistic of rows, as Shampoo does, under a name that tells nothing, and momentum of its result."""

    def __init__(self, parameters, lr: float = 0.01) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            state, gradient = self.state[p], p.grad.view(len(p), -1)
            if not state:
                state["rows"], state["momentum"] = torch.eye(len(p)), torch.zeros_like(p)
            state["rows"] += gradient @ gradient.T
            state["momentum"].mul_(0.9).add_(p.grad)
            p.sub_(torch.linalg.solve(state["rows"], gradient).view_as(p) + state["momentum"], alpha=0.01)


class Muon(Preconditioned):
    """By its name."""


def step(model: nn.Module, optimizer: Optimizer) -> Tensor:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    return optimizer.step(closure) if isinstance(optimizer, LBFGS) else (closure(), optimizer.step())[0]


def moved(model: nn.Module) -> dict[str, Tensor]:
    return {name: mask.roll(1, 0) for name, mask in masks(model).items()}


@pytest.mark.parametrize("storage", ["dense", "packed"])
@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_l_bfgs_starts_anew_when_masks_change(storage: str, line_search: str | None) -> None:
    model = model_of(storage)
    optimizer = LBFGS(model.parameters(), lr=0.5, line_search_fn=line_search)
    step(model, optimizer)
    new = moved(model)
    new["0.weight"][0] = True  # also another number of active weights
    set_masks(model, new)
    assert not optimizer.state
    before = F.cross_entropy(model(X), Y)
    for _ in range(3):
        step(model, optimizer)
    assert F.cross_entropy(model(X), Y) < before
    assert all(torch.equal(mask, new[name]) for name, mask in masks(model).items())


def test_statistics_of_a_square_weight_are_not_taken_for_coordinates() -> None:
    model = model_of("dense")
    weight = model.get_parameter("0.weight")
    optimizer = Preconditioned([p for p in model.parameters() if p.dim() == 2])
    step(model, optimizer)
    rows = optimizer.state[weight]["rows"].clone()
    old, new = masks(model)["0.weight"], moved(model)
    set_masks(model, new)
    assert torch.equal(optimizer.state[weight]["rows"], rows)
    assert not optimizer.state[weight]["momentum"][~(old & new["0.weight"])].any()
    step(model, optimizer)


def test_statistics_of_packed_values_do_not_follow_a_change() -> None:
    model = model_of("packed")
    optimizer = Preconditioned([p for name, p in model.named_parameters() if name.endswith("weight")])
    step(model, optimizer)
    step(model, optimizer)
    set_masks(model, moved(model))
    F.cross_entropy(model(X), Y).backward()
    with pytest.raises(ConfigError, match=r"'rows' relates the active values.*weight_storage=\"dense\""):
        optimizer.step()
    anew = Preconditioned([p for name, p in model.named_parameters() if name.endswith("weight")])
    step(model, anew)
    step(model, anew)


def test_an_optimizer_of_matrices_refuses_packed_weights() -> None:
    model = model_of("packed")
    optimizer = Muon([p for name, p in model.named_parameters() if name.endswith("weight")])
    with pytest.raises(ConfigError, match=r"Muon\.step: got a packed weight .*weight_storage=\"dense\""):
        step(model, optimizer)
