"""The resident memory of a process, as Linux counts it."""

import ctypes
import dataclasses
from pathlib import Path
from typing import Any, Final, Literal

__all__ = ["ALLOCATOR_SETTINGS", "ResidentGrowth", "forget_peak", "resident_bytes", "return_free_memory", "why_not"]

ALLOCATOR_SETTINGS: Final = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Environment of a measured process: glibc gives freed blocks of 64 KiB and more back at once, as the size of what is
alive then is the size of the process. By default it keeps freed blocks of up to 32 MiB, so that the figure would
depend on the order of allocations."""

_STATUS: Final = Path("/proc/self/status")
_CLEAR: Final = Path("/proc/self/clear_refs")


@dataclasses.dataclass(frozen=True, slots=True)
class ResidentGrowth:
    """Resident memory of a fresh process around one training step, in bytes.

    Attributes:
        base: After imports and a warm-up on small tensors, before the model.
        model: How much more with model, inputs and optimizer, before the first step.
        step: How much more than that at the peak of the first two steps.
    """

    base: int
    model: int
    step: int

    @property
    def growth(self) -> int:
        """The peak over the process without the model."""
        return self.model + self.step

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {**dataclasses.asdict(self), "growth": self.growth}


def why_not() -> str:
    """Why resident memory cannot be measured on this system; empty where it can."""
    missing = [path for path in (_STATUS, _CLEAR) if not path.exists()]
    return f"this system has no {missing[0]}" if missing else ""


def resident_bytes(which: Literal["VmRSS", "VmHWM"] = "VmRSS") -> int:
    """Resident memory of this process, now (`VmRSS`) or at its peak (`VmHWM`)."""
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{which}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS}: no {which}")


def forget_peak() -> None:
    """Start a new `VmHWM` from what is resident now."""
    _CLEAR.write_text("5", encoding="ascii")


def return_free_memory() -> None:
    """Give freed memory back to the system where glibc can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
