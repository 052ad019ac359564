"""Before the first round: the dense model with all its weights active, for methods that score weights at the start."""

import torch
from torch import nn

from fedmef_fx.errors import ConfigError
from fedmef_fx.sparse_model.masks import set_masks
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.sparse_model.transformation import is_transformed, transformation_of

__all__ = ["activate_all", "active_budget"]


@torch.no_grad()
def activate_all(model: nn.Module, original: nn.Module, *, method: str) -> None:
    """Make all weights of a transformed model active, with the values of the original.

    Args:
        model: What `fedmef_fx.transform` made of the original; changed in place.
        original: The model before.
        method: Who asks for it, for the error message.

    Raises:
        ConfigError: An original that is itself transformed: its masked weights are gone.
    """
    if is_transformed(original):
        raise ConfigError(
            f"federated.run: method {method!r} scores all weights before the first round, and a transformed model has "
            "lost those that its masks switch off; expected the original model, which run transforms itself"
        )
    parameters = masked_parameters(model)
    set_masks(model, {name: torch.ones(p.shape, dtype=torch.bool) for name, p in parameters.items()})
    for name, parameter in parameters.items():
        parameter.write(original.get_parameter(name).detach().flatten())


def active_budget(model: nn.Module) -> int:
    """Number of weights that all masks of a transformed model together keep active, by its configuration."""
    total = sum(parameter.numel for parameter in masked_parameters(model).values())
    return round(transformation_of(model).config.density * total)
