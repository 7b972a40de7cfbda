"""Where the packages lie; everything static about the distribution is in pyproject.toml.

`kernels/` and `csrc/` stand beside `trm_fast/` in the checkout and are installed inside it: as the
package `trm_fast.kernels` and as the data folder `trm_fast.csrc`. No top-level `kernels` is ever
installed: PyPI has one.

TRM_FAST_PREBUILD=cpu, or cpu,cuda, compiles the extension into the wheel, which is then of this
platform (but of any Python). That takes torch's headers: install torch first, and pass
--no-build-isolation to pip. Unset, nothing is compiled and the wheel is pure.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC_FILES = ["*.md", "*.h", "*.cuh", "*.cpp", "*.cu"]

csrc_packages = {"trm_fast.csrc": "csrc"}
csrc_packages.update(
    {
        f"trm_fast.csrc.{folder.name}": f"csrc/{folder.name}"
        for folder in (ROOT / "csrc").glob("[a-z]*/")
    }
)


def asked_for() -> list[str]:
    """The libraries that TRM_FAST_PREBUILD asks for."""
    given = os.environ.get("TRM_FAST_PREBUILD", "")
    kinds = [name.strip() for name in given.split(",") if name.strip()]
    if not set(kinds) <= {"cpu", "cuda"}:
        raise SystemExit(f"TRM_FAST_PREBUILD is cpu, cuda or cpu,cuda, not {given!r}")
    return kinds


KINDS = asked_for()


def load(name: str) -> ModuleType:
    """A file of trm_fast/extension, without the package: what it needs is not installed yet."""
    full = f"trm_fast.extension.{name}"
    spec = importlib.util.spec_from_file_location(full, ROOT / f"trm_fast/extension/{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[full] = module
    spec.loader.exec_module(module)
    return module


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if KINDS and not self.editable_mode:  # a checkout builds what it has at first use
            self.prebuild(load("build"))

    def prebuild(self, build: ModuleType) -> None:
        folder = Path(self.build_lib, "trm_fast", "_lib").absolute()
        shutil.rmtree(folder, ignore_errors=True)  # what an earlier build of other sources left
        for kind in KINDS:
            targets = build.portable_sets() if kind == "cpu" else build.cuda_architectures()
            library = folder / build.prebuilt_name(kind, targets)
            build.build(kind, library, targets)
            build.seal(library)


class Platform(Distribution):
    """A wheel with libraries in it is of one platform."""

    def has_ext_modules(self) -> bool:
        return bool(KINDS)


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        # Nothing in the libraries is of a version of Python.
        return ("py3", "none", platform) if KINDS else (python, abi, platform)


setup(
    packages=[
        *find_packages(include=["trm_fast", "trm_fast.*"], exclude=["trm_fast.kernels*"]),
        "trm_fast.kernels",
        *csrc_packages,
    ],
    package_dir={"trm_fast": "trm_fast", "trm_fast.kernels": "kernels", **csrc_packages},
    package_data={
        "trm_fast": ["py.typed", "shipped/*"],
        "trm_fast.demo": ["page/*"],
        **dict.fromkeys(csrc_packages, CSRC_FILES),
    },
    cmdclass={"build_py": BuildPy, "bdist_wheel": Wheel},
    distclass=Platform,
)
