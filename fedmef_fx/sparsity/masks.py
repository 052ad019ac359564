"""Initial masks with an exact number of active weights per parameter: random (the paper's) or by magnitude."""

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedmef_fx.errors import ConfigError
from fedmef_fx.sparsity.selection import largest_positions, magnitudes

__all__ = ["magnitude_masks", "random_generator", "random_masks"]


def random_masks(
    shapes: Mapping[str, Sequence[int]], counts: Mapping[str, int], *, seed: int
) -> dict[str, Tensor]:  # bool, of the given shapes
    """Masks with uniformly drawn active positions.

    Args:
        shapes: Parameter name -> shape.
        counts: Parameter name -> number of active weights, as `allocate` gives it.
        seed: Any integer. A parameter's mask depends on the seed, its name, its shape and its count only: a layer that
            is added or removed does not change the masks of the others.

    Returns:
        Parameter name -> boolean mask on the CPU, True = active, in the order of `shapes`.

    Raises:
        ConfigError: A parameter without a count, or a count that its size does not allow.

    Example:
        >>> int(random_masks({"fc": (4, 5)}, {"fc": 3}, seed=0)["fc"].sum())
        3
    """
    masks = {}
    for name, shape in shapes.items():
        size = math.prod(shape)
        count = _count(counts, name, size)
        # NumPy draws a subset without shuffling all positions, which halves the time `transform` takes.
        drawn = random_generator(seed, name).choice(size, count, replace=False, shuffle=False)
        mask = torch.zeros(size, dtype=torch.bool)
        mask[torch.from_numpy(drawn)] = True
        masks[name] = mask.reshape(tuple(shape))
    return masks


def magnitude_masks(weights: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Masks that keep the weights of largest magnitude.

    Args:
        weights: Parameter name -> weight, any shape.
        counts: Parameter name -> number of active weights.

    Returns:
        Parameter name -> boolean mask of the weight's shape on its device, True = active. Counts are exact; of weights
        with equal magnitude those at lower positions (row-major) are kept.

    Raises:
        ConfigError: A parameter without a count, a count that its size does not allow, or weights that are no numbers.

    Example:
        >>> magnitude_masks({"fc": torch.tensor([[1.0, -3.0], [2.0, 2.0]])}, {"fc": 2})["fc"]
        tensor([[False,  True],
                [ True, False]])
    """
    masks = {}
    for name, weight in weights.items():
        count = _count(counts, name, weight.numel())
        mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
        mask[largest_positions(magnitudes(weight), count)] = True
        masks[name] = mask.reshape(weight.shape)
    return masks


def _count(counts: Mapping[str, int], name: str, size: int) -> int:
    if name not in counts:
        raise ConfigError(f"masks: no count for {name!r}; counts are given for: {', '.join(counts) or 'none'}")
    if not 0 <= counts[name] <= size:
        raise ConfigError(f"masks: {name!r}: got count {counts[name]}; expected 0 <= count <= {size}, its size")
    return counts[name]


def random_generator(seed: int, name: str) -> np.random.Generator:
    """Random numbers of its own for each parameter."""
    # A cryptographic hash, because Python's hash() differs between processes.
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:8], "little") >> 1))
