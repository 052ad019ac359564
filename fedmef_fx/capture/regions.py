"""Find the largest modules of a model that can be traced.

1. The whole model, by plain symbolic tracing: its graph holds for all shapes.
2. With example inputs: the whole model again, on the values of the example call.
3. Otherwise its Python forward stays, and its children are tried in the same way, each on the calls that it really
   gets. Containers that are never called, such as ModuleList, are looked into.
4. Layers that no region holds become leaves: regions of a single layer.

With example inputs every graph is proven against the original before it is used (`proof.py`).
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch
from torch import fx, nn

from fedmef_fx.capture.calls import Recording, record_calls
from fedmef_fx.capture.proof import Originals, prove
from fedmef_fx.capture.state import ChangedAttribute, attributes_of, fixed_seed, settle
from fedmef_fx.capture.symbolic import as_graphs, capture_graphs, failure
from fedmef_fx.capture.tracer import COMPOSITES, has_user_hooks
from fedmef_fx.capture.value_tracer import trace_call
from fedmef_fx.errors import CaptureError, ConfigError
from fedmef_fx.pipeline import Refusal
from fedmef_fx.program import GraphMode, Region, join
from fedmef_fx.signature import AnyTensors, Call, Signature

__all__ = ["Captured", "capture_call", "capture_model", "leaf_regions"]

_LAYERS: Final = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_CONTAINERS: Final = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_SIGNATURES: Final = 8


@dataclasses.dataclass
class Captured:
    """What was captured of a model.

    Attributes:
        regions: The regions, none inside another.
        failures: Modules whose Python forward stays, and why.
        products: Names of the parameters that products read in the example call; empty where it was not recorded.
    """

    regions: list[Region] = dataclasses.field(default_factory=list)
    failures: list[Refusal] = dataclasses.field(default_factory=list)
    products: frozenset[str] = frozenset()


def capture_model(model: nn.Module, call: Call | None) -> Captured:
    """Capture as much of a model as can be traced; the model is as it was when this returns.

    Args:
        model: The model.
        call: An example call; None captures what can be traced without one, and nothing is proven then.

    Raises:
        ConfigError: The model refuses the example call in both modes.
    """
    flags = {module: module.training for module in model.modules()}
    try:
        return _Search(model, call).run()
    finally:
        for module, training in flags.items():
            module.training = training


class _Search:
    """One search for regions."""

    def __init__(self, model: nn.Module, call: Call | None) -> None:
        self.model = model
        self.call = call
        self.found = Captured()
        self.capture = _Capture(model.train)
        self.modes = () if call is None else _working_modes(model, call, self.capture.originals)
        self.recording: Recording | None = None
        self._visited: set[int] = set()

    def run(self) -> Captured:
        if self._whole_model():
            return self.found
        if self.call is not None:
            self.recording = record_calls(self.model, self.call, modes=self.modes)
            names = {id(parameter): name for name, parameter in self.model.named_parameters()}
            self.found.products = frozenset(names[identity] for identity in self.recording.products)
        self._descend(self.model, "")
        return self.found

    def _whole_model(self) -> bool:
        """Try the whole model; whether that succeeded."""
        symbolic = self._symbolic_graphs()
        if symbolic is not None and not _calls_composites(self.model, symbolic):
            self.found.regions = [self._symbolic_region(symbolic)]
            return True
        if self.call is not None and self._on_values(self.call):
            return True
        if symbolic is not None:
            self.found.regions = [self._symbolic_region(symbolic)]
        return symbolic is not None

    def _on_values(self, call: Call) -> bool:
        calls = dict.fromkeys(self.modes, [call])
        for is_settled in (False, True):
            try:
                self.found.regions = self.capture.regions_of(self.model, "", calls)
            except ChangedAttribute as error:
                # Perhaps only the first call does that; if so, the next attempt starts after it.
                if is_settled or not self._settle(call):
                    self._fail("", self.model, error)
                    return False
            except Exception as error:
                self._fail("", self.model, error)
                return False
            else:
                return True
        return False

    def _settle(self, call: Call) -> bool:
        """Make the calls whose effects last; whether there were any."""
        before = [attributes_of(module) for module in self.model.modules()]

        def run() -> None:
            with fixed_seed(), torch.no_grad():
                for training in self.modes:
                    self.model.train(training)
                    call.replace_tensors(lambda tensor: tensor.detach().clone()).on(self.model.forward, self.model)

        self.capture.own_hooks = settle(self.model, run)
        return before != [attributes_of(module) for module in self.model.modules()]

    def _symbolic_region(self, graphs: dict[GraphMode, fx.Graph]) -> Region:
        if self.call is None or set(self.call.arguments) == _required(self.model):
            return Region("", self.model, graphs)
        return Region("", self.model, graphs, AnyTensors(frozenset(self.call.arguments)))

    def _symbolic_graphs(self) -> dict[GraphMode, fx.Graph] | None:
        call, before = self.call, set(self.model._buffers)
        if call is not None and len(call.tensors) != len(call.leaves):
            return None
        try:
            given = None if call is None else call.arguments
            graphs = capture_graphs(self.model, given=given)
            if call is not None:
                self.capture.prove(self.model, call, graphs, self.modes, by_name=True)
        except Exception as error:
            _drop_constants(self.model, besides=before)
            if call is None:
                self._fail("", self.model, error)
            return None
        return graphs

    def _descend(self, parent: nn.Module, path: str) -> None:
        for name, child in parent.named_children():
            where = join(path, name)
            if id(child) in self._visited or not has_weights(child):
                continue
            self._visited.add(id(child))
            if not self._child(child, where):
                self._descend(child, where)

    def _child(self, child: nn.Module, path: str) -> bool:
        """Try a module inside the model; whether it became a region."""
        if _is_single_layer(child) or isinstance(child, nn.ModuleList | nn.ModuleDict | nn.ParameterList):
            return False
        if has_user_hooks(child, besides=self.capture.own_hooks) and not list(child.children()):
            return False
        try:
            if self.recording is None:
                self.found.regions.append(_without_example(child, path))
                return True
            calls = {mode: self.recording.calls[mode].get(child, []) for mode in self.modes}
            if not any(calls.values()):
                return self._unreached(child, path)
            self.found.regions += self.capture.regions_of(child, path, calls)
        except Exception as error:
            self._fail(path, child, error)
            return False
        return True

    def _unreached(self, child: nn.Module, path: str) -> bool:
        """A module that the example call did not reach: only torch's own code is trusted without proof."""
        if not all(type(module).__module__.startswith("torch.nn") for module in child.modules()):
            return False
        if isinstance(child, COMPOSITES):
            return False
        self.found.regions.append(_without_example(child, path))
        return True

    def _fail(self, path: str, module: nn.Module, error: Exception) -> None:
        self.found.failures.append(Refusal(path or type(module).__name__, str(failure(module, error))))


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
        return _Capture(keep_modes).regions_of(module, path, {module.training: [call]})
    except Exception as error:
        raise failure(module, error) from error


@dataclasses.dataclass
class _Capture:
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
                    known = next((r for r in regions if r.signature is not None and r.signature.accepts(call)), None)
                    if known is None:
                        modes = [mode for mode, others in calls.items() if any(_alike(call, other) for other in others)]
                        regions.append(self._region_of(module, path, call, modes))
                    elif known.has_mode(training=training):
                        self.prove(module, call, known.graphs, [training], by_name=False)
                    if len(regions) > _SIGNATURES:
                        raise CaptureError(f"it is called in more than {_SIGNATURES} different ways")
        except Exception:
            _drop_constants(module, besides=before)
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
        for index, training in enumerate(modes):
            self.set_mode(training)
            graph = graphs.get("both") or graphs[_mode(training)]
            gradients = index == 0 or "both" not in graphs
            prove(module, call, graph, self.originals, by_name=by_name, gradients=gradients)


def _alike(call: Call, other: Call) -> bool:
    return Signature.of(call, exact=True).accepts(other)


def leaf_regions(model: nn.Module, regions: list[Region], *, fallbacks: bool) -> Iterator[Region]:
    """Regions of single layers.

    Args:
        model: The model.
        regions: Its larger regions.
        fallbacks: Whether layers inside a region get one too.
    """
    inside = {id(module): region for region in regions for module in region.owner.modules()}
    owners = {id(region.owner) for region in regions}
    skipped = {identity for identity, region in inside.items() if not (fallbacks and region.may_run_python)}
    for path, module in model.named_modules():
        if not _is_plain_layer(module) or id(module) in owners or id(module) in skipped:
            continue
        graphs = capture_graphs(module)
        role = "fallback" if id(module) in inside else "leaf"
        yield Region(path, module, graphs, AnyTensors(frozenset({"input"})), role=role)  # type: ignore[arg-type]


def _without_example(module: nn.Module, path: str) -> Region:
    required = _required(module)
    return Region(path, module, capture_graphs(module), AnyTensors(frozenset(required)))


def _working_modes(model: nn.Module, call: Call, originals: Originals) -> tuple[bool, ...]:
    """The modes in which the model itself accepts a call."""
    working, error = [], None
    for training in (True, False):
        model.train(training)
        first = originals.of(model, call, gradients=training)[0]
        if isinstance(first, Exception):
            error = first
        else:
            working.append(training)
    if not working:
        raise ConfigError(
            f"transform: {type(model).__name__} itself fails on the example inputs ({_describe(call)}): "
            f"{type(error).__name__}: {error}"
        ) from error
    return tuple(working)


def _describe(call: Call) -> str:
    def one(value: object) -> str:
        return (
            f"{value.dtype}{list(value.shape)}" if hasattr(value, "dtype") and hasattr(value, "shape") else repr(value)
        )

    return ", ".join(f"{name}={one(value)}" for name, value in call.arguments.items())


def _mode(training: bool) -> GraphMode:
    return "train" if training else "eval"


def _required(module: nn.Module) -> set[str]:
    parameters = inspect.signature(module.forward).parameters.values()
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in kinds}


def has_weights(module: nn.Module) -> bool:
    """Whether a module holds a parameter that could be prunable."""
    return any(p.dim() > 1 and p.is_floating_point() for p in module.parameters())


def _is_single_layer(module: nn.Module) -> bool:
    """A module of torch.nn that no trace looks into."""
    of_torch = type(module).__module__.startswith("torch.nn")
    return of_torch and (not list(module.children()) or not isinstance(module, _CONTAINERS + COMPOSITES))


def _is_plain_layer(module: nn.Module) -> bool:
    """A convolution or linear layer as torch.nn defines it, with its own parameter as weight."""
    kind = next((base for base in type(module).__mro__ if base in _LAYERS), None)
    if kind is None or has_user_hooks(module) or not isinstance(module._parameters.get("weight"), nn.Parameter):
        return False
    own = {name for base in type(module).__mro__[: type(module).__mro__.index(kind)] for name in vars(base)}
    return not own & {"forward", "_conv_forward"} and nn.parameter.is_lazy(module.weight) is False


def _calls_composites(model: nn.Module, graphs: dict[GraphMode, fx.Graph]) -> bool:
    """Whether a graph calls modules with weights that a trace on values would look into."""
    targets = {str(node.target) for graph in graphs.values() for node in graph.find_nodes(op="call_module")}
    modules = [model.get_submodule(target) for target in targets]
    return any(isinstance(module, COMPOSITES) or nn.utils.parametrize.is_parametrized(module) for module in modules)


def _drop_constants(module: nn.Module, *, besides: set[str]) -> None:
    """Remove what a capture that failed in the end has registered."""
    for name in [name for name in module._buffers if name.startswith("fedmef_constant_") and name not in besides]:
        del module._buffers[name]
        module._non_persistent_buffers_set.discard(name)
