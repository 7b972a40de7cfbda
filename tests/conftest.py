"""What holds for every test: interpreted Triton without a GPU, poisoned fresh memory, fixed seeds.

The environment is set before torch is imported: OpenMP reads it when its first threads start, and
Triton decides about its interpreter when it is first imported (torch.compile imports it).
"""

import logging
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._device import _device_constructors

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(min(2, int(os.environ.get("OMP_NUM_THREADS", "2"))))

# `with torch.device(...)` knows the functions that allocate from its first use on: it must
# not meet the replacements below, which it would let allocate elsewhere.
_device_constructors()


def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`make`, with the fresh memory of floating-point results set to NaN."""

    def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
        fresh = make(*args, **kwargs)
        if fresh.is_floating_point() or fresh.is_complex():
            with torch.no_grad():
                fresh.fill_(float("nan"))
        return fresh

    return allocate


@pytest.fixture(autouse=True)
def poison_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """An output that was allocated and not written shows as NaN instead of as luck."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))


@pytest.fixture(autouse=True)
def log_of_builds() -> Iterator[None]:
    """Commands that a test calls in this process show the log; the next test starts without."""
    yield
    log = logging.getLogger("trm_fast.extension")
    log.handlers.clear()
    log.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def chosen_library(request: pytest.FixtureRequest) -> None:
    """What --instruction-set and --extension-flags ask for, instead of this machine's best."""
    name = request.config.getoption("--instruction-set")
    if name is not None:
        from trm_fast.extension import library

        flags = request.config.getoption("--extension-flags").split()
        assert library.load_for_tests([name], flags) == name


@pytest.fixture
def extension() -> Iterator[None]:
    """The test runs on the compiled CPU library, whose allocations are poisoned like Python's.
    Where it cannot be built the test is skipped with the reason; CI sets TRM_FAST_EXT=require,
    which fails instead."""
    from trm_fast.extension import library

    reason = library.unavailable("cpu")
    if reason is not None:
        pytest.skip(f"no compiled extension: {reason}")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills what is allocated in C++ with NaN
    yield
    torch.use_deterministic_algorithms(before)
