"""The table of layers: weights, density, operations and what is kept for backward, per prunable parameter."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import nn

from fedmef_fx.display.notebook import html_table
from fedmef_fx.display.text_table import format_count, text_table
from fedmef_fx.graph.program import Program
from fedmef_fx.graph.recording import Observation
from fedmef_fx.inspection.costs import positions_by_parameter
from fedmef_fx.inspection.saved_by_layer import saved_by_layer
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.sparse_model.transformation import Tier, is_transformed, transformation_of

__all__ = ["LayerRow", "Table", "layer_table"]

_HEADINGS: Final = (
    "parameter",
    "shape",
    "weights",
    "active",
    "density",
    "tier",
    "FLOPs dense",
    "FLOPs sparse",
    "saved before",
    "saved",
    "reason",
)
_WORDS: Final = frozenset({"parameter", "shape", "tier", "reason"})


@dataclasses.dataclass(frozen=True, slots=True)
class LayerRow:
    """One prunable parameter.

    Attributes:
        parameter: Its name in the original model.
        shape: Its sizes.
        weights: Number of weights, pruned ones included.
        active: Number of active weights.
        tier: Where it is rewritten; None where it is left dense or the model is not transformed.
        flops_dense: Operations of one call with the example inputs if no weight were pruned, two per multiply-add;
            None without example inputs, or where nothing known multiplies with it.
        flops_sparse: The same with active weights only.
        reason: Why the tier is not a higher one or the parameter is left dense; empty otherwise.
        saved: Bytes that the layer keeps for backward with the example inputs, see `saved_by_layer`; None where that
            was not measured.
        saved_before: The same in the original model; None where there was none to compare with.
    """

    parameter: str
    shape: tuple[int, ...]
    weights: int
    active: int
    tier: Tier | None = None
    flops_dense: int | None = None
    flops_sparse: int | None = None
    reason: str = ""
    saved: int | None = None
    saved_before: int | None = None

    @property
    def density(self) -> float:
        """Active share, 0 to 1."""
        return self.active / self.weights if self.weights else 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """Rows of layers; `str()` prints them with a total.

    Attributes:
        rows: One per prunable parameter, in the model's order.
        rest_saved: Bytes kept for backward by everything but layers: activation functions, normalisation, pooling.
        rest_saved_before: The same in the original model, and what its layers keep that have no row here.
    """

    rows: tuple[LayerRow, ...]
    rest_saved: int | None = None
    rest_saved_before: int | None = None

    @property
    def rest(self) -> LayerRow:
        """What is no layer: it has no prunable weights."""
        return LayerRow("(rest)", (), 0, 0, saved=self.rest_saved, saved_before=self.rest_saved_before)

    @property
    def total(self) -> LayerRow:
        """All rows and the rest together."""
        every = (*self.rows, self.rest)
        return LayerRow(
            "total",
            (),
            sum(row.weights for row in self.rows),
            sum(row.active for row in self.rows),
            flops_dense=_sum(row.flops_dense for row in self.rows),
            flops_sparse=_sum(row.flops_sparse for row in self.rows),
            saved=_sum(row.saved for row in every),
            saved_before=_sum(row.saved_before for row in every),
        )

    def beside(self, original: "Table") -> "Table":
        """This table with what the original model keeps for backward, by parameter name."""
        before = {row.parameter: row.saved for row in original.rows}
        rows = tuple(dataclasses.replace(row, saved_before=before.pop(row.parameter, None)) for row in self.rows)
        rest = _sum((original.rest_saved, *before.values()))
        return Table(rows, self.rest_saved, rest)

    def as_dicts(self) -> list[dict[str, Any]]:
        """The rows as dictionaries of JSON values, without the rest and the total."""
        return [{**dataclasses.asdict(row), "shape": list(row.shape), "density": row.density} for row in self.rows]

    def cells(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Headings and rows as text, the total last; columns that say nothing about any row are left out."""
        shown = [*self.rows, *([self.rest] if self.rest_saved or self.rest_saved_before else []), self.total]
        rows = [_cells(row) for row in shown]
        columns = [i for i in range(len(_HEADINGS)) if i < 5 or any(row[i] not in ("", "-") for row in rows)]
        return tuple(_HEADINGS[i] for i in columns), [tuple(row[i] for i in columns) for row in rows]

    def words(self) -> frozenset[int]:
        """Columns of `cells` that hold words; the others are numbers."""
        return frozenset(index for index, heading in enumerate(self.cells()[0]) if heading in _WORDS)

    def __str__(self) -> str:
        headings, rows = self.cells()
        return text_table(headings, rows, left=self.words())

    def _repr_html_(self) -> str:
        headings, rows = self.cells()
        return html_table(headings, rows, left=self.words())


def _sum(counts: Iterable[int | None]) -> int | None:
    """The sum of what is known; None where nothing is."""
    counted = [count for count in counts if count is not None]
    return sum(counted) if counted else None


def _cells(row: LayerRow) -> tuple[str, ...]:
    flops = ["-" if count is None else format_count(count) for count in (row.flops_dense, row.flops_sparse)]
    saved = ["-" if count is None else str(count) for count in (row.saved_before, row.saved)]
    return (
        row.parameter,
        "x".join(map(str, row.shape)),
        str(row.weights),
        str(row.active),
        f"{row.density:.4f}" if row.weights else "-",
        row.tier or "",
        *flops,
        *saved,
        row.reason,
    )


def layer_table(program: Program, observation: Observation) -> Table:
    """The table of a program.

    Args:
        program: A transformed model's program, or that of an ordinary model, whose weights of two or more dimensions
            then count as prunable.
        observation: What example inputs showed; empty without.
    """
    model = program.model
    positions, counts = positions_by_parameter(program, observation.tensors), _active(model)
    shapes = _packed_shapes(model)
    prunables = [(model.get_parameter(name), name, tier, reason) for name, tier, reason in _prunable(model)]
    saved = saved_by_layer(program, observation, {id(parameter) for parameter, *_ in prunables})
    rows = []
    for parameter, name, tier, reason in prunables:
        shape = shapes.get(name, parameter.shape)
        active = counts.get(name, shape.numel())
        uses = positions.get(id(parameter))
        rows.append(
            LayerRow(
                name,
                tuple(shape),
                shape.numel(),
                active,
                tier,
                None if uses is None else round(2 * uses * shape.numel()),
                None if uses is None else round(2 * uses * active),
                reason,
                None if saved is None else saved.of.get(id(parameter), 0),
            )
        )
    return Table(tuple(rows), None if saved is None else saved.rest)


def _prunable(model: nn.Module) -> list[tuple[str, Tier | None, str]]:
    if is_transformed(model):
        return [
            (prunable.name, prunable.tier, prunable.reason) for prunable in transformation_of(model).prunable.values()
        ]
    return [(name, None, "") for name, parameter in model.named_parameters() if parameter.dim() > 1]


def _active(model: nn.Module) -> dict[str, int]:
    if not is_transformed(model):
        return {}
    return {name: parameter.active for name, parameter in masked_parameters(model).items()}


def _packed_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Dense shapes of the weights that a model stores packed."""
    if not is_transformed(model):
        return {}
    return {name: parameter.shape for name, parameter in masked_parameters(model).items() if parameter.is_packed}
