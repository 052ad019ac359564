"""`fedmef-fx memory`: bytes of a training step, transformed against masked-dense with BatchNorm."""

from typing import Annotated

import typer
from rich.console import Console

import fedmef_fx
from fedmef_fx.commands.command import AsJson, Result, command
from fedmef_fx.commands.config_options import takes_config
from fedmef_fx.commands.models import InputShape, ModelName, build_model, required_input
from fedmef_fx.commands.tables import bytes_text, show_table
from fedmef_fx.commands.twin import masked_dense_twin
from fedmef_fx.config import Config
from fedmef_fx.memory_report import MemoryReport
from fedmef_fx.memory_report import memory as measure

__all__ = ["memory"]


@command
@takes_config()
def memory(
    *,
    model: ModelName,
    input_shape: InputShape = None,
    batch: Annotated[int, typer.Option(min=1, help="Batch size, where --input does not give one.")] = 64,
    as_json: AsJson = False,
    config: Config,
) -> Result:
    """Measure the bytes of one training step, against the same masks on dense activations and BatchNorm."""
    x = required_input(model, input_shape, batch=batch)
    network = build_model(model, seed=config.seed)
    twin = measure(masked_dense_twin(network, config), (x,))
    transformed = measure(fedmef_fx.transform(network, config), (x,))
    data = {
        "model": model,
        "input": list(x.shape),
        "transformed": transformed.as_dict(),
        "masked_dense": twin.as_dict(),
        "saved_ratio": _ratio(transformed.saved_total, twin.saved_total),
        "peak_ratio": _ratio(transformed.peak, twin.peak),
    }
    title = f"one training step of {model} on {'x'.join(map(str, x.shape))}"
    return Result(data, lambda console: _show(console, title, transformed, twin))


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _show(console: Console, title: str, transformed: MemoryReport, twin: MemoryReport) -> None:
    rows = []
    for (label, ours), (_, theirs) in zip(transformed.rows(), twin.rows(), strict=True):
        ratio = _ratio(ours, theirs)
        rows.append((label, bytes_text(ours), bytes_text(theirs), "-" if ratio is None else f"{ratio:.3f}"))
    headings = ("", "transformed", "masked-dense", "ratio")
    show_table(console, headings, rows, title=title, numbers=frozenset({1, 2, 3}))
