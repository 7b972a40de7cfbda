"""rope_attention: rotary embedding on queries and keys, then softmax attention, of packed qkv.

Owns the op. Up to 128 tokens and 64 elements a head, in 16 bits, one program is one head of one
board: the whole sequence is one tile, rotation and the optional deferred norm of the rows are
applied as the tiles arrive, no sum crosses programs. The rest goes to `rope_attention_long`.
Formula, y = rotated and rounded: out = softmax(yq yk^T / sqrt(K)) v, rotate(x) = x cos + (-x2, x1)
sin for the halves x1, x2 of a head. The halves are tiles of their own, so that a rotation moves
nothing between threads: yq yk^T = yq1 yk1^T + yq2 yk2^T.
Backward, P the softmax, recomputed from lse: dv = P^T d, dS = P (d v^T - rowsum(d out)),
dq = dS yk / sqrt(K), dk = dS^T yq / sqrt(K), both rotated back.
Imported by the op modules after it.

Dims legend: B batch, S tokens incl. prefix, H heads, K head dim, N = B*S rows, T tiles of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from trm_fast.kernels._common import (
    Shape,
    begin,
    check,
    dot,
    down,
    inlined,
    row_scale,
    tiles,
    unsupported_dtype,
    unsupported_width,
    up,
)
from trm_fast.kernels._runtime import run
from trm_fast.kernels.launch import Row, pick
from trm_fast.kernels.registration import TRITON, register
from trm_fast.kernels.rope_attention_long import half_block, long_bwd, long_fwd, long_lse, turn

__all__ = ["rope_attention", "unsupported"]

# The most that is one tile: two of TILE_TOKENS^2 and six of a head are in registers at once.
TILE_TOKENS = 128
TILE_HEAD = 64
HEAD_DIMS = range(16, 129, 16)
LOG2E = tl.constexpr(1.4426950408889634)


@inlined
def _offsets(
    offs_s, S: tl.constexpr, STRIDE: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """SIZE elements of each of S rows that are STRIDE apart: offsets and mask of a tile."""
    offs = tl.arange(0, BLOCK)
    mask = (offs_s < S)[:, None] & (offs < SIZE)[None, :]
    return offs_s[:, None] * STRIDE + offs[None, :], mask


@inlined
def _head_tiles(
    source, boards, HEADS: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr, K: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Tiles [tokens, elements] of [B,S,HEADS,K], the heads before the tokens."""
    return tiles(
        source, [boards, HEADS, S, K], [S * STRIDE, K, STRIDE, 1], [1, 1, BLOCK_S, BLOCK_K], TMA
    )


@inlined
def _row_factors(
    ssq_ptr, board, boards, eps, offs_s,
    S: tl.constexpr, WIDTH: tl.constexpr, SSQ_TILES: tl.constexpr,
):  # fmt: skip
    """[tokens, 1]: the deferred norm's scale of each row, or 1; 0 behind the last token."""
    if ssq_ptr is None:
        scale = tl.full(offs_s.shape, 1.0, tl.float32)
    else:
        offs = board.to(tl.int64) * S + offs_s
        scale = row_scale(ssq_ptr, offs, boards * S, SSQ_TILES, WIDTH, eps)
    return tl.where(offs_s < S, scale, 0.0)[:, None]


@inlined
def _scaled(x, scale):
    """x times its rows' factors. Where they are 1 it keeps x from being converted to the operand
    of a product as soon as it is loaded: every operand at once is more than the registers hold."""
    return down(up(x) * scale, x.dtype)


@inlined
def _turned(
    x1, x2, scale, cos_ptr, sin_ptr, offs_s,
    S: tl.constexpr, K: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Halves of q or k as the reference multiplies them: scaled, rotated, rounded once."""
    dtype: tl.constexpr = x1.dtype
    offs, mask = _offsets(offs_s, S, K, K // 2, BLOCK_HALF)
    x1, x2 = up(x1) * scale, up(x2) * scale
    x1, x2 = turn(x1, x2, cos_ptr, sin_ptr, offs, mask, K // 2, False)
    return down(x1, dtype), down(x2, dtype)


@triton.jit
def _rope_attention_fwd_kernel(
    qkv_ptr, v_source, out_source, lse_ptr, cos_ptr, sin_ptr, ssq_ptr, boards, eps,
    SCALE: tl.constexpr, S: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr,
    SSQ_TILES: tl.constexpr, TMA: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    D: tl.constexpr = HEADS * K
    v_tiles = _head_tiles(v_source, boards, 3 * HEADS, S, 3 * D, K, BLOCK_S, BLOCK_K, TMA)
    out_tiles = _head_tiles(out_source, boards, HEADS, S, D, K, BLOCK_S, BLOCK_K, TMA)
    board, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    offs_s = tl.arange(0, BLOCK_S)
    # q and k through pointers: they are rotated in registers anyway, and all of them are on their
    # way at once, where one descriptor's load is waited for before the next one starts.
    offs, mask = _offsets(offs_s, S, 3 * D, K // 2, BLOCK_HALF)
    qkv_ptr += board.to(tl.int64) * (3 * S * D) + head * K
    q1 = tl.load(qkv_ptr + offs, mask=mask, other=0.0)
    q2 = tl.load(qkv_ptr + K // 2 + offs, mask=mask, other=0.0)
    k1 = tl.load(qkv_ptr + D + offs, mask=mask, other=0.0)
    k2 = tl.load(qkv_ptr + D + K // 2 + offs, mask=mask, other=0.0)
    v = tl.reshape(v_tiles.load([board, 2 * HEADS + head, 0, 0]), (BLOCK_S, BLOCK_K))
    scale = _row_factors(ssq_ptr, board, boards, eps, offs_s, S, D, SSQ_TILES)
    if ssq_ptr is not None or not TMA:
        v = _scaled(v, scale)
    q1, q2 = _turned(q1, q2, scale, cos_ptr, sin_ptr, offs_s, S, K, BLOCK_HALF)
    k1, k2 = _turned(k1, k2, scale, cos_ptr, sin_ptr, offs_s, S, K, BLOCK_HALF)
    scores = dot(q2, k2.T, dot(q1, k1.T)) * (SCALE * LOG2E)
    scores = tl.where(offs_s[None, :] < S, scores, float("-inf"))
    top = tl.max(scores, 1)
    p = tl.exp2(scores - top[:, None])
    total = tl.sum(p, 1)
    out = dot(down(p, v.dtype), v) / total[:, None]
    lse_ptr += tl.program_id(0).to(tl.int64) * S
    tl.store(lse_ptr + offs_s, top + tl.log2(total), mask=offs_s < S)
    out_tiles.store([board, head, 0, 0], tl.reshape(down(out, v.dtype), (1, 1, BLOCK_S, BLOCK_K)))


@triton.jit
def _rope_attention_bwd_kernel(
    grad_source, qkv_ptr, v_source, out_ptr, lse_ptr, d_ptr, dv_source, cos_ptr, sin_ptr, ssq_ptr,
    boards, eps,
    SCALE: tl.constexpr, S: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr,
    SSQ_TILES: tl.constexpr, TMA: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """d may be qkv: a program reads what it writes before it writes it, and nothing else."""
    begin(PDL)
    D: tl.constexpr = HEADS * K
    grad_tiles = _head_tiles(grad_source, boards, HEADS, S, D, K, BLOCK_S, BLOCK_K, TMA)
    v_tiles = _head_tiles(v_source, boards, 3 * HEADS, S, 3 * D, K, BLOCK_S, BLOCK_K, TMA)
    dv_tiles = _head_tiles(dv_source, boards, 3 * HEADS, S, 3 * D, K, BLOCK_S, BLOCK_K, TMA)
    board, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    offs_s = tl.arange(0, BLOCK_S)
    offs_out, mask_out = _offsets(offs_s, S, D, K, BLOCK_K)
    out_ptr += board.to(tl.int64) * (S * D) + head * K
    out = tl.load(out_ptr + offs_out, mask=mask_out, other=0.0)
    offs, mask = _offsets(offs_s, S, 3 * D, K // 2, BLOCK_HALF)
    first = board.to(tl.int64) * (3 * S * D) + head * K
    qkv_ptr += first
    q1 = tl.load(qkv_ptr + offs, mask=mask, other=0.0)
    q2 = tl.load(qkv_ptr + K // 2 + offs, mask=mask, other=0.0)
    k1 = tl.load(qkv_ptr + D + offs, mask=mask, other=0.0)
    k2 = tl.load(qkv_ptr + D + K // 2 + offs, mask=mask, other=0.0)
    lse_ptr += tl.program_id(0).to(tl.int64) * S
    lse = tl.load(lse_ptr + offs_s, mask=offs_s < S, other=float("inf"))
    grad = tl.reshape(grad_tiles.load([board, head, 0, 0]), (BLOCK_S, BLOCK_K))
    delta = tl.sum(up(grad) * up(out), 1)
    v = tl.reshape(v_tiles.load([board, 2 * HEADS + head, 0, 0]), (BLOCK_S, BLOCK_K))
    scale = _row_factors(ssq_ptr, board, boards, eps, offs_s, S, D, SSQ_TILES)
    if ssq_ptr is not None or not TMA:
        v = _scaled(v, scale)
    if not TMA:
        grad = _scaled(grad, tl.where(offs_s < S, 1.0, 0.0)[:, None])
    q1, q2 = _turned(q1, q2, scale, cos_ptr, sin_ptr, offs_s, S, K, BLOCK_HALF)
    k1, k2 = _turned(k1, k2, scale, cos_ptr, sin_ptr, offs_s, S, K, BLOCK_HALF)
    scores = dot(q2, k2.T, dot(q1, k1.T)) * (SCALE * LOG2E) - lse[:, None]
    # Behind the last token lse is infinite for a query; a key would have exp2(0 - lse).
    p = tl.exp2(tl.where(offs_s[None, :] < S, scores, float("-inf")))
    dv = down(dot(down(p, v.dtype).T, grad), v.dtype)
    dv_tiles.store([board, 2 * HEADS + head, 0, 0], tl.reshape(dv, (1, 1, BLOCK_S, BLOCK_K)))
    # The product starts at -delta: one tile less at a time in the registers.
    start = tl.zeros((BLOCK_S, BLOCK_S), tl.float32) - delta[:, None]
    ds = down(p * dot(grad, v.T, start), v.dtype)
    d_ptr += first
    offs_t, mask_t = _offsets(offs_s, S, K, K // 2, BLOCK_HALF)
    dq1, dq2 = dot(ds, k1) * SCALE, dot(ds, k2) * SCALE
    dq1, dq2 = turn(dq1, dq2, cos_ptr, sin_ptr, offs_t, mask_t, K // 2, True)
    tl.store(d_ptr + offs, down(dq1, v.dtype), mask=mask)
    tl.store(d_ptr + K // 2 + offs, down(dq2, v.dtype), mask=mask)
    dk1, dk2 = dot(ds.T, q1) * SCALE, dot(ds.T, q2) * SCALE
    dk1, dk2 = turn(dk1, dk2, cos_ptr, sin_ptr, offs_t, mask_t, K // 2, True)
    tl.store(d_ptr + D + offs, down(dk1, v.dtype), mask=mask)
    tl.store(d_ptr + D + K // 2 + offs, down(dk2, v.dtype), mask=mask)


def _head_descriptor(t: Tensor, heads: int, row: Row, block_k: int) -> Tensor | TensorDescriptor:
    """What `_head_tiles` takes for contiguous t [B,S,heads*K]."""
    if row.arch < 90:
        return t
    batch, tokens, width = t.shape
    head_dim = width // heads
    block = [1, 1, row.tiles["BLOCK_S"], block_k]
    shape, strides = [batch, heads, tokens, head_dim], [tokens * width, head_dim, width, 1]
    return TensorDescriptor(t, shape, strides, block)


def _is_tile(like: Tensor, tokens: int, head_dim: int) -> bool:
    return tokens <= TILE_TOKENS and head_dim <= TILE_HEAD and like.element_size() == 2


def new_lse(like: Tensor, heads: int) -> tuple[int, int, int]:
    """Shape of the float32 that `rope_attention_fwd` saves for a result like `like` [B,S,HK]."""
    batch, tokens, width = like.shape
    if _is_tile(like, tokens, width // heads):
        return batch, heads, tokens
    return long_lse(like, heads)


def rope_attention_fwd(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    *,
    ssq: Tensor | None = None,
    eps: float = 0.0,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(K)) v, and what the backward reads: the softmax's logarithmic sums.

    Args:
        qkv: [B,S,3HK], contiguous.  cos, sin: [S,K] float32, or None for no rotation.
        ssq: [T, B*S] float32 if each row of qkv, the product of a deferred norm of HK features,
            is to be scaled by it first.
        out: takes both results.

    Returns:
        [B,S,HK], and float32 of the shape `new_lse`.
    """
    batch, tokens, width = qkv.shape
    head_dim = width // (3 * heads)
    if qkv.numel() and not _is_tile(qkv, tokens, head_dim):
        return long_fwd(qkv, cos, sin, heads, ssq, eps, out)
    if out is None:
        result = qkv.new_empty(batch, tokens, width // 3)
        out = result, result.new_empty(new_lse(result, heads), dtype=torch.float32)
    if not qkv.numel():
        return out
    row = pick("rope_attention_fwd", qkv, S=tokens)
    block_k = triton.next_power_of_2(head_dim)
    run(
        _rope_attention_fwd_kernel, (batch * heads,), row, qkv,
        qkv_ptr=qkv, v_source=_head_descriptor(qkv, 3 * heads, row, block_k),
        out_source=_head_descriptor(out[0], heads, row, block_k), lse_ptr=out[1], cos_ptr=cos,
        sin_ptr=sin, ssq_ptr=ssq, boards=batch, eps=eps, SCALE=head_dim**-0.5, S=tokens,
        HEADS=heads, K=head_dim, SSQ_TILES=0 if ssq is None else len(ssq), TMA=row.arch >= 90,
        BLOCK_HALF=half_block(head_dim), BLOCK_K=block_k,
    )  # fmt: skip
    return out


def rope_attention_bwd(
    grad: Tensor,
    qkv: Tensor,
    attended: Tensor,
    lse: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    *,
    ssq: Tensor | None = None,
    eps: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of qkv, scaled if there is `ssq`, from that of the result, grad [B,S,HK].

    `out` takes it; it may be qkv. The other arguments are as given to, and returned by,
    `rope_attention_fwd`, all of them contiguous.
    """
    batch, tokens, width = qkv.shape
    head_dim = width // (3 * heads)
    d = torch.empty_like(qkv) if out is None else out
    if not qkv.numel():
        return d
    if not _is_tile(qkv, tokens, head_dim):
        long_bwd(grad, qkv, attended, lse, cos, sin, heads, ssq, eps, d)
        return d
    row = pick("rope_attention_bwd", qkv, S=tokens)
    block_k = triton.next_power_of_2(head_dim)
    run(
        _rope_attention_bwd_kernel, (batch * heads,), row, qkv,
        grad_source=_head_descriptor(grad, heads, row, block_k), qkv_ptr=qkv,
        v_source=_head_descriptor(qkv, 3 * heads, row, block_k), out_ptr=attended, lse_ptr=lse,
        d_ptr=d,
        dv_source=_head_descriptor(d, 3 * heads, row, block_k), cos_ptr=cos, sin_ptr=sin,
        ssq_ptr=ssq, boards=batch, eps=eps, SCALE=head_dim**-0.5, S=tokens, HEADS=heads,
        K=head_dim, SSQ_TILES=0 if ssq is None else len(ssq), TMA=row.arch >= 90,
        BLOCK_HALF=half_block(head_dim), BLOCK_K=block_k,
    )  # fmt: skip
    return d


def _fwd_fake(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int
) -> tuple[Tensor, Tensor]:
    batch, tokens, width = qkv.shape
    out = qkv.new_empty(batch, tokens, width // 3)
    return out, out.new_empty(new_lse(out, heads), dtype=torch.float32)


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
    TRITON,
    "rope_attention_bwd(Tensor grad, Tensor qkv, Tensor out, Tensor lse, Tensor? cos, Tensor? sin,"
    " int heads) -> Tensor",
    _bwd_fake,
    rope_attention_bwd,
)
_fwd = register(
    TRITON,
    "rope_attention(Tensor qkv, Tensor? cos, Tensor? sin, int heads) -> (Tensor, Tensor)",
    _fwd_fake,
    rope_attention_fwd,
    save=_save,
    backward=_backward,
)


def rope_attention(qkv: Tensor, rotary: tuple[Tensor, Tensor] | None, heads: int) -> Tensor:
    """qkv [B,S,3HK], cos and sin [S,K] float32 or None -> [B,S,HK]; see `trm_fast.ops`.

    Raises:
        ValueError: a dtype, head size or table that the kernel does not serve.
    """
    head_dim, rest = divmod(qkv.shape[-1], 3 * heads)
    check(
        "rope_attention",
        unsupported_dtype(qkv.dtype),
        f"takes q, k and v of {heads} heads, not {qkv.shape[-1]} features" if rest else None,
        unsupported_head(head_dim),
        *(unsupported_table(t, qkv.shape[1], head_dim) for t in rotary or ()),
    )
    cos, sin = (t.contiguous() for t in rotary) if rotary else (None, None)
    return _fwd(qkv.contiguous(), cos, sin, heads)[0]


def unsupported_head(head_dim: int) -> str | None:
    if head_dim in HEAD_DIMS:
        return None
    return f"needs a head size that is a multiple of 16 up to {HEAD_DIMS[-1]}, not {head_dim}"


def unsupported_table(table: Tensor, tokens: int, head_dim: int) -> str | None:
    if table.shape == (tokens, head_dim) and table.dtype == torch.float32:
        return None
    given = f"{list(table.shape)} {str(table.dtype).removeprefix('torch.')}"
    return f"needs cos and sin of [{tokens}, {head_dim}] float32, not {given}"


def unsupported(
    dtype: torch.dtype, config: Shape | None, device: torch.device | None = None
) -> str | None:
    if config is None or config.mlp_t:  # token mixing has no heads
        return unsupported_dtype(dtype)
    head_dim, rest = divmod(config.hidden_size, config.num_heads)
    return (
        unsupported_dtype(dtype)
        or unsupported_width(config.hidden_size)
        or (f"needs {config.num_heads} heads of one size" if rest else unsupported_head(head_dim))
    )


def examples(make: Callable[..., Tensor]) -> Iterator[None]:
    """Every launch of this file at real sizes, for the report: the official attention variant and
    900 cells with their prefix, with and without rotation and deferred norm; short sequences."""
    heads, head_dim = 8, 64
    for batch, tokens in ((768, 97), (192, 916), (768, 64), (768, 32), (768, 16)):
        qkv = make(batch, tokens, 3 * heads * head_dim)
        table = make(tokens, head_dim, dtype=torch.float32)
        ssq = make(2, batch * tokens, dtype=torch.float32)
        short = tokens < 97
        if short and qkv.element_size() != 2:
            continue
        for cos in (table,) if short else (table, None):
            for deferred in (ssq, None):
                out, lse = rope_attention_fwd(qkv, cos, cos, heads, ssq=deferred, eps=1e-5)
                yield
                rope_attention_bwd(out, qkv, out, lse, cos, cos, heads, ssq=deferred, eps=1e-5)
                yield
