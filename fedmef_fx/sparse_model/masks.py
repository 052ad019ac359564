"""What a transformed model knows about itself: its prunable parameters, masks, coverage and pass reports.

A transformation adds two things to a model's module tree: next to each masked parameter `weight` a boolean buffer
`weight_mask`, or a bitmap `weight_bitmap` where the weight is packed (`masked`), and one child module `fedmef`
(`Transformation`) with the configuration and the facts. Both travel with `deepcopy`, `.to()` and `state_dict`; nothing
else is needed to train on.
"""

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fedmef_fx.budget.plan import MemoryPlan
from fedmef_fx.config import Config
from fedmef_fx.errors import ConfigError
from fedmef_fx.graph.pipeline import PassReport
from fedmef_fx.sparse_model.masked_parameter import MaskedParameter, bitmap_name, mask_name
from fedmef_fx.sparse_model.optimizer_state import forget_state, watch_optimizers
from fedmef_fx.sparsity.granularity import Layout

if TYPE_CHECKING:
    from fedmef_fx.graph.recording import GraphRecord

__all__ = [
    "HOLDER",
    "ChannelFact",
    "Coverage",
    "MaskedParameter",
    "PrunableParameter",
    "Tier",
    "Transformation",
    "apply_masks",
    "bitmap_name",
    "coverage",
    "density",
    "is_ignored",
    "is_transformed",
    "least_bias",
    "mask_name",
    "masked_parameters",
    "masks",
    "memory_plan",
    "register_mask",
    "report",
    "set_masks",
    "silence_channels",
    "transformation_of",
]

HOLDER = "fedmef"

Tier = Literal["graph", "module", "hook"]


@dataclasses.dataclass(frozen=True, slots=True)
class ChannelFact:
    """How the channels of a weight relate to those of others; see `passes/_channel_groups.py`.

    Attributes:
        layout: Where its channels lie.
        leader: The first weight of the group of layers that have the same channels; itself where it has its own.
        silent: Of a leader, names of biases and running means with one entry per channel, 0 where it is off.
    """

    layout: Layout
    leader: str
    silent: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class PrunableParameter:
    """One weight that a transformation may prune.

    Attributes:
        name: Its name in the original model.
        numel: Number of weights, pruned ones included.
        tier: Where it is rewritten: in a traced graph, in the graph of a single leaf module, or by hooks.
        reason: Why the tier is not a higher one, or why the parameter is left dense; empty for the graph tier.
        masked: Whether it has a mask.
        region: Path of the traced region that holds it, None outside the graph tier.
        region_modules: Number of modules with weights in that region; 1 is a leaf on its own.
        channels: What granularities coarser than single weights need to know; None with single weights.
        packed_shape: Shape of the weight where it is stored packed; None where it is stored dense.
    """

    name: str
    numel: int
    tier: Tier | None
    reason: str = ""
    masked: bool = True
    region: str | None = None
    region_modules: int = 0
    channels: ChannelFact | None = None
    packed_shape: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Coverage:
    """Which prunable parameter is rewritten where, and why not better.

    Attributes:
        rows: One `PrunableParameter` per prunable parameter, in the order of `named_parameters`.
    """

    rows: tuple[PrunableParameter, ...]

    @property
    def graph_fraction(self) -> float:
        """Share of prunable weights in traced regions larger than one leaf module, 0 to 1."""
        total = sum(row.numel for row in self.rows)
        inside = sum(row.numel for row in self.rows if row.tier == "graph" and row.region_modules > 1)
        return inside / total if total else 0.0

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=9)
        lines = [f"{'parameter':{width}s}  {'weights':>10s}  tier    reason"]
        lines += [f"{row.name:{width}s}  {row.numel:10d}  {row.tier or 'dense':6s}  {row.reason}" for row in self.rows]
        return "\n".join([*lines, f"graph fraction {self.graph_fraction:.3f}"])


class Transformation(nn.Module):
    """The child module `fedmef` of a transformed model: configuration, facts, reports and packing sites.

    Attributes:
        config: The configuration of the transformation.
        prunable: Original parameter name -> `PrunableParameter`.
        guarded: Names of the masked parameters that code outside graphs reads, whose gradients hooks mask.
        reports: What the passes did, in order.
        plan: How the memory budget is kept; None without one.
        original: Records of the graphs as they were captured, before any pass.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        watch_optimizers()
        self.config = config
        self.prunable: dict[str, PrunableParameter] = {}
        self.guarded: tuple[str, ...] = ()
        self.reports: PassReport = PassReport(())
        self.plan: MemoryPlan | None = None
        self.original: tuple[GraphRecord, ...] = ()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a copy or a pickle, which are made without `__init__`."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's own
        watch_optimizers()

    def extra_repr(self) -> str:
        """The line that `print(model)` shows."""
        return f"density={self.config.density:g}, masked={sum(p.masked for p in self.prunable.values())}"


def is_transformed(model: nn.Module) -> bool:
    """Whether `fedmef_fx.transform` made this model."""
    return isinstance(getattr(model, HOLDER, None), Transformation)


def transformation_of(model: nn.Module) -> Transformation:
    """The facts of a transformed model.

    Raises:
        ConfigError: The model was not made by `fedmef_fx.transform`.
    """
    holder = getattr(model, HOLDER, None)
    if not isinstance(holder, Transformation):
        raise ConfigError(
            f"{type(model).__name__} is not a transformed model; expected the result of "
            "fedmef_fx.transform(model), e.g. sparse = fedmef_fx.transform(model); fedmef_fx.masks(sparse)"
        )
    return holder


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def register_mask(model: nn.Module, parameter: str, mask: Tensor) -> None:
    """Put a mask next to its parameter and zero what it masks.

    Args:
        model: The model that holds the parameter.
        parameter: Its name.
        mask: Boolean, of the parameter's shape; True = active.
    """
    owner, leaf = _owner(model, parameter)
    weight = getattr(owner, leaf)
    owner.register_buffer(mask_name(leaf), mask.to(device=weight.device, dtype=torch.bool).clone())
    with torch.no_grad():
        weight.mul_(getattr(owner, mask_name(leaf)))


def masked_parameters(model: nn.Module, *, facts: Transformation | None = None) -> dict[str, MaskedParameter]:
    """Every masked parameter with its mask or bitmap, by original name: the live tensors, not copies.

    Args:
        model: A transformed model.
        facts: What is known about it; None for what it has itself. A model on its way through passes has nothing yet.
    """
    found = {}
    for name, fact in (facts or transformation_of(model)).prunable.items():
        if not fact.masked:
            continue
        owner, leaf = _owner(model, name)
        parameter = getattr(owner, leaf)
        if fact.packed_shape is None:
            found[name] = MaskedParameter(parameter, getattr(owner, mask_name(leaf)), parameter.shape)
        else:
            shape = torch.Size(fact.packed_shape)
            found[name] = MaskedParameter(parameter, getattr(owner, bitmap_name(leaf)), shape)
    return found


def masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks of a transformed model: original parameter name -> boolean tensor, True = active.

    The tensors are copies; `set_masks` changes a model's masks. Empty when the density is 1.
    """
    entries = masked_parameters(model)
    return {name: entry.mask if entry.is_packed else entry.mask.clone() for name, entry in entries.items()}


def density(model: nn.Module) -> float:
    """Active share of the prunable weights that have masks, 0 to 1; 1 when there are no masks."""
    entries = masked_parameters(model).values()
    total = sum(entry.numel for entry in entries)
    return sum(entry.active for entry in entries) / total if total else 1.0


def coverage(model: nn.Module) -> Coverage:
    """Where each prunable parameter of a transformed model is rewritten, and why not better."""
    return Coverage(tuple(transformation_of(model).prunable.values()))


def report(model: nn.Module) -> PassReport:
    """What each pass did and refused, with reasons and times."""
    return transformation_of(model).reports


def memory_plan(model: nn.Module) -> MemoryPlan | None:
    """How the memory budget of a transformed model is kept, and why so; None where there was no budget."""
    return transformation_of(model).plan


def set_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Change the topology of a transformed model in place, without tracing again.

    Weights that stay active keep their value, pruned and grown ones become 0. Parameters stay the same objects, and
    optimizers that hold them stay valid: the momentum of pruned and grown weights becomes 0, that of the others stays.
    A packed parameter changes its size with its number of active weights. An optimizer whose state was loaded is known
    after its first step only: load it after the model's state, and change masks later.

    Any mask is taken, whatever `Config.granularity` is; with "channel", biases of channels that are off become 0.

    Args:
        model: A transformed model.
        masks: Original parameter name -> boolean mask of its shape; parameters that are left out keep theirs.

    Raises:
        ConfigError: An unknown name, a wrong shape, or a tensor that is not boolean; nothing is changed then.
    """
    entries = masked_parameters(model)
    for name, mask in masks.items():
        _check_mask(entries, name, mask)
    for name, mask in masks.items():
        entries[name].change(mask)
    silence_channels(model)


def _check_mask(entries: Mapping[str, MaskedParameter], name: str, mask: Tensor) -> None:
    if name not in entries:
        raise ConfigError(
            f"set_masks: {name!r} has no mask in this model; masked parameters: {', '.join(entries) or 'none'}"
        )
    expected = entries[name].shape
    if mask.dtype != torch.bool or mask.shape != expected:
        raise ConfigError(
            f"set_masks: {name!r}: got {mask.dtype} of shape {tuple(mask.shape)}; expected torch.bool of shape "
            f"{tuple(expected)}"
        )


def apply_masks(model: nn.Module) -> None:
    """Set every masked weight to 0, e.g. after weights were written from outside."""
    for entry in masked_parameters(model).values():
        entry.clear_masked()
    silence_channels(model)


@torch.no_grad()
def silence_channels(model: nn.Module) -> None:
    """Make the channels without active weights exactly 0: their biases, shifts and running means.

    A channel that comes back starts with the smallest of biases: at exactly 0 no gradient passes a ReLU, and it would
    never learn; see docs/adr/0008-channel-masks.md.
    """
    for name, fact in transformation_of(model).prunable.items():
        if not fact.masked or fact.channels is None or not fact.channels.silent:
            continue
        alive = fact.channels.layout.rows(masked_parameters(model)[name].mask).any(1)
        for silent in fact.channels.silent:
            holder, entry = _owner(model, silent)
            _silence(holder, entry, alive)


def _silence(holder: nn.Module, leaf: str, alive: Tensor) -> None:
    tensor = getattr(holder, leaf)
    if not isinstance(tensor, nn.Parameter):
        tensor.mul_(alive)
        return
    was_alive = holder._buffers.get(mask_name(leaf))
    if was_alive is None:
        # Not persistent: it follows from the masks of the weights.
        holder.register_buffer(mask_name(leaf), alive.clone(), persistent=False)
        tensor.mul_(alive)
        return
    if torch.equal(was_alive, alive) and not tensor[~alive].any():
        return
    grown = alive & ~was_alive
    tensor.mul_(alive)
    tensor[grown & (tensor == 0)] = least_bias(tensor.dtype)
    if tensor.grad is not None:
        tensor.grad.mul_(alive & was_alive)
    forget_state(tensor, keep=alive & was_alive)
    was_alive.copy_(alive)


def least_bias(dtype: torch.dtype) -> float:
    """A positive number that changes no sum but lets gradients through a ReLU."""
    return float(torch.finfo(dtype).tiny) * 2.0**20


def is_ignored(patterns: Iterable[str | type], name: str, module: nn.Module) -> bool:
    """Whether `Config.ignore` names a module: by its exact name, a glob, or one of its types."""
    types = {f"type:{base.__module__}.{base.__qualname__}" for base in type(module).__mro__}
    return any(
        str(pattern) in types if str(pattern).startswith("type:") else fnmatch.fnmatchcase(name, str(pattern))
        for pattern in patterns
    )
