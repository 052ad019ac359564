"""Sizes in bytes, read and shown."""

import math
import re
from typing import Final

from fedmef_fx.errors import ConfigError

__all__ = ["parse_bytes", "shown_bytes"]


_UNITS: Final = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)},
}


_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(value: object, *, name: str = "memory_budget") -> int:
    """A number of bytes from a number or text.

    Args:
        value: Bytes, or text such as "64MB" (millions of bytes), "1.5GiB" (1024^3 bytes), "500 kB".
        name: What it is, for the message.

    Raises:
        ConfigError: Anything else, or less than one byte.

    Example:
        >>> parse_bytes("64MB"), parse_bytes("1.5GiB"), parse_bytes(1000)
        (64000000, 1610612736, 1000)
    """
    count: float = -1.0
    if isinstance(value, int) and not isinstance(value, bool):
        count = value
    elif isinstance(value, str) and (match := _SIZE.fullmatch(value)) and match[2].lower() in _UNITS:
        count = float(match[1]) * _UNITS[match[2].lower()]
    if not 1 <= count < math.inf:
        raise ConfigError(f'{name}: got {value!r}; expected bytes >= 1, or text such as "64MB", "1.5GiB" or "500kB"')
    return int(count)


def shown_bytes(count: float) -> str:
    """A number of bytes for people, in powers of 1000: 999 B, 12.3 kB, 2.0 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if round(count, 0 if unit == "B" else 1) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
