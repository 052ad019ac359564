"""What one call shows: shapes of activations, and what each node saves for backward, seen by running the graphs."""

import copy
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fedmef_fx.errors import ConfigError
from fedmef_fx.graph.dispatch import tables_in
from fedmef_fx.graph.program import Program, Region
from fedmef_fx.graph.recording import Observation
from fedmef_fx.graph.signature import Call
from fedmef_fx.inspection.calls import record_calls
from fedmef_fx.measure.meter import SavedTensors
from fedmef_fx.module_tree import duplicate_of
from fedmef_fx.ops.random_numbers import seeded
from fedmef_fx.records.graphs import TensorRecord
from fedmef_fx.sparse_model.transformation import CHILD_NAME, is_transformed

__all__ = ["observe"]

# torch.fx numbers the placeholders of specialised arguments: `mask` becomes `mask_1`.
_NUMBERED: Final = re.compile(r"_\d+$")
_SEED: Final = 0
_STATE: Final = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def observe(
    program: Program, args: Sequence[Any], kwargs: Mapping[str, Any], *, may_change: bool = False
) -> Observation:
    """Call a copy of the model that runs its graphs node by node: in train mode, and in eval mode for what is left.

    Args:
        program: The program; neither it nor its model changes.
        args: Positional arguments of one call of the model.
        kwargs: Keyword arguments of that call.
        may_change: Nothing else uses the program's model: run on it instead of a copy.

    Returns:
        What was seen; nothing of graphs to which these inputs do not lead.

    Raises:
        ConfigError: The model does not accept the arguments, or fails on them.
    """
    duplicate = program.model if may_change else _duplicate(program.model)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    observation = Observation()
    with torch.random.fork_rng(devices=devices):
        failure = _train(program, duplicate, (tuple(args), dict(kwargs)), observation)
        if failure is not None or any(mode == "eval" for _, mode, _ in program.graphs()):
            with torch.no_grad():
                copies = pytree.tree_map_only(Tensor, _copy, (tuple(args), dict(kwargs)))
                _Calls(program, duplicate.eval(), observation.tensors).make(*copies)
        regions = {region.path for region in program.regions if region.role != "fallback"}
        if not program.is_one_graph and "" not in regions:
            copies = pytree.tree_map_only(Tensor, _copy, (tuple(args), dict(kwargs)))
            observation.calls = record_calls(duplicate, _called_by_python(duplicate, regions), *copies)
        if failure is not None:
            observation.notices.append(f"what is saved for backward is not known, as train mode fails: {failure}")
    return observation


def _train(program: Program, duplicate: nn.Module, given: _Arguments, observation: Observation) -> str | None:
    """Measure what one call in train mode keeps; the reason where it fails."""
    args, kwargs = pytree.tree_map_only(Tensor, _copy, given)
    inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    meter = SavedTensors(duplicate, *inputs)
    calls = _Calls(program, duplicate.train(), observation.tensors, meter)
    try:
        with torch.enable_grad(), meter:
            out = calls.make(args, kwargs)
    except ConfigError as error:
        return str(error.__cause__ or error)
    kept = meter.by_node()
    observation.kept_outside = kept.pop(None, ())
    observation.kept.update({node: storages for node, storages in kept.items() if node is not None})
    observation.measured.update(calls.seen)
    del out  # only now may autograd release what it saved
    return None


def _duplicate(model: nn.Module) -> nn.Module:
    """A copy of a model; of a GraphModule only what its graph refers to: copying a graph takes as long as a run."""
    if not isinstance(model, fx.GraphModule):
        duplicate = duplicate_of(model)
        for _, table in tables_in(duplicate):
            table.extend = table.watch = None  # only graphs that the model has now are looked at
        return duplicate
    tree = nn.Module()
    # Its hooks do not run with the graph, and refer to the whole of it.
    kept = {name: value for name, value in vars(model).items() if name in _STATE or not name.startswith("_")}
    transformation = model.get_submodule(CHILD_NAME) if is_transformed(model) else model
    vars(tree).update(copy.deepcopy(kept, {id(transformation): nn.Module()}))
    return tree


def _called_by_python(model: nn.Module, regions: Collection[str]) -> list[str]:
    """Paths of the regions and of the modules outside of them that hold parameters of their own."""
    inside = (*regions, CHILD_NAME)
    return [
        path
        for path, module in model.named_modules()
        if path in regions
        or (
            path
            and next(module.parameters(recurse=False), None) is not None
            and not any(f"{path}.".startswith(f"{above}.") for above in inside)
        )
    ]


class _Calls:
    """Calls of a model whose regions run their graphs node by node, each when it is first called.

    Args:
        program: The program.
        duplicate: A copy of its model, in the mode of the call.
        observed: Gains the tensors of each node.
        meter: Is told which node runs; None where nothing is measured.

    Attributes:
        seen: The graphs that ran.
    """

    def __init__(
        self,
        program: Program,
        duplicate: nn.Module,
        observed: dict[fx.Node, tuple[TensorRecord, ...]],
        meter: SavedTensors | None = None,
    ) -> None:
        self._program, self._duplicate, self._observed, self._meter = program, duplicate, observed, meter
        self.seen: set[fx.Graph] = set()

    def make(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call the model.

        Raises:
            ConfigError: It fails.
        """
        paths = dict.fromkeys(region.path for region in self._program.regions)
        owners = {path: self._duplicate.get_submodule(path) for path in paths}
        own = {path: owner.__dict__.get("forward") for path, owner in owners.items()}
        for path, owner in owners.items():
            owner.__dict__["forward"] = self._forward(path, owner, owner.forward)
        try:
            with seeded(_SEED):
                return self._duplicate(*args, **kwargs)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"inspect: {type(self._program.model).__name__} fails on the example inputs: "
                f"{type(error).__name__}: {error}"
            ) from error
        finally:
            for path, owner in owners.items():
                owner.__dict__.pop("forward", None)  # one module may stand at two paths
                if own[path] is not None:
                    owner.__dict__["forward"] = own[path]

    def _forward(self, path: str, owner: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        """What a region's owner runs instead of its forward."""
        training = self._duplicate.training
        regions = [r for r in self._program.regions if r.path == path and r.has_mode(training=training)]

        def run(*args: Any, **kwargs: Any) -> Any:
            for region in regions:
                graph = region.graph_for(training=training)
                values = None if graph in self.seen else _values_for(region, owner, graph, original, (args, kwargs))
                if values is not None:
                    self.seen.add(graph)
                    return self._run(owner, graph, values)
            return original(*args, **kwargs)

        return run

    def _run(self, owner: nn.Module, graph: fx.Graph, values: list[Any]) -> Any:
        at = (lambda _: None) if self._meter is None else self._meter.at
        out = _Observer(owner, graph, self._observed, at).run(*values)
        at(None)
        return out


class _Observer(fx.Interpreter):
    """Runs a graph on a module and notes the tensors of each value, even if an operation changes them afterwards."""

    def __init__(
        self,
        owner: nn.Module,
        graph: fx.Graph,
        observed: dict[fx.Node, tuple[TensorRecord, ...]],
        at: Callable[[fx.Node | None], None],
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


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _values_for(
    region: Region, owner: nn.Module, graph: fx.Graph, original: Callable[..., Any], given: _Arguments
) -> list[Any] | None:
    """Values for the placeholders of a graph; None where the call is not one that the graph serves."""
    if region.signature is None and region.by_name:
        return _bind(graph, *given)
    replaced, owner.__dict__["forward"] = owner.__dict__["forward"], original
    call = Call.of(owner, *given)
    owner.__dict__["forward"] = replaced
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
