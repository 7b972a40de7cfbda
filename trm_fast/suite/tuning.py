"""Other launch settings than those in the table: each checked, then timed.

Owns the search and these items of stages B and C. A candidate stands before the table's own rows
while it is tried; nothing is written back: a better row is put into the table by hand, with what
was measured beside it. Imported by `stages.py`.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trm_fast.op_bench import RUN, Function, Inputs, functions, make_inputs
from trm_fast.op_cases import OpCase, cases
from trm_fast.race import first_line
from trm_fast.suite import records
from trm_fast.suite.records import measurement
from trm_fast.suite.session import Rows, Session, Skip
from trm_fast.suite.speed import predicted
from trm_fast.timing import in_a_row

CANDIDATES = 8  # at most, of one row
ROUNDS = 30
LARGEST_TILE = 128 * 256  # numbers of the two longest sides together
LIMIT = 2e-2  # relative L2 between the results of two settings


def launch_table() -> Any:
    """The kernels' table of settings. (By name: only `backends` imports kernels otherwise.)"""
    return importlib.import_module("trm_fast.kernels.launch")


@contextlib.contextmanager
def rows_first(*rows: Any) -> Iterator[None]:
    """Inside, these rows are taken before the table's."""
    table = launch_table()
    before = table.ROWS
    table.ROWS = (*rows, *before)
    try:
        yield
    finally:
        table.ROWS = before


class _Watched(Mapping[str, int]):
    """A row's tiles, which say when they are read."""

    def __init__(self, tiles: Mapping[str, int], read: Callable[[], None]) -> None:
        self.tiles, self.read = tiles, read

    def __getitem__(self, key: str) -> int:
        self.read()
        return self.tiles[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tiles)

    def __len__(self) -> int:
        return len(self.tiles)


def used_rows(run: Callable[[], Any]) -> list[Any]:
    """The rows of the table that `run` launches kernels with, each once."""
    table = launch_table()
    used: dict[int, Any] = {}

    def watch(index: int, row: Any) -> Any:
        return replace(row, tiles=_Watched(row.tiles, lambda: used.setdefault(index, row)))

    before = table.ROWS
    table.ROWS = tuple(watch(i, row) for i, row in enumerate(before))
    try:
        run()
    finally:
        table.ROWS = before
    return list(used.values())


def candidates(row: Any, limit: int = CANDIDATES) -> list[Any]:
    """Neighbours of a row: another number of warps or stages, one side of the tile halved, doubled.

    Sides stay between 16 and 256, and tiles so small that their sums fit the registers.
    """
    found = [
        replace(row, num_stages=row.num_stages + more)
        for more in (1, -1)
        if row.num_stages > 1 and 1 < row.num_stages + more <= 6
    ]
    found.append(replace(row, num_warps=4 if row.num_warps == 8 else 8))
    for factor in (0.5, 2):
        for side, size in row.tiles.items():
            tiles = {**row.tiles, side: int(size * factor)}
            if side.startswith("BLOCK") and _fits(tiles):
                found.append(replace(row, tiles=tiles))
    return found[:limit]


def _fits(tiles: Mapping[str, int]) -> bool:
    sides = sorted(size for side, size in tiles.items() if side.startswith("BLOCK"))
    if len(sides) == 1:
        return 1 <= sides[0] <= 8192
    return sides[0] >= 1 and sides[-1] <= 256 and math.prod(sides[-2:]) <= LARGEST_TILE


def settings(row: Any) -> str:
    """A row in short: "linear 128x256x64 w8 s3"."""
    sides = "x".join(str(size) for size in row.tiles.values())
    return f"{row.kernel} {sides} w{row.num_warps} s{row.num_stages}"


def farthest(got: Iterable[Tensor], want: Iterable[Tensor]) -> float:
    """The largest relative L2 over pairs of results; infinite where one is not finite."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if b.is_floating_point() and b.numel():
            error = float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-30))
            worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def try_rows(
    session: Session, case: OpCase, direction: str, function: Function, rows: Iterable[Any]
) -> Rows:
    """The table's settings, then each of `rows`: milliseconds of the whole operation."""
    sets = [make_inputs(case, seed, session.device) for seed in range(1 if session.tiny else 4)]
    run = RUN[direction]
    want = [t.clone() for t in run(function, _clone(sets[0]))]
    name = f"rows/{case.op}/{case.name}/{direction}"
    base = _median_ms(session, function, sets, direction)
    yield measurement(f"{name}/as in the table", base, "ms", predicted(case, direction))
    for row in rows:
        label = f"{name}/{settings(row)}"
        try:
            with rows_first(row):
                error = farthest(run(function, _clone(sets[0])), want)
                if not error <= LIMIT:
                    yield measurement(label, error, "relative L2", note="WRONG, not timed")
                    continue
                ms = _median_ms(session, function, sets, direction)
        except Exception as failure:  # settings that do not compile or do not fit
            yield measurement(label, None, "ms", note=first_line(failure)[:120])
            if session.device.type == "cuda":
                torch.cuda.synchronize(session.device)  # a lost context ends the item
            continue
        yield measurement(label, ms, "ms", note=f"x{base / ms:.3f} of the table", row=as_data(row))


def as_data(row: Any) -> dict[str, Any]:
    """A row for the results file."""
    return {
        "kernel": row.kernel,
        "arch": row.arch,
        "bits": row.bits,
        "tiles": dict(row.tiles),
        "num_warps": row.num_warps,
        "num_stages": row.num_stages,
    }


def _clone(inputs: Inputs) -> Inputs:
    if inputs.case.changes is None:
        return inputs
    return Inputs(inputs.case, [t.clone() for t in inputs.tensors], inputs.seed)


def _median_ms(session: Session, function: Function, sets: list[Inputs], direction: str) -> float:
    def step(i: int) -> Any:
        return RUN[direction](function, sets[i % len(sets)])

    for i in range(2):
        step(i)
    seconds = in_a_row(step, session.device, 0, session.count(ROUNDS))
    return 1e3 * statistics.median(seconds)


def kernel_rows(case: OpCase, function: Function, session: Session) -> dict[str, list[Any]]:
    """direction -> the rows whose kernels run there first: the backward's own under "both"."""
    inputs = make_inputs(case, 0, session.device)
    found: dict[str, list[Any]] = {}
    seen: list[Any] = []
    for direction in case.directions:
        used = used_rows(lambda d=direction: RUN[d](function, _clone(inputs)))  # type: ignore[misc]
        found[direction] = [row for row in used if row not in seen]
        seen += used
    return found


def triton_function(session: Session, case: OpCase) -> Function:
    found, absent = functions(case, session.device, session.interpreted)
    if "triton" not in found:
        raise Skip(f"no Triton kernels for {case.op}: {absent.get('triton', 'not in the table')}")
    return found["triton"]


def operation(session: Session, op: str) -> Rows:
    """The neighbours of every row that an operation uses, in the direction where it runs first."""
    for case in session.cases(op):
        function = triton_function(session, case)
        for direction, used in kernel_rows(case, function, session).items():
            limit = 1 if session.tiny else CANDIDATES
            tried = [one for row in used for one in candidates(row, limit)]
            if tried:
                yield from try_rows(session, case, direction, function, tried)


def slowest(session: Session) -> tuple[str, str, str]:
    """(op, case, direction) farthest above its prediction in the newest stage B of the file."""
    ratios = {
        row["name"]: row["ratio"]
        for record in records.latest(records.read(session.out), "B")
        for row in record["rows"]
        if row["name"].startswith("op/") and row["name"].endswith("/triton") and "ratio" in row
    }
    if not ratios:
        raise Skip("the results file has no operations of stage B")
    _, op, case, direction, _ = max(ratios, key=lambda name: ratios[name]).split("/")
    return op, case, direction


def second_round(session: Session) -> Rows:
    """The operation farthest above its prediction: neighbours of the best settings found so far."""
    op, name, direction = slowest(session)
    (case,) = [c for c in cases(op, session.size, dtype=session.dtype) if c.name == name]
    function = triton_function(session, case)
    best = best_rows(session, op, name)
    used = kernel_rows(case, function, session)
    rows = [row for found in used.values() for row in found]
    tried = []
    for row in rows:
        start = best.get(row.kernel)
        if start is not None:
            row = replace(row, **{k: start[k] for k in ("tiles", "num_warps", "num_stages")})
        tried += [row, *candidates(row, 1 if session.tiny else CANDIDATES)]
    yield from try_rows(session, case, direction, function, tried)


def best_rows(session: Session, op: str, case: str) -> dict[str, dict[str, Any]]:
    """kernel -> the fastest settings of the newest stage B, where they beat the table."""
    best: dict[str, tuple[float, dict[str, Any]]] = {}
    table = math.inf
    for record in records.latest(records.read(session.out), "B"):
        for row in record["rows"]:
            if not row["name"].startswith(f"rows/{op}/{case}/"):
                continue
            if row["name"].endswith("as in the table"):
                table = row["value"]
            elif "row" in row and row["value"] < table:
                kernel = row["row"]["kernel"]
                best[kernel] = min(best.get(kernel, (math.inf, {})), (row["value"], row["row"]),
                                   key=lambda pair: pair[0])  # fmt: skip
    return {kernel: row for kernel, (_, row) in best.items()}
