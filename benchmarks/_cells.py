"""Cells of a comparison, one method with one seed each, run one by one within a time budget and kept in a file.

The file has one JSON line per finished cell. A cell that was interrupted goes on in the round where it was, from a
folder beside the file. Several processes may share a file: each takes cells that no other is running.
"""

import contextlib
import dataclasses
import fcntl
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from _docs import fill
from _machine import machine
from rich.console import Console
from torch import nn
from torch.utils.data import Dataset

from fedmef_fx import Config
from fedmef_fx.display.sizes import shown_bytes
from fedmef_fx.federated import Contender, History, LocalTraining, MethodComparison, compare_methods
from fedmef_fx.federated.methods import method_of

__all__ = ["Problem", "run_cells"]

Key = tuple[str, int]  # label and seed


@dataclasses.dataclass(frozen=True)
class Problem:
    """What all contenders of a table share.

    Attributes:
        title: Of the table, and its place in the docs.
        model: Makes the model.
        clients: Makes the clients of a seed.
        test: Test set.
        config: As of `compare_methods`.
        training: As of `compare_methods`.
        rounds: Number of rounds.
        data: What the data is, in words; cells of other data are others.
    """

    title: str
    model: Callable[[], nn.Module]
    clients: Callable[[int], Sequence[Dataset[Any]]]
    test: Dataset[Any]
    config: Config
    training: LocalTraining
    rounds: int
    data: str

    def settings(self, contender: Contender) -> dict[str, Any]:
        """What a cell depends on beside its seed."""
        method = method_of(contender.method)
        return {
            "data": self.data,
            "rounds": self.rounds,
            "method": method.settings(),
            "config": json.loads(method.configure(contender.config or self.config).to_json()),
            "training": dataclasses.asdict(contender.training or self.training),
        }


def run_cells(
    problem: Problem,
    contenders: Sequence[Contender],
    seeds: Sequence[int],
    *,
    log: Path,
    until: float,
    console: Console,
    docs: Path | None = None,
    curves: Path | None = None,
) -> None:
    """Run seed by seed and method by method until the time is over, and print the table of what there is.

    Args:
        problem: What is run.
        contenders: Rows.
        seeds: One cell per row and seed.
        log: The file of finished cells.
        until: The `time.monotonic()` after which no cell is started or continued.
        console: Where to print.
        docs: A page whose place of the problem's title gets the table.
        curves: An image to draw accuracy by rounds and bytes into.
    """
    failures: dict[str, dict[int, str]] = {}
    for seed in seeds:
        for contender in contenders:
            key = (contender.label, seed)
            with _claimed(log, problem.title, key) as folder:
                is_done = key in _finished(problem, contenders, log)
                if folder is None or is_done or time.monotonic() > until:
                    continue
                _run_cell(problem, contender, seed, log=log, folder=folder, console=console, failures=failures)
    done = _finished(problem, contenders, log)
    machines = sorted({entry["machine"] for entry in _entries(problem, contenders, log)})
    missing = [f"{c.label} seed {seed}" for seed in seeds for c in contenders if (c.label, seed) not in done]
    text = _table(contenders, seeds, done)
    text += f"\nCells not run: {', '.join(missing) or 'none'}.\n"
    console.print(f"\n{problem.title}\n\n{text}", highlight=False, markup=False, soft_wrap=True)
    for label, reasons in failures.items():
        console.print(f"{label}: failed: {reasons}", highlight=False, markup=False, soft_wrap=True)
    if not done:
        return
    if docs is not None:
        fill(docs, problem.title, f"{text}\n" + "\n\n".join(machines))
    if curves is not None:
        runs: dict[str, dict[int, History]] = {}
        for (label, seed), history in done.items():
            runs.setdefault(label, {})[seed] = history
        MethodComparison(runs).save(curves)


def _run_cell(
    problem: Problem,
    contender: Contender,
    seed: int,
    *,
    log: Path,
    folder: Path,
    console: Console,
    failures: dict[str, dict[int, str]],
) -> None:
    start = time.process_time()
    try:
        found = compare_methods(
            problem.model,
            problem.clients,
            [contender],
            problem.config,
            rounds=problem.rounds,
            seeds=[seed],
            test=problem.test,
            training=problem.training,
            directory=folder,
        )
    except Exception as error:  # one cell that fails is not the end of the others
        failures.setdefault(contender.label, {})[seed] = f"{type(error).__name__}: {error}"
        return
    history = found.runs[contender.label][seed]
    entry = {
        "table": problem.title,
        "label": contender.label,
        "seed": seed,
        "settings": problem.settings(contender),
        "machine": machine(),
        "cpu_seconds": time.process_time() - start,
        "history": json.loads(history.to_json()),
    }
    with log.open("a") as lines:
        lines.write(json.dumps(entry) + "\n")
    shutil.rmtree(folder)
    told = f"{problem.title}: {contender.label}, seed {seed}: {history.test_accuracy}, {entry['cpu_seconds']:.0f} s"
    console.print(told, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _claimed(log: Path, title: str, key: Key) -> Iterator[Path | None]:
    """The folder of a cell, which no other process gets meanwhile; None where another has it.

    The lock goes with the process that holds it, however that ends.
    """
    name = "".join(c if c.isalnum() or c in ".-" else "-" for c in f"{title}-{key[0]}-{key[1]}")
    folder = log.with_name(f"{log.name}.cells") / name
    folder.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        folder.mkdir(parents=True, exist_ok=True)  # another process may have finished it between the two lines above
        yield folder


def _entries(problem: Problem, contenders: Sequence[Contender], log: Path) -> Iterator[dict[str, Any]]:
    """Lines of the file that were run with today's settings."""
    settings = {contender.label: json.dumps(problem.settings(contender)) for contender in contenders}
    for line in log.read_text().splitlines() if log.exists() else ():
        entry = json.loads(line)
        if entry["table"] == problem.title and settings.get(entry["label"]) == json.dumps(entry["settings"]):
            yield entry


def _finished(problem: Problem, contenders: Sequence[Contender], log: Path) -> dict[Key, History]:
    """Histories of these cells; of several the last."""
    return {
        (entry["label"], entry["seed"]): History.from_json(json.dumps(entry["history"]))
        for entry in _entries(problem, contenders, log)
    }


def _table(contenders: Sequence[Contender], seeds: Sequence[int], done: Mapping[Key, History]) -> str:
    """Markdown, a row per contender that has run."""
    lines = [
        "| run | accuracy | each seed | loss | density | to clients | from clients | kept for backward |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for contender in contenders:
        found = [done[contender.label, seed] for seed in seeds if (contender.label, seed) in done]
        if not found:
            continue
        accuracies = [history.test_accuracy or 0.0 for history in found]
        last = [history.rounds[-1] for history in found]
        peak = max(record.peak_saved_bytes for history in found for record in history.rounds)
        cells = (
            contender.label,
            f"{statistics.median(accuracies):.4f}",
            " ".join(f"{accuracy:.4f}" for accuracy in accuracies),
            f"{statistics.median(record.test_loss or 0.0 for record in last):.3f}",
            f"{last[0].density:.3f}",
            shown_bytes(round(statistics.median(history.bytes_down for history in found))),
            shown_bytes(round(statistics.median(history.bytes_up for history in found))),
            shown_bytes(peak),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
