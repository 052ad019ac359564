"""The passes that a configuration asks for, in order."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Final

from fedmef_fx.config import SAVED_BITS, Config
from fedmef_fx.graph.pipeline import Pass, describe
from fedmef_fx.passes.compress_saved import CompressSaved
from fedmef_fx.passes.functionalize import FunctionalizeWeights
from fedmef_fx.passes.insert_masks import InsertMasks
from fedmef_fx.passes.normalize_kernels import NormalizeKernels
from fedmef_fx.passes.pack_weights import PackWeights
from fedmef_fx.passes.prune_activations import PruneActivations
from fedmef_fx.passes.rescale_residuals import RescaleResiduals
from fedmef_fx.passes.shrink_saved import ShrinkSaved
from fedmef_fx.records.passes import PassResult

__all__ = ["config_after", "memory_passes", "passes_of"]

_IN_FIELDS: Final = (InsertMasks, NormalizeKernels, RescaleResiduals, PackWeights)
"""Passes whose effect the fields of `Config` say."""


def passes_of(config: Config) -> tuple[Pass, ...]:
    """The passes that a configuration asks for, in order."""
    steps: list[Pass] = [
        FunctionalizeWeights(config.ignore),
        InsertMasks(
            config.density,
            config.allocation,
            config.mask_init,
            config.seed,
            config.ignore,
            config.granularity,
            config.channel_multiple,
            config.output_layer,
            config.mask_frozen,
        ),
    ]
    if config.normalization == "nsconv":
        steps.append(NormalizeKernels(config.nsconv_statistics, config.ignore))
        if config.residual == "rescale":
            steps.append(RescaleResiduals())
    steps += memory_passes(config)
    return (*steps, PackWeights()) if config.weight_storage == "packed" else tuple(steps)


def memory_passes(config: Config) -> tuple[Pass, ...]:
    """The passes that shrink what autograd keeps.

    Where `saved_precision` says how many bits, and layers' inputs are neither pruned nor coded, layers keep these so,
    too.
    """
    if config.activation_sparsity == 0 and config.activation_bits is None and config.saved_precision == "exact":
        return ()
    fields = [field.name for field in dataclasses.fields(PruneActivations)]
    pruning = PruneActivations(**{name: getattr(config, name) for name in fields})
    if config.saved_precision == "exact":
        return ShrinkSaved(), pruning
    bits = SAVED_BITS[config.saved_precision]
    if bits < 8 and config.activation_sparsity == 0 and config.activation_bits is None:
        pruning = dataclasses.replace(pruning, activation_bits=bits)
    return CompressSaved(config.ignore, config.saved_precision), ShrinkSaved(), pruning


def config_after(config: Config, ran: Iterable[tuple[Pass, PassResult]]) -> Config:
    """The configuration that also says what passes of the caller's did, so that it makes the same model again.

    Checkpoints and later changes of masks go by it.

    Args:
        config: Of the transformation.
        ran: The caller's passes that ran, and what they did.
    """
    changes: dict[str, Any] = {}
    texts = []
    for step, result in ran:
        if not isinstance(step, _IN_FIELDS):
            texts.append(describe(step))
        elif result.modified:
            changes |= _fields_of(step)
    return config.replace(**changes, passes=tuple(texts)) if changes or texts else config


def _fields_of(step: Pass) -> dict[str, Any]:
    """The fields of `Config` that stand for a pass."""
    match step:
        case InsertMasks():
            names = (
                "density",
                "allocation",
                "mask_init",
                "seed",
                "granularity",
                "channel_multiple",
                "output_layer",
                "mask_frozen",
            )
            return {name: getattr(step, name) for name in names}
        case NormalizeKernels():
            return {"normalization": "nsconv", "nsconv_statistics": step.statistics}
        case RescaleResiduals():
            return {"residual": "rescale"}
        case _:
            return {"weight_storage": "packed"}
