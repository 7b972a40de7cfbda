"""The one place that writes to the terminal.

Command modules (train, evaluate, solve, info, bench, data builders) print through `say`; the
library itself never does: it logs, and commands show what is logged where something takes long. May
be imported by any module; imports nothing of the package.
"""

import logging
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TextIO

__all__ = ["program", "say", "show_builds"]


def say(text: str = "", *, err: bool = False, end: str = "\n") -> None:
    """Write `text` and `end` to standard output (or, with `err`, standard error) and flush.

    A reader that has gone away (`trm-fast info | head -1`) silences the stream instead of raising:
    a training run does not die with its pager. Characters the stream's encoding lacks become `?`.
    """
    stream: TextIO | None = sys.stderr if err else sys.stdout
    if stream is None:  # a process without a console
        return
    try:
        _write(stream, text + end)
        stream.flush()
    except BrokenPipeError:
        _silence(stream)


class _OnStandardError(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage(), err=True)


def show_builds() -> None:
    """From now on, say on standard error that the compiled extension is being built, which takes a
    minute at its first use, or why it is not there. For commands."""
    log = logging.getLogger("trm_fast.extension")
    if not any(isinstance(handler, _OnStandardError) for handler in log.handlers):
        log.addHandler(_OnStandardError())
        log.setLevel(logging.INFO)


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


def _silence(stream: TextIO) -> None:
    """Point the stream's descriptor at the null device, so that the flush at exit cannot fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, stream.fileno())
    finally:
        os.close(null)
