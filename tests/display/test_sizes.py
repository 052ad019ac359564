"""Sizes as people read them."""

import pytest

from fedmef_fx.display.sizes import shown_bytes


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (99_999, "99,999 B"), (100_000, "0.1 MB"), (1_234_567, "1.235 MB")]
)
def test_small_sizes_are_exact_and_large_ones_rounded(count: int, text: str) -> None:
    assert shown_bytes(count) == text
