"""swiglu_rmsnorm: rms_norm(h + W_down(silu(g) * u)), the channel MLP of a block.

Dims legend: B batch, S tokens incl. prefix, D width, F inner width, N = B*S rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trm_fast.extension._common import (
    EXTENSION,
    check,
    mismatch,
    round_up,
    unsupported,
    unsupported_dtype,
    unsupported_width,
)
from trm_fast.kernels.registration import register

__all__ = ["swiglu_rmsnorm", "unsupported"]


def _fwd_fake(
    x: Tensor, gate_up: Tensor, down: Tensor, eps: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    count = len(x)
    gu = x.new_empty(count if keep else 0, 2 * round_up(down.shape[1]))
    return torch.empty_like(x), x.new_empty(count, dtype=torch.float32), gu


def _bwd_fake(
    grad: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    out: Tensor,
    rstd: Tensor,
    gu: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(gate_up), torch.empty_like(down)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gate_up, down, _, _ = inputs
    out, rstd, gu = output
    ctx.save_for_backward(x, gate_up, down, out, rstd, gu)
    ctx.mark_non_differentiable(rstd, gu)


def _backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    return *_bwd(grad.contiguous(), *ctx.saved_tensors), None, None


_bwd = register(
    EXTENSION,
    "swiglu_rmsnorm_bwd(Tensor grad, Tensor x, Tensor gate_up, Tensor down, Tensor out,"
    " Tensor rstd, Tensor gu) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
)
_fwd = register(
    EXTENSION,
    "swiglu_rmsnorm(Tensor x, Tensor gate_up, Tensor down, float eps, bool keep)"
    " -> (Tensor, Tensor, Tensor)",
    _fwd_fake,
    save=_save,
    backward=_backward,
)


def swiglu_rmsnorm(h: Tensor, w_gate_up: Tensor, w_down: Tensor, eps: float) -> Tensor:
    """h [B,S,D], gate_up [2F,D], down [D,F] -> [B,S,D]; see `trm_fast.ops`.

    Raises:
        ValueError: a dtype, width or shapes that the kernel does not serve.
    """
    width, inner = h.shape[-1], w_down.shape[-1]
    check(
        "swiglu_rmsnorm",
        unsupported_dtype(h.dtype),
        unsupported_width(width),
        mismatch("w_gate_up", w_gate_up, (2 * inner, width), h),
        mismatch("w_down", w_down, (width, inner), h),
    )
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (h, w_gate_up, w_down))
    rows = h.flatten(0, 1).contiguous()
    out, _, _ = _fwd(rows, w_gate_up.contiguous(), w_down.contiguous(), eps, keep)
    return out.view(h.shape)
