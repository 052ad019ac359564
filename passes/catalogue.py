"""Every pass by its name, and passes from text: `parse_passes("rescale-residuals; pack-weights")`."""

from collections.abc import Sequence
from importlib import metadata
from typing import Final

from fedmef_fx.errors import CheckpointError, ConfigError
from fedmef_fx.graph.pass_text import read_pass, split_passes
from fedmef_fx.graph.pipeline import Pass, describe
from fedmef_fx.passes.compress_saved import CompressSaved
from fedmef_fx.passes.functionalize import FunctionalizeWeights
from fedmef_fx.passes.insert_masks import InsertMasks
from fedmef_fx.passes.normalize_kernels import NormalizeKernels
from fedmef_fx.passes.pack_weights import PackWeights
from fedmef_fx.passes.prune_activations import PruneActivations
from fedmef_fx.passes.replay_rewrites import ReplayRewrites
from fedmef_fx.passes.rescale_residuals import RescaleResiduals
from fedmef_fx.passes.shrink_saved import ShrinkSaved

__all__ = ["PASSES", "parse_pass", "parse_passes", "stored_passes"]

_GROUP: Final = "fedmef_fx.passes"
"""Entry points under which packages offer passes, each by its name."""

PASSES: Final[tuple[type[Pass], ...]] = (
    FunctionalizeWeights,
    InsertMasks,
    NormalizeKernels,
    RescaleResiduals,
    CompressSaved,
    ShrinkSaved,
    PruneActivations,
    PackWeights,
    ReplayRewrites,
)
"""The passes, in the order in which `transform` runs them; the last one is for graphs that are captured later."""


def parse_pass(text: str, *, known: Sequence[type[Pass]] | None = None) -> Pass:
    """The pass that a text such as `insert-masks{density=0.1}` describes, as a report writes it.

    Args:
        text: The name of a pass, and in braces the options that differ from their defaults.
        known: The passes that can be named; None for those of this package and of installed packages that offer some.

    Raises:
        ConfigError: Another form, an unknown pass or option, or a value of another type.

    Example:
        >>> parse_pass("insert-masks{density=0.5, ignore=('head',)}").density
        0.5
    """
    return read_pass(text, (*PASSES, *_installed(text)) if known is None else known)


def parse_passes(passes: str | Sequence[Pass | str], *, known: Sequence[type[Pass]] | None = None) -> tuple[Pass, ...]:
    """Passes from text, or from a sequence of passes and texts.

    Args:
        passes: One text, with `;` between passes; or a sequence of passes and of such texts.
        known: The passes that a text can name, as for `parse_pass`.

    Raises:
        ConfigError: As for `parse_pass`; or something that is no pass.

    Example:
        >>> [step.name for step in parse_passes("rescale-residuals; pack-weights")]
        ['rescale-residuals', 'pack-weights']
    """
    if isinstance(passes, str):
        return tuple(parse_pass(text, known=known) for text in split_passes(passes))
    if not isinstance(passes, Sequence):
        raise ConfigError(
            f"passes: got {type(passes).__name__}; expected a sequence of passes, e.g. passes=(PackWeights(),), or "
            "text, e.g. passes='pack-weights'"
        )
    found: list[Pass] = []
    for step in passes:
        found += parse_passes(step, known=known) if isinstance(step, str) else [_checked(step)]
    return tuple(found)


def stored_passes(texts: Sequence[str], offered: Sequence[Pass | type[Pass]]) -> tuple[Pass, ...]:
    """The passes that a file needs.

    Args:
        texts: As the file names them.
        offered: Passes of the caller's, or their classes. A pass is taken where its own text is in the file.

    Raises:
        CheckpointError: Some are nowhere to be found, or have other options now.
    """
    passes = {describe(step): step for step in offered if not isinstance(step, type)}
    classes = [step for step in offered if isinstance(step, type)]
    found: list[Pass] = []
    missing: list[str] = []
    for text in (single for several in texts for single in split_passes(several)):
        name = text.partition("{")[0].strip()
        known = (*PASSES, *_installed(text), *classes)
        if text in passes:
            found.append(passes[text])
        elif any(kind.name == name for kind in known):
            try:
                found.append(read_pass(text, known))
            except ConfigError as error:
                raise CheckpointError(f"load: a pass that the file needs has changed: {error}") from error
        else:
            missing.append(text)
    if missing:
        raise CheckpointError(
            f"load: the file needs passes that are not there: {', '.join(missing)}; expected an installed package that "
            f"offers them (entry points {_GROUP!r}), or the passes themselves: fedmef_fx.load(path, model, "
            "passes=[MyPass])"
        )
    return tuple(found)


def _installed(text: object) -> list[type[Pass]]:
    """The pass that an installed package offers under the name in a text; empty where none does."""
    name = str(text).partition("{")[0].strip()
    if any(step.name == name for step in PASSES):
        return []
    for point in metadata.entry_points(group=_GROUP, name=name):
        package = point.dist.name if point.dist is not None else point.value
        try:
            kind = point.load()
        except Exception as error:  # whatever the package raises
            raise ConfigError(
                f"pass {name}: importing {point.value} of {package} failed: {type(error).__name__}: {error}"
            ) from error
        is_pass = isinstance(kind, type) and callable(getattr(kind, "run", None))
        if not is_pass or getattr(kind, "name", None) != name:
            raise ConfigError(
                f"pass {name}: {point.value} of {package} is no pass of that name; expected a class with "
                f"name = {name!r} and run(program)"
            )
        return [kind]
    return []


def _checked(step: Pass) -> Pass:
    if isinstance(step, type):
        raise ConfigError(f"passes: got the class {step.__name__}; expected a pass, e.g. {step.__name__}()")
    if not isinstance(getattr(step, "name", None), str) or not callable(getattr(step, "run", None)):
        raise ConfigError(
            f"passes: got {type(step).__name__}; expected a pass, with a name and run(program), or its text, e.g. "
            "'pack-weights'"
        )
    return step
