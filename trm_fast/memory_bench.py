"""What a train step needs in memory: bytes kept for the backward, and the process at its peak.

Every contender and policy runs in a process of its own, which has done nothing before. Imported by
`bench.py` and bench/; the child runs this module.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from trm_fast.console import say
from trm_fast.contenders import (
    Contender,
    contenders,
    kept_for_backward,
    prepare,
)
from trm_fast.official import official_code
from trm_fast.workloads import Case

MIB = 2**20
BATCH = 32  # of the step whose peak is taken
STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def status_bytes(name: str, text: str) -> int:
    """A line of /proc/self/status, `VmRSS:   1234 kB`."""
    line = next(line for line in text.splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def resident() -> int | None:
    """Bytes of this process in memory; None where the system does not tell."""
    try:
        return status_bytes("VmRSS", STATUS.read_text(encoding="utf-8"))
    except (OSError, StopIteration):
        return None


def reset_peak() -> bool:
    """Let the largest size be counted from now on; False where the system cannot."""
    try:
        CLEAR.write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def peak() -> tuple[int, str]:
    """The largest size of this process, and where that comes from.

    Linux' own high-water mark where it is told: `ru_maxrss` starts with the size of the process
    that this one was forked from.
    """
    try:
        return status_bytes("VmHWM", STATUS.read_text(encoding="utf-8")), "VmHWM"
    except (OSError, StopIteration):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "ru_maxrss"


def step_memory(
    contender: Contender, case: Case, batch: int, official_path: Path | None
) -> dict[str, Any]:
    """Kept bytes at the case's batch size; the process before and in one step of `batch` boards.

    One step of a single board comes first: libraries load at their first use.
    """
    device, dtype = torch.device("cpu"), str(case.config["forward_dtype"])
    with official_code(official_path) as official:
        prepare(contender, case.of(dtype, 1).model, "train", official, device).run()
        entry = prepare(contender, case.of(dtype, batch).model, "train", official, device)
        gc.collect()
        reset = reset_peak()
        before = resident()
        entry.run()
        largest, source = peak()
        del entry
        gc.collect()
        kept = kept_for_backward(prepare(contender, case.model, "train", official, device))
    return {
        "saved_mib": kept / MIB,
        "before_mib": None if before is None else before / MIB,
        "peak_mib": largest / MIB,
        "grown_mib": None if before is None or not reset else (largest - before) / MIB,
        "source": source,
    }


def in_a_child(
    contender: Contender, case: Case, batch: int, threads: int, official_path: Path | None
) -> dict[str, Any]:
    """One row, measured by a fresh process; says why where there is none."""
    request = {
        "contender": asdict(contender),
        "case": asdict(case),
        "batch": batch,
        "threads": threads,
        "official": None if official_path is None else str(official_path),
    }
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "trm_fast.memory_bench", json.dumps(request)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    named = {"contender": contender.name, "policy": contender.policy}
    if done.returncode:
        said = done.stderr.strip().splitlines()
        why = said[-1] if said else f"exit status {done.returncode}"
        return named | {"available": False, "note": f"failed: {why}"}
    return named | {"available": True, "note": ""} | json.loads(done.stdout.splitlines()[-1])


def measure(
    case: Case,
    policies: Sequence[str],
    official_path: Path | None,
    threads: int = 1,
    batch: int = BATCH,
) -> dict[str, Any]:
    """The JSON object of docs/benchmarks.md, "memory", of one case."""
    rows = []
    for contender in contenders(case, torch.device("cpu"), "never", policies):
        if contender.products or contender.own_width:
            continue
        if contender.official and official_path is None:
            why = "no official code given: --official PATH"
            rows.append({"contender": contender.name, "available": False, "note": why})
            continue
        rows.append(in_a_child(contender, case, batch, threads, official_path))
    return {
        "case": case.name,
        "dtype": case.config["forward_dtype"],
        "batch": batch,
        "saved_batch": case.config["batch_size"],
        "threads": threads,
        "rows": rows,
        "of_official": of_official(rows),
    }


def of_official(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """contender -> figure -> its part of the official code's."""
    found = {r["contender"]: r for r in rows if r["available"]}
    base = found.get("official")
    if base is None:
        return {}
    return {
        name: {
            key: r[key] / base[key]
            for key in ("saved_mib", "peak_mib", "grown_mib")
            if r[key] is not None and base[key]
        }
        for name, r in found.items()
    }


def text(found: dict[str, Any]) -> str:
    """One case as a table."""
    batch, saved = found["batch"], found["saved_batch"]
    lines = [
        f"memory of a train step, {found['case']}, {found['dtype']}, {found['threads']} "
        f"thread{'s' * (found['threads'] > 1)}, a process each; MiB, and % of the official code's",
        f"  {'':<24}{f'kept, B={saved}':>18}{f'before, B={batch}':>14}"
        f"{f'peak, B={batch}':>18}{f'growth, B={batch}':>18}",
    ]
    for r in found["rows"]:
        if not r["available"]:
            lines.append(f"  {r['contender']:<24}{r['note']}"[:120])
            continue
        parts = found["of_official"].get(r["contender"], {})
        kept, peaked, grown = (
            _with_part(r[key], parts.get(key)) for key in ("saved_mib", "peak_mib", "grown_mib")
        )
        before = "" if r["before_mib"] is None else f"{r['before_mib']:.0f}"
        lines.append(f"  {r['contender']:<24}{kept:>18}{before:>14}{peaked:>18}{grown:>18}")
    return "\n".join(lines)


def _with_part(value: float | None, part: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" + ("" if part is None else f" {part:>5.0%}")


def main(request: str) -> None:
    """The child: one line of JSON."""
    given = json.loads(request)
    torch.set_num_threads(given["threads"])
    path = None if given["official"] is None else Path(given["official"])
    found = step_memory(
        Contender(**given["contender"]), Case(**given["case"]), given["batch"], path
    )
    say(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
