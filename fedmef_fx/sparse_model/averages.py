"""Averages of a transformed model over training: EMA, SWA, and the classes of others that make them.

An average is a deep copy of the model whose numbers are moved towards the model's now and then. Three things go wrong
when the code that moves them knows nothing of masks: the copy keeps the masks of the day it was made, masks and bitmaps
are averaged like numbers, and packed values, which stand one after the other, are averaged by their place in that row
instead of by the coordinate that they belong to. So each update of an average has three steps here:

1. The copy takes the model's newest masks. A weight that left becomes 0; one that was grown starts with the value that
   the model has for it now: an average over the time for which the weight has been there.
2. The numbers are averaged, by whatever class it is, while it cannot see masks, bitmaps, constants of graphs and
   counters. The copy's values stand in the order of the model's by now.
3. Counters are copied, and masked weights are 0.

`averaged` makes such an average. `torch.optim.swa_utils.AveragedModel` and timm's `ModelEmaV2` and `ModelEmaV3`, and
what derives from them or uses them (Lightning's `WeightAveraging` does), get the same steps when they are put around a
transformed model: torch says when a module becomes part of another one, and the class of the average is then replaced
by a subclass of it that has them. Lightning's `StochasticWeightAveraging` is no module and averages in static methods;
these get the steps where they meet transformed models.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim.swa_utils import AveragedModel

from fedmef_fx.errors import ConfigError
from fedmef_fx.module_tree import owner_of
from fedmef_fx.sparse_model.copies import forget_copy
from fedmef_fx.sparse_model.masked_parameter import MaskedParameter, mask_name
from fedmef_fx.sparse_model.masks import apply_masks
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.sparse_model.transformation import is_transformed, transformation_of

__all__ = ["averaged", "transformed_parts", "watch_averages"]

_Tensors = list[Tensor] | tuple[Tensor, ...]
_UPDATES = {
    ("torch.optim.swa_utils", "AveragedModel"): ("update_parameters",),
    ("timm.utils.model_ema", "ModelEmaV2"): ("update", "set"),
    ("timm.utils.model_ema", "ModelEmaV3"): ("update", "set"),
}
"""Classes of averages, which keep their copy as `module`, and their methods that move it towards a model."""

_CALLBACKS = ("lightning.pytorch.callbacks.stochastic_weight_avg", "pytorch_lightning.callbacks.stochastic_weight_avg")
"""Modules with Lightning's `StochasticWeightAveraging`."""


def averaged(
    model: nn.Module,
    decay: float | None = 0.999,
    *,
    device: torch.device | str | None = None,
    use_buffers: bool = False,
) -> AveragedModel:
    """An average of a transformed model over training that obeys its masks: EMA, or SWA.

    It is a `torch.optim.swa_utils.AveragedModel`: call `update_parameters(model)` after each step of the optimizer
    (EMA) or epoch (SWA), evaluate, save or export its `.module`, and use `update_bn` on it where BatchNorm was kept.
    Masks may change between two updates: at the next one the average takes the model's, weights that left are 0, and
    grown weights start with the model's value. Packed values are averaged by the coordinates that they belong to. Its
    `state_dict` loads into another average of the model, also into one with other masks.

    Args:
        model: A transformed model, or a module that holds transformed ones. It does not change.
        decay: Of the exponential moving average, 0 to 1: `decay * average + (1 - decay) * model`. None for the mean of
            all updates with equal weights (SWA).
        device: Where the average lives; None for where the model lives.
        use_buffers: Average the floating point buffers too, such as BatchNorm's running statistics; otherwise they are
            copied from the model. Masks and counters are always copied.

    Raises:
        ConfigError: No transformed model, or a decay outside 0 to 1.

    Example:
        >>> import fedmef_fx
        >>> sparse = fedmef_fx.transform(nn.Sequential(nn.Linear(8, 4)), fedmef_fx.Config(density=0.5))
        >>> average = averaged(sparse, 0.99)
        >>> average.update_parameters(sparse)
        >>> fedmef_fx.density(average.module)
        0.5
    """
    if not transformed_parts(model):
        transformation_of(model)  # says what to do
    if decay is not None and not 0 <= decay <= 1:
        raise ConfigError(f"averaged: got decay={decay!r}; expected a number from 0 to 1, or None for equal weights")
    watch_averages()
    average = None if decay is None else _Exponential(decay)
    to: Any = None if device is None else torch.device(device)
    return AveragedModel(model, device=to, multi_avg_fn=average, use_buffers=use_buffers)


@dataclasses.dataclass(frozen=True, slots=True)
class _Exponential:
    """An exponential moving average, as torch's `get_ema_multi_avg_fn` makes one, but one that can be pickled."""

    decay: float

    @torch.no_grad()
    def __call__(self, averages: _Tensors, values: _Tensors, _: object) -> None:
        torch._foreach_lerp_(averages, values, 1 - self.decay)


def transformed_parts(model: nn.Module) -> list[nn.Module]:
    """The transformed models in a model: itself, or what a wrapper or a larger module holds."""
    return [module for module in model.modules() if is_transformed(module)]


@functools.cache
def watch_averages() -> None:
    """From now on, let averages of others that are made of transformed models obey their masks."""
    register_module_module_registration_hook(_obey_masks)


def _obey_masks(parent: nn.Module, name: str, copy: Any) -> None:
    """Called by torch when a module becomes a child of another one."""
    for callback in _CALLBACKS:
        if hasattr(sys.modules.get(callback), "StochasticWeightAveraging"):
            _watch_callback(callback)
    updates = _updates_of(type(parent)) if name == "module" else ()
    if updates and isinstance(copy, nn.Module) and not isinstance(parent, _ObeysMasks) and transformed_parts(copy):
        kind: Any = type(parent)  # a type that can be hashed, which mypy doubts of types of modules
        parent.__class__ = _subclass(kind)


@functools.cache
def _watch_callback(module: str) -> None:
    """Let Lightning's callback obey masks."""
    kind: Any = sys.modules[module].StochasticWeightAveraging
    update, transfer = kind.update_parameters, kind.transfer_weights

    @functools.wraps(update)
    def update_parameters(average_model: nn.Module, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _steps(average_model, model):
            return update(average_model, model, *args, **kwargs)

    @functools.wraps(transfer)
    def transfer_weights(average_model: nn.Module, model: nn.Module) -> None:
        pairs = _pairs(average_model, model)
        for average, source in pairs:
            _follow(average, source)
        transfer(average_model, model)
        for _, source in pairs:
            apply_masks(source)

    kind.update_parameters, kind.transfer_weights = staticmethod(update_parameters), staticmethod(transfer_weights)


def _updates_of(kind: Any) -> tuple[str, ...]:
    names = ((base.__module__, base.__name__) for base in kind.__mro__)
    return next((_UPDATES[name] for name in names if name in _UPDATES), ())


class _ObeysMasks:
    """Marks the classes of this module; they pickle as the class that they stand for."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        base = type(self).__mro__[2]
        return _revive, (base,), self.__getstate__()


def _revive(base: Any) -> Any:
    kind = _subclass(base)
    return kind.__new__(kind)


@functools.cache
def _subclass(base: Any) -> Any:
    """A subclass of an average's class whose updates obey masks."""
    methods = {name: _update(name) for name in _updates_of(base)}
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (_ObeysMasks, base), {**methods, **names})


def _update(name: str) -> Any:
    def update(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _steps(self.module, model):
            return getattr(type(self).__mro__[2], name)(self, model, *args, **kwargs)

    update.__name__ = name
    return update


@contextlib.contextmanager
def _steps(average: nn.Module, model: nn.Module) -> Iterator[None]:
    """A block that moves the numbers of an average; see the module docstring."""
    pairs = _pairs(average, model)
    if not pairs:
        yield
        return
    for copied, source in pairs:
        forget_copy(transformation_of(copied))
        _follow(copied, source)
    with _out_of_sight(average) as counters, _out_of_sight(model) as newest:
        yield
    with torch.no_grad():
        for counter, value in zip(counters, newest, strict=True):
            counter.copy_(value)
    for copied, _ in pairs:
        apply_masks(copied)


def _pairs(average: nn.Module, model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    averages, sources = transformed_parts(average), transformed_parts(model)
    if [_forms(part) for part in averages] == [_forms(part) for part in sources]:
        return list(zip(averages, sources, strict=True))
    raise ConfigError(
        f"average of {type(average).__name__}: got an update from a model with other masked weights, or with another "
        "storage of them; expected the model that it was made of. Make a new one: fedmef_fx.averaged(model)"
    )


def _forms(model: nn.Module) -> dict[str, tuple[torch.Size, bool]]:
    return {name: (parameter.shape, parameter.is_packed) for name, parameter in masked_parameters(model).items()}


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module) -> None:
    """Step 1 of the module docstring."""
    newest = masked_parameters(model)
    alive = _silent_masks(average)
    changed = False
    for name, parameter in masked_parameters(average).items():
        changed |= _take_mask(parameter, newest[name])
    if not changed:
        return
    apply_masks(average)
    for name, before in alive.items():
        own, leaf = owner_of(average, name)
        grown = ~before & getattr(own, mask_name(leaf))
        tensor, value = getattr(own, leaf), getattr(owner_of(model, name)[0], leaf)
        tensor[grown] = value.detach().to(tensor)[grown]


def _take_mask(parameter: MaskedParameter, source: MaskedParameter) -> bool:
    """Take another's mask; says whether it is a new one."""
    if torch.equal(parameter.buffer, source.buffer.to(parameter.buffer.device)):
        return False
    mask = source.mask.to(parameter.buffer.device)
    grown = mask & ~parameter.mask
    parameter.change(mask)
    values = torch.where(grown, source.dense().to(parameter.parameter), parameter.dense())
    parameter.write(values[mask])
    return True


def _silent_masks(model: nn.Module) -> dict[str, Tensor]:
    """Which channels are on, by the name of the bias that is 0 where they are off; see `channels`."""
    found = {}
    for prunable in transformation_of(model).prunable.values():
        for name in prunable.channels.dependents if prunable.channels is not None else ():
            owner, leaf = owner_of(model, name)
            mask = owner._buffers.get(mask_name(leaf))
            if mask is not None:
                found[name] = mask.clone()
    return found


@contextlib.contextmanager
def _out_of_sight(model: nn.Module) -> Iterator[list[Tensor]]:
    """A block in which a model seems to have no buffers but those that can be averaged; gives the others."""
    masks = {
        id(parameter.buffer) for part in transformed_parts(model) for parameter in masked_parameters(part).values()
    }
    everything = [(module, module._buffers) for module in model.modules() if module._buffers]
    hidden = {
        id(buffer): buffer
        for _, buffers in everything
        for buffer in buffers.values()
        if buffer is not None and not buffer.is_floating_point() and not buffer.is_complex()
    }
    parts = [transformation_of(part) for part in transformed_parts(model)]
    try:
        for part in parts:
            part.masks_are_hidden = True
        for module, buffers in everything:
            module._buffers = {name: buffer for name, buffer in buffers.items() if id(buffer) not in hidden}
        yield [buffer for key, buffer in hidden.items() if key not in masks]
    finally:
        for module, buffers in everything:
            module._buffers = buffers
        for part in parts:
            part.masks_are_hidden = False
