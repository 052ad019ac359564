"""What a transformed model is compared with: the same masks, but BatchNorm and dense saved activations."""

from torch import nn

import fedmef_fx
from fedmef_fx.config import Config

__all__ = ["masked_dense_reference"]


def masked_dense_reference(model: nn.Module, config: Config) -> nn.Module:
    """The model with the masks of a configuration and nothing else changed."""
    plain = config.replace(
        normalization="keep", activation_sparsity=0.0, saved_precision="exact", weight_storage="dense"
    )
    return fedmef_fx.transform(model, plain)
