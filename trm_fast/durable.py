"""Files of weights: written so that they survive a crash, read so that nothing in them can run.

Owns the primitives of `checkpoint.py`, `interop.py` and `progress.py`. Imported by whatever writes
files that must be whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from trm_fast.options import printable
from trm_fast.torch_file import read_torch_file
from trm_fast.unpickle import PickleError


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; one line that names the file and the reason."""

    def __init__(self, message: object) -> None:
        super().__init__(printable(str(message)))


def read_bytes(path: Path) -> bytes:
    """The file's content; CheckpointError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {one_line(error)}") from None


def parse_tensors(path: Path, data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file; CheckpointError for anything else."""
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # whatever the parser meets in a hostile file
        raise CheckpointError(f"{path}: is not safetensors: {one_line(error)}") from error


def parse_pickle(path: Path, data: bytes, stubs: Container[str] = ()) -> dict[str, Any]:
    """The dict of a torch.save'd file, nothing in it run; CheckpointError for anything else.

    Args:
        path: for the error.  data: the file's bytes.
        stubs: "module.Class" of classes whose objects become an `unpickle.Holder`.
    """
    try:
        value = read_torch_file(data, stubs)
    except PickleError as error:
        raise CheckpointError(f"{path}: cannot be loaded: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}; a dict was expected")
    return value


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, each in storage of its own size that no other shares."""
    result, taken = {}, set()
    for name, tensor in tensors.items():
        t = tensor.detach().cpu().contiguous()
        storage = t.untyped_storage()
        if storage.nbytes() != t.nbytes or (t.nbytes and storage.data_ptr() in taken):
            t = t.clone()
        taken.add(t.untyped_storage().data_ptr())
        result[name] = t
    return result


def _replace(target: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file that is complete, or as it was before; CheckpointError where that
    fails."""
    temp = target.with_name(f".{target.name}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(temp)
        sync(temp)
        os.replace(temp, target)
        sync(target.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise unwritable(target, error) from error
    finally:
        unlink(temp)


def write_pickle(target: Path, value: Mapping[str, Any]) -> None:
    """torch.save to a file that is replaced as a whole; CheckpointError where that fails."""

    def save(temp: Path) -> None:
        with open(temp, "wb") as file:
            torch.save(value, file)

    _replace(target, save)


def write_tensors(
    target: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file, replaced as a whole; CheckpointError where that fails."""
    content = separate(tensors)
    _replace(target, lambda temp: safetensors.torch.save_file(content, temp, metadata))


def write_text(target: Path, text: str) -> None:
    """A file of text in UTF-8, replaced as a whole; CheckpointError where that fails."""
    _replace(target, lambda temp: temp.write_text(text, encoding="utf-8"))


def write_bytes(target: Path, data: bytes) -> None:
    """A file of bytes, replaced as a whole; CheckpointError where that fails."""
    _replace(target, lambda temp: temp.write_bytes(data))


def write_line(path: Path, line: str) -> None:
    """Replace a one-line file atomically and durably; OSError where that fails."""
    replace_text(path, line + "\n")


def replace_text(path: Path, text: str) -> None:
    """As `write_text`, in a folder that is there; OSError where that fails."""
    temp = path.with_name(f".{path.name}.tmp")
    try:
        temp.write_text(text, encoding="utf-8", newline="")
        sync(temp)
        os.replace(temp, path)
    finally:
        unlink(temp)
    sync(path.parent)


def unlink(temp: Path) -> None:
    """Remove a temporary file, if it is there and if that can be done."""
    with suppress(OSError):
        temp.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Force a file's bytes or a folder's entries to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unwritable(path: Path, error: Exception) -> CheckpointError:
    """The error to raise where `path` could not be written."""
    return CheckpointError(f"{path}: cannot be written: {one_line(error)}")


def one_line(error: BaseException) -> str:
    """The first line of an error, at most 200 characters."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.splitlines()[0].split())[:200]
