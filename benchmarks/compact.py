"""Channel masks, compacted: parameters, operations and latency in onnxruntime against the dense model.

    python benchmarks/compact.py [--density 0.5] [--multiple 8] [--repeats 40] [--batch 1] [--size 32]
        [--models NAME ...]

Both files are exported from the same architecture with `export_onnx`, run in onnxruntime on one thread, and timed in
turns, so that what else the machine does hits both; a latency is the minimum over the repeats. "parity" is the largest
difference between the compacted model and the masked one it was made from, on inputs that compaction did not see. The
row "weight masks" has single weights pruned at the same density: their zeros are multiplied like any other number.
"""

import argparse
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import onnxruntime
import torch
from _machine import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fedmef_fx
from fedmef_fx import Config
from fedmef_fx.models import REFERENCE_MODELS


def session(model: nn.Module, x: Tensor, folder: Path, name: str) -> onnxruntime.InferenceSession:
    """An exported model, ready to run on one thread."""
    path = folder / f"{name}.onnx"
    fedmef_fx.export_onnx(model, path, example_inputs=(x,), dynamic_batch=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def interleaved_minima(sessions: Iterable[onnxruntime.InferenceSession], x: Tensor, *, repeats: int) -> list[float]:
    """The shortest time of each session, in seconds; all run in turns."""
    runs = [(each, {each.get_inputs()[0].name: x.numpy()}) for each in sessions]
    best = [float("inf")] * len(runs)
    for _ in range(repeats):
        for index, (each, feed) in enumerate(runs):
            start = time.perf_counter()
            each.run(None, feed)
            best[index] = min(best[index], time.perf_counter() - start)
    return best


def calibrated(model: nn.Module) -> nn.Module:
    """BatchNorms with statistics of random inputs, without which signals of a new network fade away."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the average over all batches
            module.bias.data.normal_(std=0.2)
    with torch.no_grad():
        model.train()(torch.randn(16, 3, 32, 32))
    return model


def measure(
    name: str, table: Table, *, density: float, multiple: int, repeats: int, batch: int, size: int, folder: Path
) -> None:
    """Add the rows of one architecture."""
    torch.manual_seed(0)
    x = torch.randn(batch, 3, size, size)
    plain = calibrated(REFERENCE_MODELS[name]())
    common = {"density": density, "allocation": "uniform", "normalization": "keep"}
    channel = fedmef_fx.transform(plain, Config(**common, granularity="channel", channel_multiple=multiple)).eval()
    weight = fedmef_fx.transform(plain, Config(**common)).eval()
    small = fedmef_fx.compact(channel, (x,))
    report = fedmef_fx.compact_report(small)
    unseen = torch.randn(5, 3, size, size)
    with torch.no_grad():
        parity = float((small(unseen) - channel(unseen)).abs().max())
    models = {"dense": plain.eval(), "weight masks": weight, "channel masks": channel, "compacted": small}
    sessions = [session(model, x, folder, f"{name}-{index}") for index, model in enumerate(models.values())]
    times = interleaved_minima(sessions, x, repeats=repeats)
    sizes = [sum(p.numel() for p in model.parameters()) for model in models.values()]
    for (label, _), seconds, parameters in zip(models.items(), times, sizes, strict=True):
        is_small = label == "compacted"
        flops = report.flops_after if is_small else report.flops_before
        table.add_row(
            name,
            label,
            f"{parameters:,}",
            f"{flops / batch / 1e6:.1f}",
            f"{seconds * 1e3:.2f}",
            f"{times[0] / seconds:.2f}",
            f"{parity:.1e}" if is_small else "",
        )
    table.add_section()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, default=0.5, help="share of channels that is kept")
    parser.add_argument("--multiple", type=int, default=8, help="Config.channel_multiple")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--models", nargs="+", default=["resnet18", "mobilenet_v2"], choices=sorted(REFERENCE_MODELS))
    options = parser.parse_args()

    torch.set_num_threads(1)
    console = Console(width=110)
    console.print(f"{machine()}; onnxruntime {onnxruntime.__version__}, 1 thread")
    table = Table("model", "kind", "parameters", "MFLOPs", "ms", "times faster", "parity")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            measure(
                name,
                table,
                density=options.density,
                multiple=options.multiple,
                repeats=options.repeats,
                batch=options.batch,
                size=options.size,
                folder=Path(folder),
            )
    console.print(table)


if __name__ == "__main__":
    main()
