"""Runs under torchrun lose a process, or a machine: what is left starts again, and the run ends."""

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


def _port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def _torchrun(job: Job, *words: str) -> Child:
    words = words or ("--nproc-per-node", "2", "--master-port", _port())
    command = [sys.executable, "-m", "torch.distributed.run", "--max-restarts", str(RESTARTS)]
    return Child(job.folder, [*command, *words, "-m", "trm_fast.train", *job.words])


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


def loss_of_a_machine(bench: Bench, row: Row, count: int) -> None:
    """Two agents with a process each stand for two machines; the second is killed whole, and the
    first goes on alone. It ends with other sums, so that its last checkpoint is looked at only."""
    last = f"step_{bench.steps}"
    while row.tried < count:
        job, elsewhere = bench.job(), bench.job()
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{_port()}"]
        words = ["--nnodes", "1:2", "--nproc-per-node", "1", "--rdzv-id", "trial", *meeting]
        staying = _torchrun(job, *words)
        staying.let(2.0)  # the meeting is where the first one is
        leaving = _torchrun(elsewhere, *words)
        until = time.monotonic() + 120
        while job.newest() < 0 and staying.status() is None and time.monotonic() < until:
            time.sleep(0.01)
        kept = job.newest()
        for pid in (*_processes(leaving), leaving.pid):
            os.kill(pid, signal.SIGKILL)
        leaving.wait()
        status = staying.wait()
        wrong = None if status == 0 else f"status {status}: {staying.text('err')[-300:]}"
        whole = (job.run / "last").read_text().strip() == last
        alone = "processes   2" not in staying.text().split("run folder")[-1]
        row.add(
            wrong, job.newest() < kept or not whole, "went on alone" if alone else "ended before"
        )
        shutil.rmtree(job.folder)
        shutil.rmtree(elsewhere.folder)
