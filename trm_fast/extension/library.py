"""Load the compiled libraries, building them on first use; or say why they are not there."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from trm_fast.extension import build

torch.library.define("trm_fast_ext::instruction_set", "() -> str")

_state: dict[str, str | None] = {}


def cache_folder() -> Path:
    given = os.environ.get("TRM_FAST_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(base) / "trm_fast"


def unavailable(kind: str) -> str | None:
    """Why the library `kind` cannot be used, or None: it is loaded."""
    if kind not in _state:
        _state[kind] = _load(kind)
    return _state[kind]


def _load(kind: str) -> str | None:
    if os.environ.get("TRM_FAST_EXT", "auto") == "off":
        return "TRM_FAST_EXT=off"
    sets = [build.native_set()]
    path = cache_folder() / (build.key(kind, sets) + build.SUFFIX)
    if not path.exists():
        build.build(kind, path, sets)
    torch.ops.load_library(str(path))
    return None
