"""Capture: from any nn.Module to regions of torch.fx graphs that are right in train and in eval mode."""

from fedmef_fx.capture.leaves import is_plain_layer, layer_region, leaf_regions
from fedmef_fx.capture.per_call import capture_call, capture_every_call
from fedmef_fx.capture.regions import Captured, capture_model, has_weights
from fedmef_fx.capture.state import fixed_seed
from fedmef_fx.capture.surroundings import neutral_surroundings, ordinary_tensors
from fedmef_fx.capture.symbolic import capture_graphs
from fedmef_fx.module_tree import duplicate_of

__all__ = [
    "Captured",
    "capture_call",
    "capture_every_call",
    "capture_graphs",
    "capture_model",
    "duplicate_of",
    "fixed_seed",
    "has_weights",
    "is_plain_layer",
    "layer_region",
    "leaf_regions",
    "neutral_surroundings",
    "ordinary_tensors",
]
