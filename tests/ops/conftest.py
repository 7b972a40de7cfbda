"""The fixtures of the kernels' tests, and which library of the extension they run on."""

import pytest
from kernel_checks import architecture

from trm_fast.extension import library

__all__ = ["architecture"]


@pytest.fixture(scope="session", autouse=True)
def chosen_library(request: pytest.FixtureRequest) -> None:
    """What --instruction-set and --extension-flags ask for, instead of this machine's best."""
    name = request.config.getoption("--instruction-set")
    if name is not None:
        flags = request.config.getoption("--extension-flags").split()
        assert library.load_for_tests([name], flags) == name
