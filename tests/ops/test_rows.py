"""Packed rows give what dense rows give, and counts of bits are right wherever rows begin."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedmef_fx.errors import ConfigError
from fedmef_fx.ops.effective_weight import StoredWeight, effective_weight, effective_weight_backward
from fedmef_fx.ops.nsconv import KernelForm, centred, standardize, standardize_backward, standardized
from fedmef_fx.ops.rows import DenseRows, packed_rows
from fedmef_fx.packing import bitmap, using_backend
from fedmef_fx.packing.bitmap import count_rows, pack_bits


@given(rows=st.integers(1, 9), fan_in=st.integers(1, 40), density=st.floats(0, 1), seed=st.integers(0, 99))
def test_row_counts(rows: int, fan_in: int, density: float, seed: int) -> None:
    mask = torch.rand(rows, fan_in, generator=torch.Generator().manual_seed(seed)) < density
    assert torch.equal(count_rows(pack_bits(mask), rows, fan_in), mask.sum(1))
    with mock.patch.object(bitmap, "_SMALL", -1):  # the way of large bitmaps
        assert torch.equal(count_rows(pack_bits(mask), rows, fan_in), mask.sum(1))


def test_a_bitmap_of_another_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="bitmap"):
        count_rows(torch.zeros(3, dtype=torch.uint8), 4, 8)


def _weight(shape: tuple[int, ...], density: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(shape, generator=generator) < density
    weight[0] = 1.5  # a row, or a part of rows, without spread: the guards act
    return weight * mask, mask


SHAPES = [
    ((6, 4, 3, 3), False, 1),
    ((5, 7), False, 1),
    ((6, 4, 3), True, 1),
    ((6, 2, 3, 3), True, 3),
    ((1, 1), False, 1),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("statistics", ["active", "all"])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("shape", "transposed", "groups"), SHAPES)
def test_standardising_equals_that_of_dense_rows(shape, transposed, groups, density, statistics, dtype) -> None:
    weight, mask = (t.to(dtype) if t.is_floating_point() else t for t in _weight(shape, density, 1))
    form = KernelForm(1.7, groups, transposed, statistics)
    out = shape[1] * groups if transposed else shape[0]
    gain, grad = torch.rand(out).to(dtype) + 0.5, torch.randn(shape).to(dtype)
    values, dense = form.dense_rows(weight, mask)
    packed = packed_rows(pack_bits(mask), torch.Size(shape), axis=int(transposed), groups=groups)
    assert packed.fan_in == dense.fan_in == values.shape[1]
    theirs = standardize(values, dense, gain, g=1.7, statistics=statistics)
    ours = standardize(weight[mask], packed, gain, g=1.7, statistics=statistics)
    dense_base, base = centred(values, dense, theirs), centred(weight[mask], packed, ours)
    expected = standardize_backward(values, theirs, dense, form.rows(grad), g=1.7)
    got = standardize_backward(weight[mask], ours, packed, grad[mask], g=1.7)
    kernel = form.kernel(dense_base * theirs.scale, torch.Size(shape))[mask]
    # The sums of a row run in another order.
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 0.2}[dtype]
    assert torch.allclose(base * packed.spread(ours.scale), kernel, rtol=tolerance, atol=tolerance)
    if dtype != torch.bfloat16:  # where guards act, 8 bits decide differently
        assert torch.allclose(got[0], form.kernel(expected[0], torch.Size(shape))[mask], rtol=tolerance, atol=tolerance)
        assert torch.allclose(got[1], expected[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("statistics", ["active", "all"])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.usefixtures("native_kernels")
def test_native_equations_give_what_the_others_give(density, statistics, dtype) -> None:
    weight, mask = _weight((9, 5, 3, 3), density, 2)
    weight[1] *= 1e-5  # the guard EPS acts
    weight[2, 0, 0, 0] = float("nan")
    mask[2, 0, 0, 0], mask[3] = True, False
    values, gain, grad = weight[mask].to(dtype), torch.rand(9).to(dtype), torch.randn_like(weight[mask], dtype=dtype)
    found = []
    for name in ("numpy", "native"):
        with using_backend(name):
            rows = packed_rows(pack_bits(mask), mask.shape)
            columns = standardize(values, rows, gain, g=1.7, statistics=statistics)
            kernel = standardized(values, rows, columns)
            found.append((*columns, kernel, *standardize_backward(values, columns, rows, grad, g=1.7)))
    assert len(found[0]) == len(found[1]) == 8
    for theirs, ours in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        # The sums of a row run in another order, and those of float32 in float64; the guard's 1 / s amplifies.
        tolerance = {torch.float64: 1e-11, torch.float32: 2e-4}[dtype]
        assert torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_rows_follow_the_topology_of_a_bitmap() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    bits = pack_bits(mask)
    before = packed_rows(bits, mask.shape)
    assert packed_rows(bits, mask.shape) is before  # counted once
    bits.copy_(pack_bits(~mask))
    assert packed_rows(bits, mask.shape).counts(torch.zeros(1)).tolist() == [1.0, 0.0]
    with torch.inference_mode():
        assert packed_rows(pack_bits(mask), mask.shape).counts(torch.zeros(1)).tolist() == [1.0, 2.0]


def test_columns_and_sums_of_rows_without_values() -> None:
    mask = torch.tensor([[False] * 3, [True, False, True], [False] * 3, [True] * 3, [False] * 3])
    rows = packed_rows(pack_bits(mask), mask.shape)
    values = torch.arange(1.0, 6.0)
    assert rows.sum(values).tolist() == [0.0, 3.0, 0.0, 12.0, 0.0]
    assert rows.spread(torch.arange(5.0)).tolist() == [1.0, 1.0, 3.0, 3.0, 3.0]
    assert DenseRows(mask, 3).counts(torch.zeros(5, 3)).flatten().tolist() == rows.counts(values).tolist()
    assert rows.sum(values.bfloat16()).tolist() == [0.0, 3.0, 0.0, 12.0, 0.0]
    assert rows.spread(torch.arange(5.0).bfloat16()).tolist() == [1.0, 1.0, 3.0, 3.0, 3.0]


@pytest.mark.parametrize("gain", [None, torch.ones(4)])
def test_shapes_are_known_without_data(gain: Tensor | None) -> None:
    weight, bitmap = torch.randn(7, device="meta"), torch.zeros(3, dtype=torch.uint8, device="meta")
    gain = None if gain is None else gain.to("meta")
    stored = StoredWeight(weight, gain, bitmap, KernelForm(), torch.Size((4, 2, 3)))
    dense = effective_weight(stored)
    assert dense.shape == (4, 2, 3)
    grad, grad_gain = effective_weight_backward(stored, dense)
    assert grad.shape == (7,)
    assert (grad_gain is None) == (gain is None)
