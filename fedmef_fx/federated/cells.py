"""`compare_methods`: the same clients, seeds and budget for several methods, cell by cell, resumable.

A cell is one method with one seed: a run of `engine.run` with a folder of its own. A comparison that was interrupted
continues in the round where it was; cells that are finished are read.
"""

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from fedmef_fx.config import Config, check_config
from fedmef_fx.errors import CheckpointError, ConfigError, FedmefError
from fedmef_fx.federated.comparison import MethodComparison
from fedmef_fx.federated.engine import run
from fedmef_fx.federated.history import History
from fedmef_fx.federated.local import LocalTraining, LossFunction
from fedmef_fx.federated.methods import Method, method_of
from fedmef_fx.federated.rounds import RoundRecord

__all__ = ["Contender", "cell_folder", "compare_methods"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """A row of a comparison.

    Attributes:
        label: What it is called; unique.
        method: A name in `METHODS`, or policies of one's own.
        config: Its configuration; None for that of the comparison. The seed is always the cell's.
        training: How its clients train; None for that of the comparison.
    """

    label: str
    method: str | Method = "fedmef"
    config: Config | None = None
    training: LocalTraining | None = None


def compare_methods(  # noqa: PLR0913  # the options of `run`, and what is compared
    model: nn.Module | Callable[[], nn.Module],
    clients: Sequence[Dataset[Any]] | Callable[[int], Sequence[Dataset[Any]]],
    methods: Sequence[str | Method | Contender],
    config: Config | None = None,
    *,
    rounds: int,
    seeds: Sequence[int] = (0,),
    test: Dataset[Any] | None = None,
    clients_per_round: int | None = None,
    training: LocalTraining | Mapping[str, Any] | None = None,
    loss_fn: LossFunction = F.cross_entropy,
    directory: str | Path | None = None,
    resume: bool = True,
    progress: Callable[[str, int, RoundRecord], None] | None = None,
    device: torch.device | str | None = None,
) -> MethodComparison:
    """Run several methods on the same clients with the same seeds and budget.

    A seed fixes initial weights, masks, sampled clients and batches; all methods start from the same weights. A cell
    that fails, by divergence for instance, is noted and the others go on.

    Args:
        model: Makes the model, called under the cell's seed; or a model, from which every cell then starts.
        clients: One data set per client; or makes them of a seed, so that partitions differ between seeds.
        methods: Names, methods, or contenders with configurations of their own.
        config: Of all that have none of their own; None for `Config()`.
        rounds: Number of rounds.
        seeds: One cell per method and seed.
        test: Test set for the global model after every round.
        clients_per_round: As of `run`.
        training: Of all that have none of their own, a `LocalTraining` or its fields as a dictionary; None for
            `LocalTraining()`.
        loss_fn: Mean loss of a batch of outputs and targets.
        directory: Where cells are kept, to go on after an interruption; made if it is missing.
        resume: Go on with what is in the directory, which has to belong to the same settings; False starts over.
        progress: Called as `progress(label, seed, record)` after every round.
        device: As of `run`.

    Returns:
        All histories, with `failures`.

    Raises:
        ConfigError: Arguments that cannot be used, or all cells failed.
        CheckpointError: A cell in the directory belongs to another comparison, or is damaged.

    Example:
        >>> found = compare_methods(digits_cnn, clients, ["fedmef", "fedavg"], rounds=5, test=test)  # doctest: +SKIP
        >>> found.save("curves.png")  # doctest: +SKIP
    """
    check_config(config, where="compare_methods")
    contenders = _contenders(methods)
    _check_seeds(seeds)
    runs: dict[str, dict[int, History]] = {contender.label: {} for contender in contenders}
    failures: dict[str, dict[int, str]] = {}
    # Seed by seed, so that an interrupted comparison has whole columns.
    for seed in seeds:
        data = clients(seed) if callable(clients) else clients
        for contender in contenders:
            folder = None if directory is None else cell_folder(directory, contender.label, seed)
            try:
                runs[contender.label][seed] = run(
                    _model(model, seed),
                    data,
                    (contender.config or config or Config()).replace(seed=seed),
                    rounds=rounds,
                    test=test,
                    clients_per_round=clients_per_round,
                    training=contender.training or training,
                    method=contender.method,
                    loss_fn=loss_fn,
                    checkpoint_dir=folder,
                    resume="exact" if resume else False,  # cells share one budget
                    progress=_progress(progress, contender.label, seed),
                    device=device,
                )
            except CheckpointError:
                raise
            except FedmefError as error:
                failures.setdefault(contender.label, {})[seed] = str(error)
    if not any(runs.values()):
        label, reasons = next(iter(failures.items()))
        raise ConfigError(f"compare_methods: every cell failed; {label}, seed {min(reasons)}: {reasons[min(reasons)]}")
    return MethodComparison(runs, failures)


def _progress(
    progress: Callable[[str, int, RoundRecord], None] | None, label: str, seed: int
) -> Callable[[RoundRecord], None] | None:
    return None if progress is None else lambda record: progress(label, seed, record)


def _model(model: nn.Module | Callable[[], nn.Module], seed: int) -> nn.Module:
    if isinstance(model, nn.Module):
        return copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = model()
    if not isinstance(made, nn.Module):
        raise ConfigError(f"compare_methods: model() returned a {type(made).__name__}; expected an nn.Module")
    return made


def _contenders(methods: Sequence[str | Method | Contender]) -> list[Contender]:
    if isinstance(methods, str) or not methods:
        raise ConfigError(f"compare_methods: methods: got {methods!r}; expected several, e.g. ['fedmef', 'fedavg']")
    found = []
    for method in methods:
        if isinstance(method, Contender):
            contender = dataclasses.replace(method, method=method_of(method.method))
        else:
            chosen = method_of(method)
            contender = Contender(label=chosen.name, method=chosen)
        found.append(contender)
    slugs = [_slug(contender.label) for contender in found]
    for contender, slug in zip(found, slugs, strict=True):
        if not slug or slugs.count(slug) > 1:
            labels = ", ".join(repr(c.label) for c in found)
            raise ConfigError(
                f"compare_methods: got labels {labels}; expected labels that differ in letters or digits, as they name "
                f"folders: {contender.label!r} does not; give Contender(label=..., method=...)"
            )
    return found


def cell_folder(directory: str | Path, label: str, seed: int) -> Path:
    """Where a cell is kept: the `checkpoint_dir` of its run."""
    return Path(directory) / f"{_slug(label)}-seed-{seed}"


def _slug(label: str) -> str:
    """A label as the name of a folder."""
    return re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-.")


def _check_seeds(seeds: Sequence[int]) -> None:
    are_integers = not isinstance(seeds, str) and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not seeds or not are_integers or len(set(seeds)) != len(seeds):
        raise ConfigError(f"compare_methods: seeds: got {seeds!r}; expected different integers >= 0, e.g. (0, 1, 2)")
