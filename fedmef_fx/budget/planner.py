"""Keep a memory budget with the least error of the gradients, as measured on example inputs.

What is chosen, and in which order of preference:

1. Nothing that changes a gradient: pruned activations off (gamma 0: packing drops only zeros), parts of the batch
   (`fedmef_fx.training.micro_batches`) down to a small size, packed weights.
2. gamma per layer, at most `Config.activation_sparsity`, bits per layer, at least `Config.activation_bits` where that
   is given, and formats of fewer bits. Forward and input gradients are exact whatever is kept for weight gradients, so
   that the error of a layer's weight gradient depends on its own level (gamma and bits) alone: one run per level
   measures every layer, for all formats. Layers then give up accuracy in the order of bytes saved per error added,
   until the predicted peak fits; or all alike, where that costs less. Of several formats the one with the least
   measured error wins.
3. Parts of fewer samples than `SMALLEST_PREFERRED`, where nothing else holds the budget.

Peaks are predicted (`fedmef_fx.memory(..., predict=True)`), with the shares that were kept when errors were measured.
"""

import bisect
import dataclasses
import fnmatch
import math
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, get_args, get_type_hints

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fedmef_fx.budget.plan import fewest_moves
from fedmef_fx.budget.trial import PlannedModel, square_distance
from fedmef_fx.config import Config
from fedmef_fx.display.sizes import parse_bytes, shown_bytes
from fedmef_fx.errors import ConfigError
from fedmef_fx.measure.memory import memory
from fedmef_fx.measure.report import MemoryReport
from fedmef_fx.records.memory_plan import LayerChoice, Level, MemoryPlan
from fedmef_fx.training.micro_batches import batch_size_of, batch_statistics_in

__all__ = ["SMALLEST_PREFERRED", "Transform", "plan_memory"]

Transform = Callable[[Config], nn.Module]

SMALLEST_PREFERRED: Final = 4
_SAMPLES: Final = 16
"""Samples on which errors are measured: a sum over pixels and samples settles quickly."""
_EXACT: Final = (("weight_storage", "packed"),)
_LOSSY: Final = (("packed_dtype", "bfloat16"), ("saved_precision", "int8"))


def plan_memory(
    config: Config,
    transform: Transform,
    example_inputs: Sequence[Any] | None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> tuple[Config, MemoryPlan]:
    """Choose the memory options of a configuration with a budget.

    Args:
        config: With `memory_budget`.
        transform: Transforms the model with a configuration that has none.
        example_inputs: Positional arguments of a call with the batch size of training.
        example_kwargs: Keyword arguments of it.

    Returns:
        The configuration with what was chosen, and the plan.

    Raises:
        ConfigError: No example inputs, or a budget below the smallest peak that can be reached.
    """
    budget = parse_bytes(config.memory_budget, name="Config.memory_budget")
    if example_inputs is None and example_kwargs is None:
        raise ConfigError(
            "Config.memory_budget: there are no example inputs; expected a batch of the size that training will use: "
            "fedmef_fx.transform(model, config, example_inputs=(batch,))"
        )
    if isinstance(example_inputs, Tensor):
        raise ConfigError("transform: example_inputs is a tensor; expected a tuple of arguments: example_inputs=(x,)")
    search = _Search(config, budget, transform, tuple(example_inputs or ()), dict(example_kwargs or {}))
    return search.run()


@dataclasses.dataclass
class _Candidate:
    """A setting that holds the budget."""

    settings: dict[str, Any]
    micro_batch: int | None
    levels: list[Level]
    layers: tuple[LayerChoice, ...]
    peak: int
    error: float


class _Search:
    """The search for one budget."""

    def __init__(
        self, config: Config, budget: int, transform: Transform, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.config, self.budget, self.transform, self.args, self.kwargs = config, budget, transform, args, kwargs
        self.reasons: list[str] = []
        self.started = time.perf_counter()
        self._predictions: dict[tuple[PlannedModel, tuple[Level, ...], int | None], MemoryReport] = {}
        self.batch, self.why_whole = _batch_size(args, kwargs)
        self._sample = (args, kwargs)
        if self.batch is not None:
            self._sample = pytree.tree_map_only(Tensor, operator.itemgetter(slice(_SAMPLES)), self._sample)

    def run(self) -> tuple[Config, MemoryPlan]:
        """Find the best setting that holds the budget; errors are measured only if nothing exact holds it."""
        exact: list[PlannedModel] = []
        for settings in self._settings(_EXACT, {}):
            trial = self._model(settings)
            exact.append(trial)
            unpruned = self._unpruned(trial, self._sizes(trial))
            if unpruned is not None:
                return self._result(unpruned)
        base = min(exact, key=lambda trial: self._least_of(trial, trial.nothing, self._sizes(trial))[1])
        best: _Candidate | None = None
        lossy: list[PlannedModel] = []
        for settings in self._settings(_LOSSY, base.settings):
            trial = base if settings == base.settings else self._model(settings, base)
            lossy.append(trial)
            candidate = self._candidate(trial, base, self._sizes(trial))
            best = self._better(best, candidate)
            if candidate is not None and candidate.levels == trial.nothing:
                break  # a further format could only add to the error
        if best is None:  # a further format may also take more: for a moment it needs both forms
            trial = min(lossy, key=lambda trial: self._least_of(trial, trial.limits, self._sizes(trial, smallest=1))[1])
            best = self._candidate(trial, base, self._sizes(trial, smallest=1))
            if best is None:
                self._refuse(trial)
        assert best is not None  # noqa: S101 -- _refuse raises
        return self._result(best)

    # What there is to choose from

    def _model(self, settings: dict[str, Any], measured: PlannedModel | None = None) -> PlannedModel:
        """The model with some formats."""
        base = self.config.replace(memory_budget=None, micro_batch=None, layer_sparsity=(), layer_bits=(), **settings)
        return PlannedModel(self.transform(base), settings, self.limit, self._sample, measured=measured)

    def _settings(self, formats: Sequence[tuple[str, str]], first: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Some settings, then with one format more at a time."""
        settings = dict(first)
        yield dict(settings)
        hints = get_type_hints(Config)
        for name, value in formats:
            if name in hints and value in get_args(hints[name]) and getattr(self.config, name) != value:
                settings[name] = value
                yield dict(settings)

    def _sizes(self, trial: PlannedModel, *, smallest: int = SMALLEST_PREFERRED) -> list[int | None]:
        """Sizes of parts, from the whole batch downwards."""
        left = batch_statistics_in(trial.model.train())
        if left or self.batch is None:
            reason = f"{left[0]} computes statistics of the batch" if left else self.why_whole
            self._say(f"the batch stays whole: {reason}")
            return [None]
        sizes: list[int | None] = [None]
        size = self.batch // 2
        while size >= smallest:
            sizes.append(size)
            size //= 2
        return sizes

    def limit(self, layer: str) -> float:
        """The most that may be dropped of a layer's input."""
        chosen = [gamma for name, gamma in self.config.layer_sparsity if fnmatch.fnmatchcase(layer, name)]
        return min([self.config.activation_sparsity, *chosen[-1:]])

    def share(self, micro_batch: int | None) -> float:
        """Size of one part against what errors are measured on."""
        whole = self.batch or 1
        return (micro_batch or whole) / min(whole, _SAMPLES) if self.batch else 1.0

    # Candidates

    def _unpruned(
        self, trial: PlannedModel, sizes: Sequence[int | None], base: PlannedModel | None = None
    ) -> "_Candidate | None":
        """A candidate that drops nothing but zeros, with the largest parts that hold the budget; None if none does."""
        size = self._largest(trial, sizes)
        if self.predict(trial, trial.nothing, size).peak > self.budget:
            return None
        return self._made(trial, base or trial, size, trial.nothing, f"gamma 0 holds it with {_parts(size)}")

    def _candidate(self, trial: PlannedModel, base: PlannedModel, sizes: Sequence[int | None]) -> _Candidate | None:
        unpruned = self._unpruned(trial, sizes, base)
        if unpruned is not None:
            return unpruned
        size, least = self._least_of(trial, trial.limits, sizes)
        if least > self.budget:
            self._say(
                f"{_label(trial)}: no less than {shown_bytes(least)}, with {_parts(size)} and all dropped that may be"
            )
            return None
        levels = trial.levels(self.share(size))
        priced = fewest_moves(levels, lambda candidate: self.predict(trial, candidate, size).peak, self.budget)
        candidate = self._made(trial, base, size, priced, f"{_parts(size)}, and layers pruned by bytes per error")
        # Prices know bytes, not which of them are alive at the peak: where it is narrow, an even hand can do better.
        even = self._evenly(trial, size)
        if even == priced:
            return candidate
        return self._better(candidate, self._made(trial, base, size, even, f"{_parts(size)}, and one level everywhere"))

    def _evenly(self, trial: PlannedModel, size: int | None) -> list[Level]:
        """The level of least error for all layers, as far as they may take it, that holds the budget."""
        holds = (found for found in trial.even_levels() if self.predict(trial, found, size).peak <= self.budget)
        return next(holds, trial.limits)

    def _largest(self, trial: PlannedModel, sizes: Sequence[int | None]) -> int | None:
        """The largest size that holds the budget with nothing pruned; one that does not if none does."""

        def holds(size: int | None) -> bool:
            return self.predict(trial, trial.nothing, size).peak <= self.budget

        if len(sizes) == 1 or holds(sizes[0]) or not holds(sizes[-1]):
            return sizes[0] if len(sizes) == 1 or holds(sizes[0]) else sizes[-1]
        return sizes[bisect.bisect_left(range(1, len(sizes) - 1), 1, key=lambda i: int(holds(sizes[i]))) + 1]

    def _least_of(
        self, trial: PlannedModel, levels: Sequence[Level], sizes: Sequence[int | None]
    ) -> tuple[int | None, int]:
        """The size that takes least, and its peak.

        It is the smallest, or the whole batch, for which no gradient has to be added up.
        """
        size = min((sizes[0], sizes[-1]), key=lambda size: self.predict(trial, levels, size).peak)
        return size, self.predict(trial, levels, size).peak

    def _made(
        self, trial: PlannedModel, base: PlannedModel, size: int | None, levels: list[Level], reason: str
    ) -> _Candidate:
        """A candidate, with its error against the gradients of the exact model."""
        peak, error = self.predict(trial, levels, size).peak, 0.0
        self._say(f"{_label(trial)}: {reason}: {shown_bytes(peak)}")
        if levels != trial.nothing or trial is not base:
            total = sum(float(g.double().square().sum()) for g in base.exact.values())
            distance = square_distance(trial.gradients(levels), base.exact, set(base.exact))
            error = math.sqrt(distance / total) if total else 0.0
        chosen = tuple(
            LayerChoice(layer, level.gamma, trial.nbytes(i, level, self.share(size)), level.bits)
            for i, ((layer, _, _), level) in enumerate(zip(trial.sites, levels, strict=True))
        )
        return _Candidate(trial.settings, size, levels, chosen, peak, error)

    def _better(self, first: _Candidate | None, second: _Candidate | None) -> _Candidate | None:
        if first is None or second is None:
            return first or second
        chosen = min(first, second, key=lambda candidate: candidate.error)
        self._say(f"gradient errors {first.error:.2g} and {second.error:.2g}: the smaller one is taken")
        return chosen

    # Measurements

    def predict(self, trial: PlannedModel, levels: Sequence[Level], micro_batch: int | None) -> MemoryReport:
        """What a step takes with some levels, without running it."""
        key = (trial, tuple(levels), micro_batch)
        if key not in self._predictions:
            trial.set(levels)
            self._predictions[key] = memory(
                trial.model,
                self.args,
                example_kwargs=self.kwargs,
                optimizer=self.config.budget_optimizer,
                micro_batch=micro_batch,
                predict=True,
            )
        return self._predictions[key]

    # Results

    def _say(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)

    def _refuse(self, trial: PlannedModel) -> None:
        size, _ = self._least_of(trial, trial.limits, self._sizes(trial, smallest=1))
        floor = self.predict(trial, trial.limits, size)
        parts = ", ".join(f"{name} {shown_bytes(count)}" for name, count in floor.at_peak.items() if count)
        needs = [f"{name}={value!r}" for name, value in trial.settings.items()] + [_parts(size)]
        least = Level(self.config.activation_sparsity, self.config.activation_bits)
        raise ConfigError(
            f"Config.memory_budget: {shown_bytes(self.budget)} cannot be reached; the floor is "
            f"{shown_bytes(floor.peak)} with {', '.join(needs)} and {least} (then "
            f"{parts}; optimizer {self.config.budget_optimizer}); expected a budget of at least {floor.peak} bytes, a "
            "lower density, a higher activation_sparsity, or a smaller model"
        )

    def _result(self, best: _Candidate) -> tuple[Config, MemoryPlan]:
        has_gammas, has_bits = self.config.activation_sparsity > 0, self.config.activation_bits is not None
        gammas = dict.fromkeys((choice.layer, choice.gamma) for choice in best.layers if has_gammas)
        bits = dict.fromkeys((choice.layer, choice.bits) for choice in best.layers if has_bits)
        config = self.config.replace(
            memory_budget=None,
            micro_batch=best.micro_batch,
            layer_sparsity=tuple(gammas),
            layer_bits=tuple(bits),
            **best.settings,
        )
        return config, MemoryPlan(
            budget=self.budget,
            predicted_peak=best.peak,
            optimizer=self.config.budget_optimizer,
            batch=self.batch,
            micro_batch=best.micro_batch,
            settings=best.settings,
            layers=best.layers,
            gradient_error=best.error,
            reasons=tuple(self.reasons),
            seconds=time.perf_counter() - self.started,
        )


def _parts(size: int | None) -> str:
    return "the whole batch" if size is None else f"micro-batches of {size}"


def _label(trial: PlannedModel) -> str:
    return ", ".join(f"{name}={value}" for name, value in trial.settings.items()) or "as configured"


def _batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | None, str]:
    try:
        return batch_size_of((args, kwargs)), ""
    except ConfigError as error:
        return None, str(error)
