"""Split floats: every bit of every float32 comes back, in about as many bytes as the entropy of the exponents says."""

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedmef_fx.export.onnx.codecs import exponents
from fedmef_fx.export.onnx.codecs.exponents import (
    ExponentCode,
    choose_exponents,
    exponent_entropy,
    join_floats,
    split_floats,
)

Floats = NDArray[np.float32]

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
CODES = [
    ExponentCode((1,), (127,)),
    ExponentCode((1,), ()),
    ExponentCode((2, 3), tuple(range(130, 120, -1))),
    ExponentCode((2, 2, 3), tuple(range(130, 117, -1))),
    ExponentCode((4,), (254, 24, *range(120, 133))),
    ExponentCode((1, 1, 1), (127,)),
]


def _bits(values: Floats) -> list[int]:
    return values.view(np.uint32).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("code", CODES, ids=lambda code: f"{code.name} of {len(code.exponents)}")
@given(st.lists(FINITE, max_size=50))
@example([0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, 1.1754944e-38, 3.4028235e38, -3.4028235e38])
@example([])
def test_finite_values_come_back(code: ExponentCode, chosen: list[float]) -> None:
    values = np.array(chosen, np.float32)

    assert _bits(join_floats(split_floats(values, code))) == _bits(values)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_whatever_the_bits_are_they_come_back_under_the_code_that_is_chosen(patterns: list[int]) -> None:
    """NaN and infinities are refused before; a code must not lose them all the same."""
    values = np.array(patterns, np.uint32).view(np.float32)
    code, _ = choose_exponents(values)

    assert _bits(join_floats(split_floats(values, code))) == _bits(values)


@pytest.mark.parametrize("exponent", range(256))
def test_every_exponent_comes_back(exponent: int) -> None:
    mantissas = np.array([0, 1, 2**22, 2**23 - 1, 0x1234, 0xFFFF, 0x10000], np.uint32)
    patterns = np.concatenate([mantissas, mantissas | 2**31]) | np.uint32(exponent << 23)
    values = patterns.view(np.float32)
    code, _ = choose_exponents(values)

    split = split_floats(values, code)

    assert _bits(join_floats(split)) == patterns.tolist()
    # A power of two that a processor may flush to zero, or that makes no finite number, is never multiplied by.
    is_safe = 24 <= exponent <= 254
    zeros = 2 if exponent == 0 else 0
    assert split.outliers.size == (0 if is_safe else values.size - zeros)
    assert all(2.0**-126 <= scale <= 2.0**104 for scale in split.code.scales.tolist()[:-1])


@settings(max_examples=30)
@given(st.integers(0, 99), st.sampled_from([1, 7, 8, 100, 5000]), st.floats(1e-20, 1e10), st.floats(0, 3))
@example(46, 5000, 1.0, 3.0)  # 43 values underflow to 0, which has a number of its own and is no outlier
def test_it_takes_about_what_was_promised(seed: int, count: int, scale: float, spread: float) -> None:
    rng = np.random.default_rng(seed)
    values = (scale * rng.standard_normal(count) * 10 ** (spread * rng.standard_normal(count))).astype(np.float32)
    code, promised = choose_exponents(values)

    taken = split_floats(values, code).nbytes

    # Nodes are in the promise; a leading zero, and what pads it, are not in it.
    nodes = exponents._SPLIT_BYTES + exponents._LEVEL_BYTES * len(code.widths)
    assert taken + nodes - 64 <= promised <= 1.005 * (taken + nodes + 16)


@pytest.mark.parametrize(
    ("name", "over"),
    # Bits per value over 24 and the entropy of the exponents.
    [("normal", 0.3), ("uniform", 0.3), ("channels", 0.3), ("constant", 1.1), ("laplace", 0.3)],
)
def test_it_is_close_to_the_entropy(name: str, over: float) -> None:
    rng = np.random.default_rng(0)
    drawn: dict[str, Any] = {
        "normal": rng.standard_normal(100_000) * 0.03,
        "uniform": rng.uniform(-0.05, 0.05, 100_000),
        "channels": rng.standard_normal((100, 1000)) * rng.uniform(0.01, 0.03, (100, 1)),
        "constant": np.full(100_000, -0.3),
        "laplace": rng.laplace(size=100_000),
    }
    values = drawn[name].astype(np.float32).reshape(-1)
    code, _ = choose_exponents(values)

    bits = 8 * split_floats(values, code).nbytes / values.size

    bound = 24 + exponent_entropy(values)
    assert bound < bits < bound + over


def test_entropies_that_are_known() -> None:
    assert exponent_entropy(np.zeros(0, np.float32)) == 0
    assert exponent_entropy(np.full(9, 1.5, np.float32)) == 0
    assert exponent_entropy(np.array([1, -2, 4, -8], np.float32)) == 2
    assert exponent_entropy(np.array([1.0, 1.9, -1.2, 2.0], np.float32)) == pytest.approx(0.8112781)


def test_frequent_exponents_take_the_short_codes() -> None:
    values = np.array([1.0] * 5000 + [2.0] * 900 + [0.5] * 90 + [1e-40] * 2, np.float32)

    code, _ = choose_exponents(values)
    split = split_floats(values, code)

    assert code.exponents[:3] == (127, 128, 126)
    assert split.outliers.tolist() == [5991, 5992]  # after a zero, which comes first
    assert split.patches.tolist() == values[-2:].tolist()
