"""The table of layers: weights, density and operations per prunable parameter."""

import dataclasses
from typing import Any

import torch
from torch import nn

from fedmef_fx.inspection.costs import Tensors, positions_by_parameter
from fedmef_fx.inspection.text_table import format_count, text_table
from fedmef_fx.model import Tier, is_transformed, masked_parameters, transformation_of
from fedmef_fx.program import Program

__all__ = ["LayerRow", "Table", "layer_table"]

_HEADINGS = ("parameter", "shape", "weights", "active", "density", "tier", "FLOPs dense", "FLOPs sparse", "reason")
_LEFT = frozenset({0, 1, 5, 8})


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
    """

    parameter: str
    shape: tuple[int, ...]
    weights: int
    active: int
    tier: Tier | None = None
    flops_dense: int | None = None
    flops_sparse: int | None = None
    reason: str = ""

    @property
    def density(self) -> float:
        """Active share, 0 to 1."""
        return self.active / self.weights if self.weights else 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """Rows of layers; `str()` prints them with a total.

    Attributes:
        rows: One per prunable parameter, in the model's order.
    """

    rows: tuple[LayerRow, ...]

    @property
    def total(self) -> LayerRow:
        """All rows together."""
        flops = [(row.flops_dense, row.flops_sparse) for row in self.rows]
        counted = [(dense, sparse) for dense, sparse in flops if dense is not None and sparse is not None]
        return LayerRow(
            "total",
            (),
            sum(row.weights for row in self.rows),
            sum(row.active for row in self.rows),
            flops_dense=sum(dense for dense, _ in counted) if counted else None,
            flops_sparse=sum(sparse for _, sparse in counted) if counted else None,
        )

    def as_dicts(self) -> list[dict[str, Any]]:
        """The rows as dictionaries of JSON values, without the total."""
        return [{**dataclasses.asdict(row), "shape": list(row.shape), "density": row.density} for row in self.rows]

    def cells(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Headings and rows as text, the total last; columns that say nothing about any row are left out."""
        rows = [_cells(row) for row in (*self.rows, self.total)]
        shown = [i for i in range(len(_HEADINGS)) if i < 5 or any(row[i] not in ("", "-") for row in rows)]
        return tuple(_HEADINGS[i] for i in shown), [tuple(row[i] for i in shown) for row in rows]

    def __str__(self) -> str:
        headings, rows = self.cells()
        left = frozenset(i for i, heading in enumerate(headings) if _HEADINGS.index(heading) in _LEFT)
        return text_table(headings, rows, left=left)


def _cells(row: LayerRow) -> tuple[str, ...]:
    flops = ["-" if count is None else format_count(count) for count in (row.flops_dense, row.flops_sparse)]
    shape = "x".join(map(str, row.shape))
    return (
        row.parameter,
        shape,
        str(row.weights),
        str(row.active),
        f"{row.density:.4f}",
        row.tier or "",
        *flops,
        row.reason,
    )


def layer_table(program: Program, tensors: Tensors) -> Table:
    """The table of a program.

    Args:
        program: A transformed model's program, or that of an ordinary model, whose weights of two or more dimensions
            then count as prunable.
        tensors: What example inputs showed; empty without.
    """
    model = program.model
    positions, counts, shapes = positions_by_parameter(program, tensors), _active(model), _packed_shapes(model)
    rows = []
    for name, tier, reason in _prunable(model):
        parameter = model.get_parameter(name)
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
            )
        )
    return Table(tuple(rows))


def _prunable(model: nn.Module) -> list[tuple[str, Tier | None, str]]:
    if is_transformed(model):
        return [(fact.name, fact.tier, fact.reason) for fact in transformation_of(model).prunable.values()]
    return [(name, None, "") for name, parameter in model.named_parameters() if parameter.dim() > 1]


def _active(model: nn.Module) -> dict[str, int]:
    if not is_transformed(model):
        return {}
    return {name: entry.active for name, entry in masked_parameters(model).items()}


def _packed_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Dense shapes of the weights that a model stores packed."""
    if not is_transformed(model):
        return {}
    return {name: entry.shape for name, entry in masked_parameters(model).items() if entry.is_packed}
