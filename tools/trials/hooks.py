"""Changes to a process that is about to train: called in it, after it was forked."""

from __future__ import annotations

import builtins
import errno
import math
import os
import time
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch

from trm_fast.progress import StatusLine
from trm_fast.trainer import Trainer


def failing_operations(k: int) -> None:
    """The k-th operation that changes the disk below runs/, and all after it, find it full."""
    left = [k]

    def count(what: object) -> None:
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(what))

    def wrapped(module: Any, name: str) -> None:
        original = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            count(name)
            return original(*args, **kwargs)

        setattr(module, name, call)

    for module, name in (
        (os, "mkdir"),
        (os, "fsync"),
        (os, "rename"),
        (os, "replace"),
        (safetensors.torch, "save_file"),
        (torch, "save"),
    ):
        wrapped(module, name)
    opened = builtins.open

    def open_(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if set(mode) & set("wax"):
            count(file)
        return opened(file, mode, *args, **kwargs)

    builtins.open = open_  # type: ignore[assignment]


def before_step(when: Callable[[int], bool], act: Callable[[Trainer], None]) -> None:
    """Call `act` before the steps that `when` chooses, counted from 1."""
    real = Trainer.advance

    def advance(trainer: Trainer, *batch: Any) -> None:
        if when(trainer.step + 1):
            act(trainer)
        real(trainer, *batch)

    Trainer.advance = advance  # type: ignore[method-assign]


def no_memory(step: int) -> None:
    """The step asks for more memory than there is."""
    before_step(lambda now: now == step, lambda trainer: torch.empty(1 << 60, dtype=torch.uint8))


class _NaN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * math.nan


def spoiled_gradients(steps: set[int]) -> None:
    """The gradients of these steps are NaN; their loss is not."""

    def spoil(trainer: Trainer) -> None:
        step = trainer.train_step
        real = step.forward

        def forward(**kwargs: Any) -> Any:
            step.forward = real
            carry, loss, *rest = real(**kwargs)
            return (carry, _NaN.apply(loss), *rest)

        step.forward = forward

    before_step(lambda now: now in steps, spoil)


def bad_clock(jumps: list[tuple[int, float]]) -> None:
    """Both clocks of Python jump by some seconds at some of their readings."""
    real, read, ahead = {n: getattr(time, n) for n in ("time", "monotonic")}, [0], [0.0]
    left = dict(jumps)

    def clock(name: str) -> Callable[[], float]:
        def now() -> float:
            read[0] += 1
            ahead[0] += left.pop(read[0], 0.0)
            return float(real[name]() + ahead[0])

        return now

    time.time, time.monotonic = clock("time"), clock("monotonic")
    defaults = StatusLine.__init__.__kwdefaults__
    assert defaults is not None and "clock" in defaults
    defaults["clock"] = time.monotonic
