"""Step time and live peak of this tree against another one, such as the last release or the commit before a change.

    git worktree add ../before REVISION
    python benchmarks/against.py ../before [--models resnet18 mobilenet_v2] [--batch 64] [--steps 11] [--threads 1]

Each tree runs in a process of its own, with the same model, configuration and data; steps alternate, so that whatever
else the machine does falls on both. The figure is the median of the ratios of paired steps, this tree over the other,
with quartiles, of elapsed time and of the processes' own processor time. The live peak is that of `fedmef_fx.memory`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from _machine import machine
from rich.console import Console
from rich.table import Table

THIS_TREE = Path(__file__).resolve().parents[1]


class Worker:
    """The process of one tree."""

    def __init__(self, tree: Path, *arguments: str) -> None:
        command = [sys.executable, str(Path(__file__).with_name("_step_worker.py")), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        self._process = subprocess.Popen(  # noqa: S603 -- a program of our own
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        first = self._read()
        if not Path(first["package"]).is_relative_to(tree):
            raise SystemExit(f"got the package at {first['package']}; expected the one in {tree}")
        self.peak: int = first["peak"]

    def step(self) -> tuple[float, float]:
        """Elapsed and processor time of one step, in seconds."""
        if self._process.stdin is not None:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        elapsed, used = self._read()
        return elapsed, used

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _read(self) -> Any:
        line = "" if self._process.stdout is None else self._process.stdout.readline()
        if not line:
            raise SystemExit("a worker ended early; its error stands above")
        return json.loads(line)


def _described(ratios: list[float]) -> str:
    low, median, high = statistics.quantiles(ratios, n=4)
    return f"{median:.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=lambda text: Path(text).resolve(), help="the other tree")
    parser.add_argument("--models", nargs="+", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--config", default='{"density": 0.1, "activation_sparsity": 0.9, "weight_storage": "dense"}')
    options = parser.parse_args()
    table = Table(
        title=f"This tree over {options.tree.name}, batch {options.batch}, {options.threads} threads, "
        f"{options.config}; {machine()}"
    )
    for column in ("model", "elapsed time", "processor time", "live peak"):
        table.add_column(column, justify="right")
    for model in options.models:
        arguments = (model, str(options.batch), str(options.threads), options.config)
        own, other = Worker(THIS_TREE, *arguments), Worker(options.tree, *arguments)
        own.step(), other.step()
        pairs = [(own.step(), other.step()) for _ in range(options.steps)]
        own.close(), other.close()
        ratios = ([mine[kind] / theirs[kind] for mine, theirs in pairs] for kind in (0, 1))
        table.add_row(model, *map(_described, ratios), f"{own.peak / other.peak:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
