"""Weight normalisation that stays finite where a mask leaves nothing of a row.

    w_i = g_i * v_i / ||v_i||

torch divides 0 by 0 where all weights of row i are masked. Here such a row is 0, with finite gradients.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ["SafeWeightNorm", "keep_weight_norms_finite", "weight_norm"]


def weight_norm(v: Tensor, g: Tensor, dim: int) -> Tensor:
    """The normalised weight.

    Args:
        v: Directions, any shape.
        g: Magnitudes, of v's shape along `dim` and 1 elsewhere.
        dim: The dimension that counts rows; -1 for one norm over everything.
    """
    norm: Tensor = torch.norm_except_dim(v, 2, dim)
    return v * (g / torch.where(norm == 0, 1.0, norm))


class SafeWeightNorm(parametrizations._WeightNorm):
    """torch's parametrization, with `weight_norm` of this module."""

    def forward(self, weight_g: Tensor, weight_v: Tensor) -> Tensor:
        """The weight from its magnitudes and directions."""
        return weight_norm(weight_v, weight_g, self.dim)


class _SafeWeightNormHook(WeightNorm):
    """torch's older hook, with `weight_norm` of this module."""

    def compute_weight(self, module: nn.Module) -> Tensor:
        return weight_norm(getattr(module, f"{self.name}_v"), getattr(module, f"{self.name}_g"), self.dim)


def keep_weight_norms_finite(model: nn.Module) -> None:
    """Let the weight norms of a model that is going to be masked compute with `weight_norm`, in place."""
    for module in model.modules():
        if type(module) is parametrizations._WeightNorm:
            module.__class__ = SafeWeightNorm
        for hook in module._forward_pre_hooks.values():
            if type(hook) is WeightNorm:
                hook.__class__ = _SafeWeightNormHook
