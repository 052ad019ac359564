"""Max poolings of ReLUs: one mask for both, and for the codes of the layers behind them."""

import copy
import dataclasses
import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmef_fx import Config, transform
from fedmef_fx.graph.origin import set_provenance
from fedmef_fx.measure.meter import SavedTensors
from fedmef_fx.ops.pack_activation import PackActivation
from fedmef_fx.ops.pooling import max_pool
from fedmef_fx.ops.rectified import rectified
from fedmef_fx.ops.relu import sign_relu
from fedmef_fx.packing import BlockCode
from fedmef_fx.records.passes import PassResult

EXACT = Config(density=1.0, normalization="keep", activation_sparsity=0.0)
TWO_BITS = EXACT.replace(activation_bits=2)
RELUS = [{}, {"high": 6.0}, {"high": 0.5}, {"slope": 0.1}]
POOLINGS = [
    ((2, 3, 8, 9), {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0), "dilation": (1, 1)}),
    ((2, 3, 9, 9), {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1), "dilation": (1, 1)}),
    ((2, 3, 12), {"kernel": (5,), "stride": (3,), "padding": (2,), "dilation": (1,), "ceil_mode": True}),
    ((2, 2, 5, 6, 7), {"kernel": (2, 3, 3), "stride": (2, 2, 1), "padding": (0, 1, 1), "dilation": (1, 1, 2)}),
]


def torch_relu(x: Tensor, high: float = math.inf, slope: float = 0.0) -> Tensor:
    if slope:
        return F.leaky_relu(x, slope)
    return F.relu(x) if high == math.inf else F.hardtanh(x, 0.0, high)


def torch_pool(x: Tensor, *, kernel: Any, **options: Any) -> Tensor:
    pool: Any = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[len(kernel)]
    pooled: Tensor = pool(x, kernel, **options)
    return pooled


@pytest.mark.parametrize("relu", RELUS, ids=str)
@pytest.mark.parametrize(("shape", "pooling"), POOLINGS)
@pytest.mark.parametrize("inplace", [False, True])
def test_the_gradient_is_that_of_both(shape: tuple[int, ...], pooling: Any, relu: Any, inplace: bool) -> None:
    x = torch.randn(shape).round(decimals=1).requires_grad_()  # with ties, and values at the bound
    if "high" not in relu:  # its gradient passes a ReLU, as in torch, but not torch's hardtanh
        x.data.view(-1)[5] = math.nan
    y = x.detach().clone().requires_grad_()
    expected = torch_pool(torch_relu(y * 1, **relu), **pooling)
    found = max_pool(sign_relu(x * 1, inplace=inplace, masked_later=True, **relu), masks=True, **relu, **pooling)
    assert torch.equal(found.nan_to_num(9.0), expected.nan_to_num(9.0))
    direction = torch.randn_like(expected)
    found.backward(direction)  # type: ignore[no-untyped-call]
    expected.backward(direction)  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert y.grad is not None
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-6, atol=1e-6)  # the same sums, in another order
    assert torch.equal(x.grad != 0, y.grad != 0)


@pytest.mark.parametrize(("window", "bits"), [((2, 1), 1), ((2, 2), 2), ((2, 3), 3), ((3, 3), 4), ((5, 5), 8)])
def test_a_result_keeps_its_place_in_the_window(window: tuple[int, int], bits: int) -> None:
    x = torch.randn(2, 8, 30, 30, requires_grad=True)
    options: Any = {"stride": window, "padding": (0, 0), "dilation": (1, 1)}
    with SavedTensors(x) as saved:
        out = max_pool(x, kernel=window, **options)
    assert saved.nbytes == -(-out.numel() * bits // 8)
    with SavedTensors(x) as saved:
        out = max_pool(sign_relu(x * 1, masked_later=True), kernel=window, masks=True, **options)
    assert saved.nbytes == -(-out.numel() * bits // 8) + -(-out.numel() // 8)


def network(activation: nn.Module, *, pool: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    pool = nn.MaxPool2d(2) if pool is None else pool
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), activation, pool, nn.Conv2d(8, 4, 3), nn.Flatten())


IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(5))
ACTIVATIONS = [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(0.2)]


def site(model: nn.Module) -> PackActivation:
    (found,) = (module for module in model.modules() if isinstance(module, PackActivation))
    return found


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_of_a_pooled_relu_the_positive_part_is_coded(activation: nn.Module) -> None:
    model, plain = (transform(network(activation), config) for config in (TWO_BITS, EXACT))
    x, y = IMAGES.clone().requires_grad_(), IMAGES.clone().requires_grad_()
    with SavedTensors(model, x) as saved:
        result = model(x)
    assert torch.equal(result, plain(y))
    numel, kinds, kept = 6 * 8 * 16, saved.by_kind(), site(model).estimator.kept
    assert kept is not None
    assert kept == 1.0 if isinstance(activation, nn.LeakyReLU) else 0.8 < kept < 1.0
    assert kinds["packed values"] == BlockCode(2).nbytes(round(kept * numel), torch.float32)
    assert kinds["bitmap"] == numel // 8 + numel // 4  # one mask, and places in windows of 4
    assert kinds["dense"] == 0
    result.square().sum().backward()
    plain(y).square().sum().backward()
    assert saved.nbytes == 0
    assert x.grad is not None
    assert y.grad is not None
    assert torch.allclose(x.grad, y.grad, rtol=1e-4, atol=1e-6)


def test_a_relu_with_other_readers_keeps_its_own_mask() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.first(x))
            pooled: Tensor = self.second(F.max_pool2d(y, 2))
            return pooled.mean() + y.mean()

    torch.manual_seed(0)
    model, plain = transform(original := Both(), TWO_BITS), original
    x, y = IMAGES.clone().requires_grad_(), IMAGES.clone().requires_grad_()
    with SavedTensors(model, x) as saved:
        result = model(x)
    numel = 6 * 8 * 64
    assert saved.by_kind()["bitmap"] == numel // 8 + numel // 16
    result.backward()
    plain(y).backward()
    assert x.grad is not None
    assert y.grad is not None
    assert torch.allclose(x.grad, y.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("pool", [nn.AvgPool2d(2), nn.AdaptiveMaxPool2d(4)], ids=str)
def test_other_poolings_change_no_relu(pool: nn.Module) -> None:
    model, plain = (transform(network(nn.ReLU(), pool=pool), config) for config in (TWO_BITS, EXACT))
    x, y = IMAGES.clone().requires_grad_(), IMAGES.clone().requires_grad_()
    model(x).square().sum().backward()
    plain(y).square().sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert torch.allclose(x.grad, y.grad, rtol=1e-4, atol=1e-6)


def test_what_a_pooling_keeps_serves_its_result_alone() -> None:
    options: Any = {"kernel": (2,), "stride": (2,), "padding": (0,), "dilation": (1,)}
    x = torch.randn(2, 3, 8, requires_grad=True)
    assert rectified(max_pool(sign_relu(x * 1), **options)) is None
    pooled = max_pool(sign_relu(x * 1, high=1.0, masked_later=True), masks=True, high=1.0, **options)
    found = rectified(pooled.view(3, 8))
    assert found is not None
    assert (found.high, found.slope) == (1.0, 0.0)
    assert rectified(pooled[:1]) is None
    assert rectified(sign_relu(x * 1, masked_later=True)) is None


@dataclasses.dataclass(frozen=True)
class ReadsReLUs:
    """A pass of a user: the mean of each ReLU's result is added to the result, or goes in front of the pooling."""

    name: ClassVar[str] = "reads-relus"
    between: bool = False

    def run(self, program: Any) -> PassResult:
        rewrites = {}
        for region, _, graph in program.graphs():
            output = next(iter(graph.find_nodes(op="output")))
            for node in [node for node in graph.nodes if node.target is sign_relu]:
                (pool,) = node.users
                with graph.inserting_before(pool if self.between else output):
                    if self.between:
                        new = [graph.call_function(torch.sub, (node, 0.5))]
                        pool.args = (new[0],)
                    else:
                        mean = graph.call_function(torch.mean, (node,))
                        new = [mean, graph.call_function(torch.add, (output.args[0], mean))]
                        output.args = (new[1],)
                for made in new:
                    set_provenance(made, by=self.name, origin=node.name)
                rewrites[region.full_name(node.name)] = None
        return PassResult(self.name, tuple(rewrites))


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_readers_that_come_later_get_what_they_should(activation: nn.Module, between: bool) -> None:
    model = transform(network(activation), TWO_BITS, passes=[ReadsReLUs(between)]).train()
    x, y = IMAGES.clone().requires_grad_(), IMAGES.clone().requires_grad_()
    model(x).square().sum().backward()
    first, relu, pool, second, flatten = network(copy.deepcopy(activation))
    rectified = relu(first(y))
    pooled = pool(rectified - 0.5) if between else pool(rectified)
    result = flatten(second(pooled))
    (result if between else result + rectified.mean()).square().sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert torch.allclose(x.grad, y.grad, rtol=1e-4, atol=1e-5)
