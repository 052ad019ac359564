"""`mask_layers`: masks for layers that were put into a transformed model afterwards."""

import difflib
from collections.abc import Iterable

import torch
from torch import nn

from fedmef_fx.capture import is_plain_layer, layer_region, neutral_surroundings
from fedmef_fx.config import Config
from fedmef_fx.errors import ConfigError
from fedmef_fx.graph.dispatch import add_layer, forget_graphs
from fedmef_fx.graph.pipeline import Pipeline
from fedmef_fx.graph.program import Program
from fedmef_fx.passes.functionalize import FunctionalizeWeights
from fedmef_fx.passes.replay_rewrites import ReplayRewrites
from fedmef_fx.sparse_model.masks import mask_name
from fedmef_fx.sparse_model.parameters import register_mask
from fedmef_fx.sparse_model.prunable import PrunableParameter
from fedmef_fx.sparse_model.transformation import Transformation, transformation_of
from fedmef_fx.sparsity import magnitude_masks, random_masks

__all__ = ["mask_layers"]


def mask_layers(model: nn.Module, names: Iterable[str], *, density: float | None = None) -> None:
    """Mask convolutions and linear layers of a transformed model that are dense, such as a new head, in place.

    Parameters stay the same objects, and optimizers that hold them stay valid. Masks are random, or those of the
    largest magnitudes, as the model's configuration says.

    Args:
        model: A transformed model whose masks switch single weights.
        names: Names of layers.
        density: Active share of each layer's weights, (0, 1]; None for that of the configuration.

    Raises:
        ConfigError: Not a transformed model, a name of no such layer, one that has a mask, a density out of range, or
            masks of another granularity. Nothing is changed then.

    Example:
        >>> import fedmef_fx
        >>> sparse = fedmef_fx.transform(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 2)))
        >>> sparse[1] = nn.Linear(16, 10)
        >>> mask_layers(sparse, ["1"], density=0.5)
        >>> int(fedmef_fx.masks(sparse)["1.weight"].sum())
        80
    """
    names = list(names)
    transformation = transformation_of(model)
    config = transformation.config if density is None else transformation.config.replace(density=density)
    if config.granularity != "weight":
        raise ConfigError(f'mask_layers: the model has granularity={config.granularity!r}; expected "weight"')
    layers = {name: _layer(model, name) for name in names}
    with neutral_surroundings(model):
        for name, layer in layers.items():
            _mask(model, name, layer, config, transformation)
    places = {name: index for index, (name, _) in enumerate(model.named_parameters(remove_duplicate=False))}
    rows = sorted(transformation.prunable.items(), key=lambda row: places.get(row[0], -1))
    transformation.prunable = dict(rows)


def _layer(model: nn.Module, name: str) -> nn.Module:
    modules: dict[str, nn.Module] = dict(model.named_modules())
    layer = modules.get(name)
    if layer is None or not is_plain_layer(layer):
        maskable = [other for other, module in modules.items() if is_plain_layer(module)]
        close = difflib.get_close_matches(name, maskable, n=3, cutoff=0.4)
        hint = f"; did you mean {', '.join(map(repr, close))}?" if close else ""
        kind = "no module" if layer is None else f"a {type(layer).__name__}"
        raise ConfigError(f"mask_layers: {name!r} is {kind}; expected a convolution or linear layer{hint}")
    if any(mask_name("weight") == buffer or buffer == "weight_bitmap" for buffer in layer._buffers):
        raise ConfigError(f"mask_layers: {name!r} has a mask already; change it with fedmef_fx.set_masks")
    return layer


def _mask(model: nn.Module, name: str, layer: nn.Module, config: Config, transformation: Transformation) -> None:
    parameter = f"{name}.weight" if name else "weight"
    weight = layer.get_parameter("weight").detach()
    count = {parameter: max(1, round(config.density * weight.numel()))}
    if config.mask_init == "magnitude":
        masks = magnitude_masks({parameter: weight}, count)
    else:
        masks = random_masks({parameter: tuple(weight.shape)}, count, seed=config.seed)
    register_mask(model, parameter, masks[parameter].to(torch.bool))
    reason = "its layer was put in afterwards"
    transformation.prunable[parameter] = PrunableParameter(parameter, weight.numel(), tier="module", reason=reason)
    region = layer_region(layer, name, role="fallback")
    Pipeline([FunctionalizeWeights(), ReplayRewrites()]).run(Program(layer, [region], Transformation(config)))
    add_layer(layer, region)
    forget_graphs(model, layer)
