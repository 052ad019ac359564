"""Peak memory and step time on one GPU, against masked-dense training: one run of at most five minutes.

    python benchmarks/gpu.py [--models resnet18 mobilenet_v2 resnet50 gpt2] [--minutes 5] [--tiny]

ResNet18 and MobileNetV2 at batch 256 (CIFAR), ResNet50 at batch 64 (224 pixels) and GPT-2 small over bytes at batch 8
(1024 bytes), density 0.1. Ours codes what layers keep in 2 bits, in GPT-2 in 4, with dense weights. Peak: the most that
torch's allocator had in use in a step, weights and optimizer state included. Time: median of 10 steps after 3.

Compiled rows come last, as compiling takes longest; what does not fit into the time is 'not run'. Without a GPU nothing
is; `--tiny` then runs each row once on the CPU, at sizes that say nothing, to see that it works.
"""

import argparse
import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from _machine import machine
from _methods import DENSITY, masked
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fedmef_fx import Config, transform
from fedmef_fx.models import gpt2_bytes, mobilenet_v2, resnet18, resnet50
from fedmef_fx.packing.triton_choice import TRITON_VARIABLE

BLOCKS = ("_BasicBlock", "_Bottleneck", "_InvertedResidual", "_Block")
BASELINE = "masked-dense"
NOT_RUN = "not run"


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with its batch.

    Attributes:
        build: Makes the model.
        shape: Of the images of a batch; of its bytes for a language model.
        classes: Number of logits.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int

    @property
    def is_text(self) -> bool:
        """Whether the input is bytes."""
        return len(self.shape) == 2

    def config(self, bits: Literal[2, 4]) -> Config:
        """Ours: codes of so many bits; a transformer keeps much besides what layers read."""
        return Config(
            density=DENSITY,
            activation_sparsity=0.0,
            activation_bits=bits,
            saved_precision="int4" if self.is_text else "exact",
            weight_storage="dense",
        )


def cases(*, is_tiny: bool) -> dict[str, Case]:
    """All models by name."""
    if is_tiny:
        text = Case(lambda: gpt2_bytes(context=16, dim=32, depth=2, heads=2), (2, 16), 256)
        return {
            "resnet18": Case(resnet18, (2, 3, 16, 16), 10),
            "mobilenet_v2": Case(mobilenet_v2, (2, 3, 32, 32), 10),
            "resnet50": Case(resnet50, (2, 3, 64, 64), 1000),
            "gpt2": text,
        }
    return {
        "resnet18": Case(resnet18, (256, 3, 32, 32), 10),
        "mobilenet_v2": Case(mobilenet_v2, (256, 3, 32, 32), 10),
        "resnet50": Case(resnet50, (64, 3, 224, 224), 1000),
        "gpt2": Case(lambda: gpt2_bytes(context=1024, dim=768, depth=12, heads=12), (8, 1024), 256),
    }


class Checkpointed(nn.Module):
    """A block that keeps its input alone and runs again in backward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """The block's result."""
        result: Tensor = checkpoint(self.block, x, use_reentrant=False)
        return result


def with_checkpoints(model: nn.Module) -> nn.Module:
    """A masked model that keeps the inputs of its blocks."""
    model = masked(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ in BLOCKS:
                setattr(module, name, Checkpointed(child))
    return model


@dataclasses.dataclass(frozen=True)
class Row:
    """A way to train.

    Attributes:
        label: What is shown.
        build: From the original model to the one that trains.
        is_autocast: Whether it computes in bfloat16.
        activation_budget: Of torch.compile, the share of activations that is kept; None without compiling.
        has_triton: Whether our codes may use Triton.
    """

    label: str
    build: Callable[[nn.Module], nn.Module]
    is_autocast: bool = False
    activation_budget: float | None = None
    has_triton: bool = True


def rows(case: Case) -> list[Row]:
    """What is compared; compiled rows last."""
    bits: Literal[2, 4] = 4 if case.is_text else 2

    def ours(model: nn.Module) -> nn.Module:
        return transform(model, case.config(bits))

    return [
        Row(BASELINE, masked),
        Row("  autocast, bfloat16", masked, is_autocast=True),
        Row("  checkpointing per block", with_checkpoints),
        Row(f"ours, {bits} bits", ours),
        Row("  without Triton", ours, has_triton=False),
        Row("  autocast, bfloat16", ours, is_autocast=True),
        Row("masked-dense, activation_memory_budget 0.5", masked, activation_budget=0.5),
        Row("masked-dense, activation_memory_budget 0.2", masked, activation_budget=0.2),
    ]


@dataclasses.dataclass(frozen=True)
class Measured:
    """Bytes, None on the CPU, and seconds of a step."""

    peak: int | None
    seconds: float


@contextlib.contextmanager
def settings_of(row: Row) -> Iterator[None]:
    """The process-wide settings of a row."""
    before = os.environ.get(TRITON_VARIABLE)
    if not row.has_triton:
        os.environ[TRITON_VARIABLE] = "0"
    try:
        if row.activation_budget is None:
            yield
        else:
            with torch._functorch.config.patch(activation_memory_budget=row.activation_budget):
                yield
    finally:
        os.environ.pop(TRITON_VARIABLE, None)
        if before is not None:
            os.environ[TRITON_VARIABLE] = before


def step_of(case: Case, row: Row, device: torch.device) -> Callable[[], None]:
    """A training step, and all that it holds."""
    torch.manual_seed(0)
    model = row.build(case.build()).to(device).train()
    x = torch.randint(256, case.shape) if case.is_text else torch.randn(case.shape)
    y = torch.randint(case.classes, case.shape if case.is_text else case.shape[:1])
    x, y = x.to(device), y.to(device)
    buffers = dict(model.named_buffers())
    pairs = [(p, buffers.get(f"{name}_mask")) for name, p in model.named_parameters()]
    masks = [(p, mask) for p, mask in pairs if mask is not None] if row.build in (masked, with_checkpoints) else []
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    if case.is_text:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    called: Callable[[Tensor], Tensor] = model
    if row.activation_budget is not None:
        backend = "inductor" if device.type == "cuda" else "aot_eager_decomp_partition"
        called = torch.compile(model, backend=backend)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=row.is_autocast):
            loss = F.cross_entropy(called(x).flatten(0, -2), y.flatten())
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for parameter, mask in masks:
                parameter.mul_(mask)

    return step


def measure(case: Case, row: Row, device: torch.device, *, is_tiny: bool) -> Measured:
    """Train a few steps."""
    first, timed = (0, 1) if is_tiny else (3, 10)
    is_cuda = device.type == "cuda"
    with settings_of(row):
        step = step_of(case, row, device)
        for _ in range(first):
            step()
        if is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(timed):
            start = time.perf_counter()
            step()
            if is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() if is_cuda else None
    return Measured(peak, statistics.median(seconds))


def table_of(results: dict[tuple[str, int], Measured | str], chosen: dict[str, Case], title: str) -> Table:
    """All rows of all models, as they were measured or with the reason why not."""
    table = Table(title=title)
    for column in ("model", "method", "peak MB", "/ masked-dense", "step ms", "/ masked-dense"):
        table.add_column(column, justify="left" if column in ("model", "method") else "right")
    for name, case in chosen.items():
        base = results.get((name, 0))
        for number, row in enumerate(rows(case)):
            got = results.get((name, number), NOT_RUN)
            if isinstance(got, str) or not isinstance(base, Measured):
                shown = got if isinstance(got, str) else NOT_RUN
                table.add_row(name, row.label, shown, "", shown, "")
                continue
            if got.peak is None or base.peak is None:
                table.add_row(name, row.label, NOT_RUN, "", "ran", "")
                continue
            peaks = f"{got.peak / 1e6:.0f}", f"{got.peak / base.peak:.3f}"
            times = f"{got.seconds * 1e3:.1f}", f"{got.seconds / base.seconds:.2f}"
            table.add_row(name, row.label, *peaks, *times)
    return table


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(cases(is_tiny=True)), default=list(cases(is_tiny=True)))
    parser.add_argument("--minutes", type=float, default=5.0, help="after which no further row is begun")
    parser.add_argument("--tiny", action="store_true", help="each row once, at sizes that say nothing; on a CPU, too")
    options = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not options.tiny:
        print(f"{NOT_RUN}: needs one GPU and a CUDA build of torch; torch {torch.__version__} sees none")
        return
    device = torch.device("cuda" if has_gpu else "cpu")
    name = torch.cuda.get_device_name() if has_gpu else f"{NOT_RUN} on a GPU"
    end = time.monotonic() + 60 * options.minutes
    chosen = {model: cases(is_tiny=options.tiny)[model] for model in options.models}
    results: dict[tuple[str, int], Measured | str] = {}
    for number in range(max(len(rows(case)) for case in chosen.values())):
        for model, case in chosen.items():
            # A compilation takes about half a minute.
            needed = 0.0 if rows(case)[number].activation_budget is None or options.tiny else 40.0
            if time.monotonic() + needed > end:
                continue
            try:
                results[model, number] = measure(case, rows(case)[number], device, is_tiny=options.tiny)
            except torch.OutOfMemoryError:
                results[model, number] = "out of memory"
            if has_gpu:
                torch.cuda.empty_cache()
            torch.compiler.reset()
    Console(width=140).print(table_of(results, chosen, f"{name}; {machine()}"))


if __name__ == "__main__":
    main()
