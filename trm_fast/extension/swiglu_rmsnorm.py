"""swiglu_rmsnorm: rms_norm(h + W_down(silu(g) * u)), the channel MLP of a block.

Dims legend: B batch, S tokens incl. prefix, D width, F inner width, N = B*S rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trm_fast.extension._common import (
    check,
    mismatch,
    register_gated,
    round_up,
    unsupported,
    unsupported_dtype,
    unsupported_width,
)

__all__ = ["swiglu_rmsnorm", "unsupported"]


def _fwd_fake(
    h: Tensor, gate_up: Tensor, down: Tensor, eps: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    count = len(h)
    gu = h.new_empty(count if keep else 0, 2 * round_up(down.shape[1]))
    return torch.empty_like(h), h.new_empty(count, dtype=torch.float32), gu


_fwd, _bwd = register_gated("swiglu_rmsnorm", _fwd_fake)


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
