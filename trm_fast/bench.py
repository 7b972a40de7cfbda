"""`trm-fast bench`: the train step and the inference step, timed against the baselines.

Owns the protocol for whole steps and their results; the clocks are those of `timing.py`. Imported
by `__main__.py`, bench/ and its tests. Protocol: every contender gets the same weights, batch and
carry and must agree with the reference before anything is timed; then all take turns, one step
each, in one process; the first turns are dropped; medians and minima are kept. A train step is
forward, loss and backward without the optimizer; an inference step is one supervision step under
`torch.inference_mode`. A ratio holds only between rows of one run.

Dims legend: B batch, S tokens incl. prefix, D width, F and F_t widths of the two SwiGLUs.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # OpenMP reads it when torch is loaded

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from trm_fast.config import ModelConfig
from trm_fast.console import say
from trm_fast.contenders import (
    CASES,
    COMPILE,
    STEPS,
    Case,
    Entry,
    Official,
    ParityError,
    check_parity,
    contenders,
    effective_config,
    official_code,
    prepare,
    quick,
)
from trm_fast.timing import basis, collector_off, environment, matmul_peak, summary, timed

__all__ = ["main", "run_cases"]


def kept_for_backward(entry: Entry) -> int:
    """Bytes that autograd keeps between forward and backward, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in entry.head.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        entry.run()
    return sum(kept.values())


def lap(entry: Entry, device: torch.device, keep: bool = True) -> None:
    """One step, timed."""
    wall, cpu = timed(entry.run, device)
    if keep:
        entry.wall.append(wall)
        entry.cpu.append(cpu)


def useful_flops(config: ModelConfig, step: str) -> float:
    """Multiplications and additions of the matrix products of one step, nothing recomputed."""
    s, d = config.total_len, config.hidden_size
    channel = 3 * s * d * config.channel_width
    mixer = 3 * s * d * config.token_width if config.mlp_t else 4 * s * d * d + 2 * s * s * d
    block_pass = 2 * config.batch_size * config.L_layers * (channel + mixer)
    head = 2 * config.batch_size * s * d * config.vocab_size
    with_gradient = config.L_cycles + 1
    passes = config.H_cycles * with_gradient
    if step == "train":
        return float((passes + 2 * with_gradient) * block_pass + 3 * head)
    return float(passes * block_pass + head)


def row(entry: Entry, step: str, device: torch.device, peaks: Mapping[str, float]) -> dict:
    """One line of the results."""
    flops = useful_flops(entry.config, step)
    rate = flops / min(getattr(entry, basis(device))) / 1e9
    return {
        "contender": entry.contender.name,
        "available": True,
        "note": "",
        "runs": len(entry.wall),
        "wall_ms": summary(entry.wall),
        "cpu_ms": summary(entry.cpu),
        "inner_widths": {
            "channel": entry.config.channel_width,
            "token": entry.config.token_width if entry.config.mlp_t else None,
        },
        "useful_gflop": flops / 1e9,
        "gflop_per_s": rate,
        "fraction_of_peak": rate / peaks[entry.config.forward_dtype],
        "saved_mib": None if entry.saved_bytes is None else entry.saved_bytes / 2**20,
        "errors": entry.errors,
    }


def ratios(rows: Sequence[dict], clock: str) -> dict[str, dict[str, float]]:
    """How many times longer than the reference each other contender took, by clock.

    `speedup` is the one to quote: minima by the clock named `clock`.
    """
    timed = {r["contender"]: r for r in rows if r["available"]}
    base = timed.pop("reference", None)
    if base is None:
        return {}
    return {
        name: {
            "speedup": r[f"{clock}_ms"]["min"] / base[f"{clock}_ms"]["min"],
            "wall_median": r["wall_ms"]["median"] / base["wall_ms"]["median"],
            "cpu_median": r["cpu_ms"]["median"] / base["cpu_ms"]["median"],
        }
        for name, r in timed.items()
    }


@dataclass
class Race:
    """The contenders of one case and step, checked and warm; `absent` says why others are not."""

    case: Case
    step: str
    device: torch.device
    entries: list[Entry]
    absent: dict[str, str]

    def run(self, rounds: int) -> None:
        """`rounds` timed turns of every contender; each turn starts with another one."""
        with collector_off():
            for turn in range(rounds):
                for i in range(len(self.entries)):
                    lap(self.entries[(turn + i) % len(self.entries)], self.device)

    def result(self, peaks: Mapping[str, float]) -> dict:
        """The JSON object of this race."""
        rows = [row(e, self.step, self.device, peaks) for e in self.entries]
        rows += [
            {"contender": name, "available": False, "note": why}
            for name, why in self.absent.items()
        ]
        return {
            "case": self.case.name,
            "about": self.case.about,
            "step": self.step,
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
) -> Race:
    """Build, check and warm all contenders of a case.

    Raises:
        ParityError: one of them computes something else.
    """
    entries: list[Entry] = []
    absent: dict[str, str] = {}
    for contender in contenders(case, device, compiling):
        if contender.official and official is None:
            absent[contender.name] = "no official code given: --official PATH"
            continue
        config = effective_config(case, contender)
        try:
            entry = prepare(contender, config, step, official, device)
            if contender.name != "reference":
                check_parity(entry, step, official, device)
            for _ in range(2):
                lap(entry, device, keep=False)
        except ValueError:  # ParityError is one
            raise
        except Exception as error:  # no compiler, an unsupported graph, no memory
            lines = str(error).strip().splitlines() or [repr(error)]
            absent[contender.name] = f"failed: {lines[0]}"
            continue
        if step == "train" and not contender.compiled:
            entry.saved_bytes = kept_for_backward(entry)
        entries.append(entry)
    return Race(case, step, device, entries, absent)


def run_cases(
    cases: Sequence[Case],
    steps: Sequence[str] = STEPS,
    official_path: Path | None = None,
    device: torch.device | None = None,
    compiling: str = "auto",
    peak_size: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict:
    """Everything in one process; returns the JSON object of docs/benchmarks.md.

    `progress` is told what comes next: compiling a deep recursion takes minutes.

    Raises:
        ParityError: a contender computes something else; ValueError: no official code there.
    """
    device = torch.device("cpu") if device is None else device
    peaks = [measure_peaks(cases, device, peak_size)]
    races = []
    with official_code(official_path) as official:
        for case in cases:
            for step in steps:
                progress(f"{case.name}, {step} step: building, parity, warm-up")
                race = set_up(case, step, official, device, compiling)
                progress(f"{case.name}, {step} step: {case.rounds} turns of {len(race.entries)}")
                race.run(case.rounds)
                races.append(race)
    peaks.append(measure_peaks(cases, device, peak_size))
    peak = {name: max(found[name] for found in peaks) for name in peaks[0]}
    return report(device, peak, races)


def report(device: torch.device, peaks: dict[str, float], races: Sequence[Race]) -> dict:
    """The JSON object: what the numbers depend on, the peaks, and one result per race."""
    results = [race.result(peaks) for race in races]
    return environment(device) | {"peak_gflop_per_s": peaks, "results": results}


def measure_peaks(
    cases: Sequence[Case], device: torch.device, size: int | None = None
) -> dict[str, float]:
    """dtype name -> best `torch.mm` rate in GFLOP/s, for the dtypes of the cases."""
    size = size or (8192 if device.type == "cuda" else 1024)
    names = sorted({case.model.forward_dtype for case in cases})
    return {name: matmul_peak(getattr(torch, name), device, size) for name in names}


def table(result: dict) -> str:
    """One race as text."""
    config = result["config"]
    lines = [
        f"{result['case']}, {result['step']} step: {result['about']}, "
        f"{config['forward_dtype']}, B={config['batch_size']}",
        f"  {'':<22}{'wall ms':>18}{'CPU ms':>18}{'GFLOP':>8}{'GFLOP/s':>9}{'peak':>6}"
        f"{'kept MiB':>10}{'speed-up':>10}",
        f"  {'':<22}{'median':>9}{'min':>9}{'median':>9}{'min':>9}",
    ]
    for r in result["rows"]:
        if not r["available"]:
            lines.append(f"  {r['contender']:<22}{r['note']}")
            continue
        times = "".join(
            f"{r[clock][which]:>9.1f}"
            for clock in ("wall_ms", "cpu_ms")
            for which in ("median", "min")
        )
        kept = "" if r["saved_mib"] is None else f"{r['saved_mib']:.1f}"
        ratio = result["ratios"].get(r["contender"])
        lines.append(
            f"  {r['contender']:<22}{times}{r['useful_gflop']:>8.1f}{r['gflop_per_s']:>9.1f}"
            f"{r['fraction_of_peak']:>6.0%}{kept:>10}"
            + (f"{ratio['speedup']:>9.2f}x" if ratio else f"{'':>10}")
        )
    return "\n".join(lines)


def text(found: dict) -> str:
    """A report for a terminal."""
    peaks = ", ".join(f"{n} {v:.0f}" for n, v in found["peak_gflop_per_s"].items())
    head = (
        f"trm_fast {found['version']} ({found['commit'] or 'no commit'}), torch "
        f"{found['torch']}, {found['device']}, {found['threads']} of {found['cores']} threads, "
        f"wait policy {found['wait_policy']}\n"
        f"torch.mm peak in GFLOP/s: {peaks}; speed-up: of the reference over the row, minima, "
        f"{found['clock']} time; no optimizer in the train step"
    )
    return "\n\n".join([head, *(table(r) for r in found["results"])])


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0; 1 where parity fails; 2 for a wrong argument."""
    parser = argparse.ArgumentParser(
        prog="trm-fast bench", description="time the train step and the inference step"
    )
    parser.add_argument("--case", choices=CASES, action="append", help="default: all, repeatable")
    parser.add_argument("--step", choices=STEPS, action="append", help="default: both")
    parser.add_argument("--official", type=Path, metavar="PATH", help="official checkout")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    parser.add_argument("--dtype", help="forward_dtype in place of the case's")
    parser.add_argument("--batch", type=int, help="batch size in place of the case's")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--rounds", type=int, help="timed turns per contender")
    parser.add_argument(
        "--compile",
        choices=COMPILE,
        default="auto",
        help="torch.compile as a contender; auto: where it does not take tens of minutes",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all")
    parser.add_argument("--json", metavar="FILE", help="write the results there; - for stdout")
    given = parser.parse_args(argv)
    changes = {"forward_dtype": given.dtype, "batch_size": given.batch}
    changes = {key: value for key, value in changes.items() if value is not None}
    cases = [CASES[name] for name in given.case or CASES]
    cases = [quick(case) for case in cases] if given.quick else cases
    cases = [replace(c, config={**c.config, **changes}) for c in cases]
    if given.rounds is not None:
        cases = [replace(c, rounds=max(1, given.rounds)) for c in cases]
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    try:
        for case in cases:
            _ = case.model
        found = run_cases(
            cases,
            given.step or STEPS,
            given.official,
            torch.device(given.device),
            given.compile,
            64 if given.quick else None,
            (lambda line: None) if given.quick else (lambda line: say(line, err=True)),
        )
    except ParityError as error:
        say(f"trm-fast bench: {error}", err=True)
        return 1
    except ValueError as error:
        say(f"trm-fast bench: {error}", err=True)
        return 2
    if given.json:
        dumped = json.dumps(found, indent=1) + "\n"
        if given.json == "-":
            say(dumped, end="")
            return 0
        Path(given.json).write_text(dumped, encoding="utf-8")
    say(text(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
