"""`ClientData`: what belongs to one client, opened when it is chosen; and the ways in which data can be given."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from fedmef_fx.display.sizes import parse_bytes
from fedmef_fx.errors import ConfigError, DataError, FedmefError
from fedmef_fx.federated.batches import Batch, Collate, batch_count, batches, sample_count, samples_in

__all__ = ["ClientData", "OpenData", "declared_samples", "is_lazy", "opened"]


@dataclasses.dataclass(frozen=True)
class ClientData:
    """One client's data, and what is known of them without opening them.

    Attributes:
        source: A map-style data set, an IterableDataset, a DataLoader, or a function without arguments that opens one:
            it is called whenever the client is chosen, and what it gave is let go afterwards.
        samples: How many samples the client declares, >= 1; None for the length, where there is one. A stream ends
            after as many in every epoch.
        memory_budget: How many bytes a training step of this client may take, as an integer or a text such as
            `"200 MB"`; what is kept of activations and the parts of batches are planned for it. None for what the
            configuration says.

    Raises:
        ConfigError: A value out of range.

    Example:
        >>> clients = [ClientData(lambda path=path: torch.load(path), samples=500) for path in paths]  # doctest: +SKIP
    """

    source: Any
    samples: int | None = None
    memory_budget: int | str | None = None

    def __post_init__(self) -> None:
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget, name="ClientData.memory_budget")
        if self.samples is not None and (type(self.samples) is not int or self.samples < 1):
            raise ConfigError(f"ClientData.samples: got {self.samples!r}; expected an integer >= 1, or None")


def _is_opener(source: object) -> bool:
    is_data = isinstance(source, DataLoader) or hasattr(source, "__getitem__") or hasattr(source, "__iter__")
    return callable(source) and not is_data


def is_lazy(data: object) -> bool:
    """Whether data are opened when their client is chosen."""
    return _is_opener(data.source if isinstance(data, ClientData) else data)


def declared_samples(data: Any) -> int | None:
    """How many samples a client has, as far as that is known without opening its data; None where it is not.

    Raises:
        DataError: Something that is no data.
    """
    if isinstance(data, ClientData):
        return data.samples if data.samples is not None else declared_samples(data.source)
    if _is_opener(data):
        return None
    if isinstance(data, DataLoader):
        if isinstance(data.dataset, IterableDataset):
            return declared_samples(data.dataset)
        return _length(data.sampler if data.batch_size is not None else data.dataset)
    if isinstance(data, IterableDataset):
        return _length(data)
    return sample_count(data)


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:  # what torch's loaders and samplers raise where there is none
        return None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class OpenData:
    """A client's data while it is read.

    Attributes:
        data: A map-style data set, an IterableDataset or a DataLoader.
        samples: How many samples an epoch has.
        collate: Makes a batch of items; None for what torch's loaders do.
        limit: After how many samples a stream ends; None for its own end.
        counted: Number of batches that were counted by reading them; None where they follow from the samples.
    """

    data: Any
    samples: int
    collate: Collate | None = None
    limit: int | None = None
    counted: int | None = None

    def batches(self, *, batch_size: int, shuffle: bool, device: torch.device) -> Iterator[Batch]:
        """One epoch; see `batches.batches`."""
        return batches(
            self.data,
            batch_size=batch_size,
            shuffle=shuffle,
            device=device,
            collate=self.collate,
            samples=self.limit,
        )

    def batch_count(self, batch_size: int) -> int:
        """How many batches an epoch has."""
        return batch_count(self.samples, batch_size) if self.counted is None else self.counted


def opened(data: Any, *, collate: Collate | None = None) -> OpenData:
    """Open a client's data.

    A stream without a length, and a DataLoader, whose batches are its own, are read once to count what is in them: the
    schedules of local training want to know how long it is.

    Args:
        data: As `run` takes it.
        collate: Makes a batch of items; None for what torch's loaders do.

    Raises:
        DataError: Data that cannot be opened or read.
    """
    limit: int | None = None
    source = data
    if isinstance(source, ClientData):
        limit, source = source.samples, source.source
    if _is_opener(source):
        source = _open(source)
    if not isinstance(source, DataLoader | IterableDataset):
        length = sample_count(source)
        if limit is not None and limit != length:
            raise DataError(f"{type(source).__name__}: got {length} samples; expected {limit}, as the client declared")
        return OpenData(source, length, collate)
    stated = limit or _length(source)
    if isinstance(source, IterableDataset) and stated is not None:
        return OpenData(source, stated, collate, limit=limit)
    if isinstance(source, DataLoader) and not isinstance(source.dataset, IterableDataset) and limit is None:
        declared = declared_samples(source)
        if declared is not None:
            return OpenData(source, declared, collate, counted=len(source))
    found, count = 0, 0
    for batch in batches(
        source, batch_size=1, shuffle=False, device=torch.device("cpu"), collate=collate, samples=limit
    ):
        found, count = found + samples_in(batch), count + 1
    if isinstance(source, DataLoader):
        return OpenData(source, limit or found, collate, limit=limit, counted=count)
    return OpenData(source, found, collate)


def _open(source: Callable[[], Any]) -> Any:
    try:
        result = source()
    except FedmefError:
        raise
    except Exception as error:  # whatever a client's own code raises
        raise DataError(f"data could not be opened: {type(error).__name__}: {error!s:.200}") from error
    if _is_opener(result) or isinstance(result, ClientData):
        raise DataError(f"data could not be opened: got a {type(result).__name__}; expected a data set or a DataLoader")
    return result
