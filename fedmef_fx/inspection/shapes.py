"""What one call shows: shapes of activations, and what each node saves for backward, seen by running the graphs."""

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fedmef_fx.errors import ConfigError
from fedmef_fx.inspection.records import TensorRecord
from fedmef_fx.inspection.saved import KeptStorage, NodeMeter
from fedmef_fx.model import HOLDER, is_transformed
from fedmef_fx.program import Program, Region
from fedmef_fx.signature import Call

__all__ = ["Observation", "observe"]

# torch.fx numbers the placeholders of specialised arguments: `mask` becomes `mask_1`.
_NUMBERED: Final = re.compile(r"_\d+$")
_SEED: Final = 0
_STATE: Final = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class Observation:
    """What running the graphs on example inputs showed; empty without.

    Attributes:
        tensors: Per node the tensors of its value, in order; an empty tuple for a value without tensors.
        kept: Per node what it keeps for backward; nodes that keep nothing are left out.
        measured: The graphs for which `kept` was measured.
        notices: Why it was not measured for a graph that runs in train mode.
    """

    tensors: dict[fx.Node, tuple[TensorRecord, ...]] = dataclasses.field(default_factory=dict)
    kept: dict[fx.Node, tuple[KeptStorage, ...]] = dataclasses.field(default_factory=dict)
    measured: set[fx.Graph] = dataclasses.field(default_factory=set)
    notices: list[str] = dataclasses.field(default_factory=list)


def observe(
    program: Program, args: Sequence[Any], kwargs: Mapping[str, Any], *, may_change: bool = False
) -> Observation:
    """Run every graph on a copy of the model: in train mode where it serves that, in eval mode otherwise.

    Args:
        program: The program; neither it nor its model changes.
        args: Positional arguments of one call of the model.
        kwargs: Keyword arguments of that call.
        may_change: The program's model is nobody else's: run on it, instead of a copy.

    Returns:
        What was seen; nothing of graphs to which these inputs do not lead.

    Raises:
        ConfigError: The model does not accept the arguments, or fails on them.
    """
    duplicate = program.model if may_change else _duplicate(program.model)
    duplicate.eval()
    call = pytree.tree_map_only(
        Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), (tuple(args), dict(kwargs))
    )
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    observation = Observation()
    with torch.random.fork_rng(devices=devices):
        calls = _region_calls(program, duplicate, *call)
        for region, mode, graph in program.graphs():
            owner = duplicate.get_submodule(region.path)
            values = _values_for(region, owner, graph, calls.get(region.path))
            if values is not None:
                _Run(region, owner, graph, observation).observe(values, trains=mode != "eval")
    return observation


def _duplicate(model: nn.Module) -> nn.Module:
    """A copy of a model; of a GraphModule only what its graph refers to: copying a graph takes as long as a run."""
    if not isinstance(model, fx.GraphModule):
        return copy.deepcopy(model)
    tree = nn.Module()
    # Its hooks do not run with the graph, and refer to the whole of it.
    kept = {name: value for name, value in vars(model).items() if name in _STATE or not name.startswith("_")}
    facts = model.get_submodule(HOLDER) if is_transformed(model) else model
    vars(tree).update(copy.deepcopy(kept, {id(facts): nn.Module()}))
    return tree


@dataclasses.dataclass(frozen=True)
class _Run:
    """Runs of one graph.

    Attributes:
        region: Its region in the program.
        owner: The copy of the region's owner.
        graph: The graph.
        observation: Where to note what is seen.
    """

    region: Region
    owner: nn.Module
    graph: fx.Graph
    observation: Observation

    def observe(self, values: list[Any], *, trains: bool) -> None:
        """Note shapes, and what is kept where the graph serves train mode and can run in it."""
        failure = self._train(values) if trains else None
        if self.graph in self.observation.measured:
            return
        with torch.no_grad():
            self._run(self._fresh(values), lambda _: None, training=False)  # raises if the inputs do not fit at all
        if failure is not None:
            where = self.region.path or type(self.owner).__name__
            self.observation.notices.append(f"{where}: saved bytes are not known, as train mode fails: {failure}")

    def _train(self, values: list[Any]) -> str | None:
        """Measure what is kept; the reason where the graph does not run in train mode."""
        with torch.enable_grad():
            values = self._fresh(values)
        # A model's own inputs exist anyway; what goes into an inner region is an activation.
        inputs = [] if self.region.path else [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
        meter = NodeMeter(self.owner, *inputs)
        try:
            with torch.enable_grad(), meter:
                out = self._run(values, meter.at, training=True)
        except ConfigError as error:
            return str(error.__cause__ or error)
        self.observation.kept.update(meter.kept())
        self.observation.measured.add(self.graph)
        del out  # only now may autograd release what it saved
        return None

    def _run(self, values: list[Any], at: Callable[[fx.Node], None], *, training: bool) -> Any:
        self.owner.train(training)
        torch.manual_seed(_SEED)
        return _Observer(self.owner, self.graph, self.observation.tensors, at).run(*values)

    def _fresh(self, values: list[Any]) -> list[Any]:
        """Copies for one run, which may write into them; those of an inner region are no leaves of autograd."""
        return pytree.tree_map_only(Tensor, torch.clone if self.region.path else _copy, values)  # type: ignore[no-any-return]  # of the same structure


class _Observer(fx.Interpreter):
    """Runs a graph on a module and notes the tensors of each value, even if an operation changes them afterwards."""

    def __init__(
        self,
        owner: nn.Module,
        graph: fx.Graph,
        observed: dict[fx.Node, tuple[TensorRecord, ...]],
        at: Callable[[fx.Node], None],
    ) -> None:
        super().__init__(owner, graph=graph)
        self.extra_traceback = False  # our own message names the node
        self._observed = observed
        self._at = at

    def run_node(self, n: fx.Node) -> Any:
        self._at(n)
        try:
            value = super().run_node(n)
        except Exception as error:
            raise ConfigError(
                f"inspect: the model fails on the example inputs at node %{n.name} ({n.op}[{n.target}]): "
                f"{type(error).__name__}: {error}"
            ) from error
        self._observed[n] = tuple(
            TensorRecord.of(leaf) for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)
        )
        return value


def _region_calls(
    program: Program, duplicate: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, _Arguments]:
    """The arguments with which one call of the model first calls each region."""
    if all(not region.path for region in program.regions):
        return {"": (args, kwargs)}
    calls: dict[str, _Arguments] = {}

    def listen(region: Region) -> None:
        def note(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            if region.path not in calls:
                calls[region.path] = pytree.tree_map_only(Tensor, _copy, (given, named))

        handles.append(duplicate.get_submodule(region.path).register_forward_pre_hook(note, with_kwargs=True))

    handles: list[Any] = []
    for region in program.regions:
        listen(region)
    try:
        with torch.enable_grad():  # which of a region's inputs need gradients decides what it saves
            duplicate(*args, **kwargs)
    except Exception as error:
        raise ConfigError(
            f"inspect: {type(program.model).__name__} fails on the example inputs: {type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _values_for(region: Region, owner: nn.Module, graph: fx.Graph, given: _Arguments | None) -> list[Any] | None:
    """Values for the placeholders of a graph; None where the example call is not one that the graph serves."""
    if given is None:
        return None
    if region.signature is None and region.by_name:
        return _bind(graph, *given)
    call = Call.of(owner, *given)
    if call is None or (region.signature is not None and not region.signature.accepts(call)):
        return None
    return _bind(graph, (), call.arguments) if region.by_name else list(call.tensors)


def _bind(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Values for the placeholders of a graph, in order."""
    placeholders = graph.find_nodes(op="placeholder")
    names = [str(node.target) for node in placeholders]
    remaining = dict(kwargs)
    values: list[Any] = []
    for index, (node, name) in enumerate(zip(placeholders, names, strict=True)):
        keyword = name if name in remaining else _NUMBERED.sub("", name)
        if index < len(args):
            values.append(args[index])
        elif keyword in remaining:
            values.append(remaining.pop(keyword))
        elif node.args:
            values.append(node.args[0])
        else:
            raise ConfigError(_misfit(names, args, kwargs, f"no value for {name!r}"))
    if len(args) > len(placeholders) or remaining:
        raise ConfigError(_misfit(names, args, kwargs, "too many arguments"))
    return values


def _misfit(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any], problem: str) -> str:
    return (
        f"inspect: the example inputs do not fit the model, which takes ({', '.join(names)}): got {len(args)} "
        f"positional and {sorted(kwargs)} keyword arguments: {problem}"
    )
