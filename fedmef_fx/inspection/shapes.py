"""Shapes of activations, seen by running the graphs once on example inputs."""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fedmef_fx.errors import ConfigError
from fedmef_fx.inspection.records import TensorRecord
from fedmef_fx.program import Program, Region

__all__ = ["observe_tensors"]

# torch.fx numbers the placeholders of specialised arguments: `mask` becomes `mask_1`.
_NUMBERED: Final = re.compile(r"_\d+$")


def observe_tensors(
    program: Program, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[fx.Node, tuple[TensorRecord, ...]]:
    """Run every graph on a copy of the model, in eval mode and without gradients.

    Args:
        program: The program; neither it nor its model changes.
        args: Positional arguments of one call of the model.
        kwargs: Keyword arguments of that call.

    Returns:
        Per node the tensors of its value, in order; an empty tuple for a value without tensors.

    Raises:
        ConfigError: The model does not accept the arguments, or fails on them.
    """
    duplicate = copy.deepcopy(program.model).eval()
    call = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (tuple(args), dict(kwargs)))
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    observed: dict[fx.Node, tuple[TensorRecord, ...]] = {}
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        calls = _region_calls(program, duplicate, *call)
        for region, _mode, graph in program.graphs():
            if region.path not in calls:
                continue  # these inputs do not lead into it
            owner = duplicate.get_submodule(region.path)
            _Observer(owner, graph, observed).run(*_bind(graph, *calls[region.path]))
    return observed


class _Observer(fx.Interpreter):
    """Runs a graph on a module and notes the tensors of each value, even if an operation changes them afterwards."""

    def __init__(self, owner: nn.Module, graph: fx.Graph, observed: dict[fx.Node, tuple[TensorRecord, ...]]) -> None:
        super().__init__(owner, graph=graph)
        self.extra_traceback = False  # our own message names the node
        self._observed = observed

    def run_node(self, n: fx.Node) -> Any:
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
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments with which one call of the model first calls each region."""
    if all(not region.path for region in program.regions):
        return {"": (args, kwargs)}
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def listen(region: Region) -> None:
        def note(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            calls.setdefault(region.path, pytree.tree_map_only(Tensor, torch.clone, (given, named)))

        handles.append(duplicate.get_submodule(region.path).register_forward_pre_hook(note, with_kwargs=True))

    handles: list[Any] = []
    for region in program.regions:
        listen(region)
    try:
        duplicate(*args, **kwargs)
    except Exception as error:
        raise ConfigError(
            f"inspect: {type(program.model).__name__} fails on the example inputs: {type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return calls


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
