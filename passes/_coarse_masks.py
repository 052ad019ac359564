"""Masks that are coarser than single weights: of channels and of N:M patterns, for `InsertMasks`."""

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from fedmef_fx.display.sizes import shown_bytes
from fedmef_fx.graph.nodes import layers, source_of_weight
from fedmef_fx.graph.operators import Layer, operator_of
from fedmef_fx.graph.program import Program
from fedmef_fx.passes._channel_groups import find_channel_groups, layout_of, sizes_after_compact
from fedmef_fx.sparse_model.transformation import PrunableParameter, WeightChannels
from fedmef_fx.sparsity import (
    Layout,
    Pattern,
    allocate_channels,
    magnitude_masks,
    parse_granularity,
    pattern_mask,
    random_masks,
    random_pattern_mask,
    row_norms,
)

__all__ = ["coarse_masks", "what_compact_leaves", "what_resulted", "with_channels"]


def with_channels(
    program: Program, prunables: dict[str, PrunableParameter], granularity: str
) -> dict[str, PrunableParameter]:
    """Add what a granularity has to know about each parameter, or why the parameter stays dense."""
    if granularity == "weight":
        return prunables
    pattern = parse_granularity(granularity)
    names = [name for name, prunable in prunables.items() if prunable.masked]
    if isinstance(pattern, Pattern):
        found, dense = _layouts(program, names, pattern)
    else:
        groups = find_channel_groups(program, names)
        found, dense = groups.channels, groups.dense
    result = dict(prunables)
    for name, reason in dense.items():
        result[name] = dataclasses.replace(prunables[name], masked=False, reason=reason)
    for name, channels in found.items():
        reason = prunables[name].reason
        if prunables[name].tier != "graph" and granularity == "channel":
            reason = f"{reason}; its channels are coupled to no other layer's, so that compact may not remove them"
        result[name] = dataclasses.replace(prunables[name], channels=channels, reason=reason.removeprefix("; "))
    return result


def _layouts(program: Program, names: list[str], pattern: Pattern) -> tuple[dict[str, WeightChannels], dict[str, str]]:
    """The weights that can take an N:M pattern, and why the others cannot."""
    in_graphs: dict[int, Layout] = {}
    for region, _, graph in program.graphs():
        for node in layers(graph):
            target = source_of_weight(region, node.args[1])
            if target is not None:
                in_graphs[id(region.owner.get_parameter(target))] = layout_of(node)
    found, dense = {}, {}
    for name in names:
        parameter = program.model.get_parameter(name)
        layout = in_graphs.get(id(parameter))
        owner = program.model.get_submodule(name.rpartition(".")[0].partition(".parametrizations")[0])
        row = operator_of(type(owner))
        if layout is None and row is not None and row.has_rows:
            layout = Layout(transposed=isinstance(row, Layer) and row.transposed)
        if layout is None:
            dense[name] = f"no layer shows which of its dimensions are inputs, so that {pattern} cannot be laid out"
        elif not layout.can_take(pattern, parameter.shape):
            dense[name] = f"its inputs, of shape {list(parameter.shape)}, are no multiple of {pattern.of}"
        else:
            found[name] = WeightChannels(layout, name)
    return found, dense


def coarse_masks(
    weights: Mapping[str, Tensor],
    channels_of: Mapping[str, WeightChannels],
    *,
    granularity: str,
    density: float,
    allocation: str,
    multiple: int,
    seed: int | None,
) -> dict[str, Tensor]:
    """Initial masks.

    Args:
        weights: Parameter name -> weight.
        channels_of: Parameter name -> its channels.
        granularity: As of the pass, like the three that follow.
        density: Active share.
        allocation: How it is spread over layers.
        multiple: What numbers of channels are rounded to.
        seed: Of random masks; None for those of the largest magnitudes.
    """
    pattern = parse_granularity(granularity)
    if isinstance(pattern, Pattern):
        return {
            name: pattern_mask(weight.abs(), pattern, channels_of[name].layout)
            if seed is None
            else random_pattern_mask(name, weight.shape, pattern, channels_of[name].layout, seed=seed)
            for name, weight in weights.items()
        }
    groups: dict[str, list[str]] = {}
    for name, channels in channels_of.items():
        groups.setdefault(channels.leader, []).append(name)
    layouts = {name: channels.layout for name, channels in channels_of.items()}
    kept = allocate_channels(
        {name: tuple(weight.shape) for name, weight in weights.items()},
        groups,
        layouts,
        density,
        method=allocation,
        multiple=multiple,
    )
    if seed is None:
        norms = {leader: row_norms([(weights[n], layouts[n]) for n in members]) for leader, members in groups.items()}
        alive = magnitude_masks(norms, kept)
    else:
        alive = random_masks(
            {leader: (layouts[leader].channels(weights[leader].shape),) for leader in groups}, kept, seed=seed
        )
    return {
        name: layouts[name].spread(alive[channels.leader], weights[name].shape)
        for name, channels in channels_of.items()
    }


def what_compact_leaves(
    program: Program, masks: Mapping[str, Tensor], prunables: Mapping[str, PrunableParameter], granularity: str
) -> tuple[str, ...]:
    """What removing the channels that masks switch off will bring; nothing for other masks."""
    if granularity != "channel":
        return ()
    layouts = {name: prunable.channels.layout for name, prunable in prunables.items() if prunable.channels}
    kept = {name: int(layouts[name].rows(mask).any(1).sum()) for name, mask in masks.items() if name in layouts}
    before, after = sizes_after_compact(program, kept)
    sizes = f"{shown_bytes(4 * before)} -> {shown_bytes(4 * after)} in float32"
    return (f"compact leaves {after:,} or fewer of the layers' {before:,} weights, {sizes}",)


def what_resulted(
    masks: Mapping[str, Tensor], prunables: Mapping[str, PrunableParameter], granularity: str, *, density: float
) -> tuple[str, ...]:
    """How far masks that are not of single weights are from the density that was asked for."""
    total = sum(mask.numel() for mask in masks.values())
    if granularity == "weight" or not total:
        return ()
    share = sum(int(mask.count_nonzero()) for mask in masks.values()) / total
    lines = [f"the masks keep {share:.4f} of their weights; Config.density is {density:g}"]
    if isinstance(parse_granularity(granularity), Pattern):
        return (f"{lines[0]}, which {granularity} leaves no choice",)
    groups: dict[str, list[str]] = {}
    for name in masks:
        channels = prunables[name].channels
        groups.setdefault(name if channels is None else channels.leader, []).append(name)
    for leader, members in groups.items():
        channels = prunables[leader].channels
        rows = (Layout() if channels is None else channels.layout).rows(masks[leader]).any(1)
        lines.append(f"{' + '.join(members)}: {int(rows.sum())} of {len(rows)} channels")
    return tuple(lines)
