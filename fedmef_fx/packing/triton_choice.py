"""Whether kernels in Triton run on GPUs.

`FEDMEF_FX_TRITON=0` in the environment leaves all to operations of torch, such as where there is no C compiler, which
Triton needs. All give the same bits. Triton comes with torch's builds for CUDA.
"""

import functools
import importlib.util
import os
from types import ModuleType
from typing import Final

from fedmef_fx.errors import ConfigError

__all__ = ["TRITON_VARIABLE", "triton_module"]

TRITON_VARIABLE: Final = "FEDMEF_FX_TRITON"
"""Environment variable: `"0"` for operations of torch on GPUs, `"1"` (the default) for Triton where it is there."""


def triton_module(name: str) -> ModuleType | None:
    """A module with kernels in Triton; None where it is not wanted or not there.

    Args:
        name: The module, in full.

    Raises:
        ConfigError: Another value in the environment than 0 and 1.
    """
    value = os.environ.get(TRITON_VARIABLE, "1")
    if value not in ("0", "1"):
        raise ConfigError(f'{TRITON_VARIABLE}: got {value!r}; expected "0" or "1"')
    return _imported(name) if value == "1" else None


@functools.cache
def _imported(name: str) -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(name)
