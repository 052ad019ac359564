"""Reports that pages draw: a training step, and two states of a model, with numbers chosen by hand."""

import dataclasses

from fedmef_fx.inspection import Comparison, ParameterChange
from fedmef_fx.measure.timeline import Event, Phase, Site


@dataclasses.dataclass(frozen=True)
class Step:
    timeline: tuple[Event, ...]


def step_memory(*, saved: int, repeats: int = 1) -> Step:
    """Two operations forward and two backward; 8 bytes of weights all the time."""
    moments: tuple[tuple[Phase, str, int], ...] = (
        ("forward", "conv1", 0),
        ("forward", "relu1", saved),
        ("backward", "relu1", saved),
        ("backward", "", 0),
    )
    events = [
        Event(Site(phase, path, "op"), (8, 0, 0, 0, 0, kept, 0))
        for phase, path, kept in moments
        for _ in range(repeats)
    ]
    return Step(tuple(events))


def comparison() -> Comparison:
    """Two layers, one of which changed half of its mask."""
    rows = (_change("a.weight", kept=4, active=4), _change("b.weight", kept=2, active=3))
    return Comparison("round 1", "<b>round 2</b>", rows, only_after=("c.bias",))


def _change(name: str, *, kept: int, active: int) -> ParameterChange:
    return ParameterChange(
        name,
        (2, 4),
        is_masked=True,
        active_before=active,
        active_after=active,
        kept=kept,
        distance=0.5,
        norm_before=2.0,
    )
