"""Tables of commands in narrow windows: no word is split, nothing is lost."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fedmef_fx.commands.tables import show_table

HEADINGS = ("parameter", "shape", "density", "reason")
ROWS = [
    ("layer1.0.conv1.weight", "64x64x3x3", "0.1000", ""),
    ("encoder.attention.self.query.weight", "768x768", "0.2000", "read by Python code, which torch.fx cannot trace"),
]


def _shown(headings: tuple[str, ...], rows: list[tuple[str, ...]], width: int) -> str:
    file = io.StringIO()
    show_table(Console(file=file, width=width, highlight=False), headings, rows, numbers=frozenset({2}))
    return file.getvalue()


@pytest.mark.parametrize("width", [160, 80, 50])
def test_words_stay_whole(width: int) -> None:
    text = _shown(HEADINGS, ROWS, width)
    words = {word.strip(",") for word in text.split()}
    assert {word.strip(",") for row in ROWS for cell in row for word in cell.split()} <= words
    assert max(map(len, text.splitlines())) <= width


def test_what_fits_is_a_table() -> None:
    lines = _shown(HEADINGS, ROWS, 160).splitlines()
    assert lines[0].split() == list(HEADINGS)
    assert len(lines) == 4
    assert _shown(HEADINGS, ROWS[:1], 80).splitlines()[0].split() == list(HEADINGS)


def test_what_does_not_fit_is_a_paragraph_per_row() -> None:
    assert _shown(HEADINGS, ROWS, 50).splitlines() == [
        "layer1.0.conv1.weight",
        "  shape: 64x64x3x3, density: 0.1000",
        "encoder.attention.self.query.weight",
        "  shape: 768x768, density: 0.2000, reason: read by",
        "    Python code, which torch.fx cannot trace",
    ]


WORDS = st.text("abc-.0", min_size=1, max_size=12)
CELLS = st.lists(WORDS, max_size=6).map(" ".join)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(WORDS, CELLS, CELLS), min_size=1, max_size=4), st.integers(30, 90))
def test_no_width_splits_a_word_that_fits(rows: list[tuple[str, ...]], width: int) -> None:
    text = _shown(("name", "first one", "second"), rows, width)
    assert max(map(len, text.splitlines())) <= width
    assert {word for row in rows for cell in row for word in cell.split()} <= {w.strip(",") for w in text.split()}
