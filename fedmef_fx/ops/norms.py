"""Normalisations that keep their input in few bits and no statistics.

Forward is exact, running statistics included. Backward normalises what was kept again, so that mean, deviation and
gradient belong to the same tensor.
"""

import functools
from collections.abc import Callable
from typing import Any, Final

from torch import Tensor, nn
from torch.nn import functional as F

from fedmef_fx.ops.overridable import overridable
from fedmef_fx.ops.recompute import recompute
from fedmef_fx.packing import KeptTensor

__all__ = ["compressed_batch_norm", "compressed_batch_norm_module", "compressed_norm"]


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, shape: Any, eps: float) -> Tensor:
    return F.layer_norm(x, shape, weight, bias, eps)


def _group_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, groups: int, eps: float) -> Tensor:
    return F.group_norm(x, groups, weight, bias, eps)


def _instance_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float) -> Tensor:
    return F.instance_norm(x, None, None, weight, bias, eps=eps)


def _rms_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, shape: Any, eps: float | None) -> Tensor:
    del bias
    return F.rms_norm(x, shape, weight, eps)


_NORMS: Final[dict[str, Callable[..., Tensor]]] = {
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
}


@overridable
def compressed_norm(
    x: Tensor,
    kept: KeptTensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    function: str,
    **options: Any,
) -> Tensor:
    """A normalisation of each sample by itself, keeping `kept` instead of x for its backward.

    Args:
        x: What the function takes.
        kept: x as it is kept; None keeps x itself.
        weight: Scale.
        bias: Shift; none for "rms_norm".
        function: "group_norm", "instance_norm", "layer_norm" or "rms_norm".
        **options: `eps`, and `groups` or `shape` (the normalised one).

    Returns:
        What torch returns.
    """
    return recompute(functools.partial(_NORMS[function], **options), (x, weight, bias), (kept, None, None))


@overridable
def compressed_batch_norm(
    x: Tensor,
    kept: KeptTensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """BatchNorm, keeping `kept` instead of x for its backward.

    Args:
        x: [N, C, *size].
        kept: x as it is kept; None keeps x itself.
        running_mean: [C], updated in place when training, as running_var.
        running_var: [C].
        weight: Scale, [C].
        bias: Shift, [C].
        training: Whether the statistics are those of the batch.
        momentum: Of the running statistics.
        eps: Added to the variance.

    Returns:
        What torch's batch_norm returns.
    """
    tensors, handles = (x, weight, bias), (kept, None, None)
    if training:

        def once(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            return F.batch_norm(x, running_mean, running_var, weight, bias, training=True, momentum=momentum, eps=eps)

        def again(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)

        return recompute(once, tensors, handles, again=again)

    def of_running_statistics(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None
    ) -> Tensor:
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    # As arguments, so that autograd notices when they change before backward.
    return recompute(of_running_statistics, (*tensors, running_mean, running_var), (*handles, None, None))


@overridable
def compressed_batch_norm_module(x: Tensor, kept: KeptTensor | None, module: nn.modules.batchnorm._BatchNorm) -> Tensor:
    """`compressed_batch_norm` with the parameters, buffers, mode and bookkeeping of a module.

    Args:
        x: What the module takes.
        kept: x as it is kept; None keeps x itself.
        module: An nn.BatchNorm1d, 2d or 3d.

    Returns:
        What the module returns.
    """
    module._check_input_dim(x)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    momentum = 0.0 if module.momentum is None else module.momentum
    if module.training and module.track_running_stats and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if module.momentum is None:
            momentum = 1.0 / float(module.num_batches_tracked)
    uses_batch = module.training or (module.running_mean is None and module.running_var is None)
    tracks = not module.training or module.track_running_stats
    return compressed_batch_norm(
        x,
        kept,
        module.running_mean if tracks else None,
        module.running_var if tracks else None,
        module.weight,
        module.bias,
        training=uses_batch,
        momentum=momentum,
        eps=module.eps,
    )
