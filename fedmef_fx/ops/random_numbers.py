"""Random numbers of torch that follow a seed for a while."""

import contextlib
from collections.abc import Iterator, Sequence

import torch

__all__ = ["seeded"]


@contextlib.contextmanager
def seeded(
    seed: int, devices: Sequence[torch.device | int] | None = None, *, device_type: str = "cuda"
) -> Iterator[None]:
    """A block in which torch's random numbers follow a seed; afterwards the generators are as they were.

    Args:
        seed: The seed.
        devices: Devices besides the CPU on which the block draws. None: the current CUDA device, where there is one.
        device_type: What kind of devices these are.
    """
    if devices is None:
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices, device_type=device_type):
        if devices:
            torch.manual_seed(seed)
        else:
            # `torch.manual_seed` has every other kind of device remember the seed, with the stack of the call as text.
            torch.default_generator.manual_seed(seed)
        yield
