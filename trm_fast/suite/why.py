"""Why it is as fast as it is: hardware counters of the main kernels; and memory checks.

Owns these items of stage C, which start `bench/gpu_suite.py --one OP/CASE/DIRECTION` under another
program, and that one run. Imported by `stages.py` and `bench/gpu_suite.py`.
"""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trm_fast.contenders import ParityError
from trm_fast.op_bench import RUN, make_inputs
from trm_fast.op_cases import case
from trm_fast.suite.compiled import function_of
from trm_fast.suite.records import measurement
from trm_fast.suite.session import Rows, Session, Skip
from trm_fast.suite.tuning import triton_function

# What is kept of Nsight Compute's raw page, by the end of the metric's name -> short name.
COUNTERS = {
    "gpu__time_duration.sum": "ns",
    "launch__registers_per_thread": "registers",
    "launch__occupancy_limit_shared_mem": "blocks by shared memory",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM %",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor pipe %",
    "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active": "tensor cycles %",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active": "special functions %",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "DRAM %",
    "dram__bytes.sum": "DRAM bytes",
    "lts__t_sectors.avg.pct_of_peak_sustained_elapsed": "L2 %",
    "lts__t_sector_hit_rate.pct": "L2 hits %",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed": "shared %",
}
STALLS = re.compile(r"smsp__average_warps?_issue_stalled_(\w+?)_per_issue_active\.ratio")
OURS = "regex:^_"  # names of Triton kernels; PyTorch's own start otherwise
LAUNCHES = 8


def run_one(what: str, device: torch.device, batch: int | None, tiny: bool) -> None:
    """One call of "OP/CASE/DIRECTION" on the Triton kernels, or of "OP/CASE/DIRECTION/BACKEND":
    what a profiler looks at."""
    op, name, direction, *backend = what.split("/")
    dtype = "float32" if tiny else "bfloat16"
    chosen = case(op, name, "tiny" if tiny else "real", batch, dtype)
    session = Session("C", "one", Path(), 0.0, device, tiny)
    function = (
        function_of(session, chosen, *backend) if backend else triton_function(session, chosen)
    )
    RUN[direction](function, make_inputs(chosen, 0, device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _tool(session: Session, name: str) -> str:
    session.need_cuda()
    found = shutil.which(name)
    if found is None:
        raise Skip(f"{name} is not on PATH")
    return found


def _run(
    session: Session, before: Sequence[str], what: str, *options: str, **variables: str
) -> tuple[int, str]:
    """Exit status and output of one call of the kernels under another program."""
    root = Path(__file__).resolve().parent.parent.parent
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [*before, sys.executable, str(session.program), "--one", what, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **variables},
    )
    return done.returncode, done.stdout


def _last_lines(said: str) -> str:
    return " | ".join(said.strip().splitlines()[-3:])


def counters(session: Session, what: str) -> Rows:
    """Nsight Compute's counters of every kernel of ours in one call."""
    ncu = _tool(session, "ncu")
    with tempfile.TemporaryDirectory() as folder:
        report = str(Path(folder) / "report")
        options = ["--clock-control", "none", "--set", "full", "--export", report]
        options += ["--target-processes", "all"]
        options += ["--kernel-name", OURS, "--launch-count", str(LAUNCHES)]
        status, said = _run(session, [ncu, *options], what)
        if status:
            raise RuntimeError(f"ncu ended with {status}: {_last_lines(said)}")
        shown = subprocess.run(
            [ncu, "--import", f"{report}.ncu-rep", "--page", "raw", "--csv"],
            capture_output=True,
            text=True,
            check=True,
        )
    for kernel, found in raw_page(shown.stdout):
        stalls = sorted(found.pop("stalls").items(), key=lambda pair: -pair[1])[:3]
        told = [f"{name} {value:.3g}" for name, value in found.items() if name != "ns"]
        told += [f"stalled by {name} {value:.2f}" for name, value in stalls]
        yield measurement(
            f"counters/{what}/{kernel}", found.get("ns", 0.0) / 1e6, "ms", note=", ".join(told),
            counters=found, stalls=dict(stalls),
        )  # fmt: skip


def raw_page(text: str) -> list[tuple[str, dict[str, Any]]]:
    """(kernel, counters by short name) for every line of Nsight Compute's raw page as CSV."""
    begin = text.find('"ID"')
    if begin < 0:
        raise RuntimeError("ncu printed no table")
    rows = list(csv.DictReader(io.StringIO(text[begin:])))
    units = rows[0] if rows and not rows[0]["ID"] else {}  # the line below the head
    found = []
    for row in rows[bool(units) :]:
        values: dict[str, Any] = {"stalls": {}}
        for metric, value in row.items():
            try:
                number = float((value or "").replace(",", ""))
            except ValueError:
                continue
            if (stall := STALLS.search(metric)) is not None:
                values["stalls"][stall[1]] = number
            for end, short in COUNTERS.items():
                if metric.endswith(end):
                    values[short] = number * _in_base_unit(short, units.get(metric, ""))
        found.append((row["Kernel Name"], values))
    return found


def _in_base_unit(short: str, unit: str) -> float:
    """What a value has to be multiplied by to be in nanoseconds or bytes."""
    if short == "ns":
        return {"us": 1e3, "usecond": 1e3, "ms": 1e6, "msecond": 1e6, "s": 1e9}.get(unit, 1.0)
    if short == "DRAM bytes":
        return {"Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}.get(unit, 1.0)
    return 1.0


def memory_check(session: Session, what: str) -> Rows:
    """compute-sanitizer's memcheck over one call with two boards.

    Raises:
        ParityError: it found an error.
    """
    sanitizer = _tool(session, "compute-sanitizer")
    # Every tensor in memory of its own: PyTorch's pool would hide what goes beyond one.
    own_memory = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sanitizer, "--tool", "memcheck"]
    status, said = _run(session, command, what, "--batch", "2", **own_memory)
    found = re.search(r"ERROR SUMMARY: (\d+) error", said)
    if found is None:
        raise RuntimeError(f"compute-sanitizer ended with {status}: {_last_lines(said)}")
    yield measurement(f"memory check/{what}", float(found[1]), "errors")
    if int(found[1]):
        first = next((x for x in said.splitlines() if "Invalid" in x), "")
        raise ParityError(f"{what}: {found[1]} memory errors. {first.strip('= ')}")
