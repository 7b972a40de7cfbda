"""linear_rmsnorm: rms_norm(h + a @ w.T), the output projection of attention with its epilogue.

Dims legend: B batch, S tokens incl. prefix, D width, E input width, N = B*S rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trm_fast.extension import _common
from trm_fast.extension._common import (
    EXTENSION,
    Shape,
    check,
    mismatch,
    unsupported_dtype,
    unsupported_width,
)
from trm_fast.kernels.registration import register

__all__ = ["linear_rmsnorm", "unsupported"]


def _fwd_fake(a: Tensor, w: Tensor, h: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(h), h.new_empty(len(h), dtype=torch.float32)


def _bwd_fake(
    grad: Tensor, a: Tensor, w: Tensor, out: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(a), torch.empty_like(w), torch.empty_like(grad)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a, w, _, _ = inputs
    out, rstd = output
    ctx.save_for_backward(a, w, out, rstd)
    ctx.mark_non_differentiable(rstd)


def _backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *_bwd(grad.contiguous(), *ctx.saved_tensors), None


_bwd = register(
    EXTENSION,
    "linear_rmsnorm_bwd(Tensor grad, Tensor a, Tensor w, Tensor out, Tensor rstd)"
    " -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
)
_fwd = register(
    EXTENSION,
    "linear_rmsnorm(Tensor a, Tensor w, Tensor h, float eps) -> (Tensor, Tensor)",
    _fwd_fake,
    save=_save,
    backward=_backward,
)


def linear_rmsnorm(a: Tensor, w: Tensor, h: Tensor, eps: float) -> Tensor:
    """a [B,S,E], w [D,E], h [B,S,D] -> rms_norm(h + a @ w.T) [B,S,D]; see `trm_fast.ops`.

    Raises:
        ValueError: a dtype, width or shapes that the kernel does not serve.
    """
    batch, tokens, width = h.shape
    inner = a.shape[-1]
    check(
        "linear_rmsnorm",
        unsupported_dtype(h.dtype),
        unsupported_width(width),
        unsupported_width(inner, "width of a"),
        mismatch("a", a, (batch, tokens, inner), h),
        mismatch("w", w, (width, inner), h),
    )
    out, _ = _fwd(a.flatten(0, 1).contiguous(), w.contiguous(), h.flatten(0, 1).contiguous(), eps)
    return out.view(h.shape)


def unsupported(dtype: torch.dtype, config: Shape | None, device: torch.device) -> str | None:
    """Why the op cannot serve, or None; heads may leave some features unattended."""
    reason = _common.unsupported(dtype, config, device)
    if reason or config is None or config.mlp_t:
        return reason
    attended = config.hidden_size // config.num_heads * config.num_heads
    return unsupported_width(attended, "width of all heads")
