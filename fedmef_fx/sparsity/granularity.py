"""What masks switch on and off: single weights, whole output channels, or N of every M weights.

A `Layout` says how a weight is laid out, so that its channels and its groups of M can be found:

    convolution             [out, in/groups, *kernel]     rows are output channels, groups of M run along dimension 1
    linear                  [out, in]                     likewise
    transposed convolution  [in, out/groups, *kernel]     rows are gathered per group, groups of M run along dimension 0

Groups of M are consecutive inputs at one output and kernel position: the layout that sparse tensor cores read.
"""

import dataclasses
import re
from typing import Final

import torch
from torch import Tensor

from fedmef_fx.errors import ConfigError

__all__ = ["Layout", "Pattern", "parse_granularity"]

_PATTERN: Final = re.compile(r"([1-9]\d{0,3}):([1-9]\d{0,3})")


@dataclasses.dataclass(frozen=True, slots=True)
class Pattern:
    """N:M: of each `of` consecutive inputs `kept` are active."""

    kept: int
    of: int

    @property
    def density(self) -> float:
        """Active share, N / M."""
        return self.kept / self.of

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}"


def parse_granularity(text: object) -> Pattern | str:
    """Read `Config.granularity`.

    Returns:
        "weight", "channel" or a pattern.

    Raises:
        ConfigError: Anything else, or N:M without 0 < N < M.

    Example:
        >>> parse_granularity("2:4")
        Pattern(kept=2, of=4)
    """
    if text in ("weight", "channel"):
        return str(text)
    match = _PATTERN.fullmatch(text) if isinstance(text, str) else None
    if match is not None and int(match[1]) < int(match[2]):
        return Pattern(int(match[1]), int(match[2]))
    raise ConfigError(
        f"Config.granularity: got {text!r}; expected 'weight' | 'channel' | 'N:M' with 0 < N < M, such as '2:4'"
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """How a weight is laid out; see the module docstring.

    Attributes:
        groups: Groups of a convolution; they only matter when it is transposed.
        transposed: Whether it belongs to a transposed convolution.
    """

    groups: int = 1
    transposed: bool = False

    def channels(self, shape: torch.Size) -> int:
        """Number of output channels."""
        return shape[1] * self.groups if self.transposed else shape[0]

    def rows(self, tensor: Tensor) -> Tensor:
        """A weight or mask as [out, fan_in]."""
        if not self.transposed:
            return tensor.reshape(tensor.shape[0], -1)
        grouped = tensor.reshape(self.groups, tensor.shape[0] // self.groups, tensor.shape[1], -1)
        return grouped.transpose(1, 2).reshape(self.channels(tensor.shape), -1)

    def spread(self, channels: Tensor, shape: torch.Size) -> Tensor:
        """One value per output channel as a tensor of the weight's shape."""
        if not self.transposed:
            return channels.reshape(-1, *(1,) * (len(shape) - 1)).expand(shape).contiguous()
        wide = channels.reshape(self.groups, 1, shape[1], 1)
        return wide.expand(self.groups, shape[0] // self.groups, shape[1], shape[2:].numel()).reshape(shape)

    def first_positions(self, shape: torch.Size) -> Tensor:
        """Flat position of the first weight of each channel: what stands for the channel on the wire."""
        return self.rows(torch.arange(shape.numel()).reshape(shape))[:, 0]

    def can_take(self, pattern: Pattern, shape: torch.Size) -> bool:
        """Whether the inputs of a weight can be cut into groups of M."""
        return len(shape) >= 2 and shape[self._inputs] > 0 and shape[self._inputs] % pattern.of == 0

    def blocks(self, tensor: Tensor, size: int) -> Tensor:
        """A weight as [blocks, size]: its groups of consecutive inputs."""
        return tensor.movedim(self._inputs, -1).reshape(-1, size)

    def unblocked(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `blocks`."""
        moved = torch.Size([*(s for i, s in enumerate(shape) if i != self._inputs), shape[self._inputs]])
        return blocks.reshape(moved).movedim(-1, self._inputs).contiguous()

    @property
    def _inputs(self) -> int:
        return 0 if self.transposed else 1
