"""Exported ONNX files: size, loading, latency and agreement, on ImageNet-sized networks.

    python benchmarks/onnx_edge.py [--models resnet18:0.1] [--allocation uniform] [--quick]

Networks have random weights at ERK densities (or uniform ones), and BatchNorms with statistics and affine parameters,
so that folding leaves biases: values are as incompressible as trained ones. Latencies are minima of runs taken in
turns on one thread, batch 1. Seconds to create a session and peak memory (resident, whole process) are minima over
fresh processes that import numpy and onnxruntime only. The comparison with zstd needs the package zstandard, and
--quick leaves it out. Beside it stands the most that it can be: the entropy of the file's own positions and exponents
and 24 bits of sign and mantissa per active weight, which no lossless code goes below that takes these bits for noise.
"""

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from _machine import machine
from torch import nn

import fedmef_fx
from fedmef_fx.models import MobileNetV2, ResNet, mobilenet_v2, resnet18, resnet50

CASES = ("resnet18:0.1", "resnet18:0.05", "mobilenet_v2:0.1", "resnet50:0.1")
QUICK = ("resnet18:0.1", "mobilenet_v2:0.1")
# What the project wants to reach, by row and case; None is no target.
TARGETS = {
    "packed, times smaller than dense": (8.7, 16.5, 7.3, 8.6),
    "packed, over the entropy bound, at most": (0.03, 0.03, 0.05, 0.03),
    "packed-int16, times smaller": (15, 28, 11, 14.5),
    "packed-int16, relative error, at most": (1e-3, 1e-3, 1e-3, 1e-3),
    "packed, times smaller than zstd -19 of dense": (1.35, 1.7, 1.25, 1.35),
    "int8 + packed, times smaller": (24, None, 14.5, None),
    "int8 + packed, times faster": (3, None, 2, None),
    "int8 + packed, times smaller than gzip of int8": (1, 1, 1, 1),
    "packed, latency of dense, at most": (1.02, 1.02, 1.02, 1.02),
    "packed, decode nodes left, at most": (0, 0, 0, 0),
    "packed, session creation of dense, at most": (4, None, 4, 4),
    "packed, peak memory of dense, at most": (1.6, None, 1.6, 1.6),
    "packed, difference from torch, at most": (5e-5, 5e-5, 5e-5, 5e-5),
    "added seconds per 10 million parameters, at most": (1, None, None, None),
}
_LOADER = """
import json, re, sys, time
from pathlib import Path
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = 1, 3
start = time.perf_counter()
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
seconds = time.perf_counter() - start
# The peak that getrusage tells is inherited from the process that started this one.
peak = re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())
print(json.dumps([seconds, int(peak[1])]))
"""


def build(name: str) -> nn.Module:
    """The network in its ImageNet layout, with BatchNorms as after training."""
    torch.manual_seed(0)
    model: nn.Module
    if name == "resnet18":
        block = type(resnet18().layer1[0])
        model = ResNet(block, (2, 2, 2, 2), num_classes=1000, in_channels=3, small_images=False)
    elif name == "resnet50":
        model = resnet50()
    else:
        model = mobilenet_v2(num_classes=1000)
        assert isinstance(model, MobileNetV2)
        # The two strides that its layout for small images leaves out.
        model.features[0][0].stride = model.features[2].conv[1][0].stride = (2, 2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model


def session(path: Path) -> onnxruntime.InferenceSession:
    """A session on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def latencies(paths: list[Path], rounds: int) -> list[list[float]]:
    """Seconds of each round for each file, in turns."""
    sessions = [session(path) for path in paths]
    x = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    seconds: list[list[float]] = [[] for _ in paths]
    for turn in range(rounds + 3):
        for index, one in enumerate(sessions):
            start = time.perf_counter()
            one.run(None, {"x": x} if one.get_inputs()[0].name == "x" else {one.get_inputs()[0].name: x})
            if turn >= 3:
                seconds[index].append(time.perf_counter() - start)
    return seconds


def loading(paths: list[Path], repeats: int) -> list[tuple[float, float]]:
    """Least seconds to create a session and least peak memory in bytes, each in fresh processes, in turns."""
    found: list[list[tuple[float, float]]] = [[] for _ in paths]
    for _ in range(repeats):
        for index, path in enumerate(paths):
            done = subprocess.run(  # noqa: S603 -- our own code
                [sys.executable, "-I", "-c", _LOADER, str(path)], capture_output=True, text=True, check=True
            )
            seconds, peak = json.loads(done.stdout)
            found[index].append((seconds, peak * 1024))
    return [(min(s for s, _ in rows), min(p for _, p in rows)) for rows in found]


def zstd_bytes(data: bytes) -> int | None:
    """Size under zstd -19; None where the package is not installed."""
    try:
        import zstandard  # noqa: PLC0415 -- optional
    except ImportError:
        return None
    return len(zstandard.ZstdCompressor(level=19).compress(data))


def measure(case: str, folder: Path, *, allocation: str, is_quick: bool) -> Iterator[tuple[str, float]]:
    """The rows of one case."""
    name, density = case.split(":")
    sparse = fedmef_fx.transform(build(name), fedmef_fx.Config(density=float(density), allocation=allocation))  # type: ignore[arg-type]
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    calibration = [torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2, 3)]
    dense, packed, int16, int8, packed8 = (
        folder / f"{kind}.onnx" for kind in ("dense", "packed", "int16", "int8", "packed8")
    )
    fedmef_fx.export_onnx(sparse, dense, example_inputs=(x,), verify=False)
    report = fedmef_fx.export_onnx(sparse, packed, example_inputs=(x,), weights="packed")
    report16 = fedmef_fx.export_onnx(sparse, int16, example_inputs=(x,), weights="packed-int16")
    for path, weights in ((int8, "dense"), (packed8, "packed")):
        fedmef_fx.export_onnx(
            sparse,
            path,
            example_inputs=(x,),
            weights=weights,  # type: ignore[arg-type]  # one of its literals
            quantize="int8",
            calibration_data=calibration,
            verify=False,
        )
    size = {path: path.stat().st_size for path in (dense, packed, int16, int8, packed8)}
    yield "dense, megabytes", size[dense] / 1e6
    yield "packed, times smaller than dense", size[dense] / size[packed]
    assert report.over_entropy is not None
    yield "packed, over the entropy bound, at most", report.over_entropy
    assert report.over_exponent_entropy is not None
    yield "packed, over the bound with coded exponents", report.over_exponent_entropy
    yield "packed, bits per active weight", 8 * size[packed] / sum(tensor.active for tensor in report.tensors)
    yield "packed-int16, times smaller", size[dense] / size[int16]
    assert report16.parity is not None
    yield "packed-int16, relative error, at most", report16.parity.max_rel
    compressed = None if is_quick else zstd_bytes(dense.read_bytes())
    if compressed is not None:
        yield "packed, times smaller than zstd -19 of dense", compressed / size[packed]
        yield "the most that a lossless code can be smaller than zstd", compressed / report.exponent_entropy_bytes
    yield "int8 + packed, times smaller", size[dense] / size[packed8]
    yield "int8 + packed, times smaller than gzip of int8", len(gzip.compress(int8.read_bytes(), 9)) / size[packed8]
    seconds = latencies([dense, packed, packed8, int8], rounds=8 if is_quick else 40)
    least = [min(row) for row in seconds]
    yield "dense, milliseconds", least[0] * 1e3
    yield "dense, median over minimum", float(np.median(seconds[0])) / least[0]
    yield "packed, latency of dense, at most", least[1] / least[0]
    yield "int8 + packed, times faster", least[0] / least[2]
    yield "int8, times faster", least[0] / least[3]
    assert report.runtime is not None
    yield "packed, decode nodes left, at most", report.runtime.nodes - report.runtime.plain_nodes
    loads = loading([dense, packed, packed8], repeats=2 if is_quick else 7)
    yield "dense, session creation in seconds", loads[0][0]
    yield "packed, session creation of dense, at most", loads[1][0] / loads[0][0]
    yield "dense, peak memory in megabytes", loads[0][1] / 1e6
    yield "packed, peak memory of dense, at most", loads[1][1] / loads[0][1]
    yield "int8 + packed, peak memory of dense, at most", loads[2][1] / loads[0][1]
    assert report.parity is not None
    yield "packed, difference from torch, at most", report.parity.max_abs
    added = report.seconds["encode"] + report.seconds["check encoded"]
    yield "added seconds per 10 million parameters, at most", added / (report.dense_bytes / 4) * 1e7


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Exported ONNX files: size, loading, latency and agreement.")
    parser.add_argument("--models", nargs="+", metavar="MODEL:DENSITY", choices=CASES, help=", ".join(CASES))
    parser.add_argument("--allocation", choices=("erk", "uniform"), default="erk", help="how layers share the density")
    parser.add_argument(
        "--quick", action="store_true", help="fewer runs, no zstd, and only two cases unless --models names them"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(), f"onnxruntime {onnxruntime.__version__}")
    cases = arguments.models or (QUICK if arguments.quick else CASES)
    table: dict[str, dict[str, float]] = {}
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            for row, value in measure(case, Path(folder), allocation=arguments.allocation, is_quick=arguments.quick):
                table.setdefault(row, {})[case] = value
    width = max(map(len, table))
    print(f"\n{'':{width}s}", *(f"{case:>26s}" for case in cases))
    for row, values in table.items():
        cells = (_cell(row, case, values.get(case)) for case in cases)
        print(f"{row:{width}s}", *(f"{cell:>26s}" for cell in cells))


def _cell(row: str, case: str, value: float | None) -> str:
    if value is None:
        return "-"
    target = TARGETS[row][CASES.index(case)] if row in TARGETS else None
    if target is None:
        return f"{value:.4g}"
    is_reached = value <= target if row.endswith("at most") else value >= target
    return f"{value:.4g} ({'target' if is_reached else 'MISSED'} {target:g})"


if __name__ == "__main__":
    main()
