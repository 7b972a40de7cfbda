"""Watches over the process that measures: kills it where it hangs, starts it again where it died.

A kernel that reads out of bounds takes the whole CUDA context with it, and one that never ends
cannot be interrupted from within. So the items run in a process of their own, which leaves word of
what it is doing in a file beside the results; after a loss the next process goes on behind the item
that was lost. Imported by `bench/gpu_suite.py`; loads no torch.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from trm_fast.suite import records

GRACE = 20.0  # seconds beyond its deadline that an item gets to notice it
POLL = 0.1
CONTEXT_LOST = 75  # exit status of a process whose CUDA context is gone; the item is recorded


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived; the argument is its number."""


def now_file(out: Path) -> Path:
    """Where the measuring process says what it is doing."""
    return out.with_name(out.name + ".now")


def set_now(out: Path, item: str | None, until: float = 0.0) -> None:
    """Say what is being measured and until when; None: nothing any more."""
    path = now_file(out)
    if item is None:
        path.unlink(missing_ok=True)
        return
    text = json.dumps({"item": item, "until": until})
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def get_now(out: Path) -> dict[str, Any] | None:
    try:
        return json.loads(now_file(out).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM raise `Stopped`, once."""

    def stop(number: int, frame: FrameType | None) -> None:
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, signal.SIG_IGN)
        raise Stopped(number)

    before = {one: signal.signal(one, stop) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def supervise(command: Sequence[str], out: Path, stage: str, run: str, grace: float = GRACE) -> int:
    """Run `command` until it has come to the end of its items; returns its last exit status.

    command: of the measuring process; `--after ITEM` is added when it has to go on behind one.
    """
    after: list[str] = []
    set_now(out, None)
    while True:
        worker = subprocess.Popen([*command, *after])
        try:
            killed = _watch(worker, out, grace)
        except Stopped:
            _end(worker)
            set_now(out, None)
            raise
        now = get_now(out)
        if now is None:
            return worker.returncode
        if worker.returncode != CONTEXT_LOST:
            status, reason = (
                ("killed", "it did not stop at its deadline")
                if killed
                else (
                    "failed",
                    f"the process ended with status {worker.returncode}",
                )
            )
            record = {"run": run, "stage": stage, "item": now["item"], "status": status}
            records.append(out, record | {"reason": reason, "seconds": 0.0, "rows": []})
        after = ["--after", now["item"]]
        set_now(out, None)


def _watch(worker: subprocess.Popen[bytes], out: Path, grace: float) -> bool:
    """Wait for the process; True if it had to be killed because its item would not end."""
    while worker.poll() is None:
        now = get_now(out)
        if now is not None and time.time() > now["until"] + grace:
            worker.kill()
            worker.wait()
            return True
        time.sleep(POLL)
    return False


def _end(worker: subprocess.Popen[bytes]) -> None:
    """Let the process write what it has, then make sure that it is gone."""
    worker.terminate()
    try:
        worker.wait(timeout=GRACE)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
