"""Load the compiled kernels: those of the best instruction set that the processor runs.

Kernels trust their arguments. Whoever calls one checks sizes, dtypes and indices first; `call` refuses tensors that are
not one run of memory.
"""

import ctypes
import functools
import os
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fedmef_fx.errors import ConfigError
from fedmef_fx.native.compile_library import REASON, library_name

__all__ = ["FOLDER_VARIABLE", "ISA_VARIABLE", "call", "loaded_isa", "threads_for", "why_missing"]

ISA_VARIABLE: Final = "FEDMEF_FX_ISA"
"""Environment variable that names the best instruction set to use: `"baseline"`, `"avx2"` or `"avx512"`."""
FOLDER_VARIABLE: Final = "FEDMEF_FX_KERNELS"
"""Environment variable that names another folder with compiled kernels, such as those with sanitizers."""

_ISAS: Final = ("baseline", "avx2", "avx512")
_ABI: Final = 5
_TYPES: Final = {
    "i": ctypes.c_int,
    "n": ctypes.c_int64,
    "w": ctypes.c_uint64,
    "d": ctypes.c_double,
    "p": ctypes.c_void_p,
}
# By name: the types of the arguments, as in the C sources, and of the result where there is one.
_SIGNATURES: Final = {
    "mark": "ipwwpni",
    "compress": "ipppni",
    "expand": "ipppni",
    "select": "ipppni",
    "count": "pn:n",
    "clamp": "ipddppni",
    "scale_unmarked": "ippdpni",
    "clear": "ippni",
    "row_statistics": "ipppddddpni",
    "row_scale": "ippppni",
    "row_gradients": "ippppdppni",
    "lay_out": "ippnnnnnnnnnnnnnpi",
    "take_back": "ippnnnnnnnnnnnnnpi",
    "pack_blocks": "ipniniiwnppi:n",
    "unpack_blocks": "ippinipni",
    "pack_marked": "ippnniniiwppi:n",
    "unpack_marked": "ipnnppinipnni:n",
    "mark_equal": "ipwpni:n",
    "fill_marked": "ipwpn",
    "fill_at": "ipnwp",
    "positions": "pnp",
    "sparse_matrix": "pnnpp",
    "sparse_transpose": "ipppppnnnppp",
    "sparse_product": "ipppppnpnnnnni",
    "sparse_inner": "ipppnnpnpnnni",
    "depthwise": "ippppnnnnnnnnnnnnnnnnnpnni",
    "depthwise_weight": "ipppnnnnnnnnnnnnnnpnni",
}
# Elements from which a second thread is worth its start.
_SMALLEST_PART: Final = 1 << 17


class _MissingError(Exception):
    """Why there are no kernels."""


def _folder() -> Path:
    return Path(os.environ.get(FOLDER_VARIABLE) or Path(__file__).parent)


def _open(isa: str) -> ctypes.CDLL | None:
    path = _folder() / library_name(isa)
    if not path.exists():
        return None
    try:
        library = ctypes.CDLL(str(path))
        abi = library.fedmef_abi()
    except (OSError, AttributeError) as error:
        raise _MissingError(f"{path} cannot be loaded: {error}") from error
    if abi != _ABI:
        raise _MissingError(f"{path} was compiled from other sources; install the package again")
    return library


def _best(baseline: ctypes.CDLL) -> int:
    wanted = os.environ.get(ISA_VARIABLE, _ISAS[-1])
    if wanted not in _ISAS:
        allowed = " | ".join(map(repr, _ISAS))
        raise ConfigError(f"{ISA_VARIABLE}: got {wanted!r}; expected {allowed}")
    return min(int(baseline.fedmef_best_isa()), _ISAS.index(wanted))


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library and its instruction set, or None and the reason."""
    try:
        baseline = _open("baseline")
        if baseline is None:
            return None, _reason()
        library, isa = baseline, "baseline"
        for better in _ISAS[1 : _best(baseline) + 1]:
            library, isa = (found, better) if (found := _open(better)) is not None else (library, isa)
    except _MissingError as missing:
        return None, str(missing)
    for name, signature in _SIGNATURES.items():
        arguments, _, result = signature.partition(":")
        function = getattr(library, f"fedmef_{name}")
        function.argtypes = [_TYPES[letter] for letter in arguments]
        function.restype = _TYPES[result] if result else None
    return library, isa


def _reason() -> str:
    path = _folder() / REASON
    if path.exists():
        first, *more = path.read_text(encoding="utf-8").strip().splitlines()
        return f"{first} (more in {path})" if more else first
    return (
        "they were not compiled: pip install the package, or run python fedmef_fx/native/compile_library.py in a clone"
    )


def why_missing() -> str | None:
    """Why there are no compiled kernels here; None where there are."""
    library, reason = _load()
    return None if library is not None else reason


def loaded_isa() -> str | None:
    """The instruction set of the kernels that are used; None where there are none."""
    library, isa = _load()
    return None if library is None else isa


def call(name: str, *arguments: Tensor | float | None) -> int:
    """Run the kernel `fedmef_<name>`; its C source says what it takes.

    Tensors are passed by their address, and live until the kernel returns. Among fake tensors nothing is computed: what
    is allocated around a call can be predicted so.

    Raises:
        ConfigError: The kernels were not compiled.
        ValueError: A tensor is on another device, or not one run of memory.
    """
    library, reason = _load()
    if library is None:
        raise ConfigError(f"native kernels: {reason}")
    passed: list[float | None] = []
    for argument in arguments:  # in one loop: a step makes thousands of calls
        if not isinstance(argument, Tensor):
            passed.append(argument)
        elif isinstance(argument, FakeTensor):
            return 0
        elif argument.is_cpu and argument.is_contiguous():
            passed.append(argument.data_ptr())
        elif not any(isinstance(other, FakeTensor) for other in arguments):
            raise ValueError(
                f"native kernels: got {list(argument.shape)}, strides {argument.stride()}, on {argument.device}; "
                "expected a contiguous tensor on the CPU"
            )
    result: int = getattr(library, f"fedmef_{name}")(*passed)
    return result


def threads_for(work: int) -> int:
    """On how many threads to work on so many elements: all that torch uses, or one."""
    return torch.get_num_threads() if work >= _SMALLEST_PART else 1
