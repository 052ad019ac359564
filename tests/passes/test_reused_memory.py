"""Convolutions, sums and products write over what they alone read; gradients stay what they are without it."""

import copy
import dataclasses
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedmef_fx import Config, transform
from fedmef_fx.graph.origin import set_provenance
from fedmef_fx.measure.live import LiveBytes
from fedmef_fx.ops.in_place import add_over, mul_over
from fedmef_fx.ops.layers import pruned_convolution
from fedmef_fx.ops.relu import sign_relu
from fedmef_fx.records.passes import PassResult

OPTIONS = ("over_input", "over_gradient", "shared", "turns")


class Blocks(nn.Module):
    """A residual block whose shortcut is a convolution, one whose shortcut is its input, and a depthwise one."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first, self.second = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.shortcut = nn.Conv2d(16, 16, 1)
        self.third, self.fourth = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.depthwise, self.head = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Linear(16, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu((self.second(F.relu(self.first(x))) + self.shortcut(x)) * 0.5)
        x = F.relu(self.fourth(F.relu(self.third(x))) + x)
        return self.head(F.relu(self.depthwise(x)).mean((2, 3)))


def without_reuse(model):
    """A copy that writes over nothing."""
    plain = copy.deepcopy(model)
    for node in plain.graph.nodes:
        if node.target is sign_relu:
            node.kwargs = {**node.kwargs, "inplace_gradient": False}
        elif node.target is pruned_convolution:
            node.kwargs = {name: value for name, value in node.kwargs.items() if name not in OPTIONS}
        elif node.target in (add_over, mul_over):
            node.target, node.kwargs = (torch.add if node.target is add_over else torch.mul), {}
    plain.recompile()
    return plain


def gradients(model, x, *, times=1):
    out = model(x)
    for _ in range(times):
        model.zero_grad()
        x.grad = None
        out.square().sum().backward(retain_graph=times > 1)
    return [out.detach(), x.grad, *(p.grad for p in model.parameters())]


def small(dtype=torch.float64, **options):
    """A transformed model whose copies round activations alike."""
    return transform(Blocks().to(dtype), Config(density=0.5, **options)).train()


def options_of(model):
    """Which options each convolution has, by its name."""
    layers = [node for node in model.graph.nodes if node.target is pruned_convolution]
    return {
        node.args[2].name.removesuffix("_weight").removesuffix("_weight_1"): [o for o in OPTIONS if o in node.kwargs]
        for node in layers
    }


def test_what_is_written_over():
    model = small()
    assert options_of(model) == {
        "stem": [],
        "first": ["over_gradient", "shared"],
        "second": ["over_input", "turns"],
        "shortcut": ["shared", "turns"],
        "third": ["over_gradient"],
        "fourth": ["over_input"],
        "depthwise": ["over_input", "over_gradient"],
    }
    assert [node.target for node in model.graph.nodes if node.target in (add_over, mul_over)] == [
        add_over,
        mul_over,
        add_over,
    ]


@pytest.mark.parametrize("storage", ["dense", "packed"])
@pytest.mark.parametrize("times", [1, 2])
def test_gradients_are_those_without_it(storage, times):
    model = small(weight_storage=storage)
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64, requires_grad=True)  # two parts
    plain = without_reuse(model)
    got, expected = gradients(model, x, times=times), gradients(plain, x, times=times)
    for ours, plain in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)  # sums over parts have another order


def test_a_gradient_of_some_tensors_alone():
    fresh = small()
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    for name in ("stem.weight", "shortcut.weight", "second.weight"):
        got, expected = (
            torch.autograd.grad(m(x).square().sum(), dict(m.named_parameters())[name])[0]
            for m in (copy.deepcopy(fresh), without_reuse(fresh))
        )
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_less_is_alive():
    layers = nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU(), nn.Conv2d(16, 2, 1)
    model = transform(nn.Sequential(*layers), Config(density=0.5)).train()
    x = torch.randn(16, 3, 32, 32)
    peaks = []
    for m in (without_reuse(model), model):
        with LiveBytes() as live:
            m(x).square().sum().backward()
        peaks.append(live.peak)
    activation = 16 * 16 * 32 * 32 * 4
    assert peaks[1] <= peaks[0] - activation / 2


def test_a_sum_that_would_not_fit_is_a_tensor_of_its_own():
    x = torch.ones(1, 3, requires_grad=True) * 1.0
    assert add_over(x, torch.ones(2, 3)).shape == (2, 3)
    assert add_over(x, torch.ones(1, 3, dtype=torch.float64)).dtype == torch.float64
    assert torch.equal(x, torch.ones(1, 3))
    assert add_over(x, torch.ones(3)) is x
    assert add_over(torch.ones(3), x, is_second=True) is x
    assert torch.equal(mul_over(x, 2), torch.full((1, 3), 6.0))


def test_nothing_is_written_without_a_backward():
    model = small().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
    torch.testing.assert_close(model(x), without_reuse(model)(x), rtol=1e-12, atol=1e-12)


@dataclasses.dataclass(frozen=True)
class AddsReaders:
    """A pass of a user: the mean of every tensor of a graph is added to its result."""

    name: ClassVar[str] = "adds-readers"

    def run(self, program):
        rewrites = {}
        for region, _, graph in program.graphs():
            output = next(iter(graph.find_nodes(op="output")))
            made = (pruned_convolution, sign_relu, add_over, mul_over)
            for node in [node for node in graph.nodes if node.target in made]:
                with graph.inserting_before(output):
                    mean = graph.call_function(torch.mean, (node,))
                    output.args = (graph.call_function(torch.add, (output.args[0], mean)),)
                for new in (mean, output.args[0]):
                    set_provenance(new, by=self.name, origin=node.name)
                rewrites[region.full_name(node.name)] = None
        return PassResult(self.name, tuple(rewrites))


def test_nothing_is_written_over_what_later_passes_read():
    torch.manual_seed(0)
    config = Config(density=0.5, activation_bits=8, activation_rounding="nearest")
    model = transform(Blocks(), config, passes=[AddsReaders()]).train()
    x = torch.randn(32, 3, 32, 32)
    result = model(x)
    with torch.no_grad():
        torch.testing.assert_close(result, model(x))
    fresh, expected = grads_of(copy.deepcopy(model), x), grads_of(without_reuse(model), x)
    torch.testing.assert_close(fresh, expected, rtol=1e-3, atol=1e-3)


def grads_of(model, x):
    model(x).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_weight_gradients_need_no_dense_weight():
    torch.manual_seed(0)
    layers = [nn.Conv2d(128, 128, 3, padding=1, bias=False) for _ in range(2)]
    model = transform(nn.Sequential(layers[0], nn.ReLU(), layers[1]), Config(density=0.1)).train()
    x = torch.randn(8, 128, 32, 32)
    loss = model(x).sum()
    with LiveBytes() as live:
        loss.backward()
    # Two activations and what a part takes; a dense weight is .14 of an activation.
    assert live.peak < 2.25 * x.nbytes
    assert all(not hasattr(node, "recipe") for node in nodes_of(loss))


def nodes_of(loss):
    found, waiting = [], [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        found.append(node)
        waiting += [other for other, _ in node.next_functions if other is not None]
    assert any("PrunedLayer" in node.name() for node in found)
    return found
