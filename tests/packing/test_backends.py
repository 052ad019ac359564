"""One contract for every backend, against a reference that decides element by element in Python."""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmef_fx.errors import ConfigError
from fedmef_fx.native import why_missing
from fedmef_fx.packing import (
    Backend,
    available_backends,
    backend,
    backend_for,
    backends,
    pack_bits,
    set_backend,
    unpack_bits,
    using_backend,
)
from fedmef_fx.packing.backends import ENVIRONMENT_VARIABLE
from tests import forked

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SPECIAL = [0.0, -0.0, math.nan, math.inf, -math.inf, 1.0, -1.0, 6.0, -6.0, 1e-40, 0.1, -0.1]
numbers = st.one_of(st.sampled_from(SPECIAL), st.floats(-8, 8, width=16))
vectors = st.builds(
    lambda values, dtype, repeat: torch.tensor(values, dtype=dtype).repeat(repeat),
    st.lists(numbers, max_size=75),
    st.sampled_from(DTYPES),
    st.integers(1, 3),
)
thresholds = st.one_of(st.sampled_from([0.0, 0.1, 1.0, 6.0, 1e6, math.inf]), st.floats(0, 8))
bounds = st.sampled_from(
    [(0.0, math.inf), (0.0, 6.0), (-1.0, 1.0), (-0.1, 0.1), (-math.inf, 2.0), (-math.inf, math.inf)]
)
few = settings(max_examples=60)


@pytest.fixture(scope="module", params=["numpy", "native", "torch"])
def kernels(request: pytest.FixtureRequest) -> Backend:
    if request.param not in available_backends():
        pytest.skip(why_missing() or "")
    return backend(request.param)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit: NaN equals itself, and 0.0 is not -0.0."""
    return a.dtype == b.dtype and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))


def kept_positions(x: Tensor, threshold: float) -> Tensor:
    return torch.tensor([not abs(value) <= threshold for value in x.tolist()], dtype=torch.bool)


@few
@given(x=vectors, threshold=thresholds)
def test_pack_keeps_what_exceeds_the_threshold_bit_for_bit(kernels: Backend, x: Tensor, threshold: float) -> None:
    before = x.clone()
    kept = kept_positions(x, threshold)
    bitmap, values = kernels.pack(x, threshold)
    assert same_bits(bitmap, pack_bits(kept))
    assert same_bits(values, x[kept])
    assert same_bits(x, before)


@few
@given(x=vectors, threshold=thresholds)
def test_unpack_and_gather_invert_pack(kernels: Backend, x: Tensor, threshold: float) -> None:
    bitmap, values = kernels.pack(x, threshold)
    out = torch.full_like(x, 7)
    kernels.unpack(bitmap, values, out=out)
    kept = kept_positions(x, threshold)
    assert same_bits(out, torch.where(kept, x, torch.zeros_like(x)))
    assert same_bits(kernels.gather(bitmap, x), values)


@few
@given(x=vectors, limits=bounds, inplace=st.booleans())
def test_clamp_bits_is_what_torch_clamps_and_differentiates(
    kernels: Backend, x: Tensor, limits: tuple[float, float], inplace: bool
) -> None:
    low, high = limits
    leaf = x.clone().requires_grad_()
    # hardtanh, not clamp: on the bound itself clamp lets the gradient through, as no ReLU does
    expected = torch.nn.functional.hardtanh(leaf, low, high) if math.isfinite(low) else leaf.clamp(low, high)
    source = x.clone()
    out = source if inplace else torch.full_like(x, 7)
    bits = unpack_bits(kernels.clamp_bits(source, out=out, low=low, high=high), x.numel())
    assert torch.equal(out.nan_to_num(9), expected.detach().nan_to_num(9))
    rounded_low, rounded_high = (torch.tensor(bound, dtype=x.dtype).item() for bound in limits)
    stopped = [
        (value <= rounded_low and low != -math.inf) or (value >= rounded_high and high != math.inf)
        for value in x.tolist()
    ]
    assert bits.tolist() == [not stop for stop in stopped]


def test_relu_bits_are_the_derivative_of_relu_also_at_the_edges(kernels: Backend) -> None:
    x = torch.tensor(SPECIAL, requires_grad=True)
    torch.relu(x).sum().backward()
    assert x.grad is not None
    bits = unpack_bits(kernels.clamp_bits(x, out=torch.empty_like(x)), x.numel())
    assert torch.equal(bits, x.grad.bool())


@few
@given(grad=vectors, seed=st.integers(0, 99), scale=st.sampled_from([0.0, 0.01, 0.1, -2.0]), inplace=st.booleans())
def test_mask_by_bits_selects_and_scales_like_torch(
    kernels: Backend, grad: Tensor, seed: int, scale: float, inplace: bool
) -> None:
    passes = torch.rand(grad.numel(), generator=torch.Generator().manual_seed(seed)) < 0.5
    off = grad * scale if scale else torch.zeros_like(grad)
    expected = torch.where(passes, grad, off)
    source = grad.clone()
    out = source if inplace else torch.full_like(grad, 7)
    kernels.mask_by_bits(pack_bits(passes), source, out=out, scale_off=scale)
    assert torch.equal(out.nan_to_num(9, 8, -8), expected.nan_to_num(9, 8, -8))


@pytest.mark.parametrize("numel", [0, 1, 32_767, 32_769, 300_001, 1_048_576 + 5])
@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_and_threads_meet_without_a_seam(kernels: Backend, numel: int, threads: int) -> None:
    x = torch.randn(numel)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = torch.empty_like(x)
        bits = kernels.clamp_bits(x, out=out, high=6.0)
        bitmap, values = kernels.pack(out, 1.0)
        dense = torch.empty_like(x)
        kernels.unpack(bitmap, values, out=dense)
        masked = torch.empty_like(x)
        kernels.mask_by_bits(bits, x, out=masked)
        assert torch.equal(kernels.gather(bitmap, out), values)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out, x.clamp(0, 6))
    assert torch.equal(dense, torch.where(x > 1, out, 0))
    assert torch.equal(masked, torch.where((x > 0) & (x < 6), x, 0))


def test_several_threads_may_pack_at_once(kernels: Backend) -> None:
    tensors = [torch.randn(400_000) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        packed = list(pool.map(lambda x: kernels.pack(x, 1.0), tensors))
    for x, (bitmap, values) in zip(tensors, packed, strict=True):
        assert torch.equal(values, x[x.abs() > 1])
        assert torch.equal(bitmap, pack_bits(x.abs() > 1))


def test_bitmaps_may_start_anywhere_in_a_buffer(kernels: Backend) -> None:
    x = torch.randn(500)
    bitmap, values = kernels.pack(x, 1.0)
    shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), bitmap])[3:]
    out = torch.empty_like(x)
    kernels.unpack(shifted, values, out=out)
    assert torch.equal(out, torch.where(x.abs() > 1, x, 0))
    assert torch.equal(kernels.gather(shifted, x), values)


def test_a_threshold_between_two_numbers_of_a_format_is_not_rounded_up(kernels: Backend) -> None:
    x = torch.tensor([1.0078125], dtype=torch.bfloat16)
    assert kernels.pack(x, 1.007)[1].numel() == 1


@pytest.mark.parametrize(("dtype", "signalling"), [(torch.float16, 0x7C01), (torch.float32, 0x7F800001)])
def test_signalling_nan_and_overflow_do_not_warn(kernels: Backend, dtype: torch.dtype, signalling: int) -> None:
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    x = torch.tensor([signalling, 0], dtype=integer).view(dtype)
    assert unpack_bits(kernels.clamp_bits(x, out=torch.empty_like(x), high=6.0), 2).tolist() == [True, False]
    large = torch.full((3,), torch.finfo(dtype).max, dtype=dtype)
    kernels.mask_by_bits(torch.zeros(1, dtype=torch.uint8), large, out=large, scale_off=-2.0)
    assert large.tolist() == [-math.inf] * 3


def test_gradients_are_not_recorded(kernels: Backend) -> None:
    x = torch.randn(20, requires_grad=True)
    tensors = (kernels.clamp_bits(x, out=torch.empty(20)), *kernels.pack(x, 0.0))
    assert not any(tensor.requires_grad for tensor in tensors)


@pytest.mark.parametrize("threshold", [-1.0, math.nan])
def test_bad_thresholds_leave_the_input_alone(kernels: Backend, threshold: float) -> None:
    x = torch.tensor([-1.0, 2.0])
    with pytest.raises(ConfigError, match="expected a number >= 0"):
        kernels.pack(x, threshold)
    assert x.tolist() == [-1.0, 2.0]


def test_other_dtypes_are_refused(kernels: Backend) -> None:
    with pytest.raises(ConfigError, match="int64; expected one of float64"):
        kernels.pack(torch.arange(3), 0.0)


def test_values_that_do_not_belong_to_the_bitmap_are_refused(kernels: Backend) -> None:
    bitmap = pack_bits(torch.ones(9, dtype=torch.bool))
    with pytest.raises((ConfigError, ValueError, RuntimeError)):
        kernels.unpack(bitmap, torch.ones(2), out=torch.empty(9))
    with pytest.raises(ConfigError, match="for 32 elements"):
        kernels.unpack(bitmap, torch.ones(9), out=torch.empty(32))
    with pytest.raises(ConfigError, match="for 32 elements"):
        kernels.gather(bitmap, torch.empty(32))


def test_choosing_a_backend() -> None:
    x = torch.zeros(1)
    with using_backend("torch"):
        assert backend().name == backend_for(x).name == "torch"
        with using_backend("auto"):
            assert backend().name == ("native" if "native" in available_backends() else "numpy")
        assert backend().name == "torch"
    with pytest.raises(ConfigError, match=r"got 'cuda'; expected 'auto' \| 'native' \| 'numpy' \| 'torch'"):
        set_backend("cuda")  # type: ignore[arg-type]
    assert backend_for(torch.empty(1, device="meta")).name == "meta"


def test_kernels_that_are_missing_are_reported_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "why_missing", lambda: "no C compiler")
    monkeypatch.setattr(backends, "_load", backends._load.__wrapped__)
    assert available_backends() == ("numpy", "torch")
    with using_backend("auto"):
        assert backend().name == "numpy"
    with pytest.raises(ConfigError, match='no kernels for "native": no C compiler; or use "auto"'):
        set_backend("native")


@pytest.mark.usefixtures("native_kernels")
def test_the_name_of_the_implementation_that_is_gone_still_works() -> None:
    with using_backend("numba"):
        assert backend().name == backend("numba").name == "native"


@pytest.mark.parametrize(("value", "expected"), [("torch", "torch"), ("quick", "expected 'auto'")])
def test_the_environment_chooses(value: str, expected: str, tmp_path: Path) -> None:
    code = "import fedmef_fx.packing as m; print(m.backend().name)"
    ran = forked.run(code, folder=tmp_path, environment={ENVIRONMENT_VARIABLE: value})
    assert expected in ran.stdout + ran.stderr


@pytest.mark.gpu
@given(x=vectors, threshold=thresholds, limits=bounds)
def test_cuda_agrees_with_the_cpu(x: Tensor, threshold: float, limits: tuple[float, float]) -> None:
    low, high = limits
    out, cuda_out = torch.empty_like(x), torch.empty_like(x, device="cuda")
    cpu, kernels = backend("numpy"), backend_for(cuda_out)
    expected = cpu.clamp_bits(x, out=out, low=low, high=high), *cpu.pack(out, threshold)
    got = kernels.clamp_bits(x.cuda(), out=cuda_out, low=low, high=high), *kernels.pack(cuda_out, threshold)
    assert torch.equal(cuda_out.cpu().nan_to_num(9), out.nan_to_num(9))
    assert torch.equal(got[0].cpu(), expected[0])
    assert torch.equal(got[1].cpu(), expected[1])
    assert torch.equal(got[2].cpu().nan_to_num(9), expected[2].nan_to_num(9))
