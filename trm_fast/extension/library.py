"""Load the compiled libraries, building them on first use; or say why they are not there.

TRM_FAST_EXT=auto (the default) logs one warning where something is in the way and goes on without;
`off` is silent; `require` raises with everything that the compilers said. Loading belongs to
the building of a model, never to a compiled forward. Imported by `trm_fast.backends` and tests.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from trm_fast.extension import build, cache

log = logging.getLogger("trm_fast.extension")

MODES = ("auto", "off", "require")
PREBUILT = Path(__file__).resolve().parents[1] / "_lib"  # what setup.py fills
PREBUILT_STATE, BUILT_STATE = "prebuilt", "built"

_lock = threading.RLock()
_states: dict[str, str] = {}  # kind -> "prebuilt", "built" or the reason why it is not there
_paths: dict[str, Path] = {}  # kind -> what was loaded
_errors: dict[str, build.BuildError] = {}  # what TRM_FAST_EXT=require raises, again and again


def unavailable(kind: str) -> str | None:
    """Why the library `kind` ("cpu", "cuda") cannot be used, or None: it is loaded.

    The first call may build it, which takes a minute or so.

    Raises:
        BuildError: TRM_FAST_EXT=require, and it cannot be built or loaded.
        ValueError: TRM_FAST_EXT is none of `MODES`.
    """
    found = state(kind)
    return None if kind in _paths else found


def state(kind: str) -> str:
    """ "prebuilt" (in the installed package), "built" (here, into the cache), or `unavailable`'s
    reason. Loads the library as that does."""
    if kind not in build.KINDS:
        raise ValueError(f"kind is one of {', '.join(build.KINDS)}, not {kind!r}")
    with _lock:
        if kind in _errors:
            raise _errors[kind]
        if kind not in _states:
            if torch.compiler.is_compiling():
                raise RuntimeError(f"the {kind} extension must be loaded before it is traced")
            _states[kind] = _load_or_say_why(kind)
        return _states[kind]


def instruction_set() -> str | None:
    """What the CPU kernels in use were compiled for, or None: they are not loaded."""
    with _lock:
        return _instruction_set(_paths["cpu"]) if "cpu" in _paths else None


def kept_memory() -> int:
    """Bytes that the CPU library keeps for its next call, and no tensor uses."""
    with _lock:
        if "cpu" not in _paths:
            return 0
        ask = ctypes.CDLL(str(_paths["cpu"])).trm_fast_kept_memory
        ask.restype = ctypes.c_int64
        return int(ask())


def release_memory() -> None:
    """Give what `kept_memory` counts back to the system; the next step takes it anew."""
    with _lock:
        if "cpu" in _paths:
            ctypes.CDLL(str(_paths["cpu"])).trm_fast_release_memory()


def load_for_tests(targets: Sequence[str], flags: Sequence[str] = ()) -> str:
    """Build and load a CPU library of these instruction sets, with these compiler flags, instead of
    the one that `unavailable` would take. Only before that: a process loads one. Returns the
    instruction set in use."""
    with _lock:
        if _states:
            raise RuntimeError("the extension is loaded already")
        _states["cpu"] = _build_and_load("cpu", targets, flags)
        return _instruction_set(_paths["cpu"])


def _load_or_say_why(kind: str) -> str:
    mode = os.environ.get("TRM_FAST_EXT") or "auto"
    if mode not in MODES:
        raise build.BadMode(f"TRM_FAST_EXT is one of {', '.join(MODES)}, not {mode!r}")
    if mode == "off":
        return "TRM_FAST_EXT=off"
    try:
        return _load(kind)
    except build.BuildError as error:
        if mode == "require":
            _errors[kind] = error
            raise
        if isinstance(error, build.NothingToBuildWith):
            log.info("no %s extension: %s", kind, error.reason)
        else:
            log.warning(
                "trm_fast goes on without its compiled %s extension: %s", kind, error.reason
            )
        return error.reason


def _load(kind: str) -> str:
    capability = torch.cuda.get_device_capability() if _has_gpu(kind) else None
    path = _prebuilt(kind, capability)
    if path is None:
        return _load_built(kind, capability)
    error = _try(kind, path)
    if error is None:
        return PREBUILT_STATE
    log.info("the prebuilt %s extension does not load: %s", kind, error)
    try:
        return _load_built(kind, capability)
    except build.BuildError as other:
        reason = f"the prebuilt one does not load ({error.splitlines()[0]}), and {other.reason}"
        raise type(other)(reason, str(other)) from other


def _load_built(kind: str, capability: tuple[int, int] | None) -> str:
    if kind == "cpu":
        if _try(kind, cache.for_this_machine()) is None:
            return BUILT_STATE
        return _build_and_load(kind, [build.native_set()], anew=True)
    build.cuda_home()  # what is missing most often is said first
    own = [_architecture(capability)] if capability else []
    return _build_and_load(kind, build.cuda_architectures(own))


def _has_gpu(kind: str) -> bool:
    return kind == "cuda" and torch.version.cuda is not None and torch.cuda.is_available()


def _architecture(capability: tuple[int, int]) -> str:
    major, minor = capability
    return f"{major}{minor}" + ("a" if major >= 9 else "")


def _prebuilt(kind: str, capability: tuple[int, int] | None) -> Path | None:
    """The library that came with the package: of these sources, undamaged, for this GPU."""
    for path in sorted(PREBUILT.glob(f"trm_fast_{kind}-*{build.SUFFIX}")):
        targets = path.name.split("-")[1].split("+")
        serves = capability is None or any(build.cuda_serves(a, capability) for a in targets)
        if path.name == build.prebuilt_name(kind, targets) and serves and build.intact(path):
            return path
    return None


def _build_and_load(
    kind: str, targets: Sequence[str], flags: Sequence[str] = (), anew: bool = False
) -> str:
    if anew or _try(kind, cache.provide(kind, targets, flags)) is not None:
        # Made by a compiler or for a torch that are gone, or damaged before it was sealed.
        error = _try(kind, cache.provide(kind, targets, flags, anew=True))
        if error is not None:
            raise build.BuildError(f"what was built does not load: {error.splitlines()[0]}", error)
    return BUILT_STATE


def _try(kind: str, path: Path) -> str | None:
    """Load it; why not, or None."""
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return str(error.__cause__ or error)  # torch says only which file
    if kind == "cpu" and not _instruction_set(path):
        raise build.BuildError(f"this CPU cannot run what {path.name} was compiled for")
    _paths[kind] = path
    log.debug("%s extension: %s", kind, path)
    return None


def _instruction_set(path: Path) -> str:
    name = ctypes.CDLL(str(path)).trm_fast_instruction_set
    name.restype = ctypes.c_char_p
    return name().decode()
