"""Sparse training as tensor math: allocation, masks, adjustment, extrusion schedule; nothing here knows graphs."""

from fedmef_fx.sparsity.adjust import adjust_mask, lowest_magnitude
from fedmef_fx.sparsity.allocation import allocate
from fedmef_fx.sparsity.extrusion_schedule import extrusion_rate, floored_rate, rex
from fedmef_fx.sparsity.granularity import Layout, Pattern, parse_granularity
from fedmef_fx.sparsity.masks import magnitude_masks, random_masks
from fedmef_fx.sparsity.patterns import (
    adjust_pattern,
    allocate_channels,
    best_in_groups,
    lowest_in_groups,
    pattern_mask,
    random_pattern_mask,
    row_norms,
)
from fedmef_fx.sparsity.schedule import adjustment_count, is_adjustment_round
from fedmef_fx.sparsity.sparse_gradient import SparseGradient, average_sparse_gradients

__all__ = [
    "Layout",
    "Pattern",
    "SparseGradient",
    "adjust_mask",
    "adjust_pattern",
    "adjustment_count",
    "allocate",
    "allocate_channels",
    "average_sparse_gradients",
    "best_in_groups",
    "extrusion_rate",
    "floored_rate",
    "is_adjustment_round",
    "lowest_in_groups",
    "lowest_magnitude",
    "magnitude_masks",
    "parse_granularity",
    "pattern_mask",
    "random_masks",
    "random_pattern_mask",
    "rex",
    "row_norms",
]
