"""Processes that are killed, or asked to stop: at any moment, and at the worst ones."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

from trials.job import Bench, Child, Job, Row
from trm_fast.data import sudoku

KILL = signal.SIGKILL
TOO_LATE = "after its end"


def kills(bench: Bench, row: Row, count: int) -> None:
    """Processes as users start them, killed at any moment of their life, several times a job."""
    while row.tried < count:
        job, waiting = bench.job(), []
        for _ in range(min(5, count - row.tried - len(waiting))):
            child = job.command()
            if not child.let(bench.moment(bench.command_life)):
                break
            waiting.append(_kill(job, child))
        _settle(bench, row, job, waiting)


def forked_kills(bench: Bench, row: Row, count: int) -> None:
    """As `kills`, of processes that have imported everything: more of them, all in the training."""
    while row.tried < count:
        job, waiting = bench.job(), []
        for _ in range(min(5, count - row.tried - len(waiting))):
            child = job.start()
            if not child.let(bench.moment()):
                break
            waiting.append(_kill(job, child))
        _settle(bench, row, job, waiting)


def _kill(job: Job, child: Child, number: int = KILL) -> tuple[str, str | None, bool]:
    """Kill; where it was, what is wrong with that, and whether a checkpoint was lost by it."""
    kept = job.pointer()
    child.signal(number)
    status = child.wait()
    where = job.phase() if child.text() else "during imports"
    where = TOO_LATE if status == 0 else where
    lost = job.newest() < kept
    return where, None if status in (0, -number) else f"status {status}", lost


def _settle(bench: Bench, row: Row, job: Job, waiting: list[tuple[str, str | None, bool]]) -> None:
    """Count kills of one job, by how it goes on to its end."""
    waiting = [trial for trial in waiting if trial[0] != TOO_LATE]
    if not waiting:
        shutil.rmtree(job.folder)
        return
    wrong, lost = bench.goes_on(job)
    for where, odd, gone in waiting:
        row.add(odd or wrong, lost or gone, where)


def kills_in_saves(bench: Bench, row: Row, count: int) -> None:
    """Killed while a checkpoint is being written: its hidden folder is there."""
    while row.tried < count:
        job = bench.job()
        child, skip = job.start(), bench.chance.randrange(4, 9)
        seen: set[str] = set()
        while child.status() is None and len(seen) < skip:
            seen |= {path.name for path in job.run.glob(".step_*.tmp")}
            time.sleep(0.0005)
        time.sleep(bench.chance.uniform(0, 0.01))
        killed = _kill(job, child)
        if killed[0] != "inside a save":
            shutil.rmtree(job.folder)
            continue
        what = sorted(path.name for path in job.run.glob(".step_*/*"))
        _settle(bench, row, job, [(f"with {len(what)} files written", *killed[1:])])


def kills_in_data(bench: Bench, row: Row, count: int) -> None:
    """Builders of a data set, killed and run again; every other one replaces a data set."""
    place = bench.folder / "sets"
    place.mkdir()
    words = ["--output-dir", "set", "--source", str(bench.boards), "--test-size", "9", "--num-aug"]

    def build(folder: Path, images: int) -> Child:
        return Child(folder, lambda: sudoku.main([*words, str(images)]))

    def contents(folder: Path) -> dict[str, bytes]:
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    began = time.monotonic()
    build(place, 200).wait()
    life, expected = time.monotonic() - began, contents(place / "set")
    while row.tried < count:
        folder = place / str(row.tried)
        folder.mkdir()
        before = None
        if row.tried % 2:
            build(folder, 10).wait()
            before = contents(folder / "set")
        child = build(folder, 200)
        if not child.let(bench.moment(life)):
            shutil.rmtree(folder)
            continue
        child.signal(KILL)
        child.wait()
        there = contents(folder / "set")
        aside = any(folder.glob(".set.*.replaced/data"))
        lost = before is not None and there not in (before, expected) and not aside
        half = bool(there) and there not in (before, expected)
        status = build(folder, 200).wait()
        clean = [path.name for path in folder.iterdir() if path.name not in ("out", "err")]
        good = status == 0 and contents(folder / "set") == expected and clean == ["set"]
        wrong = None if good and not half else f"status {status}, {clean}, half {half}"
        row.add(wrong, lost, "replacing" if before else "new")
        shutil.rmtree(folder)


def torn_logs(bench: Bench, row: Row, count: int) -> None:
    """The last line of metrics.jsonl cut anywhere, or followed by what is no text, after a kill."""
    while row.tried < count:
        job = bench.job()
        child = job.start()
        while child.status() is None and job.pointer() < bench.steps // 2:
            time.sleep(0.003)
        where, odd, lost = _kill(job, child)
        log = job.run / "metrics.jsonl"
        data = log.read_bytes()
        start = data[:-1].rfind(b"\n") + 1
        if json.loads(data[start:].splitlines()[0] or b"{}").get("step", 0) <= job.newest():
            data += b'{"step": 99999, "train/lm_loss": 1'  # the next one, had it been written
            start = data.rfind(b"\n") + 1
        cut = bench.chance.randrange(start, len(data))
        log.write_bytes(data[:cut] + bench.chance.choice([b"", b"\0\xff\n", b"\0" * 4096]))
        _settle(bench, row, job, [("went on", odd, lost)])


def signals(bench: Bench, row: Row, count: int) -> None:
    """SIGINT and SIGTERM in turn, at any moment; a few in processes as users start them."""
    while row.tried < count:
        number = (signal.SIGINT, signal.SIGTERM)[row.tried % 2]
        as_user = row.tried >= count * 2 // 3
        job = bench.job()
        child = job.command() if as_user else job.start()
        if not child.let(bench.moment(bench.command_life if as_user else None)):
            shutil.rmtree(job.folder)
            continue
        kept = job.pointer()
        child.signal(number)
        status = child.wait()
        # Before training has begun there is nothing to save, and SIGTERM ends the process as ever;
        # SIGINT while Python itself starts or ends is Python's to tell of.
        said, err = child.text(), child.text("err")
        early, over = "run folder" not in said, kept == bench.steps
        allowed = [0, 128 + number, *([-number] if early or over else [])]
        if not said and "KeyboardInterrupt" in err:
            allowed += [1]
        wrong = None if status in allowed else f"status {status}: {err[-300:]}"
        if wrong is None and "Traceback" in err and not early:
            wrong = err[-300:]
        # What was saved at the signal stays, and counts among those that `keep` keeps.
        odd, lost = bench.goes_on(job, kept=kept, apart=["steps"])
        seen = "too late to matter" if over else "saved and stopped"
        row.add(wrong or odd, lost, "ended before its first step" if early else seen)
