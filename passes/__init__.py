"""The graph passes, one per file, and what authors of passes need; `docs/passes.md` shows how to write one."""

if __name__ != "fedmef_fx.passes":
    raise ImportError(f"import fedmef_fx.passes, not {__name__}: two copies of one class would not be equal")

from fedmef_fx.graph.nodes import (
    is_layer,
    is_view,
    layers,
    operator_at,
    single_user,
    source_of_weight,
    without_views,
)
from fedmef_fx.graph.origin import module_of, provenance, set_provenance
from fedmef_fx.graph.pipeline import Pass, Pipeline, describe
from fedmef_fx.graph.program import Program, Region
from fedmef_fx.graph.verify import Verifier
from fedmef_fx.passes.catalogue import PASSES, parse_pass, parse_passes
from fedmef_fx.passes.compress_saved import CompressSaved
from fedmef_fx.passes.functionalize import FunctionalizeWeights
from fedmef_fx.passes.insert_masks import InsertMasks
from fedmef_fx.passes.normalize_kernels import NormalizeKernels
from fedmef_fx.passes.pack_weights import PackWeights
from fedmef_fx.passes.prune_activations import PruneActivations
from fedmef_fx.passes.replay_rewrites import ReplayRewrites
from fedmef_fx.passes.rescale_residuals import RescaleResiduals
from fedmef_fx.passes.shrink_saved import ShrinkSaved
from fedmef_fx.records.passes import PassReport, PassResult, Refusal

__all__ = [
    "PASSES",
    "CompressSaved",
    "FunctionalizeWeights",
    "InsertMasks",
    "NormalizeKernels",
    "PackWeights",
    "Pass",
    "PassReport",
    "PassResult",
    "Pipeline",
    "Program",
    "PruneActivations",
    "Refusal",
    "Region",
    "ReplayRewrites",
    "RescaleResiduals",
    "ShrinkSaved",
    "Verifier",
    "describe",
    "is_layer",
    "is_view",
    "layers",
    "module_of",
    "operator_at",
    "parse_pass",
    "parse_passes",
    "provenance",
    "set_provenance",
    "single_user",
    "source_of_weight",
    "without_views",
]
