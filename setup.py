"""Build hooks for setuptools; the metadata is in pyproject.toml, the native build in build_tools/.

Torch is never imported and is no build requirement: build_tools finds the torch of the target environment by path.
"""

import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from build_tools import native  # noqa: E402
from build_tools.environment import BuildError  # noqa: E402

PACKAGE = "unique_attn"


class BuildPython(build_py):
    """Starts from an empty folder, so that a file deleted from the checkout is not shipped from an older build."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / PACKAGE, ignore_errors=True)
        super().run()


class BuildNative(build_ext):
    """Runs the ninja build and puts its two files where setuptools expects extensions."""

    built: tuple[str, ...] = ()

    def run(self) -> None:
        folder = ROOT if self.inplace else Path(self.build_lib)
        try:
            self.built = tuple(native.build(folder / PACKAGE))
        except BuildError as error:
            raise SetupError(str(error)) from None

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / PACKAGE / name) for name in self.built]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.inplace:
            return {}
        return {output: str(ROOT / PACKAGE / name) for output, name in zip(self.get_outputs(), self.built)}


# The extension only marks the wheel as one for this CPython and platform: BuildNative ignores its sources.
setup(
    cmdclass={"build_py": BuildPython, "build_ext": BuildNative},
    ext_modules=[Extension(f"{PACKAGE}._runtime", sources=[])],
)
