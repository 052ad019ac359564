"""Which of the sizes asked for torch.export lets vary: as it suggests, or in multiples of what the model divides by.

A network that halves an image five times and puts the halves together again takes multiples of 32 alone. One that only
halves takes any size, but torch.export cannot prove it for an image so small that nothing is left of it in the end.
"""

import contextlib
import dataclasses
import io
import math
from collections.abc import Iterator
from typing import Final

import torch
from torch import nn

from fedmef_fx.export.examples import Examples, run
from fedmef_fx.export.sizes import Sizes, VaryingSize, suggested_sizes

__all__ = ["changed_sizes", "possible_sizes"]

_IMAGE_DIMS: Final = 4
_LARGEST_MULTIPLE: Final = 64
_TRACED_SIZE: Final = 256  # large enough for networks that halve an image seven times


def possible_sizes(model: nn.Module, examples: Examples, message: str) -> list[Examples]:
    """What to try after torch.export has refused sizes that vary, the best first.

    Args:
        model: Is run with other sizes, to see which it takes.
        examples: As refused.
        message: Of torch.export's error.
    """
    if "Suggested fixes" not in message and "Constraints violated" not in message:
        return []
    suggested = suggested_sizes(examples.sizes, message)
    is_clear = suggested is not None and not _is_narrow(suggested, examples)
    tries = [suggested] if is_clear else [_in_multiples(model, examples), suggested]
    return [dataclasses.replace(examples, sizes=sizes) for sizes in tries if sizes]


def changed_sizes(wanted: Examples, got: Examples) -> list[str]:
    """Notices about sizes that vary otherwise than wanted."""
    notices, told = [], set()
    for argument, dims in wanted.sizes.items():
        for dim, size in dims.items():
            now = got.sizes.get(argument, {}).get(dim)
            if size.name in told or now == size:
                continue
            told.add(size.name)
            if now is None:
                notices.append(f"fixed {size.name}: the model takes no other")
            elif now.name != size.name:
                notices.append(f"{size.name} is {now.text}: the model takes equal sizes alone")
            elif now.limits():
                notices.append(
                    f"{size.name} is {now.limits()}, as torch.export cannot trace others: "
                    f"dynamic_sizes={{{argument!r}: {{{dim}: {now.text!r}}}}} says so, too"
                )
    return notices


def _is_narrow(sizes: Sizes, examples: Examples) -> bool:
    """Whether sizes are about those of the example alone: it may be too small to tell what the model does with more."""
    arguments = examples.arguments()
    for argument, dims in examples.sizes.items():
        for dim in dims:
            size = sizes.get(argument, {}).get(dim)
            if size is None or (
                size.most is not None and size.most * size.multiple < 2 * arguments[argument].shape[dim]
            ):
                return True
    return False


def _in_multiples(model: nn.Module, examples: Examples) -> Sizes | None:
    """Sizes of images in multiples of what the model wants, else of the largest power of 2 that divides them."""
    arguments = examples.arguments()
    images = {argument: dims for argument, dims in examples.sizes.items() if arguments[argument].dim() >= _IMAGE_DIMS}
    free = [(argument, dim) for argument, dims in images.items() for dim, size in dims.items() if size.multiple == 1]
    common = math.gcd(*(arguments[argument].shape[dim] for argument, dim in free)) if free else 1
    step = next((step for step in _divisors(common) if _takes(model, examples, step)), 1)
    multiple = step if step > 1 else math.gcd(common, _LARGEST_MULTIPLE)
    if multiple == 1:
        return None
    traced = max(2, _TRACED_SIZE // multiple)
    return {
        argument: {
            dim: VaryingSize(size.name, multiple, traced=traced) if (argument, dim) in free else size
            for dim, size in dims.items()
        }
        for argument, dims in examples.sizes.items()
    }


def _divisors(number: int) -> Iterator[int]:
    return (divisor for divisor in range(1, number + 1) if number % divisor == 0)


def _takes(model: nn.Module, examples: Examples, step: int) -> bool:
    """Whether a model takes images that are larger by a step."""
    sizes = {
        argument: {dim: dataclasses.replace(size, multiple=1) for dim, size in dims.items()}
        for argument, dims in examples.sizes.items()
    }
    wanted = dataclasses.replace(examples, sizes=sizes)
    call = wanted.random(None, generator=torch.Generator().manual_seed(0), longer=step)
    try:
        # torch.fx prints the line of a graph that fails.
        with contextlib.redirect_stderr(io.StringIO()):
            run(model, call, examples.wanted)
    except Exception:  # whatever a model raises for a size that it does not take
        return False
    return True
