"""The one place that writes to the terminal.

Command modules (train, evaluate, solve, info, bench, data builders) print through `say`; the
library itself never does: it logs, and commands show what is logged where something takes long. May
be imported by any module; imports nothing of the package.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

__all__ = [
    "Counting",
    "Parser",
    "as_log",
    "integer",
    "number_in",
    "percent",
    "positive",
    "program",
    "say",
    "show_builds",
]

_lossy = False  # of `as_log`


def say(text: str = "", *, err: bool = False, end: str = "\n") -> None:
    """Write `text` and `end` to standard output (or, with `err`, standard error) and flush.

    A reader that has gone away (`trm-fast info | head -1`) silences the stream instead of raising:
    a training run does not die with its pager. Characters the stream's encoding lacks become `?`.

    Raises OSError where the text cannot be written, and not inside `as_log`.
    """
    stream: TextIO | None = sys.stderr if err else sys.stdout
    if stream is None:  # a process without a console
        return
    try:
        _write(stream, text + end)
        stream.flush()
    except BrokenPipeError:
        _silence(stream)
    except OSError:
        if not _lossy:
            raise
        _let_go(stream)


@contextlib.contextmanager
def as_log() -> Iterator[None]:
    """Inside, what `say` cannot write, for a full disk, is dropped: the text tells how work goes,
    and the work is worth more."""
    global _lossy
    before, _lossy = _lossy, True
    try:
        yield
    finally:
        _lossy = before


class _OnStandardError(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage(), err=True)


class Parser(argparse.ArgumentParser):
    """The arguments of a command. A mistake in them is one line on standard error, and status 2."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        say(f"{self.prog}: {message}; see --help", err=True)
        raise SystemExit(2)


def integer(text: str) -> int:
    """A whole number, for an argument parser."""
    if not re.fullmatch("[+-]?[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def positive(text: str) -> int:
    """An integer of at least 1, for an argument parser."""
    if not re.fullmatch("0*[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 999999999")
    return int(text)


def number_in(low: float, high: float) -> Callable[[str], float]:
    """For an argument parser: what takes a number from `low` to `high`."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low:g} to {high:g}")
        return value

    return number


def percent(value: float | None) -> str:
    """A share as `12.34 %`; None as nothing."""
    return "" if value is None else f"{100 * value:.2f} %"


def show_builds() -> None:
    """From now on, say on standard error that the compiled extension is being built, which takes a
    minute at its first use, or why it is not there. For commands."""
    log = logging.getLogger("trm_fast.extension")
    if not any(isinstance(handler, _OnStandardError) for handler in log.handlers):
        log.addHandler(_OnStandardError())
        log.setLevel(logging.INFO)


class Counting:
    """A line on standard error that counts what is done, where that is a terminal; gone at the end.

    Args:
        most: what there is to do, at most.  noun: of what, such as "boards".
        shown: False shows nothing.
    """

    def __init__(self, most: int, noun: str, shown: bool = True) -> None:
        self._most, self._noun, self._done = most, noun, 0
        stream = sys.stderr
        self._stream = stream if shown and stream is not None and stream.isatty() else None
        self._shown = time.monotonic()

    def __enter__(self) -> Counting:
        return self

    def __exit__(self, *error: Any) -> None:
        self._draw("\r\033[K")

    def add(self, count: int) -> None:
        """So much more is done."""
        self._done += count
        now = time.monotonic()
        if self._stream is not None and now - self._shown >= 0.2:
            self._shown = now
            self._draw(f"\r\033[K{self._done:,} of at most {self._most:,} {self._noun}")

    def _draw(self, text: str) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError, ValueError):  # a terminal that has gone
                self._stream.write(text)
                self._stream.flush()


def program() -> str:
    """How to start this Python again from the working folder, for commands that are shown."""
    if shutil.which("python") == sys.executable:
        return "python"
    try:
        return shlex.quote(str(Path(sys.executable).relative_to(Path.cwd())))
    except ValueError:
        return shlex.quote(sys.executable)


def _write(stream: TextIO, text: str) -> None:
    try:
        stream.write(text)
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        stream.write(text.encode(encoding, "replace").decode(encoding))


def _let_go(stream: TextIO) -> None:
    """Drop what the stream holds and could not write, which the flush at exit would try again; it
    stays open for when there is room."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor
        kept = os.dup(stream.fileno())
        try:
            _silence(stream)
            stream.flush()
        finally:
            os.dup2(kept, stream.fileno())
            os.close(kept)


def _silence(stream: TextIO) -> None:
    """Point the stream's descriptor at the null device, so that the flush at exit cannot fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, stream.fileno())
    finally:
        os.close(null)
