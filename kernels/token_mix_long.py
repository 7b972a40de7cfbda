"""token_mix of more tokens than one program can hold: products with the ends of the op fused on.

Owns `token_mix_long_fwd` and `token_mix_long_bwd`, and their kernels: the hidden layer (forward, or
again with its gradient), the product with the down weight or, in the backward, with the gate and
up weights, and the two passes of the norm over the tokens. States are read as they lie, tile by
tile; the hidden layer has one row per board and feature, so that weight gradients are one product.
Imported by `token_mix`.

Dims legend: B batch, S tokens incl. prefix, D width, F inner width; S' and F' are these rounded up
to whole 16s, N = B*S rows, T tiles of the tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trm_fast.kernels._common import begin, dot, down, inlined, tiles, up
from trm_fast.kernels._runtime import descriptor, run
from trm_fast.kernels.launch import pick
from trm_fast.kernels.residual_rmsnorm import finish_norm


@triton.jit
def _hidden_kernel(
    s_source, dh_source, gate_up_source, down_source, a_source, dgu_source, boards,
    S: tl.constexpr, D: tl.constexpr, F: tl.constexpr, TMA: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_S: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """a = silu(g) * u with g, u = s.T @ gate_up.T; with dh also the gradient of g and u."""
    begin(PDL)
    PADDED: tl.constexpr = (S + 15) // 16 * 16
    s_tiles = tiles(s_source, [boards, S, D], [S * D, D, 1], [1, BLOCK_S, BLOCK_D], TMA)
    gate_up = tiles(
        gate_up_source, [2, F, PADDED], [F * PADDED, PADDED, 1], [2, BLOCK_F, BLOCK_S], TMA
    )
    a_tiles = tiles(a_source, [boards, D, F], [D * F, F, 1], [1, BLOCK_D, BLOCK_F], TMA)
    num_f: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    num_d: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    f = tl.program_id(0) % num_f * BLOCK_F
    d = tl.program_id(0) // num_f % num_d * BLOCK_D
    board = tl.program_id(0) // (num_f * num_d)
    gu = tl.zeros((BLOCK_D, 2 * BLOCK_F), tl.float32)
    da = tl.zeros((BLOCK_D, BLOCK_F), tl.float32)
    if dh_source is not None:
        dh_tiles = tiles(dh_source, [boards, S, D], [S * D, D, 1], [1, BLOCK_S, BLOCK_D], TMA)
        w_down = tiles(down_source, [PADDED, F], [F, 1], [BLOCK_S, BLOCK_F], TMA)
    for t in range(0, S, BLOCK_S):
        s = s_tiles.load([board, t, d]).reshape(BLOCK_S, BLOCK_D)
        w = gate_up.load([0, f, t]).reshape(2 * BLOCK_F, BLOCK_S)
        gu = dot(s.T, w.T, gu)
        if dh_source is not None:
            dh = dh_tiles.load([board, t, d]).reshape(BLOCK_S, BLOCK_D)
            da = dot(dh.T, w_down.load([t, f]), da)
    g, u = tl.split(gu.reshape(BLOCK_D, 2, BLOCK_F).permute(0, 2, 1))
    sigmoid = tl.sigmoid(g)
    silu = g * sigmoid
    a_tiles.store([board, d, f], down(silu * u, a_tiles.dtype).reshape(1, BLOCK_D, BLOCK_F))
    if dh_source is not None:
        dgu_tiles = tiles(
            dgu_source, [boards, D, 2, F], [D * 2 * F, 2 * F, F, 1], [1, BLOCK_D, 2, BLOCK_F], TMA
        )
        dg = da * u * (sigmoid + silu * (1 - sigmoid))
        dgu = tl.join(dg, da * silu).permute(0, 2, 1).reshape(1, BLOCK_D, 2, BLOCK_F)
        dgu_tiles.store([board, d, 0, f], down(dgu, dgu_tiles.dtype))


@triton.jit
def _tokens_kernel(
    x_source, w_source, h_source, out_source, ssq_ptr, boards,
    S: tl.constexpr, D: tl.constexpr, K: tl.constexpr, W_IS_KS: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = h + w @ x.T of every board: x [B,D,K]; w [S',K] or, W_IS_KS, [K,S'].

    ssq [T,B*D]: per tile of tokens, the sums of their squares.
    """
    begin(PDL)
    PADDED: tl.constexpr = (S + 15) // 16 * 16
    x_tiles = tiles(x_source, [boards, D, K], [D * K, K, 1], [1, BLOCK_N, BLOCK_K], TMA)
    h_tiles = tiles(h_source, [boards, S, D], [S * D, D, 1], [1, BLOCK_M, BLOCK_N], TMA)
    out_tiles = tiles(out_source, [boards, S, D], [S * D, D, 1], [1, BLOCK_M, BLOCK_N], TMA)
    if W_IS_KS:
        w_tiles = tiles(w_source, [K, PADDED], [PADDED, 1], [BLOCK_K, BLOCK_M], TMA)
    else:
        w_tiles = tiles(w_source, [PADDED, K], [K, 1], [BLOCK_M, BLOCK_K], TMA)
    num_s: tl.constexpr = (S + BLOCK_M - 1) // BLOCK_M
    num_d: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    tile_s = tl.program_id(0) % num_s
    s = tile_s * BLOCK_M
    d = tl.program_id(0) // num_s % num_d * BLOCK_N
    board = tl.program_id(0) // (num_s * num_d)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        x = x_tiles.load([board, d, k]).reshape(BLOCK_N, BLOCK_K)
        if W_IS_KS:
            acc = dot(w_tiles.load([k, s]).T, x.T, acc)
        else:
            acc = dot(w_tiles.load([s, k]), x.T, acc)
    acc += up(h_tiles.load([board, s, d]).reshape(BLOCK_M, BLOCK_N))
    if ssq_ptr is not None:
        # Tokens that do not exist are zeros: of h, and of w, whose rows end in zeros.
        offs_d = d + tl.arange(0, BLOCK_N)
        offs = (tile_s * boards + board).to(tl.int64) * D + offs_d
        tl.store(ssq_ptr + offs, tl.sum(acc * acc, 0), mask=offs_d < D)
    out_tiles.store([board, s, d], down(acc, out_tiles.dtype).reshape(1, BLOCK_M, BLOCK_N))


@inlined
def _columns(D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCKS: tl.constexpr):
    """Of a program that has one of BLOCKS parts of the tokens: board, features, part."""
    num_d: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    offs_d = tl.program_id(0) % num_d * BLOCK_D + tl.arange(0, BLOCK_D)
    rest = tl.program_id(0) // num_d
    return (rest // BLOCKS).to(tl.int64), offs_d, rest % BLOCKS


@triton.jit
def _finish_tokens_kernel(
    y_ptr, ssq_ptr, rstd_ptr, boards, eps,
    S: tl.constexpr, D: tl.constexpr, TILES: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y, the sums [B,S,D], times rstd, which their partial sums of squares ssq [T,B*D] give."""
    begin(PDL)
    BLOCKS: tl.constexpr = (S + BLOCK_S - 1) // BLOCK_S
    board, offs_d, part = _columns(D, BLOCK_D, BLOCKS)
    row = board * D + offs_d
    squares = tl.zeros((BLOCK_D,), tl.float32)
    for i in tl.static_range(TILES):
        offs_ssq = tl.full((), i, tl.int64) * boards * D + row
        squares += tl.load(ssq_ptr + offs_ssq, mask=offs_d < D, other=0.0)
    rstd = tl.rsqrt(squares / S + eps)
    tl.store(rstd_ptr + row, rstd, mask=(offs_d < D) & (part == 0))
    offs_s = part * BLOCK_S + tl.arange(0, BLOCK_S)
    mask = (offs_s < S)[:, None] & (offs_d < D)[None, :]
    offs = (board * S + offs_s)[:, None] * D + offs_d[None, :]
    y = up(tl.load(y_ptr + offs, mask=mask, other=0.0)) * rstd[None, :]
    tl.store(y_ptr + offs, down(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tokens_norm_bwd_kernel(
    grad_ptr, s_ptr, y_ptr, rstd_ptr, dh_ptr, s_rows_ptr, dh_rows_ptr,
    S: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """dh [B,S,D], the gradient of the sum from that of its norm; and s and dh as rows [B*D,S']."""
    begin(PDL)
    PADDED: tl.constexpr = (S + 15) // 16 * 16
    dtype: tl.constexpr = dh_ptr.dtype.element_ty
    board, offs_d, _ = _columns(D, BLOCK_D, 1)
    row = board * D + offs_d
    rstd = tl.load(rstd_ptr + row, mask=offs_d < D, other=0.0)
    products = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for t in range(0, S, BLOCK_S):
        offs_s = t + tl.arange(0, BLOCK_S)
        mask = (offs_s < S)[:, None] & (offs_d < D)[None, :]
        offs = (board * S + offs_s)[:, None] * D + offs_d[None, :]
        grad = up(tl.load(grad_ptr + offs, mask=mask, other=0.0))
        products += grad * up(tl.load(y_ptr + offs, mask=mask, other=0.0))
    projection = tl.sum(products, 0) / S
    for t in range(0, S, BLOCK_S):
        offs_s = t + tl.arange(0, BLOCK_S)
        mask = (offs_s < S)[:, None] & (offs_d < D)[None, :]
        offs = (board * S + offs_s)[:, None] * D + offs_d[None, :]
        grad = up(tl.load(grad_ptr + offs, mask=mask, other=0.0))
        y = up(tl.load(y_ptr + offs, mask=mask, other=0.0))
        dh = down((grad - y * projection[None, :]) * rstd[None, :], dtype)
        tl.store(dh_ptr + offs, dh, mask=mask)
        s = tl.load(s_ptr + offs, mask=mask, other=0.0)
        rows = row[:, None] * PADDED + offs_s[None, :]
        mask_rows = (offs_d < D)[:, None] & (offs_s < PADDED)[None, :]
        tl.store(s_rows_ptr + rows, s.T, mask=mask_rows)
        tl.store(dh_rows_ptr + rows, dh.T, mask=mask_rows)


def _hidden(
    s: Tensor,
    gate_up: Tensor,
    a: Tensor,
    down: Tensor | None = None,
    dh: Tensor | None = None,
    dgu: Tensor | None = None,
) -> None:
    """Write a [B,D,F'], the hidden layer of s [B,S,D]; with the last three, dgu [B,D,2,F'] too."""
    batch, tokens, width = s.shape
    inner = gate_up.shape[1]
    row = pick("token_mix_hidden" if dh is None else "token_mix_hidden_bwd", s)
    block_d, block_f, block_s = (row.tiles[f"BLOCK_{axis}"] for axis in "DFS")
    state = [1, block_s, block_d]
    run(
        _hidden_kernel, (batch * triton.cdiv(width, block_d) * triton.cdiv(inner, block_f),), row,
        s, s_source=descriptor(s, state, row),
        dh_source=None if dh is None else descriptor(dh, state, row),
        gate_up_source=descriptor(gate_up, [2, block_f, block_s], row),
        down_source=None if down is None else descriptor(down, [block_s, block_f], row),
        a_source=descriptor(a, [1, block_d, block_f], row),
        dgu_source=None if dgu is None else descriptor(dgu, [1, block_d, 2, block_f], row),
        boards=batch, S=tokens, D=width, F=inner, TMA=row.arch >= 90,
    )  # fmt: skip


def _tokens(x: Tensor, w: Tensor, h: Tensor, out: Tensor, squares: bool) -> Tensor | None:
    """out = h + w @ x.T, all [B,S,D], of x [B,D,K]; w is [S',K] with `squares`, else [K,S'].

    Returns the partial sums of squares over the tokens, [T,B,D] float32, if `squares`.
    """
    batch, tokens, width = h.shape
    row = pick("token_mix_tokens", h)
    m, n, k = (row.tiles[f"BLOCK_{axis}"] for axis in "MNK")
    parts = triton.cdiv(tokens, m)
    ssq = h.new_empty(parts, batch, width, dtype=torch.float32) if squares else None
    run(
        _tokens_kernel, (batch * parts * triton.cdiv(width, n),), row, h,
        x_source=descriptor(x, [1, n, k], row),
        w_source=descriptor(w, [m, k] if squares else [k, m], row),
        h_source=descriptor(h, [1, m, n], row), out_source=descriptor(out, [1, m, n], row),
        ssq_ptr=ssq, boards=batch, S=tokens, D=width, K=x.shape[2], W_IS_KS=not squares,
        TMA=row.arch >= 90,
    )  # fmt: skip
    return ssq


def token_mix_long_fwd(
    h: Tensor,
    gate_up: Tensor,
    down: Tensor,
    eps: float,
    ssq: Tensor | None,
    add: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor | None],
) -> None:
    """`token_mix_fwd` of any number of tokens; out is y, rstd and s or None."""
    y, rstd, s = out
    batch, tokens, width = h.shape
    if ssq is not None:
        flat = (
            None if add is None else add.view(-1, width),
            None if s is None else s.view(-1, width),
        )
        h = finish_norm(h.view(-1, width), ssq, eps, *flat).view(h.shape)
    elif add is not None:
        h = torch.add(h, add, out=s)
    elif s is not None:
        s.copy_(h)
    a = h.new_empty(batch, width, down.shape[1])
    _hidden(h, gate_up, a)
    squares = _tokens(a, down, h, y, True)
    assert squares is not None
    row = pick("residual_rmsnorm_tokens", h)
    blocks = triton.cdiv(tokens, row.tiles["BLOCK_S"]) * triton.cdiv(width, row.tiles["BLOCK_D"])
    run(
        _finish_tokens_kernel, (batch * blocks,), row, y, y_ptr=y, ssq_ptr=squares, rstd_ptr=rstd,
        boards=batch, eps=eps, S=tokens, D=width, TILES=len(squares),
    )  # fmt: skip


def token_mix_long_bwd(
    grad: Tensor,
    s: Tensor,
    y: Tensor,
    rstd: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ds: Tensor,
    dgu: Tensor,
    a: Tensor,
    s_rows: Tensor,
    dh_rows: Tensor,
) -> None:
    """Write the gradient ds [B,S,D], and what the weight gradients are products of.

    Those are dgu [B,D,2,F'], a [B,D,F'], and s and the gradient of the sum as rows [B*D,S'].
    """
    batch, tokens, width = s.shape
    dh = torch.empty_like(s)
    row = pick("residual_rmsnorm_tokens", s)
    run(
        _tokens_norm_bwd_kernel, (batch * triton.cdiv(width, row.tiles["BLOCK_D"]),), row, s,
        grad_ptr=grad, s_ptr=s, y_ptr=y, rstd_ptr=rstd, dh_ptr=dh, s_rows_ptr=s_rows,
        dh_rows_ptr=dh_rows, S=tokens, D=width,
    )  # fmt: skip
    _hidden(s, gate_up, a, down, dh, dgu)
    _tokens(dgu.flatten(2), gate_up.flatten(0, 1), dh, ds, False)
