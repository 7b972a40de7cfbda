"""One of two processes of a run under torchrun is killed: all start again, and the run ends."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

from trials.job import Bench, Child, Job, Row

RESTARTS = 3


def _torchrun(job: Job) -> Child:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = ["--nproc-per-node", "2", "--max-restarts", str(RESTARTS), "--master-port", port]
    command = [sys.executable, "-m", "torch.distributed.run", *words, "-m", "trm_fast.train"]
    return Child(job.folder, [*command, *job.words])


def _processes(child: Child) -> list[int]:
    try:
        text = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text()
    except OSError:
        return []
    return [int(pid) for pid in text.split()]


def loss(bench: Bench, row: Row, count: int) -> None:
    """The processes are two for the run left in peace, too: sums in another order end otherwise."""
    peace = bench.job()
    began = time.monotonic()
    child = _torchrun(peace)
    if child.wait() != 0:
        raise RuntimeError(f"torchrun left in peace failed: {child.text('err')[-500:]}")
    life, expected = time.monotonic() - began, peace.outcome()
    while row.tried < count:
        job = bench.job()
        child = _torchrun(job)
        child.let(bench.moment(life))
        there = _processes(child)
        if len(there) != 2:
            child.wait()
            shutil.rmtree(job.folder)
            continue
        kept = job.pointer()
        os.kill(bench.chance.choice(there), signal.SIGKILL)
        status = child.wait()
        wrong = None if status == 0 else f"status {status}: {child.text('err')[-300:]}"
        lost = job.newest() < kept or (status == 0 and job.outcome() != expected)
        restarted = child.text().count("run folder")
        row.add(wrong, lost, "began again" if restarted > 1 else "before its first line")
        shutil.rmtree(job.folder)
