"""Import every module of an installed trm_fast, and check that it came from the given folder.

usage: python import_all.py FOLDER
"""

import importlib
import pkgutil
import sys
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path


def main(folder: str) -> None:
    package = importlib.import_module("trm_fast")
    names = ["trm_fast"]
    for module in pkgutil.walk_packages(package.__path__, "trm_fast."):
        names.append(module.name)
        importlib.import_module(module.name)
    home = Path(folder).resolve()
    for name in names:
        found = Path(importlib.import_module(name).__file__ or "").resolve()
        assert found.is_relative_to(home), f"{name} was imported from {found}"
    assert {"trm_fast.kernels", "trm_fast.data.sudoku", "trm_fast.train"} <= set(names), names
    assert (files("trm_fast") / "py.typed").is_file()
    assert (files("trm_fast") / "csrc" / "README.md").is_file()
    assert version("trm-fast") == package.__version__
    sys.stdout.write(f"{len(names)} modules of trm_fast {package.__version__} imported\n")


if __name__ == "__main__":
    main(sys.argv[1])
