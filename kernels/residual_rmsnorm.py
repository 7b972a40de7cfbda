"""residual_rmsnorm: rms_norm(h + u) along the features or the tokens, and the deferred norm.

Owns the op, and for other ops the two halves of a norm over features whose sums of squares were
written by the kernel that made the rows: `finish_norm` scales them, `norm_bwd` goes back through
it. Formula, r = 1 / sqrt(mean(t^2) + eps): y = r t, dt = r (dy - y mean(dy y)).
Imported by the other op modules.

Dims legend: B batch, S tokens incl. prefix, D width, N = B*S rows, T tiles of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trm_fast.kernels._common import (
    begin,
    check,
    down,
    inlined,
    row_scale,
    unsupported,
    unsupported_dtype,
    unsupported_width,
    up,
)
from trm_fast.kernels._runtime import run
from trm_fast.kernels.launch import pick
from trm_fast.kernels.registration import TRITON, register

__all__ = ["finish_norm", "norm_bwd", "residual_rmsnorm", "unsupported"]

FEATURES, TOKENS = 2, 1  # the axes of [B, S, D] that a norm can run along


@triton.jit
def _finish_norm_kernel(
    total_ptr, ssq_ptr, add_ptr, out_ptr, count, eps, inverse,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, COLUMNS)
    mask = (offs_m < count)[:, None] & (offs_d < WIDTH)[None, :]
    offs = offs_m[:, None] * WIDTH + offs_d[None, :]
    out_type = out_ptr.dtype.element_ty
    out = up(tl.load(total_ptr + offs, mask=mask, other=0.0))
    if ssq_ptr is not None:
        out *= row_scale(ssq_ptr, offs_m, count, TILES, WIDTH, eps)[:, None]
    if out_type == tl.float8e4nv:
        # The reference rounds the norm before it rounds once more.
        out = up(down(out, total_ptr.dtype.element_ty)) * inverse
    if add_ptr is not None:
        # The reference rounds the norm before it adds.
        out = up(down(out, out_type)) + up(tl.load(add_ptr + offs, mask=mask, other=0.0))
    tl.store(out_ptr + offs, down(out, out_type), mask=mask)


def finish_norm(
    total: Tensor,
    ssq: Tensor | None,
    eps: float,
    add: Tensor | None = None,
    out: Tensor | None = None,
    step: float = 1.0,
) -> Tensor:
    """rms_norm(total) (+ add), [N, D], from the rows' partial sums of squares ssq [T, N] float32.

    add [N, D] is what the recursion injects: the answer state and the question. `out` takes the
    result, which is divided by `step`, a power of two, if it takes e4m3. Without ssq `total` is
    the norm already.
    """
    out = torch.empty_like(total) if out is None else out
    count, width = total.shape
    if out.numel():
        row = pick("residual_rmsnorm", total, D=width)
        run(
            _finish_norm_kernel, (triton.cdiv(count, row.tiles["BLOCK_M"]),), row, total,
            total_ptr=total, ssq_ptr=ssq, add_ptr=add, out_ptr=out, count=count, eps=eps,
            inverse=1 / step, WIDTH=width, COLUMNS=triton.next_power_of_2(width),
            TILES=0 if ssq is None else len(ssq),
        )  # fmt: skip
    return out


@triton.jit
def _norm_bwd_kernel(
    grad_ptr, total_ptr, ssq_ptr, d_ptr, normed_ptr, count, eps,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, COLUMNS)
    mask = (offs_m < count)[:, None] & (offs_d < WIDTH)[None, :]
    offs = offs_m[:, None] * WIDTH + offs_d[None, :]
    scale = row_scale(ssq_ptr, offs_m, count, TILES, WIDTH, eps)[:, None]
    normed = up(tl.load(total_ptr + offs, mask=mask, other=0.0)) * scale
    grad = up(tl.load(grad_ptr + offs, mask=mask, other=0.0))
    projection = tl.sum(grad * normed, 1)[:, None] / WIDTH
    d = (grad - normed * projection) * scale
    tl.store(d_ptr + offs, down(d, d_ptr.dtype.element_ty), mask=mask)
    if normed_ptr is not None:
        tl.store(normed_ptr + offs, down(normed, normed_ptr.dtype.element_ty), mask=mask)


def norm_bwd(
    grad: Tensor,
    total: Tensor,
    ssq: Tensor,
    eps: float,
    out: Tensor | None = None,
    normed: Tensor | None = None,
) -> Tensor:
    """Gradient to total [N, D] of rms_norm(total), given that of the norm, grad [N, D].

    `out` takes the result (it may be `grad`); `normed` takes rms_norm(total) itself, recomputed
    (it may be `total`): what the weight gradient of a layer that read the norm is made of.
    """
    out = grad.new_empty(grad.shape) if out is None else out
    count, width = total.shape
    if out.numel():
        row = pick("residual_rmsnorm", total, D=width)
        run(
            _norm_bwd_kernel, (triton.cdiv(count, row.tiles["BLOCK_M"]),), row, total,
            grad_ptr=grad, total_ptr=total, ssq_ptr=ssq, d_ptr=out, normed_ptr=normed, count=count,
            eps=eps, WIDTH=width, COLUMNS=triton.next_power_of_2(width), TILES=len(ssq),
        )  # fmt: skip
    return out


@inlined
def _rounded_sum(h_ptr, u_ptr, offs, mask):
    """h + u in their dtype: the reference rounds the sum before it squares it."""
    h = up(tl.load(h_ptr + offs, mask=mask, other=0.0))
    return down(h + up(tl.load(u_ptr + offs, mask=mask, other=0.0)), h_ptr.dtype.element_ty)


@triton.jit
def _features_fwd_kernel(
    h_ptr, u_ptr, total_ptr, ssq_ptr, out_ptr, count, eps,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, COLUMNS)
    mask = (offs_m < count)[:, None] & (offs_d < WIDTH)[None, :]
    offs = offs_m[:, None] * WIDTH + offs_d[None, :]
    total = _rounded_sum(h_ptr, u_ptr, offs, mask)
    tl.store(total_ptr + offs, total, mask=mask)
    ssq = tl.sum(up(total) * up(total), 1)
    tl.store(ssq_ptr + offs_m, ssq, mask=offs_m < count)
    out = up(total) * tl.rsqrt(ssq / WIDTH + eps)[:, None]
    tl.store(out_ptr + offs, down(out, out_ptr.dtype.element_ty), mask=mask)


@inlined
def _tokens_offsets(WIDTH: tl.constexpr, S: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of a program that owns BLOCK_D columns of one item: item, columns, its first element."""
    columns: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    item = tl.program_id(0).to(tl.int64) // columns
    offs_d = tl.program_id(0) % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    return item, offs_d, item * S * WIDTH


@triton.jit
def _tokens_fwd_kernel(
    h_ptr, u_ptr, total_ptr, ssq_ptr, out_ptr, eps,
    S: tl.constexpr, WIDTH: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    item, offs_d, first = _tokens_offsets(WIDTH, S, BLOCK_D)
    squares = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for s in range(0, S, BLOCK_S):
        offs_s = s + tl.arange(0, BLOCK_S)
        mask = (offs_s < S)[:, None] & (offs_d < WIDTH)[None, :]
        offs = first + offs_s[:, None] * WIDTH + offs_d[None, :]
        total = _rounded_sum(h_ptr, u_ptr, offs, mask)
        tl.store(total_ptr + offs, total, mask=mask)
        squares += up(total) * up(total)
    ssq = tl.sum(squares, 0)
    tl.store(ssq_ptr + item * WIDTH + offs_d, ssq, mask=offs_d < WIDTH)
    scale = tl.rsqrt(ssq / S + eps)[None, :]
    # The inputs once more, from the cache: another thread may have written that part of the sum.
    for s in range(0, S, BLOCK_S):
        offs_s = s + tl.arange(0, BLOCK_S)
        mask = (offs_s < S)[:, None] & (offs_d < WIDTH)[None, :]
        offs = first + offs_s[:, None] * WIDTH + offs_d[None, :]
        out = up(_rounded_sum(h_ptr, u_ptr, offs, mask)) * scale
        tl.store(out_ptr + offs, down(out, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tokens_bwd_kernel(
    grad_ptr, total_ptr, ssq_ptr, d_ptr, eps,
    S: tl.constexpr, WIDTH: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    item, offs_d, first = _tokens_offsets(WIDTH, S, BLOCK_D)
    ssq = tl.load(ssq_ptr + item * WIDTH + offs_d, mask=offs_d < WIDTH, other=0.0)
    scale = tl.rsqrt(ssq / S + eps)[None, :]
    products = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for s in range(0, S, BLOCK_S):
        offs_s = s + tl.arange(0, BLOCK_S)
        mask = (offs_s < S)[:, None] & (offs_d < WIDTH)[None, :]
        offs = first + offs_s[:, None] * WIDTH + offs_d[None, :]
        normed = up(tl.load(total_ptr + offs, mask=mask, other=0.0)) * scale
        products += up(tl.load(grad_ptr + offs, mask=mask, other=0.0)) * normed
    projection = tl.sum(products, 0)[None, :] / S
    for s in range(0, S, BLOCK_S):
        offs_s = s + tl.arange(0, BLOCK_S)
        mask = (offs_s < S)[:, None] & (offs_d < WIDTH)[None, :]
        offs = first + offs_s[:, None] * WIDTH + offs_d[None, :]
        normed = up(tl.load(total_ptr + offs, mask=mask, other=0.0)) * scale
        d = (up(tl.load(grad_ptr + offs, mask=mask, other=0.0)) - normed * projection) * scale
        tl.store(d_ptr + offs, down(d, d_ptr.dtype.element_ty), mask=mask)


def residual_rmsnorm_fwd(
    h: Tensor, u: Tensor, axis: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """h, u [B,S,D] -> rms_norm(h + u), h + u, its sums of squares float32.

    The squares are summed along `axis`: [1, B*S] for FEATURES, [B, D] for TOKENS.
    """
    batch, tokens, width = h.shape
    out, total, ssq = _fwd_fake(h, u, axis, eps)
    if out.numel() and axis == FEATURES:
        count = batch * tokens
        row = pick("residual_rmsnorm", h, D=width)
        run(
            _features_fwd_kernel, (triton.cdiv(count, row.tiles["BLOCK_M"]),), row, h,
            h_ptr=h, u_ptr=u, total_ptr=total, ssq_ptr=ssq, out_ptr=out, count=count, eps=eps,
            WIDTH=width, COLUMNS=triton.next_power_of_2(width),
        )  # fmt: skip
    elif out.numel():
        row = pick("residual_rmsnorm_tokens", h)
        run(
            _tokens_fwd_kernel, (batch * triton.cdiv(width, row.tiles["BLOCK_D"]),), row, h,
            h_ptr=h, u_ptr=u, total_ptr=total, ssq_ptr=ssq, out_ptr=out, eps=eps,
            S=tokens, WIDTH=width,
        )  # fmt: skip
    return out, total, ssq


def residual_rmsnorm_bwd(grad: Tensor, total: Tensor, ssq: Tensor, axis: int, eps: float) -> Tensor:
    """Gradient to h, which is that to u, from that of the norm; all [B,S,D]."""
    if axis == FEATURES:
        d = norm_bwd(grad.flatten(0, 1), total.flatten(0, 1), ssq, eps)
        return d.view(total.shape)
    d = torch.empty_like(total)
    batch, tokens, width = total.shape
    if d.numel():
        row = pick("residual_rmsnorm_tokens", total)
        run(
            _tokens_bwd_kernel, (batch * triton.cdiv(width, row.tiles["BLOCK_D"]),), row, total,
            grad_ptr=grad, total_ptr=total, ssq_ptr=ssq, d_ptr=d, eps=eps, S=tokens, WIDTH=width,
        )  # fmt: skip
    return d


def _fwd_fake(h: Tensor, u: Tensor, axis: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, width = h.shape
    sums = (1, batch * tokens) if axis == FEATURES else (batch, width)
    ssq = h.new_empty(sums, dtype=torch.float32)
    return torch.empty_like(h), torch.empty_like(h), ssq


def _bwd_fake(grad: Tensor, total: Tensor, ssq: Tensor, axis: int, eps: float) -> Tensor:
    return torch.empty_like(total)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, total, ssq = output
    ctx.save_for_backward(total, ssq)
    ctx.settings = inputs[2:]
    ctx.mark_non_differentiable(total, ssq)


def _backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor, Tensor, None, None]:
    d = _bwd(grad.contiguous(), *ctx.saved_tensors, *ctx.settings)
    return d, d, None, None


_bwd = register(
    TRITON,
    "residual_rmsnorm_bwd(Tensor grad, Tensor total, Tensor ssq, int axis, float eps) -> Tensor",
    _bwd_fake,
    residual_rmsnorm_bwd,
)
_fwd = register(
    TRITON,
    "residual_rmsnorm(Tensor h, Tensor u, int axis, float eps) -> (Tensor, Tensor, Tensor)",
    _fwd_fake,
    residual_rmsnorm_fwd,
    save=_save,
    backward=_backward,
)


def residual_rmsnorm(h: Tensor, u: Tensor, axis: int, eps: float) -> Tensor:
    """h, u [B,S,D] -> rms_norm(h + u) [B,S,D] along the features or the tokens; see `trm_fast.ops`.

    Raises:
        ValueError: a dtype or width that the kernel does not serve, another axis.
    """
    known = axis in (FEATURES, TOKENS, FEATURES - 3, TOKENS - 3)
    check(
        "residual_rmsnorm",
        unsupported_dtype(h.dtype),
        unsupported_width(h.shape[-1]),
        None if known else f"normalises along axis 1 (tokens) or 2 (features), not {axis}",
    )
    return _fwd(h.contiguous(), u.contiguous(), axis % 3, eps)[0]


def examples(make: Callable[..., Tensor]) -> Iterator[None]:
    """Every launch of this file at the official size, for the report: the op along both axes, and
    the halves of a deferred norm as the recursion calls them."""
    shape = (768, 97, 512)
    h = make(*shape)
    for axis in (FEATURES, TOKENS):
        _, total, ssq = residual_rmsnorm_fwd(h, h, axis, 1e-5)
        yield
        residual_rmsnorm_bwd(h, total, ssq, axis, 1e-5)
        yield
    rows, ssq = h.flatten(0, 1), make(2, shape[0] * shape[1], dtype=torch.float32)
    for add in (None, rows):
        finish_norm(rows, ssq, 1e-5, add)
        yield
    for normed in (None, rows):
        norm_bwd(rows, rows, ssq, 1e-5, normed=normed)
        yield
