"""residual_rmsnorm: rms_norm(h + u) along the features or the tokens, and the deferred norm.

Owns the op, and for other ops the two halves of a norm over features whose sums of squares were
written by the kernel that made the rows: `finish_norm` scales them, `norm_bwd` goes back through
it. Formula, r = 1 / sqrt(mean(t^2) + eps): y = r t, dt = r (dy - y mean(dy y)).
Imported by the other op modules.

Dims legend: B batch, S tokens incl. prefix, D width, N = B*S rows, T tiles of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from trm_fast.kernels._common import down, row_scale, up
from trm_fast.kernels._runtime import run
from trm_fast.kernels.launch import pick


@triton.jit
def _finish_norm_kernel(
    total_ptr, ssq_ptr, add_ptr, out_ptr, count, eps,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, COLUMNS)
    mask = (offs_m < count)[:, None] & (offs_d < WIDTH)[None, :]
    offs = offs_m[:, None] * WIDTH + offs_d[None, :]
    out_type = out_ptr.dtype.element_ty
    scale = row_scale(ssq_ptr, offs_m, count, TILES, WIDTH, eps)
    out = up(tl.load(total_ptr + offs, mask=mask, other=0.0)) * scale[:, None]
    if add_ptr is not None:
        # The reference rounds the norm before it adds.
        out = up(down(out, out_type)) + up(tl.load(add_ptr + offs, mask=mask, other=0.0))
    tl.store(out_ptr + offs, down(out, out_type), mask=mask)


def finish_norm(total: Tensor, ssq: Tensor, eps: float, add: Tensor | None = None) -> Tensor:
    """rms_norm(total) (+ add), [N, D], from the rows' partial sums of squares ssq [T, N] float32.

    add [N, D] is what the recursion injects: the answer state and the question.
    """
    out = total.new_empty(total.shape)
    count, width = total.shape
    if out.numel():
        row = pick("residual_rmsnorm", total, D=width)
        run(
            _finish_norm_kernel, (triton.cdiv(count, row.tiles["BLOCK_M"]),), row, total,
            total_ptr=total, ssq_ptr=ssq, add_ptr=add, out_ptr=out, count=count, eps=eps,
            WIDTH=width, COLUMNS=triton.next_power_of_2(width), TILES=len(ssq),
        )  # fmt: skip
    return out


@triton.jit
def _norm_bwd_kernel(
    grad_ptr, total_ptr, ssq_ptr, d_ptr, normed_ptr, count, eps,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
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
