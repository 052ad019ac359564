"""Copy a model, also one that `copy.deepcopy` refuses."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

__all__ = ["copy_computed_tensors", "duplicate_of", "join", "owner_of", "tensors_of", "uncompiled_model"]


def duplicate_of(model: nn.Module) -> nn.Module:
    """A deep copy of a model that shares no tensor with it.

    Tensors with a history, such as the weight that `torch.nn.utils.prune` or `weight_norm` computes before each
    call, cannot be deep-copied; their values are copied instead. Neither can buffers of lazy layers; they start over.
    """
    memo: dict[int, Any] = {}
    copy_computed_tensors(model, memo)
    # Scripted modules copy by computing: with gradients on, their copies would have a history.
    with torch.no_grad():
        duplicate = copy.deepcopy(model, memo)
    for parameter, copied in zip(model.parameters(), duplicate.parameters(), strict=True):
        if copied.requires_grad != parameter.requires_grad:
            copied.requires_grad_(parameter.requires_grad)
    return duplicate


def copy_computed_tensors(model: nn.Module, memo: dict[int, Any]) -> None:
    """Tell `copy.deepcopy` in advance how to copy the tensors of a model that it refuses.

    Args:
        model: The model.
        memo: What `deepcopy` has copied: identity -> copy. Gains what it lacks.
    """
    for tensor in tensors_of(model):
        if id(tensor) not in memo and not tensor.is_leaf:
            memo[id(tensor)] = tensor.detach().clone()
    for buffer in model.buffers():
        if id(buffer) not in memo and isinstance(buffer, UninitializedBuffer):
            fresh: Any = UninitializedBuffer  # its constructor, which torch leaves unannotated
            memo[id(buffer)] = fresh(device=buffer.device, dtype=buffer.dtype)


def join(path: str, name: str) -> str:
    """Join two module paths, either of which may be empty."""
    return f"{path}.{name}" if path and name else path or name


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter or buffer, and the name it has there."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def uncompiled_model(model: nn.Module) -> nn.Module:
    """The model that torch.compile was given, where this is what it returned; any other model itself."""
    return vars(model).get("_modules", {}).get("_orig_mod") or model


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor that a model or one of its modules has as an attribute, also in lists and dicts."""
    for module in model.modules():
        for value in vars(module).values():
            many = value.values() if isinstance(value, dict) else value
            parts = many if isinstance(value, list | tuple | dict) else (value,)
            yield from (part for part in parts if isinstance(part, Tensor))
