"""What each node of a graph leaves behind for the backward pass, measured while the graph runs.

Counted is what `fedmef_fx.packing.SavedTensors` counts, node by node: storages that autograd saves and packed buffers
that operations announce, if they are still held when the forward pass is over. Parameters, buffers and the model's own
inputs exist anyway and do not count. Which codec a buffer has is what its maker announced, so nothing here knows them.
"""

import bisect
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks

from fedmef_fx.graph.recording import KeptStorage
from fedmef_fx.packing.registry import held_buffers, next_serial

__all__ = ["NodeMeter"]


class _Saved:
    """A tensor in autograd's keeping: lives exactly as long as autograd holds it."""

    __slots__ = ("__weakref__", "node", "tensor")

    def __init__(self, tensor: Tensor, node: fx.Node | None) -> None:
        self.tensor = tensor
        self.node = node


class NodeMeter:
    """Tells which node keeps what; use it as a context manager around the run of a graph, and `at` for each node.

    Args:
        *exclude: Modules and tensors that exist anyway.
    """

    def __init__(self, *exclude: nn.Module | Tensor) -> None:
        self._exclude = exclude
        self._saved: list[weakref.ref[_Saved]] = []
        self._start = 0
        self._starts: list[int] = []
        self._nodes: list[fx.Node | None] = []
        self._hooks = saved_tensors_hooks(self._pack, lambda saved: saved.tensor)

    def __enter__(self) -> "NodeMeter":
        self._start = next_serial()
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def at(self, node: fx.Node | None) -> None:
        """From now on, what is saved belongs to this node; None for what no graph does."""
        self._nodes.append(node)
        self._starts.append(next_serial())

    def _pack(self, tensor: Tensor) -> _Saved:
        # Detached: a node that saves its own output would otherwise own itself, and never be freed.
        saved = _Saved(tensor.detach(), self._nodes[-1] if self._nodes else None)
        self._saved.append(weakref.ref(saved))
        return saved

    def kept(self) -> dict[fx.Node | None, tuple[KeptStorage, ...]]:
        """What is held now, by node; a node that keeps what an earlier one keeps already shows it as well."""
        excluded = {tensor.untyped_storage()._cdata for tensor in _tensors(self._exclude)}
        found: dict[fx.Node | None, dict[int, tuple[str, int]]] = defaultdict(dict)
        packed = held_buffers()
        for key, buffer in packed.items():
            index = bisect.bisect(self._starts, buffer.serial) - 1
            storage = buffer.storage()
            if buffer.serial >= self._start and storage is not None and key not in excluded:
                node = self._nodes[index] if index >= 0 else None
                found[node][key] = (str(buffer.kind), storage.nbytes())
        for saved in filter(None, (ref() for ref in self._saved)):
            storage = saved.tensor.untyped_storage()
            key = storage._cdata
            if key not in excluded and key not in packed:
                found[saved.node][key] = ("dense", storage.nbytes())
        order = {node: index for index, node in enumerate((None, *self._nodes))}
        numbers: dict[int, int] = {}
        return {
            node: tuple(
                KeptStorage(numbers.setdefault(key, len(numbers)), codec, nbytes)
                for key, (codec, nbytes) in found[node].items()
                if nbytes
            )
            for node in sorted(found, key=order.__getitem__)
        }


def _tensors(sources: Iterable[nn.Module | Tensor]) -> Iterator[Tensor]:
    for source in sources:
        if isinstance(source, nn.Module):
            yield from source.parameters()
            yield from source.buffers()
        else:
            yield source
