"""What all messages have in common: a format, a kind, fields, tensors of bounded size, and a checksum.

The checksum finds bytes that changed on their way. It is no signature: whoever forges a message can forge it, too.
"""

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Any, Final

from torch import Tensor

from fedmef_fx.errors import WireError
from fedmef_fx.files.container import decode, digest, encode

__all__ = ["FORMAT", "Envelope", "seal", "unseal"]

FORMAT: Final = 1
"""Version of the format; a peer of another version is refused."""

# The header states each tensor's name twice at most (once among the fields), up to 16 sizes, offsets and punctuation.
_HEADER_BYTES_PER_TENSOR: Final = 512
_HEADER_BYTES: Final = 4096
# What strategies add has names and numbers in the header, too.
_HEADER_ROOM: Final = 2**17
# A message may be larger than its model allows by this factor before it is refused unread: so that a message that is
# only a little wrong is read, and the error says in what.
_SLACK: Final = 2


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Envelope:
    """A message that was taken apart; its content is still to be checked.

    Attributes:
        tensors: What is left of its tensors.
        fields: Its fields, without format, kind and checksum.
        checksum: What it says its checksum is.
        found: What its checksum is.
    """

    tensors: dict[str, Tensor]
    fields: dict[str, Any]
    checksum: object
    found: str

    def check_all_read(self) -> None:
        """Refuse tensors that nobody asked for, and bytes that changed on the way.

        Raises:
            WireError: There are such.
        """
        if self.tensors:
            unknown = sorted(self.tensors)
            raise WireError(f"message: got unknown tensors {unknown!r:.200}; expected only what the model has")
        if self.checksum != self.found:
            raise WireError(
                "message: the checksum does not fit the content: it was damaged or changed on its way; send it again"
            )


def seal(tensors: Mapping[str, Tensor], kind: str, fields: Mapping[str, Any]) -> bytes:
    """A message as bytes; the same content always gives the same bytes.

    Args:
        tensors: Name -> tensor.
        kind: Which message it is.
        fields: Anything JSON can hold.
    """
    content = {"format": FORMAT, "kind": kind, **fields}
    return encode(tensors, content | {"checksum": digest(tensors, content)})


def unseal(
    data: bytes,
    kind: str,
    *,
    fields: Collection[str],
    optional: Collection[str] = (),
    sizes: Mapping[str, int],
    room: int = 0,
) -> Envelope:
    """Take a message apart, without looking at bytes that are more than a message of this kind can have.

    Args:
        data: The bytes.
        kind: Which message it has to be.
        fields: Names of the fields that it has to have.
        optional: Names of those that it may have.
        sizes: Name of every tensor that it may have -> its most bytes.
        room: How many bytes its tensors may have besides, and its header up to a bound.

    Raises:
        WireError: Another message, or something else.
    """
    header = (
        _HEADER_BYTES
        + min(room, _HEADER_ROOM)
        + sum(_HEADER_BYTES_PER_TENSOR + 4 * len(json.dumps(name)) for name in sizes)
    )
    largest = _SLACK * (header + room + sum(sizes.values()))
    if len(data) > largest:
        raise WireError(f"{kind}: got {len(data)} bytes; expected at most {largest} for this model: another model")
    tensors, content = decode(data, header_bytes=header)
    got = content.get("format"), content.get("kind")
    if got != (FORMAT, kind):
        raise WireError(f"{kind}: got format {got[0]!r:.40}, kind {got[1]!r:.40}; expected {FORMAT}, {kind!r}")
    names = content.keys() - {"format", "kind"} - set(optional)
    if names != {*fields, "checksum"}:
        raise WireError(f"{kind}: got fields {sorted(names)!r:.200}; expected {sorted(fields)} and a checksum")
    checksum = content.pop("checksum")
    found = digest(tensors, content)
    return Envelope(
        tensors, {name: content[name] for name in content if name not in ("format", "kind")}, checksum, found
    )
