"""`LiveBytes`: the peak of all tensor memory while a piece of code runs."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

__all__ = ["LiveBytes", "tensors_in"]


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors among the leaves of nested tuples, lists and dictionaries."""
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


# torch.utils._python_dispatch is untyped; therefore the three exceptions below.
class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Track the storages of all tensors that operations take or give, from their first appearance to their release.

    Not seen is what lives and dies inside one ATen operation (workspaces of a convolution), and memory that no torch
    operation of this thread touches. Deterministic, unlike the resident size of the process.

    Args:
        *present: Modules and tensors whose memory counts from the start, before an operation touches it.

    Attributes:
        current: Bytes alive now; follows releases after the block too.
        peak: The largest `current` so far.

    Example:
        >>> with LiveBytes() as live:
        ...     x = torch.ones(256)
        ...     y = (x + 1) * 2
        >>> live.peak, live.current
        (3072, 2048)
    """

    def __init__(self, *present: nn.Module | Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = 0
        self.peak = 0
        self._live: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        for source in present:
            tensors = [*source.parameters(), *source.buffers()] if isinstance(source, nn.Module) else [source]
            for tensor in tensors:
                self._meet(tensor)

    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def reset_peak(self) -> None:
        """Start a new peak from what is alive now."""
        self.peak = self.current

    def _meet(self, tensor: Tensor) -> None:
        if tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        nbytes = storage.nbytes()
        owned = self._live.get(key)
        if owned is not None and owned[1] == nbytes:
            return
        if owned is not None:  # resized in place
            self.current += nbytes - owned[1]
            self._live[key] = (owned[0], nbytes)
        else:
            # The callback must not keep the tracker alive for as long as the tensors it saw.
            tracker = weakref.ref(self)
            self._live[key] = (weakref.ref(storage, lambda _: _release(tracker, key)), nbytes)
            self.current += nbytes
        self.peak = max(self.peak, self.current)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation and take note of its tensors."""
        del types
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_in((args, kwargs, out)):
            self._meet(tensor)
        return out


def _release(tracker: "weakref.ref[LiveBytes]", key: int) -> None:
    live = tracker()
    if live is not None and key in live._live:
        live.current -= live._live.pop(key)[1]
