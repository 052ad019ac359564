"""Models that were not looked at while the exporter was written: does each give a packed file that computes the same?

    python benchmarks/exported_models.py [--models REGEX] [--log build/exported_models.jsonl] [--again] [--docs PAGE]

Needs timm, transformers and torchvision, as far as models of these are asked for; what is not installed is left out.
Each model is first exported as it is by torch.onnx.export, with a batch that varies (the measure of what can be
exported at all), then transformed at density 0.3, trained for two steps and exported by `export_onnx` with packed
weights. The file is run by onnxruntime with another batch size than the example's, and its outputs are held against
torch's: the largest difference relative to the largest magnitude of an output. Beside it stands the same for the
original and the file of torch.onnx.export, and the processor time of both exports: that of `export_onnx` freezes,
encodes and compares in onnxruntime, too. Results are kept in the log; another call goes on where this one stopped.
"""

import argparse
import contextlib
import copy
import json
import logging
import multiprocessing
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
import torch
from _docs import fill
from _held_out import HeldOut, held_out, load_libraries
from _machine import machine
from torch import Tensor, nn

import fedmef_fx

ALLOWED: Final = 1e-5
_EXAMPLE_BATCH, _OTHER_BATCH = 2, 3
_DENSITY: Final = 0.3
_CACHES: Final = ("past_key_values",)


def tensors(result: Any) -> list[Tensor]:
    """The tensors of a model's result in their order, without caches of keys and values."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, Mapping):
        return [t for name, value in result.items() if name not in _CACHES for t in tensors(value)]
    if isinstance(result, list | tuple):
        return [t for value in result for t in tensors(value)]
    return []


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    """Train one step on the mean square of all outputs."""
    optimizer.zero_grad()
    outputs = [t for t in tensors(model(*inputs[0], **inputs[1])) if t.requires_grad]
    torch.stack([t.float().square().mean() for t in outputs]).sum().backward()
    optimizer.step()


def difference(path: Path, model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> float:
    """Largest difference of a file from a model, relative to the largest magnitude of each output."""
    with torch.no_grad():
        expected = [t.numpy() for t in tensors(model(*inputs[0], **inputs[1]))]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = [t.numpy() for t in (*inputs[0], *inputs[1].values())]
    feeds = {info.name: value for info, value in zip(session.get_inputs(), given, strict=True)}
    got = session.run(None, feeds)[: len(expected)]  # torch's own export has caches at the end
    worst = 0.0
    for left, right in zip(expected, got, strict=True):
        if left.shape != right.shape:
            raise ValueError(f"shape {list(right.shape)} in place of {list(left.shape)}")
        scale = float(np.abs(left).max(initial=0.0)) or 1.0
        worst = max(worst, float(np.abs(left.astype(np.float64) - right).max(initial=0.0)) / scale)
    return worst


def export_plainly(
    entry: HeldOut, model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]], path: Path
) -> None:
    """What torch alone makes of the original."""
    dynamic = {name: {0: torch.export.Dim.DYNAMIC} for name in inputs[1]}
    shapes: Any = dynamic or tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs[0])
    torch.onnx.export(
        model, inputs[0], path, kwargs=inputs[1], dynamic_shapes=shapes, dynamo=True, external_data=False, verbose=False
    )


def examine(entry: HeldOut, folder: Path) -> Iterator[tuple[str, Any]]:
    """The fields of a model's row, one by one, so that what a failure leaves is known."""
    torch.manual_seed(0)
    original = entry.build().eval()
    with torch.no_grad():
        for parameter in original.parameters():
            if parameter.dim() > 1 and not parameter.any():  # some heads start at 0, and would agree on nothing else
                parameter.normal_(std=0.02)
    example, other = entry.inputs(_EXAMPLE_BATCH), entry.inputs(_OTHER_BATCH)
    path = folder / "plain.onnx"
    start = time.process_time()
    try:
        export_plainly(entry, original, example, path)
        yield "plain_seconds", time.process_time() - start
        yield "plain_difference", difference(path, original, other)
    except Exception as error:  # what torch does with it is the yardstick
        yield "plain_reason", _told(error)
    sparse = fedmef_fx.transform(
        original, fedmef_fx.Config(density=_DENSITY), example_inputs=example[0], example_kwargs=example[1]
    ).train()
    optimizer = torch.optim.SGD(sparse.parameters(), lr=1e-3)
    for _ in range(2):
        step(sparse, optimizer, entry.inputs(_EXAMPLE_BATCH))
    sparse.eval()
    path = folder / "packed.onnx"
    start = time.process_time()
    report = fedmef_fx.export_onnx(sparse, path, example_inputs=example[0], example_kwargs=example[1], weights="packed")
    yield "seconds", time.process_time() - start
    yield "stages", dict(report.seconds)
    yield "ratio", report.dense_bytes / report.bytes
    yield "notices", list(report.notices)
    yield "difference", difference(path, sparse, other)
    with contextlib.suppress(Exception):  # such as float32 constants in the model's code
        yield "rounding", rounding(fedmef_fx.freeze(sparse), other)


def rounding(model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> float:
    """Largest difference of torch in float32 from torch in float64, relative to the largest magnitude of an output."""

    def widened(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    with torch.no_grad():
        narrow = tensors(model(*inputs[0], **inputs[1]))
        exact = tensors(
            copy.deepcopy(model).double()(
                *map(widened, inputs[0]), **{name: widened(value) for name, value in inputs[1].items()}
            )
        )
    return max(float((n - e).abs().max() / e.abs().max()) for n, e in zip(narrow, exact, strict=True) if e.abs().max())


def _told(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)}"[:400]


def _in_process(entry: HeldOut, connection: Connection) -> None:
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        try:
            for field in examine(entry, Path(folder)):
                connection.send(field)
        except Exception as error:  # one model that fails is not the end of the others
            connection.send(("reason", _told(error)))
    connection.send(("is_whole", True))


def row_of(entry: HeldOut, limit: float) -> dict[str, Any]:
    """Examine a model in a process of its own, which a time limit or a crash may end."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_in_process, args=(entry, sender))
    row: dict[str, Any] = {"model": entry.name}
    end = time.monotonic() + limit
    process.start()
    sender.close()
    with contextlib.suppress(EOFError):
        while "is_whole" not in row and receiver.poll(max(0.0, end - time.monotonic())):
            name, value = receiver.recv()
            row[name] = value
    if not row.pop("is_whole", False):
        row["reason"] = "the process died" if time.monotonic() < end else f"longer than {limit:.0f} s"
        process.kill()
    process.join()
    return row


def verdict(row: Mapping[str, Any]) -> str:
    """One word, and a reason where there is one."""
    if "difference" in row:
        fixed = [notice for notice in row["notices"] if notice.startswith("fixed")]
        told = "right" if row["difference"] <= ALLOWED else "**above 1e-5**"
        if row["difference"] > ALLOWED and "rounding" in row:
            told += f"; torch in float32 is {row['rounding']:.1e} from float64"
        return told + (f"; {fixed[0]}" if fixed else "")
    if "plain_reason" in row:
        return f"nor by torch alone: {row['reason']}"
    return f"**fails**: {row['reason']}"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: what counts first, then a row for each model."""
    able = [row for row in rows if "plain_difference" in row]
    right = [row for row in able if row.get("difference", 1.0) <= ALLOWED]
    ratios = sorted(row["seconds"] / row["plain_seconds"] for row in able if "seconds" in row)
    lines = [
        f"Of {len(rows)} models torch.onnx.export exports {len(able)}; of these {len(right)} give a packed file that "
        f"agrees within {ALLOWED:g} at another batch size."
    ]
    if ratios:
        lines.append(
            f"Processor time of `export_onnx` over that of torch.onnx.export: median {statistics.median(ratios):.2f}, "
            f"from {ratios[0]:.2f} to {ratios[-1]:.2f}."
        )
    lines += ["", "| model | smaller than dense | difference | of torch.onnx.export | time over it | |"]
    lines.append("|---|---:|---:|---:|---:|---|")
    for row in rows:
        cells = [
            row["model"],
            f"{row['ratio']:.1f}" if "ratio" in row else "",
            f"{row['difference']:.1e}" if "difference" in row else "",
            f"{row['plain_difference']:.1e}" if "plain_difference" in row else "fails",
            f"{row['seconds'] / row['plain_seconds']:.2f}" if "seconds" in row and "plain_seconds" in row else "",
            verdict(row)[:240].replace("|", "/"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _warm_up(folder: Path) -> None:
    """Load what the first export loads, once for all processes."""
    x = torch.randn(2, 4)
    model = nn.Sequential(nn.Linear(4, 4))
    torch.onnx.export(model, (x,), folder / "plain.onnx", dynamo=True, verbose=False)
    fedmef_fx.export_onnx(model, folder / "packed.onnx", example_inputs=(x,), weights="packed")


def main() -> None:
    """Examine the models that are not in the log, and print the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="", help="regular expression of names")
    parser.add_argument("--log", type=Path, default=Path("build/exported_models.jsonl"), help="results so far")
    parser.add_argument("--again", action="store_true", help="examine also those that are in the log and not right")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for a model")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no model after these")
    parser.add_argument("--docs", type=Path, help="page whose place `exported models` gets the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    libraries = load_libraries()
    chosen = [entry for entry in held_out(libraries) if re.search(options.models, entry.name)]
    options.log.parent.mkdir(parents=True, exist_ok=True)
    lines = options.log.read_text().splitlines() if options.log.exists() else []
    done = {row["model"]: row for row in map(json.loads, lines)}
    end = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        _warm_up(Path(folder))
    for entry in chosen:
        is_right = entry.name in done and done[entry.name].get("difference", 1.0) <= ALLOWED
        if time.monotonic() > end or is_right or (entry.name in done and not options.again):
            continue
        row = done[entry.name] = row_of(entry, options.limit)
        with options.log.open("a") as log:
            log.write(json.dumps(row) + "\n")
        print(f"{entry.name:44s} {row.get('difference', float('nan')):.1e}  {verdict(row)}", flush=True)
    text = table([done[entry.name] for entry in chosen if entry.name in done])
    versions = ", ".join(f"{name} {getattr(module, '__version__', '')}".strip() for name, module in libraries.items())
    about = f"{machine()}; onnxruntime {onnxruntime.__version__}; {versions}"
    print(f"\n{text}\n\n{about}")
    if options.docs is not None:
        fill(options.docs, "exported models", f"{text}\n\n{about}")


if __name__ == "__main__":
    main()
