"""`trm-fast bench`: the train step and the inference step, timed against the baselines.

Owns the races of a run and the command; one race is that of `race.py`, the clocks are those of
`timing.py`, the tables those of `bench_report.py`. Imported by `__main__.py`, bench/ and its tests.
Protocol: every contender gets the same weights, batch and carry and must agree with the reference
before it is timed; then, for each number of threads, all take turns, one step each, in one process;
the first turn is dropped; medians and minima are kept. A train step is forward, loss and backward
without the optimizer; an inference step is one supervision step under `torch.inference_mode`; a
solve is all halt_max_steps of them. A ratio holds only between rows of one race.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # OpenMP reads it when torch is loaded

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trm_fast import memory_bench, micro_bench
from trm_fast.bench_report import add_fractions, gains, head, table
from trm_fast.config import QUANTIZED, ModelConfig
from trm_fast.console import Parser, positive, say, show_builds
from trm_fast.contenders import COMPILE
from trm_fast.extension import library
from trm_fast.flops import STEPS
from trm_fast.loading import pick_device
from trm_fast.official import official_code
from trm_fast.ops import POLICIES
from trm_fast.options import to_float
from trm_fast.profiling import wake_profiler
from trm_fast.race import WRONG, release, set_up
from trm_fast.timing import environment, matmul_peak, on_threads
from trm_fast.workloads import CASES, Case, default_cases, plan, quick

__all__ = ["main", "run_cases"]

SCHEMA = 3
PARTS = ("steps", "memory", "micro")
DTYPES = ModelConfig.__dataclass_fields__["forward_dtype"].metadata["choices"]
SECONDS = 120.0  # for the turns of one race; a step of the official code takes 5 s in float32

Progress = Callable[[str], None]


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
        ValueError: no official code there, or a configuration that cannot be.
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
            del race  # the next one needs its memory
            release(device)
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
    """Of the official mlp_t case in each dtype that its train step is run in, on the CPU."""
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
    return lambda given: [kind(part) for part in given.split(",")]


def _one_of(names: Sequence[str]) -> Callable[[str], str]:
    def parse(given: str) -> str:
        if given not in names:
            raise argparse.ArgumentTypeError(f"{given!r} is not one of {', '.join(names)}")
        return given

    return parse


def seconds(given: str) -> float:
    number = to_float(given)
    if number is None or number < 0:
        raise argparse.ArgumentTypeError(f"{given!r} is not a number >= 0")
    return number


def parser() -> Parser:
    made = Parser("trm-fast bench", "what you gain here: training and solving, timed")
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
    add(
        "--device",
        help="auto, cpu, cuda, cuda:N or mps; default: cuda where there is one, else cpu",
    )
    add(
        "--dtype",
        type=_list_of(_one_of(DTYPES)),
        help="in place of the cases' own, such as float32,bfloat16",
    )
    add("--batch", type=_list_of(positive), help="batch sizes in place of the cases' own")
    add(
        "--policy",
        type=_list_of(_one_of(POLICIES)),
        help=f"of our train step: {','.join(POLICIES)}",
    )
    add(
        "--quantize",
        type=_list_of(_one_of(QUANTIZED[1:])),
        help="also time our steps with arch.quantize of int8 (inference) or fp8, beside those "
        "without",
    )
    add("--threads", type=_list_of(positive), help="CPU threads, each in turn; default: 1,2")
    add("--rounds", type=positive, help="timed turns per contender")
    add(
        "--seconds",
        type=seconds,
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


def measure(given: argparse.Namespace, kept: dict[str, Any]) -> dict:
    """All parts that were asked for.

    kept: is cleared and given the object as it is after each race.

    Raises:
        ValueError: a wrong argument.
    """
    if given.json and given.json != "-" and not Path(given.json).resolve().parent.is_dir():
        raise ValueError(f"--json {given.json}: there is no folder {Path(given.json).parent}")
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    device, begin = pick_device(given.device or usual), time.perf_counter()
    policies, quantized = given.policy or [], given.quantize or []
    cases = [CASES[name] for name in given.case or ()] or default_cases(device.type)
    cases = [quick(case) for case in cases] if given.quick else cases
    if given.rounds is not None:
        cases = [replace(c, rounds=given.rounds) for c in cases]
    sizes = given.dtype or (), given.batch or (), given.step or ()
    chosen = plan(cases, *sizes, device.type)
    for case, _ in chosen:
        _ = case.model
    threads = given.threads or default_threads(device)
    parts = given.part or (PARTS if device.type == "cpu" else PARTS[:1])
    size = 64 if given.quick else None
    progress: Progress = partial(say, err=True)
    wake_profiler(device)

    def keep(found: dict) -> None:
        kept.clear()
        kept.update(found)
        _write(given.json, found)

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
        keep,
    )
    if "memory" in parts:
        found["memory"] = measure_memory(
            plan(cases, *sizes), policies, given.official, threads or [1], given.quick, progress
        )
    if "micro" in parts:
        of_cases = {*(c.model.forward_dtype for c, _ in chosen), *quantized}
        dtypes = [d for d in micro_bench.DTYPES if d in of_cases]
        small = (micro_bench.QUICK, dtypes, 1, 1e-5)
        full = (micro_bench.CASES, dtypes)
        found["micro"] = [micro_bench.measure(*(small if given.quick else full))]
    return found | {"total_seconds": time.perf_counter() - begin}


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0; 1 where a contender computes something else; 2 for a wrong argument;
    130 after Ctrl-C, with the report of the races that were run."""
    given = parser().parse_args(argv)
    show_builds()
    found: dict[str, Any] = {}
    status = 0
    try:
        found = measure(given, found)
    except ValueError as error:
        say(f"trm-fast bench: {error}", err=True)
        return 2
    except KeyboardInterrupt:
        say("trm-fast bench: interrupted", err=True)
        status = 130
    if not found:
        return status
    if given.json == "-":
        say(json.dumps(found, indent=1))
    else:
        _write(given.json, found)
        say(text(found))
    wrong = _wrong(found)
    for line in wrong:
        say(f"trm-fast bench: {line}", err=True)
    return status or int(bool(wrong))


def _wrong(found: dict[str, Any]) -> list[str]:
    """What contenders that compute something else do so in."""
    rows = [row for result in found["results"] for row in result["rows"]]
    notes = [row["note"] for row in rows if not row["available"]]
    return list(dict.fromkeys(note for note in notes if note.startswith(WRONG)))


def _write(file: str | None, found: dict) -> None:
    if file and file != "-":
        Path(file).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
