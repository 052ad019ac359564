"""The kernels behind packed activations, and which implementation runs them.

Three implementations give the same bits: `"native"` (C, compiled when the package is installed), `"numpy"`, `"torch"`.

`"auto"` is, on the CPU, `"native"` where its kernels were compiled and `"numpy"` elsewhere; on every other device it is
`"torch"`, on CUDA with kernels in Triton where that is there (`fedmef_fx.packing.triton_choice`). The choice is made
when something is first packed, not at import; `set_backend` or `FEDMEF_FX_BACKEND` in the environment make another one.
`"numba"`, the name of an implementation that is gone, stands for `"native"`.
"""

import functools
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Final, Literal, Protocol, get_args

from torch import Tensor

from fedmef_fx.errors import ConfigError
from fedmef_fx.native import why_missing
from fedmef_fx.packing.backend_meta import MetaBackend
from fedmef_fx.packing.backend_native import NativeBackend
from fedmef_fx.packing.backend_numpy import NumpyBackend
from fedmef_fx.packing.backend_torch import TorchBackend
from fedmef_fx.packing.layout import has_no_values
from fedmef_fx.packing.operators import define_operators
from fedmef_fx.packing.tracers import is_exported, is_traced
from fedmef_fx.packing.triton_choice import triton_module

__all__ = [
    "ENVIRONMENT_VARIABLE",
    "Backend",
    "BackendName",
    "available_backends",
    "backend",
    "backend_for",
    "meta_backend",
    "set_backend",
    "using_backend",
]

BackendName = Literal["auto", "native", "numpy", "torch", "numba"]
ENVIRONMENT_VARIABLE: Final = "FEDMEF_FX_BACKEND"
_NAMES: Final = get_args(BackendName)
_FORMER: Final = "numba"


class Backend(Protocol):
    """Kernels on flat (one-dimensional, contiguous) tensors of float16, bfloat16, float32 or float64.

    Bitmaps are uint8 `[ceil(n / 8)]` in the bit order of `fedmef_fx.packing.bitmap`. Every tensor is on one device,
    gradients are not recorded, and any n is allowed, 0 included.
    """

    @property
    def name(self) -> str:
        """The name under which `backend` finds it."""

    def pack(self, x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        """Split off the elements that are larger in magnitude than a threshold.

        Args:
            x: `[n]`.
            threshold: >= 0. Kept is what is not `|x| <= threshold`: never a zero, always NaN.

        Returns:
            The bitmap of the kept elements and their values `[kept]`, in order and in the dtype of `x`.
        """

    def unpack(self, bitmap: Tensor, values: Tensor, *, out: Tensor) -> None:
        """Write values to the set positions of `out` `[n]` and 0 to all others."""

    def gather(self, bitmap: Tensor, dense: Tensor) -> Tensor:
        """The elements `[kept]` of `dense` `[n]` at the set positions, in order."""

    def clamp_bits(self, x: Tensor, *, out: Tensor, low: float = 0.0, high: float = math.inf) -> Tensor:
        """`out = clamp(x, low, high)`, and where a gradient passes through it.

        Args:
            x: `[n]`.
            out: `[n]`; may be `x`.
            low: Lower bound; -inf for none.
            high: Upper bound; inf for none.

        Returns:
            The bitmap of the elements with `low < x < high`. As in torch, NaN passes, and infinity passes where there
            is no bound.
        """

    def mask_by_bits(self, bitmap: Tensor, grad: Tensor, *, out: Tensor, scale_off: float = 0.0) -> None:
        """`out = grad` where the bit is set, else `grad * scale_off` (0 for a scale of 0, even where grad is infinite).

        Args:
            bitmap: What `clamp_bits` returned.
            grad: `[n]`.
            out: `[n]`; may be `grad`.
            scale_off: The slope on the other side, e.g. that of a leaky ReLU.
        """


def available_backends() -> tuple[str, ...]:
    """The names that `backend` accepts on this machine."""
    native = () if why_missing() else ("native",)
    return (*native, "numpy", "torch")


@functools.cache
def meta_backend() -> MetaBackend:
    """The backend of tensors without values, which can also keep a number of elements that is given."""
    return MetaBackend(lambda: backend().name)


@functools.cache
def _load(name: str) -> Backend:
    if name == "numpy":
        return NumpyBackend()
    if name == "torch":
        return TorchBackend()
    reason = why_missing()
    if reason:
        raise ConfigError(f'backend: there are no kernels for "native": {reason}; or use "auto", which is "numpy" here')
    return NativeBackend()


_chosen: str | None = None


def _checked(name: str, source: str) -> str:
    if name not in _NAMES:
        allowed = " | ".join(repr(known) for known in _NAMES if known != _FORMER)
        raise ConfigError(f"{source}: got {name!r}; expected {allowed}")
    return "native" if name == _FORMER else name


@functools.cache
def _from_environment() -> str:
    """Looked up when something is first packed: kernels ask hundreds of times in a step."""
    return _checked(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE)


def set_backend(name: BackendName) -> None:
    """Choose the implementation for CPU tensors in this process.

    Raises:
        ConfigError: An unknown name, or `"native"` where its kernels were not compiled.
    """
    global _chosen  # noqa: PLW0603  # the one process-wide setting of this package
    concrete = _checked(name, "set_backend")
    if concrete != "auto":
        _load(concrete)
    _chosen = concrete


@contextmanager
def using_backend(name: BackendName) -> Iterator[None]:
    """`set_backend` for the duration of a `with` block."""
    global _chosen  # noqa: PLW0603
    before = _chosen
    set_backend(name)
    try:
        yield
    finally:
        _chosen = before


def backend(name: BackendName = "auto") -> Backend:
    """An implementation by name; `"auto"` is explained at the top of this file.

    Raises:
        ConfigError: An unknown name, or `"native"` where its kernels were not compiled.
    """
    concrete = name if name == "auto" else _checked(name, "backend")
    if concrete == "auto":
        concrete = _chosen or _from_environment()
    if concrete == "auto":
        concrete = "numpy" if why_missing() else "native"
    return _load(concrete)


def backend_for(x: Tensor) -> Backend:
    """The implementation for a tensor: the chosen one on the CPU, torch on other devices, sizes only without values.

    While it is traced: operators of torch, or torch alone where the trace leaves this process.
    """
    if is_traced():
        return _load("torch") if is_exported() else _OPERATORS
    if has_no_values(x):
        return meta_backend()
    return _kernels_for(x)


def _kernels_for(x: Tensor) -> Backend:
    if x.device.type == "cpu":
        return backend()
    kernels = triton_module("fedmef_fx.packing.triton_bits") if x.device.type == "cuda" else None
    return _load("torch") if kernels is None else _triton(kernels)


@functools.cache
def _triton(kernels: ModuleType) -> Backend:
    made: Backend = kernels.TritonBackend()
    return made


# At import, so that programs that were traced elsewhere and call them can be read.
_OPERATORS: Final = define_operators(_kernels_for)
