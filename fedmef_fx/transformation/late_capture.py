"""Capturing a kind of call that comes up after the transformation."""

from collections.abc import Sequence
from typing import Final

from torch import nn

from fedmef_fx.budget.layer_sparsity import apply_layer_levels
from fedmef_fx.capture import capture_call, neutral_surroundings
from fedmef_fx.config import Config
from fedmef_fx.errors import CaptureError, PassError
from fedmef_fx.graph.dispatch import RegionTable
from fedmef_fx.graph.pipeline import Pass, Pipeline
from fedmef_fx.graph.program import Program
from fedmef_fx.graph.signature import Call
from fedmef_fx.graph.verify import Verifier
from fedmef_fx.passes.functionalize import FunctionalizeWeights
from fedmef_fx.passes.insert_masks import InsertMasks
from fedmef_fx.passes.normalize_kernels import NormalizeKernels
from fedmef_fx.passes.pack_weights import PackWeights
from fedmef_fx.passes.replay_rewrites import ReplayRewrites
from fedmef_fx.sparse_model.transformation import Transformation
from fedmef_fx.transformation.recipe import memory_passes

__all__ = ["extend_region"]

_ONCE: Final = (InsertMasks, NormalizeKernels, PackWeights)
"""What changes the stored weights, once for all graphs."""


def extend_region(
    module: nn.Module, table: RegionTable, call: Call, *, config: Config, passes: Sequence[Pass] = ()
) -> None:
    """Capture a region's owner for a kind of call that no graph serves yet, with the masks and kernels that it has.

    Args:
        module: The owner, in the mode of the call.
        table: Gains the graph; stays unchanged where the call cannot be captured faithfully.
        call: The call.
        config: Of the transformation.
        passes: The caller's own passes of the transformation; those that change stored weights do not run again.

    Raises:
        FedmefError: One of the caller's passes failed, or left a program that breaks an invariant.
    """
    with neutral_surroundings(module):
        _extend(module, table, call, config, passes)


def _extend(module: nn.Module, table: RegionTable, call: Call, config: Config, passes: Sequence[Pass]) -> None:
    table.attempts -= 1
    try:
        regions = capture_call(module, table.path, call)
        program = Program(module, list(regions), Transformation(config))
        replayed = (FunctionalizeWeights(config.ignore), ReplayRewrites(config.nsconv_statistics, config.ignore))
        Pipeline([*replayed, *memory_passes(config)]).run(program)
    except (CaptureError, PassError):
        return
    own_passes = [step for step in passes if not isinstance(step, _ONCE)]
    if own_passes:
        Pipeline(own_passes, after_pass=Verifier.of(program)).run(program)
    apply_layer_levels(regions, config)
    for region in regions:
        table.add(region)
