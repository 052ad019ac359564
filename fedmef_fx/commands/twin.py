"""What a transformed model is compared with: the same masks, but BatchNorm and dense saved activations."""

import copy

from torch import nn

import fedmef_fx
from fedmef_fx.config import Config
from fedmef_fx.model import register_mask

__all__ = ["masked_after_steps", "masked_dense_twin"]


def masked_dense_twin(model: nn.Module, config: Config) -> nn.Module:
    """The model with the masks of a configuration and nothing else changed."""
    return fedmef_fx.transform(model, config.replace(normalization="keep", activation_sparsity=0.0))


def masked_after_steps(model: nn.Module, transformed: nn.Module) -> nn.Module:
    """The original model with a transformed one's masks as buffers, as if its weights were multiplied after each step.

    That is how FedDST, FedTiny and FedPruning train. It keeps no second copy of a weight, so that it takes less than
    a model that masks its weights in forward: the fair baseline for memory.
    """
    twin = copy.deepcopy(model)
    for name, mask in fedmef_fx.masks(transformed).items():
        register_mask(twin, name, mask)
    return twin
