"""Where the packages lie; everything static about the distribution is in pyproject.toml.

`kernels/` and `csrc/` stand beside `trm_fast/` in the checkout and are installed inside it: as the
package `trm_fast.kernels` and as the data folder `trm_fast.csrc`. No top-level `kernels` is ever
installed: PyPI has one.
"""

from pathlib import Path

from setuptools import find_packages, setup

CSRC = Path(__file__).resolve().parent / "csrc"
CSRC_FILES = ["*.md", "*.h", "*.cuh", "*.cpp", "*.cu"]

csrc_packages = {"trm_fast.csrc": "csrc"}
csrc_packages.update(
    {f"trm_fast.csrc.{folder.name}": f"csrc/{folder.name}" for folder in CSRC.glob("[a-z]*/")}
)

setup(
    packages=[
        *find_packages(include=["trm_fast", "trm_fast.*"], exclude=["trm_fast.kernels*"]),
        "trm_fast.kernels",
        *csrc_packages,
    ],
    package_dir={"trm_fast": "trm_fast", "trm_fast.kernels": "kernels", **csrc_packages},
    package_data={"trm_fast": ["py.typed"], **dict.fromkeys(csrc_packages, CSRC_FILES)},
)
