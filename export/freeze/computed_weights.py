"""Layers that compute their weight before each call keep the weight itself: it does not change any more.

That is `weight_norm`, `spectral_norm` and `prune` of torch.nn.utils, and parametrizations. Afterwards such a layer is
an ordinary one, whose weight is a parameter: it can be copied, exported and read where fedmef_fx is not installed.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ["compute_weights"]


@torch.no_grad()
def compute_weights(model: nn.Module) -> None:
    """Compute the weights of all layers of a model in eval mode, in place."""
    for module in list(model.modules()):
        for hook in reversed(list(module._forward_pre_hooks.values())):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
            elif isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        if parametrize.is_parametrized(module):
            kind: Any = type(module)  # copies share their class, and removing takes the properties from it
            module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
            for name in list(module.parametrizations):  # type: ignore[arg-type]  # a ModuleDict
                parametrize.remove_parametrizations(module, name)
            loading = module._load_state_dict_pre_hooks
            for key, wrapped in list(loading.items()):  # takes the older form of weight norm; it cannot be pickled
                if getattr(wrapped, "hook", wrapped).__module__ == parametrizations.__name__:
                    del loading[key]
