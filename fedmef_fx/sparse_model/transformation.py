"""What a transformed model knows about itself: its prunable parameters, coverage, pass reports and memory plan."""

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

from torch import nn

from fedmef_fx.config import Config
from fedmef_fx.errors import ConfigError
from fedmef_fx.ops.nsconv import KernelForm
from fedmef_fx.records.memory_plan import MemoryPlan
from fedmef_fx.records.passes import PassReport
from fedmef_fx.sparse_model.copies import note_copy
from fedmef_fx.sparse_model.current_layers import is_current, renamed
from fedmef_fx.sparse_model.held_masks import watch_steps
from fedmef_fx.sparse_model.optimizer_state import watch_optimizers
from fedmef_fx.sparse_model.prunable import PrunableParameter, Tier, WeightChannels

if TYPE_CHECKING:
    from fedmef_fx.ops.noise_site import SiteState
    from fedmef_fx.records.graphs import GraphRecord

__all__ = [
    "CHILD_NAME",
    "Coverage",
    "NormalizedKernel",
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


@dataclasses.dataclass(frozen=True, slots=True)
class NormalizedKernel:
    """How an NSConv makes its kernel of a weight; see `ops/nsconv.py`.

    Attributes:
        gain: Name of the parameter with gain_i.
        form: How it is standardised.
    """

    gain: str
    form: KernelForm


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
        kernels: Name of each weight that an NSConv normalises -> how; without those that several do in different ways.
        guarded: Names of the masked parameters that code outside graphs may read, whose gradients hooks mask.
        bare: Those of them that are read so in each call of the model.
        reports: What the passes did, in order.
        plan: How the memory budget is kept; None without one.
        original: Records of the graphs as they were captured, before any pass.
        late_thresholds: States of places that pack activations, by their numbers, that are not captured yet; see
            `thresholds`.
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
        self.kernels: dict[str, NormalizedKernel] = {}
        self.guarded: tuple[str, ...] = ()
        self.reports: PassReport = PassReport(())
        self.plan: MemoryPlan | None = None
        self.original: tuple[GraphRecord, ...] = ()
        self.late_thresholds: dict[int, SiteState] = {}

    def forward(self, x: Any) -> Any:
        """The input itself: code that calls all children of a model in turn, as of a Sequential, may call this, too."""
        return x

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a copy or a pickle, which are made without `__init__`."""
        super().__setstate__({"kernels": {}, "late_thresholds": {}} | state)  # type: ignore[no-untyped-call]  # torch's own
        watch_optimizers()
        watch_steps()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Transformation":
        """A copy that knows what it was made of; see `copies`."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        note_copy(self, copied, self.prunable)
        return copied

    def follow(self, model: nn.Module) -> None:
        """Bring what is known of weights up to date with the layers that the model has now; see `current_layers`."""
        if self.masks_are_hidden or is_current(model, self.prunable):
            return
        found = renamed(model, self.prunable)
        names = {former: prunable.name for former, prunable in found.items()}
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        places = {name: index for index, (name, _) in enumerate(tensors)}
        rows = sorted((p.in_group(names, places) for p in found.values()), key=lambda p: places.get(p.name, -1))
        self.prunable = {prunable.name: prunable for prunable in rows}
        self.guarded = tuple(names.get(name, name) for name in self.guarded if names.get(name, name) in places)

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
    child.follow(model)
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
