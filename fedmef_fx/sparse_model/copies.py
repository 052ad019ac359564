"""Deep copies of a model that code from outside averages, such as a momentum teacher or an EMA written by hand.

Such code moves the numbers of a copy towards those of the model and knows nothing of masks. As long as both have the
same masks this is right. Once the model's masks have changed, the copy still masks what the model has grown, and packed
values of different coordinates are averaged. Nobody is told when a tensor is written to; so the copy, when it is called
or asked for its masks, looks whether the model that it was made of has other masks by now, and whether it was written
to by something that is no optimizer of its own and no `load_state_dict`, and says so.
"""

import contextlib
import dataclasses
import warnings
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fedmef_fx.module_tree import owner_of
from fedmef_fx.packing.layout import has_no_values
from fedmef_fx.sparse_model.held_masks import was_stepped
from fedmef_fx.sparse_model.masked_parameter import bitmap_name, mask_name
from fedmef_fx.sparse_model.prunable import PrunableParameter

__all__ = ["check_copy", "forget_copy", "note_copy", "note_model"]


@dataclasses.dataclass(slots=True)
class _Copied:
    """What a copy was made of.

    Attributes:
        origin: The model, weakly.
        versions: How often its masks had been written to, when they were the copy's for the last time.
        total: The sum of its smallest masked parameter at that time, which changes with every way of averaging.
    """

    origin: "weakref.ref[nn.Module]"
    versions: tuple[int, ...]
    total: float


_NAMES = (mask_name, bitmap_name)
_MODELS: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]]" = weakref.WeakKeyDictionary()
"""Models by their `fedmef` children."""
_COPIES: "weakref.WeakKeyDictionary[nn.Module, _Copied]" = weakref.WeakKeyDictionary()
"""Copies by their `fedmef` children."""


def note_model(child: nn.Module, model: nn.Module) -> None:
    """Note which model a `fedmef` child belongs to; copies know only what they were copied with."""
    _MODELS[child] = weakref.ref(model)


def note_copy(child: nn.Module, copied: nn.Module, prunable: dict[str, PrunableParameter]) -> None:
    """Note what a copy was made of.

    Args:
        child: The `fedmef` child of the model.
        copied: That of the copy.
        prunable: The model's parameters.
    """
    reference = _MODELS.get(child)
    model = None if reference is None else reference()
    if model is None:
        return
    smallest, buffers = _smallest(model, prunable), _buffers(model, prunable)
    if smallest is not None and not any(map(has_no_values, (smallest, *buffers))):
        _COPIES[copied] = _Copied(weakref.ref(model), _versions(buffers), _total(smallest))


def forget_copy(child: nn.Module) -> None:
    """From here on the numbers of a copy are its own, or are averaged by code that knows of masks."""
    _COPIES.pop(child, None)


def check_copy(model: nn.Module, child: nn.Module, prunable: dict[str, PrunableParameter]) -> None:
    """Warn where a copy was written to and the model has other masks by now; once for each change of masks.

    Args:
        model: A transformed model.
        child: Its `fedmef` child.
        prunable: Its parameters.
    """
    copied = _COPIES.get(child) if _COPIES else None
    if copied is None:
        return
    origin, smallest = copied.origin(), _smallest(model, prunable)
    if origin is None or smallest is None or was_stepped(smallest):
        forget_copy(child)
        return
    _MODELS.setdefault(child, weakref.ref(model))
    theirs = _buffers(origin, prunable)
    versions = _versions(theirs)
    if versions == copied.versions or _total(smallest) == copied.total:
        return
    copied.versions = versions
    own = _buffers(model, prunable)
    if len(own) == len(theirs) and all(torch.equal(a, b.to(a.device)) for a, b in zip(own, theirs, strict=True)):
        copied.total = _total(smallest)
        return
    warnings.warn(
        f"a deep copy of a transformed {type(model).__name__} was written to, and the model that it was made of has "
        "other masks by now: an average under the former ones leaves out weights that were grown, and mixes packed "
        "ones. Average with fedmef_fx.averaged(model), or give the copy the new masks first: "
        "fedmef_fx.set_masks(copy, fedmef_fx.masks(model))",
        UserWarning,
        stacklevel=2,
    )


def _buffers(model: nn.Module, prunable: dict[str, PrunableParameter]) -> list[Tensor]:
    """Masks and bitmaps."""
    buffers = (owner._buffers.get(name(leaf)) for owner, leaf in _owners(model, prunable) for name in _NAMES)
    return [buffer for buffer in buffers if buffer is not None]


def _versions(buffers: list[Tensor]) -> tuple[int, ...]:
    return tuple(-1 if buffer.is_inference() else buffer._version for buffer in buffers)


def _smallest(model: nn.Module, prunable: dict[str, PrunableParameter]) -> nn.Parameter | None:
    parameters = (owner._parameters.get(leaf) for owner, leaf in _owners(model, prunable))
    return min((parameter for parameter in parameters if parameter is not None), key=nn.Parameter.numel, default=None)


def _owners(model: nn.Module, prunable: dict[str, PrunableParameter]) -> Iterator[tuple[nn.Module, str]]:
    """Where the masked parameters stand, without those whose layers are gone."""
    for name, row in prunable.items():
        with contextlib.suppress(AttributeError):
            if row.masked:
                yield owner_of(model, name)


def _total(parameter: nn.Parameter) -> float:
    return float(parameter.detach().double().sum())
