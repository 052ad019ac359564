"""Capture a module on the values of the calls that it gets, as one region per kind of call, with proof."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from torch import fx, nn

from fedmef_fx.capture.proof import Originals, prove
from fedmef_fx.capture.symbolic import as_graphs, capture_graphs, failure
from fedmef_fx.capture.value_tracer import trace_call
from fedmef_fx.errors import CaptureError
from fedmef_fx.graph.program import Region
from fedmef_fx.graph.signature import Call, Signature
from fedmef_fx.records.graphs import GraphMode

__all__ = ["CaptureOnValues", "capture_call", "capture_every_call", "drop_constants"]

_SIGNATURES: Final = 8


def capture_call(module: nn.Module, path: str, call: Call) -> list[Region]:
    """Capture a module for one call in the mode it is in, with proof.

    Raises:
        CaptureError: It cannot be traced faithfully.
    """
    flags = {child: child.training for child in module.modules()}

    def keep_modes(_: bool) -> None:
        for child, flag in flags.items():
            child.training = flag

    try:
        regions = CaptureOnValues(keep_modes).regions_of(module, path, {module.training: [call]})
    except Exception as error:
        raise failure(module, error) from error
    for region in regions:
        _forget_classes(region.graphs)
    return regions


def capture_every_call(module: nn.Module, call: Call | None) -> dict[GraphMode, fx.Graph]:
    """Capture a module for all calls in both modes, with proof on one call in the mode it is in, if there is one.

    Raises:
        CaptureError: It cannot be traced faithfully.
    """
    before = set(module._buffers)
    try:
        graphs = capture_graphs(module)
        if call is not None:
            graph = graphs.get("both") or graphs[_mode(module.training)]
            prove(module, call, graph, Originals(), by_name=True)
    except Exception as error:
        drop_constants(module, besides=before)
        raise failure(module, error) from error
    _forget_classes(graphs)
    return graphs


def _forget_classes(graphs: Mapping[GraphMode, fx.Graph]) -> None:
    for graph in graphs.values():
        for node in graph.nodes:
            # Names classes that exist at run time only, which no pickle could find.
            node.meta.pop("nn_module_stack", None)


@dataclasses.dataclass
class CaptureOnValues:
    """Captures modules on the calls that they get.

    Attributes:
        set_mode: Puts the model into train (True) or eval mode.
        originals: Observations of original forwards.
        own_hooks: Identities of hooks that the model's own code installed.
    """

    set_mode: Callable[[bool], object]
    originals: Originals = dataclasses.field(default_factory=Originals)
    own_hooks: set[int] = dataclasses.field(default_factory=set)

    def regions_of(self, module: nn.Module, path: str, calls: dict[bool, list[Call]]) -> list[Region]:
        """A region per signature that a module is called with, proven in each mode.

        Raises:
            Exception: One of its calls cannot be traced.
        """
        regions: list[Region] = []
        before = set(module._buffers)
        try:
            for training, made in calls.items():
                for call in made:
                    serving = next((r for r in regions if r.signature is not None and r.signature.accepts(call)), None)
                    if serving is None:
                        modes = [mode for mode, others in calls.items() if any(_alike(call, other) for other in others)]
                        regions.append(self._region_of(module, path, call, modes))
                    elif serving.has_mode(training=training):
                        self.prove(module, call, serving.graphs, [training], by_name=False)
                    if len(regions) > _SIGNATURES:
                        raise CaptureError(f"it is called in more than {_SIGNATURES} different ways")
        except Exception:
            drop_constants(module, besides=before)
            raise
        return regions

    def _region_of(self, module: nn.Module, path: str, call: Call, modes: Sequence[bool]) -> Region:
        if call.opaque is not None:
            raise CaptureError(f"an argument is a {call.opaque}, which may change while forward runs")
        problem: Exception | None = None
        for concrete_sizes in (False, True):
            try:
                traced: dict[GraphMode, fx.Graph] = {}
                exact = False
                for training in modes:
                    self.set_mode(training)
                    graph, specialized = trace_call(
                        module, call, concrete_sizes=concrete_sizes, own_hooks=self.own_hooks
                    )
                    traced[_mode(training)] = graph
                    exact |= specialized
                graphs = as_graphs(module, traced)
                self.prove(module, call, graphs, modes, by_name=False)
            except Exception as error:
                problem = problem or error
                continue
            return Region(path, module, graphs, Signature.of(call, exact=exact), by_name=False)
        assert problem is not None  # noqa: S101 -- the loop has returned otherwise
        raise problem

    def prove(
        self,
        module: nn.Module,
        call: Call,
        graphs: dict[GraphMode, fx.Graph],
        modes: Sequence[bool],
        *,
        by_name: bool,
    ) -> None:
        """Prove graphs in some modes."""
        for training in modes:
            self.set_mode(training)
            graph = graphs.get("both") or graphs[_mode(training)]
            prove(module, call, graph, self.originals, by_name=by_name)


def _alike(call: Call, other: Call) -> bool:
    return Signature.of(call, exact=True).accepts(other)


def _mode(training: bool) -> GraphMode:
    return "train" if training else "eval"


def drop_constants(module: nn.Module, *, besides: set[str]) -> None:
    """Remove what a capture that failed in the end has registered."""
    for name in [name for name in module._buffers if name.startswith("fedmef_constant_") and name not in besides]:
        del module._buffers[name]
        module._non_persistent_buffers_set.discard(name)
