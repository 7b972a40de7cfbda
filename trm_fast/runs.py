"""Run folders: which one a training job writes to, and whether it goes on with an earlier one.

Owns the choice and the lock that keeps two processes out of one folder. Imported by `runner.py`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from trm_fast import checkpoint
from trm_fast.config import TrainConfig, flatten
from trm_fast.overrides import NOT_SETTINGS

try:
    import fcntl
except ImportError:  # Windows: no lock, two processes in one folder are the user's to avoid
    fcntl = None  # type: ignore[assignment]

# Settings that may change when a run goes on: they do not change what is learned.
FREE = {
    "preset", "project_name", "run_name", "checkpoint_path", "load_checkpoint", "load_identifiers",
    "resume", "seeds",
    "evaluators", "eval_steps", "eval_max_puzzles", "eval_batch_size", "eval_steps_max",
    "eval_save_outputs", "min_eval_interval", "data_paths_test", "checkpoint_every_eval",
    "save_interval", "keep", "official", "log_interval", "logger", "max_skipped",
    "device", "threads", "compile", "profile", "cuda_graph",
    "arch.backend", "arch.policy", "arch.quantize",
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a job runs: `config` with names filled in, and the checkpoint to go on from, if any."""

    config: TrainConfig
    run_dir: Path
    resume_from: Path | None

    @property
    def resume_step(self) -> int | None:
        """Steps already made, or None for a new run."""
        return None if self.resume_from is None else _step_of(self.resume_from)


class RunLock:
    """Held while a process writes to a run folder; the operating system frees it with the process.

    Raises:
        ValueError: another process holds it, or nothing can be written there.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / ".lock"
        self._file = self._take()

    def _take(self) -> IO[str]:
        run_dir = self._path.parent
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            file: IO[str] = open(self._path, "a", encoding="ascii")  # noqa: SIM115
        except OSError as error:
            raise ValueError(
                f"checkpoint_path: nothing can be written in {run_dir}: {error.strerror or error}"
            ) from None
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise ValueError(f"{run_dir} is in use by another process") from None
            except OSError:  # a file system without locks
                pass
        return file

    def check(self) -> None:
        """See that the folder is still this process's: somebody may have deleted it. It is made
        again, and locked, unless another process has begun there.

        Raises:
            ValueError: another process has used the folder meanwhile, or it cannot be made.
        """
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            self.release()
            self._file = self._take()
            return
        except OSError:  # a file system that is not there for a moment
            return
        if not os.path.samestat(there, os.fstat(self._file.fileno())):
            raise ValueError(
                f"{self._path.parent} was deleted, and another process has begun there: this one "
                "writes nothing more"
            )

    def release(self) -> None:
        self._file.close()


def latest(spot: Place) -> Place:
    """The same place once its lock is held: another process may have gone on there meanwhile."""
    if spot.config.resume != "auto" or not checkpoint.list_steps(spot.run_dir):
        return spot
    return replace(spot, resume_from=checkpoint.resolve(spot.run_dir))


def place(config: TrainConfig, total_steps: int) -> Place:
    """The run folder of a job, by `resume`, `run_name` and `checkpoint_path`.

    A named run goes on where its folder ends. A run without a name goes on with an unfinished one
    of the same project and settings that no process is working on, or gets a new name.

    Raises:
        ValueError: the folder holds a run with other settings; with resume=never, any run; or
            resume names no readable checkpoint.
    """
    if config.resume not in ("auto", "never"):
        step = checkpoint.resolve(config.resume)
        config = config.replace({"checkpoint_path": str(step.parent)}).with_names()
        _check_same(config, _saved_settings(step), step.parent)
        return Place(config, step.parent, step)
    if config.run_name or config.checkpoint_path:
        return _named(config.with_names())
    if config.resume == "auto":
        for folder in _unfinished(Path(config.with_names().checkpoint_path or "").parent):
            found = _continuation(config, folder, total_steps)
            if found is not None:
                return found
    named = config.with_names()
    return Place(named, Path(named.checkpoint_path or ""), None)


def _named(config: TrainConfig) -> Place:
    run_dir = Path(config.checkpoint_path or "")
    if not checkpoint.list_steps(run_dir):
        return Place(config, run_dir, None)
    if config.resume == "never":
        raise ValueError(
            f"{run_dir} holds a run already: resume=auto goes on with it, "
            "another run_name starts a new one"
        )
    step = checkpoint.resolve(run_dir)
    _check_same(config, _saved_settings(step), run_dir)
    return Place(config, run_dir, step)


def _continuation(config: TrainConfig, folder: Path, total_steps: int) -> Place | None:
    """The unfinished run in `folder`, if it is this job's and free."""
    try:
        step = checkpoint.resolve(folder)
        saved = _saved_settings(step)
        finished = _record(step).get("finished") or _step_of(step) >= total_steps
        if finished or _differences(config, saved):
            return None
        RunLock(folder).release()
    except (OSError, ValueError):
        return None
    names = {n: saved.get(n) for n in ("project_name", "run_name")}
    return Place(config.replace({**names, "checkpoint_path": str(folder)}), folder, step)


def _unfinished(project: Path) -> list[Path]:
    """Folders with checkpoints, the newest first."""
    try:
        folders = [f for f in project.iterdir() if checkpoint.list_steps(f)]
        return sorted(folders, key=os.path.getmtime, reverse=True)
    except OSError:
        return []


def _step_of(folder: Path) -> int:
    found = re.search(r"step_(\d+)", folder.name)
    assert found is not None  # `checkpoint.resolve` returns nothing else
    return int(found[1])


def _record(step: Path) -> dict[str, Any]:
    """A checkpoint's config.json."""
    values: dict[str, Any] = json.loads((step / checkpoint.CONFIG).read_text(encoding="utf-8"))
    return values


def _saved_settings(step: Path) -> dict[str, Any]:
    """The dotted settings in a checkpoint's config.json."""
    record = _record(step)
    if "source" in record:  # `trm-fast convert` says there what it read
        raise ValueError(
            f"{step.parent} holds converted weights, not a run that can go on: start one under "
            f"another run_name with load_checkpoint={step.parent}"
        )
    return flatten({k: v for k, v in record.items() if k not in NOT_SETTINGS})


def _differences(config: TrainConfig, saved: Mapping[str, Any]) -> list[str]:
    """`key=now (was then)` for every setting that matters and changed."""
    now = flatten(json.loads(json.dumps(config.to_dict())))
    return [
        f"{key}={now[key]} (was {saved[key]})"
        for key in now
        if key in saved and key not in FREE and now[key] != saved[key]
    ]


def _check_same(config: TrainConfig, saved: Mapping[str, Any], run_dir: Path) -> None:
    changed = _differences(config, saved)
    if changed:
        raise ValueError(
            f"{run_dir} holds a run with other settings: {', '.join(changed[:4])}; "
            "give the old values, or start anew under another run_name (load_checkpoint= takes its "
            "weights)"
        )
