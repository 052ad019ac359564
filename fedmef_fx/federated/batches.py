"""Batches of a data set, without worker processes: clients are small and each trains for a moment only."""

from collections.abc import Iterator, Sized
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate

from fedmef_fx.errors import DataError, FedmefError

__all__ = ["Batch", "batch_indices", "batches", "fetch", "sample_count"]

Batch = tuple[Tensor, Tensor]
"""Inputs `[batch, ...]` and targets `[batch, ...]`."""


def sample_count(dataset: Dataset[Any]) -> int:
    """Number of samples of a data set.

    Raises:
        DataError: It has no length.
    """
    if not isinstance(dataset, Sized):
        raise DataError(f"{type(dataset).__name__} has no length; expected a map-style data set with __len__")
    return len(dataset)


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


def fetch(dataset: Dataset[Any], indices: Tensor) -> Batch:
    """The samples at some indices, stacked.

    Raises:
        DataError: Samples that cannot be read, or that are no pairs of input and target.
    """
    try:
        parts = _parts(dataset, indices)
    except FedmefError:
        raise
    except Exception as error:  # whatever a data set raises
        raise DataError(
            f"{type(dataset).__name__}: samples could not be read: {type(error).__name__}: {error!s:.200}; expected "
            "pairs (input, target)"
        ) from error
    if not isinstance(parts, tuple | list) or len(parts) != 2 or not all(isinstance(part, Tensor) for part in parts):
        raise DataError(f"{type(dataset).__name__}: got items that are no pairs; expected (input, target)")
    return cast("Batch", tuple(parts))


def _parts(dataset: Dataset[Any], indices: Tensor) -> Any:
    if isinstance(dataset, Subset):
        return _parts(dataset.dataset, torch.as_tensor(dataset.indices, dtype=torch.int64)[indices])
    if isinstance(dataset, TensorDataset):
        return [tensor[indices] for tensor in dataset.tensors]
    if callable(batch := getattr(dataset, "batch", None)):  # e.g. data.Cifar10
        return batch(indices)
    return default_collate([dataset[index] for index in indices.tolist()])


def batches(dataset: Dataset[Any], *, batch_size: int, shuffle: bool, device: torch.device) -> Iterator[Batch]:
    """Go through a data set once; shuffling draws from torch's global generator.

    Args:
        dataset: Map-style, of pairs (input, target).
        batch_size: Samples per batch; see `batch_indices`.
        shuffle: Whether the order is random.
        device: Where the batches go.
    """
    count = sample_count(dataset)
    order = torch.randperm(count) if shuffle else torch.arange(count)
    for indices in batch_indices(order, batch_size):
        inputs, targets = fetch(dataset, indices)
        yield inputs.to(device), targets.to(device)
