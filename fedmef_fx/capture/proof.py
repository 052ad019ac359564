"""Proof that graphs compute what the original computes: same outputs, gradients and buffers, on two different inputs.

One input is not enough: an activation that was baked into the graph as a constant passes on the input it came from.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fedmef_fx.capture.state import fixed_seed, restored
from fedmef_fx.errors import CaptureError
from fedmef_fx.graph.compiled import CompiledGraph, original_forward
from fedmef_fx.graph.signature import Call

__all__ = ["Originals", "Outcome", "difference", "outcome_of", "prove", "tensors_within"]

# Graphs run the same kernels in the same order; what remains comes from sums over gradients in another order.
_RELATIVE: Final = 1e-4
_COARSE: Final = 2e-2
_DEPTH: Final = 8


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one forward and backward pass does.

    Attributes:
        output: What forward returns.
        gradients: Of parameters and floating point inputs, None where there is none; None where backward did not run.
        buffers: By name, afterwards.
    """

    output: Any
    gradients: dict[str, Tensor | None] | None
    buffers: dict[str, Tensor]


class Originals:
    """What original forwards do with their calls, each observed once however many graphs are compared with it."""

    def __init__(self) -> None:
        self._observed: dict[tuple[object, ...], list[Outcome | Exception]] = {}
        self._kept: list[object] = []  # keeps alive what the keys identify

    def of(self, module: nn.Module, call: Call, *, gradients: bool) -> list["Outcome | Exception"]:
        """Outcomes of the module in its mode, on the call and on another one like it."""
        key = (id(module), id(call), module.training)
        if (*key, gradients) not in self._observed and (*key, True) in self._observed:
            return self._observed[*key, True]
        if (*key, gradients) not in self._observed:
            self._kept += [module, call]
            run = functools.partial(Call.on, forward=original_forward(module), module=module)
            self._observed[*key, gradients] = _observed(module, call, run, gradients=gradients)
        return self._observed[*key, gradients]


def prove(module: nn.Module, call: Call, graph: fx.Graph, originals: Originals, *, by_name: bool) -> None:
    """Compare a graph with the forward that it was traced from, in the mode the module is in.

    Args:
        module: The module; it is as it was when this returns or raises.
        call: A call that the graph serves.
        graph: The graph, unchanged by passes.
        originals: Outcomes of original forwards.
        by_name: Whether its placeholders are the arguments of forward; otherwise the tensors of the call.

    Raises:
        CaptureError: Outputs, gradients or buffers differ, on this input or on another one.
    """
    compiled = CompiledGraph(graph)

    def run(changed: Call) -> Any:
        return compiled(module, **changed.arguments) if by_name else compiled(module, *changed.tensors)

    expected = originals.of(module, call, gradients=True)
    if isinstance(expected[0], Exception):
        raise CaptureError(f"forward itself fails: {type(expected[0]).__name__}: {expected[0]}") from expected[0]
    got = _observed(module, call, run, gradients=True)
    for where, original, found in zip(("", "another input: "), expected, got, strict=True):
        if isinstance(original, Exception):
            continue  # the original refuses the values that were made up for it
        if isinstance(found, Exception):
            kind = type(found).__name__
            raise CaptureError(f"{where}the graph fails where forward does not: {kind}: {found}") from found
        if original.gradients is not None and found.gradients is None:
            raise CaptureError(f"{where}backward of the graph fails where that of forward does not")
        problem = difference(original, found)
        if problem is not None:
            raise CaptureError(f"{where}the graph is not the module: {problem}")


def _observed(
    module: nn.Module, call: Call, run: Callable[[Call], Any], *, gradients: bool
) -> list[Outcome | Exception]:
    # One after the other without a reset in between, so that state which a forward keeps for itself shows.
    outcomes: list[Outcome | Exception] = []
    with restored(module), fixed_seed():
        for index, changed in enumerate((call, call.replace_tensors(_other_values))):
            torch.manual_seed(index)
            try:
                outcomes.append(outcome_of(module, changed, run, gradients=gradients))
            except Exception as error:
                outcomes.append(error)
    return outcomes


def outcome_of(module: nn.Module, call: Call, run: Callable[[Call], Any], *, gradients: bool) -> Outcome:
    """Run a call forward, and backward if gradients are wanted.

    Args:
        module: Whose parameters and buffers are observed.
        call: The call; its tensors are not changed.
        run: Makes it.
        gradients: Whether to run backward.
    """
    leaves: list[Tensor] = []

    def fresh(tensor: Tensor) -> Tensor:
        copy = tensor.detach().clone()
        if not (copy.is_floating_point() or copy.is_complex()):
            return copy
        leaves.append(copy.requires_grad_())
        return copy.clone()  # not a leaf: forward may work in place on it

    with torch.set_grad_enabled(gradients):
        output = run(call.replace_tensors(fresh) if gradients else call.replace_tensors(_copy))
        watched: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}
        watched |= {f"input {index}": leaf for index, leaf in enumerate(leaves)}
        derivatives = None
        if gradients:
            # A forward without a backward, as after a write in place: then only its outputs count.
            with contextlib.suppress(RuntimeError):
                derivatives = _gradients(output, watched)
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    return Outcome(output, derivatives, buffers)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _gradients(output: Any, watched: dict[str, Tensor]) -> dict[str, Tensor | None]:
    terms = []
    for tensor in tensors_within(output):
        if tensor.requires_grad and tensor.numel():
            values = torch.view_as_real(tensor).flatten() if tensor.is_complex() else tensor.flatten()
            # Fixed weights: a plain sum is blind to errors that cancel, as after a softmax.
            terms.append((values.float() * torch.arange(1, values.numel() + 1, device=values.device).cos()).sum())
    if not terms:
        return {}
    gradients = torch.autograd.grad(torch.stack(terms).sum(), list(watched.values()), allow_unused=True)
    return dict(zip(watched, gradients, strict=True))


def tensors_within(value: Any, depth: int = _DEPTH) -> Iterator[Tensor]:
    """The tensors in an output, also in objects that pytree does not know."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, dict):
        for part in value.values():
            yield from tensors_within(part, depth - 1)
    elif depth and isinstance(value, tuple | list):
        for part in value:
            yield from tensors_within(part, depth - 1)
    elif depth and hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
        for part in vars(value).values():
            yield from tensors_within(part, depth - 1)


def difference(expected: Outcome, got: Outcome) -> str | None:
    """What differs between two observations, None where they agree."""
    problem = _output_difference(expected.output, got.output)
    if problem is not None:
        return problem
    for name, value in expected.buffers.items():
        problem = _tensor_difference(value, got.buffers.get(name))
        if problem is not None:
            return f"buffer {name} {problem}"
    if expected.gradients is None or got.gradients is None:
        return None
    # A gradient of 0 and none at all are the same to an optimizer without weight decay, but not to one with it.
    for name in expected.gradients.keys() | got.gradients.keys():
        gradient, found = expected.gradients.get(name), got.gradients.get(name)
        if (gradient is None) != (found is None):
            return f"the gradient of {name} is {'missing' if found is None else 'there, where forward gives none'}"
        problem = None if gradient is None else _tensor_difference(gradient, found, coarse=10.0)
        if problem is not None:
            return f"the gradient of {name} {problem}"
    return None


def _output_difference(expected: Any, got: Any) -> str | None:
    if type(expected) is not type(got):
        return f"it returns {type(got).__name__} instead of {type(expected).__name__}"
    wanted, found = list(tensors_within(expected)), list(tensors_within(got))
    if len(wanted) != len(found):
        return f"it returns {len(found)} tensors instead of {len(wanted)}"
    for index, (left, right) in enumerate(zip(wanted, found, strict=True)):
        problem = _tensor_difference(left, right)
        if problem is not None:
            return f"output {index} {problem}"
    for left, right in zip(_plain_leaves(expected), _plain_leaves(got), strict=False):
        if left is not right and left != right:
            return f"it returns {right!r} instead of {left!r}"
    return None


def _plain_leaves(value: Any) -> list[Any]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, bool | int | float | str)]


def _tensor_difference(expected: Tensor, got: Any, *, coarse: float = 1.0) -> str | None:
    if not isinstance(got, Tensor):
        return f"is {got!r} instead of a tensor"
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return f"is {got.dtype}{list(got.shape)} instead of {expected.dtype}{list(expected.shape)}"
    left, right = expected.detach(), got.detach()
    if not (left.is_floating_point() or left.is_complex()):
        return None if torch.equal(left, right) else "differs"
    if torch.equal(left, right):
        return None
    half = left.dtype in (torch.bfloat16, torch.float16)
    finite = torch.isfinite(left)
    scale = float(left[finite].abs().max()) if finite.any() else 0.0
    tolerance = (_COARSE if half else _RELATIVE) * coarse
    with contextlib.suppress(RuntimeError):
        if torch.allclose(left, right, rtol=0.0, atol=tolerance * max(scale, 1e-3), equal_nan=True):
            return None
    return f"differs by up to {float((left - right)[finite].abs().max()) if finite.any() else float('nan'):.2e}"


def _other_values(tensor: Tensor) -> Tensor:
    """Other values of the same kind: valid where the original ones are, as far as one can tell without knowing them."""
    if not tensor.dim():
        return tensor.detach().clone()
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor.detach().flip(-1).clone()
    return (tensor.detach().flip(-1) * 1.1 + 0.013).clone()
