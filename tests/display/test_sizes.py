"""Sizes as people read them."""

import pytest

from fedmef_fx.display.sizes import shown_bytes


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_960, "100.0 kB"), (999_960, "1.0 MB"), (2 * 10**12, "2.0 TB")],
)
def test_small_sizes_are_exact_and_large_ones_rounded(count: int, text: str) -> None:
    assert shown_bytes(count) == text
