"""What changes places together when masks are adjusted: single weights, channels, or weights within groups of M.

Counts k_l(t) are in these units. A channel belongs to a group of layers and is counted once, under the group's first
weight; a growth candidate that stands for a channel has the position of the channel's first weight there, and the norm
of its gradients over all layers of the group as its value. So messages stay as small as the counts are.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from fedmef_fx.module_tree import owner_of
from fedmef_fx.ops.gradient_collector import Request
from fedmef_fx.sparse_model.channels import least_bias
from fedmef_fx.sparse_model.effective import EffectiveParameter, effective_parameters, start_grown
from fedmef_fx.sparse_model.masks import MaskedParameter, mask_name, masks, set_masks
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.sparse_model.transformation import transformation_of
from fedmef_fx.sparsity.adjust import adjust_mask, lowest_magnitude
from fedmef_fx.sparsity.granularity import Layout, Pattern, parse_granularity
from fedmef_fx.sparsity.patterns import adjust_pattern, best_in_groups, lowest_in_groups, row_norms
from fedmef_fx.sparsity.selection import largest_positions, magnitudes, smallest_positions
from fedmef_fx.sparsity.sparse_gradient import SparseGradient

__all__ = ["adjust", "adjusted_masks", "growth_requests", "lowest_units", "sampled", "unit_candidates", "unit_sizes"]

# How far the biases of depthwise convolutions stand above those of what they read while candidates are collected.
_ABOVE = 2.0**20


def _granularity(model: nn.Module) -> Pattern | str:
    return parse_granularity(transformation_of(model).config.granularity)


def _layout(model: nn.Module, name: str) -> Layout:
    channels = transformation_of(model).prunable[name].channels
    return Layout() if channels is None else channels.layout


def _groups(model: nn.Module) -> dict[str, list[str]]:
    """First weight -> all weights with the same channels."""
    groups: dict[str, list[str]] = {}
    for name, prunable in transformation_of(model).prunable.items():
        if prunable.masked:
            groups.setdefault(prunable.channels.leader if prunable.channels else name, []).append(name)
    return groups


def _alive(model: nn.Module, name: str, parameter: MaskedParameter) -> Tensor:
    return _layout(model, name).rows(parameter.mask).any(1)


def _norms(model: nn.Module, parameters: Mapping[str, EffectiveParameter], members: list[str]) -> Tensor:
    return row_norms([(parameters[name].dense(), _layout(model, name)) for name in members])


def _space(model: nn.Module) -> Literal["effective", "parameter"]:
    return transformation_of(model).config.adjustment_space


def unit_sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Active and inactive units of each masked parameter; (0, 0) where another weight of the group counts them."""
    parameters, granularity = masked_parameters(model), _granularity(model)
    sizes = {}
    for name, parameter in parameters.items():
        active, inactive = parameter.active, parameter.numel - parameter.active
        sizes[name] = active, inactive
        if isinstance(granularity, Pattern):
            sizes[name] = active, min(inactive, parameter.numel // granularity.of)  # one change in a group of M
    if granularity == "channel":
        sizes = dict.fromkeys(parameters, (0, 0))
        for leader in _groups(model):
            alive = _alive(model, leader, parameters[leader])
            sizes[leader] = int(alive.sum()), int((~alive).sum())
    return sizes


def lowest_units(
    model: nn.Module, parameters: Mapping[str, EffectiveParameter], counts: Callable[[str], int]
) -> dict[str, Tensor]:
    """theta_low: flat positions of the weights in the lowest active units of each parameter, ascending.

    Args:
        model: A transformed model.
        parameters: Those of its parameters that are looked at, in the space of adjustments.
        counts: Number of units by parameter name.
    """
    granularity = _granularity(model)
    if isinstance(granularity, Pattern):
        return {
            name: lowest_in_groups(
                parameter.dense(), parameter.mask, counts(name), pattern=granularity, layout=_layout(model, name)
            )
            for name, parameter in parameters.items()
        }
    if granularity == "weight":
        return {
            name: parameter.masked.positions()[smallest_positions(magnitudes(parameter.values()), counts(name))]
            for name, parameter in parameters.items()
        }
    result = {}
    everything = effective_parameters(model)
    for leader, members in _groups(model).items():
        alive = _alive(model, leader, everything[leader].masked)
        low = torch.zeros_like(alive)
        low[lowest_magnitude(_norms(model, everything, members), alive, counts(leader))] = True
        for name in members:
            if name in parameters:
                mask = parameters[name].mask
                marked = _layout(model, name).spread(low, mask.shape) & mask
                result[name] = marked.flatten().nonzero().squeeze(1)
    return {name: result[name] for name in parameters}


def adjust(
    model: nn.Module,
    gradients: Mapping[str, SparseGradient],
    counts: Mapping[str, int],
    *,
    marked: Mapping[str, Tensor] | None = None,
) -> dict[str, int]:
    """Adjust the masks of a model in place: prune the lowest, grow where gradients are largest.

    Grown weights start without effect: at 0, or where their w_hat is 0 (`ops/effective_space.py`).

    Args:
        model: A transformed model.
        gradients: Averaged growth candidates of each masked parameter, as of `growth_candidates`.
        counts: Parameter name -> number of units that change places.
        marked: Parameter name -> flat positions of the weights that may be pruned, as of `Extrusion.marked`; None for
            the lowest there are now.

    Returns:
        Parameter name -> number of weights that were grown.
    """
    before = masks(model)
    adjusted = adjusted_masks(model, gradients, counts, marked=marked)
    set_masks(model, adjusted)
    start_grown(model, before)
    return {name: int((mask & ~before[name]).count_nonzero()) for name, mask in adjusted.items()}


def adjusted_masks(
    model: nn.Module,
    gradients: Mapping[str, SparseGradient],
    counts: Mapping[str, int],
    *,
    marked: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The masks after one adjustment; see `adjust`, `sparsity.adjust` and `sparsity.patterns`."""
    parameters, granularity = effective_parameters(model), _granularity(model)
    may_go = {name: _may_go(p.masked, None if marked is None else marked[name]) for name, p in parameters.items()}
    if isinstance(granularity, Pattern):
        return {
            name: adjust_pattern(
                parameter.dense(),
                parameter.mask,
                gradients[name],
                counts[name],
                pattern=granularity,
                layout=_layout(model, name),
                may_go=may_go[name],
            )
            for name, parameter in parameters.items()
        }
    if granularity == "weight":
        return {
            name: adjust_mask(parameter.dense(), parameter.mask, gradients[name], counts[name], may_go=may_go[name])
            for name, parameter in parameters.items()
        }
    result = {}
    for leader, members in _groups(model).items():
        layout, mask = _layout(model, leader), parameters[leader].mask
        alive = layout.rows(mask).any(1)
        scores = _channel_scores(gradients[leader], layout, mask.shape)
        chosen = may_go[leader]
        rows = None if chosen is None else layout.rows(chosen).any(1)
        new = adjust_mask(_norms(model, parameters, members), alive, scores, counts[leader], may_go=rows)
        for name in members:
            mask, layout = parameters[name].mask, _layout(model, name)
            # A mask that was set by hand may have holes in its channels: those of channels that stay, stay.
            result[name] = (mask & layout.spread(new, mask.shape)) | layout.spread(new & ~alive, mask.shape)
    return {name: result[name] for name in parameters}


def _may_go(parameter: MaskedParameter, marked: Tensor | None) -> Tensor | None:
    """Marked positions as a mask of the weight."""
    if marked is None:
        return None
    may_go = torch.zeros(parameter.numel, dtype=torch.bool, device=parameter.buffer.device)
    may_go[marked.to(may_go.device)] = True
    return may_go.view(parameter.shape)


def _channel_scores(gradient: SparseGradient, layout: Layout, shape: torch.Size) -> SparseGradient:
    """Candidates by channel instead of by position; positions that stand for no channel are left out."""
    first = layout.first_positions(shape).to(gradient.positions.device)
    order = first.argsort()
    at = torch.searchsorted(first[order], gradient.positions).clamp_max(len(first) - 1)
    channels = order[at]
    is_candidate = first[channels] == gradient.positions
    channels, values = channels[is_candidate], gradient.values[is_candidate]
    ascending = channels.argsort()
    return SparseGradient(channels[ascending], values[ascending], len(first))


def growth_requests(
    model: nn.Module, parameters: Mapping[str, MaskedParameter], counts: list[int]
) -> dict[str, Request]:
    """What to collect of each parameter so that `unit_candidates` can choose."""
    granularity, space = _granularity(model), _space(model)
    requests = {}
    wanted = dict(zip(parameters, counts, strict=True))
    leaders = {name: leader for leader, members in _groups(model).items() for name in members}
    effective = effective_parameters(model)
    for name, parameter in parameters.items():
        layout = _layout(model, name)
        if granularity == "weight":
            requests[name] = Request(parameter.buffer, wanted[name], space=space)
        elif isinstance(granularity, Pattern):
            blocks = torch.zeros_like(layout.blocks(parameter.mask, granularity.of))
            low = torch.zeros_like(parameter.mask).flatten()
            low[
                lowest_in_groups(
                    effective[name].dense(), parameter.mask, wanted[name], pattern=granularity, layout=layout
                )
            ] = True
            blocks |= layout.blocks(low.reshape(parameter.mask.shape), granularity.of).any(1, keepdim=True)
            where = layout.unblocked(blocks, parameter.mask.shape) & ~parameter.mask
            requests[name] = Request(parameter.buffer, int(where.sum()), where, space=space)
        else:
            dead = ~_alive(model, name, parameter)
            k = int(dead.sum()) if wanted[leaders[name]] else 0
            number = layout.spread(torch.arange(len(dead), device=dead.device), parameter.mask.shape)
            where = layout.spread(dead, parameter.mask.shape)
            requests[name] = Request(parameter.buffer, k, where, number, space)
    return requests


def unit_candidates(
    model: nn.Module, found: Mapping[str, SparseGradient], counts: list[int]
) -> dict[str, SparseGradient]:
    """The largest growth candidates of each parameter, as many as were asked for."""
    granularity, wanted = _granularity(model), dict(zip(found, counts, strict=True))
    if granularity == "weight":
        return dict(found)
    parameters = masked_parameters(model)
    if isinstance(granularity, Pattern):
        return {
            name: best_in_groups(
                gradient, shape=parameters[name].mask.shape, pattern=granularity, layout=_layout(model, name)
            )
            for name, gradient in found.items()
        }
    result = {}
    for leader, members in _groups(model).items():
        shape, layout = parameters[leader].mask.shape, _layout(model, leader)
        squares = torch.zeros(layout.channels(shape), device=parameters[leader].mask.device)
        for name in members:
            gradient = found[name]
            squares.index_add_(0, gradient.positions, gradient.values.to(squares).square())
        scores, first = squares.sqrt(), layout.first_positions(shape).to(squares.device)
        chosen = largest_positions(magnitudes(scores), min(wanted[leader], int((scores > 0).sum())))
        order = first[chosen].argsort()
        result[leader] = SparseGradient(first[chosen][order], scores[chosen][order], shape.numel())
        for name in members[1:]:
            nothing = torch.empty(0, device=squares.device)
            result[name] = SparseGradient(nothing.long(), nothing, parameters[name].mask.numel())
    return {name: result[name] for name in found}


@contextlib.contextmanager
def sampled(model: nn.Module) -> Iterator[None]:
    """A block in which channels that are off have the smallest of biases, so that gradients reach them through ReLUs.

    Those of depthwise convolutions, which come later in a group, stand above what their kernels could make of the
    earlier ones.
    """
    changed: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.no_grad():
        for name, prunable in transformation_of(model).prunable.items():
            if not prunable.masked or prunable.channels is None or not prunable.channels.dependents:
                continue
            dead = ~_alive(model, name, masked_parameters(model)[name])
            for step, dependent in enumerate(prunable.channels.dependents):
                owner, leaf = owner_of(model, dependent)
                tensor = getattr(owner, leaf)
                if isinstance(tensor, nn.Parameter):
                    mask = owner.get_buffer(mask_name(leaf))
                    mask.fill_(True)  # or it would set the biases to 0 again
                    tensor[dead] = min(least_bias(tensor.dtype) * _ABOVE**step, 1e-12)
                    changed.append((tensor, mask, dead))
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, mask, dead in changed:
                tensor[dead] = 0.0
                mask.copy_(~dead)
