"""Disks that are full, fail, or cannot be written to any more."""

from __future__ import annotations

import os
import shutil
import subprocess

from trials.hooks import failing_operations
from trials.job import Bench, Row, fill, mount
from trm_fast import checkpoint


def full_disks(bench: Bench, row: Row, count: int) -> None:
    """The disk is filled at any moment but for some bytes; room is made again afterwards."""
    while row.tried < count:
        with bench.small_disk("4m") as disk:
            job = bench.job(under=disk)
            child = job.start(output=bench.new_folder())
            child.let(bench.moment())
            kept, leave = job.pointer(), bench.chance.randrange(0, 60_000)
            ballast = fill(disk, leave)
            wrong = job.complaint(child, [0, 1, 2])
            status = child.wait()
            ballast.unlink()
            odd, lost = bench.goes_on(job, kept=kept)
            seen = {0: "there was room enough", 1: "stopped", 2: "did not start"}
            row.add(wrong or odd, lost, seen.get(status, ""))


def full_disks_by_page(bench: Bench, row: Row, count: int) -> None:
    """One checkpoint is saved again and again where one page more is free each time."""
    with bench.small_disk("1m") as disk:
        job = bench.job()
        job.start().wait()
        saved = checkpoint.load_checkpoint(checkpoint.resolve(job.run))
        values = {n: getattr(saved, n) for n in ("model", "ema", "config", "train_state")}
        checkpoint.save_checkpoint(disk, 1, **values)
        page = os.statvfs(disk).f_frsize
        for pages in range(count):
            ballast = fill(disk, pages * page)
            said = None
            try:
                checkpoint.save_checkpoint(disk, 2, **values)
            except checkpoint.CheckpointError as error:
                said = str(error)
            ballast.unlink()
            found = checkpoint.load_checkpoint(checkpoint.resolve(disk)).step
            wrong = None
            if said is not None and ("cannot be written" not in said or "\n" in said):
                wrong = said
            if list(disk.glob(".*")):
                wrong = f"left {[path.name for path in disk.glob('.*')]}"
            row.add(wrong, found < 1, "refused" if said else "saved")
            shutil.rmtree(disk / "step_2", ignore_errors=True)
            checkpoint.write_pointer(disk, "last", "step_1")


def failing_writes(bench: Bench, row: Row, count: int) -> None:
    """The k-th operation that changes the disk says ENOSPC, and all after it, for every k."""
    for k in range(1, count + 1):
        job = bench.job()
        child = job.start(hook=lambda k=k: failing_operations(k))
        wrong = job.complaint(child, [0, 1, 2])
        odd, lost = bench.goes_on(job)
        row.add(wrong or odd, lost, {0: "went on"}.get(child.wait(), "stopped"))


def full_logs(bench: Bench, row: Row, count: int) -> None:
    """Standard output, standard error, or both, on a disk that is full."""

    def redirect(numbers: tuple[int, ...]) -> None:
        for number in numbers:
            os.dup2(os.open("/dev/full", os.O_WRONLY), number)

    while row.tried < count:
        numbers = ((1,), (2,), (1, 2))[row.tried % 3]
        job = bench.job()
        child = job.start(hook=lambda numbers=numbers: redirect(numbers))
        status = child.wait()
        odd, lost = bench.goes_on(job)
        row.add(odd if status == 0 else f"status {status}", lost, "went on")


def full_data(bench: Bench, row: Row, count: int) -> None:
    """The disk has no room for the data set that a job makes of its CSV file."""
    while row.tried < count:
        with bench.small_disk("1m") as disk:
            job = bench.job(under=disk)
            ballast = fill(disk, bench.chance.randrange(8192, 40_000))
            child = job.start(output=bench.new_folder())
            wrong = job.complaint(child, [2])
            hidden = [path.name for path in disk.rglob(".*")]
            ballast.unlink()
            odd, lost = bench.goes_on(job)
            row.add(wrong or odd or (f"left {hidden}" if hidden else None), lost, "refused")


def read_only(bench: Bench, row: Row, count: int) -> None:
    """The run's file system is read-only from the start, or from any moment on."""
    while row.tried < count:
        with bench.small_disk("4m") as disk:
            job = bench.job(under=disk)
            child = None
            if row.tried % 3:
                child = job.start(output=bench.new_folder())
                child.let(bench.moment())
            kept = job.pointer()
            mount("--bind", disk, disk)
            mount("-o", "remount,bind,ro", disk)
            child = child or job.start(output=bench.new_folder())
            wrong = job.complaint(child, [0, 1, 2])
            status = child.wait()
            subprocess.run(["umount", "-l", disk], check=True)
            odd, lost = bench.goes_on(job, kept=kept)
            seen = {0: "ended before", 1: "stopped", 2: "did not start"}
            row.add(wrong or odd, lost, seen.get(status, ""))
