"""How a kernel is launched, or recorded instead.

Every kernel is launched through `run`, so that `report` compiles exactly what would be launched: it
calls the same host functions on tensors without memory, inside `recording`.
Owns the switch of programmatic dependent launch (PDL): a kernel is brought onto the GPU while the
one in front of it still runs, and waits there (`_common.begin`).
Imported by `launch`, the op modules and `report`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

ARCHITECTURES = (80, 90, 100)


class Settings(Protocol):
    """What `run` reads of a row of `launch.ROWS`."""

    arch: int
    tiles: Mapping[str, int]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Launch:
    """One launch that was recorded: the kernel, its settings and its arguments by name.

    Of tensors only the type is kept, not what they hold.
    """

    kernel: Any
    row: Any
    args: dict[str, Any]


_recorded: list[Launch] | None = None
_forced: int | None = None
_pdl = os.environ.get("TRM_FAST_PDL") == "1"
if os.environ.get("TRM_FAST_PDL", "") not in ("", "0", "1"):
    raise ValueError(f"TRM_FAST_PDL is 0 or 1, not {os.environ['TRM_FAST_PDL']!r}")


def architecture(device: torch.device) -> int:
    """The family of GPUs whose rows serve `device`; without a GPU, the one the design is for."""
    if _forced is not None:
        return _forced
    if device.type != "cuda":
        return 90
    return _family(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _family(index: int) -> int:
    return {9: 90, 10: 100}.get(torch.cuda.get_device_capability(index)[0], 80)


@contextmanager
def forced_architecture(arch: int) -> Iterator[None]:
    """Inside, every device counts as `arch`: for tests of each family's code, interpreted."""
    global _forced
    before, _forced = _forced, arch
    try:
        yield
    finally:
        _forced = before


@contextmanager
def dependent_launches(on: bool = True) -> Iterator[None]:
    """Inside, PDL is on or off for the whole process; outside it is on with TRM_FAST_PDL=1."""
    global _pdl
    before, _pdl = _pdl, on
    try:
        yield
    finally:
        _pdl = before


def has_dependent_launches(device: torch.device) -> bool:
    """Whether kernels on `device` may be launched so: what is compiled for sm_90 or newer."""
    launched = device.type == "cuda" and not triton.knobs.runtime.interpret
    return architecture(device) >= 90 and (launched or _recorded is not None)


@contextmanager
def recording(arch: int) -> Iterator[list[Launch]]:
    """Inside, nothing is launched; the list takes what would have been."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        with forced_architecture(arch):
            yield _recorded
    finally:
        _recorded = before


def descriptor(t: Tensor, block: Sequence[int], row: Settings) -> Tensor | TensorDescriptor:
    """What `_common.tiles` takes for contiguous `t`: a host descriptor with TMA, else `t`."""
    assert t.is_contiguous(), "tiles are of contiguous tensors"
    if row.arch < 90:
        return t
    strides = [1]  # not the tensor's: those of axes of one element are arbitrary
    for size in reversed(t.shape[1:]):
        strides.insert(0, strides[0] * size)
    return TensorDescriptor(t, list(t.shape), strides, list(block))


def _outline(value: Any) -> Any:
    """`value` without the memory of its tensor."""
    if isinstance(value, TensorDescriptor):
        return replace(value, base=value.base.new_empty(0))
    return value.new_empty(0) if isinstance(value, Tensor) else value


def options(row: Settings, args: Mapping[str, Any]) -> dict[str, Any]:
    """How to compile and launch with these arguments: never with one half of PDL alone."""
    pdl = {"launch_pdl": True} if args["PDL"] else {}
    return {"num_warps": row.num_warps, "num_stages": row.num_stages, **pdl}


def run(kernel: Any, grid: tuple[int, ...], row: Settings, like: Tensor, **args: Any) -> None:
    """kernel[grid](**args) with the settings of `row`, on the device of `like`.

    The kernel's last argument, PDL, is added here.
    """
    args |= row.tiles
    args["PDL"] = _pdl and has_dependent_launches(like.device)
    if _recorded is not None:
        outlines = {name: _outline(value) for name, value in args.items()}
        _recorded.append(Launch(kernel, row, outlines))
        return
    if like.device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise RuntimeError(
            "Triton kernels take CPU tensors only in the interpreter: TRITON_INTERPRET=1 in the "
            "environment before Python starts"
        )
    how = options(row, args)
    if like.device.type == "cuda" and like.device.index != torch.cuda.current_device():
        with torch.cuda.device(like.device):
            kernel[grid](**args, **how)
    else:
        kernel[grid](**args, **how)
