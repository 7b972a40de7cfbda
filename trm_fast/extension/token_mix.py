"""token_mix: rms_norm over the tokens of h + SwiGLU along the tokens, in the layout [B,S,D].

Keeps g and u for backward, in a layout of the kernel's own; their product is made again.

Dims legend: B batch, S tokens incl. prefix, D width, F inner width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trm_fast.extension._common import (
    check,
    mismatch,
    register_gated,
    unsupported,
    unsupported_dtype,
    unsupported_width,
)

__all__ = ["token_mix", "unsupported"]


def _fwd_fake(
    h: Tensor, gate_up: Tensor, down: Tensor, eps: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, width = h.shape
    gu = h.new_empty(batch if keep else 0, 2 * down.shape[1], width)
    return torch.empty_like(h), h.new_empty(batch, width, dtype=torch.float32), gu


_fwd, _bwd = register_gated("token_mix", _fwd_fake)


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
        None if tokens and inner else f"needs tokens to mix, not {tokens} by {inner}",
        mismatch("w_gate_up", w_gate_up, (2 * inner, tokens), h),
        mismatch("w_down", w_down, (tokens, inner), h),
    )
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (h, w_gate_up, w_down))
    return _fwd(h.contiguous(), w_gate_up.contiguous(), w_down.contiguous(), eps, keep)[0]
