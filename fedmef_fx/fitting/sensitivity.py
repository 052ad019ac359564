"""How much each layer's weights matter: the loss when one layer alone is pruned or rounded, and what to keep of each.

`d_l(p)` is the rise of the divergence from the original's outputs when layer l keeps the share p of its weights, those
of largest magnitude, and all others stay as they are. Shares are chosen greedily: from everything kept, the step to a
lower level that costs least divergence per removed weight is taken again and again until so few weights are left as
are wanted.
"""

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmef_fx.fitting.samples import Batch, first_tensor

__all__ = ["LayerSensitivity", "divergence", "keep_shares", "scan"]

LEVELS: Final = (1.0, 0.5, 0.25, 0.1, 0.05, 0.02)


@dataclasses.dataclass(frozen=True, slots=True)
class LayerSensitivity:
    """How a model's outputs change with one weight.

    Attributes:
        name: The weight.
        numel: Its size.
        by_share: Divergence by the share of its weights that is kept.
        by_channels: The same for whole output channels.
        in_8_bits: Divergence when it is rounded to 8 bits for each output channel.
    """

    name: str
    numel: int
    by_share: Mapping[float, float]
    by_channels: Mapping[float, float]
    in_8_bits: float

    def as_dict(self) -> dict[str, object]:
        """The values that `json.dumps` takes."""
        return dataclasses.asdict(self)


def divergence(output: object, wanted: object) -> Tensor:
    """How far outputs are from those of the original: KL of class scores, else the mean squared error."""
    scores, target = first_tensor(output), first_tensor(wanted)
    if scores.dim() < 2 or scores.shape[-1] < 2:
        return F.mse_loss(scores, target)
    logs = [F.log_softmax(values.flatten(0, -2), -1) for values in (scores, target)]
    return F.kl_div(logs[0], logs[1], reduction="batchmean", log_target=True)


@torch.no_grad()
def scan(model: nn.Module, names: Sequence[str], batches: Sequence[Batch]) -> tuple[LayerSensitivity, ...]:
    """Measure every layer; `model` is as before when this returns."""
    model = copy.deepcopy(model).eval()
    wanted = [model(*batch.inputs) for batch in batches]

    def cost() -> float:
        parts = [float(divergence(model(*b.inputs), w)) for b, w in zip(batches, wanted, strict=True)]
        return sum(parts) / len(parts)

    found = []
    for name in names:
        weight = model.get_parameter(name)
        rows = weight.flatten(1)
        norms = rows.norm(dim=1)
        by_share, by_channels = {1.0: 0.0}, {1.0: 0.0}
        for level in LEVELS[1:]:
            with _changed(weight, weight * _largest(weight.abs(), level)):
                by_share[level] = cost()
            with _changed(weight, weight * _largest(norms, level).view(-1, *(1,) * (weight.dim() - 1))):
                by_channels[level] = cost()
        step = rows.abs().amax(1).clamp_min(1e-12).view(-1, *(1,) * (weight.dim() - 1)) / 127
        with _changed(weight, (weight / step).round() * step):
            found.append(LayerSensitivity(name, weight.numel(), by_share, by_channels, cost()))
    return tuple(found)


def _largest(values: Tensor, share: float) -> Tensor:
    count = max(1, round(share * values.numel()))
    mask = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    mask[values.flatten().topk(count).indices] = True
    return mask.view(values.shape)


@contextmanager
def _changed(weight: Tensor, value: Tensor) -> Iterator[None]:
    """A block in which a weight has another value."""
    before = weight.clone()
    weight.copy_(value)
    try:
        yield
    finally:
        weight.copy_(before)


def keep_shares(layers: Sequence[LayerSensitivity], density: float) -> dict[str, float]:
    """The share of each weight to keep, so that together they keep `density`; see the module docstring."""
    levels = {layer.name: 0 for layer in layers}
    total = sum(layer.numel for layer in layers)
    active, wanted = float(total), density * total
    while active > wanted:
        steps = [layer for layer in layers if levels[layer.name] + 1 < len(LEVELS)]
        if not steps:
            break
        cheapest = min(steps, key=lambda layer: _price(layer, levels[layer.name]))
        before, after = (LEVELS[levels[cheapest.name] + more] for more in (0, 1))
        removed = (before - after) * cheapest.numel
        if active - removed < wanted:  # a part of the step is enough
            shares = {layer.name: LEVELS[levels[layer.name]] for layer in layers}
            shares[cheapest.name] = before - (active - wanted) / cheapest.numel
            return shares
        levels[cheapest.name] += 1
        active -= removed
    shares = {layer.name: LEVELS[levels[layer.name]] for layer in layers}
    return {name: share * min(1.0, wanted / active) for name, share in shares.items()}


def _price(layer: LayerSensitivity, level: int) -> float:
    """What the next level costs for each weight that it removes; noise makes nothing free."""
    before, after = LEVELS[level], LEVELS[level + 1]
    rise = max(0.0, layer.by_share[after] - layer.by_share[before])
    return (rise + 1e-9) / ((before - after) * layer.numel)
