"""The microkernels of the compiled extension beside the machine's peak.

Owns the shapes, the floor that bench/bench_micro.py asserts, and how both rates are taken: on one
pinned thread, in CPU time, product and peak in turns, the best of each. Imported by `bench.py` and
bench/.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trm_fast.extension import library, micro
from trm_fast.timing import on_threads

FLOOR = 0.9  # of the peak: a compiler that spills accumulators halves the rate
SAMPLE_SECONDS = 3e-3  # long beside the clock's resolution, short beside a neighbour's time slice
DTYPES = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class MicroCase:
    """One product [rows, inner] x [inner, columns]; the floor holds where `guarded`."""

    rows: int
    inner: int
    columns: int
    guarded: bool = False

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.inner}x{self.columns}"

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.inner * self.columns


CASES = (
    MicroCase(97, 512, 3072, guarded=True),  # the official gate and up, one board
    MicroCase(97, 1536, 512, guarded=True),  # its down
    MicroCase(776, 512, 512, guarded=True),  # the output projection of attention, 8 boards
    MicroCase(81, 48, 192),  # the default job: gate and up, one board
    MicroCase(81, 96, 48),  # its down
    MicroCase(5184, 48, 192),  # 64 boards
)
QUICK = (MicroCase(13, 32, 48), MicroCase(5, 16, 16))  # too small to be judged


def measure(
    cases: Sequence[MicroCase] = CASES,
    dtypes: Iterable[str] = DTYPES,
    turns: int = 10,
    sample_seconds: float = SAMPLE_SECONDS,
) -> dict[str, Any]:
    """The JSON object of docs/benchmarks.md, "micro"; `unavailable` says why there are no rows."""
    reason = library.unavailable("cpu")
    if reason is not None:
        return {"unavailable": reason, "floor": FLOOR, "rows": []}
    rows: list[dict[str, Any]] = []
    peaks: dict[str, float] = {}
    with on_threads(1):
        for dtype in dtypes:
            found = _rates(cases, getattr(torch, dtype), turns, sample_seconds)
            peaks[dtype] = found.pop("")
            rows += [_row(case, dtype, found[case.name], peaks[dtype]) for case in cases]
    return {
        "unavailable": None,
        "floor": FLOOR,
        "instruction_set": library.instruction_set(),
        "peak_gflop_per_s": peaks,
        "rows": rows,
    }


def _rates(
    cases: Sequence[MicroCase], dtype: torch.dtype, turns: int, seconds: float
) -> dict[str, float]:
    """Best GFLOP/s by case name, the peak's under ""."""
    steps = max(1, int(seconds * 1e8))  # a step is some 10 ns
    inputs, times = {}, {}
    for case in cases:
        scale = 30 if dtype == torch.int8 else 1
        a = (scale * torch.randn(case.rows, case.inner)).to(dtype)
        w = (scale * torch.randn(case.columns, case.inner)).to(dtype)
        inputs[case.name] = a, w
        rate = float(micro.product(a, w, 1, 1)[1][0])
        times[case.name] = max(1, int(seconds * rate / case.flops))
    best = dict.fromkeys(["", *inputs], 0.0)
    for _ in range(turns):
        best[""] = max(best[""], float(micro.peak(dtype, steps, 3).max()))
        for name, (a, w) in inputs.items():
            best[name] = max(best[name], float(micro.product(a, w, times[name], 3)[1].max()))
    return {name: rate / 1e9 for name, rate in best.items()}


def _row(case: MicroCase, dtype: str, rate: float, peak: float) -> dict[str, Any]:
    return {
        "case": case.name,
        "dtype": dtype,
        "gflop_per_s": rate,
        "fraction_of_peak": rate / peak,
        "guarded": case.guarded,
        "holds": rate >= FLOOR * peak if case.guarded else None,
    }


def text(found: dict[str, Any]) -> str:
    """A table for a terminal."""
    if found["unavailable"]:
        return f"microkernels: not measured, no compiled extension: {found['unavailable']}"
    peaks = ", ".join(f"{n} {v:.0f}" for n, v in found["peak_gflop_per_s"].items())
    lines = [
        f"microkernels ({found['instruction_set']}), one thread, CPU time; peak of "
        f"multiply-adds in GFLOP/s: {peaks}",
        f"  {'rows x inner x columns':<26}{'dtype':<10}{'GFLOP/s':>9}{'of peak':>9}",
    ]
    for r in found["rows"]:
        judged = {None: "", True: "  holds", False: "  BELOW the floor"}[r["holds"]]
        lines.append(
            f"  {r['case']:<26}{r['dtype']:<10}{r['gflop_per_s']:>9.1f}"
            f"{r['fraction_of_peak']:>9.1%}{judged}"
        )
    if any(r["holds"] is not None for r in found["rows"]):
        lines.append(f"  floor: {found['floor']:.0%} of the peak, where it says so")
    return "\n".join(lines)
