"""`fedmef-fx memory`: bytes of a training step, transformed against masked-dense with BatchNorm."""

import copy
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from torch import nn

import fedmef_fx
from fedmef_fx.commands.arguments import InputShape, ModelName, Passes, build_model, required_input
from fedmef_fx.commands.command import AsJson, Result, command
from fedmef_fx.commands.config_options import takes_config
from fedmef_fx.commands.tables import show_table
from fedmef_fx.config import Config
from fedmef_fx.display.sizes import shown_bytes
from fedmef_fx.measure.memory import MemoryReport
from fedmef_fx.measure.memory import memory as measure
from fedmef_fx.measure.training_step import OptimizerName
from fedmef_fx.sparse_model.parameters import register_mask

__all__ = ["memory"]

OptimizerOption = Literal["none", "sgd", "sgd-momentum", "adam", "adamw"]


@command
@takes_config()
def memory(  # noqa: PLR0913 -- the options of a command
    *,
    model: ModelName,
    input_shape: InputShape = None,
    batch: Annotated[int, typer.Option(min=1, help="Batch size, where --input does not give one.")] = 64,
    optimizer: Annotated[
        OptimizerOption, typer.Option(help="Optimizer of the step; with --budget, none stands for sgd-momentum.")
    ] = "none",
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Samples per part of the batch, for the transformed model.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help='Plan for a peak of at most so much, e.g. "64MB", and show the plan.'),
    ] = None,
    predict: Annotated[bool, typer.Option("--predict", help="Predict from shapes, without running the model.")] = False,
    rss: Annotated[bool, typer.Option("--rss", help="Also the resident memory of a fresh process.")] = False,
    allocator: Annotated[
        bool, typer.Option("--allocator", help="Also the peak of torch's allocator, temporaries inside it included.")
    ] = False,
    compare: Annotated[bool, typer.Option(help="Compare with masked-dense training with BatchNorm.")] = True,
    layers: Annotated[int, typer.Option(min=0, help="How many of the largest layers to show.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the step of the transformed model: .png, .svg or .pdf.")
    ] = None,
    passes: Passes = None,
    as_json: AsJson = False,
    config: Config,
) -> Result:
    """Measure or predict the bytes of one training step, against the same masks on dense activations and BatchNorm."""
    x = required_input(model, input_shape, batch=batch)
    network = build_model(model, seed=config.seed)
    if budget is not None:
        config = config.replace(memory_budget=budget, budget_optimizer=_counted(optimizer))
    inputs = (x,) if config.memory_budget is not None else None
    sparse = fedmef_fx.transform(network, config, example_inputs=inputs, passes=passes or ())
    plan = fedmef_fx.memory_plan(sparse)
    if plan is not None:
        optimizer, micro_batch = config.budget_optimizer, plan.micro_batch if micro_batch is None else micro_batch

    def report(candidate: nn.Module, size: int | None = None) -> MemoryReport:
        return measure(
            candidate,
            (x,),
            optimizer=None if optimizer == "none" else optimizer,
            micro_batch=size,
            predict=predict,
            rss=rss,
            allocator=allocator,
        )

    transformed = report(sparse, micro_batch)
    reference = report(_masked_after_steps(network, sparse)) if compare else None
    if plot is not None:
        transformed.plot(plot)
    data: dict[str, Any] = {"model": model, "input": list(x.shape), "transformed": transformed.as_dict()}
    if plan is not None:
        data["plan"] = plan.as_dict()
    if reference is not None:
        data |= {
            "masked_dense": reference.as_dict(),
            "saved_ratio": _ratio(transformed.saved_total, reference.saved_total),
            "peak_ratio": _ratio(transformed.peak, reference.peak),
        }
    title = f"one training step of {model} on {'x'.join(map(str, x.shape))}"

    def show(console: Console) -> None:
        if plan is not None:
            console.print(f"{plan}\n")
        _show(console, title, transformed, reference, layers=layers)

    return Result(data, show)


def _counted(optimizer: OptimizerOption) -> OptimizerName:
    """The optimizer that a budget counts with: without a choice, the usual one."""
    return "sgd-momentum" if optimizer == "none" else optimizer


def _masked_after_steps(model: nn.Module, transformed: nn.Module) -> nn.Module:
    """The original model with a transformed one's masks as buffers, as if its weights were multiplied after each step.

    That is how FedDST, FedTiny and FedPruning train. It keeps no second copy of a weight, so that it takes less than
    a model that masks its weights in forward: the fair baseline for memory.
    """
    reference = copy.deepcopy(model)
    for name, mask in fedmef_fx.masks(transformed).items():
        register_mask(reference, name, mask)
    return reference


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _show(
    console: Console, title: str, transformed: MemoryReport, reference: MemoryReport | None, *, layers: int
) -> None:
    theirs = {} if reference is None else dict(reference.rows())
    rows = []
    for label, ours in transformed.rows():
        base = theirs.get(label)
        ratio = None if base is None else _ratio(ours, base)
        cells = ("-" if base is None else shown_bytes(base), "-" if ratio is None else f"{ratio:.3f}")
        rows.append((label, shown_bytes(ours), *(cells if reference is not None else ())))
    headings = ("", "transformed", *(("masked-dense", "ratio") if reference is not None else ()))
    show_table(console, headings, rows, title=title, numbers=frozenset({1, 2, 3}))
    console.print(f"peak at: {transformed.peak_site}")
    for note in transformed.notes:
        console.print(f"note: {note}")
    if layers:
        largest = [(e.path, shown_bytes(e.held), shown_bytes(e.transients)) for e in transformed.largest_layers(layers)]
        console.print()
        show_table(console, ("layer", "held", "on top while it runs"), largest, numbers=frozenset({1, 2}))
