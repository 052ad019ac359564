"""Verify: that a written file computes what the model computes, and bit for bit what its plain weights would."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import nn

from fedmef_fx.errors import ExportError
from fedmef_fx.export.examples import ExampleCall
from fedmef_fx.export.onnx.bisect import explain
from fedmef_fx.export.onnx.build import Built
from fedmef_fx.export.onnx.convert import Converted
from fedmef_fx.export.onnx.parity import OutputMismatchError, check_parity
from fedmef_fx.export.onnx.report import Parity, Runtime
from fedmef_fx.export.onnx.sessions import Session, latency_ratio, open_session
from fedmef_fx.export.onnx.targets import Target, check_target_runtime
from fedmef_fx.graph.uncaptured import capturing_nothing_more

__all__ = ["verify_file"]


def verify_file(
    file: Path,
    model: nn.Module,
    converted: Converted,
    built: Built,
    more: Sequence[ExampleCall],
    *,
    target: Target,
) -> tuple[Parity, Runtime | None, list[str]]:
    """Compare a file with the model in torch, and with its plain weights in onnxruntime.

    Args:
        file: The file.
        model: The model that was to be exported, in float32.
        converted: What it became first.
        built: What was written.
        more: Further calls to compare with.
        target: The runtime that the file is for.

    Returns:
        Agreement with the model, with the plain weights (None where nothing is encoded), and notices.

    Raises:
        ExportError: They differ; the message says where the difference begins.
    """
    notices: list[str] = []
    examples = converted.examples
    session = open_session(file, counts_nodes=built.reference is not None)
    runtime = None
    if built.reference is not None:
        plain = open_session(built.reference, counts_nodes=True)
        _check_bits(session, plain, examples.call)
        runtime = Runtime(
            nodes=session.nodes or 0,
            plain_nodes=plain.nodes or 0,
            session_seconds=session.seconds,
            plain_session_seconds=plain.seconds,
            latency_ratio=latency_ratio(session, plain, examples.call),
        )
        if runtime.nodes != runtime.plain_nodes:
            left = runtime.nodes - runtime.plain_nodes
            notices.append(
                f"onnxruntime keeps {left} decoder nodes that it should have computed when it loads the file"
            )
        del plain
    try:
        with capturing_nothing_more(model):
            parity, more_notices = check_parity(
                model, session, examples, dynamic=converted.is_dynamic, tolerance=built.tolerance, more=more
            )
    except OutputMismatchError as mismatch:
        raise ExportError(f"{mismatch}. {explain(mismatch, model, converted, built)}") from mismatch
    more_notices += check_target_runtime(
        file, session, examples.call, target, is_int8=built.manifest.quantize is not None
    )
    return parity, runtime, notices + more_notices


def _check_bits(session: Session, plain: Session, call: ExampleCall) -> None:
    for name, left, right in zip(session.outputs, session.run(call), plain.run(call), strict=True):
        if left.dtype != right.dtype or left.tobytes() != right.tobytes():
            raise ExportError(
                f"export_onnx: output {name!r} of the encoded file differs in {int((left != right).sum())} of "
                f"{np.size(right)} elements from that of the same weights stored plainly; this is a bug of the "
                "decoder, please report it. weights='dense' exports without it"
            )
