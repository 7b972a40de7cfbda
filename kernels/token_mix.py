"""token_mix: rms_norm over the tokens of h + SwiGLU along the tokens, in one kernel each way.

Owns the op and the host functions that the recursion calls. A program has one board and BLOCK_D of
its features, with every token: so the product's rows are features, its left operand is the board as
it lies in memory, read column by column (no transpose is ever stored), the hidden layer stays in
registers, and the norm is taken where the sum is made. The backward computes the hidden layer
again: it is five times as large as what is kept. More than FUSED_TOKENS: see `token_mix_long`.
Imported by `network` and `deep_recursion`.

Dims legend: B batch, S tokens incl. prefix, D width, F inner width; S' and F' are these rounded up
to whole 16s, N = B*S rows, T tiles of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trm_fast.kernels._common import (
    aligned,
    begin,
    check,
    dot,
    down,
    inlined,
    mismatch,
    row_scale,
    tiles,
    unsupported,
    unsupported_dtype,
    unsupported_width,
    up,
    weight_grad,
)
from trm_fast.kernels._runtime import descriptor, run
from trm_fast.kernels.launch import Row, pick
from trm_fast.kernels.registration import TRITON, register
from trm_fast.kernels.token_mix_long import token_mix_long_bwd, token_mix_long_fwd

__all__ = ["pack", "token_mix", "token_mix_bwd", "token_mix_fwd", "unsupported"]

FUSED_TOKENS = 128
MAX_PIECES = 3


@triton.constexpr_function
def piece_sizes(tokens: int, split: int) -> tuple[int, ...]:
    """`tokens` in tiles whose sizes are powers of two; without `split`, one that is large enough.

    112 = 64 + 32 + 16 multiplies an eighth less than 128. No piece of several is larger than 64.
    """
    left = (tokens + 15) // 16 * 16
    if not split:
        return (1 << (left - 1).bit_length(),)
    sizes = []
    while left:
        sizes.append(min(64, 1 << (left.bit_length() - 1)))
        left -= sizes[-1]
    return tuple(sizes)


# What kernels ask of that: they can hand a number on to a helper, an element of a tuple not.
@triton.constexpr_function
def _count(tokens: int, split: int) -> int:
    return len(piece_sizes(tokens, split))


@triton.constexpr_function
def _size(tokens: int, split: int, p: int) -> int:
    return piece_sizes(tokens, split)[p]


@triton.constexpr_function
def _start(tokens: int, split: int, p: int) -> int:
    return sum(piece_sizes(tokens, split)[:p])


@inlined
def _program(D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The board of a program, its first feature, and its features."""
    num_d: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    d = tl.program_id(0) % num_d * BLOCK_D
    return tl.program_id(0) // num_d, d, d + tl.arange(0, BLOCK_D)


@inlined
def _piece(
    board, offs_d, p: tl.constexpr, S: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """Offsets into [B,S,D] of the tokens of one piece, which of them exist, and the tokens."""
    offs_s = _start(S, SPLIT, p) + tl.arange(0, _size(S, SPLIT, p))
    offs = (board.to(tl.int64) * S + offs_s)[:, None] * D + offs_d[None, :]
    return offs, (offs_s < S)[:, None] & (offs_d < D)[None, :], offs_s


@inlined
def _piece_tiles(
    gate_up, w_down, PADDED: tl.constexpr, SIZE: tl.constexpr, F: tl.constexpr,
    BLOCK_F: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    return (
        tiles(gate_up, [2, F, PADDED], [F * PADDED, PADDED, 1], [2, BLOCK_F, SIZE], TMA),
        tiles(w_down, [PADDED, F], [F, 1], [SIZE, BLOCK_F], TMA),
    )


@inlined
def _weight_tiles(
    gate_up, w_down, S: tl.constexpr, F: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_F: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Of each weight a descriptor per piece: gate_up [2,F',S'], down [S',F']."""
    PIECES: tl.constexpr = _count(S, SPLIT)
    PADDED: tl.constexpr = (S + 15) // 16 * 16
    first = ()
    second = ()
    for p in tl.static_range(PIECES):
        of_gate_up, of_down = _piece_tiles(
            gate_up[p], w_down[p], PADDED, _size(S, SPLIT, p), F, BLOCK_F, TMA
        )
        first += (of_gate_up,)
        second += (of_down,)
    return first, second


@inlined
def _gate_up_chunk(gate_up, f, p: tl.constexpr, S: tl.constexpr, SPLIT: tl.constexpr):
    """Rows f and on of gate, then of up, of one piece of the tokens."""
    tile = gate_up[p].load([0, f, _start(S, SPLIT, p)])
    return tile.reshape(2 * tile.shape[1], tile.shape[2])


@inlined
def _down_chunk(w_down, f, p: tl.constexpr, S: tl.constexpr, SPLIT: tl.constexpr):
    return w_down[p].load([_start(S, SPLIT, p), f])


@triton.jit
def _token_mix_fwd_kernel(
    h_ptr, ssq_ptr, add_ptr, s_ptr, y_ptr, rstd_ptr,
    gate_up_0, gate_up_1, gate_up_2, down_0, down_1, down_2, count, eps,
    S: tl.constexpr, D: tl.constexpr, F: tl.constexpr, TILES: tl.constexpr, TMA: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """F is F'. With ssq, h stands for its norm over the features; add is added to that."""
    begin(PDL)
    PIECES: tl.constexpr = _count(S, SPLIT)
    sources = (gate_up_0, gate_up_1, gate_up_2), (down_0, down_1, down_2)
    gate_up, w_down = _weight_tiles(*sources, S, F, SPLIT, BLOCK_F, TMA)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    board, d, offs_d = _program(D, BLOCK_D)
    s = ()
    acc = ()
    for p in tl.static_range(PIECES):
        offs, mask, offs_s = _piece(board, offs_d, p, S, D, SPLIT)
        tile = tl.load(h_ptr + offs, mask=mask, other=0.0)
        if ssq_ptr is not None:
            rows = board.to(tl.int64) * S + offs_s
            scale = row_scale(ssq_ptr, rows, count, TILES, D, eps)[:, None]
            # Tokens that do not exist have another board's scale, which may be infinite.
            tile = down(tl.where(mask, up(tile) * scale, 0.0), dtype)
        if add_ptr is not None:
            tile = down(up(tile) + up(tl.load(add_ptr + offs, mask=mask, other=0.0)), dtype)
        if s_ptr is not None:
            tl.store(s_ptr + offs, tile, mask=mask)
        s += (tile.T,)
        acc += (tl.zeros((BLOCK_D, tile.shape[0]), tl.float32),)
    for f in range(0, F, BLOCK_F):
        gu = tl.zeros((BLOCK_D, 2 * BLOCK_F), tl.float32)
        for p in tl.static_range(PIECES):
            gu = dot(s[p], _gate_up_chunk(gate_up, f, p, S, SPLIT).T, gu)
        g, u = tl.split(gu.reshape(BLOCK_D, 2, BLOCK_F).permute(0, 2, 1))
        a = down(g * tl.sigmoid(g) * u, dtype)
        more = ()
        for p in tl.static_range(PIECES):
            more += (dot(a, _down_chunk(w_down, f, p, S, SPLIT).T, acc[p]),)
        acc = more
    total = ()
    squares = tl.zeros((BLOCK_D,), tl.float32)
    for p in tl.static_range(PIECES):
        total += (acc[p] + up(s[p]),)
        squares += tl.sum(total[p] * total[p], 1)
    rstd = tl.rsqrt(squares / S + eps)
    tl.store(rstd_ptr + board.to(tl.int64) * D + offs_d, rstd, mask=offs_d < D)
    for p in tl.static_range(PIECES):
        offs, mask, _ = _piece(board, offs_d, p, S, D, SPLIT)
        tl.store(y_ptr + offs, down(total[p] * rstd[:, None], dtype).T, mask=mask)


@triton.jit
def _token_mix_bwd_kernel(
    grad_ptr, s_ptr, y_ptr, rstd_ptr, ds_ptr, s_rows_ptr, dh_rows_ptr, dgu_source, a_source,
    gate_up_0, gate_up_1, gate_up_2, down_0, down_1, down_2, boards,
    S: tl.constexpr, D: tl.constexpr, F: tl.constexpr, TMA: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """dh, the gradient of the sum; then the hidden layer again, its gradient, and that of s.

    Writes what the weight gradients are products of, by features: s and dh [B*D,S'], and with one
    row of [B,D] each, the gradient of gate and up and the hidden layer a.
    """
    begin(PDL)
    PIECES: tl.constexpr = _count(S, SPLIT)
    PADDED: tl.constexpr = (S + 15) // 16 * 16
    sources = (gate_up_0, gate_up_1, gate_up_2), (down_0, down_1, down_2)
    gate_up, w_down = _weight_tiles(*sources, S, F, SPLIT, BLOCK_F, TMA)
    dgu_tiles = tiles(
        dgu_source, [boards, D, 2, F], [D * 2 * F, 2 * F, F, 1], [1, BLOCK_D, 2, BLOCK_F], TMA
    )
    a_tiles = tiles(a_source, [boards, D, F], [D * F, F, 1], [1, BLOCK_D, BLOCK_F], TMA)
    dtype: tl.constexpr = ds_ptr.dtype.element_ty
    board, d, offs_d = _program(D, BLOCK_D)
    row = board.to(tl.int64) * D + offs_d
    rstd = tl.load(rstd_ptr + row, mask=offs_d < D, other=0.0)
    projection = tl.zeros((BLOCK_D,), tl.float32)
    for p in tl.static_range(PIECES):
        offs, mask, _ = _piece(board, offs_d, p, S, D, SPLIT)
        grad = up(tl.load(grad_ptr + offs, mask=mask, other=0.0))
        projection += tl.sum(grad * up(tl.load(y_ptr + offs, mask=mask, other=0.0)), 0)
    projection /= S
    s = ()
    dh = ()
    acc = ()
    for p in tl.static_range(PIECES):
        offs, mask, offs_s = _piece(board, offs_d, p, S, D, SPLIT)
        # Once more, from the cache: all pieces at once would not fit the registers.
        grad = up(tl.load(grad_ptr + offs, mask=mask, other=0.0))
        y = up(tl.load(y_ptr + offs, mask=mask, other=0.0))
        d_sum = down((grad - y * projection[None, :]) * rstd[None, :], dtype)
        tile = tl.load(s_ptr + offs, mask=mask, other=0.0)
        rows = row[:, None] * PADDED + offs_s[None, :]
        mask_rows = (offs_d < D)[:, None] & (offs_s < PADDED)[None, :]
        tl.store(s_rows_ptr + rows, tile.T, mask=mask_rows)
        tl.store(dh_rows_ptr + rows, d_sum.T, mask=mask_rows)
        s += (tile.T,)
        dh += (d_sum.T,)
        acc += (up(d_sum.T),)
    for f in range(0, F, BLOCK_F):
        gu = tl.zeros((BLOCK_D, 2 * BLOCK_F), tl.float32)
        da = tl.zeros((BLOCK_D, BLOCK_F), tl.float32)
        w = ()
        for p in tl.static_range(PIECES):
            w += (_gate_up_chunk(gate_up, f, p, S, SPLIT),)
            gu = dot(s[p], w[p].T, gu)
            da = dot(dh[p], _down_chunk(w_down, f, p, S, SPLIT), da)
        g, u = tl.split(gu.reshape(BLOCK_D, 2, BLOCK_F).permute(0, 2, 1))
        sigmoid = tl.sigmoid(g)
        silu = g * sigmoid
        a_tiles.store([board, d, f], down(silu * u, dtype).reshape(1, BLOCK_D, BLOCK_F))
        dg = da * u * (sigmoid + silu * (1 - sigmoid))
        dgu = tl.join(dg, da * silu).permute(0, 2, 1).reshape(BLOCK_D, 2 * BLOCK_F)
        dgu = down(dgu, dtype)
        dgu_tiles.store([board, d, 0, f], dgu.reshape(1, BLOCK_D, 2, BLOCK_F))
        more = ()
        for p in tl.static_range(PIECES):
            more += (dot(dgu, w[p], acc[p]),)
        acc = more
    for p in tl.static_range(PIECES):
        offs, mask, _ = _piece(board, offs_d, p, S, D, SPLIT)
        tl.store(ds_ptr + offs, down(acc[p], dtype).T, mask=mask)


def pack(w_gate_up: Tensor, w_down: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """w_gate_up [2F,S], w_down [S,F] -> gate_up [2,F',S'], down [S',F'], zero padded, in dtype."""
    gate_up = w_gate_up.to(dtype).unflatten(0, (2, -1))
    return aligned(gate_up, (-2, -1)), aligned(w_down.to(dtype), (-2, -1))


def _weights(gate_up: Tensor, down: Tensor, tokens: int, row: Row) -> dict[str, Any]:
    """The kernels' weight arguments: of each a descriptor per piece of the tokens."""
    sizes = piece_sizes(tokens, row.tiles["SPLIT"])
    inner = row.tiles["BLOCK_F"]
    found: dict[str, Any] = {}
    for p in range(MAX_PIECES):
        there = p < len(sizes)
        found[f"gate_up_{p}"] = descriptor(gate_up, [2, inner, sizes[p]], row) if there else None
        found[f"down_{p}"] = descriptor(down, [sizes[p], inner], row) if there else None
    return found


def token_mix_fwd(
    h: Tensor,
    gate_up: Tensor,
    down: Tensor,
    eps: float,
    *,
    ssq: Tensor | None = None,
    add: Tensor | None = None,
    keep: bool = False,
    out: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """rms_norm over the tokens of s + SwiGLU along the tokens of s; s is h, or as follows.

    Args:
        h: [B,S,D].  gate_up, down: from `pack`.
        ssq: [T,N] float32 if h stands for rms_norm(h) over the features, deferred.
        add: [B,S,D], added to that: what the recursion injects.
        keep: whether s itself is written.
        out: y, rstd and s (None unless `keep`), that take the results.

    Returns:
        y [B,S,D], rstd [B,D] float32 (what the norm multiplied by), s [B,S,D] or None.
    """
    batch, tokens, width = h.shape
    if out is None:
        rstd = h.new_empty(batch, width, dtype=torch.float32)
        out = torch.empty_like(h), rstd, torch.empty_like(h) if keep else None
    y, rstd, s = out
    if not y.numel():
        return out
    if tokens > FUSED_TOKENS:
        token_mix_long_fwd(h, gate_up, down, eps, ssq, add, out)
        return out
    row = pick("token_mix_fwd", h, S=tokens)
    run(
        _token_mix_fwd_kernel, (batch * triton.cdiv(width, row.tiles["BLOCK_D"]),), row, h,
        h_ptr=h, ssq_ptr=ssq, add_ptr=add, s_ptr=s, y_ptr=y, rstd_ptr=rstd,
        **_weights(gate_up, down, tokens, row), count=batch * tokens, eps=eps, S=tokens, D=width,
        F=down.shape[1], TILES=0 if ssq is None else len(ssq), TMA=row.arch >= 90,
    )  # fmt: skip
    return out


def token_mix_bwd(
    grad: Tensor,
    s: Tensor,
    y: Tensor,
    rstd: Tensor,
    gate_up: Tensor,
    down: Tensor,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to s [B,S,D], gate_up [2,F',S'] and down [S',F'] (these float32) from that of y.

    Args:
        grad, s, y: [B,S,D].  rstd: [B,D] float32; s, y and rstd as the forward wrote them.
        gate_up, down: from `pack`.
        into: what the weight gradients are added to, in their shapes.
    """
    batch, tokens, width = s.shape
    inner, padded = gate_up.shape[1:]
    ds = torch.empty_like(s)
    dgu, a = s.new_empty(batch, width, 2, inner), s.new_empty(batch, width, inner)
    s_rows, dh_rows = s.new_empty(2, batch * width, padded).unbind()
    if not s.numel():
        pass
    elif tokens > FUSED_TOKENS:
        token_mix_long_bwd(grad, s, y, rstd, gate_up, down, ds, dgu, a, s_rows, dh_rows)
    else:
        row = pick("token_mix_bwd", s, S=tokens)
        block_d, block_f = row.tiles["BLOCK_D"], row.tiles["BLOCK_F"]
        run(
            _token_mix_bwd_kernel, (batch * triton.cdiv(width, block_d),), row, s,
            grad_ptr=grad, s_ptr=s, y_ptr=y, rstd_ptr=rstd, ds_ptr=ds, s_rows_ptr=s_rows,
            dh_rows_ptr=dh_rows, dgu_source=descriptor(dgu, [1, block_d, 2, block_f], row),
            a_source=descriptor(a, [1, block_d, block_f], row),
            **_weights(gate_up, down, tokens, row), boards=batch, S=tokens, D=width, F=inner,
            TMA=row.arch >= 90,
        )  # fmt: skip
    into_gate_up, into_down = into or (None, None)
    d_gate_up = weight_grad(
        dgu.view(-1, 2 * inner),
        s_rows,
        None if into_gate_up is None else into_gate_up.flatten(0, 1),
    )
    d_down = weight_grad(dh_rows, a.view(-1, inner), into_down)
    return ds, d_gate_up.view(gate_up.shape), d_down


def _op_fwd(h: Tensor, w_gate_up: Tensor, w_down: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, rstd, _ = token_mix_fwd(h, *pack(w_gate_up, w_down, h.dtype), eps)
    return y, rstd


def _op_bwd(
    grad: Tensor, h: Tensor, y: Tensor, rstd: Tensor, w_gate_up: Tensor, w_down: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    packed = pack(w_gate_up, w_down, h.dtype)
    dh, d_gate_up, d_down = token_mix_bwd(grad, h, y, rstd, *packed)
    tokens, inner = w_down.shape
    d_gate_up = d_gate_up[:, :inner, :tokens].reshape(w_gate_up.shape)
    d_weights = d_gate_up.to(w_gate_up.dtype), d_down[:tokens, :inner].to(w_down.dtype)
    return dh, d_weights[0].contiguous(), d_weights[1].contiguous()


def _fwd_fake(h: Tensor, w_gate_up: Tensor, w_down: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rstd = h.new_empty(h.shape[0], h.shape[2], dtype=torch.float32)
    return torch.empty_like(h), rstd


def _bwd_fake(
    grad: Tensor, h: Tensor, y: Tensor, rstd: Tensor, w_gate_up: Tensor, w_down: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(h), torch.empty_like(w_gate_up), torch.empty_like(w_down)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, w_gate_up, w_down, _ = inputs
    y, rstd = output
    ctx.save_for_backward(h, y, rstd, w_gate_up, w_down)
    ctx.mark_non_differentiable(rstd)


def _backward(ctx: Any, grad: Tensor, unused: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *_bwd(grad.contiguous(), *ctx.saved_tensors), None


_bwd = register(
    TRITON,
    "token_mix_bwd(Tensor grad, Tensor h, Tensor y, Tensor rstd, Tensor w_gate_up, Tensor w_down)"
    " -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
    _op_bwd,
)
_fwd = register(
    TRITON,
    "token_mix(Tensor h, Tensor w_gate_up, Tensor w_down, float eps) -> (Tensor, Tensor)",
    _fwd_fake,
    _op_fwd,
    save=_save,
    backward=_backward,
)


def token_mix(h: Tensor, w_gate_up: Tensor, w_down: Tensor, eps: float) -> Tensor:
    """h [B,S,D], w_gate_up [2F,S], w_down [S,F] -> [B,S,D]; see `trm_fast.ops`.

    Raises:
        ValueError: a dtype or width that the kernel does not serve.
    """
    tokens, inner = h.shape[1], w_down.shape[-1]
    check(
        "token_mix",
        unsupported_dtype(h.dtype),
        unsupported_width(h.shape[-1]),
        mismatch("w_gate_up", w_gate_up, (2 * inner, tokens), h),
        mismatch("w_down", w_down, (tokens, inner), h),
    )
    return _fwd(h.contiguous(), w_gate_up.contiguous(), w_down.contiguous(), eps)[0]


def examples(make: Callable[..., Tensor]) -> Iterator[None]:
    """Every launch at the official sizes, for the report: the op, and as the recursion calls it.

    Boards, tokens, inner width: Sudoku, without puzzle tokens, the most that is fused, Maze.
    """
    for sizes in ((768, 97, 512), (768, 81, 256), (768, 128, 512), (192, 916, 2560)):
        boards, tokens, inner = sizes
        h = make(boards, tokens, 512)
        gate_up, down = pack(make(2 * inner, tokens), make(tokens, inner), h.dtype)
        deferred = make(2, boards * tokens, dtype=torch.float32)
        y, rstd, _ = token_mix_fwd(h, gate_up, down, 1e-5)
        yield
        for ssq, add in ((None, h), (deferred, h), (deferred, None)):
            for keep in (False, True):
                # All variants at one size, the one that needs most registers at every size.
                if tokens in (97, 916) or (keep and ssq is not None and add is not None):
                    token_mix_fwd(h, gate_up, down, 1e-5, ssq=ssq, add=add, keep=keep)
                    yield
        token_mix_bwd(h, h, y, rstd, gate_up, down)
        yield
