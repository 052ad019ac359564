"""Tensors that are read part by part when they are needed, so that those of many clients are never all in memory."""

import dataclasses
import functools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedmef_fx.federated.state import TensorSpec
from fedmef_fx.sparsity.sparse_gradient import SparseGradient

__all__ = ["LazyGradients", "LazyTensor", "LazyTensors", "MappedTensors", "column", "part_of"]


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name; asking for one reads all of it, each time."""

    @abstractmethod
    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor."""

    @abstractmethod
    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Elements of a tensor, in row-major order, `[stop - start]`."""

    def __getitem__(self, name: str) -> Tensor:
        spec = self.spec(name)
        return self.part(name, 0, spec.shape.numel()).reshape(spec.shape)


class LazyGradients(Mapping[str, SparseGradient]):
    """Growth candidates by name; asking for those of a parameter reads all of them, each time."""

    @abstractmethod
    def parts(self, name: str) -> "tuple[LazyTensor, LazyTensor, int]":
        """Positions and values of a parameter's, not read yet, and its number of weights."""

    def __getitem__(self, name: str) -> SparseGradient:
        positions, values, numel = self.parts(name)
        count = positions.shape.numel()
        return SparseGradient(positions.part(0, count), values.part(0, count), numel)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class LazyTensor:
    """One of them, not read yet.

    Attributes:
        spec: Shape and dtype.
        part: Gives its elements from a start to a stop, in row-major order.
    """

    spec: TensorSpec
    part: Callable[[int, int], Tensor]

    @property
    def shape(self) -> torch.Size:
        """Its shape."""
        return self.spec.shape

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        return self.spec.dtype


@dataclasses.dataclass(frozen=True, eq=False)
class MappedTensors(LazyTensors):
    """Other tensors, with a function applied to each when it is read.

    Attributes:
        tensors: The others.
        of: Of name, start, stop and the elements between, in row-major order: elements as many, of the same dtype.
    """

    tensors: Mapping[str, Tensor]
    of: Callable[[str, int, int, Tensor], Tensor]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def spec(self, name: str) -> TensorSpec:
        """See `LazyTensors.spec`."""
        return self.tensors.spec(name) if isinstance(self.tensors, LazyTensors) else TensorSpec.of(self.tensors[name])

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """See `LazyTensors.part`."""
        (tensor,) = column([self.tensors], name)
        return self.of(name, start, stop, part_of(tensor, start, stop))


def column(mappings: Sequence[Mapping[str, Tensor]], name: str) -> list[Tensor | LazyTensor]:
    """One tensor of each client, unread where it can be."""
    return [
        LazyTensor(mapping.spec(name), functools.partial(mapping.part, name))
        if isinstance(mapping, LazyTensors)
        else mapping[name]
        for mapping in mappings
    ]


def part_of(tensor: Tensor | LazyTensor, start: int, stop: int) -> Tensor:
    """Elements of a tensor, in row-major order."""
    return tensor.reshape(-1)[start:stop] if isinstance(tensor, Tensor) else tensor.part(start, stop)
