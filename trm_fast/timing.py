"""How one call is timed on a device, what a rate is a fraction of, what a number depends on.

Owns the clocks, the two peaks (matrix product, copy) and the facts recorded beside every result.
Imported by the benchmarks (`bench.py`, `op_bench.py`, the modules of `suite`) and whatever else
times a device (`profiling.py`, `rollouts.py`).
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trm_fast import __version__

SCHEMA = 1
MOST_AHEAD = 0.5  # seconds that the device is kept waiting while the host queues work
SPIN_HZ = 2.0e9  # cycles of a waiting kernel per second: about the clock of a Hopper GPU


def synchronize(device: torch.device) -> None:
    """Until the device has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds of one call, wall and CPU: on CUDA by events, elsewhere by the clocks."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        cpu = time.process_time()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3, time.process_time() - cpu
    begin, cpu = time.perf_counter(), time.process_time()
    run()
    synchronize(device)
    return time.perf_counter() - begin, time.process_time() - cpu


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """No garbage collection in the middle of a step."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def one_cpu_per_core(allowed: Iterable[int]) -> list[int]:
    """Of each core the first CPU, the last core first: interrupts mostly go to the first ones."""
    cores: dict[str, int] = {}
    for cpu in sorted(allowed):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            core = siblings.read_text(encoding="utf-8").strip()
        except OSError:
            core = str(cpu)
        cores.setdefault(core, cpu)
    return sorted(cores.values(), reverse=True)


def _tasks() -> list[int]:
    """The threads of this process, as far as the system tells."""
    try:
        return [int(name) for name in os.listdir("/proc/self/task")]
    except OSError:
        return [0]


@contextlib.contextmanager
def on_threads(count: int) -> Iterator[list[int] | None]:
    """PyTorch on `count` threads and the process on as many CPUs, each of a core of its own.

    Gives the CPUs, or None where the system cannot pin or has fewer cores to give. Threads, also
    those made meanwhile, and PyTorch's setting are afterwards as they were.
    """
    threads = torch.get_num_threads()
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    cpus = one_cpu_per_core(allowed)[:count]
    pinned = len(cpus) == count
    torch.set_num_threads(count)
    try:
        if pinned:
            _pin(cpus)
        yield cpus if pinned else None
    finally:
        torch.set_num_threads(threads)
        if pinned:
            _pin(allowed)


def _pin(cpus: Iterable[int]) -> None:
    for task in _tasks():
        with contextlib.suppress(OSError):  # it has ended
            os.sched_setaffinity(task, cpus)


def basis(device: torch.device) -> str:
    """The clock that ratios and rates use: CPU time with one CPU thread, else wall time."""
    return "cpu" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def in_a_row(
    run: Callable[[int], Any], device: torch.device, first: int, count: int
) -> list[float]:
    """Seconds of each of the calls run(first), run(first + 1), ..., by the clock of `basis`.

    On CUDA the device is first given something to wait on, so that all of the work is queued before
    any of it starts: what the host needs to launch small kernels stays out of the times.
    """
    if device.type != "cuda":
        clock = int(basis(device) == "cpu")
        return [timed(partial(run, i), device)[clock] for i in range(first, first + count)]
    begin = time.perf_counter()
    run(first)
    ahead = min(1.5 * count * (time.perf_counter() - begin), MOST_AHEAD)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize(device)
    torch.cuda._sleep(int(ahead * SPIN_HZ))
    marks[0].record()
    for i in range(count):
        run(first + i)
        marks[i + 1].record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) / 1e3 for a, b in zip(marks, marks[1:], strict=False)]


def launch_seconds(run: Callable[[int], Any], device: torch.device, count: int = 5) -> float:
    """What the host alone needs for one call; on the CPU that is the call. Median of `count`."""
    found = []
    for i in range(count):
        synchronize(device)
        begin = time.perf_counter()
        run(i)
        found.append(time.perf_counter() - begin)
    synchronize(device)
    return statistics.median(found)


def best(run: Callable[[], Any], device: torch.device, runs: int = 8) -> float:
    """Least seconds of `runs` calls after an untimed one, by the clock of `basis`."""
    timed(run, device)
    return min(timed(run, device)[basis(device) == "cpu"] for _ in range(runs))


def matmul_peak(dtype: torch.dtype, device: torch.device, size: int, runs: int = 8) -> float:
    """Best rate of `torch.mm` on square matrices of random numbers, GFLOP/s."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / best(lambda: torch.mm(a, b), device, runs) / 1e9


def copy_peak(device: torch.device, size: int, runs: int = 8) -> float:
    """Best rate of a copy of `size` bytes within the device, GB/s, read and written bytes."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / best(lambda: target.copy_(source), device, runs) / 1e9


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and minimum in milliseconds."""
    return {"median": 1e3 * statistics.median(seconds), "min": 1e3 * min(seconds)}


def environment(device: torch.device) -> dict[str, Any]:
    """What a number depends on."""
    try:
        triton: str | None = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {
        "schema": SCHEMA,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "version": __version__,
        "commit": commit(Path(__file__).resolve().parent.parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "device": device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "clock": basis(device),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU"
    model = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


def commit(root: Path) -> str | None:
    """The commit of a git checkout at `root`, with "+changes" if files differ; None elsewhere."""
    if not (root / ".git").exists():
        return None
    try:
        asked = [["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]]
        said = [
            subprocess.run(
                ["git", *args], cwd=root, capture_output=True, text=True, check=True
            ).stdout.strip()
            for args in asked
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return said[0] + ("+changes" if said[1] else "")
