"""A tiny training job that is run, hurt, run again, and compared with itself left in peace.

Owns what the trials of `tools/faults.py` share: a `Job` in a folder of its own, its processes, what
it has on disk, and the `Row` of the table. Runs are forked off a process that has imported PyTorch
already, which saves seconds each, or started as a user starts them.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

from trials import ROOT
from trm_fast import checkpoint, runner, train
from trm_fast.data.sudoku_generator import generate
from trm_fast.loading import load_model
from trm_fast.progress import read_metrics

JOB = [
    "data_paths=[boards.csv]", "checkpoint_path=runs/r", "global_batch_size=8", "eval_steps=10",
    "save_interval=2", "log_interval=1", "keep=3", "lr_warmup_steps=2", "arch.hidden_size=8",
    "arch.intermediate_size=8", "arch.token_intermediate_size=8", "arch.halt_max_steps=2",
    "device=cpu", "threads=1",
]  # fmt: skip
# What a training process imports later is imported before it is forked.
PRELOADED = (torch._dynamo, runner)
sys.modules.setdefault("matplotlib", None)  # type: ignore[arg-type]  # no time for pictures
torch.set_num_threads(1)  # threads do not survive a fork
PATIENCE = 300.0  # seconds after which a process that does not end counts as hanging


@dataclass
class Row:
    """A line of the table: how often a fault was tried, and what became of the run.

    A fault is survived where the run goes on, or ends as the documentation says with one line at
    most; and where, gone on with, it ends bitwise as if nothing had been. It is lost where
    something that was saved before is not there any more, or where the end is another one.
    """

    fault: str
    tried: int = 0
    survived: int = 0
    lost: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, wrong: str | None, lost: bool = False, seen: str = "") -> None:
        """One trial: what was wrong with it, if anything."""
        self.tried += 1
        self.survived += wrong is None and not lost
        self.lost += lost
        self.seen.update([seen] if seen else [])
        if wrong is not None or lost:
            self.wrong.append(wrong or "something saved was lost")

    def record(self) -> dict[str, Any]:
        """The row, ready for JSON."""
        return asdict(self) | {"seen": dict(self.seen)}


class Child:
    """A process in a folder, its output in the files `out` and `err` there."""

    def __init__(self, folder: Path, work: Callable[[], int] | Sequence[str]) -> None:
        self.folder, self._status = folder, None
        for name in ("out", "err"):
            (folder / name).write_bytes(b"")
        if not callable(work):
            self.pid = self._start(work)
            return
        self.pid = os.fork()
        if self.pid == 0:
            self._become(work)

    def _start(self, command: Sequence[str]) -> int:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with open(self.folder / "out", "wb") as out, open(self.folder / "err", "wb") as err:
            process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=out, stderr=err
            )
        process.returncode = 0  # waited for below
        return process.pid

    def _become(self, work: Callable[[], int]) -> None:
        status = 70
        try:
            os.chdir(self.folder)
            for name, number in (("out", 1), ("err", 2)):
                os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
            status = work()
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def status(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def wait(self) -> int:
        """The exit status at the end; a process that hangs is killed, and raises TimeoutError."""
        deadline = time.monotonic() + PATIENCE
        while (status := self.status()) is None:
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                raise TimeoutError(f"still running after {PATIENCE:.0f} s")
            time.sleep(0.002)
        return status

    def let(self, seconds: float) -> bool:
        """Let it work that long; whether it is still at it then."""
        deadline = time.monotonic() + seconds
        while self.status() is None and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, 0.002))
        return self.status() is None

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def text(self, name: str = "out") -> str:
        return (self.folder / name).read_text(errors="replace")


class Job:
    """A training job in a folder of its own. `run` is the run folder."""

    def __init__(self, folder: Path, boards: Path, words: Sequence[str]) -> None:
        self.folder, self.words = folder, [*JOB, *words]
        self.run = folder / "runs" / "r"
        folder.mkdir(parents=True)
        shutil.copy(boards, folder / "boards.csv")

    def start(self, hook: Callable[[], object] | None = None, output: Path | None = None) -> Child:
        """Fork a process that trains; `hook` is called in it first. Its output goes to the job's
        folder or another one."""

        def work() -> int:
            os.chdir(self.folder)
            if hook is not None:
                hook()
            return train.main(self.words)

        return Child(output or self.folder, work)

    def command(self) -> Child:
        """A process that trains, as a user starts it."""
        return Child(self.folder, [sys.executable, "-m", "trm_fast.train", *self.words])

    def newest(self) -> int:
        """The step of the newest checkpoint that is whole, by reading all of it; -1 without one."""
        with suppress(checkpoint.CheckpointError):
            return checkpoint.load_checkpoint(checkpoint.resolve(self.run)).step
        return -1

    def pointer(self) -> int:
        """The step that `last` names, or -1."""
        with suppress(checkpoint.CheckpointError):
            return int((checkpoint.read_pointer(self.run, "last") or "step_-1")[5:])
        return -1

    def outcome(self) -> dict[str, Any]:
        """All that must be the same however a run came to its end."""
        saved = checkpoint.load_checkpoint(checkpoint.resolve(self.run))
        names = [p.relative_to(self.folder).as_posix() for p in self.folder.rglob(".*")]
        return {
            "step": saved.step,
            "weights": digest(saved.model, saved.ema),
            "state": digest(saved.train_state),
            "best": checkpoint.read_pointer(self.run, "best"),
            "steps": [step for step, _ in checkpoint.list_steps(self.run)],
            "metrics": read_metrics(self.run),
            "left": sorted(set(names) - {"runs/r/.lock"}),
        }

    def complaint(self, child: Child, allowed: Sequence[int]) -> str | None:
        """What is wrong with how a process ended: another status, a traceback, more than a line."""
        status, err = child.wait(), child.text("err")
        if status not in allowed:
            return f"status {status}: {err.strip()[-300:] or child.text()[-300:]}"
        lines = [line for line in err.splitlines() if line.startswith("trm-fast ")]
        if "Traceback" in err or len(lines) > 1 or (status in (1, 2) and len(lines) != 1):
            return f"more or less than one line: {err.strip()[-300:]}"
        return None

    def phase(self) -> str:
        """Where the process was when it was killed, as far as the disk tells."""
        if list(self.folder.glob("data/.*.building")):
            return "writing the data"
        if not list(self.folder.glob("data/*")):
            return "before the data"
        if list(self.run.glob(".step_*")):
            return "inside a save"
        if list(self.run.glob(".*.tmp")):
            return "replacing another file"
        if not checkpoint.list_steps(self.run):
            return "before the first save"
        return "between saves"


def digest(*values: Any) -> str:
    """The sha256 of nested tensors and plain values, bit by bit."""
    total = hashlib.sha256()

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            total.update(f"{value.dtype} {tuple(value.shape)} ".encode())
            total.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                total.update(f"{key!r}:".encode())
                walk(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                walk(item)
        else:
            total.update(f"{value!r};".encode())

    walk(values)
    return total.hexdigest()


class Bench:
    """Where faults are tried: jobs, chance, and how the job ends when it is left in peace.

    Args:
        folder: for everything. seed: of the moments. steps: of the job.
        mounts: whether file systems can be mounted here, in a namespace of its own.

    Attributes:
        expected: the outcome of the job left in peace. life: seconds of its process, forked.
    """

    def __init__(self, folder: Path, seed: int, steps: int, mounts: bool) -> None:
        self.folder, self.mounts = folder, mounts
        self.chance = random.Random(seed)
        self.steps, self.boards, self._made = steps, folder / "boards.csv", 0
        puzzles, grids = generate(120, clues=(8, 12), size=4, seed=seed)
        rows = [
            "".join(map(str, p)) + "," + "".join(map(str, g))
            for p, g in zip(puzzles, grids, strict=True)
        ]
        self.boards.write_text("\n".join(["quizzes,solutions", *rows]) + "\n")
        job = self.job()
        self._timed(job.start())
        self.expected = job.outcome()
        load_model(job.run)  # the operations are chosen and registered here, once for all forks
        self.life = self._timed(self.job().start())

    @cached_property
    def command_life(self) -> float:
        """Seconds of a process that is started as a user does."""
        job = self.job()
        life = self._timed(job.command())
        if job.outcome() != self.expected:
            raise RuntimeError("two runs in peace end differently")
        return life

    def _timed(self, child: Child) -> float:
        began = time.monotonic()
        if child.wait() != 0:
            raise RuntimeError(f"the job left in peace failed: {child.text('err')[-500:]}")
        return time.monotonic() - began

    def job(self, *words: str, under: Path | None = None) -> Job:
        """A new job that nothing has happened to."""
        self._made += 1
        place = (under or self.folder) / f"job{self._made}"
        return Job(place, self.boards, [f"steps={self.steps}", *words])

    def new_folder(self) -> Path:
        """An empty folder."""
        self._made += 1
        place = self.folder / f"folder{self._made}"
        place.mkdir()
        return place

    def moment(self, life: float | None = None) -> float:
        return self.chance.uniform(0, life or self.life)

    def goes_on(
        self, job: Job, *, kept: int = -1, apart: Sequence[str] = ()
    ) -> tuple[str | None, bool]:
        """Let a job that was hurt go on to its end: what is wrong, and whether something is lost.

        kept: the step of a checkpoint that was whole before. apart: what of the outcome may be
        another one.
        """
        if job.newest() < kept:
            return f"step {kept} was saved, {job.newest()} is the newest now", True
        wrong = job.complaint(job.start(), [0])
        if wrong is not None:
            return wrong, False
        found = job.outcome()
        odd = [n for n in self.expected if n not in apart and found[n] != self.expected[n]]
        shutil.rmtree(job.folder, ignore_errors=True)
        return (f"ends with other {', '.join(odd)}", True) if odd else (None, False)

    @contextmanager
    def small_disk(self, size: str) -> Iterator[Path]:
        """A file system of that size; the namespace's end takes it away at the latest."""
        place = self.new_folder()
        mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", place)
        try:
            yield place
        finally:
            subprocess.run(["umount", "-l", place], check=False)


def mount(*words: str | Path) -> None:
    for _ in range(200):  # busy while somebody has a file open to write just then
        if subprocess.run(["mount", *words], capture_output=True).returncode == 0:
            return
        time.sleep(0.002)
    raise RuntimeError(f"mount {' '.join(map(str, words))} fails")


def fill(place: Path, leave: int) -> Path:
    """A file that leaves `leave` bytes of a file system free, in pages; returns its path."""
    ballast = place / "ballast"
    free = os.statvfs(place)
    size = max(0, free.f_bavail * free.f_frsize - leave)
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, size))
    return ballast


def negative_rates(text: str) -> list[str]:
    """Status lines with a negative number in them."""
    return [line for line in text.splitlines() if re.match(r"step .*-\d", line)]
