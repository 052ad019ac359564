"""Batches to train on, and batches to judge by that training never sees."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, default_collate

from fedmef_fx.errors import DataError

__all__ = ["Batch", "Loss", "Samples", "default_loss", "default_score", "first_tensor", "mean_score", "read_samples"]

Loss = Callable[[Any, Any], Tensor]
_HELD_OUT: Final = 5  # every fifth


@dataclasses.dataclass(frozen=True)
class Batch:
    """Arguments of one call of the model, and what is wanted of it."""

    inputs: tuple[Any, ...]
    target: Any


@dataclasses.dataclass(frozen=True)
class Samples:
    """What a fit works with.

    Attributes:
        training: From the number of an epoch to its batches, in an order of its own.
        steps: How many batches an epoch has.
        evaluation: Batches that are held out.
    """

    training: Callable[[int], Iterator[Batch]]
    steps: int
    evaluation: tuple[Batch, ...]


def read_samples(data: object, evaluation: object, *, batch_size: int, seed: int) -> Samples:
    """Read what a user gave.

    Args:
        data: A Dataset of (input, target), or batches (input, target) that can be gone through again and again; an
            input is a tensor or a tuple of arguments.
        evaluation: The same; None holds out every fifth sample of a data set, or every fifth batch.
        batch_size: Of a data set's samples.
        seed: Of the order.

    Raises:
        DataError: Neither of both, or too few.
    """
    batches = _dataset_batches(data, batch_size, seed) if isinstance(data, Dataset) else _list_batches(data, seed)
    held_out, training, steps = batches
    if evaluation is not None:
        size = len(evaluation) if isinstance(evaluation, Dataset) else 0  # type: ignore[arg-type]  # data sets that have a length
        given = _take(evaluation, range(size), batch_size) if isinstance(evaluation, Dataset) else _listed(evaluation)
        return Samples(_all_of(data, batch_size, seed), _steps_of(data, batch_size), tuple(given))
    return Samples(training, steps, held_out)


_Read = tuple[tuple[Batch, ...], Callable[[int], Iterator[Batch]], int]


def _dataset_batches(data: Any, batch_size: int, seed: int) -> _Read:
    size = len(data)
    if size < 2 * _HELD_OUT:
        raise DataError(f"fit: data has {size} samples; expected at least {2 * _HELD_OUT}")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    rest = order[size // _HELD_OUT :]
    held_out = tuple(_take(data, order[: size // _HELD_OUT], batch_size))
    return held_out, _shuffled(data, rest, batch_size, seed), -(-len(rest) // batch_size)


def _list_batches(data: object, seed: int) -> _Read:
    batches = _listed(data)
    if len(batches) < 2:
        raise DataError(f"fit: data has {len(batches)} batches; expected at least 2, or evaluation data of their own")
    held_out = tuple(batches[_HELD_OUT - 1 :: _HELD_OUT]) or (batches[-1],)
    rest = [batch for batch in batches if not any(batch is other for other in held_out)]
    return held_out, _in_random_order(rest, seed), len(rest)


def _all_of(data: object, batch_size: int, seed: int) -> Callable[[int], Iterator[Batch]]:
    if isinstance(data, Dataset):
        return _shuffled(data, list(range(len(data))), batch_size, seed)  # type: ignore[arg-type]  # as above
    return _in_random_order(_listed(data), seed)


def _steps_of(data: object, batch_size: int) -> int:
    return -(-len(data) // batch_size) if isinstance(data, Dataset) else len(_listed(data))  # type: ignore[arg-type]  # as above


def _shuffled(data: Any, places: list[int], batch_size: int, seed: int) -> Callable[[int], Iterator[Batch]]:
    def epoch(number: int) -> Iterator[Batch]:
        order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed + number)).tolist()
        return _take(data, [places[index] for index in order], batch_size)

    return epoch


def _in_random_order(batches: list[Batch], seed: int) -> Callable[[int], Iterator[Batch]]:
    def epoch(number: int) -> Iterator[Batch]:
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed + number)).tolist()
        return (batches[index] for index in order)

    return epoch


def _take(data: Any, places: Iterable[int], batch_size: int) -> Iterator[Batch]:
    places = list(places)
    for start in range(0, len(places), batch_size):
        yield _batch(default_collate([data[index] for index in places[start : start + batch_size]]))


def _listed(data: object) -> list[Batch]:
    if not isinstance(data, Iterable):
        raise DataError(f"fit: data is {type(data).__name__}; expected a Dataset of (input, target), or such batches")
    return [_batch(pair) for pair in data]


def _batch(pair: object) -> Batch:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise DataError(
            f"fit: an element of data is {type(pair).__name__}; expected (input, target), where input is a tensor or a "
            "tuple of arguments"
        )
    inputs, target = pair
    return Batch(tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), target)


def first_tensor(output: object) -> Tensor:
    """What counts of a model's output: logits come first."""
    tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    if not tensors:
        raise DataError(f"fit: the model returns {type(output).__name__} without a tensor; expected scores first")
    return tensors[0]


def default_loss(output: object, target: Tensor) -> Tensor:
    """Cross-entropy for classes, else the mean squared error."""
    scores = first_tensor(output)
    if target.is_floating_point():
        return F.mse_loss(scores, target)
    if scores.shape[:-1] == target.shape:  # classes lie last, as in language models
        return F.cross_entropy(scores.flatten(0, -2), target.flatten())
    return F.cross_entropy(scores, target)


def default_score(output: object, target: Tensor) -> float:
    """The share of classes that are right, or minus the mean squared error."""
    scores = first_tensor(output)
    if target.is_floating_point():
        return -float(F.mse_loss(scores, target))
    dim = -1 if scores.shape[:-1] == target.shape else 1
    return float((scores.argmax(dim) == target).double().mean())


def mean_score(run: Callable[[Batch], object], batches: Iterable[Batch], score: Callable[[Any, Any], float]) -> float:
    """The score over batches, each weighted by its samples."""
    total = weight = 0.0
    for batch in batches:
        size = float(len(first_tensor(batch.inputs)))
        total, weight = total + size * float(score(run(batch), batch.target)), weight + size
    return total / weight
