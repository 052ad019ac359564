"""Capturing what comes up after the transformation: another kind of call, and modules that were changed since."""

import contextlib
from collections.abc import Sequence
from typing import Final

from torch import fx, nn

from fedmef_fx.budget.layer_sparsity import apply_layer_levels
from fedmef_fx.capture import capture_call, capture_every_call, has_weights, neutral_surroundings
from fedmef_fx.config import Config
from fedmef_fx.errors import CaptureError, PassError
from fedmef_fx.graph.dispatch import RegionTable, capture_when_called, paused_regions
from fedmef_fx.graph.hooks import has_user_hooks, silent_hooks
from fedmef_fx.graph.pipeline import Pass, Pipeline
from fedmef_fx.graph.program import Program, Region
from fedmef_fx.graph.signature import Call
from fedmef_fx.graph.sites import kept_sites
from fedmef_fx.graph.verify import Verifier
from fedmef_fx.passes._reused_memory import withdraw_claims
from fedmef_fx.passes.functionalize import FunctionalizeWeights
from fedmef_fx.passes.insert_masks import InsertMasks
from fedmef_fx.passes.normalize_kernels import NormalizeKernels
from fedmef_fx.passes.pack_weights import PackWeights
from fedmef_fx.passes.replay_rewrites import ReplayRewrites
from fedmef_fx.passes.rescale_residuals import RescaleAllResiduals
from fedmef_fx.sparse_model.thresholds import set_late_thresholds
from fedmef_fx.sparse_model.transformation import Transformation
from fedmef_fx.transformation.packed_capture import dense_weights
from fedmef_fx.transformation.recipe import memory_passes

__all__ = ["extend_region"]

_ONCE: Final = (InsertMasks, NormalizeKernels, PackWeights)
"""What changes the stored weights, once for all graphs."""


def extend_region(
    module: nn.Module,
    table: RegionTable,
    call: Call | None,
    *,
    config: Config,
    passes: Sequence[Pass] = (),
    rescales: bool = False,
    transformation: Transformation | None = None,
) -> None:
    """Capture a region's owner for a kind of call that no graph serves yet, with the masks and kernels that it has.

    Args:
        module: The owner, in the mode of the call.
        table: Gains the graph; stays unchanged where the call cannot be captured faithfully.
        call: The call; None to capture what needs none.
        config: Of the transformation.
        passes: The caller's own passes of the transformation; those that change stored weights do not run again.
        rescales: Whether residual sums have their factor, because no Python code ran instead of the graphs.
        transformation: Of the model; None in a model that was pickled before it was passed on.

    Raises:
        FedmefError: One of the caller's passes failed, or left a program that breaks an invariant.
    """
    with neutral_surroundings(module), silent_hooks(module), paused_regions(module):
        _extend(module, table, call, config, passes, rescales)
        if transformation is not None:
            set_late_thresholds(transformation, module, table.path)


def _extend(
    module: nn.Module, table: RegionTable, call: Call | None, config: Config, passes: Sequence[Pass], rescales: bool
) -> None:
    table.attempts -= 1
    regions: list[Region] = []
    with contextlib.suppress(CaptureError), dense_weights(module, config, regions):
        try:
            regions += _captured(module, table, call)
            program = Program(module, list(regions), Transformation(config))
            residuals = (RescaleAllResiduals(),) if rescales else ()
            with kept_sites(module, is_new=not table.entries):
                Pipeline([*_replayed(config), *residuals, *memory_passes(config)]).run(program)
        except (CaptureError, PassError):
            regions.clear()
            return
        own_passes = [step for step in passes if not isinstance(step, _ONCE)]
        if own_passes:
            Pipeline(own_passes, after_pass=Verifier.of(program)).run(program)
            withdraw_claims(program)
        apply_layer_levels(regions, config)
    for region in regions:
        table.add(region)
        for graph in region.graphs.values():
            _capture_hooked(region, graph, table)


def _replayed(config: Config) -> tuple[Pass, ...]:
    return FunctionalizeWeights(config.ignore), ReplayRewrites(config.nsconv_statistics, config.ignore)


def _capture_hooked(region: Region, graph: fx.Graph, table: RegionTable) -> None:
    """Capture what is called as a module, because of its hooks, on its own."""
    for node in graph.find_nodes(op="call_module"):
        child = region.module(node)
        if child is not None and has_user_hooks(child) and list(child.children()) and has_weights(child):
            capture_when_called(child, region.full_name(str(node.target)), table.extend)


def _captured(module: nn.Module, table: RegionTable, call: Call | None) -> list[Region]:
    """The regions of a module: for all calls where its graph served all of them before, otherwise for this call."""
    if table.serves_all and not table.entries:
        try:
            return [Region(table.path, module, capture_every_call(module, call))]
        except CaptureError:
            if call is None:
                raise
    if call is None:
        raise CaptureError("without an example call")
    return capture_call(module, table.path, call)
