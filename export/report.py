"""What an export says about itself."""

import dataclasses
from pathlib import Path
from typing import Any

__all__ = ["ExportReport", "Parity"]


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
class ExportReport:
    """What `export_onnx` wrote, and how well it agrees with the model.

    Attributes:
        path: The file.
        bytes: Its size.
        dense_bytes: Bytes of the model's parameters, pruned ones included.
        ratio: dense_bytes / bytes: how many times smaller than the dense parameters the file is.
        opset: Version of the standard operator set.
        nodes: Operators in the graph.
        parity: Agreement with the model; None where it was not asked for.
        seconds: Wall-clock time by stage, in order.
        notices: What was done differently from what was asked for, and why.
    """

    path: Path
    bytes: int
    dense_bytes: int
    opset: int
    nodes: int
    parity: Parity | None
    seconds: dict[str, float]
    notices: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """How many times smaller than the dense parameters the file is."""
        return self.dense_bytes / self.bytes

    def as_dict(self) -> dict[str, Any]:
        """The report as values that `json.dumps` takes."""
        return {**dataclasses.asdict(self), "path": str(self.path), "ratio": self.ratio}

    def __str__(self) -> str:
        rows = [
            ("file", str(self.path)),
            ("size", f"{self.bytes:,} bytes; parameters {self.dense_bytes:,} bytes, {self.ratio:.2f} times the file"),
            ("graph", f"{self.nodes} nodes, opset {self.opset}"),
            ("parity", _parity_text(self.parity)),
            ("time", ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in self.seconds.items())),
            *(("notice", notice) for notice in self.notices),
        ]
        return "\n".join(f"{name:8s}{value}" for name, value in rows)


def _parity_text(parity: Parity | None) -> str:
    if parity is None:
        return "not verified"
    sizes = ", ".join(map(str, dict.fromkeys(parity.batch_sizes)))
    text = f"max abs {parity.max_abs:.1e}, max rel {parity.max_rel:.1e}"
    if parity.top1_agreement is not None:
        text += f", top-1 agreement {parity.top1_agreement:.2%}"
    return f"{text}, over {parity.batches} batches of size {sizes}"
