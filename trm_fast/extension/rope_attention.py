"""rope_attention: rotary embedding on queries and keys, then softmax attention, of packed qkv.

Dims legend: B batch, S tokens incl. prefix, H heads, K head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trm_fast.extension._common import (
    ALIGNMENT,
    EXTENSION,
    Shape,
    check,
    unsupported_dtype,
    unsupported_width,
)
from trm_fast.kernels.registration import register

__all__ = ["rope_attention", "unsupported"]

HEAD_DIMS = range(ALIGNMENT, 129, ALIGNMENT)


def _fwd_fake(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int
) -> tuple[Tensor, Tensor]:
    batch, tokens, width = qkv.shape
    lse = qkv.new_empty(batch, heads, tokens, dtype=torch.float32)
    return qkv.new_empty(batch, tokens, width // 3), lse


def _bwd_fake(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
) -> Tensor:
    return torch.empty_like(qkv)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, cos, sin, heads = inputs
    out, lse = output
    ctx.save_for_backward(qkv, out, lse, cos, sin)
    ctx.heads = heads
    ctx.mark_non_differentiable(lse)


def _backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor, None, None, None]:
    return _bwd(grad.contiguous(), *ctx.saved_tensors, ctx.heads), None, None, None


_bwd = register(
    EXTENSION,
    "rope_attention_bwd(Tensor grad, Tensor qkv, Tensor out, Tensor lse, Tensor? cos, Tensor? sin,"
    " int heads) -> Tensor",
    _bwd_fake,
)
_fwd = register(
    EXTENSION,
    "rope_attention(Tensor qkv, Tensor? cos, Tensor? sin, int heads) -> (Tensor, Tensor)",
    _fwd_fake,
    save=_save,
    backward=_backward,
)


def rope_attention(qkv: Tensor, rotary: tuple[Tensor, Tensor] | None, heads: int) -> Tensor:
    """qkv [B,S,3HK], cos and sin [S,K] float32 or None -> [B,S,HK]; see `trm_fast.ops`.

    Raises:
        ValueError: a dtype, head size or table that the kernel does not serve.
    """
    head_dim, rest = divmod(qkv.shape[-1], 3 * max(1, heads))
    check(
        "rope_attention",
        unsupported_dtype(qkv.dtype),
        None if qkv.dim() == 3 else f"needs q, k and v of [B, S, 3HK], not {list(qkv.shape)}",
        None if heads > 0 else f"needs 1 head or more, not {heads}",
        f"takes q, k and v of {heads} heads, not {qkv.shape[-1]} features" if rest else None,
        _unsupported_head(head_dim),
        *(_unsupported_table(t, qkv.shape[1], head_dim) for t in rotary or ()),
    )
    cos, sin = (t.contiguous() for t in rotary) if rotary else (None, None)
    return _fwd(qkv.contiguous(), cos, sin, heads)[0]


def _unsupported_head(head_dim: int) -> str | None:
    if head_dim in HEAD_DIMS:
        return None
    return f"needs a head size that is a multiple of 16 up to {HEAD_DIMS[-1]}, not {head_dim}"


def unsupported_heads(width: int, heads: int) -> str | None:
    """Why `heads` heads of states of `width` cannot be served, or None."""
    head_dim, rest = divmod(width, heads)
    return f"needs {heads} heads of one size" if rest else _unsupported_head(head_dim)


def _unsupported_table(table: Tensor, tokens: int, head_dim: int) -> str | None:
    if table.shape == (tokens, head_dim) and table.dtype == torch.float32:
        return None
    given = f"{list(table.shape)} {str(table.dtype).removeprefix('torch.')}"
    return f"needs cos and sin of [{tokens}, {head_dim}] float32, not {given}"


def unsupported(dtype: torch.dtype, config: Shape | None, device: torch.device) -> str | None:
    """Why the op cannot serve, or None."""
    if config is None or config.mlp_t:  # token mixing has no heads
        return unsupported_dtype(dtype, device)
    width = config.hidden_size
    return (
        unsupported_dtype(dtype, device)
        or unsupported_width(width)
        or unsupported_heads(width, config.num_heads)
    )
