"""token_mix: rms_norm over the tokens of h + SwiGLU along the tokens, in the layout [B,S,D].

Keeps g and u for backward, in a layout of the kernel's own; their product is made again.

Dims legend: B batch, S tokens incl. prefix, D width, F inner width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trm_fast.extension._common import (
    EXTENSION,
    check,
    mismatch,
    unsupported,
    unsupported_dtype,
    unsupported_width,
)
from trm_fast.kernels.registration import register

__all__ = ["token_mix", "unsupported"]


def _fwd_fake(
    s: Tensor, gate_up: Tensor, down: Tensor, eps: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, width = s.shape
    gu = s.new_empty(batch if keep else 0, 2 * down.shape[1], width)
    return torch.empty_like(s), s.new_empty(batch, width, dtype=torch.float32), gu


def _bwd_fake(
    grad: Tensor,
    s: Tensor,
    gate_up: Tensor,
    down: Tensor,
    out: Tensor,
    rstd: Tensor,
    gu: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(s), torch.empty_like(gate_up), torch.empty_like(down)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    s, gate_up, down, _, _ = inputs
    out, rstd, gu = output
    ctx.save_for_backward(s, gate_up, down, out, rstd, gu)
    ctx.mark_non_differentiable(rstd, gu)


def _backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    return *_bwd(grad.contiguous(), *ctx.saved_tensors), None, None


_bwd = register(
    EXTENSION,
    "token_mix_bwd(Tensor grad, Tensor s, Tensor gate_up, Tensor down, Tensor out, Tensor rstd,"
    " Tensor gu) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
)
_fwd = register(
    EXTENSION,
    "token_mix(Tensor s, Tensor gate_up, Tensor down, float eps, bool keep)"
    " -> (Tensor, Tensor, Tensor)",
    _fwd_fake,
    save=_save,
    backward=_backward,
)


def token_mix(h: Tensor, w_gate_up: Tensor, w_down: Tensor, eps: float) -> Tensor:
    """h [B,S,D], w_gate_up [2F,S], w_down [S,F] -> [B,S,D]; see `trm_fast.ops`.

    Raises:
        ValueError: a dtype, width or shapes that the kernel does not serve.
    """
    tokens, inner = h.shape[1], w_down.shape[-1]
    check(
        "token_mix",
        unsupported_dtype(h.dtype),
        unsupported_width(h.shape[-1]),
        mismatch("w_gate_up", w_gate_up, (2 * inner, tokens), h),
        mismatch("w_down", w_down, (tokens, inner), h),
    )
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (h, w_gate_up, w_down))
    return _fwd(h.contiguous(), w_gate_up.contiguous(), w_down.contiguous(), eps, keep)[0]
