"""Position codes: every set of positions comes back, in as few bytes as was promised."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmef_fx.export.onnx.codecs.fields import pack_fields, plane_bytes, unpack_fields
from fedmef_fx.export.onnx.codecs.positions import (
    Bitmap,
    Gaps,
    PositionCode,
    Rice,
    choose_code,
    decode_positions,
    encode_positions,
)

CODES: list[PositionCode] = [Bitmap(), *(Gaps(bits) for bits in range(2, 9)), *(Rice(bits) for bits in range(1, 8))]


@given(st.integers(1, 8).flatmap(lambda k: st.tuples(st.just(k), st.lists(st.integers(0, 2**k - 1)))))
def test_fields_come_back(case: tuple[int, list[int]]) -> None:
    bits, values = case
    fields = np.array(values, np.int64)

    planes = pack_fields(fields, bits)

    assert np.array_equal(unpack_fields(planes, bits, fields.size), fields)
    assert sum(plane.nbytes for plane in planes) == plane_bytes(fields.size, bits)


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.name)
@given(st.sets(st.integers(0, 2000)))
def test_positions_come_back(code: PositionCode, chosen: set[int]) -> None:
    positions = np.array(sorted(chosen), np.int64)

    encoded = encode_positions(positions, 2001, code)

    assert np.array_equal(decode_positions(encoded), positions)
    assert encoded.active == positions.size


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.name)
@pytest.mark.parametrize(
    "positions",
    [
        [],
        [0],
        [99_999],
        [0, 99_999],
        range(100_000),
        range(0, 100_000, 255),
        range(254, 100_000, 256),
        [0, 1, 2, 70_000],
    ],
    ids=["none", "first", "last", "first and last", "all", "every 255th", "gaps at the escape", "run and gap"],
)
def test_extremes_come_back(code: PositionCode, positions: range | list[int]) -> None:
    expected = np.array(positions, np.int64)

    assert np.array_equal(decode_positions(encode_positions(expected, 100_000, code)), expected)


@given(st.floats(0.0, 1.0), st.integers(1, 3000), st.integers(0, 99))
def test_the_choice_takes_what_it_said_and_no_code_much_less(density: float, size: int, seed: int) -> None:
    positions = np.flatnonzero(np.random.default_rng(seed).random(size) < density)
    gaps = np.diff(positions, append=size) - 1

    chosen, promised = choose_code(gaps, size, value_bytes=0, rice_pays=0.01)

    taken = {code.name: encode_positions(positions, size, code).nbytes for code in CODES}
    assert taken[chosen.name] == promised
    simple = min(nbytes for name, nbytes in taken.items() if "rice" not in name)
    assert promised <= simple
    assert promised == min(taken.values()) or promised == simple <= min(taken.values()) / 0.99


@pytest.mark.parametrize("density", [0.02, 0.05, 0.1, 0.2])
def test_rice_is_close_to_the_entropy(density: float) -> None:
    size = 400_000
    positions = np.flatnonzero(np.random.default_rng(0).random(size) < density)
    density = positions.size / size
    entropy = -density * math.log2(density) - (1 - density) * math.log2(1 - density)

    code, taken = choose_code(np.diff(positions, append=size) - 1, size, value_bytes=0, rice_pays=0.01)

    assert isinstance(code, Rice)
    # Rice codes of geometric gaps are within 4 % of the entropy where 2**k is near the mean gap times ln 2.
    assert 0.999 < taken * 8 / (size * entropy) < 1.04


def test_what_marks_nothing_arrives_at_an_inactive_element() -> None:
    """The property that lets a decoder write zeros there: all arrivals are different and below the size."""
    positions = np.array([3, 4, 40, 300, 301, 999])
    for code in (Gaps(3), Rice(2)):
        encoded = encode_positions(positions, 1000, code)
        if isinstance(code, Gaps):
            fields = unpack_fields(encoded.planes, 3, encoded.symbols)
            arrivals = 1000 - np.cumsum((fields + (fields != code.escape))[::-1])
        else:
            marks = np.unpackbits(encoded.stream, count=encoded.symbols).astype(bool)
            steps = unpack_fields(encoded.planes, 2, encoded.active + 1) + 1
            arrivals = 1000 - np.cumsum(steps[np.cumsum(marks) * marks][::-1])
        assert len(set(arrivals)) == arrivals.size > positions.size
        assert 0 <= arrivals.min() <= arrivals.max() < 1000
        assert set(positions) <= set(arrivals)
