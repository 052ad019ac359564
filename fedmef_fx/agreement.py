"""Proof that a capture computes what the original computes: same outputs and buffers, in train and in eval mode."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fedmef_fx.emit import CompiledGraph
from fedmef_fx.errors import CaptureError, ConfigError
from fedmef_fx.program import Program

__all__ = ["check_capture"]

_SEED = 0


def check_capture(model: nn.Module, program: Program, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Compare a program that no pass has changed yet with the model it was captured from, on one call.

    Args:
        model: The original; only a copy of it runs.
        program: What was captured.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Raises:
        ConfigError: The original itself refuses the arguments.
        CaptureError: Outputs or buffers differ.
    """
    (region,) = program.regions
    for training in (True, False):
        mode = "train" if training else "eval"
        original = copy.deepcopy(model).train(training)
        captured = copy.deepcopy(region.owner).train(training)
        graph = CompiledGraph(region.graph_for(training=training))
        try:
            expected = _call(original, args, kwargs)
        except Exception as error:
            raise ConfigError(
                f"transform: {type(model).__name__} itself fails on the example inputs "
                f"({_describe(args, kwargs)}) in {mode} mode: {type(error).__name__}: {error}"
            ) from error
        try:
            got = _call(lambda *a, graph=graph, owner=captured, **k: graph(owner, *a, **k), args, kwargs)
        except Exception as error:
            raise CaptureError(
                f"{type(model).__name__}: its graph fails on the example inputs in {mode} mode, where the model does "
                f"not: {type(error).__name__}: {error}"
            ) from error
        problem = difference(expected, got) or _buffer_difference(original, captured)
        if problem:
            raise CaptureError(f"{type(model).__name__}: in {mode} mode the graph is not the model: {problem}")


def _call(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (tuple(args), dict(kwargs)))
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(_SEED)
        return function(*args, **kwargs)


def difference(expected: Any, got: Any) -> str | None:
    """What differs between two outputs, None where they agree.

    Graphs run the same kernels in the same order, so floating point values agree to a few units in the last place.
    """
    wanted, found = pytree.tree_leaves(expected), pytree.tree_leaves(got)
    if type(expected) is not type(got) or len(wanted) != len(found):
        return (
            f"it returns {type(got).__name__} with {len(found)} values instead of {type(expected).__name__} with "
            f"{len(wanted)}"
        )
    for index, (left, right) in enumerate(zip(wanted, found, strict=True)):
        if not isinstance(left, Tensor) or not isinstance(right, Tensor):
            if left is not right and left != right:
                return f"output {index} is {right!r} instead of {left!r}"
        elif left.shape != right.shape or left.dtype != right.dtype:
            return f"output {index} is {right.dtype}{list(right.shape)} instead of {left.dtype}{list(left.shape)}"
        elif not torch.allclose(left, right, rtol=1e-4, atol=1e-5, equal_nan=True):
            return f"output {index} differs by up to {float((left - right).abs().max()):.2e}"
    return None


def _buffer_difference(original: nn.Module, captured: nn.Module) -> str | None:
    buffers = dict(captured.named_buffers())
    for name, buffer in original.named_buffers():
        problem = difference(buffer, buffers.get(name))
        if problem:
            return f"buffer {name}: {problem}"
    return None


def _describe(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    def one(value: object) -> str:
        return f"{value.dtype}{list(value.shape)}" if isinstance(value, Tensor) else repr(value)

    return ", ".join([*map(one, args), *(f"{key}={one(value)}" for key, value in kwargs.items())])
