"""`fedmef-fx demo`: the whole story on handwritten digits, from a dense model to a verified ONNX file."""

import itertools
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor
from torch.utils.data import Dataset

import fedmef_fx
from fedmef_fx.commands.command import AsJson, Result, command, progress_bar
from fedmef_fx.commands.reference import masked_dense_reference
from fedmef_fx.commands.tables import show_table
from fedmef_fx.commands.training_data import round_note
from fedmef_fx.config import Config
from fedmef_fx.display.sizes import shown_bytes
from fedmef_fx.errors import ConfigError
from fedmef_fx.federated import History, RoundRecord
from fedmef_fx.federated.batches import batches
from fedmef_fx.federated.demo import DemoSettings, demo_settings, run_demo
from fedmef_fx.files.atomic import usable_folder
from fedmef_fx.measure.memory import memory
from fedmef_fx.models import digits_cnn

__all__ = ["demo"]


@command
def demo(
    *,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where model.onnx and history.json go.")] = Path(
        "fedmef-demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of every random choice.")] = 0,
    as_json: AsJson = False,
) -> Result:
    """Train a small federation on digits, freeze it, export it, and check the file: about a minute."""
    start = time.perf_counter()
    usable_folder(output, error=ConfigError)
    rounds = itertools.count(1)
    with progress_bar("rounds", steps=2 * demo_settings(seed=seed).rounds) as bar:

        def progress(record: RoundRecord) -> None:
            bar.reach(next(rounds), round_note(record))

        result = run_demo(seed=seed, progress=progress)
    history, model, test = result.history, result.model, result.test
    history.save(output / "history.json")
    images = next(batches(test, batch_size=2, shuffle=False, device=torch.device("cpu")))[0]
    report = fedmef_fx.export_onnx(model, output / "model.onnx", example_inputs=(images,), weights="packed")
    data = {
        "seed": seed,
        "rounds": len(history.rounds),
        "clients": result.settings.clients,
        "test_accuracy": history.test_accuracy,
        "test_accuracy_dense": result.dense.test_accuracy,
        "onnx_accuracy": _onnx_accuracy(report.path, test),
        "density": fedmef_fx.density(model),
        "bytes_down": history.bytes_down,
        "bytes_up": history.bytes_up,
        **_dense(result.dense, result.settings, images),
        "saved_bytes": max(record.peak_saved_bytes for record in history.rounds),
        "path": str(output / "model.onnx"),
        "file_bytes": report.bytes,
        "file_bytes_dense": report.dense_bytes,
        "parity": report.parity.max_abs if report.parity is not None else None,
        "seconds": time.perf_counter() - start,
    }
    return Result(data, lambda console: _show(console, data))


def _onnx_accuracy(path: Path, test: Dataset[Any]) -> float:
    """Share of the test set that the file classifies correctly in onnxruntime."""
    import onnxruntime  # noqa: PLC0415 -- only its users should wait for it

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    correct = total = 0
    for images, labels in batches(test, batch_size=256, shuffle=False, device=torch.device("cpu")):
        logits = torch.from_numpy(session.run(None, {name: images.numpy()})[0])
        correct += int((logits.argmax(1) == labels).sum())
        total += len(labels)
    return correct / total


def _dense(history: History, settings: DemoSettings, images: Tensor) -> dict[str, int]:
    """What the federation of the dense model takes: its messages, and dense saved activations with BatchNorm."""
    batch = images[:1].expand(settings.training.batch_size, *images.shape[1:])
    reference = memory(masked_dense_reference(digits_cnn(), Config()), (batch,))
    return {
        "bytes_down_dense": history.bytes_down,
        "bytes_up_dense": history.bytes_up,
        "saved_bytes_dense": reference.saved_total,
    }


def _show(console: Console, data: dict[str, Any]) -> None:
    def compared(key: str) -> tuple[str, str, str]:
        ours, dense = data[key], data[f"{key}_dense"]
        return shown_bytes(ours), shown_bytes(dense), f"{ours / dense:.3f}"

    rows = [
        ("accuracy, torch", *(f"{data[key]:.4f}" for key in ("test_accuracy", "test_accuracy_dense")), ""),
        ("accuracy, onnxruntime", f"{data['onnx_accuracy']:.4f}", "", ""),
        ("density", f"{data['density']:.4f}", "1", f"{data['density']:.3f}"),
        ("sent to clients", *compared("bytes_down")),
        ("sent by clients", *compared("bytes_up")),
        ("kept for backward", *compared("saved_bytes")),
        ("ONNX file, packed", *compared("file_bytes")),
        ("ONNX against torch", "-" if data["parity"] is None else f"{data['parity']:.1e}", "", ""),
        ("seconds", f"{data['seconds']:.1f}", "", ""),
    ]
    title = f"{data['clients']} clients, {data['rounds']} rounds, seed {data['seed']}: {data['path']}"
    show_table(console, ("", "FedMef", "dense", "ratio"), rows, title=title, numbers=frozenset({1, 2, 3}))
