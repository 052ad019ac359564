"""Peers of `memory.py` that need code of their own: torch.compile with a budget, and 2-bit codes on the dense model."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from fedmef_fx.packing import BlockCode, BlockwiseTensor

__all__ = ["TwoBitCodes", "WithBudget", "held_by", "with_budget"]


class WithBudget(nn.Module):
    """A model that torch compiles, which computes activations again in backward until a budget is kept.

    Args:
        model: The model.
        budget: Share of the activations' bytes that may be kept, 0 to 1.
    """

    def __init__(self, model: nn.Module, budget: float) -> None:
        super().__init__()
        self.model = model

        # A backend of its own: torch would take what it compiled for another budget.
        def compiled(graph: Any, inputs: Any) -> Any:
            with torch._functorch.config.patch(activation_memory_budget=budget):
                return compile_fx(graph, inputs)

        self._compiled: Any = torch.compile(model, backend=compiled)

    def forward(self, x: Tensor) -> Tensor:
        """The model's result."""
        result: Tensor = self._compiled(x)
        return result


def with_budget(build: Callable[[nn.Module], nn.Module], budget: float) -> Callable[[nn.Module], nn.Module]:
    """What `build` makes, compiled with a budget."""
    return lambda model: WithBudget(build(model), budget)


def held_by(loss: Tensor, *others: Tensor) -> int:
    """Bytes that the custom functions behind a loss keep for their backwards, compiled ones among them.

    Args:
        loss: The loss.
        *others: What exists anyway.
    """
    known = {tensor.untyped_storage()._cdata for tensor in others}
    held: dict[int, int] = {}
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [other for other, _ in node.next_functions]
        for tensor in getattr(node, "saved_tensors", ()):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known:
                held[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    return sum(held.values())


class TwoBitCodes(nn.Module):
    """A model of which autograd keeps every activation in 2 bits (after ActNN, Chen et al., ICML 2021).

    A range per group of 256 elements, stochastic rounding; a tensor that several operations save is coded once. Other
    than in ActNN, whose ReLU keeps one exact bit, backward sees decoded values only.
    """

    _smallest = 4096
    """Elements of what is worth a code: statistics of channels are not."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._code = BlockCode(bits=2, block=256, rounding="stochastic")

    def forward(self, x: Tensor) -> Tensor:
        """The model's result, exact."""
        own = x.untyped_storage()._cdata
        coded: dict[int, tuple[StorageWeakRef, int, weakref.ref[BlockwiseTensor]]] = {}

        def pack(tensor: Tensor) -> Tensor | tuple[BlockwiseTensor, torch.Size, tuple[int, ...]]:
            storage = tensor.untyped_storage()
            is_activation = tensor.is_floating_point() and tensor.numel() >= self._smallest
            if not is_activation or isinstance(tensor, nn.Parameter) or storage._cdata == own:
                return tensor
            reference, version, kept = coded.get(storage._cdata, (None, -1, None))
            found = None if kept is None else kept()
            if found is None or reference is None or reference.expired() or version != tensor._version:
                found = BlockwiseTensor.encode(tensor, self._code)
                coded[storage._cdata] = (StorageWeakRef(storage), tensor._version, weakref.ref(found))
            return found, tensor.shape, tensor.stride()

        def unpack(kept: Any) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            found, shape, stride = kept
            tensor: Tensor = found.unpack().as_strided(shape, stride)
            return tensor

        with saved_tensors_hooks(pack, unpack):
            result: Tensor = self.model(x)
        return result
