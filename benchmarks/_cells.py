"""Cells of a comparison that are run one by one within a time budget; those that were not run are listed."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn
from torch.utils.data import Dataset

from fedmef_fx import Config
from fedmef_fx.federated import Contender, History, LocalTraining, MethodComparison, compare_methods
from fedmef_fx.federated.cells import cell_folder
from fedmef_fx.federated.checkpoint import FILE_NAME

__all__ = ["Problem", "run_cells"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What all contenders of a table share.

    Attributes:
        title: Of the table, and the name of its folder.
        model: Makes the model.
        clients: Makes the clients of a seed.
        test: Test set.
        config: As of `compare_methods`.
        training: As of `compare_methods`.
        rounds: Number of rounds.
    """

    title: str
    model: Callable[[], nn.Module]
    clients: Callable[[int], Sequence[Dataset[Any]]]
    test: Dataset[Any]
    config: Config
    training: LocalTraining
    rounds: int


def run_cells(
    problem: Problem,
    contenders: Sequence[Contender],
    seeds: Sequence[int],
    *,
    log: Path,
    until: float,
    console: Console,
    plot: bool = True,
) -> MethodComparison | None:
    """Run seed by seed and method by method until the time is over, and print the table of what there is.

    Args:
        problem: What is run.
        contenders: Rows.
        seeds: One cell per row and seed.
        log: Where cells are kept; finished ones are read, an interrupted one goes on.
        until: The `time.monotonic()` after which no new cell is started.
        console: Where to print.
        plot: Whether curves are drawn into the folder.
    """
    folder = log / "".join(c if c.isalnum() else "-" for c in problem.title)
    runs: dict[str, dict[int, History]] = {contender.label: {} for contender in contenders}
    failures: dict[str, dict[int, str]] = {}
    missing = []
    for seed in seeds:
        for contender in contenders:
            label = contender.label
            is_begun = (cell_folder(folder, label, seed) / FILE_NAME).exists()
            if time.monotonic() > until and not is_begun:
                missing.append(f"{label} seed {seed}")
                continue
            found = _cell(problem, contender, seed, folder)
            runs[label] |= found.runs.get(label, {})
            if label in found.failures:
                failures.setdefault(label, {}).update(found.failures[label])
            accuracy = found.runs[label][seed].test_accuracy if found.runs.get(label) else None
            console.print(f"  {problem.title}: {label}, seed {seed}: {accuracy}", highlight=False)
    done = {label: histories for label, histories in runs.items() if histories}
    console.print(f"\n{problem.title}", highlight=False)
    console.print(f"cells not run: {', '.join(missing) or 'none'}", highlight=False)
    if not done:
        return None
    comparison = MethodComparison(done, failures)
    console.print(comparison.to_markdown(), highlight=False, markup=False, soft_wrap=True)
    for label in done:
        console.print(f"  {label}: {comparison.accuracies(label)}", highlight=False, soft_wrap=True)
    comparison.save(folder / "rounds.csv")
    if plot:
        comparison.save(folder / "curves.png")
    return comparison


def _cell(problem: Problem, contender: Contender, seed: int, folder: Path) -> MethodComparison:
    try:
        return compare_methods(
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
    except Exception as error:
        return MethodComparison({}, {contender.label: {seed: f"{type(error).__name__}: {error}"}})
