"""What pyproject.toml cannot say: compiled kernels, and a long description without links that lead nowhere outside."""

import re
import runpy
import sys
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
README = ROOT / "README.md"
NATIVE = Path("fedmef_fx", "native")
WHERE_FILES_ARE = "Paths such as `docs/guide.md` name files of the source distribution."
_FENCE = "```"
# [text](target) or ![text](target), where the target is a path: no address, no place on the same page.
_LINK_TO_A_FILE = re.compile(r"!?\[(?P<text>[^\]]*)\]\((?!\w+:|#)(?P<path>[^)\s]+)\)")


def long_description(readme: str) -> str:
    """The README for a page that lies elsewhere than the files it links to, as a package index shows it.

    Args:
        readme: Markdown.

    Returns:
        The same text, where links to files name the path instead: the source distribution holds the files, and no
        public address does. Addresses, places on the page and code blocks are unchanged.
    """
    parts = readme.split(_FENCE)
    parts[::2] = (_LINK_TO_A_FILE.sub(r"\g<text> (`\g<path>`)", part) for part in parts[::2])
    return _FENCE.join(parts)


class BuildNative(Command):
    """Compile the kernels, in the source tree for an editable installation; without a compiler, say so and go on."""

    description = "compile the kernels in fedmef_fx/native"
    user_options = ()
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.made: list[str] = []

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        compiling = runpy.run_path(str(ROOT / NATIVE / "compile_library.py"))
        folder = ROOT / NATIVE if self.editable_mode else Path(self.build_lib or "build", NATIVE)
        try:
            self.made = [str(path) for path in compiling["compile_libraries"](folder)]
        except compiling["CompilationError"] as error:
            self.made = [str(folder / compiling["REASON"])]
            print(f"fedmef-fx is built without compiled kernels, NumPy takes their place: {error}", file=sys.stderr)

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in sorted((ROOT / NATIVE / "src").glob("*.[ch]"))]

    def get_outputs(self) -> list[str]:
        return self.made

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    """All that is built, the kernels last: they lie in a package."""

    sub_commands = [*build.sub_commands, ("build_native", None)]  # noqa: RUF012  # as setuptools has it


class Wheel(bdist_wheel):
    """One wheel per platform, for every Python: the kernels know none."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class WithKernels(Distribution):
    """A distribution that depends on the platform."""

    def has_ext_modules(self) -> bool:
        return True


if __name__ == "__main__":
    setup(
        distclass=WithKernels,
        cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": Wheel},
        long_description=f"{long_description(README.read_text(encoding='utf-8'))}\n{WHERE_FILES_ARE}\n",
        long_description_content_type="text/markdown",
    )
