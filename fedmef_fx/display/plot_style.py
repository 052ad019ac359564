"""The one style of all pictures: colours, lines, sizes, and how they are written.

Colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/), which people tell apart who do not see all colours;
series also differ in their lines and markers. matplotlib is imported when a picture is drawn, never before.
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedmef_fx.display.printable import shortened, visible
from fedmef_fx.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLORS", "LINES", "MUTED", "drawing", "label"]

COLORS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#000000")
"""Okabe and Ito's palette, the ones with most contrast first."""
MUTED: Final = "#999999"
LINES: Final = ("-", "--", "-.", ":")

_FORMATS: Final = (".png", ".svg", ".pdf")
_LONGEST_LABEL: Final = 40
_RC: Final[dict[Any, Any]] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "grid.alpha": 0.3,
    "legend.fontsize": "small",
    "legend.framealpha": 0.9,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "savefig.dpi": 150,
    "svg.hashsalt": "fedmef_fx",  # the same picture is the same file
    "text.parse_math": False,  # names may hold dollar signs
}


@contextlib.contextmanager
def drawing(path: str | Path, size: tuple[float, float], *, call: str) -> Iterator["Figure"]:
    """A block that draws on a figure, which is written when the block ends.

    Args:
        path: The file to write; its suffix says the format: .png, .svg or .pdf.
        size: Width and height in inches.
        call: What the user called, for error messages.

    Yields:
        An empty figure.

    Raises:
        ConfigError: matplotlib is not installed, another format, or a path that cannot be written.
    """
    target = Path(path)
    if target.suffix.lower() not in _FORMATS:
        raise ConfigError(f"{call}: {path}: expected a file name that ends in {', '.join(_FORMATS)}")
    try:
        import matplotlib as mpl  # noqa: PLC0415 -- an extra, and slow to import
        from matplotlib.figure import Figure  # noqa: PLC0415 -- as above
    except ImportError as error:
        raise ConfigError(f"{call}: needs matplotlib; install it: pip install 'fedmef-fx[viz]'") from error
    metadata = {"Date": None} if target.suffix.lower() == ".svg" else {}
    with mpl.rc_context(_RC), warnings.catch_warnings():
        # Names may be in any script; what the font does not have is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=size)
        yield figure
        try:
            figure.savefig(target, metadata=metadata)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{call}: {path}: cannot be written: {error}") from error


def label(name: str) -> str:
    """A name as it can stand in a picture: in one line, not too long."""
    return shortened(visible(name), longest=_LONGEST_LABEL)
