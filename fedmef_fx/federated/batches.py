"""Batches of a client's data, whatever it is: a data set, an iterable one, a loader with workers, any structure.

Data sets are read without worker processes: clients are small and each trains for a moment only. Who wants workers
gives a DataLoader, which then says how large batches are and in which order they come.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from fedmef_fx.errors import DataError, FedmefError

__all__ = ["Batch", "Collate", "batch_count", "batch_indices", "batches", "fetch", "sample_count", "samples_in"]

Batch = Any
"""Tensors in tuples, lists and dictionaries, with the samples in their first dimension: what `Objective` takes."""

Collate = Callable[[list[Any]], Any]
"""Makes a batch of a list of items."""


def sample_count(dataset: Any) -> int:
    """Number of samples of a data set.

    Raises:
        DataError: It has no length.
    """
    if isinstance(dataset, str | bytes):
        raise DataError(
            f"got {type(dataset).__name__} as data; expected a data set of samples, e.g. "
            "TensorDataset(images, labels); fedmef_fx.data.load_digits() gives two"
        )
    if not isinstance(dataset, Sized):
        raise DataError(
            f"{type(dataset).__name__} has no length; expected a map-style data set with __len__, a "
            "torch.utils.data.IterableDataset or a DataLoader"
        )
    return len(dataset)


def samples_in(batch: Batch) -> int:
    """Number of samples of a batch: the first dimension of its first tensor.

    Raises:
        DataError: No tensor, or one without dimensions.
    """
    first = next((leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)), None)
    if first is None or not first.dim():
        got = type(batch).__name__ if first is None else "a tensor without dimensions"
        raise DataError(
            f"batch: got {got}; expected tensors with the samples in their first dimension, e.g. (input, target) or "
            "{'input_ids': ..., 'labels': ...}: items that are something else need a collate_fn"
        )
    return first.shape[0]


def batch_indices(order: Tensor, batch_size: int) -> list[Tensor]:
    """Cut an order of samples into batches.

    A last batch of a single sample joins the one before it: it would weigh as much as a full one in training, and
    batch statistics cannot be computed from it.

    Args:
        order: int64 `[samples]`.
        batch_size: Samples per batch, >= 1.
    """
    parts = list(torch.split(order, batch_size))
    if batch_size > 1 and len(parts) > 1 and len(parts[-1]) == 1:
        last = parts.pop()
        parts[-1] = torch.cat([parts[-1], last])
    return parts


def batch_count(samples: int, batch_size: int) -> int:
    """How many batches `batch_indices` makes."""
    full, rest = divmod(samples, batch_size)
    joins = rest == 1 and full > 0 and batch_size > 1
    return full + (1 if rest and not joins else 0)


def fetch(dataset: Dataset[Any], indices: Tensor, *, collate: Collate | None = None) -> Batch:
    """The samples at some indices, stacked.

    Args:
        dataset: Map-style.
        indices: int64.
        collate: Makes a batch of items; None for what torch's loaders do.

    Raises:
        DataError: Samples that cannot be read, or that make no batch.
    """
    with _reading(dataset):
        return _checked(_parts(dataset, indices, collate))


class _reading:  # noqa: N801  # a block, as contextlib writes them; as a generator it would turn StopIteration around
    """A block whose errors say that data could not be read."""

    def __init__(self, dataset: object) -> None:
        self._name = type(dataset).__name__

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or not isinstance(error, Exception) or isinstance(error, FedmefError):
            return
        raise DataError(
            f"{self._name}: samples could not be read: {type(error).__name__}: {error!s:.200}; expected items that "
            "make batches of tensors, e.g. (input, target)"
        ) from error


def _checked(batch: Any) -> Batch:
    """A batch, with other mappings than dictionaries, such as transformers' BatchEncoding, as dictionaries."""
    if isinstance(batch, Mapping) or (hasattr(batch, "keys") and hasattr(batch, "__getitem__")):
        batch = {key: batch[key] for key in batch.keys()}  # noqa: SIM118  # what has keys need not iterate over them
    samples_in(batch)
    return batch


def _parts(dataset: Dataset[Any], indices: Tensor, collate: Collate | None) -> Any:
    if collate is not None:
        return collate([dataset[index] for index in indices.tolist()])
    if isinstance(dataset, Subset):
        return _parts(dataset.dataset, torch.as_tensor(dataset.indices, dtype=torch.int64)[indices], None)
    if isinstance(dataset, TensorDataset):
        return tuple(tensor[indices] for tensor in dataset.tensors)
    if callable(batch := getattr(dataset, "batch", None)):  # e.g. data.Cifar10
        return batch(indices)
    return default_collate([dataset[index] for index in indices.tolist()])


def batches(
    data: Any,
    *,
    batch_size: int,
    shuffle: bool,
    device: torch.device,
    collate: Collate | None = None,
    samples: int | None = None,
) -> Iterator[Batch]:
    """Go through data once; shuffling draws from torch's global generator.

    Args:
        data: A map-style data set, an IterableDataset, which comes in its own order, or a DataLoader, which says itself
            how large batches are, how they are made and in which order.
        batch_size: Samples per batch; see `batch_indices`.
        shuffle: Whether the order is random.
        device: Where the batches go.
        collate: Makes a batch of items; None for what torch's loaders do.
        samples: After how many samples an IterableDataset or a DataLoader ends at the latest; None for its own end.
    """
    if isinstance(data, DataLoader):
        found: Iterator[Batch] = _until(iter(_read(data)), samples)
    elif isinstance(data, IterableDataset):
        items = itertools.islice(_read(data), samples)
        found = _stacked(items, batch_size, collate or default_collate, name=data)
    else:
        count = sample_count(data)
        order = torch.randperm(count) if shuffle else torch.arange(count)
        found = (fetch(data, indices, collate=collate) for indices in batch_indices(order, batch_size))
    for batch in found:
        yield pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)


def _read(data: Iterable[Any]) -> Iterator[Any]:
    """The items of something that is iterated over, whose errors say so."""
    with _reading(data):
        iterator = iter(data)
    end = object()
    while True:
        with _reading(data):
            item = next(iterator, end)
        if item is end:
            return
        yield item


def _until(found: Iterator[Any], samples: int | None) -> Iterator[Batch]:
    seen = 0
    for batch in map(_checked, found):
        if samples is not None and seen >= samples:
            return
        seen += samples_in(batch)
        yield batch


def _stacked(items: Iterator[Any], batch_size: int, collate: Collate, *, name: object) -> Iterator[Batch]:
    """Batches of items in their order; as with `batch_indices` a last single item joins those before it."""
    waiting = list(itertools.islice(items, batch_size))
    while waiting:
        following = list(itertools.islice(items, batch_size))
        if len(following) == 1 and batch_size > 1:
            waiting, following = waiting + following, []
        with _reading(name):
            batch = _checked(collate(waiting))
        yield batch
        waiting = following
