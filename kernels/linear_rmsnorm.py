"""linear_rmsnorm: rms_norm(h + a @ w.T), the output projection of attention with its epilogue.

Owns the op and `linear`, the matrix product with residual that other ops use too. The norm is
deferred: the product's epilogue writes the sum and, per row and tile, the sum of its squares; what
reads the rows next scales them. So no tile has to hold a whole row.
Imported by the op modules after it and by `trm_fast.backends`.

Dims legend: B batch, S tokens incl. prefix, D width, E input width, N = B*S rows, T tiles of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trm_fast.kernels import _common
from trm_fast.kernels._common import (
    E4M3_TILE,
    Shape,
    aligned,
    begin,
    check,
    dot,
    down,
    mismatch,
    row_scale,
    tiles,
    unsupported_dtype,
    unsupported_width,
    up,
)
from trm_fast.kernels._runtime import descriptor, run
from trm_fast.kernels.launch import pick
from trm_fast.kernels.registration import TRITON, register
from trm_fast.kernels.residual_rmsnorm import finish_norm, norm_bwd

__all__ = ["linear", "linear_rmsnorm", "new_squares", "unsupported"]


@triton.jit
def _linear_kernel(
    a_source, w_source, h_source, out_source, ssq_ptr, h_ssq_ptr, a_step_ptr, w_step_ptr, count,
    eps,
    K: tl.constexpr, N: tl.constexpr, W_IS_KN: tl.constexpr, H_TILES: tl.constexpr,
    TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out = h + a @ w, with w stored [N, K] or, W_IS_KN, [K, N]; h scaled by its deferred norm.

    With steps a and w are e4m3: w's belong to columns, a's to rows and blocks of BLOCK_K.
    """
    begin(PDL)
    a_tiles = tiles(a_source, [count, K], [K, 1], [BLOCK_M, BLOCK_K], TMA)
    if W_IS_KN:
        w_tiles = tiles(w_source, [K, N], [N, 1], [BLOCK_K, BLOCK_N], TMA)
    else:
        w_tiles = tiles(w_source, [N, K], [K, 1], [BLOCK_N, BLOCK_K], TMA)
    out_tiles = tiles(out_source, [count, N], [N, 1], [BLOCK_M, BLOCK_N], TMA)
    num_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile_n = tl.program_id(0) % num_n
    m = tl.program_id(0) // num_n * BLOCK_M
    n = tile_n * BLOCK_N
    offs_m = m + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        w = w_tiles.load([k, n]) if W_IS_KN else w_tiles.load([n, k]).T
        if a_step_ptr is None:
            acc = dot(a_tiles.load([m, k]), w, acc)
        else:
            at = a_step_ptr + k // BLOCK_K * count + offs_m
            step = tl.load(at, mask=offs_m < count, other=0.0)
            acc += dot(a_tiles.load([m, k]), w) * step[:, None]
    if w_step_ptr is not None:
        offs_n = n + tl.arange(0, BLOCK_N)
        acc *= tl.load(w_step_ptr + offs_n, mask=offs_n < N, other=0.0)[None, :]
    if h_source is not None:
        h_tiles = tiles(h_source, [count, N], [N, 1], [BLOCK_M, BLOCK_N], TMA)
        h = up(h_tiles.load([m, n]))
        if h_ssq_ptr is not None:
            h *= row_scale(h_ssq_ptr, offs_m, count, H_TILES, N, eps)[:, None]
        acc += h
    if ssq_ptr is not None:
        offs = tile_n.to(tl.int64) * count + offs_m
        tl.store(ssq_ptr + offs, tl.sum(acc * acc, 1), mask=offs_m < count)
    out_tiles.store([m, n], down(acc, out_tiles.dtype))


def new_squares(like: Tensor, count: int, width: int) -> Tensor:
    """Empty [T, count] float32 for the sums of squares of rows of `width` that `linear` makes."""
    block_n = pick("linear", like, M=count, N=width).tiles["BLOCK_N"]
    return like.new_empty(triton.cdiv(width, block_n), count, dtype=torch.float32)


def linear(
    a: Tensor,
    w: Tensor,
    h: Tensor | None = None,
    *,
    w_is_kn: bool = False,
    squares: bool | Tensor = False,
    h_ssq: Tensor | None = None,
    eps: float = 0.0,
    out: Tensor | None = None,
    a_step: Tensor | None = None,
    w_step: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """h + a @ w.T and, with `squares`, the partial sums of squares of its rows.

    Args:
        a: [N, K].  w: [D, K], or [K, D] with `w_is_kn`.  h: [N, D] or None for nothing.
        squares: whether to sum them; or what takes them, made by `new_squares`.
        h_ssq: [T, N] float32 if h stands for rms_norm(h), deferred.
        out: [N, D], takes the result; it may be `h`.
        a_step [K / E4M3_TILE, N], w_step [D] float32: steps of a and w in e4m3; h is needed then.

    Returns:
        [N, D] in the dtype of h or a, and [T, N] float32 or None. K and D are multiples of 16.
    """
    count, depth = a.shape
    width = w.shape[1] if w_is_kn else w.shape[0]
    row = pick("linear", a, M=count, N=width)
    block_m, block_n, block_k = (row.tiles[f"BLOCK_{axis}"] for axis in "MNK")
    columns = triton.cdiv(width, block_n)
    out = (a if h is None else h).new_empty(count, width) if out is None else out
    if squares is True:
        squares = new_squares(a, count, width)
    ssq = squares if isinstance(squares, Tensor) else None
    assert ssq is None or ssq.shape == (columns, count)
    assert a_step is None or block_k == E4M3_TILE
    if out.numel():
        w_block = [block_k, block_n] if w_is_kn else [block_n, block_k]
        run(
            _linear_kernel, (triton.cdiv(count, block_m) * columns,), row, a,
            a_source=descriptor(a, [block_m, block_k], row),
            w_source=descriptor(w, w_block, row),
            h_source=None if h is None else descriptor(h, [block_m, block_n], row),
            out_source=descriptor(out, [block_m, block_n], row),
            ssq_ptr=ssq, h_ssq_ptr=h_ssq, a_step_ptr=a_step, w_step_ptr=w_step, count=count,
            eps=eps, K=depth, N=width, W_IS_KN=w_is_kn,
            H_TILES=0 if h_ssq is None else len(h_ssq), TMA=row.arch >= 90,
        )  # fmt: skip
    return out, ssq


def linear_rmsnorm_fwd(
    a: Tensor, w: Tensor, h: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """a [N,E], w [D,E], h [N,D] -> rms_norm(h + a @ w.T), the sum [N,D], its squares [T,N]."""
    total, ssq = linear(aligned(a), aligned(w), h, squares=True)
    assert ssq is not None
    return finish_norm(total, ssq, eps), total, ssq


def linear_rmsnorm_bwd(
    grad: Tensor, a: Tensor, w: Tensor, total: Tensor, ssq: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to a, w and h, in their dtypes, from that of the norm, grad [N,D]."""
    d = norm_bwd(grad, total, ssq, eps)
    return d @ w, d.t() @ a, d


def _fwd_fake(a: Tensor, w: Tensor, h: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(h), torch.empty_like(h), new_squares(a, *h.shape)


def _bwd_fake(
    grad: Tensor, a: Tensor, w: Tensor, total: Tensor, ssq: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(a), torch.empty_like(w), torch.empty_like(grad)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a, w, _, eps = inputs
    _, total, ssq = output
    ctx.save_for_backward(a, w, total, ssq)
    ctx.eps = eps
    ctx.mark_non_differentiable(total, ssq)


def _backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *_bwd(grad.contiguous(), *ctx.saved_tensors, ctx.eps), None


_bwd = register(
    TRITON,
    "linear_rmsnorm_bwd(Tensor grad, Tensor a, Tensor w, Tensor total, Tensor ssq, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
    linear_rmsnorm_bwd,
)
_fwd = register(
    TRITON,
    "linear_rmsnorm(Tensor a, Tensor w, Tensor h, float eps) -> (Tensor, Tensor, Tensor)",
    _fwd_fake,
    linear_rmsnorm_fwd,
    save=_save,
    backward=_backward,
)


def linear_rmsnorm(a: Tensor, w: Tensor, h: Tensor, eps: float) -> Tensor:
    """a [B,S,E], w [D,E], h [B,S,D] -> rms_norm(h + a @ w.T) [B,S,D]; see `trm_fast.ops`.

    Raises:
        ValueError: a dtype, width or shapes that the kernel does not serve.
    """
    batch, tokens, width = h.shape
    inner = a.shape[-1]
    check(
        "linear_rmsnorm",
        unsupported_dtype(h.dtype),
        unsupported_width(width),
        mismatch("a", a, (batch, tokens, inner), h),
        mismatch("w", w, (width, inner), h),
    )
    out, _, _ = _fwd(
        a.flatten(0, 1).contiguous(), w.contiguous(), h.flatten(0, 1).contiguous(), eps
    )
    return out.view(h.shape)


def unsupported(
    dtype: torch.dtype, config: Shape | None, device: torch.device | None = None
) -> str | None:
    """Why the op cannot serve, or None; heads may leave some features unattended."""
    reason = _common.unsupported(dtype, config, device)
    if reason or config is None or config.mlp_t:
        return reason
    attended = config.hidden_size // config.num_heads * config.num_heads
    return unsupported_width(attended, "width of all heads")


def examples(make: Callable[..., Tensor]) -> Iterator[None]:
    """Every launch of this file at the official size, for the report: the op as attention and the
    MLP use it, and `linear` as the recursion calls it. A single board has an odd count of rows."""
    width, inner = 512, 1536
    for count, depth in ((768 * 97, width), (768 * 97, inner), (97, width)):
        a, w, h = make(count, depth), make(width, depth), make(count, width)
        _, total, ssq = linear_rmsnorm_fwd(a, w, h, 1e-5)
        yield
        linear_rmsnorm_bwd(h, a, w, total, ssq, 1e-5)
        yield
    h, ssq = make(768 * 97, width), make(2, 768 * 97, dtype=torch.float32)
    linear(h, make(3 * width, width))  # the products for queries, keys and values
    yield
    linear(make(768 * 97, inner), make(width, inner), h, squares=True, h_ssq=ssq, eps=1e-5)
    yield
    for residual in (None, h):  # a gradient to the input: of the queries' product, of gate and up
        linear(make(768 * 97, 2 * inner), make(2 * inner, width), residual, w_is_kn=True)
        yield
