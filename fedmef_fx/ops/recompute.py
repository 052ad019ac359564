"""An operation whose backward runs it again on what was kept of its inputs.

Its gradients are those that torch computes at the kept inputs: exact where they are kept as they are.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fedmef_fx.ops.autocast import autocast_dtype, under_autocast
from fedmef_fx.ops.backward import differentiable_once, needs_backward, taken
from fedmef_fx.ops.forward import writable_result
from fedmef_fx.ops.keeping import value_of
from fedmef_fx.packing import KeptTensor

__all__ = ["recompute"]

TensorFunction = Callable[..., Tensor]


class _Recompute(Function):
    @staticmethod
    @writable_result
    def forward(
        ctx: Any,
        operation: TensorFunction,
        again: TensorFunction,
        kept: Sequence[KeptTensor | None],
        is_random: bool,
        *tensors: Tensor | None,
    ) -> Tensor:
        device = next(t.device for t in tensors if t is not None)
        ctx.again, ctx.kept, ctx.device = again, tuple(kept), device
        ctx.autocast = autocast_dtype(device.type)
        ctx.random_state = _random_state(device) if is_random else None
        exact = [t if k is None else None for t, k in zip(tensors, kept, strict=True)]
        ctx.save_for_backward(*exact)
        return operation(*tensors)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[4:]
        kept = taken(ctx, "kept")
        values = [
            # A tensor that was None is neither kept nor saved, and needs no gradient.
            value_of(k, exact).detach().requires_grad_(need) if need or k is not None or exact is not None else None
            for k, exact, need in zip(kept, ctx.saved_tensors, needed, strict=True)
        ]
        del kept
        with (
            torch.enable_grad(),
            under_autocast(ctx.device.type, ctx.autocast),
            _replaying(ctx.device, ctx.random_state),
        ):
            result = ctx.again(*values)
        gradients = iter(torch.autograd.grad(result, [v for v in values if v is not None and v.requires_grad], grad))
        return (None, None, None, None, *(next(gradients) if need else None for need in needed))


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextlib.contextmanager
def _replaying(device: torch.device, state: Tensor | None) -> Iterator[None]:
    """Draw the random numbers that follow a state; the generators are as before afterwards."""
    if state is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
        yield


def recompute(
    operation: TensorFunction,
    tensors: Sequence[Tensor | None],
    kept: Sequence[KeptTensor | None],
    *,
    again: TensorFunction | None = None,
    is_random: bool = False,
) -> Tensor:
    """Run an operation that runs again in backward.

    Args:
        operation: From `tensors` to the result.
        tensors: Its arguments; only these get gradients.
        kept: Per argument how it is kept; None keeps it as it is.
        again: What runs in backward, where running `operation` twice would have side effects.
        is_random: Whether it draws random numbers, which are drawn again in backward.
    """
    if not needs_backward(*tensors):
        return operation(*tensors)
    result: Tensor = _Recompute.apply(operation, again or operation, kept, is_random, *tensors)  # type: ignore[no-untyped-call]  # torch's own
    return result
