"""Ranges of activations that leave out what is rare, from histograms of their values on calibration data.

percentile: all values but one in ten thousand lie within the range.

entropy: of all ranges [-T, T], the one in which 8 bits tell most of the distribution: P holds the counts of the bins
below T, the last one what lies beyond, Q the same counts after they are spread evenly within each of the 8-bit levels,
and T has the least divergence sum P log(P / Q). (S. Migacz, 8-bit inference with TensorRT, 2017.)
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, ValueInfoProto

from fedmef_fx.export.examples import ExampleCall
from fedmef_fx.export.onnx.sessions import Array, array_of, open_session

__all__ = ["activation_ranges", "entropy_range", "percentile_range"]

Counts = NDArray[Any]  # [bins]
_BINS: Final = 2048
_STEP: Final = 16  # bins between two thresholds that are tried
_LEFT_OUT: Final = 1e-4


def activation_ranges(graph: ModelProto, calls: Sequence[ExampleCall], method: str) -> dict[str, tuple[float, float]]:
    """The range of each float value of a graph that nodes compute or that is an input.

    Args:
        graph: In float32.
        calls: Calibration data; batches may differ in size.
        method: "percentile" or "entropy".
    """
    ends: dict[str, tuple[float, float]] = {}
    for values in _values(graph, calls):
        for name, array in values.items():
            low, high = ends.get(name, (np.inf, -np.inf))
            ends[name] = min(low, float(array.min())), max(high, float(array.max()))
    counts = {name: np.zeros(_BINS, np.int64) for name, (low, high) in ends.items() if low < high}
    is_entropy = method == "entropy"
    for values in _values(graph, calls):
        for name in counts.keys() & values.keys():
            low, high = ends[name]
            array = np.abs(values[name]) if is_entropy else values[name]
            between = (0.0, max(-low, high)) if is_entropy else (low, high)
            counts[name] += np.histogram(array, bins=_BINS, range=between)[0]
    choose = entropy_range if is_entropy else percentile_range
    return {name: choose(counts[name], *ends[name]) if name in counts else ends[name] for name in ends}


def _values(graph: ModelProto, calls: Sequence[ExampleCall]) -> Iterator[dict[str, Array]]:
    """For each call the float values that are not empty."""
    shown = copy.deepcopy(graph)
    outputs = {value.name for value in shown.graph.output}
    names = [name for node in shown.graph.node for name in node.output if name and name not in outputs]
    shown.graph.output.extend(ValueInfoProto(name=name) for name in names)
    session = open_session(shown.SerializeToString())
    for call in calls:
        inputs = zip(session.inputs, map(array_of, call.tensors()), strict=True)
        found = {**dict(inputs), **dict(zip(session.outputs, session.run(call), strict=True))}
        yield {name: array for name, array in found.items() if array.dtype == np.float32 and array.size}


def percentile_range(counts: Counts, low: float, high: float, *, left_out: float = _LEFT_OUT) -> tuple[float, float]:
    """The range of values without the rarest at both ends.

    Args:
        counts: Of values in bins of equal width between low and high.
        low: The least value.
        high: The largest.
        left_out: Share of values that may lie outside.
    """
    edges = np.linspace(low, high, counts.size + 1)
    below = np.cumsum(counts) / max(int(counts.sum()), 1)
    first = int(np.searchsorted(below, left_out / 2, side="right"))
    last = int(np.searchsorted(below, 1 - left_out / 2))
    return float(edges[first]), float(edges[min(last + 1, counts.size)])


def entropy_range(counts: Counts, low: float, high: float) -> tuple[float, float]:
    """The range in which 8 bits tell most of the distribution of magnitudes.

    Args:
        counts: Of magnitudes in bins of equal width between 0 and the largest.
        low: The least value.
        high: The largest.
    """
    levels = 128 if low < 0 else 256  # of magnitudes: half of them are for the other sign
    width = max(-low, high) / counts.size
    divergences = {end: _divergence(counts, end, levels) for end in range(levels, counts.size + 1, _STEP)}
    threshold = width * min(divergences, key=lambda end: divergences[end])
    return max(low, -threshold), min(high, threshold)


def _divergence(counts: Counts, end: int, levels: int) -> float:
    """Of the counts below a bin, clipped there, from the same counts on so many levels."""
    clipped = counts[:end].astype(np.float64)
    clipped[-1] += counts[end:].sum()
    starts = np.arange(levels) * end // levels
    lengths = np.diff([*starts, end])
    filled = np.add.reduceat((counts[:end] > 0).astype(np.float64), starts)
    means = np.add.reduceat(counts[:end].astype(np.float64), starts) / np.maximum(filled, 1)
    spread = np.repeat(means, lengths) * (counts[:end] > 0)
    if not spread.sum():
        return float("inf")
    p, q = clipped / clipped.sum(), spread / spread.sum()
    seen = p > 0
    return float(np.sum(p[seen] * np.log(p[seen] / np.maximum(q[seen], 1e-12))))
