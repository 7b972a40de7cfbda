"""A kernel, its rows and its launches, for the tests of the compile report.

Imported by tests/test_kernels_compile.py and tests/test_kernels_report.py.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton.language as tl
from triton.runtime.jit import JITFunction

from trm_fast.kernels import _compile
from trm_fast.kernels._compile import Compiled, Variant
from trm_fast.kernels.launch import Row


def _sum_kernel(
    a_source, b_ptr, out_ptr, count, half, eps, one,
    WIDTH: tl.constexpr, FAST: tl.constexpr, BLOCK_M: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tl.store(out_ptr + tl.arange(0, BLOCK_M), a_source + b_ptr)


def _difference_kernel(
    a_source, b_ptr, out_ptr, count, half, eps, one,
    WIDTH: tl.constexpr, FAST: tl.constexpr, BLOCK_M: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tl.store(out_ptr + tl.arange(0, BLOCK_M), a_source - b_ptr)


# What @triton.jit makes of a function where nothing is interpreted.
KERNEL, OTHER = JITFunction(_sum_kernel), JITFunction(_difference_kernel)
TILES = {"BLOCK_M": 64}
ROWS = {
    (arch, bits): Row("sum", arch, bits, TILES, 8, 2) for arch in (80, 90, 100) for bits in (16, 32)
}
CLEAN = Compiled(
    registers=128, stack=0, spill_stores=0, spill_loads=0, serialized=False, shared=65536,
    scratch=0, tensor_memory=0, warps=8, dot=True, waits=False, mix={"HGMMA": 4, "STG": 8},
)  # fmt: skip


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def arguments(**changes: Any) -> dict[str, Any]:
    args = {
        "a_source": meta(97, 512),
        "b_ptr": meta(97, 512, dtype=torch.float32),
        "out_ptr": meta(97, 512),
        **{"count": 96, "half": 97, "eps": 1e-5, "one": 1},
        **{"WIDTH": 512, "FAST": False, "BLOCK_M": 64, "PDL": False},
    }
    return args | changes


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Variant]:
    """Takes what would have been compiled; each result has as many registers as its place."""
    asked: list[Variant] = []

    def fake(variants: list[Variant], jobs: int) -> Iterator[tuple[Variant, Compiled | str]]:
        for of in variants:
            asked.append(of)
            broken = of.signature["count"] == "i64"
            yield of, "no" if broken else replace(CLEAN, registers=len(asked))

    monkeypatch.setattr(_compile, "_in_processes", fake)
    return asked
