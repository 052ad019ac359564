"""State dictionaries of transformed models, in and out.

`load_state_dict` of a transformed model takes, for every masked weight on its own,

- the *packed* form: active values under the parameter's name and a `_bitmap`, which may be another one than the
  model's and have another number of active weights;
- the *dense* form of a transformed model: a dense tensor and a `_mask`;
- the *original* form: a dense tensor alone, which keeps the masks that the model has now.

A dictionary of a transformed model also has a digest of its masks, `fedmef._extra_state`: one that was averaged with
another whose masks differ is refused (`mask_digest`). Where activations are pruned, it has their thresholds, too
(`thresholds`), so that a resumed training goes on exactly.

Each goes into a model of either storage. Forms are checked before anything is copied. `dense_state_dict` is the way
back to the original form.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedmef_fx.errors import CheckpointError
from fedmef_fx.module_tree import uncompiled_model
from fedmef_fx.packing.bitmap import bitmap_nbytes, pack_bits, unpack_bits
from fedmef_fx.packing.layout import has_no_values
from fedmef_fx.sparse_model.copies import forget_copy
from fedmef_fx.sparse_model.mask_digest import DIGEST, check_digest, mask_digest
from fedmef_fx.sparse_model.masked_parameter import MaskedParameter, bitmap_name, mask_name
from fedmef_fx.sparse_model.masks import apply_masks, clear_masked_weights
from fedmef_fx.sparse_model.optimizer_state import trust_loaded_state
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.sparse_model.thresholds import THRESHOLDS, set_thresholds, thresholds
from fedmef_fx.sparse_model.transformation import transformation_of

__all__ = ["dense_state_dict", "forget_load_hooks", "keep_masks_on_load"]

_CONSTANT = "fedmef_constant_"


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state of a transformed model under the names of the original one: weights dense, no masks and bitmaps.

    The original model's `load_state_dict` takes it, and so does that of a transformed one.

    Args:
        model: A transformed model of either storage.

    Returns:
        Name -> detached tensor. Those that the model stores in this form share its memory, as in `state_dict()`;
        packed weights are made dense again.

    Raises:
        ConfigError: `model` was not made by `fedmef_fx.transform`.

    Example:
        >>> import fedmef_fx
        >>> net = nn.Sequential(nn.Linear(8, 4))
        >>> sparse = fedmef_fx.transform(net, fedmef_fx.Config(density=0.5, weight_storage="packed"))
        >>> {name: tuple(value.shape) for name, value in sparse.state_dict().items()}
        {'0.weight': (16,), '0.bias': (4,), '0.weight_bitmap': (4,), 'fedmef._extra_state': (1, 6)}
        >>> {name: tuple(value.shape) for name, value in dense_state_dict(sparse).items()}
        {'0.weight': (4, 8), '0.bias': (4,)}
    """
    model = uncompiled_model(model)
    parameters = masked_parameters(model).values()
    masked = {id(parameter.parameter): parameter for parameter in parameters}
    buffers = {id(parameter.buffer) for parameter in parameters}
    unpacked: dict[int, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if (
            name in (DIGEST, THRESHOLDS)
            or id(value) in buffers
            or name.rpartition(".")[2].startswith(_CONSTANT)
            or not isinstance(value, Tensor)
        ):
            continue
        parameter = masked.get(id(value))
        if parameter is not None and parameter.is_packed and id(value) not in unpacked:
            unpacked[id(value)] = parameter.dense()
        dense[name] = unpacked.get(id(value), value.detach())
    return dense


def keep_masks_on_load(model: nn.Module) -> None:
    """Let `load_state_dict` take all forms of the module docstring, and keep masked weights 0."""
    model.register_state_dict_post_hook(_add_state)  # type: ignore[no-untyped-call]  # torch's own
    model.register_load_state_dict_pre_hook(_fit_forms)  # type: ignore[no-untyped-call]  # torch's own
    model.register_load_state_dict_post_hook(_mask_after_load)  # type: ignore[no-untyped-call]  # torch's own


def forget_load_hooks(model: nn.Module) -> None:
    """Undo `keep_masks_on_load`."""
    for hooks in (model._state_dict_hooks, model._load_state_dict_pre_hooks, model._load_state_dict_post_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "hook", hook) in (_add_state, _fit_forms, _mask_after_load):
                del hooks[key]


def _add_state(model: nn.Module, state_dict: dict[str, Any], prefix: str, _: object) -> None:
    if transformation_of(model).masks_are_hidden:
        return
    clear_masked_weights(model)  # the tensors of the dictionary are the weights themselves
    buffers = [parameter.buffer for parameter in masked_parameters(model).values()]
    if buffers and not any(has_no_values(buffer) for buffer in buffers):
        state_dict[prefix + DIGEST] = mask_digest(buffers)
    states = thresholds(model)
    if len(states):
        state_dict[prefix + THRESHOLDS] = states


class _Names(NamedTuple):
    """The keys of one masked parameter in a dictionary; several for a module that stands at several places."""

    weights: list[str]
    masks: list[str]
    bitmaps: list[str]


def _fit_forms(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Bring every masked weight of a dictionary into the form that the model stores."""
    names = _names(model, prefix)
    forms = []
    for parameter in masked_parameters(model).values():
        keys = names[id(parameter.buffer)]
        form = _read(parameter, keys, state_dict)
        if form is not None:
            forms.append((parameter, keys, *form))
        elif not parameter.is_packed:
            for key in keys.masks:  # an original's, which the model's own masks complete
                state_dict.setdefault(key, parameter.buffer)
    digest = state_dict.pop(prefix + DIGEST, None)
    buffers = {name: _buffer_in(state_dict, names[id(e.buffer)]) for name, e in masked_parameters(model).items()}
    check_digest(digest, buffers)
    set_thresholds(model, state_dict.pop(prefix + THRESHOLDS, None))
    for parameter, keys, mask, values in forms:  # nothing is wrong with any: from here on the model changes
        _put(parameter, keys, state_dict, mask=mask, values=values)


def _buffer_in(state: Mapping[str, Any], keys: _Names) -> Tensor | None:
    buffers = (state.get(key) for key in keys.bitmaps + keys.masks)
    return next((value for value in buffers if isinstance(value, Tensor)), None)


def _names(model: nn.Module, prefix: str) -> dict[int, _Names]:
    """Keys by identity of the mask or bitmap."""
    weights: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        weights.setdefault(id(parameter), []).append(prefix + name)
    keys_of = {id(e.buffer): _Names(weights[id(e.parameter)], [], []) for e in masked_parameters(model).values()}
    for name, buffer in model.named_buffers(remove_duplicate=False):
        keys = keys_of.get(id(buffer))
        if keys is not None:
            stem = prefix + name.removesuffix(bitmap_name("")).removesuffix(mask_name(""))
            keys.masks.append(mask_name(stem))
            keys.bitmaps.append(bitmap_name(stem))
    return keys_of


def _read(parameter: MaskedParameter, keys: _Names, state: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Mask and active values that a dictionary has for a parameter; None where they need no conversion."""
    bitmap = next((key for key in keys.bitmaps if key in state), None)
    if not parameter.is_packed and bitmap is None:
        _refuse_averaged_mask(keys, state)
        return None
    weight = next((key for key in keys.weights if key in state), None)
    mask = next((key for key in keys.masks if key in state), None)
    if weight is None:
        if bitmap is None and mask is None:
            return parameter.mask, parameter.values()  # for torch to report the missing name, or to leave it as it is
        raise CheckpointError(f"load_state_dict: there is {bitmap or mask}, but not {keys.weights[0]}; expected both")
    stored = parameter.mask
    if bitmap is not None:
        stored = _mask_of_bitmap(parameter, bitmap, state[bitmap])
    elif mask is not None:
        stored = _checked(parameter, mask, state[mask])
    return stored, _values(parameter, weight, state[weight], stored, is_packed=bitmap is not None)


def _refuse_averaged_mask(keys: _Names, state: Mapping[str, Any]) -> None:
    """Raise where torch would take every number that is not 0 for True."""
    for key in keys.masks:
        mask = state.get(key)
        if not isinstance(mask, Tensor) or not mask.is_floating_point():
            continue
        if bool(((mask - mask.round()).abs() > 1e-3).any()):  # a weighted mean of ones is not exactly 1
            raise CheckpointError(
                f"load_state_dict: {key} holds other numbers than 0 and 1; expected a mask, torch.bool. Masks cannot "
                "be averaged: use fedmef_fx.averaged(model) over training, and average "
                "fedmef_fx.dense_state_dict(model) of several models"
            )


def _mask_of_bitmap(parameter: MaskedParameter, key: str, bitmap: object) -> Tensor:
    nbytes = bitmap_nbytes(parameter.numel)
    fits = isinstance(bitmap, Tensor) and bitmap.dtype == torch.uint8 and bitmap.shape == (nbytes,)
    if not isinstance(bitmap, Tensor) or not fits:
        raise CheckpointError(f"load_state_dict: {key} is {_describe(bitmap)}; expected torch.uint8[{nbytes}]")
    mask = unpack_bits(bitmap, parameter.numel)
    if not torch.equal(pack_bits(mask), bitmap):
        raise CheckpointError(
            f"load_state_dict: {key} is damaged: it has bits behind the last of {parameter.numel} weights"
        )
    return mask.view(parameter.shape)


def _checked(parameter: MaskedParameter, key: str, mask: object) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != parameter.shape:
        raise CheckpointError(
            f"load_state_dict: {key} is {_describe(mask)}; expected torch.bool{list(parameter.shape)}"
        )
    return mask


def _values(parameter: MaskedParameter, key: str, value: object, mask: Tensor, *, is_packed: bool) -> Tensor:
    active = int(mask.count_nonzero())
    if isinstance(value, Tensor) and value.shape == parameter.shape:
        return value.detach()[mask.to(value.device)]
    if isinstance(value, Tensor) and is_packed and value.shape == (active,):
        return value.detach()
    also = f" or {active} values, as many as its bitmap has" if is_packed else ""
    raise CheckpointError(f"load_state_dict: {key} is {_describe(value)}; expected shape {list(parameter.shape)}{also}")


def _describe(value: object) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _put(parameter: MaskedParameter, keys: _Names, state: dict[str, Any], *, mask: Tensor, values: Tensor) -> None:
    mask = mask.to(parameter.buffer.device)
    for key in keys.masks + keys.bitmaps:
        state.pop(key, None)
    if not parameter.is_packed:
        dense = values.new_zeros(parameter.shape)
        dense[mask.to(dense.device)] = values
        state.update(dict.fromkeys(keys.masks, mask))
        state.update({key: dense for key in keys.weights if key in state})
        return
    if not torch.equal(mask, parameter.mask):
        parameter.change(mask)
    state.update(dict.fromkeys(keys.bitmaps, pack_bits(mask)))
    state.update({key: values for key in keys.weights if key in state})


def _mask_after_load(model: nn.Module, _: object) -> None:
    forget_copy(transformation_of(model))
    apply_masks(model)
    trust_loaded_state(model.parameters())
