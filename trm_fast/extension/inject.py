"""inject: z + (y + x), how the recursion shows the latent state the question and the answer.

Both sums are rounded, as published. The gradient to each input is that of the result.

Dims legend: B batch, S tokens incl. prefix, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trm_fast.extension._common import (
    EXTENSION,
    batch_major,
    check,
    mismatch,
    unsupported,
    unsupported_dtype,
)
from trm_fast.kernels.registration import register

__all__ = ["inject", "unsupported"]


def _fwd_fake(z: Tensor, y: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(z)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return grad, grad, grad


_fwd = register(
    EXTENSION, "inject(Tensor z, Tensor y, Tensor x) -> Tensor", _fwd_fake, backward=_backward
)


def inject(z: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """z, y, x: [B,S,D] -> z + (y + x) [B,S,D] in the memory layout of z; see `trm_fast.ops`.

    Raises:
        ValueError: a dtype or shapes that the kernel does not serve.
    """
    check(
        "inject",
        unsupported_dtype(z.dtype, z.device),
        mismatch("y", y, z.shape, z),
        mismatch("x", x, z.shape, z),
    )
    swapped, (z, y, x) = batch_major(z, y, x)
    out = _fwd(z, y, x)
    return out.transpose(0, 1) if swapped else out
