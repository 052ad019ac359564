"""What every backward of this package does the same: letting go of what was kept, and refusing to be differentiated."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fedmef_fx.errors import FedmefError
from fedmef_fx.packing.tracers import is_traced, refuse_batched, uncompiled

__all__ = ["differentiable_once", "needs_backward", "taken"]


def needs_backward(*tensors: object) -> bool:
    """Whether an operation on these arguments keeps something for a backward of this package.

    While it is traced it does not, nor with complex numbers, which nothing here compresses: then it is one of torch's,
    with torch's gradients.
    """
    operands = [t for t in tensors if isinstance(t, Tensor)]
    needs = (
        torch.is_grad_enabled() and any(t.requires_grad for t in operands) and not any(t.is_complex() for t in operands)
    )
    return needs and not is_traced()


def taken(ctx: Any, name: str) -> Any:
    """What forward kept under a name; the context lets go of it unless this backward retains its graph.

    Tensors that autograd saves are freed so by torch itself. Handles that it does not know have to follow the same
    rule: kept for the next backward under `retain_graph=True`, freed by one that does not retain.

    Raises:
        FedmefError: A backward that did not retain its graph has run already.
    """
    try:
        value = getattr(ctx, name)
    except AttributeError:
        raise FedmefError(
            "backward: what was kept for it is freed already: got a second backward through one forward; "
            "expected backward(retain_graph=True) for each but the last, or another forward"
        ) from None
    if not torch._C._autograd._get_current_graph_task_keep_graph():
        delattr(ctx, name)
    return value


class _Refusal(Function):
    """Gradients that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise FedmefError(
            "backward: got a gradient of a gradient (create_graph=True) through a transformed layer; expected first "
            "derivatives only, as what is kept in few bits has no second ones: take them of a copy that keeps its "
            "inputs, e.g. fedmef_fx.freeze(model)"
        )


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward whose results refuse to be differentiated, with the remedy.

    Torch's `once_differentiable` lets results pass as constants where the incoming gradient is one, although they
    depend on weights and inputs: a gradient penalty would lose its own gradient without a word.
    """

    @uncompiled
    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Any) -> Any:
        refuse_batched(gradients)
        with torch.no_grad():
            results = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return results
        several = results if isinstance(results, tuple) else (results,)
        tensors = [result for result in several if result is not None]
        if not tensors:
            return results
        anchor = torch.zeros((), device=tensors[0].device, requires_grad=True)
        refused = iter(_Refusal.apply(anchor, *tensors))  # type: ignore[no-untyped-call]  # torch's own
        replaced = tuple(None if result is None else next(refused) for result in several)
        return replaced if isinstance(results, tuple) else replaced[0]

    return run
