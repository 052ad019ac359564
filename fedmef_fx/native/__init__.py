"""Kernels in C, compiled when the package is installed: `compile_library.py` makes them, `library.py` loads them.

Plain C11 behind a C ABI that is called through ctypes: it knows no Python, so that one build serves all versions.
"""

from fedmef_fx.native.library import call, loaded_isa, threads_for, why_missing

__all__ = ["call", "loaded_isa", "threads_for", "why_missing"]
