"""`memory`: what one training step of a model takes, measured."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fedmef_fx.errors import ConfigError
from fedmef_fx.memory import LiveBytes, SavedTensors

__all__ = ["MemoryReport", "memory"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """Bytes of one training step.

    Attributes:
        weights: Parameters, pruned weights included where they are stored.
        buffers: Masks, running statistics and other buffers.
        inputs: Tensors of the example inputs; they exist anyway and count in no other field but the peak.
        gradients: Gradients of the parameters after the backward pass.
        saved: Kept between forward and backward, by kind: "dense", "packed values", "bitmap".
        peak: The most that was alive at any moment, everything above included; workspaces inside an operation are not
            seen, see `fedmef_fx.memory.LiveBytes`.
    """

    weights: int
    buffers: int
    inputs: int
    gradients: int
    saved: Mapping[str, int]
    peak: int

    @property
    def saved_total(self) -> int:
        """Everything that is kept between forward and backward."""
        return sum(self.saved.values())

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "weights": self.weights,
            "buffers": self.buffers,
            "inputs": self.inputs,
            "gradients": self.gradients,
            "saved": dict(self.saved),
            "saved_total": self.saved_total,
            "peak": self.peak,
        }

    def rows(self) -> list[tuple[str, int]]:
        """What is shown, as label and bytes."""
        return [
            ("weights", self.weights),
            ("buffers", self.buffers),
            ("inputs", self.inputs),
            ("gradients", self.gradients),
            ("saved for backward", self.saved_total),
            *((f"  {kind}", count) for kind, count in self.saved.items()),
            ("peak", self.peak),
        ]

    def __str__(self) -> str:
        return "\n".join(f"{label:20s}{count:>15,d} bytes" for label, count in self.rows())


def memory(
    model: nn.Module,
    example_inputs: Sequence[Any],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    loss: Callable[[Any], Tensor] | None = None,
) -> MemoryReport:
    """Measure one training step: forward, loss and backward.

    It runs in train mode on a copy, which exists beside the model meanwhile. The model, its gradients and torch's
    random state stay as they are.

    Args:
        model: Any model.
        example_inputs: Positional arguments of one call, as a tuple, with the batch size that is to be measured.
        example_kwargs: Keyword arguments of that call.
        loss: From the model's output to a scalar. Default: the sum of all floating point results, which itself keeps
            nothing for backward.

    Returns:
        The report.

    Raises:
        ConfigError: The model refuses the inputs, or the loss is no differentiable scalar.

    Example:
        >>> report = memory(nn.Linear(4, 2), (torch.ones(3, 4),))
        >>> report.weights, report.gradients, report.saved_total
        (40, 40, 0)
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"memory: got {type(model).__name__}; expected a torch.nn.Module")
    if isinstance(example_inputs, Tensor):
        raise ConfigError("memory: example_inputs is a tensor; expected a tuple of arguments: memory(model, (x,))")
    duplicate = copy.deepcopy(model).train()
    duplicate.zero_grad(set_to_none=True)
    args, kwargs = pytree.tree_map_only(
        Tensor,
        lambda t: t.detach().clone().requires_grad_(t.requires_grad),
        (tuple(example_inputs), dict(example_kwargs or {})),
    )
    inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), LiveBytes(duplicate, *inputs) as live:
        with SavedTensors(duplicate, *inputs) as saved:
            value = _loss_of(duplicate, args, kwargs, loss)
        kinds = saved.by_kind()
        value.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    return MemoryReport(
        weights=_nbytes(duplicate.parameters()),
        buffers=_nbytes(duplicate.buffers()),
        inputs=_nbytes(inputs),
        gradients=_nbytes(p.grad for p in duplicate.parameters() if p.grad is not None),
        saved={str(kind): count for kind, count in kinds.items()},
        peak=live.peak,
    )


def _loss_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], loss: Callable[[Any], Tensor] | None
) -> Tensor:
    try:
        output = model(*args, **kwargs)
    except Exception as error:
        raise ConfigError(
            f"memory: {type(model).__name__} fails on the example inputs in train mode: {type(error).__name__}: {error}"
        ) from error
    value = _sum(output) if loss is None else loss(output)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        got = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(
            f"memory: the loss is {got}; expected a differentiable scalar, e.g. "
            "loss=lambda output: torch.nn.functional.cross_entropy(output, labels)"
        )
    return value


def _sum(output: Any) -> Any:
    results = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return sum((result.sum() for result in results[1:]), results[0].sum()) if results else None


def _nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
