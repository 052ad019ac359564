"""`inspect`: look into a model, transformed or not."""

import copy
import dataclasses
import inspect as python_inspect
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fedmef_fx.capture import capture_graphs, capture_model, duplicate_of, leaf_regions
from fedmef_fx.config import Config
from fedmef_fx.display.notebook import escaped, fragment, preformatted
from fedmef_fx.errors import CaptureError, ConfigError
from fedmef_fx.graph.emit import program_of
from fedmef_fx.graph.program import Program, Region
from fedmef_fx.graph.recording import Observation, record_graphs
from fedmef_fx.graph.signature import Call
from fedmef_fx.graph.text import graph_text
from fedmef_fx.inspection.diff import text_diff
from fedmef_fx.inspection.document import document, to_json
from fedmef_fx.inspection.dot import to_dot
from fedmef_fx.inspection.networkx_graph import to_networkx
from fedmef_fx.inspection.plots import plot_sparsity
from fedmef_fx.inspection.shapes import observe
from fedmef_fx.inspection.table import Table, layer_table
from fedmef_fx.inspection.weights import WeightRecord, record_weights
from fedmef_fx.module_tree import uncompiled_model
from fedmef_fx.records.calls import CallRecord
from fedmef_fx.records.graphs import GraphRecord
from fedmef_fx.records.passes import PassReport, PassResult, Refusal
from fedmef_fx.sparse_model.transformation import Transformation, is_transformed

if TYPE_CHECKING:
    import networkx

    from fedmef_fx.federated.history import History
    from fedmef_fx.measure.report import MemoryReport

__all__ = ["Inspection", "inspect"]


@dataclasses.dataclass(frozen=True)
class Inspection:
    """A model as it was when it was inspected; changing the model later does not change it.

    `str()` gives the graphs as text, one line a node:

        %name = op[target](arguments)  # f32[8,16,3,3] density=0.20 saved=288 B dense [pass <- made from] @module

    Attributes:
        graphs: Every graph as records.
        layers: The rows that `table()` returns.
        passes: What the passes did and refused; empty for a model that is not transformed and was traced as a whole.
        notices: What could not be found out, and why.
        name: Class of the model.
        original: Graphs of the original, as they were captured; empty for a model that is not transformed.
        weights: Snapshots of the parameters in `layers`.
        calls: What flows between the modules that Python calls; None for a model of one graph and without example
            inputs.
        config: What the model was transformed with; None for a model that is not transformed.
    """

    graphs: tuple[GraphRecord, ...]
    layers: Table
    passes: PassReport
    notices: tuple[str, ...]
    _example: tuple[Sequence[Any] | None, Mapping[str, Any] | None] = dataclasses.field(repr=False, compare=False)
    name: str = "model"
    original: tuple[GraphRecord, ...] = dataclasses.field(default=(), repr=False)
    weights: tuple[WeightRecord, ...] = dataclasses.field(default=(), repr=False, compare=False)
    calls: CallRecord | None = dataclasses.field(default=None, repr=False)
    config: Config | None = dataclasses.field(default=None, repr=False)

    def __str__(self) -> str:
        return graph_text(self.graphs)

    def _repr_html_(self) -> str:
        notes = "; ".join(self.notices)
        lines = f"{sum(len(graph.nodes) for graph in self.graphs)} nodes in {len(self.graphs)} graphs"
        return fragment(
            *([escaped(notes)] if notes else []), self.layers._repr_html_(), preformatted(str(self), summary=lines)
        )

    def table(self, original: "nn.Module | Inspection | None" = None) -> Table:
        """Per prunable parameter: shape, weights, active, density, tier, operations, bytes kept for backward, reason.

        Operations and bytes are known with example inputs.

        Args:
            original: The model before, or its inspection: adds what its layers keep for backward.

        Raises:
            ConfigError: The original does not accept the example inputs.
        """
        return self.layers if original is None else self.layers.beside(self._inspected(original).layers)

    def diff(self, original: "nn.Module | Inspection", *, context: int = 3) -> str:
        """What changed from the original to this model, as a unified diff of their texts.

        Args:
            original: The model before, which is traced with the same example inputs, or its inspection.
            context: Unchanged lines shown around each change.

        Returns:
            The diff; empty when nothing changed.

        Raises:
            CaptureError: Nothing of the original can be traced.
            ConfigError: It does not accept the example inputs.
        """
        return text_diff(str(self._inspected(original)), str(self), context=context)

    def _inspected(self, original: "nn.Module | Inspection") -> "Inspection":
        """A model's inspection, with the example inputs of this one."""
        args, kwargs = self._example
        return original if isinstance(original, Inspection) else inspect(original, args, example_kwargs=kwargs)

    def to_networkx(self) -> "networkx.DiGraph[str]":
        """The graphs as one `networkx.DiGraph`, with edges from each node to those that read it.

        A node's key is its name; where there are several graphs, `"region, mode/name"`. Attributes of nodes, absent
        where they do not apply:

        - `op`, `target`, `module`, `text`: kind, what it reads or calls, module it belongs to, line of `str()`
        - `shape` (tuple of int), `dtype` (`"f32"`): of its value, if that is one tensor and known
        - `density` (float): of the masked parameter it reads
        - `saved` (tuple of (codec, bytes)), `saved_bytes` (int): what it keeps for backward and where it counts first
        - `made_by`, `origin`: the pass that made it, and from what
        - `order` (int), `region`, `mode`: place in its graph, and which graph that is

        Attributes of edges: `position` (int), the place among the node's inputs.
        """
        return to_networkx(self.graphs)

    def to_dot(self) -> str:
        """The graphs in Graphviz's DOT language; nodes that a pass made are filled with its colour."""
        return to_dot(self.graphs)

    def plot(self, path: str | Path, *, original: "nn.Module | Inspection | None" = None) -> None:
        """Draw the density of every layer and, with example inputs, what it keeps for backward.

        Args:
            path: The file to write; its suffix says the format: .png, .svg or .pdf.
            original: The model before, or its inspection, to compare with.

        Raises:
            ConfigError: matplotlib is not installed, another format, or a path that cannot be written.
        """
        plot_sparsity(self.table(original), path, call="Inspection.plot")

    @property
    def has_example(self) -> bool:
        """Whether the model was inspected with example inputs."""
        return any(given is not None for given in self._example)

    def to_json(self, original: "nn.Module | Inspection | None" = None) -> str:
        """Everything as JSON, the same text for the same model.

        The JSON Schema is `fedmef_fx.inspection.json_schema()`. An object with these fields, version 1 of the schema:

        - `schema`: `"fedmef-fx/inspection"`; `version`: 1
        - `graphs`: objects with `region`, `mode` and `nodes`; a node has the fields of `NodeRecord`, its `tensors` are
          objects with `shape` and `dtype`, its `saved` are objects with the fields of `SavedRecord`, or null
        - `parameters`: objects with the fields of `LayerRow`, and `density`; `rest_saved`, `rest_saved_before`: bytes
          that count for none
        - `passes`: objects with `name`, `rewrites` (names) and `refusals` (objects with `where` and `reason`)
        - `notices`: what could not be found out, and why

        Args:
            original: The model before, or its inspection: adds what its layers keep for backward.
        """
        return to_json(document(self.graphs, self.table(original), self.passes, self.notices))

    def to_html(
        self,
        path: str | PathLike[str],
        *,
        title: str | None = None,
        original: "nn.Module | Inspection | None" = None,
        memory: "MemoryReport | None" = None,
        memory_before: "MemoryReport | None" = None,
        history: "History | None" = None,
        command: str | None = None,
    ) -> None:
        """Write a page: the graph, the mask, weights and costs of every layer, and what passes did and refused.

        The page is one file that opens from disk in any browser of today and asks the network for nothing.

        Args:
            path: Of the file, e.g. `model.html`.
            title: Heading of the page. Default: the class of the model.
            original: The model before, or its inspection. Default: its graphs as they were captured, without shapes of
                activations.
            memory: Report of a training step of this model, with its timeline.
            memory_before: The same of the original.
            history: Of a federated training: accuracy, losses, traffic and mask churn over the rounds.
            command: The command line that writes the page, which shows it.

        Raises:
            CaptureError: The original cannot be traced.
            ConfigError: The file cannot be written, or the original does not accept the example inputs.
        """
        from fedmef_fx.inspection.page import MemoryPair, PageContent, write_page  # noqa: PLC0415 - only its users should wait

        original = None if original is None else self._inspected(original)
        write_page(
            path,
            PageContent(
                title=title or self.name,
                after=self.graphs,
                before=self.original if original is None else original.graphs,
                calls=self.calls,
                calls_before=self.calls if original is None else original.calls,
                layers=self.table(original),
                weights=self.weights,
                passes=self.passes,
                notices=self.notices,
                memory=MemoryPair.of(memory, memory_before),
                history=history,
                config=self.config,
                command=command,
            ),
        )


def inspect(
    model: nn.Module,
    example_inputs: Sequence[Any] | None = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Inspection:
    """Look into a model: its graphs with shapes, densities and the pass that made each node, and a table of layers.

    Args:
        model: A transformed model, or any model that can be traced; it never changes.
        example_inputs: Positional arguments of one call, as a tuple. With them a copy of the model runs once per graph,
            forward only, and shapes of activations, operations per layer, and what each node keeps for backward are
            known.
        example_kwargs: Keyword arguments of that call.

    Returns:
        The inspection.

    Raises:
        CaptureError: The model is not transformed and nothing of it can be traced.
        ConfigError: Not a module, or example inputs that the model does not accept.

    Example:
        >>> import torch, fedmef_fx
        >>> print(fedmef_fx.inspect(torch.nn.Sequential(torch.nn.Linear(8, 2)), (torch.ones(1, 8),)))
        %input_1 = placeholder[input]  # f32[1,8]
        %_0 = call_module[0](%input_1)  # f32[1,2]
        return %_0
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"inspect: got {type(model).__name__}; expected a torch.nn.Module")
    if isinstance(example_inputs, Tensor):
        raise ConfigError("inspect: example_inputs is a tensor; expected a tuple of arguments: inspect(model, (x,))")
    model = uncompiled_model(model)
    has_example = example_inputs is not None or example_kwargs is not None
    args, kwargs = tuple(example_inputs or ()), dict(example_kwargs or {})
    is_original = not is_transformed(model)
    program = _captured(model, args, kwargs, has_example=has_example) if is_original else program_of(model)
    observation = observe(program, args, kwargs, may_change=is_original) if has_example else Observation()
    layers = layer_table(program, observation)
    return Inspection(
        record_graphs(program, observation),
        layers,
        program.transformation.reports,
        tuple(observation.notices),
        (example_inputs, example_kwargs),
        name=type(model).__name__.removeprefix("Transformed") if is_transformed(model) else type(model).__name__,
        original=program.transformation.original,
        weights=record_weights(program.model, (row.parameter for row in layers.rows)),
        calls=observation.calls,
        config=None if is_original else program.transformation.config,
    )


def _captured(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, has_example: bool) -> Program:
    """A model that is not transformed: its graph, or those of its largest parts that can be traced."""
    signature = python_inspect.signature(model.forward)
    try:
        arguments = signature.bind_partial(*args, **kwargs).arguments
    except TypeError as error:
        raise ConfigError(
            f"inspect: the example inputs do not fit {type(model).__name__}.forward{signature}: {error}"
        ) from error
    duplicate = copy.deepcopy(model)  # tracing may leave constants behind
    try:
        return Program(duplicate, [Region("", duplicate, capture_graphs(duplicate, given=arguments))], _facts(()))
    except CaptureError as error:
        duplicate = duplicate_of(model)
        captured = capture_model(duplicate, Call.of(duplicate, args, kwargs) if has_example else None)
        program = Program(duplicate, captured.regions, _facts(captured.failures))
        if not program.is_one_graph:
            program.regions += leaf_regions(duplicate, program.regions, fallbacks=False)
        if not program.regions:
            raise error
        return program


def _facts(failures: Sequence[Refusal]) -> Transformation:
    transformation = Transformation(Config())
    if failures:
        transformation.reports = PassReport((PassResult("capture", refusals=tuple(failures)),))
    return transformation
