"""Runtimes that a file is meant for: what they read, and what this machine can try.

What a format version needs is in each runtime's release notes; `benchmarks/clients.py` shows what the runtimes make of
exported files. A runtime that is installed loads the file and is held against onnxruntime; of one that is not, the
format is checked alone, and a notice says so.
"""

import dataclasses
import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from onnx import ModelProto

from fedmef_fx.errors import ConfigError, ExportError
from fedmef_fx.export.examples import ExampleCall
from fedmef_fx.export.onnx.sessions import Array, Session, array_of

__all__ = ["Target", "check_format", "check_target_runtime", "read_target"]

# First version of onnxruntime -> newest format and operator set that it reads.
_ONNXRUNTIME: Final = {(1, 14): (8, 18), (1, 15): (9, 19), (1, 17): (9, 20), (1, 18): (10, 21), (1, 21): (10, 22)}
_RELATIVE: Final = 1e-3  # of the largest output: other kernels add up in another order
_RELATIVE_INT8: Final = 5e-2  # and round halves in another direction
_CONSTANTS_ONLY: Final = ("mnn", "ncnn")


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """A runtime that a file is meant for.

    Attributes:
        name: As asked for.
        highest_ir: Newest format version that it reads; None for any.
        highest_opset: Likewise of the standard operators.
        module: Python package that runs it.
    """

    name: str
    highest_ir: int | None = None
    highest_opset: int | None = None
    module: str = ""


def read_target(text: str, *, weights: str) -> Target:
    """What `export_onnx(target=...)` means.

    Args:
        text: "portable", "openvino", "opencv", "tract", "mnn", "ncnn", "onnxruntime" or "onnxruntime>=1.17".
        weights: How the file stores them.

    Raises:
        ConfigError: Another name, a version that is not known, or packed weights for a tool that wants constants.
    """
    versioned = re.fullmatch(r"onnxruntime(?:>=(\d+)\.(\d+)(?:\.\d+)?)?", text)
    if versioned is not None:
        if versioned[1] is None:
            return Target(text)
        asked = (int(versioned[1]), int(versioned[2]))
        formats = [limits for since, limits in _ONNXRUNTIME.items() if since <= asked]
        if not formats:
            raise ConfigError(f"export_onnx: got target={text!r}; expected onnxruntime 1.14 or later")
        return Target(text, *formats[-1])
    if text in _CONSTANTS_ONLY:
        if weights != "dense":
            raise ConfigError(
                f"export_onnx: got target={text!r} with weights={weights!r}; its converter wants weights as constants: "
                "export with weights='dense', or unpack the file there (fedmef_fx.unpack_onnx)"
            )
        return Target(text)
    targets = {
        "portable": Target("portable", 9, 20, "onnx"),
        "openvino": Target("openvino", module="openvino"),
        "opencv": Target("opencv", module="cv2"),
        "tract": Target("tract", module="tract"),
    }
    if text not in targets:
        names = " | ".join([*targets, *_CONSTANTS_ONLY, "onnxruntime", "onnxruntime>=1.17"])
        raise ConfigError(f"export_onnx: got target={text!r}; expected {names}")
    return targets[text]


def check_format(proto: ModelProto, target: Target) -> None:
    """Find out whether a runtime reads the format of a file.

    Raises:
        ExportError: The file needs a newer one.
    """
    opset = max((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    limits = (("format version", proto.ir_version, target.highest_ir), ("opset", opset, target.highest_opset))
    for what, needed, highest in limits:
        if highest is not None and needed > highest:
            raise ExportError(f"export_onnx: the file has {what} {needed}; {target.name} reads at most {highest}")
    foreign = sorted(
        {f"{node.domain}.{node.op_type}" for node in proto.graph.node if node.domain not in ("", "ai.onnx")}
    )
    if foreign and not target.name.startswith("onnxruntime"):
        raise ExportError(
            f"export_onnx: the file needs {', '.join(foreign[:3])}, which {target.name} does not have; export with "
            "optimize='none' or for onnxruntime"
        )


def check_target_runtime(
    file: Path, session: Session, call: ExampleCall, target: Target, *, is_int8: bool
) -> list[str]:
    """Run a file in the runtime it is meant for, where that is installed.

    Args:
        file: The file.
        session: Of onnxruntime, with that file.
        call: The example call.
        target: The runtime.
        is_int8: Whether the file is quantized.

    Returns:
        A notice about what was checked.

    Raises:
        ExportError: The runtime refuses the file, or computes something else.
    """
    if not target.module:
        return []
    if importlib.util.find_spec(target.module) is None:
        return [f"{target.module} is not installed here: of {target.name} only the format was checked"]
    expected = session.run(call)
    inputs = dict(zip(session.inputs, map(array_of, call.tensors()), strict=True))
    try:
        outputs = _RUNNERS[target.name](str(file), inputs, len(expected))
    except Exception as error:  # every runtime has exceptions of its own
        raise ExportError(f"export_onnx: {target.name} does not run the file: {error!s:.300}") from error
    for name, right, got in zip(session.outputs, expected, outputs, strict=True):
        _compare(name, right, np.asarray(got), target, _RELATIVE_INT8 if is_int8 else _RELATIVE)
    return [f"{target.name} on this machine computes what onnxruntime does"]


def _compare(name: str, expected: Array, got: Array, target: Target, relative: float) -> None:
    if got.shape != expected.shape:
        raise ExportError(
            f"export_onnx: {target.name} returns {list(got.shape)} for output {name!r}; expected {list(expected.shape)}"
        )
    left, right = expected.astype(np.float64), got.astype(np.float64)
    same = (left == right) | (np.isnan(left) & np.isnan(right))  # equal infinities have no difference
    scale = float(np.abs(left[np.isfinite(left)]).max(initial=0.0)) or 1.0
    with np.errstate(invalid="ignore"):
        difference = float(np.abs(np.where(same, 0.0, left - right)).max(initial=0.0))
    if not difference <= relative * scale:
        raise ExportError(
            f"export_onnx: {target.name} differs from onnxruntime by up to {difference:.3g} in output {name!r}, whose "
            f"largest value is {scale:.3g}; expected at most {relative * scale:.3g}. Export for another target, or "
            "with weights='dense'"
        )


def _reference(path: str, inputs: dict[str, Array], count: int) -> Sequence[Any]:
    from onnx.reference import ReferenceEvaluator  # noqa: PLC0415 -- used here alone

    return list(ReferenceEvaluator(path).run(None, inputs))[:count]


def _openvino(path: str, inputs: dict[str, Array], count: int) -> Sequence[Any]:
    import openvino  # noqa: PLC0415 -- need not be there

    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    outputs = model(inputs)
    return [outputs[index] for index in range(count)]


def _opencv(path: str, inputs: dict[str, Array], count: int) -> Sequence[Any]:
    import cv2  # noqa: PLC0415 -- need not be there

    network = cv2.dnn.readNetFromONNX(path)
    for name, array in inputs.items():
        network.setInput(array, name)
    outputs = network.forward(network.getUnconnectedOutLayersNames())
    return list(outputs)[:count]


def _tract(path: str, inputs: dict[str, Array], count: int) -> Sequence[Any]:
    import tract  # noqa: PLC0415 -- need not be there

    model = tract.onnx().load(path)
    kinds = {"float32": "f32", "int64": "i64", "int32": "i32", "bool": "bool"}
    for index, array in enumerate(inputs.values()):
        model.set_input_fact(index, ",".join([*map(str, array.shape), kinds[array.dtype.name]]))
    outputs = model.into_model().into_runnable().run(list(inputs.values()))
    return [outputs[index].to_numpy() for index in range(count)]


_RUNNERS: Final[dict[str, Callable[[str, dict[str, Array], int], Sequence[Any]]]] = {
    "portable": _reference,
    "openvino": _openvino,
    "opencv": _opencv,
    "tract": _tract,
}
