"""Poolings: what slides a window over the last dimensions."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional as F

from fedmef_fx.graph.operators.operator import Keeps, Operator
from fedmef_fx.ops.pooling import adaptive_avg_pool, avg_pool, max_pool

__all__ = ["ROWS", "Pooling"]

_MAX = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_AVG = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pooling(Operator):
    """A pooling.

    Attributes:
        spatial: Its dimensions.
        keeps_constants: Whether a channel that is one number stays that number; elsewhere padding changes it.
    """

    kind: str = "pool"
    keeps: Keeps = "inputs"
    spatial: int
    keeps_constants: bool = True


def _per_dimension(value: Any, dims: int) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,) * dims


def _window(dims: int, options: Mapping[str, Any]) -> dict[str, Any]:
    kernel, stride = _per_dimension(options["kernel_size"], dims), options.get("stride")
    return {
        "kernel": kernel,
        "stride": kernel if stride in (None, ()) else _per_dimension(stride, dims),
        "padding": _per_dimension(options.get("padding", 0), dims),
    }


def _small_max(dims: int, options: Mapping[str, Any]) -> partial[Any] | None:
    if options.get("return_indices"):
        return None
    dilation, ceil_mode = _per_dimension(options.get("dilation", 1), dims), options.get("ceil_mode", False)
    return partial(max_pool, **_window(dims, options), dilation=dilation, ceil_mode=ceil_mode)


def _small_avg(dims: int, options: Mapping[str, Any]) -> partial[Any]:
    return partial(
        avg_pool,
        **_window(dims, options),
        ceil_mode=options.get("ceil_mode", False),
        count_include_pad=options.get("count_include_pad", True),
        divisor_override=options.get("divisor_override"),
    )


def _small_adaptive(dims: int, options: Mapping[str, Any]) -> partial[Any]:
    return partial(adaptive_avg_pool, output_size=_per_dimension(options["output_size"], dims))


def _pooling(name: str, spatial: int, module: type[nn.Module], options: tuple[str, ...], **facts: Any) -> Pooling:
    return Pooling.of_torch(
        f"{name}{spatial}d",
        # Of the adaptive ones torch has others, which return their indices as well.
        spaces=(F,) if name.startswith("adaptive") else (F, torch),
        modules=(module,),
        options=options,
        signature=("input", *options),
        spatial=spatial,
        **facts,
    )


ROWS: Final = (
    *(
        _pooling("max_pool", dims, module, _MAX, small=partial(_small_max, dims))
        for dims, module in enumerate((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), 1)
    ),
    _pooling("avg_pool", 1, nn.AvgPool1d, _AVG, keeps_constants=False),
    *(
        _pooling(
            "avg_pool",
            dims,
            module,
            (*_AVG, "divisor_override"),
            keeps_constants=False,
            small=partial(_small_avg, dims),
        )
        for dims, module in ((2, nn.AvgPool2d), (3, nn.AvgPool3d))
    ),
    _pooling("adaptive_avg_pool", 1, nn.AdaptiveAvgPool1d, ("output_size",)),
    *(
        _pooling("adaptive_avg_pool", dims, module, ("output_size",), small=partial(_small_adaptive, dims))
        for dims, module in ((2, nn.AdaptiveAvgPool2d), (3, nn.AdaptiveAvgPool3d))
    ),
    *(
        _pooling("adaptive_max_pool", dims, module, ("output_size", "return_indices"))
        for dims, module in enumerate((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), 1)
    ),
)
