"""Compile the kernels: one shared library per instruction set of the machine, from the same sources.

    python fedmef_fx/native/compile_library.py [--sanitize] [FOLDER]

`setup.py` calls it when the package is built. It imports nothing of the project, which is not installed then, and works
with what compiles C: `$CC`, cc, gcc, clang, or the package `ziglang` where none of these is there.
"""

import argparse
import functools
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

__all__ = ["REASON", "CompilationError", "compile_libraries", "find_compiler", "library_name", "source_files"]

HERE: Final = Path(__file__).resolve().parent
REASON: Final = "why_not_compiled.txt"
"""The file beside the libraries that says why there are none."""

_AVX2: Final = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt")
_X86: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "baseline": (),
        "avx2": _AVX2,
        "avx512": (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    }
)
_FLAGS: Final = ("-std=c11", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wpedantic")
# Undefined behaviour ends the process; the frame pointers are for the reports.
_SANITIZE: Final = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g")
# Where products may be added without being rounded first. Elsewhere results are those of the reference to the last bit.
_CONTRACTED: Final = ("depthwise.c", "sparse.c")
_TRIAL: Final = "#include <stdint.h>\n#include <string.h>\nint trial(void) { return 0; }\n"


class CompilationError(Exception):
    """There is no compiler, or it failed."""


def library_name(isa: str) -> str:
    """The file of the kernels for an instruction set."""
    return f"kernels_{isa}.so"


def source_files() -> list[Path]:
    """Everything that the libraries are made of."""
    return sorted((HERE / "src").glob("*.[ch]"))


@functools.cache
def find_compiler() -> tuple[str, ...] | None:
    """The command of a C compiler that works; None where there is none."""
    chosen = os.environ.get("CC")
    candidates = [shlex.split(chosen)] if chosen else []
    candidates += [[name] for name in ("cc", "gcc", "clang")]
    if importlib.util.find_spec("ziglang") is not None:
        candidates.append([sys.executable, "-m", "ziglang", "cc"])
    return next((tuple(command) for command in candidates if _works(command)), None)


def _works(command: list[str]) -> bool:
    if shutil.which(command[0]) is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "trial.c")
        source.write_text(_TRIAL, encoding="utf-8")
        arguments = [*command, "-shared", "-fPIC", str(source), "-o", str(source.with_suffix(".so"))]
        return subprocess.run(arguments, capture_output=True, check=False).returncode == 0  # noqa: S603  # a compiler


def _isas(machine: str) -> Mapping[str, tuple[str, ...]]:
    """The instruction sets to compile for, and their flags; what AArch64 has to offer is its baseline."""
    return _X86 if machine.lower() in ("x86_64", "amd64") else {"baseline": ()}


def compile_libraries(folder: Path, *, sanitize: bool = False, machine: str | None = None) -> list[Path]:
    """Compile the kernels into a folder; what lies there of an earlier time is replaced.

    Args:
        folder: Where the libraries, or the file `REASON`, go.
        sanitize: With checks of addresses and of undefined behaviour, for tests.
        machine: What to compile for, where `$CC` names a cross compiler; None for this machine.

    Returns:
        The libraries.

    Raises:
        CompilationError: There is no compiler, or it failed; the folder holds no libraries, and `REASON` says why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (REASON, *map(library_name, _X86)):
        (folder / name).unlink(missing_ok=True)
    try:
        flags = (*_FLAGS, *(_SANITIZE if sanitize else ()))
        isas = _isas(machine or platform.machine())
        return [_compile(folder / library_name(isa), (*flags, *own)) for isa, own in isas.items()]
    except CompilationError as error:
        for isa in _X86:
            (folder / library_name(isa)).unlink(missing_ok=True)
        (folder / REASON).write_text(f"{error}\n", encoding="utf-8")
        raise


def _compile(library: Path, flags: tuple[str, ...]) -> Path:
    compiler = find_compiler()
    if compiler is None:
        raise CompilationError("no C compiler: found neither $CC, cc, gcc nor clang, and no package ziglang")
    objects = []
    with tempfile.TemporaryDirectory() as folder:
        for source in (path for path in source_files() if path.suffix == ".c"):
            objects.append(str(Path(folder, source.name).with_suffix(".o")))
            contract = "fast" if source.name in _CONTRACTED else "off"
            _call([*compiler, *flags, f"-ffp-contract={contract}", "-c", str(source), "-o", objects[-1]])
        system = [] if platform.system() == "Windows" else ["-pthread", "-ldl", "-lm"]
        # First to another name: a process may have the library that is there in use.
        temporary = library.with_suffix(".tmp")
        _call([*compiler, *flags, "-shared", *objects, *system, "-o", str(temporary)])
        temporary.replace(library)
    return library


def _call(command: list[str]) -> None:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # a compiler
    if ran.returncode != 0:
        lines = (ran.stderr or ran.stdout).strip().splitlines()
        raise CompilationError("\n".join([f"failed: {shlex.join(command)}", *lines[:20]]))


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=HERE)
    parser.add_argument("--sanitize", action="store_true")
    options = parser.parse_args()
    try:
        libraries = compile_libraries(options.folder, sanitize=options.sanitize)
    except CompilationError as error:
        print(error, file=sys.stderr)
        return 1
    print(*libraries, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
