"""Training under torch.compile against training without, again and again in fresh processes: numbers and crashes.

    python benchmarks/compiled_training.py [--runs 50] [--steps 4] [--threads 1]

The runs go round all combinations of four architectures, both storages of weights and three compilers, with the
configuration's defaults otherwise. A run trains two copies of one model on the same batches, one of them compiled, with
a change of the masks in between. The figure is the largest difference of any weight afterwards; a process that ends
other than by itself is a crash.
"""

import argparse
import collections
import copy
import itertools
import json
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from _machine import machine
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

import fedmef_fx
from fedmef_fx.models import REFERENCE_MODELS

ARCHITECTURES = ("digits_cnn", "resnet18", "mobilenet_v2", "vit_tiny")
STORAGES = ("dense", "packed")
COMPILERS = ("eager", "aot_eager", "inductor")


def _change_masks(models: tuple[nn.Module, nn.Module]) -> None:
    changed = {name: mask.roll(1, 0) for name, mask in fedmef_fx.masks(models[0]).items()}
    for model in models:
        fedmef_fx.set_masks(model, changed)


def difference(architecture: str, storage: str, compiler: str, *, steps: int) -> float:
    """Train both copies; the largest difference of their weights."""
    warnings.simplefilter("ignore")  # what compilers warn of is not the matter here
    torch.manual_seed(0)
    plain = fedmef_fx.transform(REFERENCE_MODELS[architecture](), fedmef_fx.Config(weight_storage=storage)).train()
    models = plain, copy.deepcopy(plain)
    calls = plain, torch.compile(models[1], backend=compiler)
    optimizers = [torch.optim.SGD(model.parameters(), 0.01, momentum=0.9) for model in models]
    shape = (1, 8, 8) if architecture == "digits_cnn" else (3, 32, 32)
    for step in range(steps):
        if step == steps // 2:
            _change_masks(models)
        x, y = torch.randn(4, *shape), torch.randint(0, 10, (4,))
        state = torch.get_rng_state()
        for call, optimizer in zip(calls, optimizers, strict=True):
            torch.set_rng_state(state)
            optimizer.zero_grad()
            F.cross_entropy(call(x), y).backward()
            optimizer.step()
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    return max(float((first - second).abs().max()) for first, second in pairs if first.numel())


def _run(options: argparse.Namespace, *combination: str) -> tuple[int, float]:
    """Exit status of a process of its own, and what it found."""
    command = [sys.executable, str(Path(__file__)), "--only", *combination]
    command += ["--steps", str(options.steps), "--threads", str(options.threads)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 -- this very program
    if process.returncode:
        sys.stderr.write(f"{combination}: status {process.returncode}\n{process.stderr[-2000:]}\n")
        return process.returncode, float("nan")
    return 0, json.loads(process.stdout.splitlines()[-1])


def main() -> None:
    """Print the table, or, in a process of its own, the figure of one combination."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs=3, metavar=("ARCHITECTURE", "STORAGE", "COMPILER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.only:
        print(json.dumps(difference(*options.only, steps=options.steps)))
        return
    combinations = itertools.cycle(itertools.product(ARCHITECTURES, STORAGES, COMPILERS))
    found: dict[tuple[str, ...], list[tuple[int, float]]] = collections.defaultdict(list)
    for combination in itertools.islice(combinations, options.runs):
        found[combination].append(_run(options, *combination))
    failed = sum(status != 0 for results in found.values() for status, _ in results)
    table = Table(
        title=f"{options.runs} runs, {failed} ended badly; {machine()}",
        caption=f"largest difference of a weight after {options.steps} steps",
    )
    for column in ("architecture", "weights", "compiler", "runs", "ended badly", "difference"):
        table.add_column(column)
    for combination, results in found.items():
        bad = sum(status != 0 for status, _ in results)
        worst = max((value for status, value in results if status == 0), default=float("nan"))
        table.add_row(*combination, str(len(results)), str(bad), f"{worst:.1e}")
    Console().print(table)


if __name__ == "__main__":
    main()
