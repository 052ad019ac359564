"""Sites and handles of tensors that are kept in few bits for the backward of the operations that read them."""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from fedmef_fx.errors import FedmefError
from fedmef_fx.ops.named import NAMED
from fedmef_fx.ops.noise_site import NoiseSite
from fedmef_fx.ops.overridable import overridable
from fedmef_fx.packing import BlockCode, BlockwiseTensor, KeptTensor, why_dense
from fedmef_fx.packing.bit_planes import Bits
from fedmef_fx.packing.codecs import KeptWhole
from fedmef_fx.packing.tracers import is_traced

__all__ = ["KeepActivation", "encoded", "recomputed", "remasked", "value_of"]

_SMALL_BLOCK: Final = 64


def encoded(x: Tensor, bits: Bits = 8, *, key: int | None = None) -> tuple[BlockwiseTensor | None, str]:
    """A tensor in few bits, or None and the reason: it would take no fewer bytes, or has no such format.

    Below 8 bits blocks are small, and rounding is stochastic: the errors of the nearest codes add up over the steps,
    and a transformer stops learning.

    Args:
        x: Any shape.
        bits: How many.
        key: Of the noise of stochastic rounding; None for nearest.
    """
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return None, f"keeps dense: {x.dtype} has no {bits}-bit form"
    code = BlockCode(bits)
    if bits < 8:
        code = BlockCode(bits, block=_SMALL_BLOCK, rounding="nearest" if key is None else "stochastic")
    reason = why_dense(code.nbytes(x.numel(), x.dtype), x.numel(), x.dtype)
    return (None, reason) if reason else (BlockwiseTensor.encode(x.detach(), code, key=key), "")


class KeepActivation(NoiseSite):
    """Keeps an activation in few bits for the backward of everything that reads it.

    Attributes:
        bits: How many.
        reason: Why the last tensor was left to be kept as it is; empty where it was encoded.
    """

    bits: Bits = 8  # that of a model that was pickled when there were no others

    def __init__(self, bits: Bits = 8, *, seed: int = 0) -> None:
        super().__init__(seed)
        self.bits = bits
        self.reason = ""

    def forward(self, x: Tensor) -> BlockwiseTensor | None:
        """Encode x, of any shape; None where no gradient is recorded or the bits would not save memory."""
        if not torch.is_grad_enabled() or is_traced():
            return None
        kept, self.reason = encoded(x, self.bits, key=self.noise.next_key() if self.is_stateful else None)
        return kept

    @property
    def is_stateful(self) -> bool:
        """Whether it rounds at random."""
        return self.bits < 8

    def extra_repr(self) -> str:
        """The line that `print(model)` shows."""
        few = "" if self.bits == 8 else f"bits={self.bits}"
        return ", ".join(filter(None, (few, self.reason)))


class _Recomputed(KeptWhole):
    """The result of a function of a kept tensor, computed again whenever it is needed: it takes no bytes of its own."""

    __slots__ = ("_args", "_function", "_kept", "_kwargs")

    def __init__(self, kept: KeptTensor, function: Callable[..., Tensor], args: Any, kwargs: dict[str, Any]) -> None:
        self._kept, self._function, self._args, self._kwargs = kept, function, args, kwargs

    def unpack(self) -> Tensor:
        """The function's result on what was kept of its input."""
        with torch.no_grad():
            return self._function(self._kept.unpack(), *self._args, **self._kwargs)

    @property
    def nbytes(self) -> int:
        """None: the input is kept for other readers."""
        return 0


@overridable
def recomputed(kept: KeptTensor | None, *args: Any, function: str, **options: Any) -> KeptTensor | None:
    """Keep the result of a function by keeping its input.

    Args:
        kept: The function's first argument, as it is kept; None for one that is not.
        *args: Its other arguments.
        function: Its name, that of its row.
        **options: Its keyword arguments.

    Returns:
        A handle without bytes of its own; None where the input is not kept.
    """
    return None if kept is None else _Recomputed(kept, NAMED[function].function, args, options)


@overridable
def remasked(weight: Tensor, mask: Tensor) -> KeptTensor:
    """Keep a masked weight by keeping the parameter and its mask, which live anyway.

    Args:
        weight: The parameter.
        mask: Boolean, of the same shape.
    """
    return _Recomputed(_Alive(weight), _masked, (mask,), {})


class _Alive(KeptWhole):
    """A tensor of the model, as it is."""

    __slots__ = ("_tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def unpack(self) -> Tensor:
        """The tensor itself."""
        return self._tensor

    @property
    def nbytes(self) -> int:
        """None of its own."""
        return 0


def _masked(weight: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, weight, 0.0)


def value_of(kept: KeptTensor | None, exact: Tensor | None) -> Tensor:
    """A tensor in backward: decoded, or as it was saved.

    Raises:
        FedmefError: There is neither.
    """
    if exact is not None:
        return exact
    if kept is None:
        raise FedmefError(
            "backward: what was kept for it is freed already; expected one backward per forward: run forward again"
        )
    return kept.unpack()
