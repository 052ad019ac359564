"""Keep a memory budget with the least error of the gradients, as measured on example inputs.

What is chosen, and in which order of preference:

1. Nothing that changes a gradient: pruned activations off (gamma 0: packing drops only zeros), parts of the batch
   (`fedmef_fx.micro_batches`) down to a small size, packed weights.
2. gamma per layer, at most `Config.activation_sparsity`, and formats of fewer bits. Forward and input gradients are
   exact under activation pruning, so that the error of a layer's weight gradient depends on its own gamma alone: one
   run per level of gamma measures every layer. Layers then give up accuracy in the order of bytes saved per error
   added, until the predicted peak fits (bisection). Of several formats the one with the least measured error wins.
3. Parts of fewer samples than `SMALLEST_PREFERRED`, where nothing else holds the budget.

Peaks are predicted (`fedmef_fx.memory(..., predict=True)`), with the shares that were kept when errors were measured.
"""

import dataclasses
import fnmatch
import math
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, get_args, get_type_hints

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fedmef_fx.config import Config
from fedmef_fx.errors import ConfigError
from fedmef_fx.memory.plan import LayerChoice, LayerLevels, MemoryPlan, moves, parse_bytes, shown_bytes
from fedmef_fx.memory.report import MemoryReport
from fedmef_fx.memory_report import memory
from fedmef_fx.micro_batches import batch_size_of, batch_statistics_in
from fedmef_fx.planned_model import PlannedModel, square_distance

__all__ = ["SMALLEST_PREFERRED", "Transform", "plan_memory"]

Transform = Callable[[Config], nn.Module]

SMALLEST_PREFERRED: Final = 4
_SAMPLES: Final = 16
"""Samples on which errors are measured: a sum over pixels and samples settles quickly."""
_RUNGS: Final = (("weight_storage", "packed"), ("packed_dtype", "bfloat16"), ("saved_precision", "int8"))


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
    gammas: list[float]
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
        self._predictions: dict[tuple[PlannedModel, tuple[float, ...], int | None], MemoryReport] = {}
        self._references: dict[str, dict[str, Tensor]] = {}
        self.batch, self.why_whole = _batch_size(args, kwargs)
        self._sample = (args, kwargs)
        if self.batch is not None:
            self._sample = pytree.tree_map_only(Tensor, operator.itemgetter(slice(_SAMPLES)), self._sample)

    def run(self) -> tuple[Config, MemoryPlan]:
        """Find the best setting that holds the budget."""
        best: _Candidate | None = None
        rung: PlannedModel | None = None
        for settings in self._settings():
            rung = self._model(settings)
            best = self._better(best, self._candidate(rung, self._sizes(rung)))
            if best is not None and best.error == 0.0:
                break
        if best is None and rung is not None:
            best = self._candidate(rung, self._sizes(rung, smallest=1))
            if best is None:
                self._refuse(rung)
        assert best is not None  # noqa: S101 -- _refuse raises
        return self._result(best)

    # What there is to choose from

    def _model(self, settings: dict[str, Any]) -> PlannedModel:
        """The model with some formats."""
        base = self.config.replace(memory_budget=None, micro_batch=None, layer_sparsity=(), **settings)
        return PlannedModel(self.transform(base), settings, self.limit, self._sample)

    def _settings(self) -> Iterator[dict[str, Any]]:
        """The configuration as it is, then with one format more at a time."""
        settings: dict[str, Any] = {}
        yield dict(settings)
        hints = get_type_hints(Config)
        for name, value in _RUNGS:
            if name in hints and value in get_args(hints[name]) and getattr(self.config, name) != value:
                settings[name] = value
                yield dict(settings)

    def _sizes(self, rung: PlannedModel, *, smallest: int = SMALLEST_PREFERRED) -> list[int | None]:
        """Sizes of parts, from the whole batch downwards."""
        left = batch_statistics_in(rung.model.train())
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
        given = [gamma for name, gamma in self.config.layer_sparsity if fnmatch.fnmatchcase(layer, name)]
        return min([self.config.activation_sparsity, *given[-1:]])

    def share(self, micro_batch: int | None) -> float:
        """Size of one part against what errors are measured on."""
        whole = self.batch or 1
        return (micro_batch or whole) / min(whole, _SAMPLES) if self.batch else 1.0

    # Candidates

    def _candidate(self, rung: PlannedModel, sizes: Sequence[int | None]) -> _Candidate | None:
        nothing = [0.0] * len(rung.sites)
        label = ", ".join(f"{name}={value}" for name, value in rung.settings.items()) or "as configured"
        size = self._leanest(rung, nothing, sizes)
        if self.predict(rung, nothing, size).peak <= self.budget:
            size = next(s for s in sizes if self.predict(rung, nothing, s).peak <= self.budget)
            return self._made(rung, nothing, size, f"{label}: gamma 0 holds it with {_parts(size)}")
        size = self._leanest(rung, rung.limits, sizes)
        least = self.predict(rung, rung.limits, size).peak
        if least > self.budget:
            self._say(f"{label}: no less than {shown_bytes(least)}, with {_parts(size)} and all dropped that may be")
            return None
        gammas = self._least(rung, rung.levels(self.reference(rung), self.share(size)), size)
        return self._made(rung, gammas, size, f"{label}: {_parts(size)}, and layers pruned by bytes per error")

    def _leanest(self, rung: PlannedModel, gammas: Sequence[float], sizes: Sequence[int | None]) -> int | None:
        """The size that takes least: the smallest, or the whole batch, for which no gradient has to be added up."""
        return min((sizes[0], sizes[-1]), key=lambda size: self.predict(rung, gammas, size).peak)

    def _least(self, rung: PlannedModel, layers: Sequence[LayerLevels], size: int | None) -> list[float]:
        """The fewest moves that hold the budget."""
        order = moves(layers)

        def after(count: int) -> list[float]:
            level = [0] * len(layers)
            for index in order[:count]:
                level[index] += 1
            return [layer.gammas[k] for layer, k in zip(layers, level, strict=True)]

        low, high = 0, len(order)
        while high - low > 1:
            middle = (low + high) // 2
            if self.predict(rung, after(middle), size).peak <= self.budget:
                high = middle
            else:
                low = middle
        return after(high)

    def _made(self, rung: PlannedModel, gammas: list[float], size: int | None, reason: str) -> _Candidate:
        peak, error = self.predict(rung, gammas, size).peak, 0.0
        self._say(f"{reason}: {shown_bytes(peak)}")
        if any(gammas) or set(rung.settings) - {"weight_storage"}:
            exact = self.reference(rung)
            found = rung.gradients(gammas)
            total = sum(float(g.double().square().sum()) for g in exact.values())
            error = math.sqrt(square_distance(found, exact, set(exact)) / total) if total else 0.0
        chosen = tuple(
            LayerChoice(layer, gamma, rung.nbytes(i, gamma, self.share(size)))
            for i, ((layer, _, _), gamma) in enumerate(zip(rung.sites, gammas, strict=True))
        )
        return _Candidate(rung.settings, size, gammas, chosen, peak, error)

    def _better(self, first: _Candidate | None, second: _Candidate | None) -> _Candidate | None:
        if first is None or second is None:
            return first or second
        chosen = min(first, second, key=lambda candidate: candidate.error)
        self._say(f"gradient errors {first.error:.2g} and {second.error:.2g}: the smaller one is taken")
        return chosen

    # Measurements

    def reference(self, rung: PlannedModel) -> dict[str, Tensor]:
        """Exact weight gradients, in the form in which the rung's model has its weights."""
        storage = str(rung.settings.get("weight_storage", self.config.weight_storage))
        if storage not in self._references:
            exact = {name: value for name, value in rung.settings.items() if name == "weight_storage"}
            same = rung if exact == rung.settings else self._model(exact)
            self._references[storage] = same.gradients([0.0] * len(same.sites))
        return self._references[storage]

    def predict(self, rung: PlannedModel, gammas: Sequence[float], micro_batch: int | None) -> MemoryReport:
        """What a step takes with some gammas, without running it."""
        key = (rung, tuple(gammas), micro_batch)
        if key not in self._predictions:
            rung.set(gammas)
            self._predictions[key] = memory(
                rung.model,
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

    def _refuse(self, rung: PlannedModel) -> None:
        size = self._leanest(rung, rung.limits, self._sizes(rung, smallest=1))
        floor = self.predict(rung, rung.limits, size)
        parts = ", ".join(f"{name} {shown_bytes(count)}" for name, count in floor.at_peak.items() if count)
        needs = [f"{name}={value!r}" for name, value in rung.settings.items()] + [_parts(size)]
        raise ConfigError(
            f"Config.memory_budget: {shown_bytes(self.budget)} cannot be reached; the floor is "
            f"{shown_bytes(floor.peak)} with {', '.join(needs)} and gamma {self.config.activation_sparsity:g} (then "
            f"{parts}; optimizer {self.config.budget_optimizer}); expected a budget of at least {floor.peak} bytes, a "
            "lower density, a higher activation_sparsity, or a smaller model"
        )

    def _result(self, best: _Candidate) -> tuple[Config, MemoryPlan]:
        pairs = dict.fromkeys((choice.layer, choice.gamma) for choice in best.layers)
        config = self.config.replace(
            memory_budget=None, micro_batch=best.micro_batch, layer_sparsity=tuple(pairs), **best.settings
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


def _batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | None, str]:
    try:
        return batch_size_of((args, kwargs)), ""
    except ConfigError as error:
        return None, str(error)
