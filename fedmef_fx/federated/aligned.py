"""Tensors that go with a model's weights and are kept from round to round, while masks change in between.

They are kept as active values with the mask that they were active under, one bit per weight. Recalled under another
mask, a weight that was active before has its number, a grown one 0.
"""

from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor

from fedmef_fx.errors import ConfigError
from fedmef_fx.packing.bitmap import pack_bits, unpack_bits

__all__ = ["group_of", "recalled", "remember", "under"]


def under(values: Tensor, before: Tensor, now: Tensor) -> Tensor:
    """Active values under one mask, as they are under another: 0 where a weight was masked.

    Args:
        values: `[active before]`, in row-major order.
        before: The mask that they belong to, boolean.
        now: The other mask, of its shape.

    Returns:
        `[active now]`.
    """
    if torch.equal(before, now):
        return values
    return values.new_zeros(before.shape).masked_scatter_(before, values)[now]


def group_of(tensors: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    """The tensors whose names start with a group's, by the rest of their names."""
    prefix = f"{group}/"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def remember(
    memory: MutableMapping[str, Tensor], group: str, tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> None:
    """Keep tensors under a group's name, in the place of those that are there.

    Args:
        memory: Where.
        group: The name.
        tensors: Name of a weight -> active values under its mask, or a tensor of any shape for one without a mask.
        masks: Name -> mask, boolean.

    Raises:
        ConfigError: A tensor of another size than its mask has active weights.
    """
    for name in [name for name in memory if name.startswith(f"{group}/")]:
        del memory[name]
    for name, tensor in tensors.items():
        memory[f"{group}/value/{name}"] = tensor.detach().cpu().clone()
        if name not in masks:
            continue
        active = int(masks[name].count_nonzero())
        if tensor.shape != (active,):
            raise ConfigError(
                f"remember: {group!r}: {name!r}: got {list(tensor.shape)}; expected [{active}], its active weights"
            )
        memory[f"{group}/mask/{name}"] = pack_bits(masks[name].cpu())


def recalled(
    memory: Mapping[str, Tensor], group: str, like: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What was kept under a group's name, under the masks that there are now; zeros where nothing was kept.

    Args:
        memory: Where.
        group: The name.
        like: Name of a weight -> active values under its mask, or a tensor of any shape for one without a mask.
        masks: Name -> mask, boolean.
    """
    result = {}
    for name, weight in like.items():
        kept, bits = memory.get(f"{group}/value/{name}"), memory.get(f"{group}/mask/{name}")
        if kept is not None and bits is not None and name in masks:
            now = masks[name].cpu()
            kept = under(kept, unpack_bits(bits, now.numel()).reshape(now.shape), now)
        result[name] = torch.zeros_like(weight) if kept is None else kept.to(weight.device)
    return result
