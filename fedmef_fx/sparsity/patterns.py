"""Masks of whole channels and of N:M patterns: how many, which first, which change places.

A channel is a unit like a weight is one: its magnitude is the norm of its weights, over all layers that it runs
through, and its gradient the norm of theirs. So the rules of `adjust` hold for vectors with one entry per channel.
In an N:M pattern weights change places within their group of M only.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedmef_fx.errors import ConfigError
from fedmef_fx.sparsity.allocation import allocate
from fedmef_fx.sparsity.granularity import Layout, Pattern
from fedmef_fx.sparsity.masks import random_generator
from fedmef_fx.sparsity.selection import magnitudes, smallest_positions
from fedmef_fx.sparsity.sparse_gradient import SparseGradient

__all__ = [
    "adjust_pattern",
    "allocate_channels",
    "best_in_groups",
    "lowest_in_groups",
    "pattern_mask",
    "random_pattern_mask",
    "row_norms",
]


def allocate_channels(
    shapes: Mapping[str, Sequence[int]],
    groups: Mapping[str, Sequence[str]],
    layouts: Mapping[str, Layout],
    density: float,
    *,
    method: str,
    multiple: int,
) -> dict[str, int]:
    """How many channels each group of layers keeps.

    The budget of weights is shared among the layers (`allocate`); a group keeps the channels that its layers' weights
    make up, rounded to the nearest multiple (half of one down, as a budget should not be exceeded), at least one
    multiple and at most all channels.

    Args:
        shapes: Parameter name -> shape.
        groups: First member -> all members, whose channels are the same.
        layouts: Parameter name -> layout.
        density: Active share, (0, 1].
        method: "erk" or "uniform".
        multiple: Channels are kept in multiples of this, >= 1.

    Returns:
        First member -> number of kept channels.
    """
    counts = allocate(shapes, density, method=method)  # type: ignore[arg-type]  # Config has checked it
    kept = {}
    for leader, members in groups.items():
        channels = layouts[leader].channels(torch.Size(shapes[leader]))
        per_channel = sum(torch.Size(shapes[name]).numel() for name in members) / max(channels, 1)
        exact = sum(counts[name] for name in members) / max(per_channel, 1)
        # Rounding noise of the division must not decide a tie.
        rounded = math.ceil(exact / multiple - 0.5 - 1e-9) * multiple
        kept[leader] = min(max(rounded, multiple), channels)
    return kept


def row_norms(weights: Sequence[tuple[Tensor, Layout]]) -> Tensor:
    """The Euclidean norm of each channel's weights, over all layers of its group; [channels], in at least float32."""
    squares = []
    for weight, layout in weights:
        rows = layout.rows(weight.detach())
        squares.append(rows.to(torch.promote_types(rows.dtype, torch.float32)).square().sum(1))
    return torch.stack([square.to(squares[0].device) for square in squares]).sum(0).sqrt()


def pattern_mask(scores: Tensor, pattern: Pattern, layout: Layout) -> Tensor:
    """The mask that keeps the N largest scores in each group of M; of equal scores the earlier ones.

    Raises:
        ConfigError: Inputs that cannot be cut into groups of M.
    """
    if not layout.can_take(pattern, scores.shape):
        raise ConfigError(
            f"pattern_mask: got the shape {list(scores.shape)}; expected inputs in multiples of M: {pattern}"
        )
    blocks = layout.blocks(scores, pattern.of)
    order = blocks.argsort(dim=1, descending=True, stable=True)
    mask = torch.zeros_like(blocks, dtype=torch.bool).scatter_(1, order[:, : pattern.kept], value=True)
    return layout.unblocked(mask, scores.shape)


def random_pattern_mask(name: str, shape: torch.Size, pattern: Pattern, layout: Layout, *, seed: int) -> Tensor:
    """A mask with uniformly drawn positions in each group of M; depends on seed, name and shape only."""
    scores = torch.from_numpy(random_generator(seed, name).random(shape.numel())).reshape(shape)
    return pattern_mask(scores, pattern, layout)


def lowest_in_groups(weight: Tensor, mask: Tensor, k: int, *, pattern: Pattern, layout: Layout) -> Tensor:
    """theta_low of an N:M pattern: the lowest active weight of the k groups where it is lowest.

    Groups without an active or without an inactive weight are no candidates.

    Returns:
        At most k flat positions, int64, ascending.
    """
    positions = _positions(weight.shape, pattern, layout, device=weight.device)
    active = layout.blocks(mask, pattern.of)
    blocks = magnitudes(layout.blocks(weight.detach(), pattern.of)).reshape(active.shape)
    movable = (active.any(1) & ~active.all(1)).nonzero().squeeze(1)
    lowest = torch.where(active, blocks, torch.inf)[movable].min(1)
    chosen = smallest_positions(lowest.values, min(k, len(movable)))
    return positions[movable[chosen], lowest.indices[chosen]].sort().values


def best_in_groups(gradient: SparseGradient, *, shape: torch.Size, pattern: Pattern, layout: Layout) -> SparseGradient:
    """The largest |gradient| of each group of M that has any; of equal ones the earlier."""
    if gradient.positions.numel() == 0:
        return gradient
    block = _block_numbers(shape, pattern, layout)[gradient.positions.cpu()].to(gradient.positions.device)
    order = magnitudes(gradient.values).argsort(descending=True, stable=True)
    order = order[block[order].argsort(stable=True)]
    first = torch.ones(len(order), dtype=torch.bool, device=order.device)
    first[1:] = block[order][1:] != block[order][:-1]
    chosen = order[first].sort().values
    return SparseGradient(gradient.positions[chosen], gradient.values[chosen], gradient.numel)


def adjust_pattern(
    weight: Tensor,
    mask: Tensor,
    gradient: SparseGradient,
    k: int,
    *,
    pattern: Pattern,
    layout: Layout,
    may_go: Tensor | None = None,
) -> Tensor:
    """The mask after one adjustment within groups of M; the number of active weights of every group stays.

    1. Candidates are inactive coordinates with a gradient other than 0, the largest |gradient| of each group.
    2. Of the groups with a candidate and an active weight that may go, the k change whose lowest such weight is lowest:
       it is pruned, the candidate is grown.

    Args:
        weight: A parameter, any shape.
        mask: Boolean, of its shape; it is not changed.
        gradient: Averaged gradient of the parameter.
        k: How many weights change places.
        pattern: N:M.
        layout: Of the parameter.
        may_go: Boolean, of its shape: the weights that may be pruned; None for all.
    """
    positions, values = gradient.positions.to(mask.device), gradient.values.to(mask.device)
    is_candidate = ~torch.take(mask, positions) & (values != 0)
    candidates = SparseGradient(positions[is_candidate], values[is_candidate], gradient.numel)
    best = best_in_groups(candidates, shape=mask.shape, pattern=pattern, layout=layout).positions
    block = _block_numbers(mask.shape, pattern, layout).to(mask.device)[best]
    positions_of = _positions(mask.shape, pattern, layout, device=mask.device)[block]
    active = layout.blocks(mask if may_go is None else mask & may_go, pattern.of)[block]
    lowest = torch.where(active, torch.take(weight.detach(), positions_of).abs().float(), torch.inf).min(1)
    can_move = active.any(1).nonzero().squeeze(1)
    chosen = can_move[smallest_positions(lowest.values[can_move], min(k, len(can_move)))]
    adjusted = mask.flatten().clone()
    adjusted[positions_of[chosen, lowest.indices[chosen]]] = False
    adjusted[best[chosen]] = True
    return adjusted.reshape(mask.shape)


def _positions(shape: torch.Size, pattern: Pattern, layout: Layout, *, device: torch.device) -> Tensor:
    """Flat positions as [blocks, M]."""
    return layout.blocks(torch.arange(shape.numel(), device=device).reshape(shape), pattern.of)


def _block_numbers(shape: torch.Size, pattern: Pattern, layout: Layout) -> Tensor:
    """The group of M of each weight, by flat position."""
    blocks = torch.arange(shape.numel() // pattern.of).unsqueeze(1).expand(-1, pattern.of)
    return layout.unblocked(blocks, shape).flatten()
