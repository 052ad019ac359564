"""One colour for each pass, the same in every page and picture, whatever else ran.

Most are Okabe and Ito's, told apart by readers who do not see all colours; those of passes from elsewhere are Tol's
muted ones, found by the pass's name. Colour never stands alone: passes are named wherever they are coloured.
"""

import zlib
from typing import Final

from fedmef_fx.passes.catalogue import PASSES

__all__ = ["colour_of", "tint_of"]

_CAPTURE: Final = "#8a94a3"
_OWN: Final = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#9c6b3c", "#d55e00", "#0072b2", "#f0e442", "#7d7d7d")
_FOREIGN: Final = ("#aa4499", "#44aa99", "#882255", "#117733", "#332288", "#999933")
_WHITE: Final = 255
_SHARE_OF_WHITE: Final = 0.7


def colour_of(name: str) -> str:
    """The colour of a pass, `#rrggbb`.

    Args:
        name: Of the pass, without its options.
    """
    own = {step.name: colour for step, colour in zip(PASSES, _OWN, strict=True)}
    if name == "capture":
        return _CAPTURE
    return own.get(name) or _FOREIGN[zlib.crc32(name.encode("utf-8", "surrogatepass")) % len(_FOREIGN)]


def tint_of(name: str) -> str:
    """The colour of a pass as a light tint, on which black text is read."""
    channels = bytes.fromhex(colour_of(name)[1:])
    mixed = (round(_SHARE_OF_WHITE * _WHITE + (1 - _SHARE_OF_WHITE) * channel) for channel in channels)
    return "#" + bytes(mixed).hex()
