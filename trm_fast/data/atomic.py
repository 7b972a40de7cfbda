"""Folders that appear whole or not at all, also where the process that fills them is killed.

Owns the hidden folders beside a folder to be written: `.NAME.<random>.building`, in which it is
filled, and `.NAME.<random>.replaced`, which keeps the one before while the new one takes its name.
Imported by `format.py`; imports nothing of the package.

A process holds the lock of the folder that it fills; the operating system frees it with the
process, so that the next writer knows what nobody works on any more.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: what killed writers leave stays
    fcntl = None  # type: ignore[assignment]

__all__ = ["whole_folder"]

_BUILDING, _REPLACED = "building", "replaced"


@contextmanager
def whole_folder(
    target: Path, keep: Callable[[Path], bool] = lambda folder: False
) -> Iterator[Path]:
    """A folder to fill, which on leaving the block becomes `target`, instead of one that is there.

    If the block raises, nothing is left. What killed writers of `target` left is removed first, or
    put back where it had been moved aside. Raises OSError for what cannot be written.

    Args:
        target: the folder to appear.
        keep: called with the filled folder, whether the one that is there may stay: somebody else
            may have written the same meanwhile, and others read it already.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone_in(target.parent):
        _tidy(target)
        folder = _hidden(target, _BUILDING)
        lock = _lock(folder)
    try:
        yield folder
        with _alone_in(target.parent):
            if not (target.exists() and keep(folder)):
                _swap_in(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _hidden(target: Path, purpose: str) -> Path:
    return Path(tempfile.mkdtemp(f".{purpose}", f".{target.name}.", target.parent))


def _swap_in(folder: Path, target: Path) -> None:
    if not target.exists():
        folder.rename(target)
        return
    old = _hidden(target, _REPLACED)
    target.rename(old / "data")
    folder.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _tidy(target: Path) -> None:
    """Undo what killed writers of `target` had begun."""
    left = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]+\.({_BUILDING}|{_REPLACED})")
    for path in sorted(target.parent.iterdir()):
        match = left.fullmatch(path.name)
        lock = _lock(path) if match else None
        if match is None or lock is None:
            continue
        if match[1] == _REPLACED and (path / "data").is_dir() and not target.exists():
            (path / "data").rename(target)
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock; None where another process holds it, or where
    there are no such locks."""
    descriptor = _opened(folder)
    if fcntl is None or descriptor is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _opened(folder: Path) -> int | None:
    """A descriptor of the folder; None where it cannot be read or is gone, and without locks."""
    try:
        return os.open(folder, os.O_RDONLY) if fcntl is not None else None
    except OSError:
        return None


@contextmanager
def _alone_in(parent: Path) -> Iterator[None]:
    """Inside, no other writer makes, moves or removes hidden folders in `parent`."""
    descriptor = _opened(parent)
    try:
        if fcntl is not None and descriptor is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
