"""What torch's own allocators say about a training step, temporaries inside operations included.

On the CPU the profiler reports every allocation of torch's allocator; what oneDNN or a BLAS allocates by itself is in
no figure but the resident memory of the process (`fedmef_fx.measure.resident`). On CUDA the caching allocator counts.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["CudaPeak", "allocator_peak", "cuda_peak"]

_LOG_LEVEL: Final = "KINETO_LOG_LEVEL"


@dataclasses.dataclass(frozen=True, slots=True)
class CudaPeak:
    """Peaks of CUDA's caching allocator over one step, of everything the process has there.

    Attributes:
        allocated: Bytes in tensors.
        reserved: Bytes the allocator took from the device for them.
    """

    allocated: int
    reserved: int


def allocator_peak(step: Callable[[], None]) -> int:
    """The most that torch's CPU allocator had allocated at any moment of a step, above the level at its start.

    Args:
        step: The work.

    Returns:
        Bytes; 0 where nothing was allocated.
    """
    # One cycle is recorded, so accumulating changes no number; without it torch 2.10 warns that it forgets cycles.
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        step()
    results = recorded.profiler.kineto_results if recorded.profiler is not None else None
    if results is None:
        return 0
    on_cpu = torch._C._autograd.DeviceType.CPU
    events = [e for e in results.events() if e.name() == "[memory]" and e.device_type() == on_cpu]
    level = peak = 0
    for event in sorted(events, key=lambda e: int(e.start_ns())):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The profiler's library writes lines to stderr when it starts; it reads this variable when it is first used."""
    before = os.environ.get(_LOG_LEVEL)
    os.environ.setdefault(_LOG_LEVEL, "99")
    try:
        yield
    finally:
        if before is None:
            del os.environ[_LOG_LEVEL]


def cuda_peak(step: Callable[[], None], device: torch.device) -> CudaPeak:
    """The peaks of the caching allocator during a step.

    Args:
        step: The work; it may be asynchronous.
        device: A CUDA device.
    """
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # so that what is reserved is reserved for this step
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return CudaPeak(torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))
