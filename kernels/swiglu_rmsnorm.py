"""swiglu_rmsnorm: rms_norm(h + W_down(silu(g) * u)) over the features, g, u = W_gate h, W_up h.

Owns the op and its halves, which the recursion strings together itself: `gate_up` (both products
and SwiGLU in one kernel; the down product with its residual is `linear`), `swiglu_bwd` (the down
product's gradient, carried through SwiGLU in the epilogue) and, by `linear`, the input's gradient.
Two kernels forward and not one: a tile of 128 whole output rows would fill the register file.
`swiglu_e4m3` is the same with products in 8 bits, for passes without a gradient.
Imported by `network` and `trm_fast.backends`.

Dims legend: B batch, S tokens incl. prefix, D width, F inner width, N = B*S rows, T tiles of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from trm_fast.kernels._common import (
    E4M3,
    E4M3_TILE,
    aligned,
    begin,
    check,
    dot,
    dot_e4m3,
    down,
    e4m3_rows,
    e4m3_step,
    mismatch,
    round_up,
    row_scale,
    tiles,
    unsupported,
    unsupported_dtype,
    unsupported_width,
    up,
)
from trm_fast.kernels._runtime import descriptor, run
from trm_fast.kernels.launch import pick
from trm_fast.kernels.linear_rmsnorm import linear, new_squares
from trm_fast.kernels.registration import TRITON, register
from trm_fast.kernels.residual_rmsnorm import finish_norm, norm_bwd

__all__ = [
    "ChannelE4M3",
    "gate_up",
    "pack",
    "pack_e4m3",
    "swiglu_bwd",
    "swiglu_e4m3",
    "swiglu_rmsnorm",
    "unsupported",
]


def pack(w_gate_up: Tensor, w_down: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights [2F,D] and [D,F] as the kernels read them: [2,F',D] and [D,F'] in `dtype`.

    F' is F rounded up to whole 16s with zeros, which add nothing: silu(0) * 0.
    """
    gate_up = w_gate_up.to(dtype).view(2, -1, w_gate_up.shape[1])
    return aligned(gate_up, axes=(1,)), aligned(w_down.to(dtype))


class ChannelE4M3(NamedTuple):
    """SwiGLU's weights in e4m3, of inner width F' as `pack` has it, and steps float32.

    gate_up [2,F',D] with gate_up_step [2,F'], which holds the step of h as a factor; down [D,F']
    with down_step [D]; h_step: of the input.
    """

    gate_up: Tensor
    gate_up_step: Tensor
    down: Tensor
    down_step: Tensor
    h_step: float


def pack_e4m3(w_gate_up: Tensor, w_down: Tensor, norm_count: int) -> ChannelE4M3:
    """From master weights [2F,D] and [D,F], for inputs that are norms over `norm_count` numbers.

    None of these is larger than its root: h_step is the smallest power of two that brings that
    below e4m3's largest number.
    """
    gate_up, down = pack(w_gate_up, w_down, torch.float32)
    h_step = 1.0
    while h_step * 448 < norm_count**0.5:
        h_step *= 2
    while h_step * 224 >= norm_count**0.5:
        h_step /= 2
    gate_up, gate_up_step = e4m3_rows(gate_up)
    down, down_step = e4m3_rows(down)
    return ChannelE4M3(gate_up, gate_up_step * h_step, down, down_step, h_step)


@triton.jit
def _gate_up_kernel(
    h_source, w_source, a_source, gu_source, ssq_ptr, w_step_ptr, a_step_ptr, count, eps,
    D: tl.constexpr, F: tl.constexpr, TILES: tl.constexpr, TMA: tl.constexpr, ARCH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """a = silu(g) * u. The norm that h stands for is a factor per row: it commutes with W.

    With steps all three are e4m3: those of W, and of h, are factors of g and u; those of a are
    found here, where a row's part of this tile is at hand.
    """
    begin(PDL)
    h_tiles = tiles(h_source, [count, D], [D, 1], [BLOCK_M, BLOCK_K], TMA)
    w_tiles = tiles(w_source, [2, F, D], [F * D, D, 1], [1, BLOCK_N, BLOCK_K], TMA)
    num_n: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    m = tl.program_id(0) // num_n * BLOCK_M
    n = tl.program_id(0) % num_n * BLOCK_N
    g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    u = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, D, BLOCK_K):
        h = h_tiles.load([m, k])
        w_g = w_tiles.load([0, n, k]).reshape(BLOCK_N, BLOCK_K).T
        w_u = w_tiles.load([1, n, k]).reshape(BLOCK_N, BLOCK_K).T
        if w_step_ptr is None:
            g = dot(h, w_g, g)
            u = dot(h, w_u, u)
        else:
            g = dot_e4m3(h, w_g, g, ARCH)
            u = dot_e4m3(h, w_u, u, ARCH)
    offs_m, offs_n = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    if ssq_ptr is not None:
        scale = row_scale(ssq_ptr, offs_m, count, TILES, D, eps)[:, None]
        g *= scale
        u *= scale
    if w_step_ptr is not None:
        g *= tl.load(w_step_ptr + offs_n, mask=offs_n < F, other=0.0)[None, :]
        u *= tl.load(w_step_ptr + F + offs_n, mask=offs_n < F, other=0.0)[None, :]
    if gu_source is not None:
        gu_tiles = tiles(gu_source, [count, 2, F], [2 * F, F, 1], [BLOCK_M, 1, BLOCK_N], TMA)
        gu_tiles.store([m, 0, n], down(g, gu_tiles.dtype).reshape(BLOCK_M, 1, BLOCK_N))
        gu_tiles.store([m, 1, n], down(u, gu_tiles.dtype).reshape(BLOCK_M, 1, BLOCK_N))
    if a_source is not None:
        a_tiles = tiles(a_source, [count, F], [F, 1], [BLOCK_M, BLOCK_N], TMA)
        a = g * tl.sigmoid(g) * u
        if a_step_ptr is not None:
            step, inverse = e4m3_step(a)
            offs = (n // BLOCK_N).to(tl.int64) * count + offs_m
            tl.store(a_step_ptr + offs, step, mask=offs_m < count)
            a *= inverse[:, None]
        a_tiles.store([m, n], down(a, a_tiles.dtype))


def gate_up(
    h: Tensor,
    weight: Tensor,
    *,
    a: Tensor | None = None,
    gu: Tensor | None = None,
    ssq: Tensor | None = None,
    eps: float = 0.0,
    w_step: Tensor | None = None,
    a_step: Tensor | None = None,
) -> None:
    """Write a = silu(g) * u, or g and u themselves, or both.

    Args:
        h: [N, D].  weight: [2, F, D] of `pack`.  a: takes [N, F].  gu: takes [N, 2, F].
        ssq: [T, N] float32 if h stands for rms_norm(h), deferred.
        w_step: [2, F] float32, of weights in e4m3, times the step of h, which is e4m3 then, too.
        a_step: takes [F / E4M3_TILE, N] float32 if a takes e4m3: a step per row and tile.
    """
    count, width = h.shape
    inner = weight.shape[1]
    row = pick("gate_up", h, M=count, N=inner)
    block_m, block_n, block_k = (row.tiles[f"BLOCK_{axis}"] for axis in "MNK")
    assert a_step is None or block_n == E4M3_TILE
    if count:
        run(
            _gate_up_kernel, (triton.cdiv(count, block_m) * triton.cdiv(inner, block_n),), row, h,
            h_source=descriptor(h, [block_m, block_k], row),
            w_source=descriptor(weight, [1, block_n, block_k], row),
            a_source=None if a is None else descriptor(a, [block_m, block_n], row),
            gu_source=None if gu is None else descriptor(gu, [block_m, 1, block_n], row),
            ssq_ptr=ssq, w_step_ptr=w_step, a_step_ptr=a_step, count=count, eps=eps,
            D=width, F=inner, TILES=0 if ssq is None else len(ssq), TMA=row.arch >= 90,
            ARCH=row.arch,
        )  # fmt: skip


def swiglu_e4m3(h: Tensor, w: ChannelE4M3, ssq: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """h + W_down(silu(g) * u) [N,D] of products in e4m3, its norm deferred: squares [T,N] float32.

    h [N,D] and ssq as `gate_up` takes them. Without a gradient; definition: `trm_fast/fp8.py`.
    """
    count, inner = len(h), w.down.shape[1]
    narrow = finish_norm(h, ssq, eps, out=torch.empty_like(h, dtype=E4M3), step=w.h_step)
    a = narrow.new_empty(count, inner)
    a_step = h.new_empty(triton.cdiv(inner, E4M3_TILE), count, dtype=torch.float32)
    gate_up(narrow, w.gate_up, a=a, w_step=w.gate_up_step, a_step=a_step)
    total, squares = linear(
        a, w.down, h, squares=True, h_ssq=ssq, eps=eps, a_step=a_step, w_step=w.down_step
    )
    assert squares is not None
    return total, squares


@triton.jit
def _swiglu_bwd_kernel(
    d_source, w_source, gu_source, d_gu_source, a_source, count,
    D: tl.constexpr, F: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    d_tiles = tiles(d_source, [count, D], [D, 1], [BLOCK_M, BLOCK_K], TMA)
    w_tiles = tiles(w_source, [D, F], [F, 1], [BLOCK_K, BLOCK_N], TMA)
    gu_tiles = tiles(gu_source, [count, 2, F], [2 * F, F, 1], [BLOCK_M, 1, BLOCK_N], TMA)
    d_gu_tiles = tiles(d_gu_source, [count, 2, F], [2 * F, F, 1], [BLOCK_M, 1, BLOCK_N], TMA)
    a_tiles = tiles(a_source, [count, F], [F, 1], [BLOCK_M, BLOCK_N], TMA)
    num_n: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    m = tl.program_id(0) // num_n * BLOCK_M
    n = tl.program_id(0) % num_n * BLOCK_N
    d_a = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, D, BLOCK_K):
        d_a = dot(d_tiles.load([m, k]), w_tiles.load([k, n]), d_a)
    g = up(gu_tiles.load([m, 0, n]).reshape(BLOCK_M, BLOCK_N))
    u = up(gu_tiles.load([m, 1, n]).reshape(BLOCK_M, BLOCK_N))
    s = tl.sigmoid(g)
    silu = g * s
    a_tiles.store([m, n], down(silu * u, a_tiles.dtype))
    d_g = down(d_a * u * (s + silu * (1 - s)), d_gu_tiles.dtype)
    d_u = down(d_a * silu, d_gu_tiles.dtype)
    d_gu_tiles.store([m, 0, n], d_g.reshape(BLOCK_M, 1, BLOCK_N))
    d_gu_tiles.store([m, 1, n], d_u.reshape(BLOCK_M, 1, BLOCK_N))


def swiglu_bwd(d: Tensor, w_down: Tensor, gu: Tensor, *, d_gu: Tensor, a: Tensor) -> None:
    """Gradient of g and u, given that of W_down(a), and a = silu(g) * u again.

    Args:
        d: [N, D].  w_down: [D, F] of `pack`.  gu: [N, 2, F].
        d_gu: takes [N, 2, F]; it may be `gu`.  a: takes [N, F].
    """
    count, width = d.shape
    inner = w_down.shape[1]
    row = pick("swiglu_bwd", d, M=count, N=inner)
    block_m, block_n, block_k = (row.tiles[f"BLOCK_{axis}"] for axis in "MNK")
    if count:
        run(
            _swiglu_bwd_kernel, (triton.cdiv(count, block_m) * triton.cdiv(inner, block_n),),
            row, d,
            d_source=descriptor(d, [block_m, block_k], row),
            w_source=descriptor(w_down, [block_k, block_n], row),
            gu_source=descriptor(gu, [block_m, 1, block_n], row),
            d_gu_source=descriptor(d_gu, [block_m, 1, block_n], row),
            a_source=descriptor(a, [block_m, block_n], row),
            count=count, D=width, F=inner, TMA=row.arch >= 90,
        )  # fmt: skip


def swiglu_rmsnorm_fwd(
    h: Tensor, w_gate_up: Tensor, w_down: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h [N,D], w_gate_up [2F,D], w_down [D,F] -> the norm, the sum, its squares [T,N], gu [N,2,F'].

    The backward computes silu(g) * u again from gu: one product of two numbers is cheaper than
    reading it.
    """
    gate_up_weight, down_weight = pack(w_gate_up, w_down, h.dtype)
    inner = down_weight.shape[1]
    gu, a = h.new_empty(len(h), 2, inner), h.new_empty(len(h), inner)
    gate_up(h, gate_up_weight, a=a, gu=gu)
    total, ssq = linear(a, down_weight, h, squares=True)
    assert ssq is not None
    return finish_norm(total, ssq, eps), total, ssq, gu


def swiglu_rmsnorm_bwd(
    grad: Tensor,
    h: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    total: Tensor,
    ssq: Tensor,
    gu: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to h and the weights, in their dtypes, from that of the norm, grad [N,D]."""
    gate_up_weight, down_weight = pack(w_gate_up, w_down, h.dtype)
    inner, width = w_down.shape[1], h.shape[1]
    d = norm_bwd(grad, total, ssq, eps)
    d_gu, a = torch.empty_like(gu), gu.new_empty(len(gu), gu.shape[2])
    swiglu_bwd(d, down_weight, gu, d_gu=d_gu, a=a)
    flat = d_gu.flatten(1)
    d_h, _ = linear(flat, gate_up_weight.flatten(0, 1), d, w_is_kn=True)
    d_gate_up = (flat.t() @ h).view(2, -1, width)[:, :inner].reshape(w_gate_up.shape)
    return d_h, d_gate_up, (d.t() @ a)[:, :inner].contiguous()


def _fwd_fake(
    h: Tensor, w_gate_up: Tensor, w_down: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gu = h.new_empty(len(h), 2, round_up(w_down.shape[1]))
    return torch.empty_like(h), torch.empty_like(h), new_squares(h, *h.shape), gu


def _bwd_fake(
    grad: Tensor, h: Tensor, w_gate_up: Tensor, w_down: Tensor, *saved: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(h), torch.empty_like(w_gate_up), torch.empty_like(w_down)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, w_gate_up, w_down, eps = inputs
    _, total, ssq, gu = output
    ctx.save_for_backward(h, w_gate_up, w_down, total, ssq, gu)
    ctx.eps = eps
    ctx.mark_non_differentiable(total, ssq, gu)


def _backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *_bwd(grad.contiguous(), *ctx.saved_tensors, ctx.eps), None


_bwd = register(
    TRITON,
    "swiglu_rmsnorm_bwd(Tensor grad, Tensor h, Tensor w_gate_up, Tensor w_down, Tensor total,"
    " Tensor ssq, Tensor gu, float eps) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
    swiglu_rmsnorm_bwd,
)
_fwd = register(
    TRITON,
    "swiglu_rmsnorm(Tensor h, Tensor w_gate_up, Tensor w_down, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
    swiglu_rmsnorm_fwd,
    save=_save,
    backward=_backward,
)


def swiglu_rmsnorm(h: Tensor, w_gate_up: Tensor, w_down: Tensor, eps: float) -> Tensor:
    """h [B,S,D], w_gate_up [2F,D], w_down [D,F] -> [B,S,D]; see `trm_fast.ops`.

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
    rows = h.flatten(0, 1).contiguous()
    out, _, _, _ = _fwd(rows, w_gate_up.contiguous(), w_down.contiguous(), eps)
    return out.view(h.shape)


def examples(make: Callable[..., Tensor]) -> Iterator[None]:
    """Every launch of this file at the official size, for the report: training, no gradient,
    and with the deferred norm of the attention variant."""
    count, width, inner = 768 * 97, 512, 1536
    h, w_gate_up, w_down = make(count, width), make(2 * inner, width), make(width, inner)
    swiglu_rmsnorm_fwd(h, w_gate_up, w_down, 1e-5)
    yield
    gu, ssq = make(count, 2, inner), make(2, count, dtype=torch.float32)
    swiglu_rmsnorm_bwd(h, h, w_gate_up, w_down, h, ssq, gu, 1e-5)
    yield
    weight, _ = pack(w_gate_up, w_down, h.dtype)
    for deferred in (None, ssq):
        swiglu_e4m3(h, pack_e4m3(w_gate_up, w_down, width), deferred, 1e-5)
        yield
        for kept in (None, gu):
            gate_up(h, weight, a=make(count, inner), gu=kept, ssq=deferred, eps=1e-5)
            yield
        gate_up(h, weight, gu=gu, ssq=deferred, eps=1e-5)
        yield
