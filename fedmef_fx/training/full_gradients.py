"""Gradients of every weight under a mask, active or not: what pruning at the start and some rivals of FedMef look at.

An adjustment of FedMef never needs them. They take as much memory as the dense weights, once per call.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from fedmef_fx.errors import ConfigError, DataError
from fedmef_fx.ops.gradient_collector import Request, collecting
from fedmef_fx.sparse_model.masks import MaskedParameter
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.training.growth import batch_size_of, unchanged

__all__ = ["mean_gradients", "mean_squared_gradients"]

AnyBatch = TypeVar("AnyBatch")


def mean_gradients(
    model: nn.Module, loss_fn: Callable[[nn.Module, AnyBatch], Tensor], batches: Iterable[AnyBatch]
) -> dict[str, Tensor]:
    """Gradients of a loss with respect to effective weights, averaged over batches in proportion to their sizes.

    Afterwards the model is as it was, its `.grad` and the state of torch's generators included.

    Args:
        model: A transformed model with masks.
        loss_fn: Called as `loss_fn(model, batch)`; returns a scalar, the mean loss of the batch.
        batches: What `loss_fn` takes.

    Returns:
        Parameter name -> gradient of every weight, f32[numel] on the CPU, 0 for one that the loss does not reach.

    Raises:
        DataError: No batches.
        ConfigError: A gradient that is not finite.
    """
    return _averaged(model, loss_fn, batches, of=lambda gradient: gradient)


def mean_squared_gradients(
    model: nn.Module, loss_fn: Callable[[nn.Module, AnyBatch], Tensor], batches: Iterable[AnyBatch]
) -> dict[str, Tensor]:
    """The same of squares: each batch's gradient is squared before it is averaged."""
    return _averaged(model, loss_fn, batches, of=torch.Tensor.square)


def _averaged(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, AnyBatch], Tensor],
    batches: Iterable[AnyBatch],
    *,
    of: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    parameters = masked_parameters(model)
    totals = {name: torch.zeros(parameter.numel) for name, parameter in parameters.items()}
    weights = 0.0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept = [parameter.grad for parameter in trained]
    try:
        with unchanged(model, parameters):
            for batch in batches:
                weight = float(batch_size_of(batch) or 1)
                for name, gradient in _gradients(model, parameters, functools.partial(loss_fn, model, batch)).items():
                    totals[name] += of(gradient) * weight
                weights += weight
    finally:
        for parameter, before in zip(trained, kept, strict=True):
            parameter.grad = before
    if not weights:
        raise DataError("gradients: got no batches; expected at least one")
    for name, total in totals.items():
        if not bool(total.isfinite().all()):
            raise ConfigError(f"gradients: {name!r}: got infinite values or NaN; expected finite ones: it has diverged")
    return {name: total / weights for name, total in totals.items()}


def _gradients(
    model: nn.Module, parameters: Mapping[str, MaskedParameter], loss: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Gradients of one batch: of active weights from `.grad`, of the others from what layers show the collector."""
    for stored in model.parameters():
        stored.grad = None
    requests = {name: Request(p.buffer, p.numel - p.active) for name, p in parameters.items()}
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    with collecting(requests, packed_shapes=shapes) as collector, collector.batch(1.0), torch.enable_grad():
        loss().backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    inactive = collector.candidates()
    result = {}
    for name, parameter in parameters.items():
        gradient = torch.zeros(parameter.numel)
        if parameter.parameter.grad is not None:
            gradient[parameter.positions().cpu()] = parameter.collect(parameter.parameter.grad).float().cpu()
        gradient[inactive[name].positions.cpu()] = inactive[name].values.float().cpu()
        result[name] = gradient
    return result
