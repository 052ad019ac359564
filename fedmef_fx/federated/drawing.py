"""Random numbers of one local training: of torch, numpy and Python, and of generators that client data hold.

A data set that draws augmentations from a generator of its own would otherwise depend on what was read from it before,
and a run that goes on after an interruption would see other data.
"""

import contextlib
import random
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import torch

from fedmef_fx.federated.seeds import derive_seed
from fedmef_fx.ops.random_numbers import seeded

__all__ = ["drawing_from"]

_DEPTH: Final = 8  # of data sets in data sets, with transforms in transforms
_MOST: Final = 10_000


@contextlib.contextmanager
def drawing_from(seed: int, device: torch.device, *owners: object) -> Iterator[None]:
    """A block with random numbers of its own; all generators are as they were afterwards.

    Args:
        seed: Of all of them.
        device: Where the model is.
        *owners: Data sets, loaders and the like, in whose attributes generators are looked for.
    """
    devices = [] if device.type == "cpu" else [device]
    generators = list(_generators(owners))
    states = [_state(generator) for generator in generators]
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with seeded(seed, devices, device_type="cuda" if device.type == "cpu" else device.type):
            random.seed(seed)
            np.random.seed(seed % 2**32)
            for place, generator in enumerate(generators):
                _seed(generator, derive_seed(seed, "generator", place))
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
        for generator, state in zip(generators, states, strict=True):
            _restore(generator, state)


def _generators(owners: tuple[object, ...]) -> Iterator[Any]:
    """Generators in attributes, lists and dictionaries of objects, each once, in the order in which they are found."""
    waiting: list[tuple[object, int]] = [(owner, 0) for owner in reversed(owners)]
    seen: set[int] = set()
    while waiting and len(seen) < _MOST:
        value, depth = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, np.random.Generator | np.random.RandomState | random.Random | torch.Generator):
            yield value
        elif depth < _DEPTH:
            waiting.extend((part, depth + 1) for part in reversed(_parts(value)))


def _parts(value: object) -> list[object]:
    """What an object holds, as far as generators may be in it."""
    if isinstance(value, str | bytes | int | float | np.ndarray | torch.Tensor | torch.nn.Module | type):
        return []
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple):
        # Long lists hold samples.
        return list(value) if len(value) <= 100 else []
    return [part for name, part in sorted(getattr(value, "__dict__", {}).items()) if not name.startswith("__")]


def _state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state()
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _seed(generator: Any, seed: int) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    elif isinstance(generator, np.random.RandomState):
        generator.seed(seed % 2**32)
    elif isinstance(generator, random.Random):
        generator.seed(seed)
    else:
        generator.manual_seed(seed)


def _restore(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)
