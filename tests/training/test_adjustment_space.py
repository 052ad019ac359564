"""Extrusion, growth and adjustments look at the weights of an NSConv as they take effect."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

import fedmef_fx
from fedmef_fx import Config, Extrusion, growth_candidates, transform
from fedmef_fx.ops.nsconv import nsconv_weight
from fedmef_fx.sparse_model.effective import effective_parameters
from fedmef_fx.sparse_model.transformation import transformation_of
from fedmef_fx.sparsity import SparseGradient
from fedmef_fx.training.adjustment import adjust

CONVOLUTIONS = {"a.weight": "norm_a.weight", "b.weight": "norm_b.weight"}


class Net(nn.Module):
    """Two NSConvs, one of them transposed, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.norm_b = nn.ConvTranspose2d(8, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm_b(self.b(F.relu(self.norm_a(self.a(x))))))
        return self.fc(x.mean((2, 3)))


def make(**options: object) -> nn.Module:
    torch.manual_seed(3)
    config = {"density": 0.5, "allocation": "uniform", "activation_sparsity": 0.0, "extrusion_strength": 0.3} | options
    model = transform(Net(), Config(**{"adjustment_space": "effective", "weight_storage": "dense", **config})).double()
    with torch.no_grad():
        for name in CONVOLUTIONS.values():
            model.get_parameter(name).uniform_(0.5, 2)
    return model


X, Y = torch.randn(6, 4, 5, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])


def loss_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X), Y)


def kernel(model: nn.Module, name: str, weight: Tensor, gain: Tensor) -> Tensor:
    form = transformation_of(model).kernels[name].form
    return nsconv_weight(weight, gain, fedmef_fx.masks(model)[name], **form._asdict())


@pytest.mark.parametrize("granularity", ["weight", "2:4", "channel"])
@pytest.mark.parametrize("statistics", ["active", "all"])
@pytest.mark.parametrize("storage", ["dense", "packed"])
def test_the_gradient_is_that_of_the_surrogate_loss(storage: str, statistics: str, granularity: str) -> None:
    model = make(
        weight_storage=storage, nsconv_statistics=statistics, granularity=granularity, channel_multiple=1, density=0.6
    )
    parameters = effective_parameters(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    loss_of(model).backward()
    plain = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    with Extrusion(model, optimizer, budget_steps=3) as extrusion:
        model.zero_grad()
        loss_of(model).backward()
    assert any(extrusion.marked[name].numel() for name in CONVOLUTIONS)
    squares = torch.zeros((), dtype=torch.float64)
    leaves = {}
    for name, parameter in parameters.items():
        weight = parameter.masked.dense().requires_grad_()
        gain = None if name not in CONVOLUTIONS else model.get_parameter(CONVOLUTIONS[name]).detach().requires_grad_()
        w_hat = weight if gain is None else kernel(model, name, weight, gain)
        squares = squares + torch.take(w_hat, extrusion.marked[name]).square().sum()
        leaves[name] = weight
        if gain is not None:
            leaves[CONVOLUTIONS[name]] = gain
    terms = torch.autograd.grad(0.3 * squares, list(leaves.values()))
    for name, term in zip(leaves, terms, strict=True):
        found = model.get_parameter(name).grad - plain[name]
        if name in parameters:
            found = parameters[name].masked.expand(found)
        # Double precision; what is compared is a difference of gradients.
        torch.testing.assert_close(found, term, rtol=1e-9, atol=1e-12)
    assert extrusion.norm() == pytest.approx(float(squares.detach().sqrt()), rel=1e-6)


@pytest.mark.parametrize("storage", ["dense", "packed"])
@pytest.mark.parametrize("changed", ["weight", "gain"])
def test_the_norm_follows_weights_that_change_after_a_backward(storage: str, changed: str) -> None:
    model = make(weight_storage=storage)
    with Extrusion(model, SGD(model.parameters(), lr=0.1), budget_steps=3) as extrusion:
        loss_of(model).backward()
        with torch.no_grad():
            model.get_parameter("a.weight" if changed == "weight" else "norm_a.weight").mul_(torch.rand(()) + 0.5)
        parameters = effective_parameters(model)
        squares = [
            torch.take(parameters[name].dense(), places).square().sum() for name, places in extrusion.marked.items()
        ]
        assert extrusion.norm() == pytest.approx(float(torch.stack(squares).sum().sqrt()), rel=1e-6)


@pytest.mark.parametrize("storage", ["dense", "packed"])
def test_the_weights_of_least_effect_are_marked(storage: str) -> None:
    model = make(weight_storage=storage)
    with Extrusion(model, SGD(model.parameters(), lr=0.1), budget_steps=3, counts={"a.weight": 7}) as extrusion:
        marked = extrusion.marked["a.weight"]
    parameter = effective_parameters(model)["a.weight"]
    w_hat = parameter.dense().abs().flatten()
    others = parameter.masked.positions()
    others = others[~torch.isin(others, marked)]
    assert marked.numel() == 7
    assert float(w_hat[marked].max()) < float(w_hat[others].min())


@pytest.mark.parametrize("storage", ["dense", "packed"])
def test_extrusion_empties_what_it_marked(storage: str) -> None:
    model = make(weight_storage=storage)
    optimizer = SGD(model.parameters(), lr=0.1)
    with Extrusion(model, optimizer, budget_steps=200, strength=2.0) as extrusion:
        start = extrusion.norm()
        for _ in range(200):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
        assert extrusion.norm() < 0.15 * start
        marked = extrusion.marked
    before = loss_of(model).detach()
    masks = fedmef_fx.masks(model)
    for name, positions in marked.items():
        masks[name].view(-1)[positions] = False
    fedmef_fx.set_masks(model, masks)
    assert abs(float(loss_of(model).detach() - before)) < 0.05 * float(before)


def test_a_frozen_gain_is_left_alone() -> None:
    model = make()
    model.norm_a.weight.requires_grad_(False)
    with Extrusion(model, SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), budget_steps=2):
        loss_of(model).backward()
    assert model.norm_a.weight.grad is None
    assert model.a.weight.grad is not None


@pytest.mark.parametrize("statistics", ["active", "all"])
@pytest.mark.parametrize("storage", ["dense", "packed"])
def test_candidates_have_the_gradients_of_effective_weights(storage: str, statistics: str) -> None:
    options = {"weight_storage": storage, "nsconv_statistics": statistics}
    model, plain = make(**options), make(adjustment_space="parameter", **options)
    found = growth_candidates(model, lambda m, _: loss_of(m), [X], k=10_000)
    in_parameters = growth_candidates(plain, lambda m, _: loss_of(m), [X], k=10_000)
    kernels = {
        name: kernel(model, name, parameter.masked.dense(), model.get_parameter(CONVOLUTIONS[name])).detach()
        for name, parameter in effective_parameters(model).items()
        if name in CONVOLUTIONS
    }
    for weight in kernels.values():
        weight.requires_grad_()
    x = F.relu(F.conv2d(X, kernels["a.weight"], model.norm_a.bias, padding=1))
    x = F.relu(F.conv_transpose2d(x, kernels["b.weight"], model.norm_b.bias))
    loss = F.cross_entropy(F.linear(x.mean((2, 3)), effective_parameters(model)["fc.weight"].dense(), model.fc.bias), Y)
    assert float(loss.detach()) == pytest.approx(float(loss_of(model).detach()), rel=1e-12)
    gradients = torch.autograd.grad(loss, list(kernels.values()))
    for name, gradient in zip(kernels, gradients, strict=True):
        expected = torch.take(gradient, found[name].positions)
        torch.testing.assert_close(found[name].values, expected, rtol=1e-9, atol=1e-14)
        assert not torch.allclose(found[name].values, in_parameters[name].values, rtol=0.1)
    assert torch.equal(found["fc.weight"].values, in_parameters["fc.weight"].values)


def candidates(model: nn.Module) -> dict[str, SparseGradient]:
    return growth_candidates(model, lambda m, _: loss_of(m), [X])


@pytest.mark.parametrize("storage", ["dense", "packed"])
def test_grown_weights_start_without_effect(storage: str) -> None:
    model = make(weight_storage=storage)
    optimizer = Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    gradients, before = candidates(model), fedmef_fx.masks(model)
    moved = adjust(model, gradients, dict.fromkeys(before, 2))
    assert moved == dict.fromkeys(before, 2)
    masks = fedmef_fx.masks(model)
    for name, parameter in effective_parameters(model).items():
        grown = masks[name] & ~before[name]
        assert int(masks[name].sum()) == int(before[name].sum())
        # In double precision a mean of a few numbers is off by a few roundings.
        assert float(parameter.dense()[grown].abs().max()) < 1e-12
        theta, state = parameter.masked.dense()[grown], optimizer.state[parameter.masked.parameter]["exp_avg"]
        assert bool(theta.any()) is (name in CONVOLUTIONS)
        assert not parameter.masked.expand(state)[grown].any()
    pruned_only = make(weight_storage=storage)
    pruned_only.load_state_dict(model.state_dict())
    fedmef_fx.set_masks(pruned_only, {name: masks[name] & before[name] for name in masks})
    torch.testing.assert_close(model(X), pruned_only(X), rtol=1e-10, atol=1e-12)


def test_in_the_space_of_parameters_grown_weights_start_at_zero() -> None:
    model = make(adjustment_space="parameter")
    gradients, before = candidates(model), fedmef_fx.masks(model)
    adjust(model, gradients, dict.fromkeys(before, 2))
    for name, mask in fedmef_fx.masks(model).items():
        assert not model.get_parameter(name)[mask & ~before[name]].any()


@pytest.mark.parametrize("granularity", ["weight", "2:4", "channel"])
@pytest.mark.parametrize("space", ["effective", "parameter"])
def test_only_marked_weights_are_pruned_where_it_is_asked_for(space: str, granularity: str) -> None:
    model = make(granularity=granularity, adjustment_space=space, channel_multiple=1)
    counts = dict.fromkeys(fedmef_fx.masks(model), 1 if granularity == "channel" else 3)
    optimizer = SGD(model.parameters(), lr=0.1)
    with Extrusion(model, optimizer, budget_steps=1, counts=counts) as extrusion:
        pass
    with torch.no_grad():  # what is lowest now is something else
        for name, parameter in effective_parameters(model).items():
            weight = model.get_parameter(name)
            weight.view(-1)[extrusion.marked[name]] *= 50
            assert parameter.masked.parameter is weight
    before, gradients = fedmef_fx.masks(model), candidates(model)
    adjust(model, gradients, counts, marked=extrusion.marked)
    gone = 0
    for name, mask in fedmef_fx.masks(model).items():
        pruned = (before[name] & ~mask).flatten().nonzero().squeeze(1)
        assert torch.isin(pruned, extrusion.marked[name]).all()
        gone += pruned.numel()
    assert gone


@pytest.mark.parametrize("storage", ["dense", "packed"])
def test_a_channel_that_comes_back_has_gain_one_and_no_effect(storage: str) -> None:
    model = make(weight_storage=storage, granularity="channel", channel_multiple=1)
    with torch.no_grad():
        model.norm_a.weight[: len(model.norm_a.weight) // 2] = 1e-9
    before, gains = fedmef_fx.masks(model), model.norm_a.weight.detach().clone()
    adjust(model, candidates(model), {"a.weight": 1, "b.weight": 0, "fc.weight": 0})
    after = fedmef_fx.masks(model)
    alive, was_alive = after["a.weight"].flatten(1).any(1), before["a.weight"].flatten(1).any(1)
    returned = alive & ~was_alive
    assert int(returned.sum()) == 1
    assert torch.equal(model.norm_a.weight.detach(), torch.where(returned, 1.0, gains))
    assert not effective_parameters(model)["a.weight"].dense()[returned].any()
