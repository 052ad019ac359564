"""`SavedTensors`: the bytes that a forward pass leaves behind for the backward pass."""

import bisect
import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Literal, Self

from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks

from fedmef_fx.graph.recording import KeptStorage
from fedmef_fx.packing.registry import held_buffers, next_serial

__all__ = ["SavedKind", "SavedTensors"]

SavedKind = Literal["dense", "packed values", "bitmap", "8-bit"]


class _Saved:
    """A tensor in autograd's keeping: lives exactly as long as autograd holds it."""

    __slots__ = ("__weakref__", "node", "tensor")

    def __init__(self, tensor: Tensor, node: fx.Node | None) -> None:
        self.tensor = tensor
        self.node = node


class SavedTensors:
    """Measure what is kept between forward and backward, at the moment of asking.

    Counted are the storages that autograd saved inside the `with` block and still holds, and the packed buffers made
    inside it that still live; each storage once, whole, also if only a view of it was saved. After backward it reads
    0 again. The meter keeps nothing alive. Within the block autograd does not check whether a saved tensor was
    modified in place (true of every `saved_tensors_hooks`). Who runs a graph node by node and says so with `at` can ask
    which node keeps what.

    Args:
        *exclude: Modules (their parameters and buffers) and tensors that exist anyway and do not count.

    Example:
        >>> import torch
        >>> layer, x = nn.Linear(4, 2), torch.ones(3, 4)
        >>> with SavedTensors(layer) as saved:
        ...     loss = layer(x).sum()
        >>> saved.nbytes, saved.by_kind()
        (48, {'dense': 48, 'packed values': 0, 'bitmap': 0, '8-bit': 0})
        >>> loss.backward(); saved.nbytes
        0
    """

    def __init__(self, *exclude: nn.Module | Tensor) -> None:
        # Weak: a meter must not hold a model. An excluded tensor that is gone excludes nothing.
        self._excluded = [weakref.ref(tensor) for tensor in _tensors(exclude)]
        self._saved: weakref.WeakKeyDictionary[_Saved, None] = weakref.WeakKeyDictionary()  # in order
        self._starts: list[int] = []
        self._nodes: list[fx.Node | None] = []
        self._start = 0
        self._end: int | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._saved.clear()
        self._starts.clear()
        self._nodes.clear()
        self._start, self._end = next_serial(), None
        self._stack.enter_context(saved_tensors_hooks(self._pack, lambda saved: saved.tensor))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end = next_serial()
        self._stack.close()

    def _pack(self, tensor: Tensor) -> _Saved:
        # Detached: a node that saves its own output would otherwise own itself, and never be freed without a backward.
        # Autograd reattaches what it unpacks, so that double backward works all the same.
        saved = _Saved(tensor.detach(), self._nodes[-1] if self._nodes else None)
        self._saved[saved] = None
        return saved

    def at(self, node: fx.Node | None) -> None:
        """From now on, what is kept belongs to this node; None for what no graph does."""
        self._nodes.append(node)
        self._starts.append(next_serial())

    def by_kind(self) -> dict[SavedKind, int]:
        """Bytes held now: dense tensors that autograd saved, packed values, bitmaps, and 8-bit copies."""
        storages = {key: (kind, nbytes) for _, key, kind, nbytes in self._held()}
        total: dict[SavedKind, int] = {"dense": 0, "packed values": 0, "bitmap": 0, "8-bit": 0}
        for kind, nbytes in storages.values():
            total[kind] += nbytes
        return total

    def by_node(self) -> dict[fx.Node | None, tuple[KeptStorage, ...]]:
        """What is held now, by node; a node that keeps what an earlier one keeps already shows it as well."""
        saved: dict[fx.Node | None, dict[int, tuple[SavedKind, int]]] = defaultdict(dict)
        for node, key, kind, nbytes in self._held():
            saved[node][key] = (kind, nbytes)
        order = {node: index for index, node in enumerate((None, *self._nodes))}
        numbers: dict[int, int] = {}
        return {
            node: tuple(
                KeptStorage(numbers.setdefault(key, len(numbers)), kind, nbytes)
                for key, (kind, nbytes) in saved[node].items()
                if nbytes
            )
            for node in sorted(saved, key=order.__getitem__)
        }

    def _held(self) -> Iterator[tuple[fx.Node | None, int, SavedKind, int]]:
        """Node, key, kind and bytes of every storage; of a dense one once for each time it was saved."""
        excluded = {tensor.untyped_storage()._cdata for ref in self._excluded if (tensor := ref()) is not None}
        packed = held_buffers()
        for key, buffer in packed.items():
            made_inside = buffer.serial > self._start and (self._end is None or buffer.serial < self._end)
            if made_inside and key not in excluded and (storage := buffer.storage()) is not None:
                index = bisect.bisect(self._starts, buffer.serial) - 1
                yield self._nodes[index] if index >= 0 else None, key, buffer.kind, storage.nbytes()
        # A packed buffer that went through save_for_backward is seen twice; its own kind counts.
        for saved in list(self._saved):
            storage = saved.tensor.untyped_storage()
            if storage._cdata not in excluded and storage._cdata not in packed:
                yield saved.node, storage._cdata, "dense", storage.nbytes()

    @property
    def nbytes(self) -> int:
        """All bytes held now."""
        return sum(self.by_kind().values())


def _tensors(sources: tuple[nn.Module | Tensor, ...]) -> Iterator[Tensor]:
    for source in sources:
        if isinstance(source, nn.Module):
            yield from source.parameters()
            yield from source.buffers()
        else:
            yield source
