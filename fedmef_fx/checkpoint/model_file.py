"""Save and load a transformed model without pickle: active weights, bitmaps, and everything else of its state.

The file is a safetensors file. Of a masked parameter it holds `active/<name>`, the active values in order, and
`mask/<name>`, the mask at one bit per weight, deflated; of any other parameter or buffer `state/<name>`. Tied tensors
are stored once. Its metadata has the format version, the configuration, the architecture (name, type and shape of each
tensor of the model, and which are tied) and a digest of all of it, so that damage is found before anything is used.

Loading validates everything first and copies then: a model is never half loaded.
"""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fedmef_fx.config import Config
from fedmef_fx.errors import CheckpointError, ConfigError
from fedmef_fx.files.atomic import check_target, replacing
from fedmef_fx.files.checkpoint_file import FORMAT, VERSION, deflate, described, digest_of, inflate, parsed, read_file
from fedmef_fx.graph.emit import has_edited_graphs
from fedmef_fx.graph.pipeline import Pass
from fedmef_fx.module_tree import uncompiled_model
from fedmef_fx.packing import pack_bits
from fedmef_fx.passes.catalogue import PASSES, stored_passes
from fedmef_fx.sparse_model.copies import forget_copy
from fedmef_fx.sparse_model.mask_digest import DIGEST
from fedmef_fx.sparse_model.masks import bitmap_name, mask_name, set_masks
from fedmef_fx.sparse_model.optimizer_state import trust_loaded_state
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.sparse_model.thresholds import THRESHOLDS, set_thresholds, thresholds_from_json, thresholds_to_json
from fedmef_fx.sparse_model.transformation import is_transformed, transformation_of
from fedmef_fx.transformation.transform import transform

__all__ = ["load", "save"]

_FUNCTION_FIELDS: Final = ("normalization", "nsconv_statistics", "residual")
"""Fields of `Config` that change what a model computes from the same tensors."""


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the weights, masks and buffers of a transformed model.

    Optimizer state, the mode and gradients are not part of it. The file is written whole or not at all.

    Args:
        model: A transformed model.
        path: The file to write.

    Raises:
        ConfigError: `model` was not made by `fedmef_fx.transform`.
        CheckpointError: A path that cannot be written, state that is not a tensor, or a graph that was edited by hand.

    Example:
        >>> import tempfile, fedmef_fx
        >>> def net():
        ...     return torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> sparse = fedmef_fx.transform(net(), fedmef_fx.Config(density=0.5))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(sparse, f"{folder}/model.safetensors")
        ...     restored = load(f"{folder}/model.safetensors", net())
        >>> torch.equal(restored.get_parameter("0.weight"), sparse.get_parameter("0.weight"))
        True
    """
    model = uncompiled_model(model)
    config = transformation_of(model).config
    if has_edited_graphs(model):
        raise CheckpointError(
            "save: a graph of the model was edited by hand, and a checkpoint holds weights, masks and the names of "
            "passes, but no graphs: what loads it would lose the edit. Make the edit a pass, "
            "fedmef_fx.transform(model, config, passes=[MyPass()]), see docs/passes.md; or keep the whole model: "
            "torch.save(model, path)"
        )
    target = check_target(path, error=_named_error("save"))
    state, ties = _state(model)
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        tensors[f"state/{name}"] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    for name, parameter in masked_parameters(model).items():
        first = ties.get(name, name)
        del tensors[f"state/{first}"]
        tensors[f"active/{first}"] = parameter.values().cpu()
        tensors[f"mask/{first}"] = deflate(
            parameter.buffer.cpu() if parameter.is_packed else pack_bits(parameter.buffer.cpu())
        )
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "config": config.to_json(),
        "architecture": json.dumps(_architecture(state, _dense_shapes(model, ties))),
        "tied": json.dumps(ties),
        "thresholds": thresholds_to_json(model),
    }
    metadata["digest"] = digest_of(tensors, metadata)
    try:
        data = safetensors.torch.save(tensors, metadata)
    except (safetensors.SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"save: the model's state cannot be stored as safetensors: {error}") from error
    with replacing(target, error=_named_error("save")) as temporary:
        temporary.write_bytes(data)


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    passes: Sequence[Pass | type[Pass]] = (),
) -> nn.Module:
    """Read what `save` wrote.

    Args:
        path: The file.
        model: Either a transformed model, which gets the stored weights, masks and buffers in place (as `set_masks`
            does it: optimizers that hold its parameters stay valid), or an original one, which is transformed with the
            stored configuration first and does not change. Layers that the saved model got
            after its transformation stand in it, too, and get masks where they had some.
        example_inputs: For that transformation, as in `fedmef_fx.transform`.
        example_kwargs: For that transformation.
        passes: Passes of your own, or their classes, that the file may need. Those of this package and of installed
            packages are found by the names in the file.

    Returns:
        The transformed model.

    Raises:
        CheckpointError: No checkpoint, a damaged one, a newer format, or one of another architecture or configuration.
            The model is as it was. Or the file needs passes that are not there; the message names them.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(model, nn.Module):
        raise ConfigError(
            f"load: got {type(path).__name__} as path and {type(model).__name__} as model; expected a file and a "
            "torch.nn.Module, e.g. fedmef_fx.load('model.safetensors', model)"
        )
    model = uncompiled_model(model)
    tensors, metadata = read_file(Path(path))
    config = _config(metadata)
    known_thresholds = thresholds_from_json(metadata.get("thresholds", "[]"))
    architecture, ties = parsed(metadata, "architecture"), parsed(metadata, "tied")
    if not is_transformed(model):
        original, _ = _state(model)
        shared = {name: parameter for name, parameter in architecture.items() if name in original}
        _check_architecture(_architecture(original, {}), shared)
        transformed = functools.partial(transform, model, example_inputs=example_inputs, example_kwargs=example_kwargs)
        own_passes = stored_passes(config.passes, passes)
        config = config.replace(passes=())
        model = transformed(config, passes=own_passes)
        dense = _layers_without_masks(model, tensors)
        if dense:  # a new head, say, that the saved model got after its transformation
            model = transformed(config.replace(ignore=(*config.ignore, *dense)), passes=own_passes)
        config = transformation_of(model).config
    state, own_ties = _state(model)
    _check_architecture(_architecture(state, _dense_shapes(model, own_ties)), architecture)
    if own_ties != ties:
        raise CheckpointError(f"load: tied parameters are {ties} in the checkpoint, {own_ties} in the model")
    _check_function(transformation_of(model).config, config)
    masks = _masks(tensors, model, own_ties)
    values = {name: _value(tensors, name, tensor, masks.get(name)) for name, tensor in state.items()}

    forget_copy(transformation_of(model))
    parameters = masked_parameters(model)
    set_masks(model, {name: masks[own_ties.get(name, name)] for name in parameters})
    for name, parameter in parameters.items():
        parameter.write(values[own_ties.get(name, name)])
    with torch.no_grad():
        for name in state.keys() - masks.keys():
            state[name].copy_(values[name])
    set_thresholds(model, known_thresholds)
    trust_loaded_state(model.parameters())
    return model


def _named_error(call: str) -> Any:
    return lambda message: CheckpointError(f"{call}: {message}")


def _state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A model's live tensors, each under its first name, and its other names: alias -> first name.

    Masks, bitmaps and non-persistent buffers are not part of it.
    """
    parameters = masked_parameters(model) if is_transformed(model) else {}
    masks = {bitmap_name(name) if parameter.is_packed else mask_name(name) for name, parameter in parameters.items()}
    state: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if name in masks or name in (DIGEST, THRESHOLDS):
            continue
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"save: {name} is a {type(value).__name__}; expected tensors only, as anything else needs pickle"
            )
        first_name = first.setdefault(id(value), name)
        if first_name == name:
            state[name] = value
        else:
            ties[name] = first_name
    return state, ties


def _architecture(state: Mapping[str, Tensor], dense: Mapping[str, torch.Size]) -> dict[str, str]:
    """Type and shape of each tensor; of a packed weight the shape of the dense one."""
    return {name: described(tensor.dtype, dense.get(name, tensor.shape)) for name, tensor in state.items()}


def _dense_shapes(model: nn.Module, ties: Mapping[str, str]) -> dict[str, torch.Size]:
    """The dense shapes of masked weights, by first name."""
    return {ties.get(name, name): parameter.shape for name, parameter in masked_parameters(model).items()}


def _check_architecture(own: Mapping[str, str], stored: Mapping[str, str]) -> None:
    for name, entry in own.items():
        if name not in stored:
            raise CheckpointError(f"load: another architecture: the checkpoint has no {name}, which the model has")
        if stored[name] != entry:
            raise CheckpointError(
                f"load: another architecture: {name} is {stored[name]} in the checkpoint, {entry} in the model"
            )
    for name in stored:
        if name not in own:
            raise CheckpointError(f"load: another architecture: the checkpoint has {name}, which the model has not")


def _check_function(own: Config, stored: Config) -> None:
    for field in _FUNCTION_FIELDS:
        ours, theirs = getattr(own, field), getattr(stored, field)
        if ours != theirs:
            raise CheckpointError(
                f"load: the checkpoint was trained with {field}={theirs!r}, the model was transformed with {ours!r}; "
                "load into the original model, which is then transformed with the checkpoint's configuration"
            )
    ours, theirs = (_foreign(config.passes) for config in (own, stored))
    if ours != theirs:
        raise CheckpointError(
            f"load: the checkpoint's model was made with the passes {theirs}, the model with {ours}; load into the "
            "original model, which is then transformed with the checkpoint's configuration"
        )


def _foreign(texts: Sequence[str]) -> list[str]:
    """Those of passes that are not this package's, which may change what a model computes."""
    ours = {step.name for step in PASSES}
    return [text for text in texts if text.partition("{")[0].strip() not in ours]


def _layers_without_masks(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Layers of a model just transformed whose weights have no mask in the checkpoint."""
    dense = (name for name in masked_parameters(model) if f"state/{name}" in tensors)
    return tuple(dict.fromkeys(name.rpartition(".")[0] or name for name in dense))


def _masks(tensors: Mapping[str, Tensor], model: nn.Module, ties: Mapping[str, str]) -> dict[str, Tensor]:
    """The stored masks by first name, checked against those that the model has."""
    own = _dense_shapes(model, ties)
    stored = {key.removeprefix("mask/") for key in tensors if key.startswith("mask/")}
    if own.keys() != stored:
        name = sorted(own.keys() ^ stored)[0]
        where = "the checkpoint" if name in stored else "the model"
        raise CheckpointError(
            f"load: {name} has a mask in {where} only; load into the original model, which is then transformed with "
            "the checkpoint's configuration, and give load the example_inputs that the saved model was transformed "
            "with, if it was with any"
        )
    return {name: inflate(name, tensors[f"mask/{name}"], shape) for name, shape in own.items()}


def _value(tensors: Mapping[str, Tensor], name: str, own: Tensor, mask: Tensor | None) -> Tensor:
    """A stored tensor; of a masked parameter its active values."""
    stored = tensors.get(f"state/{name}" if mask is None else f"active/{name}")
    shape = own.shape if mask is None else torch.Size([int(mask.count_nonzero())])
    if stored is None or stored.shape != shape or stored.dtype != own.dtype:
        got = "nothing" if stored is None else f"{stored.dtype}{list(stored.shape)}"
        raise CheckpointError(f"load: damaged: {name} holds {got}; expected {own.dtype}{list(shape)}")
    return stored


def _config(metadata: Mapping[str, str]) -> Config:
    try:
        return Config.from_json(metadata["config"], is_stored=True)
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"load: the checkpoint's configuration cannot be used: {error}") from error
