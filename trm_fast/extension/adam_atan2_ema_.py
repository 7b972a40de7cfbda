"""adam_atan2_ema_: one optimizer step, the moving average and the low-precision copies, in place.

Every list may mix float32 and bfloat16; what is computed is float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trm_fast.extension._common import EXTENSION, Shape, check, unsupported_dtype
from trm_fast.kernels.coefficients import step_coefficients
from trm_fast.kernels.registration import register

__all__ = ["adam_atan2_ema_", "unsupported"]


def _fake(*args: Any) -> None:
    """Nothing is returned."""


_step = register(
    EXTENSION,
    "adam_atan2_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs,"
    " Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] emas, Tensor(e!)[] copies, Tensor coefficients,"
    " float beta1, float beta2) -> ()",
    _fake,
    mutates=(0, 2, 3, 4, 5),
)


def unsupported(dtype: torch.dtype, config: Shape | None, device: torch.device) -> str | None:
    """Why the op cannot serve, or None."""
    return unsupported_dtype(dtype, device)


def _unequal(lists: Sequence[Sequence[Tensor]]) -> str | None:
    lengths = [len(tensors) for tensors in lists]
    if len(set(lengths)) > 1:
        return f"needs as many gradients and averages as parameters, not {lengths}"
    return None


def adam_atan2_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor],
    copies: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    beta1: float,
    beta2: float,
    step: int | Tensor,
    ema_decay: float | Tensor,
    grad_scale: float | Tensor = 1.0,
    found_inf: float | Tensor = 0.0,
) -> None:
    """One optimizer step over lists of tensors, in place; see `trm_fast.ops`.

    A list of averages or copies may end early.

    Raises:
        ValueError: a dtype that the kernel does not serve, lists or tensors of unequal size.
    """
    given = (params, grads, exp_avgs, exp_avg_sqs, emas, copies)
    dtypes = {t.dtype for tensors in given for t in tensors}
    check(
        "adam_atan2_ema_",
        *map(unsupported_dtype, sorted(dtypes, key=str)),
        _unequal(given[:4]),
        *(
            f"needs tensors of {list(p.shape)} for a parameter of that shape, not {list(t.shape)}"
            for tensors in given[1:]
            for p, t in zip(params, tensors, strict=False)
            if t.shape != p.shape
        ),
    )
    # Elements are paired by their place in memory; views of other strides are taken through copies.
    dense = [[t.contiguous() for t in tensors[: len(params)]] for tensors in given]
    if params:  # without a tensor there is no device to run on
        coefficients = step_coefficients(
            params[0].device, lr, weight_decay, beta1, beta2, step, ema_decay, grad_scale, found_inf
        )
        _step(*dense, coefficients.float(), beta1, beta2)
    for position in (0, 2, 3, 4, 5):
        for t, computed in zip(given[position], dense[position], strict=False):
            if computed is not t:
                t.copy_(computed)
