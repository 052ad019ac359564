"""Two states of one model side by side: which weights have a place in both, grown, pruned, and how far they moved.

Per parameter, with A and B the sets of active positions before and after:

    overlap (Jaccard) = |A & B| / |A | B|,    grown = |B - A|,    pruned = |A - B|
    distance = ||after - before||_2 over all positions, pruned weights being 0
"""

import dataclasses
import json
import math
from os import PathLike
from typing import Any, Final

import torch
from torch import Tensor, nn

from fedmef_fx.display.notebook import fragment, html_table
from fedmef_fx.display.printable import visible
from fedmef_fx.display.text_table import text_table
from fedmef_fx.errors import ConfigError
from fedmef_fx.files.checkpoint_file import StoredTensor
from fedmef_fx.inspection.comparison_sources import Source, stored_tensors
from fedmef_fx.inspection.page.data import PageContent
from fedmef_fx.inspection.page.page import write_page

__all__ = ["Comparison", "ParameterChange", "compare"]

SCHEMA: Final = "fedmef-fx/comparison"
SCHEMA_VERSION: Final = 1

_HEADINGS: Final = (
    "parameter",
    "weights",
    "active before",
    "after",
    "in both",
    "grown",
    "pruned",
    "overlap",
    "distance",
    "relative",
)


@dataclasses.dataclass(frozen=True, slots=True)
class ParameterChange:
    """One parameter or buffer before and after.

    Attributes:
        parameter: Its name.
        shape: Its sizes.
        is_masked: Whether it has a mask on either side.
        active_before: Number of active weights before; all of them where there is no mask.
        active_after: The same after.
        kept: Active weights in both.
        distance: L2 norm of the change, pruned weights being 0; NaN and infinities in a state make it NaN.
        norm_before: L2 norm before.
    """

    parameter: str
    shape: tuple[int, ...]
    is_masked: bool
    active_before: int
    active_after: int
    kept: int
    distance: float
    norm_before: float

    @property
    def weights(self) -> int:
        """Number of weights, pruned ones included."""
        return math.prod(self.shape)

    @property
    def grown(self) -> int:
        """Weights that are active only after."""
        return self.active_after - self.kept

    @property
    def pruned(self) -> int:
        """Weights that are active only before."""
        return self.active_before - self.kept

    @property
    def overlap(self) -> float:
        """Jaccard index of the two masks, 0 to 1; 1 where neither has an active weight."""
        union = self.active_before + self.active_after - self.kept
        return self.kept / union if union else 1.0

    @property
    def relative_distance(self) -> float | None:
        """Distance as a share of the norm before; None where that is 0 and the distance is not."""
        if self.norm_before == 0:
            return 0.0 if self.distance == 0 else None
        return self.distance / self.norm_before

    def as_dict(self) -> dict[str, Any]:
        """The row as JSON values; numbers that are not finite become None."""
        values = {**dataclasses.asdict(self), "shape": list(self.shape), "weights": self.weights}
        values |= {"grown": self.grown, "pruned": self.pruned, "overlap": self.overlap}
        values["relative_distance"] = self.relative_distance
        return {key: _finite(value) for key, value in values.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """What changed from one state of a model to another; `str()` prints it as a table.

    Attributes:
        before: Name of the first state.
        after: Name of the second.
        rows: One per parameter and floating point buffer that both have, in the order of the first.
        only_before: Names of what only the first has.
        only_after: Names of what only the second has.
    """

    before: str
    after: str
    rows: tuple[ParameterChange, ...]
    only_before: tuple[str, ...] = ()
    only_after: tuple[str, ...] = ()

    @property
    def masked_rows(self) -> tuple[ParameterChange, ...]:
        """The rows of parameters with masks."""
        return tuple(row for row in self.rows if row.is_masked)

    @property
    def total(self) -> ParameterChange:
        """All masked parameters together; everything where nothing has a mask."""
        rows = self.masked_rows or self.rows
        return ParameterChange(
            "total",
            (sum(row.weights for row in rows),),
            any(row.is_masked for row in rows),
            sum(row.active_before for row in rows),
            sum(row.active_after for row in rows),
            sum(row.kept for row in rows),
            math.hypot(*(row.distance for row in rows)),
            math.hypot(*(row.norm_before for row in rows)),
        )

    def as_dict(self) -> dict[str, Any]:
        """The comparison as JSON values."""
        return {
            "schema": SCHEMA,
            "version": SCHEMA_VERSION,
            "before": self.before,
            "after": self.after,
            "parameters": [row.as_dict() for row in self.rows],
            "total": self.total.as_dict(),
            "only_before": list(self.only_before),
            "only_after": list(self.only_after),
        }

    def to_json(self) -> str:
        """The comparison as JSON text in ASCII; `<` is written as an escape, so that it can stand inside HTML."""
        return json.dumps(self.as_dict(), indent=2, allow_nan=False).replace("<", "\\u003c")

    def to_html(self, path: str | PathLike[str], *, title: str = "Comparison", command: str | None = None) -> None:
        """Write the comparison as a page, one file that opens from disk in any browser.

        Args:
            path: Of the file, e.g. `rounds.html`.
            title: Heading of the page.
            command: The command line that writes the page, which shows it.

        Raises:
            ConfigError: The file cannot be written.
        """
        write_page(path, PageContent(title=title, comparison=self.as_dict(), command=command))

    def cells(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Headings and rows as text: parameters with masks, the others that moved, and the total."""
        shown = [row for row in self.rows if row.is_masked or row.distance != 0]
        return _HEADINGS, [_cells(row) for row in (*shown, self.total)]

    def __str__(self) -> str:
        headings, rows = self.cells()
        return "\n".join([*map(visible, self.notes()), text_table(headings, rows, left=frozenset({0}))])

    def _repr_html_(self) -> str:
        headings, rows = self.cells()
        return fragment(html_table(headings, rows, left={0}, caption="; ".join(self.notes())))

    def notes(self) -> list[str]:
        """What is compared, and what only one side has."""
        notes = [f"from {self.before} to {self.after}"]
        for names, where in ((self.only_before, self.before), (self.only_after, self.after)):
            notes += [f"only in {where}: {', '.join(names)}"] if names else []
        return notes


def compare(before: Source, after: Source) -> Comparison:
    """Compare two states of one model.

    Args:
        before: A model; a file that `fedmef_fx.save` wrote; or a checkpoint of a federated run (a file of
            `keep_rounds`, or the directory, which stands for the newest round).
        after: Another one, of the same architecture.

    Returns:
        What changed, per parameter.

    Raises:
        ConfigError: Nothing in common, or another shape under the same name.
        CheckpointError: A file that is missing, damaged or something else.

    Example:
        >>> import fedmef_fx
        >>> sparse = fedmef_fx.transform(nn.Sequential(nn.Linear(8, 4)), fedmef_fx.Config(density=0.5))
        >>> compare(sparse, sparse).total.overlap
        1.0
    """
    left, right = stored_tensors(before), stored_tensors(after)
    names = (_label(before, "before"), _label(after, "after"))
    common = [name for name in left if name in right]
    if not common:
        raise ConfigError(f"compare: {names[0]} and {names[1]} have no parameter in common; expected one architecture")
    return Comparison(
        *names,
        tuple(_change(name, left[name], right[name]) for name in common),
        tuple(name for name in left if name not in right),
        tuple(name for name in right if name not in left),
    )


def _label(source: Source, default: str) -> str:
    return default if isinstance(source, nn.Module) else str(source)


def _change(name: str, before: StoredTensor, after: StoredTensor) -> ParameterChange:
    if before.shape != after.shape:
        raise ConfigError(
            f"compare: {name} is {list(before.shape)} before and {list(after.shape)} after; expected two states of one "
            "architecture"
        )
    old, new = _dense(before), _dense(after)
    return ParameterChange(
        name,
        tuple(before.shape),
        before.mask is not None or after.mask is not None,
        before.values.numel(),
        after.values.numel(),
        _kept(before, after),
        float(torch.linalg.vector_norm(new - old, dtype=torch.float64)),
        float(torch.linalg.vector_norm(old, dtype=torch.float64)),
    )


def _kept(before: StoredTensor, after: StoredTensor) -> int:
    if before.mask is None or after.mask is None:
        return (after if before.mask is None else before).values.numel()
    return int((before.mask & after.mask).count_nonzero())


def _dense(stored: StoredTensor) -> Tensor:
    """The values as `f32[weights]`, `f64` where they are that, zero where there is no active weight."""
    values = stored.values if stored.values.dtype == torch.float64 else stored.values.float()
    if stored.mask is None:
        return values
    return values.new_zeros(stored.mask.numel()).masked_scatter_(stored.mask.reshape(-1), values)


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cells(row: ParameterChange) -> tuple[str, ...]:
    relative = row.relative_distance
    counts = (row.weights, row.active_before, row.active_after, row.kept, row.grown, row.pruned)
    return (
        row.parameter,
        *map(str, counts),
        f"{row.overlap:.4f}",
        f"{row.distance:.4g}",
        "-" if relative is None else f"{relative:.4f}",
    )
