"""The build backend: setuptools, which asks for a C compiler from the package index where the machine has none.

The kernels in `fedmef_fx/native` are compiled with the compiler that is there. On a machine without one, `ziglang` from
the index is one. Where that fails, too, the package is built without kernels, and computes in NumPy.
"""

import runpy
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

_COMPILE = Path(__file__).resolve().parent / "fedmef_fx" / "native" / "compile_library.py"


def _compiler() -> list[str]:
    """What provides a compiler; nothing where there is one."""
    return [] if runpy.run_path(str(_COMPILE))["find_compiler"]() else ["ziglang>=0.13"]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """See PEP 517."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_compiler()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """See PEP 660."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_compiler()]
