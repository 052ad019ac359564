"""The kernels behind packed activations, and which implementation runs them.

Three implementations give the same bits: `"numpy"`, `"numba"` (the extra `fedmef-fx[fast]`) and `"torch"`.

`"auto"` is, on the CPU, `"numba"` where it is installed and `"numpy"` elsewhere; on every other device it is `"torch"`.
The choice is made when something is first packed, not at import. numba's kernels take a third of numpy's time
(`benchmarks/packing.py`), but its compiler stays in memory with about 130 MB: clients whose memory is what counts leave
the extra out, or choose `set_backend("numpy")` or `FEDMEF_FX_BACKEND=numpy` in the environment.
"""

import functools
import importlib.util
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Literal, Protocol, get_args

from torch import Tensor

from fedmef_fx.errors import ConfigError
from fedmef_fx.packing.backend_meta import MetaBackend
from fedmef_fx.packing.layout import has_no_values

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

BackendName = Literal["auto", "numpy", "numba", "torch"]
ENVIRONMENT_VARIABLE: Final = "FEDMEF_FX_BACKEND"
_NAMES: Final = get_args(BackendName)


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
    numba = ("numba",) if _has_numba() else ()
    return ("numpy", *numba, "torch")


@functools.cache
def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


@functools.cache
def meta_backend() -> MetaBackend:
    """The backend of tensors without values, which can also keep a number of elements that is given."""
    return MetaBackend(lambda: backend().name)


@functools.cache
def _load(name: str) -> Backend:
    # Imported here: numba takes half a second and dozens of megabytes, which only its users should pay.
    if name == "numpy":
        from fedmef_fx.packing.backend_numpy import NumpyBackend  # noqa: PLC0415

        return NumpyBackend()
    if name == "torch":
        from fedmef_fx.packing.backend_torch import TorchBackend  # noqa: PLC0415

        return TorchBackend()
    if not _has_numba():
        raise ConfigError('backend: "numba" is not installed; pip install "fedmef-fx[fast]", or use "auto"')
    from fedmef_fx.packing.backend_numba import NumbaBackend  # noqa: PLC0415

    return NumbaBackend()


_chosen: str | None = None


def _checked(name: str, source: str) -> str:
    if name not in _NAMES:
        allowed = " | ".join(map(repr, _NAMES))
        raise ConfigError(f"{source}: got {name!r}; expected {allowed}")
    return name


def set_backend(name: BackendName) -> None:
    """Choose the implementation for CPU tensors in this process.

    Raises:
        ConfigError: An unknown name, or `"numba"` where it is not installed.
    """
    global _chosen  # noqa: PLW0603  # the one process-wide setting of this package
    if _checked(name, "set_backend") != "auto":
        _load(name)
    _chosen = name


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
        ConfigError: An unknown name, or `"numba"` where it is not installed.
    """
    concrete = _checked(name, "backend")
    if concrete == "auto":
        concrete = _chosen or _checked(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE)
    if concrete == "auto":
        concrete = "numba" if _has_numba() else "numpy"
    return _load(concrete)


def backend_for(x: Tensor) -> Backend:
    """The implementation for a tensor: the chosen one on the CPU, torch on other devices, sizes only without values."""
    if has_no_values(x):
        return meta_backend()
    return backend() if x.device.type == "cpu" else _load("torch")
