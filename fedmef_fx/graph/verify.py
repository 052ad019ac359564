"""Named invariants that hold after every pass. Each is a small function that returns what is wrong, or nothing."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import fx

from fedmef_fx.errors import VerificationError
from fedmef_fx.graph.origin import provenance
from fedmef_fx.graph.pipeline import Pass
from fedmef_fx.graph.program import Program
from fedmef_fx.packing.bitmap import bitmap_nbytes, count_bits
from fedmef_fx.records.passes import PassResult
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.sparse_model.transformation import PrunableParameter
from fedmef_fx.sparsity.granularity import Layout, Pattern, parse_granularity

__all__ = ["Verifier"]


@dataclasses.dataclass
class Verifier:
    """Checks a program after each pass against what it was before the first.

    Attributes:
        before: Interface, names and training flags of the program at the start, by graph.
    """

    before: "_Snapshot"

    @classmethod
    def of(cls, program: Program) -> "Verifier":
        """A verifier for the program as it is now."""
        return cls(_Snapshot.of(program))

    def __call__(self, step: Pass, program: Program, result: PassResult) -> None:
        """Check every invariant.

        Raises:
            VerificationError: The first one that does not hold, with pass, node and expectation.
        """
        after = _Snapshot.of(program)
        for check in _CHECKS:
            for problem in check(self.before, after, program, result):
                raise VerificationError(
                    f"pass {step.name}: {check.__name__.strip('_').replace('_', ' ')}: {problem}. {_remedy(step)}"
                )
        self.before = dataclasses.replace(after, keys=self.before.keys)


def _remedy(step: Pass) -> str:
    if type(step).__module__.startswith("fedmef_fx."):
        return "This is a bug of the pass, not of the model; please report it with the model"
    return (
        f"This is a bug of {type(step).__qualname__}, not of the model; expected a pass that keeps what docs/passes.md "
        "lists, with set_provenance for each node that it makes"
    )


@dataclasses.dataclass(frozen=True)
class _Snapshot:
    """What passes must keep.

    Attributes:
        interfaces: Per graph the placeholders, and whether it returns something.
        keys: Names in the state dict.
        training: Training flag per module name.
        nodes: What each node of a graph is, by its name.
    """

    interfaces: dict[fx.Graph, tuple[str, ...]]
    keys: frozenset[str]
    training: dict[str, bool]
    nodes: dict[fx.Graph, dict[str, tuple[object, ...]]]

    @classmethod
    def of(cls, program: Program) -> "_Snapshot":
        graphs = [graph for _, _, graph in program.graphs()]
        return cls(
            interfaces={
                graph: tuple(f"{n.op} {n.target}" for n in graph.nodes if n.op in ("placeholder", "output"))
                for graph in graphs
            },
            keys=frozenset(program.model.state_dict()),
            training={name: module.training for name, module in program.model.named_modules()},
            nodes={graph: {n.name: (n.op, n.target, n.args, n.kwargs) for n in graph.nodes} for graph in graphs},
        )


def _graphs_are_well_formed(_: _Snapshot, __: _Snapshot, program: Program, ___: PassResult) -> Iterator[str]:
    for region, mode, graph in program.graphs():
        try:
            graph.lint()
        except RuntimeError as error:
            yield f"{mode} graph of {region.path or 'the model'}: {error}"


def _targets_exist(_: _Snapshot, __: _Snapshot, program: Program, ___: PassResult) -> Iterator[str]:
    for region, _mode, graph in program.graphs():
        for node in graph.nodes:
            if node.op not in ("get_attr", "call_module"):
                continue
            try:
                region.attribute(str(node.target))
            except AttributeError:
                yield f"node {node.name} refers to {node.target!r}, which {region.path or 'the model'} does not have"


def _interface_is_kept(before: _Snapshot, after: _Snapshot, _: Program, __: PassResult) -> Iterator[str]:
    for graph, old in before.interfaces.items():
        new = after.interfaces.get(graph)
        if old != new:
            yield f"inputs and outputs were {old}, are {new}"


def _names_are_kept(before: _Snapshot, after: _Snapshot, _: Program, __: PassResult) -> Iterator[str]:
    for name in sorted(before.keys - after.keys):
        yield f"the state dict lost {name!r}"


def _training_flags_are_kept(before: _Snapshot, after: _Snapshot, _: Program, __: PassResult) -> Iterator[str]:
    for name, flag in before.training.items():
        if after.training.get(name, flag) != flag:
            yield f"module {name!r} had training={flag}"


def _masks_match(_: _Snapshot, __: _Snapshot, program: Program, ___: PassResult) -> Iterator[str]:
    for name, (weight, buffer, shape) in _stored(program).items():
        fits = buffer.dtype == torch.bool and buffer.shape == weight.shape == shape
        if program.transformation.prunable[name].packed_shape is not None:
            fits = buffer.dtype == torch.uint8 and buffer.shape == (bitmap_nbytes(shape.numel()),)
            fits = fits and weight.shape == (count_bits(buffer.cpu().numpy()),)
        if not fits or buffer.device != weight.device:
            yield f"the mask of {name} is {buffer.dtype} {tuple(buffer.shape)} on {buffer.device}"


def _stored(program: Program) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Size]]:
    """Parameter, mask or bitmap, and dense shape by name."""
    parameters = masked_parameters(program.model, transformation=program.transformation)
    return {name: (parameter.parameter, parameter.buffer, parameter.shape) for name, parameter in parameters.items()}


def _masks_have_their_granularity(_: _Snapshot, __: _Snapshot, program: Program, ___: PassResult) -> Iterator[str]:
    granularity = parse_granularity(program.transformation.config.granularity)
    parameters = masked_parameters(program.model, transformation=program.transformation)
    for name, prunable in program.transformation.prunable.items():
        if not prunable.masked or prunable.channels is None:
            continue
        mask, layout = parameters[name].mask, prunable.channels.layout
        if isinstance(granularity, Pattern) and (layout.blocks(mask, granularity.of).sum(1) > granularity.kept).any():
            yield f"the mask of {name} keeps more than {granularity} somewhere"
        leader = program.transformation.prunable[prunable.channels.leader]
        if granularity == "channel" and not leader.masked:
            yield f"the mask of {name} follows {leader.name}, which has none"
        elif granularity == "channel":
            alive = _layout(leader).rows(parameters[leader.name].mask).any(1)
            if (mask & ~layout.spread(alive, mask.shape)).any():
                yield f"the mask of {name} keeps channels that are off in {leader.name}"


def _layout(prunable: PrunableParameter) -> Layout:
    return Layout() if prunable.channels is None else prunable.channels.layout


def _masked_parameters_are_read_through_masks(
    _: _Snapshot, __: _Snapshot, program: Program, ___: PassResult
) -> Iterator[str]:
    guarded = set(program.transformation.guarded)  # may be read without a mask where the region does not hold it
    stored = _stored(program).items()
    masked = {id(weight): (n, buffer) for n, (weight, buffer, _) in stored if n not in guarded}
    for region, _mode, graph in program.graphs():
        for node in graph.find_nodes(op="get_attr"):
            name, buffer = masked.get(id(region.tensor(node)), (None, None))
            if name is None:
                continue
            for user in node.users:
                asks_for_its_type = user.target == "new_ones"
                if not asks_for_its_type and not any(
                    region.attribute(str(a.target)) is buffer for a in _attributes_of(user)
                ):
                    yield f"node {user.name} reads {name} without its mask"


def _attributes_of(node: fx.Node) -> list[fx.Node]:
    return [argument for argument in node.all_input_nodes if argument.op == "get_attr"]


def _inserted_nodes_have_provenance(before: _Snapshot, _: _Snapshot, program: Program, __: PassResult) -> Iterator[str]:
    for _region, _mode, graph in program.graphs():
        old = before.nodes.get(graph, {})
        for node in graph.nodes:
            if node.op != "output" and node.name not in old and provenance(node) is None:
                yield f"node {node.name} has no provenance"


def _report_is_truthful(before: _Snapshot, after: _Snapshot, _: Program, result: PassResult) -> Iterator[str]:
    # Lists, because the order of nodes counts.
    changed = [(g, list(n.items())) for g, n in before.nodes.items()] != [
        (g, list(n.items())) for g, n in after.nodes.items()
    ]
    if changed and not result.modified:
        yield "the graph changed, but the result says that nothing was rewritten"


_CHECKS: Final[tuple[Callable[[_Snapshot, _Snapshot, Program, PassResult], Iterator[str]], ...]] = (
    _graphs_are_well_formed,
    _targets_exist,
    _interface_is_kept,
    _names_are_kept,
    _training_flags_are_kept,
    _masks_match,
    _masks_have_their_granularity,
    _masked_parameters_are_read_through_masks,
    _inserted_nodes_have_provenance,
    _report_is_truthful,
)
