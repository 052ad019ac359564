"""Neutral surroundings for a capture: what a caller has switched on must neither end up in a graph nor stop one.

A model may be transformed in a build function under `torch.no_grad()`, in an evaluation under autocast, under another
default device, with anomaly detection on, or in several threads at once. Torch keeps most of that per thread, but
torch.fx traces by replacing functions of the whole process, so that captures of several threads take turns.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["neutral_surroundings", "ordinary_tensors"]

_LOCK = threading.RLock()


@contextlib.contextmanager
def neutral_surroundings(model: nn.Module | None = None) -> Iterator[None]:
    """A block with gradients on and everything else that surrounds it off; one thread at a time.

    Off are inference mode, autocast, anomaly detection, hooks on saved tensors (a layer may first be called under
    activation checkpointing) and the demand for deterministic algorithms; tensors are made on
    the CPU unless something else is said. The default dtype is that of the model, or float32: a model that was built
    under another default goes on making such tensors. Afterwards everything is restored.

    Args:
        model: The model that the block is about.
    """
    with _LOCK, contextlib.ExitStack() as stack:
        # Read by the thread whose turn it is: before that, they may be what another capture has set.
        dtype, deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
        if deterministic:  # switching imports torch's compiler, which takes longer than many a capture
            only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
            stack.callback(torch.use_deterministic_algorithms, mode=True, warn_only=only_warns)
            torch.use_deterministic_algorithms(mode=False)
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_saving_as_usual())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.is_anomaly_enabled():
            stack.enter_context(torch.autograd.set_detect_anomaly(mode=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        try:
            torch.set_default_dtype(_dtype_of(model))
            yield
        finally:
            torch.set_default_dtype(dtype)


@contextlib.contextmanager
def _saving_as_usual() -> Iterator[None]:
    """A block in which autograd keeps tensors without the hooks that are there."""
    core, taken = torch._C._autograd, []
    while (hooks := core._top_saved_tensors_default_hooks(True)) is not None:
        core._pop_saved_tensors_default_hooks()
        taken.append(hooks)
    try:
        yield
    finally:
        for hooks in reversed(taken):
            core._push_saved_tensors_default_hooks(*hooks)


def ordinary_tensors(value: Any) -> Any:
    """Arguments of a call with tensors that were made in inference mode replaced by copies that autograd can save."""
    return pytree.tree_map_only(Tensor, lambda x: x.clone() if x.is_inference() else x, value)


def _dtype_of(model: nn.Module | None) -> torch.dtype:
    dtypes = (parameter.dtype for parameter in model.parameters()) if isinstance(model, nn.Module) else ()
    return next((dtype for dtype in dtypes if dtype in (torch.float32, torch.float64)), torch.float32)
