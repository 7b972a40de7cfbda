"""`trm-fast bench`: the train step and the inference step, timed against the baselines.

Owns the protocol for whole steps and the command; the clocks are those of `timing.py`, the tables
those of `bench_report.py`. Imported by `__main__.py`, `suite`, bench/ and its tests. Protocol:
every contender gets the same weights, batch and carry and must agree with the reference before
anything is timed; then, for each number of threads, all take turns, one step each, in one process;
the first turn is dropped; medians and minima are kept. A train step is forward, loss and backward
without the optimizer; an inference step is one supervision step under `torch.inference_mode`; a
solve is all halt_max_steps of them. A ratio holds only between rows of one race.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # OpenMP reads it when torch is loaded

import argparse
import contextlib
import gc
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trm_fast import memory_bench, micro_bench
from trm_fast.bench_report import add_fractions, gains, head, ratios, row, table
from trm_fast.config import QUANTIZED, ModelConfig
from trm_fast.console import say, show_builds
from trm_fast.contenders import (
    COMPILE,
    Entry,
    Official,
    ParityError,
    check_parity,
    contenders,
    effective_config,
    kept_for_backward,
    official_code,
    prepare,
)
from trm_fast.extension import library
from trm_fast.flops import STEPS
from trm_fast.loading import pick_device
from trm_fast.ops import POLICIES
from trm_fast.profiling import launches
from trm_fast.timing import (
    basis,
    collector_off,
    environment,
    matmul_peak,
    on_threads,
    timed,
)
from trm_fast.workloads import CASES, Case, default_cases, plan, quick

__all__ = ["main", "run_cases"]

SCHEMA = 3
PARTS = ("steps", "memory", "micro")
LEAST_TURNS = 3
SECONDS = 120.0  # for the turns of one race; a step of the official code takes 5 s in float32

Progress = Callable[[str], None]


def lap(entry: Entry, device: torch.device, keep: bool = True) -> None:
    """One step, timed."""
    wall, cpu = timed(entry.run, device)
    if keep:
        entry.wall.append(wall)
        entry.cpu.append(cpu)


@dataclass
class Race:
    """The contenders of one case and step, checked; `absent` says why others are not."""

    case: Case
    step: str
    device: torch.device
    entries: list[Entry]
    absent: dict[str, str]

    def start(self) -> None:
        """Forget all times; one untimed turn, for what depends on the number of threads."""
        for entry in self.entries:
            entry.wall.clear()
            entry.cpu.clear()
            lap(entry, self.device, keep=False)

    def run(self, rounds: int, seconds: float = float("inf")) -> None:
        """`rounds` timed turns of every contender; each turn starts with another one.

        After LEAST_TURNS no new turn begins once all turns together have taken `seconds`.
        """
        begin = time.perf_counter()
        with collector_off():
            for turn in range(rounds):
                if turn >= LEAST_TURNS and time.perf_counter() - begin > seconds:
                    break
                for i in range(len(self.entries)):
                    entry = self.entries[(turn + i) % len(self.entries)]
                    if self.device.type == "cuda":  # memory that another one had is found again
                        lap(entry, self.device, keep=False)
                    lap(entry, self.device)

    def result(self, cpus: Sequence[int] | None = None) -> dict:
        """The JSON object of the times since `start`, on the threads that PyTorch has now."""
        rows = [row(e, self.step, self.device) for e in self.entries]
        rows += [
            {"contender": name, "available": False, "note": why}
            for name, why in self.absent.items()
        ]
        return {
            "case": self.case.name,
            "about": self.case.about,
            "step": self.step,
            "threads": torch.get_num_threads(),
            "cpus": None if cpus is None else list(cpus),
            "clock": basis(self.device),
            "launched": "kernels" if self.device.type == "cuda" else "operations",
            "config": self.case.model.to_dict(),
            "rows": rows,
            "ratios": ratios(rows, basis(self.device)),
        }


def set_up(
    case: Case,
    step: str,
    official: Official | None,
    device: torch.device,
    compiling: str = "auto",
    policies: Sequence[str] = (),
    quantized: Sequence[str] = (),
) -> Race:
    """Build and check all contenders of a case, `policies` in place of the case's own, and
    those that are `quantized` so, as far as the step notices.

    Raises:
        ParityError: one of them computes something else.
    """
    entries: list[Entry] = []
    absent: dict[str, str] = {}
    losses: dict[ModelConfig, Tensor] = {}
    chosen = (policies or case.policies) if step == "train" else ("save",)
    # Training does not notice int8.
    ways = [q for q in quantized if q != "int8" or step != "train"]
    for contender in contenders(case, device, compiling, chosen, ways, step):
        if contender.official and official is None:
            absent[contender.name] = "no official code given: --official PATH"
            continue
        config = effective_config(case, contender)
        before = _allocated(device)
        try:
            entry = prepare(contender, config, step, official, device)
            if contender.name != "reference" and not contender.products:
                check_parity(entry, step, official, device, losses)
            lap(entry, device, keep=False)
            _look_inside(entry, step, device, before)
        except ValueError:  # ParityError is one
            raise
        except Exception as error:  # no compiler, an unsupported graph, no memory
            lines = str(error).strip().splitlines() or [repr(error)]
            absent[contender.name] = f"failed: {lines[0]}"
            continue
        entries.append(entry)
    return Race(case, step, device, entries, absent)


def _allocated(device: torch.device) -> int:
    """Bytes that tensors hold on a GPU."""
    if device.type != "cuda":
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)


def _look_inside(entry: Entry, step: str, device: torch.device, before: int) -> None:
    """Memory and launches of a step; `before`: bytes that others hold."""
    contender, cuda = entry.contender, device.type == "cuda"
    if contender.captured:  # what its graph holds is not seen while it is replayed
        entry.launches = launches(entry.run, device)
        return
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        lap(entry, device, keep=False)
        entry.peak_bytes = torch.cuda.max_memory_allocated(device) - before
    if step == "train" and not (contender.compiled or contender.products):
        entry.saved_bytes = kept_for_backward(entry)
    if cuda or not contender.compiled:  # compiled code cannot be looked into without kernels
        entry.launches = launches(entry.run, device)


@contextlib.contextmanager
def given_threads(count: int | None) -> Iterator[list[int] | None]:
    """As `on_threads`; None leaves everything as it is."""
    if count is None:
        yield None
        return
    with on_threads(count) as cpus:
        yield cpus


def run_cases(
    chosen: Sequence[tuple[Case, str]],
    threads: Sequence[int] | None = None,
    official_path: Path | None = None,
    device: torch.device | None = None,
    compiling: str = "auto",
    peak_size: int | None = None,
    policies: Sequence[str] = (),
    quantized: Sequence[str] = (),
    seconds: float = SECONDS,
    progress: Progress = lambda line: None,
    keep: Callable[[dict], None] = lambda found: None,
) -> dict:
    """Every (case, step) on every number of threads; returns the JSON object of docs/benchmarks.md.

    threads: None takes PyTorch's setting and pins nothing.
    progress: is told what comes next: compiling a deep recursion takes minutes.
    keep: is given the object as it is after each race; a run may be ended early.

    Raises:
        ParityError: a contender computes something else; ValueError: no official code there.
    """
    device = torch.device("cpu") if device is None else device
    counts: Sequence[int | None] = threads or [None]
    found: list[dict] = []
    begin = time.perf_counter()
    dtypes = {case.model.forward_dtype for case, _ in chosen}
    peaks = Peaks(dtypes, device, peak_size)
    with official_code(official_path) as official:
        for count in counts:
            peaks.measure(count)
        for number, (case, step) in enumerate(chosen, 1):
            config = case.config
            name = f"{number}/{len(chosen)} {case.name}, {config['forward_dtype']}, "
            name += f"B={config['batch_size']}, {step} step"
            progress(f"{name}: building, parity, warm-up")
            started = time.perf_counter()
            with given_threads(max(threads) if threads else None):
                race = set_up(case, step, official, device, compiling, policies, quantized)
            for count in counts:
                with given_threads(count) as cpus:
                    progress(f"{name}: {len(race.entries)} contenders, threads: {count or 'all'}")
                    race.start()
                    race.run(case.rounds, seconds)
                    result = race.result(cpus)
                found.append(result | {"seconds": time.perf_counter() - started})
                keep(report(device, peaks, found))
                started = time.perf_counter()
        for count in counts:
            peaks.measure(count)
    return report(device, peaks, found) | {"seconds": time.perf_counter() - begin}


class Peaks:
    """Best `torch.mm` rates in GFLOP/s by threads and dtype, over all times they were measured."""

    def __init__(
        self, dtypes: Iterable[str], device: torch.device, size: int | None = None
    ) -> None:
        self.dtypes, self.device = sorted(dtypes), device
        self.size = size or (8192 if device.type == "cuda" else 1024)
        self.found: dict[str, dict[str, float]] = {}

    def measure(self, count: int | None = None) -> None:
        with given_threads(count):
            best = self.found.setdefault(str(torch.get_num_threads()), {})
            for name in self.dtypes:
                rate = matmul_peak(getattr(torch, name), self.device, self.size)
                best[name] = max(best.get(name, 0.0), rate)


def report(device: torch.device, peaks: Peaks, results: Sequence[dict]) -> dict:
    """The JSON object: what the numbers depend on, the peaks, and one result per race."""
    depends = environment(device) | {"schema": SCHEMA, "threads": sorted(map(int, peaks.found))}
    add_fractions(results, peaks.found)
    del depends["clock"]  # each result has its own
    loaded = device.type == "cpu" and library.unavailable("cpu") is None
    return depends | {
        "instruction_set": library.instruction_set() if loaded else None,
        "peak_gflop_per_s": peaks.found,
        "results": list(results),
    }


def text(found: dict[str, Any]) -> str:
    """A report for a terminal."""
    parts = [part for part in (gains(found), head(found)) if part]
    parts += [table(r) for r in found["results"]]
    parts += [memory_bench.text(one) for one in found.get("memory", [])]
    parts += [micro_bench.text(one) for one in found.get("micro", [])]
    if "total_seconds" in found:
        parts.append(f"all of it took {found['total_seconds'] / 60:.1f} minutes")
    return "\n\n".join(parts)


def measure_memory(
    chosen: Sequence[tuple[Case, str]],
    policies: Sequence[str],
    official: Path | None,
    threads: Sequence[int],
    small: bool,
    progress: Progress,
) -> list[dict]:
    """Of the official mlp_t case in each dtype that its train step is run in."""
    found: list[dict] = []
    for case, step in chosen:
        dtype = case.config["forward_dtype"]
        if (case.name, step) != ("official", "train") or dtype in [one["dtype"] for one in found]:
            continue
        progress(f"memory of {case.name}, {dtype}: a process for each contender")
        batch = 3 if small else memory_bench.BATCH
        kinds = policies or case.policies
        found.append(memory_bench.measure(case, kinds, official, max(threads), batch))
    return found


def default_threads(device: torch.device) -> list[int] | None:
    """One and two on a CPU that has as many cores; on other devices PyTorch's setting."""
    if device.type != "cpu":
        return None
    return [1, 2] if (os.cpu_count() or 1) > 1 else [1]


def _list_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def parse(given: str) -> list[Any]:
        return [kind(part) for part in given.split(",")]

    parse.__name__ = f"list of {kind.__name__}"  # argparse names it
    return parse


def positive(given: str) -> int:
    if int(given) < 1:
        raise ValueError
    return int(given)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="trm-fast bench", description="what you gain here: training and solving, timed"
    )
    add = made.add_argument
    add("--part", choices=PARTS, action="append", help="default: all, on the CPU; repeatable")
    add(
        "--case",
        choices=CASES,
        action="append",
        help="default: what the device is for (docs/benchmarks.md), repeatable",
    )
    add("--step", choices=STEPS, action="append", help="default: by device; repeatable")
    add("--official", type=Path, metavar="PATH", help="official checkout")
    add("--device", help="auto, cpu, cuda or mps; default: cuda where there is one, else cpu")
    add("--dtype", type=_list_of(str), help="in place of the cases' own, such as float32,bfloat16")
    add("--batch", type=_list_of(int), help="batch sizes in place of the cases' own")
    add("--policy", type=_list_of(str), help=f"of our train step: {','.join(POLICIES)}")
    add(
        "--quantize",
        type=_list_of(str),
        help="also time our steps with arch.quantize of int8 (inference) or fp8, beside those "
        "without",
    )
    add("--threads", type=_list_of(positive), help="CPU threads, each in turn; default: 1,2")
    add("--rounds", type=positive, help="timed turns per contender")
    add(
        "--seconds",
        type=float,
        default=SECONDS,
        help="most for the turns of one race (%(default)g)",
    )
    add(
        "--compile",
        choices=COMPILE,
        default="auto",
        help="torch.compile as a contender; auto: where it does not take tens of minutes",
    )
    add("--quick", action="store_true", help="tiny sizes: does it run at all")
    add("--json", metavar="FILE", help="write the results there; - for stdout")
    return made


def measure(given: argparse.Namespace) -> dict:
    """All parts that were asked for.

    Raises:
        ParityError: a contender computes something else; ValueError: a wrong argument.
    """
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    device, begin = pick_device(given.device or usual), time.perf_counter()
    policies = given.policy or []
    if wrong := [p for p in policies if p not in POLICIES]:
        raise ValueError(f"unknown policy {wrong[0]!r}; allowed: {', '.join(POLICIES)}")
    quantized = given.quantize or []
    if wrong := [q for q in quantized if q not in QUANTIZED[1:]]:
        raise ValueError(f"cannot quantize to {wrong[0]!r}; allowed: {', '.join(QUANTIZED[1:])}")
    cases = [CASES[name] for name in given.case or ()] or default_cases(device.type)
    cases = [quick(case) for case in cases] if given.quick else cases
    if given.rounds is not None:
        cases = [replace(c, rounds=given.rounds) for c in cases]
    chosen = plan(cases, given.dtype or (), given.batch or (), given.step or (), device.type)
    for case, _ in chosen:
        _ = case.model
    threads = given.threads or default_threads(device)
    parts = given.part or (PARTS if device.type == "cpu" else PARTS[:1])
    size = 64 if given.quick else None
    progress: Progress = partial(say, err=True)
    found = run_cases(
        chosen if "steps" in parts else [],
        threads,
        given.official,
        device,
        given.compile,
        size,
        policies,
        quantized,
        given.seconds,
        progress,
        partial(_write, given.json),
    )
    if "memory" in parts:
        found["memory"] = measure_memory(
            chosen, policies, given.official, threads or [1], given.quick, progress
        )
    if "micro" in parts:
        of_cases = {*(c.model.forward_dtype for c, _ in chosen), *quantized}
        dtypes = [d for d in micro_bench.DTYPES if d in of_cases]
        small = (micro_bench.QUICK, dtypes, 1, 1e-5)
        full = (micro_bench.CASES, dtypes)
        found["micro"] = [micro_bench.measure(*(small if given.quick else full))]
    return found | {"total_seconds": time.perf_counter() - begin}


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0; 1 where parity fails; 2 for a wrong argument."""
    given = parser().parse_args(argv)
    show_builds()
    try:
        found = measure(given)
    except ParityError as error:
        say(f"trm-fast bench: {error}", err=True)
        return 1
    except ValueError as error:
        say(f"trm-fast bench: {error}", err=True)
        return 2
    if given.json == "-":
        say(json.dumps(found, indent=1))
        return 0
    _write(given.json, found)
    say(text(found))
    return 0


def _write(file: str | None, found: dict) -> None:
    if file and file != "-":
        Path(file).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
