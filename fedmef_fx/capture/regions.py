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
from typing import Final

import torch
from torch import Tensor, fx, nn

from fedmef_fx.capture.calls import Recording, record_calls
from fedmef_fx.capture.per_call import CaptureOnValues, drop_constants
from fedmef_fx.capture.proof import Originals
from fedmef_fx.capture.state import ChangedAttributeError, attributes_of, fixed_seed, settle
from fedmef_fx.capture.symbolic import capture_graphs, failure
from fedmef_fx.capture.tracer import is_composite
from fedmef_fx.errors import ConfigError
from fedmef_fx.graph.hooks import has_user_hooks
from fedmef_fx.graph.program import Region
from fedmef_fx.graph.signature import AnyTensors, Call
from fedmef_fx.module_tree import join
from fedmef_fx.records.graphs import GraphMode
from fedmef_fx.records.passes import Refusal

__all__ = ["Captured", "capture_model", "has_weights"]

_CONTAINERS: Final = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclasses.dataclass
class Captured:
    """What was captured of a model.

    Attributes:
        regions: The regions, none inside another.
        failures: Modules whose Python forward stays, and why.
        products: Names of the parameters that products read in the example call; empty where it was not recorded.
        pending: Paths of modules that failed without an example call, and may be captured when they are called.
    """

    regions: list[Region] = dataclasses.field(default_factory=list)
    failures: list[Refusal] = dataclasses.field(default_factory=list)
    products: frozenset[str] = frozenset()
    pending: tuple[str, ...] = ()


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
        self.capture = CaptureOnValues(model.train)
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
        calls = {mode: [call] for mode in self.modes}
        for is_settled in (False, True):
            try:
                self.found.regions = self.capture.regions_of(self.model, "", calls)
            except ChangedAttributeError as error:
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
            arguments = None if call is None else call.arguments
            graphs = capture_graphs(self.model, given=arguments)
            if call is not None:
                self.capture.prove(self.model, call, graphs, self.modes, by_name=True)
        except Exception as error:
            drop_constants(self.model, besides=before)
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
        if is_composite(child):
            return False
        self.found.regions.append(_without_example(child, path))
        return True

    def _fail(self, path: str, module: nn.Module, error: Exception) -> None:
        if self.call is None:
            self.found.pending += (path,)
        self.found.failures.append(Refusal(path or type(module).__name__, str(failure(module, error))))


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
        if isinstance(value, Tensor):
            return f"{value.dtype}{list(value.shape)}"
        shape = getattr(value, "shape", None)
        return f"{value!r:.80}" if shape is None else f"{type(value).__name__}{list(shape)}, which is no torch.Tensor"

    return ", ".join(f"{name}={one(value)}" for name, value in call.arguments.items())


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
    return of_torch and (not list(module.children()) or not (isinstance(module, _CONTAINERS) or is_composite(module)))


def _calls_composites(model: nn.Module, graphs: dict[GraphMode, fx.Graph]) -> bool:
    """Whether a graph calls modules with weights that a trace on values would look into."""
    targets = {str(node.target) for graph in graphs.values() for node in graph.find_nodes(op="call_module")}
    modules = [model.get_submodule(target) for target in targets]
    return any(is_composite(module) or nn.utils.parametrize.is_parametrized(module) for module in modules)
