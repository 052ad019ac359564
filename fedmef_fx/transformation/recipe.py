"""The passes that a configuration asks for, in order."""

from fedmef_fx.config import Config
from fedmef_fx.graph.pipeline import Pass
from fedmef_fx.passes.compress_saved import CompressSaved
from fedmef_fx.passes.functionalize import FunctionalizeWeights
from fedmef_fx.passes.insert_masks import InsertMasks
from fedmef_fx.passes.normalize_kernels import NormalizeKernels
from fedmef_fx.passes.pack_weights import PackWeights
from fedmef_fx.passes.prune_activations import PruneActivations
from fedmef_fx.passes.rescale_residuals import RescaleResiduals
from fedmef_fx.passes.shrink_saved import ShrinkSaved

__all__ = ["memory_passes", "passes_of"]


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

    With 8-bit codecs and nothing pruned, layers keep their inputs in 8 bits, too.
    """
    compressing = config.saved_precision == "int8"
    if config.activation_sparsity == 0 and not compressing:
        return ()
    options = (config.activation_sparsity, config.threshold_sample, config.threshold_interval, config.ignore)
    first = (CompressSaved(config.ignore),) if compressing else ()
    return (*first, ShrinkSaved(), PruneActivations(*options, config.packed_dtype))
