"""Checkpoints: a whole training state in a folder that is either complete or not there.

Owns the layout `RUN/step_N/{model.safetensors, ema.safetensors, config.json, train_state.pt,
manifest.json}` and the one-line pointers `RUN/last` and `RUN/best`. May be imported by inference,
trainer and the command modules; imports durable.

A checkpoint is written as a hidden folder whose files and entries are forced to the disk before it
is renamed, so that a process killed at any moment leaves the earlier checkpoints as they were. The
manifest holds the sha256 of every file and of itself: nothing is parsed before it is verified.
One process writes to a run folder; any number may read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from trm_fast.data.manifest import body_digest
from trm_fast.durable import (
    CheckpointError,
    one_line,
    parse_pickle,
    parse_tensors,
    read_bytes,
    separate,
    sync,
    unwritable,
    write_line,
)
from trm_fast.options import show

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "list_steps",
    "load_checkpoint",
    "not_of_this_run",
    "passed_over",
    "prune",
    "read_pointer",
    "resolve",
    "save_checkpoint",
    "verify",
    "write_pointer",
]

MODEL, EMA, CONFIG, STATE = "model.safetensors", "ema.safetensors", "config.json", "train_state.pt"
MANIFEST = "manifest.json"
REQUIRED = {MODEL, CONFIG, STATE}
FORMAT = 1
_STEP = re.compile(r"step_(\d{1,15})")
# .tmp is being written or deleted; .old is complete and about to be replaced by its successor.
_HIDDEN = re.compile(r"\.(step_\d{1,15})\.(tmp|old)")
_SCALARS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Checkpoint:
    """What `save_checkpoint` was given, tensors on the CPU, and the folder it was read from."""

    step: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    config: dict[str, Any]
    train_state: dict[str, Any]
    path: Path


def save_checkpoint(
    run_dir: str | os.PathLike[str],
    step: int,
    *,
    model: Mapping[str, Tensor],
    ema: Mapping[str, Tensor] | None,
    config: Mapping[str, Any],
    train_state: Mapping[str, Any],
) -> Path:
    """Write RUN/step_N durably, point `last` at it, and return its path.

    A step_N that is already there is replaced; leftovers of killed processes are removed. If
    anything fails, what was written is removed and earlier checkpoints are as they were.

    Args:
        run_dir: the run folder; made if missing. step: N >= 0.
        model, ema: state_dicts on any device, any dtype that safetensors knows.
        config: anything JSON can hold; stored as config.json and in the safetensors metadata.
        train_state: nested dicts, lists and tuples of tensors, int, float, bool, str, None.

    Raises CheckpointError for a full disk or a folder that cannot be written, ValueError for a
    train_state or config that could not be read back.
    """
    if type(step) is not int or not 0 <= step < 10**15:
        raise ValueError(f"step is {step!r}; an integer >= 0 is allowed")
    state = _portable(train_state, "train_state")
    try:
        text = json.dumps(config, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config cannot be stored as JSON: {one_line(error)}") from None
    run, name = Path(run_dir), f"step_{step}"
    temp = run / f".{name}.tmp"
    try:
        run.mkdir(parents=True, exist_ok=True)
        _tidy(run)
        temp.mkdir()
        _write_files(temp, step, model, ema, text, state)
        _install(temp, run / name)
        write_line(run / "last", name)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise unwritable(run / name, error) from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return run / name


def _write_files(
    folder: Path,
    step: int,
    model: Mapping[str, Tensor],
    ema: Mapping[str, Tensor] | None,
    config: str,
    state: dict[str, Any],
) -> None:
    metadata = {"format": "pt", "trm_fast": config}
    safetensors.torch.save_file(separate(model), folder / MODEL, metadata)
    if ema is not None:
        safetensors.torch.save_file(separate(ema), folder / EMA, metadata)
    (folder / CONFIG).write_text(config + "\n", encoding="utf-8")
    for name in (MODEL, EMA):  # safetensors lets nobody else read what it writes
        if (folder / name).exists():
            shutil.copymode(folder / CONFIG, folder / name)
    with open(folder / STATE, "wb") as file:
        torch.save(state, file)
    files = {}
    for path in sorted(folder.iterdir()):
        sync(path)
        files[path.name] = _fingerprint(path.read_bytes())
    body = {"format": FORMAT, "step": step, "files": files}
    manifest = {**body, "sha256": body_digest(body)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)


def _install(temp: Path, final: Path) -> None:
    """Give the complete folder `temp` its name; at every moment one version can be found."""
    if not final.exists():
        os.rename(temp, final)
        sync(final.parent)
        return
    if not final.is_dir():
        raise OSError("a file of that name is in the way")
    old = final.with_name(f".{final.name}.old")
    os.rename(final, old)
    try:
        os.rename(temp, final)
    except OSError:
        os.rename(old, final)
        raise
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _tidy(run: Path) -> None:
    """Undo what a killed process had begun: restore a version being replaced, drop the rest."""
    for path in sorted(run.iterdir()):
        if match := _HIDDEN.fullmatch(path.name):
            if match[2] == "old" and not (run / match[1]).exists():
                os.rename(path, run / match[1])
            else:
                shutil.rmtree(path)


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read and verify one step folder (`resolve` finds it); tensors come to the CPU.

    Every file is read once, compared with the manifest and only then parsed; train_state.pt is
    loaded with weights_only, so that no checkpoint can run code.
    Raises CheckpointError for a file missing, damaged, or not what it should be.
    """
    folder = _present(Path(path))
    step, files = _read_manifest(folder)
    data = {name: _verified(folder / name, entry) for name, entry in files.items()}
    config = _parse_json(folder / CONFIG, data[CONFIG])
    model = parse_tensors(folder / MODEL, data.pop(MODEL))
    ema = parse_tensors(folder / EMA, data.pop(EMA)) if EMA in data else None
    state = parse_pickle(folder / STATE, data.pop(STATE))
    return Checkpoint(step, model, ema, config, state, folder)


def not_of_this_run(path: Path, error: Exception) -> CheckpointError:
    """What to raise for a checkpoint that matches its manifest and holds something else."""
    return CheckpointError(f"{path}: is no state of this run: {one_line(error)}")


def verify(path: str | os.PathLike[str]) -> int:
    """The step of a step folder whose files all match its manifest; CheckpointError otherwise."""
    folder = _present(Path(path))
    step, files = _read_manifest(folder)
    for name, entry in files.items():
        _verified(folder / name, entry)
    return step


def resolve(path: str | os.PathLike[str], which: str = "last") -> Path:
    """The step folder meant by `path`: itself, or the one its run points at.

    In a run folder it is the checkpoint of pointer `which` ("last" or "best"); where that is
    missing or damaged, the newest intact step. Compare its name with `read_pointer` to tell.
    Raises CheckpointError for a damaged step folder or a run without an intact checkpoint.
    """
    _check_pointer(which)
    run = Path(path)
    if os.path.exists(run / MANIFEST) or (_STEP.fullmatch(run.name) and not list_steps(run)):
        verify(run)
        return _present(run)
    folders = [folder for _, folder in reversed(list_steps(run))]
    name = None
    with suppress(CheckpointError):
        name = read_pointer(run, which)
    folders.sort(key=lambda folder: _step_name(folder) != name)  # stable: the pointer's own first
    reasons = []
    for folder in folders:
        try:
            verify(folder)
            return folder
        except CheckpointError as error:
            reasons.append(str(error))
    others = f"; nor any of the {len(reasons) - 1} others" if len(reasons) > 1 else ""
    found = f": {reasons[0]}{others}" if reasons else " (no step_N folder)"
    raise CheckpointError(f"{run}: no readable checkpoint{found}")


def passed_over(folder: str | os.PathLike[str]) -> str | None:
    """Why `resolve` took this step folder and not the one that its run means by `last`, in one
    line; None where it is that one."""
    taken = Path(folder)
    name = _pointer_or_none(taken.parent)
    if name is None and (steps := list_steps(taken.parent)):
        name = _step_name(steps[-1][1])
    if name in (None, _step_name(taken)):
        return None
    try:
        verify(taken.parent / str(name))
    except CheckpointError as error:
        return f"{error}; taking {_step_name(taken)}"
    return None


def list_steps(run_dir: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint of a run, ascending, unverified; empty if there is none.

    Includes a version caught in the middle of being replaced, under its hidden name.
    """
    try:
        folders = [path for path in Path(run_dir).iterdir() if path.is_dir()]
    except OSError:
        return []
    replaced = [f for f in folders if f.name.endswith(".old") and _HIDDEN.fullmatch(f.name)]
    found = {_step_name(f): f for f in replaced}
    found |= {f.name: f for f in folders if _STEP.fullmatch(f.name)}
    return sorted((int(name.removeprefix("step_")), folder) for name, folder in found.items())


def prune(run_dir: str | os.PathLike[str], keep: int | None) -> list[str]:
    """Delete all steps but those of `last` and `best` and the newest `keep`; returns their names.

    None keeps all. Raises ValueError for keep < 1, CheckpointError for a folder that stays.
    """
    if keep is None:
        return []
    if keep < 1:
        raise ValueError(f"keep is {keep!r}; an integer >= 1, or None for all, is allowed")
    run = Path(run_dir)
    kept = {read_pointer(run, "last"), read_pointer(run, "best")}
    dropped = []
    for _, folder in list_steps(run)[:-keep]:
        if _step_name(folder) in kept or folder.name.startswith("."):
            continue
        hidden = folder.with_name(f".{folder.name}.tmp")
        try:
            os.rename(folder, hidden)  # a half-deleted folder never looks like a checkpoint
            shutil.rmtree(hidden)
        except OSError as error:
            raise unwritable(folder, error) from None
        dropped.append(folder.name)
    return dropped


def read_pointer(run_dir: str | os.PathLike[str], which: str) -> str | None:
    """The name, such as "step_400", that RUN/last or RUN/best holds; None where there is none.

    Raises CheckpointError for a pointer that holds something else.
    """
    _check_pointer(which)
    path = Path(run_dir) / which
    try:
        name = path.read_bytes()[:100].decode("ascii", "replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: {one_line(error)}") from None
    if not _STEP.fullmatch(name):
        raise CheckpointError(f"{path}: holds {name!r}; the name of a step folder was expected")
    return name


def _pointer_or_none(run: Path, which: str = "last") -> str | None:
    try:
        return read_pointer(run, which)
    except CheckpointError:
        return None


def write_pointer(run_dir: str | os.PathLike[str], which: str, name: str) -> None:
    """Make RUN/last or RUN/best name a step folder, atomically.

    Raises ValueError for another pointer or name, CheckpointError if it cannot be written.
    """
    _check_pointer(which)
    if not _STEP.fullmatch(name):
        raise ValueError(f"{which} cannot point at {name!r}; step_N is allowed")
    try:
        write_line(Path(run_dir) / which, name)
    except OSError as error:
        raise unwritable(Path(run_dir) / which, error) from None


def _check_pointer(which: str) -> None:
    if which not in ("last", "best"):
        raise ValueError(f"pointer is {which!r}; last and best are allowed")


def _step_name(folder: Path) -> str:
    match = _HIDDEN.fullmatch(folder.name)
    return match[1] if match else folder.name


def _present(folder: Path) -> Path:
    """`folder`, or its version that a killed process had put aside to replace it."""
    old = folder.with_name(f".{folder.name}.old")
    return old if not folder.exists() and old.is_dir() else folder


def _read_manifest(folder: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """(step, files) of a manifest that agrees with its own checksum and names our files."""
    path = folder / MANIFEST
    manifest = _parse_json(path, read_bytes(path))
    digest = manifest.pop("sha256", None)
    if digest != body_digest(manifest):
        raise CheckpointError(f"{path}: damaged (its checksum does not match)")
    if str(manifest.get("format")).startswith("trm_fast data set"):
        raise CheckpointError(f"{folder}: is a data set, not a checkpoint")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {show(manifest.get('format'))}; {FORMAT} is known")
    step, files = manifest.get("step"), manifest.get("files")
    if type(step) is not int or not isinstance(files, dict):
        raise CheckpointError(f"{path}: has no step or no files")
    if not (REQUIRED <= files.keys() <= REQUIRED | {EMA}):
        listed = ", ".join(sorted(files))[:200]
        raise CheckpointError(f"{path}: lists {listed or 'no files'}")
    if not all(isinstance(entry, dict) for entry in files.values()):
        raise CheckpointError(f"{path}: has an entry without checksum")
    return step, files


def _verified(path: Path, entry: dict[str, Any]) -> bytes:
    data = read_bytes(path)
    found = _fingerprint(data)
    if found["bytes"] != entry.get("bytes"):
        raise CheckpointError(
            f"{path}: damaged ({len(data)} bytes, not {show(entry.get('bytes'))})"
        )
    if found["sha256"] != entry.get("sha256"):
        raise CheckpointError(f"{path}: damaged (its checksum does not match)")
    return data


def _parse_json(path: Path, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}; an object was expected")
    return value


def _portable(value: Any, where: str) -> Any:
    """`value` with compact CPU tensors; ValueError for what weights_only would not load again."""
    if isinstance(value, Tensor):
        return separate({"": value})[""]
    if isinstance(value, Mapping):
        if odd := [key for key in value if type(key) not in (str, int)]:
            raise ValueError(f"{where} has the key {odd[0]!r}; str and int are allowed")
        return {key: _portable(item, f"{where}[{key!r}]") for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_portable(v, f"{where}[{i}]") for i, v in enumerate(value))
    if type(value) in _SCALARS:
        return value
    raise ValueError(
        f"{where} is a {type(value).__name__}; tensors, int, float, bool, str, None, and "
        "dicts, lists and tuples of them are allowed"
    )


def _fingerprint(data: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
