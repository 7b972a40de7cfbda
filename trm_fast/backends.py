"""The only place that chooses an implementation for each operation.

A row says which backend implements which operation and, for a device, dtype and model shape, why
it would not serve. `auto` takes the first row of `BACKENDS` that serves. A backend named by the
user that cannot serve raises with the reason; what it does not have at all, the reference serves
("cuda" has the recursion and the state updates only). Choosing happens when a model is built or
moved, never inside a kernel. A backend's code is imported when a row of it is first asked for:
where there is no GPU, Triton is never loaded. Imported by `model.py`, `losses.py` and `info.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from trm_fast import flops, reference
from trm_fast.config import ModelConfig, did_you_mean
from trm_fast.extension import library
from trm_fast.ops import OP_NAMES, Ops

# In the order in which `auto` tries them. The CUDA library serves where Triton does not.
BACKENDS = ("triton", "cuda", "cpp", "reference")
# Operations that the compiled libraries have.
EXTENSION_OPS = {
    "cpp": OP_NAMES,
    "cuda": ("embed_reset", "inject", "residual_rmsnorm", "swiglu", "deep_recursion"),
}
LIBRARIES = {"cpp": "cpu", "cuda": "cuda"}  # backend -> library, which is also the device's type


@dataclass(frozen=True)
class Row:
    """One implementation of one operation; `unsupported` returns None where it serves."""

    op: str
    backend: str
    load: Callable[[], Callable[..., Any]]
    unsupported: Callable[[torch.device, torch.dtype, ModelConfig | None], str | None]


@dataclass(frozen=True)
class Choice:
    """What was chosen for one operation, and why nothing faster was."""

    op: str
    implementation: str
    reason: str


def _reference_unsupported(
    op: str, device: torch.device, dtype: torch.dtype, config: ModelConfig | None
) -> str | None:
    quantized = op == "deep_recursion" and config is not None and config.quantize == "fp8"
    return "PyTorch has no 8-bit floats there" if quantized and device.type == "mps" else None


def _load_kernel(op: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"trm_fast.kernels.{op}"), op)


def _kernel_unsupported(
    op: str, device: torch.device, dtype: torch.dtype, config: ModelConfig | None
) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return "serves NVIDIA GPUs only"
    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU here"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in (8, 9, 10):
        return f"serves compute capabilities 8.0 to 10.3, this GPU has {major}.{minor}"
    try:
        kernel = importlib.import_module(f"trm_fast.kernels.{op}")
    except (ImportError, AttributeError) as error:  # too old, or broken
        return f"this Triton cannot be used: {str(error).splitlines()[0]}"
    return kernel.unsupported(dtype, config, device)


def _no_gpu(device: torch.device) -> str | None:
    """Why the CUDA library has nothing to run on."""
    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU here"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:  # PyTorch's FlashAttention and fast products of bfloat16 begin there
        return f"serves compute capabilities from 8.0 on, this GPU has {major}.{minor}"
    return None


def _load_extension(op: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"trm_fast.extension.{op}"), op)


def _extension_unsupported(
    backend: str, op: str, device: torch.device, dtype: torch.dtype, config: ModelConfig | None
) -> str | None:
    kind = LIBRARIES[backend]
    if device.type != kind or (kind == "cuda" and torch.version.hip is not None):
        return "serves CPUs only" if kind == "cpu" else "serves NVIDIA GPUs only"
    if kind == "cuda" and (reason := _no_gpu(device)):
        return reason
    reason = importlib.import_module(f"trm_fast.extension.{op}").unsupported(dtype, config, device)
    if reason is None and (missing := library.unavailable(kind)):
        reason = f"there is no compiled library ({missing})"
    return reason


ROWS: tuple[Row, ...] = (
    *(
        Row(op, "triton", partial(_load_kernel, op), partial(_kernel_unsupported, op))
        for op in OP_NAMES
    ),
    *(
        Row(op, name, partial(_load_extension, op), partial(_extension_unsupported, name, op))
        for name, served in EXTENSION_OPS.items()
        for op in served
    ),
    *(
        Row(op, "reference", partial(getattr, reference, op), partial(_reference_unsupported, op))
        for op in OP_NAMES
    ),
)


def _choose(
    op: str,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    config: ModelConfig | None,
    training: bool,
) -> tuple[Row, str]:
    rows = {row.backend: row for row in ROWS if row.op == op}
    if op == "deep_recursion" and config is not None and config.kind != "trm":
        return rows["reference"], f"unused: arch={config.kind} is composed of the others"
    if op == "deep_recursion" and config is not None and config.mixes_states(training):
        mixed = "damping comes" if config.damping < 1 else "noise in training comes"
        return rows["reference"], f"{mixed} between its passes: composed of the others"
    reasons: list[str] = []
    for backend in BACKENDS if name == "auto" else (name, "reference"):
        row = rows.get(backend)
        reason = row.unsupported(device, dtype, config) if row else "has no such operation"
        if row and reason is None:
            first = "the first choice" if name == "auto" else "named by the user"
            return row, "; ".join(reasons) or first
        reasons.append(f"{backend}: {reason}")
        if row and name != "auto":
            break
    raise ValueError(
        f"backend {name!r} cannot serve {op} on {device} in {dtype} ({'; '.join(reasons)}); "
        "backend='auto' takes what is there"
    )


def _check(name: str) -> None:
    if name not in ("auto", *BACKENDS):
        hint = did_you_mean(name, ("auto", *BACKENDS))
        raise ValueError(f"unknown backend {name!r}{hint}; allowed: auto, {', '.join(BACKENDS)}")


def select(
    name: str, device: torch.device, dtype: torch.dtype, config: ModelConfig | None = None
) -> Ops:
    """The operations that a model on `device` in `dtype` runs on, in training and in answers: where
    these differ, training composes its recursion and does not ask for `deep_recursion`.

    Args:
        name: "auto" or one of `BACKENDS`.
        device, dtype: of the states; nothing is allocated there.
        config: shapes of the model, for implementations that serve some of them only.

    Raises:
        ValueError: an unknown name, or a named backend that has an operation and cannot serve it.
    """
    _check(name)
    loaded = {op: _choose(op, name, device, dtype, config, False)[0].load() for op in OP_NAMES}
    flops.register_if_counting()
    return Ops(**loaded)


def check_device(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """ValueError where the backend `name` cannot serve `device` at all: what `select` would say,
    before the shapes of a model are known."""
    _check(name)
    _choose("residual_rmsnorm", name, device, dtype, None, False)  # every backend has it


def recursion_engine(device: torch.device, dtype: torch.dtype, config: ModelConfig) -> str:
    """Whose recursion serves training there, as `memory` names them."""
    row, _ = _choose("deep_recursion", config.backend, device, dtype, config, True)
    return row.backend


def refusing(error: ValueError) -> Ops:
    """Operations that raise `error` when they are called."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise error

    return Ops(**dict.fromkeys(OP_NAMES, refuse))


def table(backend: str) -> Ops:
    """Every operation of one backend, wherever it serves; for tests and benchmarks."""
    rows = {row.op: row.load() for row in ROWS if row.backend == backend}
    flops.register_if_counting()
    return Ops(**rows)


def report(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    config: ModelConfig | None = None,
    training: bool = False,
) -> list[Choice]:
    """What runs by `select` for the same arguments, in `training` or in answers: one line per
    operation, with the reason."""
    _check(name)
    choices = []
    for op in OP_NAMES:
        row, reason = _choose(op, name, device, dtype, config, training)
        choices.append(Choice(op, row.backend, reason))
    return choices
