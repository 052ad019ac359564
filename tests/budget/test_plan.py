"""The pure parts of planning: sizes as text, and the order in which accuracy is given up."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmef_fx.budget.plan import LayerLevels, moves
from fedmef_fx.display.sizes import parse_bytes
from fedmef_fx.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (1, 1),
        (64_000_000, 64_000_000),
        ("64MB", 64_000_000),
        ("64 mb", 64_000_000),
        ("1.5GiB", 3 << 29),
        (" 500kB ", 500_000),
        ("512KiB", 1 << 19),
        ("7", 7),
        ("7 B", 7),
    ],
)
def test_sizes(text: object, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "value", [0, -5, True, 1.5, None, "", "MB", "64 parsecs", "-3MB", "0MB", "1e3", "1,5GB", "64MB64", "nan", "9" * 400]
)
def test_what_is_no_size(value: Any) -> None:
    with pytest.raises(ConfigError, match=r'Config.memory_budget: got .*"64MB"'):
        parse_bytes(value, name="Config.memory_budget")


def test_most_bytes_per_error_first() -> None:
    cheap = LayerLevels("cheap", (0.0, 0.5, 0.9), (100, 50, 10), (0.0, 0.1, 5.0))
    dear = LayerLevels("dear", (0.0, 0.5, 0.9), (100, 50, 10), (0.0, 1.0, 2.0))
    useless = LayerLevels("useless", (0.0, 0.5), (10, 10), (0.0, 0.0))
    # 0.1 / 50, then 1.0 / 50, then 1.0 / 40, then 4.9 / 40, and what saves nothing.
    assert moves([cheap, dear, useless]) == [0, 1, 1, 0, 2]


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 1000), st.floats(0, 10)), min_size=1, max_size=5), min_size=1, max_size=6
    )
)
def test_every_step_is_taken_once_and_in_order(levels: list[list[tuple[int, float]]]) -> None:
    layers = [
        LayerLevels(
            str(i),
            tuple(0.1 * k for k in range(len(steps))),
            tuple(sorted((n for n, _ in steps), reverse=True)),
            tuple(sorted(e for _, e in steps)),
        )
        for i, steps in enumerate(levels)
    ]
    order = moves(layers)
    assert sorted(order) == sorted(i for i, steps in enumerate(levels) for _ in steps[1:])
