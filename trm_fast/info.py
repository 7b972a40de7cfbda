"""`trm-fast info`: versions, devices, threads, and which implementation serves which op, and why.

With `--memory` what fits GPUs of which size (`fits.py`). Owns gathering and showing these facts.
Imported by `__main__.py` only.
"""

import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from typing import Any

import torch

from trm_fast import __version__, backends, fits, memory
from trm_fast.console import Parser, say, show_builds
from trm_fast.extension import library

__all__ = ["gather", "main"]

REQUIRED = ("torch", "numpy", "safetensors", "einops")
# package -> what it is for
OPTIONAL = {
    "triton": "Triton kernels (Linux)",
    "matplotlib": "learning_curve.png, pip install 'trm-fast[viz]'",
    "pillow": "pictures, pip install 'trm-fast[viz]'",
    "pyyaml": "YAML configurations, pip install 'trm-fast[compat]'",
}
# The dtype that each device's backend table is made for: what a model there usually runs in.
USUAL_DTYPE = {"cpu": torch.float32, "mps": torch.float32, "cuda": torch.bfloat16}


def gather() -> dict[str, Any]:
    """The facts, ready for JSON.

    Returns:
        versions: package -> version or None.  devices: name, available, detail, the CPU first.
        threads: torch, cores, wait_policy.  built: backend, ops (a count), detail.
        backends: device -> rows of op, implementation, reason.
    """
    devices = [_cpu(), _cuda(), _mps()]
    return {
        "versions": _versions(),
        "devices": devices,
        "threads": {
            "torch": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        },
        "built": [_built(name) for name in backends.BACKENDS],
        "backends": {d["name"]: _table(d["name"]) for d in devices if d["available"]},
    }


def _versions() -> dict[str, str | None]:
    known = {"trm_fast": __version__, "python": platform.python_version()}
    return known | {name: _installed(name) for name in (*REQUIRED, *OPTIONAL)}


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    detail = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return {"name": "cpu", "available": True, "detail": detail}


def _cuda() -> dict[str, Any]:
    if torch.version.cuda is None and torch.version.hip is None:
        detail = "this PyTorch was built without CUDA"
    elif not torch.cuda.is_available():
        detail = "PyTorch finds no CUDA device or driver"
    else:
        detail = "; ".join(map(_gpu, range(torch.cuda.device_count())))
    return {"name": "cuda", "available": torch.cuda.is_available(), "detail": detail}


def _gpu(index: int) -> str:
    about = torch.cuda.get_device_properties(index)
    return f"{about.name}, sm_{about.major}{about.minor}, {about.total_memory / 2**30:.0f} GiB"


def _mps() -> dict[str, Any]:
    available = torch.backends.mps.is_available()
    if available:
        detail = "Apple GPU; no float64 there, float32 by default"
    elif torch.backends.mps.is_built():
        detail = "needs an Apple GPU and macOS 14 or newer"
    else:
        detail = "this PyTorch was built without MPS"
    return {"name": "mps", "available": available, "detail": detail}


def _built(backend: str) -> dict[str, Any]:
    ops = sum(row.backend == backend for row in backends.ROWS)
    if backend == "reference":
        detail = "plain PyTorch, on every device; nothing to build"
    elif ops == 0:
        detail = "not in this version"
    else:
        detail = f"{ops} ops" + _library(backend)
    return {"backend": backend, "ops": ops, "detail": detail}


def _library(backend: str) -> str:
    """Where the compiled library of a backend comes from; builds it if need be."""
    kind = backends.LIBRARIES.get(backend)
    if kind is None or (kind == "cuda" and not torch.cuda.is_available()):
        return ""
    state = library.state(kind)
    if library.unavailable(kind) is not None:
        return f"; not compiled: {state}"
    return f"; {state}, for {library.instruction_set()}" if kind == "cpu" else f"; {state}"


def _table(device: str) -> list[dict[str, str]]:
    choices = backends.report("auto", torch.device(device), USUAL_DTYPE[device])
    return [{"op": c.op, "implementation": c.implementation, "reason": c.reason} for c in choices]


def _text(facts: dict[str, Any]) -> str:
    lines = []
    for name, version in facts["versions"].items():
        lines.append(f"{name} {version}" if version else f"{name} not there: {OPTIONAL.get(name)}")
    lines += ["", "devices"]
    for device in facts["devices"]:
        mark = "yes" if device["available"] else "no"
        lines.append(f"  {device['name']:<6}{mark:<5}{device['detail']}")
    threads = facts["threads"]
    lines.append(
        f"  threads: {threads['torch']} of {threads['cores']} cores, "
        f"OpenMP wait policy {threads['wait_policy']}"
    )
    lines += ["", "implementations"]
    for built in facts["built"]:
        lines.append(f"  {built['backend']:<11}{built['detail']}")
    for device, rows in facts["backends"].items():
        lines += ["", f"what backend=auto takes on {device}"]
        reasons: dict[str, list[str]] = {}
        for row in rows:
            lines.append(f"  {row['op']:<18}{row['implementation']}")
            reasons.setdefault(row["reason"], []).append(row["op"])
        for reason, ops in reasons.items():
            some = f" for {', '.join(ops)}" if len(reasons) > 1 else ""
            lines.append(f"  why no other{some}: {reason}")
    return "\n".join(lines)


def _memory(found: list[fits.Fit]) -> str:
    usable = f"{fits.USABLE:.0%} of the memory counted as usable"
    lines = [f"most boards of a training step on a GPU, computed, {usable}", "", fits.text(found)]
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory / memory.GIB
        lines += ["", f"the GPU here has {total:.1f} GiB"]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the facts as text, or with `--json` as JSON. Returns 0."""
    parser = Parser("trm-fast info", __doc__.splitlines()[0].partition(": ")[2])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--memory", action="store_true", help="what fits GPUs of 6 to 80 GB, computed"
    )
    options = parser.parse_args(argv)
    if options.memory:
        found = fits.table()
        say(json.dumps(fits.to_json(found), indent=2) if options.json else _memory(found))
        return 0
    show_builds()
    facts = gather()
    say(json.dumps(facts, indent=2) if options.json else _text(facts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
