"""The passes that a configuration asks for, in order."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from fedmef_fx.config import SAVED_BITS, Config
from fedmef_fx.graph.pipeline import Pass
from fedmef_fx.passes.compress_saved import CompressSaved
from fedmef_fx.passes.functionalize import FunctionalizeWeights
from fedmef_fx.passes.insert_masks import InsertMasks
from fedmef_fx.passes.normalize_kernels import NormalizeKernels
from fedmef_fx.passes.pack_weights import PackWeights
from fedmef_fx.passes.prune_activations import PruneActivations
from fedmef_fx.passes.rescale_residuals import RescaleResiduals
from fedmef_fx.passes.shrink_saved import ShrinkSaved

__all__ = ["config_after", "memory_passes", "passes_of"]


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


def config_after(config: Config, passes: Iterable[Pass]) -> Config:
    """The configuration that also says what passes of the caller's did to weights and results.

    Checkpoints and later changes of masks go by it.

    Args:
        config: Of the transformation.
        passes: The caller's passes that rewrote something.
    """
    changes: dict[str, Any] = {}
    for step in passes:
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
                changes |= {name: getattr(step, name) for name in names}
            case NormalizeKernels():
                changes |= {"normalization": "nsconv", "nsconv_statistics": step.statistics}
            case RescaleResiduals():
                changes["residual"] = "rescale"
            case PackWeights():
                changes["weight_storage"] = "packed"
            case _:
                pass
    return config.replace(**changes) if changes else config
