"""What a transformed model knows about itself: its prunable parameters, coverage, pass reports and memory plan."""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from fedmef_fx.config import Config
from fedmef_fx.errors import ConfigError
from fedmef_fx.records.memory_plan import MemoryPlan
from fedmef_fx.records.passes import PassReport
from fedmef_fx.sparse_model.held_masks import watch_steps
from fedmef_fx.sparse_model.optimizer_state import watch_optimizers
from fedmef_fx.sparsity.granularity import Layout

if TYPE_CHECKING:
    from fedmef_fx.records.graphs import GraphRecord

__all__ = [
    "CHILD_NAME",
    "Coverage",
    "PrunableParameter",
    "Tier",
    "Transformation",
    "WeightChannels",
    "coverage",
    "is_transformed",
    "memory_plan",
    "report",
    "transformation_of",
]


CHILD_NAME = "fedmef"


Tier = Literal["graph", "module", "hook"]


@dataclasses.dataclass(frozen=True, slots=True)
class WeightChannels:
    """How the channels of a weight relate to those of others; see `passes/_channel_groups.py`.

    Attributes:
        layout: Where its channels lie.
        leader: The first weight of the group of layers that have the same channels; itself where it has its own.
        dependents: Of a leader, names of biases and running means with one entry per channel, 0 where it is off.
    """

    layout: Layout
    leader: str
    dependents: tuple[str, ...] = ()


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
    channels: WeightChannels | None = None
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
        total = sum(prunable.numel for prunable in self.rows)
        inside = sum(
            prunable.numel for prunable in self.rows if prunable.tier == "graph" and prunable.region_modules > 1
        )
        return inside / total if total else 0.0

    def __str__(self) -> str:
        width = max((len(prunable.name) for prunable in self.rows), default=9)
        lines = [f"{'parameter':{width}s}  {'weights':>10s}  tier    reason"]
        lines += [
            f"{prunable.name:{width}s}  {prunable.numel:10d}  {prunable.tier or 'dense':6s}  {prunable.reason}"
            for prunable in self.rows
        ]
        return "\n".join([*lines, f"graph fraction {self.graph_fraction:.3f}"])


class Transformation(nn.Module):
    """The child module `fedmef` of a transformed model: configuration, prunable parameters, reports and packing sites.

    Attributes:
        config: The configuration of the transformation.
        prunable: Original parameter name -> `PrunableParameter`.
        guarded: Names of the masked parameters that code outside graphs may read, whose gradients hooks mask.
        bare: Those of them that are read so in each call of the model.
        reports: What the passes did, in order.
        plan: How the memory budget is kept; None without one.
        original: Records of the graphs as they were captured, before any pass.
        masks_are_hidden: Whether masks are out of sight for a moment, while an average takes the other numbers.
    """

    masks_are_hidden = False
    bare: tuple[str, ...] = ()

    def __init__(self, config: Config) -> None:
        super().__init__()
        watch_optimizers()
        watch_steps()
        self.config = config
        self.prunable: dict[str, PrunableParameter] = {}
        self.guarded: tuple[str, ...] = ()
        self.reports: PassReport = PassReport(())
        self.plan: MemoryPlan | None = None
        self.original: tuple[GraphRecord, ...] = ()

    def forward(self, x: Any) -> Any:
        """The input itself: code that calls all children of a model in turn, as of a Sequential, may call this, too."""
        return x

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a copy or a pickle, which are made without `__init__`."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's own
        watch_optimizers()
        watch_steps()

    def extra_repr(self) -> str:
        """The line that `print(model)` shows."""
        return f"density={self.config.density:g}, masked={sum(p.masked for p in self.prunable.values())}"


def is_transformed(model: nn.Module) -> bool:
    """Whether `fedmef_fx.transform` made this model."""
    return isinstance(getattr(model, CHILD_NAME, None), Transformation)


def transformation_of(model: nn.Module) -> Transformation:
    """What a transformed model knows about itself.

    Raises:
        ConfigError: The model was not made by `fedmef_fx.transform`.
    """
    child = getattr(model, CHILD_NAME, None)
    if not isinstance(child, Transformation):
        raise ConfigError(
            f"{type(model).__name__} is not a transformed model; expected the result of "
            "fedmef_fx.transform(model), e.g. sparse = fedmef_fx.transform(model); fedmef_fx.masks(sparse)"
        )
    return child


def coverage(model: nn.Module) -> Coverage:
    """Where each prunable parameter of a transformed model is rewritten, and why not better."""
    return Coverage(tuple(transformation_of(model).prunable.values()))


def report(model: nn.Module) -> PassReport:
    """What each pass did and refused, with reasons and times."""
    return transformation_of(model).reports


def memory_plan(model: nn.Module) -> MemoryPlan | None:
    """How the memory budget of a transformed model is kept, and why so; None where there was no budget."""
    return transformation_of(model).plan
