"""`fit`: from a pretrained model and data to a file within limits.

1. The original is exported and scored; `sensitivity.py` scans what each layer can do without.
2. Every form of file - unstructured masks in a packed file, channel masks, each in float32 and int8, and int8 alone -
   gets the density that its bytes allow (`densities.py`).
3. Each is pruned gradually while it is fine-tuned with the original as teacher (`pruning.py`), exported, timed and
   scored in onnxruntime. One that came out too large is pruned a little more.
4. The best score within the limits wins; if none is within them, the one that misses them least, and the report says
   so.
"""

import copy
import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import nn

from fedmef_fx.display.sizes import parse_bytes
from fedmef_fx.errors import ConfigError
from fedmef_fx.export.freeze.freeze import freeze
from fedmef_fx.fitting.densities import density_within, packed_bytes
from fedmef_fx.fitting.files import FORMS, Files, Form
from fedmef_fx.fitting.pruning import Recipe, prunable_model, train, wanted_masks
from fedmef_fx.fitting.report import FitCandidate, FitReport
from fedmef_fx.fitting.samples import Loss, default_loss, default_score, read_samples
from fedmef_fx.fitting.sensitivity import LayerSensitivity, keep_shares, scan
from fedmef_fx.sparse_model.masks import masks, set_masks
from fedmef_fx.sparse_model.transformation import is_transformed

__all__ = ["fit"]

_SCANNED_BATCHES: Final = 4
_ATTEMPTS: Final = 3
_MARGIN: Final = 0.98  # aimed at, of max_bytes
_CHANNEL_DENSITIES: Final = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0625)


def fit(  # noqa: PLR0913 -- one argument per choice
    model: nn.Module,
    data: Any,
    *,
    max_bytes: int | str | None = None,
    max_latency_ms: float | None = None,
    evaluation: Any = None,
    example_inputs: tuple[Any, ...] | None = None,
    forms: Sequence[str] = tuple(FORMS),
    epochs: int = 8,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    distillation: float = 0.5,
    loss: Loss = default_loss,
    score: Callable[[Any, Any], float] = default_score,
    latency: Callable[[Path], float] | None = None,
    channel_multiple: int = 8,
    path: str | Path | None = None,
    seed: int = 0,
    on_progress: Callable[[str], object] | None = None,
) -> tuple[nn.Module, FitReport]:
    """Make a pretrained model small and fast enough.

    Args:
        model: A trained model; it does not change. A transformed one is frozen first.
        data: What to fine-tune on: a Dataset of (input, target), or such batches, gone through again and again.
        max_bytes: Limit of the ONNX file, e.g. 400_000 or "400kB".
        max_latency_ms: Limit of one call on `example_inputs`, as `latency` measures it.
        evaluation: What files are scored on; None holds out a fifth of `data`.
        example_inputs: Positional arguments of one call; None takes the first two samples of the data.
        forms: Which forms to try: "packed", "packed-int8", "channel", "channel-int8", "int8".
        epochs: Passes over the data for each form; half of them prune, the others fine-tune.
        batch_size: For a Dataset.
        learning_rate: Of AdamW.
        distillation: Share of the loss that is the divergence from the original's outputs.
        loss: Of an output and a target; cross-entropy for classes, else the mean squared error.
        score: Of an output (its tensors as a list) and a target; higher is better. Accuracy for classes.
        latency: Milliseconds of one call of the ONNX file with this path, where the runtime that counts is another one,
            on a phone for instance. None measures in onnxruntime, here and with torch's number of threads.
        channel_multiple: What numbers of channels are rounded to.
        path: Where to write the chosen file; None writes none that stays.
        seed: Of the order of the samples.
        on_progress: Called with a line for each step.

    Returns:
        The chosen model, plain and in eval mode, and the report. `export_onnx(model, path, example_inputs=...,
        **report.export_options)` makes its file.

    Raises:
        ConfigError: No limit, an unknown form, or a number out of range.
        DataError: Data that cannot be read.

    Example:
        >>> from fedmef_fx.data import load_digits
        >>> from fedmef_fx.models import digits_cnn
        >>> small, report = fit(digits_cnn(), load_digits()[0], max_bytes="100kB", forms=["packed"], epochs=1)
        >>> report.result.bytes <= 100_000
        True
    """
    limit = None if max_bytes is None else parse_bytes(max_bytes, name="max_bytes")
    _check(limit, max_latency_ms, forms, epochs=epochs, distillation=distillation)
    tell = on_progress or (lambda _: None)
    samples = read_samples(data, evaluation, batch_size=batch_size, seed=seed)
    original = freeze(model) if is_transformed(model) else copy.deepcopy(model).eval()
    examples = example_inputs or tuple(value[:2] for value in samples.evaluation[0].inputs)
    recipe = Recipe(epochs, learning_rate, distillation, loss)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        torch.manual_seed(seed)
        files = Files(Path(folder), examples, samples, score, limit, max_latency_ms, latency)
        search = _Search(original, files, recipe, channel_multiple, tell)
        made = search.run([FORMS[name] for name in forms])
        chosen = _best(made)
        result = made[chosen]
        if path is not None:
            shutil.copyfile(result.path, path)
        report = FitReport(
            tuple(one.candidate for one in made),
            chosen,
            limit,
            max_latency_ms,
            search.sensitivity,
            files.options(FORMS.get(result.candidate.form)),
            None if path is None else Path(path),
        )
    return result.model, report


def _check(
    max_bytes: int | None, max_latency_ms: float | None, forms: Sequence[str], *, epochs: int, distillation: float
) -> None:
    if max_bytes is None and max_latency_ms is None:
        raise ConfigError('fit: no limit; expected max_bytes, e.g. "400kB", or max_latency_ms, e.g. 5.0, or both')
    if max_latency_ms is not None and not max_latency_ms > 0:
        raise ConfigError(f"fit: max_latency_ms={max_latency_ms!r}; expected more than 0")
    unknown = [form for form in forms if form not in FORMS]
    if unknown or not forms:
        raise ConfigError(f"fit: forms={list(forms)!r}; expected some of {list(FORMS)}")
    if epochs < 1 or not 0 <= distillation <= 1:
        raise ConfigError(f"fit: epochs={epochs}, distillation={distillation}; expected at least 1, and 0 to 1")


class _Made(NamedTuple):
    candidate: FitCandidate
    model: nn.Module
    path: Path


@dataclasses.dataclass
class _Search:
    """One fit.

    Attributes:
        original: The model, plain.
        files: Makes files.
        recipe: How to train.
        channel_multiple: What numbers of channels are rounded to.
        tell: Takes lines about progress.
        sensitivity: Of the layers, once they are scanned.
    """

    original: nn.Module
    files: Files
    recipe: Recipe
    channel_multiple: int
    tell: Callable[[str], object]
    sensitivity: tuple[LayerSensitivity, ...] = ()

    def run(self, forms: Sequence[Form]) -> list[_Made]:
        """Make a file of the original and one of each form that may reach the limits."""
        first = _Made(*self.files.candidate(self.original, None, 1.0))
        self.tell(f"original: {first.candidate.bytes:,} bytes, score {first.candidate.score:.4f}")
        made = [first]
        for form in forms:
            one = self._form(form)
            if one is not None:
                self.tell(f"{form.name}: {one.candidate.bytes:,} bytes, score {one.candidate.score:.4f}")
                made.append(one)
        return made

    def _form(self, form: Form) -> _Made | None:
        if not form.granularity:
            return _Made(*self.files.candidate(self.original, form, 1.0))
        sparse = self._prunable(form)
        if form.granularity == "weight" and not self.sensitivity:
            batches = [batch for batch, _ in zip(self.files.samples.training(0), range(_SCANNED_BATCHES), strict=False)]
            self.sensitivity = scan(self.original, list(masks(sparse)), batches)
        density = self._first_density(sparse, form)
        if density >= 1.0 and form.granularity == "weight":
            density = 0.9  # the limits leave room: a little less costs nothing
        one: _Made | None = None
        for attempt in range(_ATTEMPTS):
            again = attempt > 0
            recipe = dataclasses.replace(self.recipe, epochs=max(1, self.recipe.epochs // 2)) if again else self.recipe
            at = wanted_masks(self._shares(form, density), channel_multiple=self.channel_multiple)
            train(sparse, self.original, self.files.samples, at, recipe, is_pruned=again)
            one = _Made(*self.files.candidate(sparse, form, density))
            smaller = self._smaller(one.candidate, density)
            if smaller is None:
                break
            density = smaller
        return one

    def _prunable(self, form: Form) -> nn.Module:
        return prunable_model(
            self.original,
            granularity=form.granularity,
            example_inputs=self.files.examples,
            channel_multiple=self.channel_multiple,
        )

    def _shares(self, form: Form, density: float) -> "dict[str, float] | float":
        return density if form.granularity == "channel" else keep_shares(self.sensitivity, density)

    def _smaller(self, candidate: FitCandidate, density: float) -> float | None:
        """The density of the next attempt; None where none is needed."""
        limit = self.files.max_bytes
        if not candidate.misses:
            return None
        ratio = 1.0
        if limit is not None and candidate.bytes > limit:
            ratio = _MARGIN * limit / candidate.bytes
        latency, allowed = candidate.latency_ms, self.files.max_latency_ms
        if allowed is not None and latency is not None and candidate.form.startswith("channel"):  # zeros are not faster
            ratio = min(ratio, allowed / latency)
        return None if ratio >= 1.0 else density * ratio

    def _first_density(self, sparse: nn.Module, form: Form) -> float:
        """What the bytes allow, from a file of the untrained model; channels also what the time allows."""
        limit = self.files.max_bytes
        if form.granularity == "channel":
            return self._channel_density(sparse, form)
        if limit is None:
            return 1.0
        total = sum(mask.numel() for mask in masks(sparse).values())
        probe = copy.deepcopy(sparse)
        at = wanted_masks(self._shares(form, 0.1), channel_multiple=self.channel_multiple)
        set_masks(probe, at(probe, 0.0))
        size = self.files.write(self.files.plain(probe, form), form, self.files.folder / "probe.onnx")
        rest = size - packed_bytes(total, 0.1, form.value_bytes)
        return density_within(_MARGIN * limit, lambda d: rest + packed_bytes(total, d, form.value_bytes))

    def _channel_density(self, sparse: nn.Module, form: Form) -> float:
        """The largest share of channels whose file, untrained, is within the limits."""
        for density in _CHANNEL_DENSITIES:
            probe = copy.deepcopy(sparse)
            at = wanted_masks(density, channel_multiple=self.channel_multiple)
            set_masks(probe, at(probe, 0.0))
            plain = self.files.plain(probe, form)
            weights = sum(parameter.numel() for parameter in plain.parameters())
            limit = self.files.max_bytes
            if limit is not None and form.value_bytes * weights > limit:
                continue  # without making a file
            candidate, _, _ = self.files.candidate(probe, form, density)
            if not candidate.misses:
                return density
        return _CHANNEL_DENSITIES[-1]


def _best(made: Sequence[_Made]) -> int:
    """The best score within the limits, of equal ones the smallest file; else the one that misses them least."""

    def rank(place: int) -> tuple[int, float, int]:
        one = made[place].candidate
        return (len(one.misses), -one.score, one.bytes)

    within = [place for place, one in enumerate(made) if not one.candidate.misses]
    if within:
        return min(within, key=rank)
    return min(range(len(made)), key=lambda place: (len(made[place].candidate.misses), made[place].candidate.bytes))
