"""Exported files in the runtimes that people use: which are right, how fast they load and run.

    python benchmarks/clients.py [--venvs DIR] [--clients openvino,tract] [--docs docs/clients.md]

Every client lives in a virtual environment of its own (Node's in a folder of npm), made from the package index where it
is missing, and reads each file in a process of its own. Models are the project's reference architectures with random
weights at density 0.1; those of timm and transformers are added where these packages are installed. Right is a result
within 1e-3 of the largest absolute output of torch (1e-2 of it for 16-bit values); int8 files, whose rounding differs
from torch's, are held against onnxruntime's result within 5e-2. Times are minima of three, one process at a time.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from _machine import machine
from torch import nn

import fedmef_fx
from fedmef_fx.models import mobilenet_v2, resnet18, vit_tiny

CLIENTS = {
    "onnxruntime 1.17": ("ort", ("onnxruntime==1.17.3", "numpy<2")),
    "onnxruntime 1.20": ("ort", ("onnxruntime==1.20.1",)),
    "onnxruntime 1.23": ("ort", ("onnxruntime==1.23.2",)),
    "onnxruntime, newest": ("ort", ("onnxruntime",)),
    "onnx.reference": ("reference", ("onnx",)),
    "OpenVINO": ("openvino", ("openvino",)),
    "OpenCV": ("opencv", ("opencv-python-headless",)),
    "tract": ("tract", ("tract",)),
    "Node": ("node", ("onnxruntime-node",)),
    "web (WebAssembly in Node)": ("web", ("onnxruntime-web",)),
}
NODE_KINDS = ("node", "web")  # packages of npm, and node in place of a Python
FORMATS: dict[str, dict[str, Any]] = {
    "dense": {"weights": "dense"},
    "packed": {"weights": "packed"},
    "packed-int16": {"weights": "packed-int16"},
    "int8, dense": {"weights": "dense", "quantize": "int8"},
    "int8, packed": {"weights": "packed", "quantize": "int8"},
}
TOLERANCES = {"dense": 1e-3, "packed": 1e-3, "packed-int16": 1e-2, "int8, dense": 5e-2, "int8, packed": 5e-2}
_RUNNER = r"""
import json, sys, time
import numpy as np
kind, path, arrays, result = sys.argv[1:]
x = np.load(arrays)
start = time.perf_counter()
if kind == "ort":
    import onnxruntime
    version = onnxruntime.__version__
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    start = time.perf_counter()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    run = lambda: session.run(None, {name: x})[0]
elif kind == "reference":
    import onnx
    from onnx.reference import ReferenceEvaluator
    version = onnx.__version__
    start = time.perf_counter()
    evaluator = ReferenceEvaluator(path)
    run = lambda: evaluator.run(None, {evaluator.input_names[0]: x})[0]
elif kind == "openvino":
    import openvino
    version = openvino.__version__.split("-")[0]
    start = time.perf_counter()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    model = openvino.Core().compile_model(path, "CPU", settings)
    run = lambda: model([x])[0]
elif kind == "opencv":
    import cv2
    version = cv2.__version__
    cv2.setNumThreads(1)
    start = time.perf_counter()
    network = cv2.dnn.readNetFromONNX(path)
    def run():
        network.setInput(x)
        return network.forward()
else:
    import tract
    from importlib.metadata import version as version_of
    version = version_of("tract")
    start = time.perf_counter()
    model = tract.onnx().load(path)
    model.set_input_fact(0, ",".join(map(str, x.shape)) + ",f32")
    runnable = model.into_model().into_runnable()
    run = lambda: runnable.run([x])[0].to_numpy()
loaded = time.perf_counter() - start
out = run()
times = []
for _ in range(3):
    start = time.perf_counter()
    run()
    times.append(time.perf_counter() - start)
np.save(result, out)
print("RESULT " + json.dumps({"version": version, "load": loaded, "run": min(times)}))
"""


def models() -> Iterator[tuple[str, Callable[[], nn.Module], torch.Tensor]]:
    """Name, factory and input."""
    images = torch.randn(4, 3, 32, 32)
    yield "ResNet18", resnet18, images
    yield "MobileNetV2", mobilenet_v2, images
    yield "ViT-tiny", vit_tiny, images
    if _is_installed("timm"):
        import timm  # noqa: PLC0415 -- need not be there

        for name in ("mobilenetv3_small_100", "convnext_femto"):
            yield name, lambda name=name: timm.create_model(name), torch.randn(2, 3, 96, 96)  # type: ignore[misc]
    if _is_installed("transformers"):
        sys.path.remove(str(Path(__file__).parent))  # where a script has that name
        from transformers import BertConfig, BertModel  # noqa: PLC0415 -- likewise

        config = BertConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512)
        yield "BERT, small", lambda: BertModel(config), torch.randint(0, 1000, (2, 16))


def _is_installed(package: str) -> bool:
    return any(found.name == package for found in importlib.metadata.distributions())


def exported(folder: Path) -> Iterator[tuple[str, str, Path, Path, np.ndarray[Any, Any]]]:
    """Model, format, file, file of the input, and the result that is right."""
    for name, factory, x in models():
        torch.manual_seed(0)
        sparse = fedmef_fx.transform(factory(), fedmef_fx.Config(density=0.1), example_inputs=(x,)).eval()
        np.save(inputs := folder / f"{name}.npy", x.numpy())
        with torch.no_grad():
            out = sparse(x)
        right = (out if isinstance(out, torch.Tensor) else out[0]).numpy()
        for kind, options in FORMATS.items():
            path = folder / f"{name}-{kind}.onnx".replace(" ", "")
            calibration = {"calibration_data": [x]} if "quantize" in options else {}
            try:
                fedmef_fx.export_onnx(sparse, path, example_inputs=(x,), **options, **calibration)
            except fedmef_fx.FedmefError as error:
                print(f"not exported: {name}, {kind}: {error!s:.200}", flush=True)
                continue
            if "quantize" in options:
                session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
                right = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
            yield name, kind, path, inputs, right


def environment_of(client: str, kind: str, requirements: tuple[str, ...], venvs: Path) -> Path:
    """The interpreter of a client's environment, or the folder of its package; made where it is missing."""
    folder = venvs / client.replace(" ", "-").replace(",", "")
    if kind in NODE_KINDS:
        package = folder / "node_modules" / requirements[0]
        if not package.is_dir():
            npm = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder)]
            subprocess.run([*npm, *requirements], check=True)  # noqa: S603 -- our own list
        return package
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "numpy", *requirements], check=True)  # noqa: S603 -- our own list
        (folder / "ready").touch()
    return python


def outcome(
    environment: Path, kind: str, path: Path, inputs: Path, right: np.ndarray[Any, Any], tolerance: float
) -> dict[str, Any]:
    """What a client makes of a file."""
    result = path.with_suffix(".out.npy")
    result.unlink(missing_ok=True)
    try:
        process = subprocess.run(  # noqa: S603 -- our own script
            _command(environment, kind, path, inputs, result),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"status": "refused", "reason": "longer than 600 s"}
    line = next((text for text in process.stdout.splitlines() if text.startswith("RESULT ")), None)
    if line is None:
        text = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        status = "refused" if process.returncode > 0 else "crashed"
        return {"status": status, "reason": text.replace(str(path.parent), "")[:160]}
    out = np.fromfile(result, np.float32).reshape(right.shape) if kind in NODE_KINDS else np.load(result)
    difference = float(np.abs(out - right).max() / np.abs(right).max())
    return {**json.loads(line[7:]), "difference": difference, "status": "right" if difference <= tolerance else "WRONG"}


def _command(environment: Path, kind: str, path: Path, inputs: Path, result: Path) -> list[str | Path]:
    """What runs a file in a client."""
    if kind not in NODE_KINDS:
        return [environment, "-c", _RUNNER, kind, path, inputs, result]
    x = np.load(inputs)
    x.tofile(raw := inputs.with_suffix(".bin"))
    script = Path(__file__).with_name("_client.mjs")
    return ["node", script, environment, path, raw, ",".join(map(str, x.shape)), str(x.dtype), result]


def cell(found: dict[str, Any]) -> str:
    """Of the table."""
    if found["status"] in ("right", "WRONG"):
        times = f"{found['load'] * 1e3:.0f} ms, {found['run'] * 1e3:.1f} ms"
        return times if found["status"] == "right" else f"**wrong by {found['difference']:.2g}**"
    return f"{found['status']}: {found['reason']}".replace("|", "/")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a table of clients for each model and format."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        kinds = list(dict.fromkeys(row["format"] for row in own))
        sizes = {row["format"]: row["bytes"] for row in own}
        lines += [f"## {model}", "", "| client | " + " | ".join(f"{k}, {sizes[k]:,} bytes" for k in kinds) + " |"]
        lines.append("|---|" + "---|" * len(kinds))
        for client in dict.fromkeys(row["client"] for row in own):
            cells = [cell(next(r for r in own if (r["client"], r["format"]) == (client, kind))) for kind in kinds]
            lines.append(f"| {client} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Run every client on every file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venvs", type=Path, default=Path(tempfile.gettempdir()) / "fedmef-fx-clients")
    parser.add_argument("--clients", default=",".join(kind for kind in dict.fromkeys(k for k, _ in CLIENTS.values())))
    parser.add_argument("--docs", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    chosen = {name: spec for name, spec in CLIENTS.items() if spec[0] in options.clients.split(",")}
    environments = {name: environment_of(name, *spec, options.venvs) for name, spec in chosen.items()}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model, form, path, inputs, right in exported(Path(folder)):
            for client, (kind, _) in chosen.items():
                found = outcome(environments[client], kind, path, inputs, right, TOLERANCES[form])
                shown = f"{client} ({found['version']})" if "version" in found and "newest" in client else client
                rows.append({"model": model, "format": form, "client": shown, "bytes": path.stat().st_size, **found})
                print(f"{model}, {form}, {client}: {found['status']} {cell(found)}", flush=True)
    counts = {
        status: sum(row["status"] == status for row in rows) for status in ("right", "WRONG", "refused", "crashed")
    }
    summary = ", ".join(f"{count} {status}" for status, count in counts.items())
    print(summary)
    if options.docs is not None:
        command = "python benchmarks/clients.py --docs docs/clients.md"
        head = (
            "# Clients\n\nWhich runtime computes which exported file right: milliseconds to load and to run once, one "
            f"thread, batch of the example. Made by `{command}`, not by hand.\n\n{machine()}\n\n{summary}\n\n"
        )
        options.docs.write_text(head + table(rows))


if __name__ == "__main__":
    main()
