"""The folder of built libraries: each is built once, checked before it is used, and swept.

A library is used with its checksum beside it: a file that was cut short would not fail to load, it
would kill the process. The checksum tells accidents; against others' doing, folder and library must
be this user's or root's, and not open for everybody to write. Several processes build once (flock;
the system drops it with the process that held it, however that ends), and a file appears by being
renamed into place. Object files are kept the same way, so that an edited source, or another
instruction set, compiles what it must only. Imported by `library`; imports the standard library
only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from trm_fast.extension import build

log = logging.getLogger("trm_fast.extension")

MOST_LIBRARIES = 12  # of a kind; the ones that were used last stay
MOST_OBJECTS = 400


def folder() -> Path:
    """$TRM_FAST_CACHE, else trm_fast in $XDG_CACHE_HOME or ~/.cache."""
    given = os.environ.get("TRM_FAST_CACHE")
    if given:
        return Path(given).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path("~/.cache").expanduser()).absolute() / "trm_fast"
    except RuntimeError as error:
        reason = f"no folder for the cache, TRM_FAST_CACHE can name one: {error}"
        raise build.BuildError(reason) from None


def for_this_machine() -> Path:
    """The CPU library of the best instruction set here, built first where it is not there.

    Compilers are started only where the compiler, the sources or the CPU are not those of the last
    time; where there is no compiler, a library that another one has made of these sources serves.

    Raises:
        BuildError: it cannot be built.
    """
    place = folder()
    try:
        note = place / f"native-{build.machine_key()}"
    except build.BuildError:
        if (made := _made_before(place)) is not None:
            return made
        raise
    with contextlib.suppress(OSError, UnicodeDecodeError):
        library = place / Path(note.read_text(encoding="ascii").strip()).name
        if build.intact(library):
            _check_owner(library)
            _used(library)
            return library
    library = provide("cpu", [build.native_set()])
    with contextlib.suppress(OSError):
        part = place / f"{note.name}.{os.getpid()}.part"
        part.write_text(library.name + "\n", encoding="ascii")
        os.replace(part, note)
    return library


def _made_before(place: Path) -> Path | None:
    for name in build.runnable_sets():
        for library in sorted(place.glob(build.any_compilers("cpu", name))):
            if build.intact(library):
                _check_owner(library)
                return library
    return None


def _check_owner(path: Path) -> None:
    """BuildError where somebody else could have written the library or put it there."""
    if not hasattr(os, "getuid"):
        return
    for one in (path, path.parent):
        about = one.stat()
        if about.st_uid not in (0, os.getuid()) or about.st_mode & stat.S_IWOTH:
            who = "everybody can write to it" if about.st_mode & stat.S_IWOTH else "another user's"
            raise build.BuildError(f"{one} is not to be trusted: {who}")


def provide(
    kind: str, targets: Sequence[str], flags: Sequence[str] = (), *, anew: bool = False
) -> Path:
    """The library's path, built first where it is not there or not intact.

    Args:
        targets, flags: see `build.build`.
        anew: build it in any case, from nothing.

    Raises:
        BuildError: it cannot be built.
    """
    place = folder()
    library = place / (build.key(kind, targets, flags) + build.SUFFIX)
    if not anew and build.intact(library):
        _check_owner(library)
        _used(library)
        return library
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(place / f"{kind}.lock") as locked:
            if anew or not build.intact(library):  # another process may have built it
                if locked:
                    _sweep(place, kind)
                _build(kind, library, targets, flags, anew)
            _check_owner(library)
    except OSError as error:
        raise build.BuildError(f"the cache {place} cannot be written to: {error}") from error
    return library


def _build(
    kind: str, library: Path, targets: Sequence[str], flags: Sequence[str], anew: bool
) -> None:
    name, seconds = kind.upper(), build.estimate(kind, targets)
    # A warning, since Python shows it unasked: a minute without a word looks like a fault.
    what = f"building the {name} extension for {' '.join(targets)}, once: about {seconds} s"
    log.warning("%s", what)
    objects = library.parent / "objects"
    objects.mkdir(exist_ok=True)
    start = time.monotonic()
    build.checksum_of(library).unlink(missing_ok=True)
    job = partial(_object, objects, anew)
    build.build(kind, library, targets, flags=flags, compile_job=job)
    library.chmod(0o755)
    build.seal(library)
    log.info("built the %s extension in %.0f s: %s", name, time.monotonic() - start, library)


def _object(objects: Path, anew: bool, job: build.Job, out: Path) -> str:
    """A job's object file at `out`: the kept one, or compiled and kept."""
    kept = objects / f"{job.key}.o"
    if not anew and build.intact(kept):
        with contextlib.suppress(OSError):
            shutil.copyfile(kept, out)
            _used(kept)
            return ""
    output = build.compile_object(job, out)
    part = objects / f"{job.key}.{os.getpid()}.part"
    shutil.copyfile(out, part)
    os.replace(part, kept)
    build.seal(kept)
    return output


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Inside, no other process builds; False where the system cannot promise it."""
    try:
        import fcntl
    except ImportError:
        yield False
        return
    with open(path, "w") as file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("waiting for another process that builds the extension")
                fcntl.flock(file, fcntl.LOCK_EX)
            held = True
        except OSError:  # some network file systems; builds are renamed into place all the same
            held = False
        yield held


def _used(path: Path) -> None:
    """Note that `path` is in use: what was used last is swept last."""
    with contextlib.suppress(OSError):
        os.utime(path)


def _sweep(place: Path, kind: str) -> None:
    """Remove what killed builds left, and the libraries and objects that were longest unused.

    The lock is held: no build of this kind is under way. A library that a process has loaded stays
    in its memory when its file is gone.
    """
    for left in place.glob(f"build-{kind}-*"):
        shutil.rmtree(left, ignore_errors=True)
    _keep(place.glob(f"trm_fast_{kind}-*{build.SUFFIX}"), MOST_LIBRARIES)
    _keep((place / "objects").glob("*.o"), MOST_OBJECTS)
    _keep(place.glob("native-*"), MOST_LIBRARIES)
    hour_ago = time.time() - 3600
    for part in [*place.glob("*.part"), *(place / "objects").glob("*.part")]:
        with contextlib.suppress(OSError):
            if part.stat().st_mtime < hour_ago:
                part.unlink()


def _keep(files: Iterator[Path], count: int) -> None:
    dated = []
    for path in files:
        with contextlib.suppress(OSError):
            dated.append((path.stat().st_mtime, path))
    for _, path in sorted(dated)[: max(0, len(dated) - count)]:
        with contextlib.suppress(OSError):
            path.unlink()
            build.checksum_of(path).unlink(missing_ok=True)
