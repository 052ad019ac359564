"""The diagonal of the Fisher matrix in K-FAC's form, of every weight of convolutions and linear layers, masked or not.

For a layer y = W a with a batch of N samples and T positions each (Grosse and Martens, ICML 2016):

    diag(A)_j = 1/N       sum_n sum_t a_j(n, t)^2            j an input of the kernel: channel and place in the kernel
    diag(G)_o = 1/(N T)   sum_n sum_t (dL_n / dy_o(n, t))^2  o an output channel
    F_oj      = diag(G)_o * diag(A)_j

a_j(n, t) is x shifted by the place, so diag(A) of a convolution is a strided sum of x^2 per place in the kernel: one
pass of x^2, summed over the batch first. Patches of x are never laid out.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedmef_fx.errors import ConfigError
from fedmef_fx.ops.layers import pruned_convolution, pruned_linear
from fedmef_fx.ops.masking import masked_weight
from fedmef_fx.sparse_model.masks import MaskedParameter
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.training.full_gradients import mean_gradients

__all__ = ["input_squares", "mean_gradients_and_fisher"]

AnyBatch = TypeVar("AnyBatch")

_CONVOLUTIONS: Final = (torch.conv1d, torch.conv2d, torch.conv3d)
_CONVOLUTION_ARGUMENTS: Final = ("x", "weight", "bias", "stride", "padding", "dilation", "groups")


def mean_gradients_and_fisher(
    model: nn.Module, loss_fn: Callable[[nn.Module, AnyBatch], Tensor], batches: Iterable[AnyBatch]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients as of `mean_gradients`, and F of every weight; both f32[numel] on the CPU.

    Args:
        model: A transformed model with masks, without NSConv.
        loss_fn: Called as `loss_fn(model, batch)`; returns the mean loss of the batch.
        batches: What `loss_fn` takes.

    Raises:
        ConfigError: A weight that no convolution or linear layer multiplies by, or that makes a transposed one.
    """
    recorder = _Recorder(masked_parameters(model))
    with recorder:
        gradients = mean_gradients(model, loss_fn, batches)
    return gradients, recorder.fisher()


def input_squares(
    squares: Tensor,
    kernel: tuple[int, ...],
    *,
    out: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """For each channel and place in a kernel the sum of x^2 over all output positions.

    Args:
        squares: x^2 summed over the batch, padded: `[channels, *size]`.
        kernel: Its spatial size.
        out: Spatial size of the output.
        stride: Per spatial dimension.
        dilation: Per spatial dimension.

    Returns:
        `[channels, *kernel]`.
    """
    result = squares.new_empty(squares.shape[0], *kernel)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in kernel)).reshape(-1, len(kernel)).tolist():
        window = [
            slice(at * step, at * step + (count - 1) * jump + 1, jump)
            for at, step, count, jump in zip(place, dilation, out, stride, strict=True)
        ]
        result[(slice(None), *place)] = squares[(slice(None), *window)].flatten(1).sum(1)
    return result


class _Recorder(TorchFunctionMode):
    """Sees the calls of layers, adds up x^2 in their forward and (dL/dy)^2 in their backward."""

    def __init__(self, parameters: Mapping[str, MaskedParameter]) -> None:
        super().__init__()
        self._parameters = parameters
        self._names = {id(masked.parameter): name for name, masked in parameters.items()}
        self._made: dict[int, tuple[str, Tensor]] = {}  # effective weights by identity; held, so that it stays theirs
        self._inputs: dict[str, Tensor] = {}  # sums over samples, [in, *kernel] per group: [groups * in, *kernel]
        self._outputs: dict[str, Tensor] = {}  # sums over batches of N * (mean over samples and positions), [out]
        self._groups: dict[str, int] = {}
        self._samples: dict[str, int] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        kwargs.pop("over_input", None)  # inputs are read after the call
        out = func(*args, **kwargs)
        if func is masked_weight:
            name = self._name(args[0])
            if name is not None:
                self._made[id(out)] = (name, out)
        elif func in _CONVOLUTIONS:
            named = dict(zip(_CONVOLUTION_ARGUMENTS, args, strict=False))
            self._convolution(out, **named, **{"x" if key == "input" else key: kwargs[key] for key in kwargs})
        elif func is F.linear:
            self._linear(out, args[0], args[1] if len(args) > 1 else kwargs["weight"])
        elif func is pruned_convolution:
            self._convolution(out, x=args[0], weight=args[2], **kwargs)
        elif func is pruned_linear:
            self._linear(out, args[0], args[2])
        return out

    def _name(self, weight: Any) -> str | None:
        made = self._made.get(id(weight))
        return self._names.get(id(weight)) if made is None else made[0]

    def _convolution(self, out: Tensor, *, x: Tensor, weight: Any, transposed: bool = False, **geometry: Any) -> None:
        name = self._name(weight)
        if name is None:
            return
        if transposed:
            raise ConfigError(
                f"fisher: {name!r} is a transposed convolution; expected ordinary ones: leave it out, "
                f"ignore=({name.rpartition('.')[0]!r},)"
            )
        kernel = tuple(self._parameters[name].shape[2:])
        dims = len(kernel)
        stride, dilation = (_each(geometry.get(key, 1), dims) for key in ("stride", "dilation"))
        spatial = tuple(out.shape[-dims:])
        with torch.no_grad():
            batch = x.detach() if x.dim() == dims + 2 else x.detach().unsqueeze(0)
            squares = F.pad(batch.float().square().sum(0), _padding(geometry.get("padding", 0), kernel, dilation))
            summed = input_squares(squares, kernel, out=spatial, stride=stride, dilation=dilation)
        self._note(name, out, summed, samples=len(batch), groups=int(geometry.get("groups", 1)), channel=-dims - 1)

    def _linear(self, out: Tensor, x: Tensor, weight: Any) -> None:
        name = self._name(weight)
        if name is not None:
            samples = x.shape[0] if x.dim() > 1 else 1
            summed = x.detach().float().square().reshape(-1, x.shape[-1]).sum(0)
            self._note(name, out, summed, samples=samples, groups=1, channel=-1)

    def _note(self, name: str, out: Tensor, summed: Tensor, *, samples: int, groups: int, channel: int) -> None:
        self._inputs[name] = self._inputs.get(name, torch.zeros_like(summed)) + summed
        self._samples[name] = self._samples.get(name, 0) + samples
        self._groups[name] = groups

        def add(gradient: Tensor) -> None:
            with torch.no_grad():
                # The loss is a mean over samples: N times its gradient is that of a sample's own loss.
                rows = gradient.detach().float().movedim(channel, 0).flatten(1)
                found = (rows * samples).square().mean(1) * samples
                self._outputs[name] = self._outputs.get(name, torch.zeros_like(found)) + found

        if out.requires_grad:
            out.register_hook(add)  # type: ignore[no-untyped-call]  # torch leaves it unannotated

    def fisher(self) -> dict[str, Tensor]:
        """F of every weight, f32[numel]."""
        return {name: self._fisher_of(name, parameter.shape) for name, parameter in self._parameters.items()}

    def _fisher_of(self, name: str, shape: torch.Size) -> Tensor:
        if name not in self._inputs or name not in self._outputs:
            raise ConfigError(
                f"fisher: {name!r}: no convolution or linear layer that the loss depends on multiplies by it; expected "
                f"one: leave its module out, e.g. Config(ignore=({name.rpartition('.')[0]!r},))"
            )
        count, groups = self._samples[name], self._groups[name]
        inputs = (self._inputs[name] / count).reshape(groups, 1, math.prod(shape[1:]))
        outputs = (self._outputs[name] / count).reshape(groups, shape[0] // groups, 1)
        return (outputs * inputs).flatten().cpu()


def _each(value: Any, dims: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (int(value),) * dims


def _padding(value: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> list[int]:
    """As `F.pad` takes it: last dimension first, before and after."""
    if value == "valid":
        value = 0
    if value == "same":
        totals = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        pairs = [(size, size) for size in _each(value, len(kernel))]
    return [size for pair in reversed(pairs) for size in pair]
