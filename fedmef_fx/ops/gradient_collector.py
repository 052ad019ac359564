"""How dense gradients of single layers reach whoever looks for weights to grow, without being kept.

The backward of a masked weight returns 0 where the mask is off, but growth needs the gradient there. An op that has
the dense gradient of its layer calls `add_candidates(mask, gradient)` before it masks it; the mask of a packed weight
is its bitmap. Normally nobody collects and the call returns at once. Inside `collecting(...)` the collector
keeps, of each registered mask,

1. while a parameter's backward is under way: the inactive part of the gradient, added up over its uses (a tied weight
   hands one over per use), until `Collector.complete` says that all uses have added theirs, which for a weight used
   once is right away;
2. between batches: the running sums of weight times gradient at all inactive coordinates. Up to `EXACT` of them are
   summed in at least single precision, at 4 bytes each. Beyond, a parameter's sums are rounded to 11 bits after each
   batch, relative to a power of two that follows their largest: 2 bytes for each inactive coordinate, whatever k is.
   After the batch that is said to be the last there are no sums, only the k largest.

A result is the exact average where there is one batch or the sums are not rounded. Rounding moves a sum by at most one
part in 2048 per batch, either way: after 175 batches values are off by less than 1 % and about as many positions of
the k largest. Sums at a few coordinates alone would take as much in the first rounds of a schedule and find two thirds
of the k largest in its last: with small batches a coordinate's first gradients say little about where its average ends.
`benchmarks/growth_candidates.py` prints both.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from fedmef_fx.errors import ConfigError, PassError
from fedmef_fx.packing.backends import backend_for
from fedmef_fx.packing.bitmap import bitmap_nbytes, pack_bits, unpack_bits
from fedmef_fx.sparsity.selection import largest_positions, magnitudes
from fedmef_fx.sparsity.sparse_gradient import SparseGradient

__all__ = ["EXACT", "Collector", "Request", "add_candidates", "collecting", "is_collecting"]


class Request(NamedTuple):
    """What is collected of one parameter.

    Attributes:
        mask: The mask buffer itself, boolean, True = active; or its bitmap.
        k: Number of coordinates asked for.
        where: Coordinates that may be candidates, boolean, of the mask's shape; None for all inactive ones.
        units: Number of the unit of each coordinate, of the mask's shape, for candidates that are whole units such as
            channels: then a position is a unit's number, and its value the mean over batches of its gradient's norm.
            None for single coordinates.
        space: Whose gradients are collected where a kernel is made of the parameter: the parameter's, or those of the
            "effective" weight; see `ops/effective_space.py`.
    """

    mask: Tensor
    k: int
    where: Tensor | None = None
    units: Tensor | None = None
    space: Literal["effective", "parameter"] = "parameter"


EXACT: Final = 1 << 14
"""Coordinates of a parameter up to which its sums are not rounded."""

# Coordinates that are looked at together, a multiple of 8, and sums; what a block needs is a few times as large.
_BLOCK: Final = 1 << 18
_SUMS: Final = 1 << 14

_Key = tuple[torch.device, int, torch.Size]


@dataclasses.dataclass(slots=True, eq=False)
class _Layer:
    """What is kept of one parameter; positions count its inactive coordinates only."""

    name: str
    buffer: Tensor  # bool mask or bitmap; held, so that no other can come to lie at its address meanwhile
    shape: torch.Size  # of the dense weight
    k: int
    where: Tensor | None  # bool, of the shape, the coordinates that are looked at; None for all inactive ones
    units: Tensor | None  # int64 [looked at], for candidates that are whole units
    space: Literal["effective", "parameter"]
    pending: Tensor | None = None  # [inactive], this batch's gradient so far
    sums: Tensor | None = None  # [inactive], running sums of weight * gradient, divided by scale
    scale: Tensor | None = None  # a power of two where sums are rounded
    only: tuple[Tensor, Tensor] | None = None  # ordinals and values of the k largest, after one batch or the last

    def inactive(self) -> Tensor:
        """The bitmap of the inactive coordinates that are looked at."""
        if self.where is not None:
            return pack_bits(self.where)
        if self.buffer.dtype == torch.bool:
            return pack_bits(~self.buffer)
        bits = ~self.buffer
        if tail := self.shape.numel() % 8:
            bits[-1] &= (1 << tail) - 1
        return bits

    def positions_of(self, ordinals: Tensor) -> Tensor:
        """Flat positions of some inactive coordinates, given by their ascending numbers among all inactive ones."""
        bits, numel = self.inactive(), self.shape.numel()
        found, first = [ordinals[:0]], 0
        for start in range(0, numel, _BLOCK):  # an index of all of them would be as large as two dense weights
            count = min(_BLOCK, numel - start)
            here = unpack_bits(bits[start // 8 : bitmap_nbytes(start + count)], count).nonzero().squeeze(1)
            last = first + here.numel()
            low, high = torch.searchsorted(ordinals, torch.tensor([first, last], device=ordinals.device)).tolist()
            found.append(here[ordinals[low:high] - first] + start)
            first = last
        return torch.cat(found)

    def add(self, gradient: Tensor) -> None:
        inactive = backend_for(gradient).gather(self.inactive(), gradient.detach().reshape(-1))
        inactive = inactive.to(torch.promote_types(inactive.dtype, torch.float32))
        self.pending = inactive if self.pending is None else self.pending.add_(inactive)

    def fold(self, weight: float, *, is_last: bool) -> None:
        """Move the finished gradient of a batch into the running sums, or of the last one into the k largest."""
        if self.pending is None or self.k == 0:
            self.pending = None
            return
        totals = self.pending.mul_(weight)
        self.pending = None
        if self.units is not None and totals.numel():
            squares = totals.new_zeros(int(self.units.max()) + 1).index_add_(0, self.units, totals.square_())
            totals = squares.sqrt_()
        if self.sums is not None:
            for start in range(0, totals.numel(), _SUMS):
                part = totals[start : start + _SUMS]
                part.add_(self._unrounded(self.sums[start : start + _SUMS], totals.dtype))
        if totals.numel() <= EXACT:
            self.sums = totals
            return
        if is_last:
            if self.sums is None and self.only is not None:  # this batch comes in parts, of which this is a later one
                totals.index_add_(0, *self.only)
            self.only, self.sums, self.scale = _largest(totals, self.k), None, None
            return
        self.only = _largest(totals, self.k) if self.sums is None else None
        # frexp gives the exponent of the next larger power of two; the largest sum becomes 2 ** 14 to 2 ** 15.
        exponent = torch.frexp(totals.abs().max()).exponent
        self.scale = torch.ldexp(totals.new_ones(()), exponent - 15)
        if self.sums is None or self.sums.dtype != torch.float16:
            self.sums = torch.empty_like(totals, dtype=torch.float16)
        self.sums.copy_(totals.div_(self.scale))

    def _unrounded(self, sums: Tensor, dtype: torch.dtype) -> Tensor:
        return sums if self.scale is None else sums.to(dtype).mul_(self.scale)

    def candidates(self, total_weight: float) -> SparseGradient:
        if self.sums is None and self.only is None:
            nothing = torch.empty(0, device=self.buffer.device)
            return SparseGradient(nothing.long(), nothing, self.shape.numel())
        if self.only is not None:
            chosen, values = self.only
        else:
            assert self.sums is not None  # noqa: S101  # one of the two is there
            chosen, values = _largest(self._unrounded(self.sums, torch.float32), self.k)
        chosen = chosen.long()
        positions = chosen if self.units is not None else self.positions_of(chosen)
        return SparseGradient(positions, values / total_weight, self.shape.numel())


def _largest(sums: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Where the k largest magnitudes are, ascending, int32, and the values there; found without a copy of all sums."""
    chosen = torch.empty(0, dtype=torch.int64, device=sums.device)
    size = max(_SUMS, k)
    for start in range(0, sums.numel(), size):
        block = sums[start : start + size]
        # Those chosen so far come first, so that of equal sums the earlier position wins in every round.
        rivals = torch.cat([sums[chosen], block])
        best = largest_positions(magnitudes(rivals), min(k, rivals.numel()))
        old = chosen.numel()
        kept = chosen[best[best < old]]
        chosen = torch.cat([kept, best[best >= old] + (start - old)])
    return chosen.to(torch.int32), sums[chosen]  # those of all layers are kept until the end


class Collector:
    """Gathers what layers add; made by `collecting`."""

    def __init__(self, layers: Mapping[str, _Layer]) -> None:
        self._layers = dict(layers)
        self._total_weight = 0.0
        self._batch_weight: float | None = None
        self._is_last = False

    @contextlib.contextmanager
    def batch(self, weight: float, *, is_last: bool = False) -> Iterator[None]:
        """A block around one forward and backward pass; if it raises, what is pending is dropped.

        Args:
            weight: The batch's weight in the average, > 0, e.g. its number of samples.
            is_last: Whether no other follows, so that nothing but candidates has to be kept.
        """
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"Collector.batch: weight: got {weight!r}; expected a finite number > 0")
        self._batch_weight, self._is_last = weight, is_last
        try:
            yield
            for layer in self._layers.values():
                layer.fold(weight, is_last=is_last)
            self._total_weight += weight
        finally:
            self._batch_weight = None
            for layer in self._layers.values():
                layer.pending = None

    def complete(self, name: str) -> None:
        """Say that every use of a parameter has added its candidates in this batch, so that its dense buffer can go.

        Candidates that come later in the same batch are added as if they were a batch of their own; in the last batch,
        to the k that were the largest before. A parameter that is never completed is folded at the end of the batch.
        """
        if self._batch_weight is not None:
            self._layers[name].fold(self._batch_weight, is_last=self._is_last)

    def candidates(self) -> dict[str, SparseGradient]:
        """Per parameter the k largest averaged gradients at inactive coordinates; none where nothing was added."""
        total = self._total_weight or 1.0
        return {name: layer.candidates(total) for name, layer in self._layers.items()}


# Not thread-local: on accelerators autograd runs backward in threads of its own.
_COLLECTED: dict[_Key, _Layer] = {}


def _key(mask: Tensor) -> _Key:
    # By address, not by object: autograd and views may hand the op another tensor object for the same buffer.
    return mask.device, mask.data_ptr(), mask.shape


@contextlib.contextmanager
def collecting(
    requests: Mapping[str, tuple[Tensor, int] | Request],
    *,
    packed_shapes: Mapping[str, torch.Size] | None = None,
) -> Iterator[Collector]:
    """A block in which the gradients that ops add for some masks are collected.

    Blocks for different models may overlap, also in different threads.

    Args:
        requests: Parameter name -> its mask (the buffer itself, boolean, True = active; or its bitmap) and k, the
            number of coordinates asked for, or a `Request`.
        packed_shapes: Shapes of the dense weights of which `requests` has the bitmap.

    Yields:
        The collector.

    Raises:
        ConfigError: A negative k, or a mask that is being collected already.

    Example:
        >>> mask = torch.tensor([True, False, False])
        >>> with collecting({"w": (mask, 1)}) as collector, collector.batch(1.0):
        ...     add_candidates(mask, torch.tensor([9.0, 1.0, -2.0]))
        >>> collector.candidates()["w"].positions
        tensor([2])
    """
    layers, shapes = {}, packed_shapes or {}
    for name, request in requests.items():
        mask, k, where, units, space = Request(*request)
        if k < 0:
            raise ConfigError(f"collecting: {name!r}: got k={k}; expected an integer >= 0")
        if mask.numel() and _key(mask) in _COLLECTED:
            raise ConfigError(
                f"collecting: {name!r}: its gradients are being collected already; expected one collection at a time"
            )
        looked_at = units if units is None or where is None else units.flatten()[where.flatten()]
        layers[name] = _Layer(name, mask, shapes.get(name, mask.shape), k, where, looked_at, space)
    collector = Collector(layers)
    # Empty tensors all share the address 0, and have nothing to add.
    registered = {_key(layer.buffer): layer for layer in layers.values() if layer.buffer.numel()}
    _COLLECTED.update(registered)
    try:
        yield collector
    finally:
        for key in registered:
            del _COLLECTED[key]


def is_collecting() -> bool:
    """Whether anybody collects, for ops that would have to compute something extra before they can add candidates."""
    return bool(_COLLECTED)


def add_candidates(mask: Tensor, gradient: Tensor, *, of_parameter: Callable[[], Tensor] | None = None) -> None:
    """Show the dense gradient of a masked weight to whoever collects; called by ops in backward.

    Costs one dictionary look-up when nobody collects. The gradient is copied as far as it is needed and may be changed
    in place afterwards.

    Args:
        mask: The mask buffer of the weight, boolean, or its bitmap.
        gradient: Gradient of the loss with respect to the effective weight, of its dense shape, not yet masked.
        of_parameter: Makes that of the parameter, for whoever asked for it; None where the two are the same.

    Raises:
        PassError: A gradient of another shape: a bug of the op.
    """
    if not _COLLECTED:
        return
    layer = _COLLECTED.get(_key(mask))
    if layer is None:
        return
    if of_parameter is not None and layer.space == "parameter":
        gradient = of_parameter()
    if gradient.shape != layer.shape:
        raise PassError(
            f"add_candidates: {layer.name!r}: got a gradient of shape {tuple(gradient.shape)}; "
            f"expected {tuple(layer.shape)}, the shape of its mask"
        )
    layer.add(gradient)
