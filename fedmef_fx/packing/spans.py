"""Run a kernel over consecutive spans of a flat tensor, or over parts of anything, on as many threads as torch uses.

Plain threads rather than numba's parallel loops: `nogil` kernels let go of the interpreter lock, several callers may
use the threads at once (numba's default threading layer ends the process in that case), and serial kernels compile
several times faster.
"""

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

import torch

__all__ = ["BLOCK", "run_parts", "run_spans"]

Result = TypeVar("Result")

# Elements per block: 128 KiB of float32, so that what a block computes step by step stays in the second-level cache;
# a multiple of 64, so that two spans never write the same byte or word of a bitmap.
BLOCK: Final = 32_768
# Below this size a thread costs more than it saves.
_SMALLEST_SPAN: Final = 4 * BLOCK


@functools.lru_cache(maxsize=1)
def _pool(pid: int) -> ThreadPoolExecutor:
    """The threads of this process; keyed by process, because threads do not survive a fork."""
    del pid
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="fedmef-fx-pack")


def run_spans(numel: int, work: Callable[[int, int], Result]) -> list[Result]:
    """Call `work(start, stop)` for spans that cover `[0, numel)`.

    Args:
        numel: Elements in total.
        work: Called concurrently; each `start` is a multiple of `BLOCK`.

    Returns:
        The results in the order of the spans; at least one, also when `numel` is 0.
    """
    spans = max(1, min(torch.get_num_threads(), numel // _SMALLEST_SPAN))
    blocks = -(-numel // BLOCK)
    return _run([blocks * i // spans * BLOCK for i in range(spans)] + [numel], work)


def run_parts(count: int, work: Callable[[int, int], Result], *, most: int) -> list[Result]:
    """Call `work(first, last)` for parts of nearly equal size that cover `[0, count)`.

    Args:
        count: Whatever is counted.
        work: Called concurrently.
        most: Parts, at most; never more than torch has threads.

    Returns:
        The results in the order of the parts; at least one, also when `count` is 0.
    """
    parts = max(1, min(torch.get_num_threads(), most, count))
    return _run([count * i // parts for i in range(parts + 1)], work)


def _run(edges: list[int], work: Callable[[int, int], Result]) -> list[Result]:
    if len(edges) == 2:
        return [work(*edges)]
    pool = _pool(os.getpid())
    others = [pool.submit(work, start, stop) for start, stop in itertools.pairwise(edges[1:])]
    return [work(edges[0], edges[1]), *(future.result() for future in others)]
