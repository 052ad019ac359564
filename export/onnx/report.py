"""What an export says about itself."""

import dataclasses
from pathlib import Path
from typing import Any

from fedmef_fx.display.notebook import fragment, html_table
from fedmef_fx.export.onnx.int8_records import LayerPrecision
from fedmef_fx.export.onnx.manifest import ManifestTensor

__all__ = ["ExportReport", "Parity", "Runtime"]


@dataclasses.dataclass(frozen=True, slots=True)
class Parity:
    """How far the file, run by onnxruntime, is from the model, run by torch.

    Attributes:
        max_abs: Largest absolute difference of any output element.
        max_rel: Largest difference of an output relative to that output's largest magnitude.
        top1_agreement: Share of rows with the same largest element in the first floating point output of two or more
            dimensions, 0 to 1; None without such an output.
        batches: Batches compared.
        batch_sizes: Their sizes, in order.
    """

    max_abs: float
    max_rel: float
    top1_agreement: float | None
    batches: int
    batch_sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Runtime:
    """What onnxruntime makes of the file, against the file with the same weights stored plainly.

    Attributes:
        nodes: Operators that it runs, after it has folded what is constant.
        plain_nodes: Likewise for the plain file; equal where no decoder is left.
        session_seconds: To create a session that also writes down what runs.
        plain_session_seconds: Likewise for the plain file.
        latency_ratio: How many times longer one run takes: minima of a few runs taken in turns, a rough figure
            (`fedmef-fx bench onnx` measures it properly).
    """

    nodes: int
    plain_nodes: int
    session_seconds: float
    plain_session_seconds: float
    latency_ratio: float


@dataclasses.dataclass(frozen=True, slots=True)
class ExportReport:
    """What `export_onnx` wrote, and how well it agrees with the model.

    Attributes:
        path: The file.
        bytes: Its size, and that of its second file where it needs one.
        dense_bytes: Bytes of the model's parameters, pruned ones included.
        ratio: dense_bytes / bytes: how many times smaller than the dense parameters the file is.
        opset: Version of the standard operator set.
        nodes: Operators in the file, those that decode weights included.
        parity: Agreement with the model; None where it was not asked for.
        seconds: Wall-clock time by stage, in order.
        notices: What was done differently from what was asked for, and why.
        weights: How weights were asked to be stored.
        quantize: As asked for.
        plain_bytes: Size of the graph as a file of dense float32 weights.
        entropy_bytes: What the weights take at least: the entropy of where the active ones are, n H(d) bits for a
            tensor of n elements and density d, and all bits of their values: 32 for float32. A file whose exponents are
            coded can take less.
        exponent_entropy_bytes: Likewise with 24 bits and the entropy of the tensor's exponents for a float32 value.
        plain_nodes: Operators of the model itself, before quantizing and encoding.
        tensors: The tensors that are stored encoded.
        runtime: What onnxruntime makes of it; None where nothing is encoded or verification was not asked for.
        layers: How each operator of an int8 file computes, and what int8 costs it.
    """

    path: Path
    bytes: int
    dense_bytes: int
    opset: int
    nodes: int
    parity: Parity | None
    seconds: dict[str, float]
    notices: tuple[str, ...] = ()
    weights: str = "dense"
    quantize: str | None = None
    plain_bytes: int = 0
    entropy_bytes: float = 0.0
    exponent_entropy_bytes: float = 0.0
    plain_nodes: int = 0
    tensors: tuple[ManifestTensor, ...] = ()
    runtime: Runtime | None = None
    layers: tuple[LayerPrecision, ...] = ()

    @property
    def ratio(self) -> float:
        """How many times smaller than the dense parameters the file is."""
        return self.dense_bytes / self.bytes

    @property
    def over_entropy(self) -> float | None:
        """Bytes of the file over `entropy_bytes`, less 1, so less than 0 for fewer; None where that is not known."""
        return self.bytes / self.entropy_bytes - 1 if self.entropy_bytes else None

    @property
    def over_exponent_entropy(self) -> float | None:
        """Bytes of the file over `exponent_entropy_bytes`, less 1; None where that is not known."""
        return self.bytes / self.exponent_entropy_bytes - 1 if self.exponent_entropy_bytes else None

    def as_dict(self) -> dict[str, Any]:
        """The report as values that `json.dumps` takes."""
        values = {**dataclasses.asdict(self), "path": str(self.path), "ratio": self.ratio}
        tensors = [{**dataclasses.asdict(t), "shape": list(t.shape), "density": t.density} for t in self.tensors]
        over = {"over_entropy": self.over_entropy, "over_exponent_entropy": self.over_exponent_entropy}
        return {**values, **over, "tensors": tensors}

    def __str__(self) -> str:
        lines = [f"{name:8s}{value}" for name, value in self._rows()]
        if self.tensors:
            cells = [("tensor", "shape", "codec", "density", "bytes"), *map(_tensor_cells, self.tensors)]
            widths = [max(len(row[column]) for row in cells) for column in range(5)]
            lines += ["", *("  ".join(_aligned(row, widths)).rstrip() for row in cells)]
        if any(layer.error is not None for layer in self.layers):
            cells = [("layer", "operator", "error with int8", "type"), *map(_layer_cells, self.layers)]
            widths = [max(len(row[column]) for row in cells) for column in range(4)]
            lines += ["", *("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        facts = html_table(("", ""), self._rows(), left={0, 1})
        headings = ("tensor", "shape", "codec", "density", "bytes")
        tensors = [_tensor_cells(tensor) for tensor in self.tensors]
        return fragment(facts, html_table(headings, tensors, left={0, 1, 2})) if tensors else fragment(facts)

    def _rows(self) -> list[tuple[str, str]]:
        size = f"{self.bytes:,} bytes; parameters {self.dense_bytes:,} bytes, {self.ratio:.2f} times the file"
        nodes = f"{self.nodes} nodes, opset {self.opset}"
        rows = [("file", str(self.path)), ("size", size)]
        if self.tensors or self.quantize:
            stored = self.weights if self.quantize is None else f"{self.weights}, {self.quantize}"
            bound = "" if self.over_entropy is None else f", {_over(self.over_entropy)} the entropy bound"
            if self.over_exponent_entropy is not None and self.exponent_entropy_bytes < self.entropy_bytes:
                bound += f", {_over(self.over_exponent_entropy)} that with the entropy of exponents"
            plain = f"{self.plain_bytes:,} bytes as dense float32, {self.plain_bytes / self.bytes:.2f} times the file"
            rows.append(("weights", f"{stored}; {plain}{bound}"))
            nodes += f"; {self.plain_nodes} without decoders and quantizers"
        rows += [("graph", nodes), ("parity", _parity_text(self.parity))]
        if self.runtime is not None:
            rows.append(("runtime", _runtime_text(self.runtime)))
        rows.append(("time", ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in self.seconds.items())))
        return rows + [("notice", notice) for notice in self.notices]


def _over(share: float) -> str:
    return f"{abs(share):.1%} {'over' if share >= 0 else 'under'}"


def _tensor_cells(tensor: ManifestTensor) -> tuple[str, ...]:
    shape = "x".join(map(str, tensor.shape))
    return tensor.name, shape, tensor.codec, f"{tensor.density:.3f}", f"{tensor.bytes:,}"


def _layer_cells(layer: LayerPrecision) -> tuple[str, ...]:
    return layer.name, layer.operator, "" if layer.error is None else f"{layer.error:.2%}", layer.kind


def _aligned(row: tuple[str, ...], widths: list[int]) -> list[str]:
    """Text to the left, numbers to the right."""
    cells = list(zip(row, widths, strict=True))
    return [*(cell.ljust(width) for cell, width in cells[:3]), *(cell.rjust(width) for cell, width in cells[3:])]


def _runtime_text(runtime: Runtime) -> str:
    left = runtime.nodes - runtime.plain_nodes
    return (
        f"{runtime.nodes} nodes run, {left} of them decoders; session {runtime.session_seconds:.2f} s, plain "
        f"{runtime.plain_session_seconds:.2f} s; latency {runtime.latency_ratio:.2f} times plain"
    )


def _parity_text(parity: Parity | None) -> str:
    if parity is None:
        return "not verified"
    sizes = ", ".join(map(str, dict.fromkeys(parity.batch_sizes)))
    text = f"max abs {parity.max_abs:.1e}, max rel {parity.max_rel:.1e}"
    if parity.top1_agreement is not None:
        text += f", top-1 agreement {parity.top1_agreement:.2%}"
    return f"{text}, over {parity.batches} batches of size {sizes}"
