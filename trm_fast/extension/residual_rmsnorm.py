"""residual_rmsnorm: rms_norm(h + u) along the features or the tokens.

The sum is rounded first, as the reference rounds it. Formula, r = 1 / sqrt(mean(t^2) + eps):
y = r t, dt = r (dy - y mean(dy y)). The backward keeps y, which its reader keeps anyway, and r:
in bfloat16 this costs one rounding of y in the projection, and saves the sum.

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

__all__ = ["residual_rmsnorm", "unsupported"]

FEATURES, TOKENS = 2, 1  # the axes of [B, S, D] that a norm can run along


def _fwd_fake(h: Tensor, u: Tensor, axis: int, eps: float) -> tuple[Tensor, Tensor]:
    rstd = h.new_empty(h.shape[0], h.shape[3 - axis], dtype=torch.float32)
    return torch.empty_like(h), rstd


def _bwd_fake(grad: Tensor, out: Tensor, rstd: Tensor, axis: int) -> Tensor:
    return torch.empty_like(grad)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.axis = inputs[2]
    ctx.save_for_backward(*output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor, Tensor, None, None]:
    d = _bwd(grad.contiguous(), *ctx.saved_tensors, ctx.axis)
    return d, d, None, None


_bwd = register(
    EXTENSION,
    "residual_rmsnorm_bwd(Tensor grad, Tensor out, Tensor rstd, int axis) -> Tensor",
    _bwd_fake,
)
_fwd = register(
    EXTENSION,
    "residual_rmsnorm(Tensor h, Tensor u, int axis, float eps) -> (Tensor, Tensor)",
    _fwd_fake,
    save=_save,
    backward=_backward,
)


def residual_rmsnorm(h: Tensor, u: Tensor, axis: int, eps: float) -> Tensor:
    """h, u [B,S,D] -> rms_norm(h + u) [B,S,D], in the memory layout of h; see `trm_fast.ops`.

    Raises:
        ValueError: a dtype or shapes that the kernel does not serve, another axis.
    """
    known = h.dim() == 3 and axis in (FEATURES, TOKENS, FEATURES - 3, TOKENS - 3)
    check(
        "residual_rmsnorm",
        unsupported_dtype(h.dtype, h.device),
        mismatch("u", u, h.shape, h),
        None
        if known
        else f"normalises [B, S, D] along axis 1 (tokens) or 2 (features), not {axis}",
    )
    axis %= 3
    swapped, (h, u) = batch_major(h, u)
    if not swapped:
        return _fwd(h, u, axis, eps)[0]
    if axis == FEATURES:
        return _fwd(h, u, axis, eps)[0].transpose(0, 1)
    # Token-major, each column of [S, B*D] is a vector along the tokens: one item of width B*D.
    out, _ = _fwd(h.flatten(1).unsqueeze(0), u.flatten(1).unsqueeze(0), axis, eps)
    return out.view(h.shape).transpose(0, 1)
