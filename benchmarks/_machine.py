"""What every benchmark prints about where it ran."""

import os
import platform
from pathlib import Path

import torch

from fedmef_fx.packing import backend

__all__ = ["machine", "processor"]


def processor() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> str:
    """One line: processor, threads, versions, packing backend."""
    return (
        f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; "
        f"Python {platform.python_version()}, torch {torch.__version__}; packing: {backend().name}"
    )
