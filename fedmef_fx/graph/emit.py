"""Emit: from a program back to a module that runs its graphs.

The model stays the model it was: the class of each region's owner becomes a subclass whose forward picks the graph for
the mode and the kind of call, and runs the original forward where there is none. Methods, names, `isinstance`, hooks,
`deepcopy` and pickling keep working.
"""

from collections.abc import Iterator
from typing import Final

from torch import fx, nn

from fedmef_fx.graph.compiled import (
    ORIGINAL_FORWARD,
    CompiledGraph,
    original_class,
)
from fedmef_fx.graph.dispatch import (
    _TABLE,
    Extend,
    RegionTable,
    _table_of,
    capture_when_called,
    renew_graphs,
    tables_in,
)
from fedmef_fx.graph.program import Program, Region
from fedmef_fx.graph.signature import AnyCall
from fedmef_fx.sparse_model.copies import note_model
from fedmef_fx.sparse_model.gradient_masks import keep_masks
from fedmef_fx.sparse_model.transformation import CHILD_NAME, transformation_of

__all__ = ["CompiledGraph", "emit", "has_edited_graphs", "program_of", "recompile", "regions_in", "restore_classes"]

_KEPT_BY_ROOT: Final = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def emit(program: Program, *, extend: Extend | None = None) -> nn.Module:
    """Make a program runnable.

    Args:
        program: The program.
        extend: Captures kinds of calls that come up later; see `RegionTable`.

    Returns:
        The model, with the classes of the regions' owners changed.
    """
    program.model.add_module(CHILD_NAME, program.transformation)
    note_model(program.transformation, program.model)
    result = program.model
    for region in program.regions:
        _table_of(region.owner, region.path, extend if region.role == "region" else None).add(region)
    for path in program.pending:
        capture_when_called(program.model.get_submodule(path), path, extend)
    runs_graphs = "" in program.pending or any(region.owner is result for region in program.regions)
    _table_of(result, "", None)  # a model that runs no graph itself is transformed, too, and copied as such
    for owner, table in tables_in(result):
        table.look(owner)
    keep_masks(result, runs_python=not runs_graphs)
    return result


class _CarryHooks:
    """Gives a copy of a GraphModule of an earlier version, read from a file, the hooks that torch.fx leaves behind."""

    def __init__(self, module: nn.Module) -> None:
        self._hooks = {name: getattr(module, name) for name in _KEPT_BY_ROOT if name.startswith(("_forward", "_back"))}

    def __call__(self, copied: nn.Module) -> None:
        for name, hooks in self._hooks.items():
            getattr(copied, name).update(hooks)


def program_of(model: nn.Module) -> Program:
    """The program that a transformed model runs; its graphs are the model's own, not copies.

    Raises:
        ConfigError: Not a transformed model.
    """
    transformation = transformation_of(model)
    renew_graphs(model)
    if isinstance(model, fx.GraphModule):  # unpickled from a file of an earlier version
        return Program(model, [Region("", model, {"both": model.graph})], transformation)
    return Program(model, list(regions_in(model)), transformation)


def regions_in(model: nn.Module) -> Iterator[Region]:
    """The regions inside a module, with their names in it; for passes, so that edits by hand are noted first."""
    has_edited_graphs(model)
    for path, module in model.named_modules():
        table: RegionTable | None = module.__dict__.get(_TABLE)
        for entry in table.entries if table is not None else ():
            graphs = {mode: compiled.graph for mode, compiled in entry.graphs.items()}
            signature = None if isinstance(entry.signature, AnyCall) else entry.signature
            yield Region(path, module, graphs, signature, entry.by_name, entry.role)


def recompile(model: nn.Module) -> None:
    """Let a transformed model run its graphs as passes left them."""
    if isinstance(model, fx.GraphModule):
        model.recompile()
    for compiled in _compiled_in(model):
        compiled.take()


def has_edited_graphs(model: nn.Module) -> bool:
    """Whether a user changed a graph inside a model by hand."""
    return any([compiled.is_edited for compiled in _compiled_in(model)])  # noqa: C419 -- each has to take note


def _compiled_in(model: nn.Module) -> Iterator[CompiledGraph]:
    for _, table in tables_in(model):
        for entry in table.entries:
            yield from entry.graphs.values()


def restore_classes(model: nn.Module) -> None:
    """Let the modules of a transformed model run their original forward again, in place."""
    for module, _ in list(tables_in(model)):
        module.__class__ = original_class(module)
        del module.__dict__[_TABLE]
        if ORIGINAL_FORWARD in module.__dict__:
            module.__dict__["forward"] = module.__dict__.pop(ORIGINAL_FORWARD)
