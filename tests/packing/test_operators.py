"""The kernels as operators of torch, and what compilers and tracers make of code that packs tensors."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from fedmef_fx.packing import BlockwiseTensor, GradientBits, PackedTensor, clamp, pack_bits, unpack_bits
from fedmef_fx.packing.operators import OPERATORS

# What the compiler and the tracers of torch warn of is no concern of this package.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _no_compiled_code() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def arguments(name: str, dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.randn(37, dtype=dtype)  # no multiple of 8
    kept = x.abs() > 0.5
    bitmap, values = pack_bits(kept), x[kept]
    x.requires_grad_()
    values = values.detach().requires_grad_()
    return {
        "pack": (x, 0.5),
        "unpack": (bitmap, values, 37),
        "gather": (bitmap, x),
        "clamp_bits": (x, 0.0, math.inf),
        "mask_by_bits": (bitmap, x, 0.1),
    }[name]


def test_every_operator_is_listed():
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fedmef_fx::")}
    assert registered == {f"fedmef_fx::{name}" for name in OPERATORS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_keep_what_torch_asks_of_operators(name: str, dtype: torch.dtype):
    opcheck(getattr(torch.ops.fedmef_fx, name).default, arguments(name, dtype))


def test_a_known_number_of_values_needs_no_size_that_depends_on_data():
    bitmap, x = arguments("gather", torch.float32)
    kept = int(unpack_bits(bitmap, 37).sum())
    opcheck(torch.ops.fedmef_fx.gather.default, (bitmap, x, kept))


@pytest.mark.parametrize("name", OPERATORS)
def test_derivatives_are_those_of_finite_differences(name: str):
    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        filled = [next(given) if isinstance(part, Tensor) and part.requires_grad else part for part in parts]
        result = getattr(torch.ops.fedmef_fx, name)(*filled)
        several = result if isinstance(result, tuple) else (result,)
        return tuple(part for part in several if part.is_floating_point())

    parts = arguments(name, torch.float64)
    inputs = tuple(part for part in parts if isinstance(part, Tensor) and part.requires_grad)
    assert torch.autograd.gradcheck(function, inputs)


def packs(x: Tensor) -> Tensor:
    """All of packing at once."""
    packed = PackedTensor.pack(x, threshold=0.5)
    clamped, bits = clamp(x, high=1.0)
    leaky = GradientBits.of(x > 0).apply(x, scale_off=0.1)
    return packed.unpack() + clamped + bits.apply(2 * x) + leaky + unpack_bits(pack_bits(x > 0.2), x.numel()).view_as(x)


class Packs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return packs(x)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_function_that_packs_is_one_graph(backend: str):
    compiled = torch.compile(packs, backend=backend, fullgraph=True)
    for shape in ((4, 9), (3, 5)):  # from the second on with sizes that vary
        x = torch.randn(shape)
        assert torch.equal(compiled(x), packs(x))
        assert torch.equal(compiled(x.t()), packs(x.t()))


def traced_by(tracer: str, x: Tensor) -> Callable[[Tensor], Tensor]:
    if tracer == "export":
        return torch.export.export(Packs(), (x,)).module()
    if tracer == "jit.trace":
        return torch.jit.trace(Packs(), (x,))
    mode = tracer.removeprefix("make_fx ")
    return make_fx(packs, pre_dispatch=True)(x) if mode == "pre-dispatch" else make_fx(packs, tracing_mode=mode)(x)


@pytest.mark.parametrize("tracer", ["export", "jit.trace", "make_fx real", "make_fx symbolic", "make_fx pre-dispatch"])
def test_a_traced_function_computes_on_inputs_that_it_has_not_seen(tracer: str):
    traced, x = traced_by(tracer, torch.randn(4, 9)), torch.randn(4, 9)
    assert torch.equal(traced(x), packs(x))


def test_an_exported_function_needs_no_operator_of_this_package():
    program = torch.export.export(Packs(), (torch.randn(4, 9),))
    assert "fedmef_fx" not in program.graph_module.code


def test_a_tensor_in_8_bits_is_never_exported_without_its_values():
    class Keeps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return BlockwiseTensor.encode(x).unpack()

    with pytest.raises(RuntimeError, match="data-dependent"):
        torch.export.export(Keeps(), (torch.randn(4, 9),))
    compiled, x = torch.compile(Keeps(), backend="aot_eager"), torch.randn(4, 9)
    assert torch.equal(compiled(x), Keeps()(x))
