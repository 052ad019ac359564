"""What flows between the modules that Python calls, seen in one call of a copy of the model.

Every tensor remembers the modules whose results it was computed from: a called module's result comes from that module
alone, the result of any other operation from all that its arguments come from.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fedmef_fx.ops.random_numbers import seeded
from fedmef_fx.records.calls import CallRecord

__all__ = ["record_calls"]

_MODEL: Final = ""
_SEED: Final = 0


def record_calls(
    model: nn.Module, modules: Collection[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> CallRecord:
    """Call a model and note what flows between some of its modules.

    Args:
        model: A copy that may change; it keeps its mode.
        modules: Paths of the modules; of modules within each other only the outer one counts.
        args: Positional arguments of the call.
        kwargs: Keyword arguments.
    """
    sources = _Sources()
    sources.set((args, kwargs), {_MODEL})
    handles = [handle for path in modules for handle in _watch(model.get_submodule(path), path, sources)]
    try:
        with seeded(_SEED), torch.no_grad(), sources:
            out = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    sources.flow(sources.of(out), _MODEL)
    return CallRecord(tuple(sources.order), tuple(sources.flows))


class _Sources(TorchFunctionMode):
    """Where tensors come from.

    Attributes:
        order: Modules by their first call.
        flows: Pairs of modules.
        inside: The module that runs now; None between modules.
    """

    def __init__(self) -> None:
        super().__init__()
        self._of: dict[int, tuple[Tensor, frozenset[str]]] = {}  # the tensor is held: its identity is not used again
        self.order: dict[str, None] = {}
        self.flows: dict[tuple[str, str], None] = {}
        self.inside: str | None = None

    def of(self, value: Any) -> set[str]:
        """The modules that a value's tensors come from."""
        known = (self._of.get(id(leaf)) for leaf in _tensors(value))
        return {path for entry in known if entry is not None for path in entry[1]}

    def set(self, value: Any, paths: Iterable[str]) -> None:
        """Say where a value's tensors come from."""
        origin = frozenset(paths)
        self._of.update((id(leaf), (leaf, origin)) for leaf in _tensors(value))

    def flow(self, paths: Iterable[str], target: str) -> None:
        """Note that results of modules reached another one."""
        self.flows.update(dict.fromkeys((path, target) for path in sorted(paths) if path != target or not path))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.inside is None:
            origin = self.of((args, kwargs))
            self.set(out, origin)
            if out is None and args:  # x[...] = y writes into its first argument
                self.set(args[0], origin)
        return out


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _watch(module: nn.Module, path: str, sources: _Sources) -> tuple[Any, Any]:
    """Tell the sources when a module is called; what runs inside it belongs to it."""

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        if sources.inside is None:
            sources.inside = path
            sources.order.setdefault(path)
            sources.flow(sources.of((args, kwargs)), path)

    def after(_: nn.Module, __: Any, ___: Any, out: Any) -> None:
        if sources.inside == path:
            sources.inside = None
            sources.set(out, {path})

    return (
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    )
