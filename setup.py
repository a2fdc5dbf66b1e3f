"""Builds the native kernels with the package: one shared library per instruction set, by the system's C++ compiler.

Where there is none, the package is built without them and PyTorch runs instead. Everything else is in pyproject.toml.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("src/steelyard/kernels/native")
FORMS = {
    "amx": ["-march=x86-64-v4", "-mavx512vnni", "-mprefer-vector-width=512", "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
    "avx512": ["-march=x86-64-v4", "-mavx512vnni", "-mprefer-vector-width=512"],
    "avx2": ["-march=x86-64-v3"],
    "portable": [],
}
# No contraction: fma is written where it is meant, and all forms give the same bits. No libgomp: torch has one.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden"]


class BuildKernels(build_ext):
    """Compiles the sources once per form."""

    def build_extension(self, extension: Extension) -> None:
        """Write kernels-FORM.so beside the Python files; a compiler that fails is said, not fatal."""
        compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        folder = Path(self.get_ext_fullpath(extension.name)).parent
        folder.mkdir(parents=True, exist_ok=True)
        forms = FORMS if platform.machine() == "x86_64" else {"portable": []}
        for form, flags in forms.items():
            if compiler is None:
                print("no C++ compiler: steelyard is built without its native kernels", file=sys.stderr)
                return
            target = folder / f"kernels-{form}.so"
            parts = {source: folder / f"{source.stem}-{form}.o" for source in sorted(SOURCES.glob("*.cpp"))}
            link = [compiler, "-shared", "-static-libstdc++", "-static-libgcc", *map(str, parts.values())]
            try:
                for source, part in parts.items():
                    subprocess.run([compiler, *FLAGS, *flags, "-c", str(source), "-o", str(part)], check=True)
                subprocess.run([*link, "-o", str(target)], check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                print(f"the native kernels ({form}) were not built: {error}", file=sys.stderr)
            finally:
                for part in parts.values():
                    part.unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        """The files that were built."""
        folder = Path(self.build_lib) / "steelyard" / "kernels"
        return sorted(str(path) for path in folder.glob("kernels-*.so"))

    def get_output_mapping(self) -> dict[str, str]:
        """Where an editable installation has them: beside the Python files."""
        return {path: str(SOURCES.parent / Path(path).name) for path in self.get_outputs()} if self.inplace else {}

    def copy_extensions_to_source(self) -> None:
        """For an editable installation."""
        for path in self.get_outputs():
            shutil.copy2(path, SOURCES.parent)


setup(
    ext_modules=[Extension("steelyard.kernels.native_", sources=[str(source) for source in sorted(SOURCES.glob("*.cpp"))])],
    cmdclass={"build_ext": BuildKernels},
)
