"""Every pass by its name, and passes from text: `parse_passes("rescale-residuals; pack-weights")`."""

from collections.abc import Sequence
from typing import Final

from fedmef_fx.errors import ConfigError
from fedmef_fx.graph.pass_text import read_pass, split_passes
from fedmef_fx.graph.pipeline import Pass
from fedmef_fx.passes.compress_saved import CompressSaved
from fedmef_fx.passes.functionalize import FunctionalizeWeights
from fedmef_fx.passes.insert_masks import InsertMasks
from fedmef_fx.passes.normalize_kernels import NormalizeKernels
from fedmef_fx.passes.pack_weights import PackWeights
from fedmef_fx.passes.prune_activations import PruneActivations
from fedmef_fx.passes.replay_rewrites import ReplayRewrites
from fedmef_fx.passes.rescale_residuals import RescaleResiduals
from fedmef_fx.passes.shrink_saved import ShrinkSaved

__all__ = ["PASSES", "parse_pass", "parse_passes"]

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


def parse_pass(text: str, *, known: Sequence[type[Pass]] = PASSES) -> Pass:
    """The pass that a text such as `insert-masks{density=0.1}` describes, as a report writes it.

    Args:
        text: The name of a pass, and in braces the options that differ from their defaults.
        known: The passes that can be named.

    Raises:
        ConfigError: Another form, an unknown pass or option, or a value of another type.

    Example:
        >>> parse_pass("insert-masks{density=0.5, ignore=('head',)}").density
        0.5
    """
    return read_pass(text, known)


def parse_passes(passes: str | Sequence[Pass | str], *, known: Sequence[type[Pass]] = PASSES) -> tuple[Pass, ...]:
    """Passes from text, or from a sequence of passes and texts.

    Args:
        passes: One text, with `;` between passes; or a sequence of passes and of such texts.
        known: The passes that a text can name.

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


def _checked(step: Pass) -> Pass:
    if isinstance(step, type):
        raise ConfigError(f"passes: got the class {step.__name__}; expected a pass, e.g. {step.__name__}()")
    if not isinstance(getattr(step, "name", None), str) or not callable(getattr(step, "run", None)):
        raise ConfigError(
            f"passes: got {type(step).__name__}; expected a pass, with a name and run(program), or its text, e.g. "
            "'pack-weights'"
        )
    return step
