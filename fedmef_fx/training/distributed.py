"""Several processes that train one model: the same masks everywhere, and a check that says where they are not.

`DistributedDataParallel` averages gradients by the place of a parameter, and copies buffers of rank 0, masks among
them, to the others. With other masks on other ranks it would average gradients of different weights. So ranks have to
change masks together, and to the same ones:

    candidates = synchronized_candidates(growth_candidates(model, loss_fn, batches))   # the same on all ranks
    set_masks(model, ...)                                                             # from what all ranks share
    parallel = DistributedDataParallel(model)                                         # again, where weights are packed

`fedmef_fx.sparse_model.replicas` checks that they did.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from fedmef_fx.sparse_model.masks import masks, set_masks
from fedmef_fx.sparse_model.replicas import check_process_group, check_same_masks
from fedmef_fx.sparsity.sparse_gradient import SparseGradient, average_sparse_gradients

__all__ = ["check_same_masks", "synchronize_masks", "synchronized_candidates"]


def synchronized_candidates(
    candidates: Mapping[str, SparseGradient], *, group: "dist.ProcessGroup | None" = None
) -> dict[str, SparseGradient]:
    """Growth candidates of all ranks, averaged: the same on every rank, to the last bit.

    Every rank calls it with what `fedmef_fx.growth_candidates` found on its own batches. A coordinate that a rank did
    not send counts as 0 there, as in a federation. All ranks weigh the same.

    Args:
        candidates: Parameter name -> candidates, of the same parameters in the same order on all ranks.
        group: The process group; None for the default one.

    Raises:
        ConfigError: There is no process group.
    """
    check_process_group("synchronized_candidates")
    return {name: average_sparse_gradients(_gathered(own, group)) for name, own in candidates.items()}


def synchronize_masks(model: nn.Module, *, source: int = 0, group: "dist.ProcessGroup | None" = None) -> None:
    """Give a transformed model the masks of one rank on all ranks, as `set_masks` does it.

    Every rank calls it, before the model is wrapped or between two steps.

    Args:
        model: A transformed model.
        source: Global rank whose masks are taken.
        group: The process group; None for the default one.

    Raises:
        ConfigError: There is no process group.
    """
    check_process_group("synchronize_masks")
    new = {name: mask.to(torch.uint8).contiguous() for name, mask in masks(model).items()}
    for mask in new.values():
        dist.broadcast(mask, source, group=group)
    set_masks(model, {name: mask.bool() for name, mask in new.items()})


def _gathered(own: SparseGradient, group: "dist.ProcessGroup | None") -> list[tuple[SparseGradient, float]]:
    """The candidates of one parameter from all ranks, in the order of ranks."""
    ranks, device = dist.get_world_size(group), own.positions.device
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(ranks)]
    dist.all_gather(sizes, torch.tensor([own.positions.numel()], device=device), group=group)
    longest = max(int(size) for size in sizes)
    if not longest:
        return [(own, 1.0)]
    parts = []
    for tensor in (own.positions, own.values.double()):
        padded = tensor.new_zeros(longest)
        padded[: tensor.numel()] = tensor
        received = [torch.empty_like(padded) for _ in range(ranks)]
        dist.all_gather(received, padded, group=group)
        parts.append([part[: int(size)] for part, size in zip(received, sizes, strict=True)])
    return [
        (SparseGradient(positions, values.to(own.values.dtype), own.numel), 1.0)
        for positions, values in zip(*parts, strict=True)
    ]
