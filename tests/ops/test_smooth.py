"""Activations and results in 8 bits: forward exact, gradients within what the codec's error allows."""

import pytest
import torch
from torch.nn import functional as F

import fedmef_fx.graph.operators  # noqa: F401 -- its rows say what the names mean, as where a graph runs
from fedmef_fx.errors import FedmefError
from fedmef_fx.measure.meter import SavedTensors
from fedmef_fx.ops.keeping import KeepActivation, recomputed
from fedmef_fx.ops.smooth import compressed_activation, compressed_result
from fedmef_fx.packing import BlockwiseTensor
from fedmef_fx.packing.registry import held_buffers

ACTIVATIONS = [
    ("gelu", F.gelu, {}),
    ("gelu", F.gelu, {"approximate": "tanh"}),
    ("silu", F.silu, {}),
    ("mish", F.mish, {}),
    ("hardswish", F.hardswish, {}),
    ("hardsigmoid", F.hardsigmoid, {}),
    ("softplus", F.softplus, {}),
    ("softplus", F.softplus, {"beta": 2.0, "threshold": 5.0}),
    ("pow", torch.pow, {"exponent": 3}),
    ("square", torch.square, {}),
]
RESULTS = [
    ("softmax", torch.softmax, {"dim": -1}),
    ("softmax", torch.softmax, {"dim": 1, "dtype": torch.float64}),
    ("log_softmax", torch.log_softmax, {"dim": 0}),
    ("sigmoid", torch.sigmoid, {}),
    ("tanh", torch.tanh, {}),
]


def gradient(out, x, direction):
    return torch.autograd.grad(out, x, direction)[0]


@pytest.mark.parametrize(("name", "function", "options"), ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_forward_is_exact_and_backward_is_that_of_what_was_kept(name, function, options, dtype):
    x = (2 * torch.randn(7, 5, 40)).to(dtype).requires_grad_()
    kept = BlockwiseTensor.encode(x.detach())
    got = compressed_activation(x, kept, function=name, **options)
    assert torch.equal(got, function(x, **options))
    direction = torch.randn(got.shape).to(dtype)
    decoded = kept.unpack().requires_grad_()
    expected = gradient(function(decoded, **options), decoded, direction)
    # The same derivative of the same tensor; the powers' is written down in another order of operations.
    assert torch.allclose(gradient(got, x, direction), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-30)


@pytest.mark.parametrize(("name", "function", "options"), [case for case in ACTIVATIONS if "hard" not in case[0]])
def test_the_gradient_is_off_by_no_more_than_curvature_times_half_a_scale(name, function, options):
    x = (2 * torch.randn(4000, dtype=torch.float64)).requires_grad_()
    kept = BlockwiseTensor.encode(x.detach())
    got = gradient(compressed_activation(x, kept, function=name, **options), x, torch.ones_like(x))
    exact = gradient(function(x, **options), x, torch.ones_like(x))
    grid = torch.linspace(-10, 10, 20_001, dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(function(grid, **options).sum(), grid, create_graph=True)[0]
    curvature = gradient(slope.sum(), grid, torch.ones((), dtype=torch.float64)).abs().max()
    scale = kept.ranges[:, 1].max()
    # Mean value theorem; softplus jumps by exp(-threshold) where torch takes it for linear.
    jump = 1.0 - torch.sigmoid(torch.tensor(5.0)) if options.get("threshold") == 5.0 else 1e-8
    assert (got - exact).abs().max() <= curvature * scale / 2 * 1.01 + jump
    assert (got - exact).abs().max() > 0


@pytest.mark.parametrize(("name", "function", "options"), RESULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_results_are_exact_and_backward_is_that_of_the_kept_result(name, function, options, dtype):
    x = torch.randn(6, 50, 3).to(dtype).requires_grad_()
    got, kept = compressed_result(x, function=name, **options)
    expected = function(x, **options)
    assert torch.equal(got, expected)
    assert kept is not None
    assert (kept.unpack() - got).abs().max() <= (got.max() - got.min()) / 510 + 5 * torch.finfo(got.dtype).eps
    direction = torch.randn(got.shape, dtype=got.dtype)
    out, dim = kept.unpack(), options.get("dim", 0)
    by_hand = {
        "softmax": lambda: out * (direction - (out * direction).sum(dim, keepdim=True)),
        "log_softmax": lambda: direction - out.exp() * direction.sum(dim, keepdim=True),
        "sigmoid": lambda: direction * out * (1 - out),
        "tanh": lambda: direction * (1 - out * out),
    }[name]()
    # bfloat16 rounds every product and sum of the formula, which torch's kernels compute in float32.
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
    assert torch.allclose(gradient(got, x, direction), by_hand.to(dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "function", "options"), ACTIVATIONS)
def test_without_a_codec_activations_are_exact(name, function, options):
    x = torch.randn(30, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: compressed_activation(t, None, function=name, **options), (x,))
    direction = torch.randn_like(x)
    got = gradient(compressed_activation(x, None, function=name, **options), x, direction)
    expected = gradient(function(x, **options), x, direction)
    assert torch.allclose(got, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize(("name", "function", "options"), RESULTS)
def test_results_too_small_for_the_codec_are_exact(name, function, options):
    x = torch.randn(2, 1, 2, dtype=torch.float64, requires_grad=True)[..., :1]  # 2 elements: 8 bits would cost more
    got, kept = compressed_result(x, function=name, **options)
    assert kept is None
    direction = torch.randn_like(got)
    assert torch.equal(gradient(got, x, direction), gradient(function(x, **options), x, direction))


def test_impossible_choices_keep_their_gradient():
    scores = torch.randn(4, 60)
    scores[:, 10:] = -torch.inf  # masked out: log-softmax gives -inf there, softmax 0
    for name in ("softmax", "log_softmax"):
        x = scores.clone().requires_grad_()
        got, _ = compressed_result(x, function=name, dim=-1)
        direction = torch.zeros_like(got)
        direction[:, :10] = torch.randn(4, 10)
        grad = gradient(got, x, direction)
        assert grad.isfinite().all()
        assert not grad[:, 10:].any()


def test_what_is_not_recorded_keeps_nothing():
    before = len(held_buffers())
    x = torch.randn(300, requires_grad=True)
    with torch.no_grad():
        assert KeepActivation()(x) is None
        assert compressed_result(x, function="tanh")[1] is None
        compressed_activation(x, None, function="gelu")
    assert compressed_result(x.detach(), function="tanh")[1] is None
    assert len(held_buffers()) == before


def test_a_site_says_why_it_keeps_a_tensor_as_it_is():
    site = KeepActivation()
    assert site(torch.ones(2)) is None
    assert str(site) == "KeepActivation(keeps dense: 10 bytes against 8)"
    assert site(torch.arange(5)) is None
    assert "torch.int64 has no 8-bit form" in site.reason
    assert site(torch.ones(3)) is not None
    assert site.reason == ""


def test_bytes_and_their_release():
    x = torch.randn(64, 100, requires_grad=True)
    with SavedTensors(x) as saved:
        hidden = x * 1
        kept = KeepActivation()(hidden)
        out = compressed_activation(hidden, kept, function="gelu").sum()
        del kept, hidden
    assert saved.by_kind() == {"dense": 0, "packed values": 0, "bitmap": 0, "8-bit": 6400 + 25 * 8}
    out.backward(retain_graph=True)
    assert saved.nbytes == 6400 + 25 * 8
    out.backward()
    assert saved.nbytes == 0
    with pytest.raises(FedmefError, match="freed already"):
        out.backward()


def test_a_recomputed_result_costs_nothing_and_is_the_functions():
    x = torch.randn(500)
    kept = BlockwiseTensor.encode(x)
    handle = recomputed(kept, function="gelu", approximate="tanh")
    assert handle.nbytes == 0
    assert torch.equal(handle.unpack(), F.gelu(kept.unpack(), approximate="tanh"))
    assert recomputed(None, function="gelu") is None


def test_autocast_gives_the_dtypes_of_torch():
    x = torch.randn(8, 40, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = compressed_result(x, function="softmax", dim=-1)
        activated = compressed_activation(x, BlockwiseTensor.encode(x.detach()), function="gelu")
        assert got.dtype == torch.softmax(x, -1).dtype
        assert activated.dtype == F.gelu(x).dtype
    (got.float().sum() + activated.float().sum()).backward()
    assert x.grad.dtype == torch.float32
