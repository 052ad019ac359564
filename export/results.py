"""What a model returns, as tensors with names: which of them a file holds, and what is left out."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["EVERYTHING", "Wanted", "output_name"]

_DEPTH: Final = 12


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """Which tensors of a result count.

    An object that torch's trees do not know, and that is no dataclass either, is a cache: of its tensors only those
    that are asked for count.

    Attributes:
        names: Of the results, of which all tensors count; None for all but those in caches.
        caches: Whether those in caches count, too.
    """

    names: tuple[str, ...] | None = None
    caches: bool = False

    def containers(self, result: Any) -> Any:
        """A result of tuples, lists and dictionaries, with None for what does not count."""
        return self._plain(result, (), is_in_cache=False)

    def tensors(self, result: Any) -> list[Tensor]:
        """The tensors that count, in order."""
        return _tensors(self.containers(result))

    def unknown(self, result: Any) -> list[str]:
        """The names for which a result has nothing."""
        return [name for name in self.names or () if not Wanted((name,)).tensors(result)]

    def names_in(self, result: Any) -> list[str]:
        """The names of the parts of a result, of which each holds tensors that count."""
        leaves, _ = pytree.tree_flatten_with_path(self.containers(result))
        return list(dict.fromkeys(output_name(path[:1]) for path, leaf in leaves if isinstance(leaf, Tensor)))

    def left_out(self, result: Any) -> dict[str, str]:
        """The caches of a result of which nothing counts: their names, and the names of their classes."""
        return {
            output_name(path): type(leaf).__name__
            for path, leaf in _objects(result, ())
            if not _tensors(self._leaf(leaf, path, is_in_cache=False))
        }

    def _plain(self, value: Any, path: tuple[Any, ...], *, is_in_cache: bool) -> Any:
        leaves, spec = pytree.tree_flatten_with_path(value)
        parts = [self._leaf(leaf, (*path, *below), is_in_cache=is_in_cache) for below, leaf in leaves]
        return pytree.tree_unflatten(parts, spec)

    def _leaf(self, leaf: Any, path: tuple[Any, ...], *, is_in_cache: bool) -> Any:
        if isinstance(leaf, Tensor):
            return leaf if self._counts(path, is_in_cache=is_in_cache) else None
        if _is_unknown_dataclass(leaf):
            parts = _fields(leaf)
        elif _is_cache(leaf):
            parts, is_in_cache = {name: part for name, part in vars(leaf).items() if _holds_tensor(part)}, True
        else:
            return leaf
        plain = {
            name: self._plain(part, (*path, pytree.MappingKey(name)), is_in_cache=is_in_cache)
            for name, part in parts.items()
        }
        return {name: part for name, part in plain.items() if _tensors(part)}

    def _counts(self, path: tuple[Any, ...], *, is_in_cache: bool) -> bool:
        if self.names is None:
            return self.caches or not is_in_cache
        return any(output_name(path[:length]) in self.names for length in range(len(path) + 1))


EVERYTHING: Final = Wanted(caches=True)


def output_name(path: Sequence[Any]) -> str:
    """The name of an output, from where it stands in a result: dictionary keys, fields, positions."""
    keys = (re.sub(r"\W+", "_", pytree.keystr((key,))).strip("_") for key in path)
    name = "_".join(keys) or "output"
    return f"output_{name}" if name[0].isdigit() else name


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _objects(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The caches of a result, and where they stand; those inside others are part of these."""
    for below, leaf in pytree.tree_flatten_with_path(value)[0]:
        if _is_unknown_dataclass(leaf):
            for name, part in _fields(leaf).items():
                yield from _objects(part, (*path, *below, pytree.MappingKey(name)))
        elif _is_cache(leaf):
            yield (*path, *below), leaf


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _is_unknown_dataclass(value: Any) -> bool:
    """Whether a value is a dataclass that torch's trees take for a leaf."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _is_cache(value: Any) -> bool:
    has_attributes = hasattr(value, "__dict__") and not isinstance(value, Tensor | type)
    return has_attributes and not _is_unknown_dataclass(value) and _holds_tensor(value)


def _holds_tensor(value: Any, depth: int = _DEPTH) -> bool:
    if isinstance(value, Tensor | type) or not depth:
        return isinstance(value, Tensor)
    leaves: Iterable[Any] = pytree.tree_leaves(value)
    for leaf in leaves:
        parts = vars(leaf).values() if hasattr(leaf, "__dict__") and not isinstance(leaf, type) else ()
        if isinstance(leaf, Tensor) or any(_holds_tensor(part, depth - 1) for part in parts):
            return True
    return False
