"""Damaged files, bad numbers, bad clocks, and what people do to a run that is under way."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

from trials.hooks import bad_clock, no_memory, spoiled_gradients
from trials.job import Bench, Job, Row, negative_rates
from trm_fast import checkpoint


def stopped(bench: Bench, at: int) -> Job:
    """A job that was killed when its checkpoint of step `at`, or a later one, was written."""
    job = bench.job()
    child = job.start()
    while child.status() is None and job.pointer() < at:
        time.sleep(0.003)
    child.signal(signal.SIGKILL)
    child.wait()
    return job


def spoil(bench: Bench, path: Path, how: str) -> None:
    """Flip a bit of a file, cut it, or remove it."""
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[bench.chance.randrange(len(data))] ^= 1 << bench.chance.randrange(8)
    elif how == "cut":
        del data[bench.chance.randrange(len(data)) :]
    if how == "remove":
        path.unlink()
    else:
        path.write_bytes(data)


HOW = ("flip", "cut", "flip", "remove")


def checkpoints(bench: Bench, row: Row, count: int) -> None:
    """A file of the newest checkpoint, or a pointer, is damaged: the run goes on from the one
    before."""
    while row.tried < count:
        job = stopped(bench, bench.steps // 2)
        newest, steps = job.newest(), [step for step, _ in checkpoint.list_steps(job.run)]
        files = sorted((job.run / f"step_{newest}").iterdir())
        path = [*files, job.run / "last"][row.tried % (len(files) + 1)]
        spoil(bench, path, HOW[row.tried % len(HOW)])
        found = job.newest()
        expected = {newest, max(s for s in steps if s < newest)}
        wrong = None if found in expected else f"step {found} after damage to {path.name}"
        odd, lost = bench.goes_on(job)
        row.add(wrong or odd, lost, "noticed" if found < newest else "made no difference")


def all_checkpoints(bench: Bench, row: Row, count: int) -> None:
    """Every checkpoint of a run is damaged: one line, and nothing is written over."""
    while row.tried < count:
        job = stopped(bench, bench.steps // 2)
        for _, folder in checkpoint.list_steps(job.run):
            spoil(bench, folder / "model.safetensors", "flip")
        before = {p: p.read_bytes() for p in job.run.glob("step_*/*")}
        child = job.start()
        wrong = job.complaint(child, [1, 2])
        after = {p: p.read_bytes() for p in job.run.glob("step_*/*")}
        row.add(wrong, before != after, "refused")
        shutil.rmtree(job.folder)


def data_sets(bench: Bench, row: Row, count: int) -> None:
    """A file of the data set is damaged between two processes of a run."""
    while row.tried < count:
        job = stopped(bench, bench.steps // 2)
        (root,) = (job.folder / "data").glob("*")
        files = sorted(path for path in root.rglob("*") if path.is_file())
        path = files[row.tried % len(files)]
        whole = path.read_bytes()
        spoil(bench, path, HOW[row.tried // len(files) % len(HOW)])
        at_once = job.start()
        status = at_once.wait()
        wrong = job.complaint(at_once, [2]) if status else None
        path.write_bytes(whole)
        # What may go on is a manifest whose damage says nothing: it must not change the end.
        odd, lost = bench.goes_on(job)
        if status == 0 and path.name != "manifest.json":
            wrong = f"damage to {path.name} was not noticed"
        row.add(wrong or odd, lost, "refused" if status else "made no difference")


def gradients(bench: Bench, row: Row, count: int) -> None:
    """A gradient is NaN at a step: the step is left out, and a kill changes nothing of it."""
    while row.tried < count:
        steps = {bench.chance.randrange(2, bench.steps) for _ in range(2)}
        job, peace = bench.job(), bench.job()
        first = peace.start(hook=lambda steps=steps: spoiled_gradients(steps))
        wrong = peace.complaint(first, [0])
        child = job.start(hook=lambda steps=steps: spoiled_gradients(steps))
        child.let(bench.moment())
        child.signal(signal.SIGKILL)
        child.wait()
        again = job.start(hook=lambda steps=steps: spoiled_gradients(steps))
        wrong = wrong or job.complaint(again, [0])
        lost = wrong is None and job.outcome() != peace.outcome()
        if wrong is None:
            saved = checkpoint.load_checkpoint(checkpoint.resolve(job.run))
            finite = all(bool(value.isfinite().all()) for value in saved.model.values())
            told = "step left out" in first.text()
            wrong = None if finite and told else f"finite {finite}, told {told}"
        row.add(wrong, lost, "went on")
        shutil.rmtree(job.folder)
        shutil.rmtree(peace.folder)


def gradients_for_good(bench: Bench, row: Row, count: int) -> None:
    """All gradients are NaN from a step on: the run stops, its last checkpoint is good."""
    while row.tried < count:
        first = bench.chance.randrange(4, bench.steps - 6)
        job = bench.job("max_skipped=3")
        steps = set(range(first, 10**4))
        wrong = job.complaint(job.start(hook=lambda steps=steps: spoiled_gradients(steps)), [1])
        kept = job.newest()
        if kept < first - 2:
            wrong = wrong or f"the checkpoint of step {kept} is all there is, of {first}"
        odd, lost = bench.goes_on(job, kept=kept) if kept < first else (None, False)
        row.add(wrong or odd, lost, "stopped")


def memory(bench: Bench, row: Row, count: int) -> None:
    """A step finds no memory."""
    while row.tried < count:
        job = bench.job()
        step = bench.chance.randrange(1, bench.steps + 1)
        child = job.start(hook=lambda step=step: no_memory(step))
        wrong = job.complaint(child, [1])
        odd, lost = bench.goes_on(job, kept=(step - 1) // 2 * 2 or -1)
        row.add(wrong or odd, lost, "stopped")


DAY = 86400.0


def clocks(bench: Bench, row: Row, count: int) -> None:
    """The clocks jump a day back, and forth, while the run goes and while it is down."""
    while row.tried < count:
        job = bench.job()
        jumps = [(bench.chance.randrange(1, 60), -DAY), (bench.chance.randrange(1, 60), DAY / 2)]
        child = job.start(hook=lambda jumps=jumps: bad_clock(jumps))
        child.let(bench.moment())
        child.signal(signal.SIGKILL)
        child.wait()
        said = child.text()
        for path in job.folder.rglob("*"):  # the files are of tomorrow then
            stamp = time.time() + DAY * bench.chance.uniform(0, 2)
            os.utime(path, (stamp, stamp))
        kept = job.pointer()
        again = job.start(hook=lambda jumps=jumps: bad_clock(jumps))
        wrong = job.complaint(again, [0])
        said += again.text()
        began = f"from step {kept}" in said or kept < 0 or job.newest() == bench.steps
        rates = negative_rates(said)
        if rates or not began:
            wrong = wrong or f"negative {rates[:1]}, began {began}"
        odd, lost = bench.goes_on(job, kept=bench.steps)
        row.add(wrong or odd, lost, "went on")


def two_processes(bench: Bench, row: Row, count: int) -> None:
    """Two processes for one run folder, the second at any moment of the first one's life."""
    while row.tried < count:
        job = bench.job()
        one = job.start()
        if row.tried % 3:
            one.let(bench.moment())
        place = bench.new_folder()
        other = job.start(output=place)
        statuses = sorted((one.wait(), other.wait()))
        busy = "is in use by another process" in one.text("err") + other.text("err")
        fine = statuses == [0, 0] or (statuses == [0, 2] and busy)
        wrong = None if fine else f"{statuses}: {one.text('err')} {other.text('err')}"
        odd, lost = bench.goes_on(job, kept=bench.steps)
        row.add(wrong or odd, lost, "refused" if busy else "came later")


def deleted_folders(bench: Bench, row: Row, count: int) -> None:
    """The run folder, or its newest checkpoint, is deleted while the run goes."""
    while row.tried < count:
        job = bench.job()
        child = job.start()
        child.let(bench.moment())
        whole = row.tried % 2 == 0
        newest = job.run / f"step_{job.pointer()}"
        shutil.rmtree(job.run if whole else newest, ignore_errors=True)
        # A save that is under way loses its files: then the run stops.
        wrong = job.complaint(child, [0, 1])
        status = child.wait()
        odd, lost = bench.goes_on(job, apart=("steps", "best", "metrics"))
        row.add(wrong or odd, lost, "went on" if status == 0 else "stopped")
