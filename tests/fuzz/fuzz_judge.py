"""One input to one parser: what came of it, what it allocated, what it tried to write.

Owns `judge`. Imported by the tests and by tools/fuzz.py.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import tracemalloc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fuzz_inputs import Files
from fuzz_parsers import Parser

LONGEST = 1000  # characters of an error: it may name a path
SECONDS = 20  # of CPU, for an input of some kilobytes
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_WRITES = {
    *("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"),
    *("os.chmod", "os.chown", "os.utime", "shutil.rmtree", "shutil.move", "shutil.copyfile"),
}
_RUNS = {
    *("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile"),
    *("subprocess.Popen", "socket.connect", "socket.bind", "socket.getaddrinfo", "pty.spawn"),
    *("ctypes.dlopen", "webbrowser.open", "pickle.find_class"),
}


@dataclass(frozen=True)
class Verdict:
    """accepted, refused (by a documented error) or lost; why; bytes allocated at once."""

    kind: str
    why: str
    peak: int


class TooSlow(BaseException):
    """Not an Exception, so that no parser takes it for damage."""


class _Watch:
    """What an audit hook sees while an input is read."""

    allowed: str | None = None  # the folder that may be written, while watching
    seen: list[str] = []

    @classmethod
    def hook(cls, event: str, arguments: tuple[Any, ...]) -> None:
        if cls.allowed is None:
            return
        if event in _RUNS:
            cls.seen.append(f"{event} {arguments!r:.80}")
        elif event == "open":
            path, mode, flags = arguments
            writes = flags & 3 if isinstance(flags, int) and flags >= 0 else 0
            if (writes or set(mode or "") & set("wax+")) and not cls._inside(path):
                cls.seen.append(f"open {path!r:.80} to write")
        elif event in ("os.remove", "os.rmdir") and arguments[1] >= 0:
            pass  # relative to a folder that shutil.rmtree, which is watched, has open
        elif event in _WRITES and not all(
            cls._inside(path) for path in arguments[:2] if isinstance(path, (str, bytes, Path))
        ):
            cls.seen.append(f"{event} {arguments!r:.80}")

    @classmethod
    def _inside(cls, path: object) -> bool:
        if isinstance(path, int):  # a descriptor that is open already
            return True
        text = os.path.abspath(os.fsdecode(path))  # type: ignore[arg-type]
        return f"{text}/".startswith(f"{cls.allowed}/")


_hooked = False


@contextmanager
def _watching(allowed: Path) -> Iterator[list[str]]:
    """Collects writes outside of `allowed`, processes started and connections made."""
    global _hooked
    if not _hooked:
        sys.addaudithook(_Watch.hook)
        _hooked = True
    _Watch.seen, _Watch.allowed = [], os.path.abspath(allowed)
    try:
        yield _Watch.seen
    finally:
        _Watch.allowed = None


def _resident() -> tuple[int, int]:
    """(most so far, now) bytes of memory in use by this process; zeros where nothing tells."""
    found = {"VmHWM": 0, "VmRSS": 0}
    try:
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            name, _, rest = line.partition(":")
            if name in found:
                found[name] = int(rest.split()[0]) * 1024
    except OSError:
        pass
    return found["VmHWM"], found["VmRSS"]


def put(files: Files, folder: Path) -> None:
    """Make `folder` hold exactly these files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@cache
def warm(parser: Parser) -> None:
    """Read its valid files once: what is imported, built or cached late, is then."""
    with tempfile.TemporaryDirectory() as folder:
        for seed in parser.seeds():
            put(parser.finish(seed), Path(folder) / "in")
            parser.read(Path(folder) / "in")


def _alarm(*_: object) -> None:
    raise TooSlow


def judge(parser: Parser, files: Files, folder: Path) -> Verdict:
    """Reads one input; `folder` is emptied first and may be looked at afterwards."""
    put(files, folder)
    resident = False
    try:
        _CLEAR.write_text("5")  # the most so far begins anew
        resident = True
    except OSError:
        pass
    before = _resident()[1]
    earlier = signal.signal(signal.SIGPROF, _alarm)
    tracemalloc.start()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    kind, why = "accepted", ""
    try:
        with _watching(folder / "out") as seen, warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", DeprecationWarning)  # as Python does by default
            parser.read(folder)
    except parser.errors as error:
        kind, why = "refused", str(error)
        if fault := _unfit(why):
            kind, why = "lost", f"{type(error).__name__} {fault}: {why[:200]!r}"
    except TooSlow:
        kind, why = "lost", f"more than {SECONDS} s"
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        kind, why = "lost", f"{type(error).__name__}: {str(error)[:200]!r}"
        if isinstance(error, KeyboardInterrupt):
            raise
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, earlier)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    if resident:
        peak = max(peak, _resident()[0] - before)
    allowed = parser.memory + parser.per_byte * sum(map(len, files.values()))
    if seen:
        kind, why = "lost", f"did {seen[0]}"
    elif warned and kind != "lost":
        kind, why = "lost", f"warned: {warned[0].message}"
    elif peak > allowed and kind != "lost":
        kind, why = "lost", f"{peak:,} bytes allocated, {allowed:,} allowed"
    return Verdict(kind, why, peak)


def _unfit(text: str) -> str:
    """Why a text is no error for a user, or nothing."""
    if not text.strip():
        return "says nothing"
    if len(text.splitlines()) != 1:
        return "is not one line"
    if not text.isprintable():
        return "is not printable"
    return "is too long" if len(text) > LONGEST else ""
