"""Where new weights would help most: the largest gradients at coordinates that the masks switch off."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fedmef_fx.errors import ConfigError, DataError
from fedmef_fx.ops.gradient_collector import Collector, collecting
from fedmef_fx.ops.noise_site import NoiseSite
from fedmef_fx.sparse_model.masks import MaskedParameter
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.sparse_model.transformation import transformation_of
from fedmef_fx.sparsity.schedule import adjustment_count
from fedmef_fx.sparsity.sparse_gradient import SparseGradient
from fedmef_fx.training.adjustment import growth_requests, sampled, unit_candidates, unit_sizes

__all__ = ["batch_size_of", "growth_candidates", "unchanged"]

AnyBatch = TypeVar("AnyBatch")


def growth_candidates(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, AnyBatch], Tensor],
    batches: Iterable[AnyBatch],
    *,
    k: int | Mapping[str, int] | None = None,
) -> dict[str, SparseGradient]:
    """The largest |gradients| of a loss at the inactive coordinates of each masked parameter.

    This is what a FedMef client uploads in an adjustment round. Gradients are those of the effective (masked) weight,
    averaged over batches in proportion to their sizes. Dense gradients exist for one layer at a time (for a tied
    weight, from its last use to its first); between batches sums are kept, at 2 bytes per inactive coordinate. With one
    batch there are none, and the result is exact; with several, `fedmef_fx.ops.gradient_collector` states how sums are
    rounded.

    The model runs in the mode it is in. Afterwards its parameters, their `.grad`, its buffers (running statistics of
    normalisation included), its activation thresholds and the state of torch's generators are what they were. Hooks
    that others put on the parameters do run: an optimizer that steps inside backward has to be taken off first.

    With `granularity="channel"` a candidate is a channel: its position is that of the channel's first weight in the
    first layer of its group, its value the norm of the gradient of all its weights, averaged over batches. With "N:M"
    candidates are the best coordinates of the k groups of M whose lowest active weight is lowest.

    Args:
        model: A transformed model with masks.
        loss_fn: Called as `loss_fn(model, batch)`; returns a scalar, the mean loss of the batch.
        batches: What `loss_fn` takes. The size of a batch is the first dimension of the first tensor found in it
            (in tuples, lists and mappings); a batch without one counts as 1.
        k: Coordinates asked for: one number for all parameters, or parameter name -> number (0 if left out). Default:
            the share alpha, `adjustment_rate` of the model's configuration, of a parameter's active weights.

    Returns:
        Parameter name -> positions and values, ascending in position, at most k and never more than there are inactive
        coordinates; none for a parameter that the loss does not reach or that needs no gradient.

    Raises:
        ConfigError: A model that was not transformed or has no masks, an unknown name or negative number in `k`, a
            loss that is no scalar or has no gradient, or gradients that are not finite.
        DataError: No batches.

    Example:
        >>> def loss_fn(model, batch):
        ...     images, labels = batch
        ...     return torch.nn.functional.cross_entropy(model(images), labels)
        >>> candidates = growth_candidates(sparse, loss_fn, [(images, labels)], k=16)  # doctest: +SKIP
    """
    parameters = masked_parameters(model)
    if not parameters:
        raise ConfigError(
            "growth_candidates: the model has no masks, so there is nothing to grow; expected a density below 1, "
            "e.g. fedmef_fx.transform(model, fedmef_fx.Config(density=0.1))"
        )
    numbers = _numbers(model, parameters, k)
    requests = growth_requests(model, parameters, numbers)
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    seen = 0
    with (
        unchanged(model, parameters),
        sampled(model),
        collecting(requests, packed_shapes=shapes) as collector,
        _gradients_dropped(model, parameters, collector),
    ):
        for batch, is_last in _with_last(batches):
            with collector.batch(float(batch_size_of(batch) or 1), is_last=is_last), torch.enable_grad():
                _backward(model, loss_fn(model, batch))
            seen += 1
        if not seen:
            raise DataError("growth_candidates: got no batches; expected at least one")
        return unit_candidates(model, collector.candidates(), numbers)


def _with_last(batches: Iterable[AnyBatch]) -> Iterator[tuple[AnyBatch, bool]]:
    """Each batch, and whether it is the last: what is known of it saves the sums that another would be added to."""
    rest = iter(batches)
    for batch in rest:
        for following in rest:
            yield batch, False
            batch = following  # noqa: PLW2901  # the inner loop is the walk
        yield batch, True


def _numbers(
    model: nn.Module, parameters: Mapping[str, MaskedParameter], k: int | Mapping[str, int] | None
) -> list[int]:
    if isinstance(k, int):
        return [k] * len(parameters)
    if k is not None:
        unknown = sorted(set(k) - set(parameters))
        if unknown:
            raise ConfigError(
                f"growth_candidates: k: {unknown[0]!r} has no mask; masked parameters: {', '.join(parameters)}"
            )
        return [k.get(name, 0) for name in parameters]
    rate = transformation_of(model).config.adjustment_rate
    sizes = unit_sizes(model)
    # The count of round 0 is the schedule's largest, independent of where it stops.
    return [
        adjustment_count(count, rest, round_index=0, stop=1, rate=rate)
        for count, rest in (sizes[name] for name in parameters)
    ]


def _backward(model: nn.Module, loss: Tensor) -> None:
    if loss.numel() != 1:
        raise ConfigError(
            f"growth_candidates: loss_fn returned a tensor of shape {tuple(loss.shape)}; expected a scalar"
        )
    if not loss.requires_grad:
        raise ConfigError(
            "growth_candidates: loss_fn returned a loss without a gradient; expected one computed from the model, "
            "without torch.no_grad() or .detach()"
        )
    # Restricted to the model: a parameter of somebody else in the loss must not collect a gradient.
    torch.autograd.backward(loss.reshape(()), inputs=_trainable(model))


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def batch_size_of(batch: Any) -> int | None:
    """First dimension of the first tensor in a batch, None without one."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else None
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    return next((size for size in map(batch_size_of, parts) if size is not None), None)


@contextlib.contextmanager
def _gradients_dropped(
    model: nn.Module, masked_by_name: Mapping[str, MaskedParameter], collector: Collector
) -> Iterator[None]:
    """Free each gradient as soon as it is complete; the `.grad` that parameters came with is back afterwards."""
    names = {id(masked.parameter): name for name, masked in masked_by_name.items()}

    def drop(parameter: Tensor, *, name: str | None) -> None:
        parameter.grad = None
        # Autograd accumulates into a parameter once per backward, after all of its uses: a tied weight is complete.
        if name is not None:
            collector.complete(name)

    parameters = _trainable(model)
    gradients = [parameter.grad for parameter in parameters]
    handles = []
    try:
        for parameter in parameters:
            parameter.grad = None
            hook = functools.partial(drop, name=names.get(id(parameter)))
            handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]  # unannotated
            handles.append(handle)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


@contextlib.contextmanager
def unchanged(model: nn.Module, parameters: Mapping[str, MaskedParameter]) -> Iterator[None]:
    """Put back buffers, thresholds and random state; masks are left out, a forward pass does not change them."""
    masks = {id(parameter.buffer) for parameter in parameters.values()}
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if id(buffer) not in masks
    ]
    sites = [(module, module.state) for module in model.modules() if isinstance(module, NoiseSite)]
    devices = {parameter.parameter.device for parameter in parameters.values()} - {torch.device("cpu")}
    device_type = next((device.type for device in devices), "cuda")
    try:
        with torch.random.fork_rng(devices=sorted(device.index for device in devices), device_type=device_type):
            yield
    finally:
        for site, state in sites:
            site.state = state
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                buffer.copy_(value)
                setattr(module, name, buffer)
