"""How long an ONNX file takes to load and to run."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from fedmef_fx.commands.command import progress_bar
from fedmef_fx.commands.tables import show_table
from fedmef_fx.errors import ConfigError, ExportError

__all__ = ["bench_onnx", "show_onnx"]

_PERCENTILES: Final = (50, 90, 99)
_ERRORS_ONLY: Final = 3
_TYPES: Final = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(bool)": np.bool_,
}


def bench_onnx(
    files: Sequence[Path],
    *,
    sizes: Mapping[str, int],
    shape: Sequence[int] | None,
    threads: int,
    warmup: int,
    runs: int,
) -> dict[str, Any]:
    """Time files in onnxruntime, in turns, on the same random inputs.

    Args:
        files: ONNX files with the same inputs.
        sizes: Of symbolic dimensions, by name; "batch" has to be among them.
        shape: Of the first input; None for what the file says.
        threads: Of onnxruntime within an operator.
        warmup: Runs of each that do not count.
        runs: Runs of each that do.

    Returns:
        Per file its size, seconds to load it, and milliseconds per run: least, mean, percentiles.

    Raises:
        ExportError: onnxruntime cannot load or run a file.
        ConfigError: An input of a type or size that is not known.
    """
    import onnxruntime  # noqa: PLC0415 -- only its users should wait for it

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, _ERRORS_ONLY
    sessions, rows = [], []
    for file in files:
        start = time.perf_counter()
        try:
            sessions.append(onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"]))
        except Exception as error:  # its exceptions have no other common base
            raise ExportError(f"bench: {file}: onnxruntime cannot load it: {error}") from error
        rows.append({"path": str(file), "bytes": file.stat().st_size, "session_seconds": time.perf_counter() - start})
    feed = _feed(sessions[0], sizes, shape)
    seconds: list[list[float]] = [[] for _ in files]
    with progress_bar("timing", steps=warmup + runs) as bar:
        for turn in range(warmup + runs):
            for index, session in enumerate(sessions):
                start = time.perf_counter()
                try:
                    session.run(None, feed)
                except Exception as error:  # as above
                    raise ExportError(f"bench: {files[index]}: onnxruntime cannot run it: {error}") from error
                if turn >= warmup:
                    seconds[index].append(time.perf_counter() - start)
            bar.reach(turn + 1)
    for row, times in zip(rows, seconds, strict=True):
        row["milliseconds"] = _spread(np.array(times) * 1e3)
    inputs = {name: list(array.shape) for name, array in feed.items()}
    return {
        "onnxruntime": onnxruntime.__version__,
        "threads": threads,
        "warmup": warmup,
        "runs": runs,
        "inputs": inputs,
        "files": rows,
    }


def _spread(times: NDArray[np.float64]) -> dict[str, float]:
    quantiles = {f"p{p}": float(np.percentile(times, p)) for p in _PERCENTILES}
    return {"min": float(times.min()), "mean": float(times.mean()), **quantiles, "max": float(times.max())}


def _feed(session: Any, sizes: Mapping[str, int], shape: Sequence[int] | None) -> dict[str, NDArray[Any]]:
    """Random inputs, always the same."""
    generator = np.random.default_rng(0)
    feed: dict[str, NDArray[Any]] = {}
    for index, value in enumerate(session.get_inputs()):
        if value.type not in _TYPES:
            raise ConfigError(f"bench: input {value.name!r} is a {value.type}; expected one of {', '.join(_TYPES)}")
        dims = list(shape) if shape is not None and index == 0 else [_size(d, value.name, sizes) for d in value.shape]
        kind = _TYPES[value.type]
        is_float = np.issubdtype(kind, np.floating)
        # Small integers are valid tokens of most vocabularies.
        feed[value.name] = (generator.standard_normal(dims) if is_float else generator.integers(0, 2, dims)).astype(
            kind
        )
    return feed


def _size(dim: object, name: str, sizes: Mapping[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    if str(dim) in sizes:
        return sizes[str(dim)]
    raise ConfigError(f"bench: input {name!r} has a size {dim!r}; expected its value, e.g. --size {dim}=16")


def show_onnx(console: Console, data: Mapping[str, Any]) -> None:
    """Print what `bench_onnx` found out."""
    keys = ("min", *(f"p{p}" for p in _PERCENTILES))
    rows = [
        (
            row["path"],
            f"{row['bytes']:,}",
            f"{row['session_seconds'] * 1e3:.0f} ms",
            *(f"{row['milliseconds'][key]:.2f} ms" for key in keys),
        )
        for row in data["files"]
    ]
    shapes = ", ".join(f"{name} {'x'.join(map(str, dims))}" for name, dims in data["inputs"].items())
    title = f"onnxruntime {data['onnxruntime']}, {data['threads']} threads, {data['runs']} runs, {shapes}"
    numbers = frozenset(range(1, 7))
    show_table(console, ("file", "bytes", "load", *keys), rows, title=title, numbers=numbers)
