"""What tells a state dictionary whose masks belong to its values from one that somebody averaged.

The average of two dictionaries with different masks looks like any dictionary: its masks may be the union of both, or
those of one with the values of both, packed values even of different coordinates. So a transformed model's dictionary
has one more entry, a digest of the masks: small whole numbers in floating point. Whoever averages the weights averages
the digest too, and it fits no mask any more; where the masks were the same, it stays what it was.
"""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from fedmef_fx.errors import CheckpointError
from fedmef_fx.packing.bitmap import pack_bits
from fedmef_fx.sparse_model.transformation import CHILD_NAME

__all__ = ["DIGEST", "check_digest", "mask_digest"]

DIGEST = f"{CHILD_NAME}._extra_state"
"""The entry's name: torch's for what a module has besides tensors, which distributed checkpoints know."""

_BYTES = 6
# Equal numbers up to 255 stay equal to this in a weighted mean in float32, and different ones do not in an average
# that gives 1/10000 of its weight to another model.
_TOLERANCE = 1e-3


def mask_digest(buffers: Iterable[Tensor]) -> Tensor:
    """Digests of masks or bitmaps, float32 `[masks, 6]` of whole numbers from 0 to 255; the same for either form."""
    return torch.tensor([_digest(buffer) for buffer in buffers], dtype=torch.float32).view(-1, _BYTES)


def _digest(buffer: Tensor) -> list[int]:
    bits = (
        buffer.detach()
        if buffer.dtype == torch.uint8
        else pack_bits(buffer.detach().round() != 0 if buffer.is_floating_point() else buffer.detach() != 0)
    )
    return list(hashlib.blake2b(bits.cpu().contiguous().numpy().tobytes(), digest_size=_BYTES).digest())


def check_digest(digest: object, buffers: dict[str, Tensor | None]) -> None:
    """Raise unless masks are those that a digest was made of.

    Args:
        digest: The entry of a dictionary.
        buffers: Every masked parameter with the mask or bitmap that the dictionary has for it, None for those it lacks.

    Raises:
        CheckpointError: They are not.
    """
    if not isinstance(digest, Tensor) or digest.shape != (len(buffers), _BYTES):
        return  # of another model: the names and shapes of the other entries say so
    rows = digest.detach().cpu().double()
    for row, (name, buffer) in zip(rows, buffers.items(), strict=True):
        if buffer is None:
            continue
        if bool(((row - torch.tensor(_digest(buffer))).abs() > _TOLERANCE).any()):
            raise CheckpointError(
                f"load_state_dict: the mask of {name} is not the one that belongs to its values: expected the "
                "dictionary of one model, got one that was changed, or an average of dictionaries with different "
                "masks. For an average over training use fedmef_fx.averaged(model); for one of several models average "
                "their fedmef_fx.dense_state_dict(model) and load that, which keeps the masks of the model; "
                f"to change masks use fedmef_fx.set_masks. Without {DIGEST!r} a dictionary is taken as it stands"
            )
