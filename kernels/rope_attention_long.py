"""rope_attention where a head's whole sequence is no tile: PyTorch's fused attention behind RoPE.

Serves more than 128 tokens, larger heads, and float32 of any size: its products run on no tensor
cores, and the operands of a whole sequence are more than the registers hold. One kernel reads the
packed qkv and writes rotated and scaled heads; one packs the gradients and rotates them back. In
between stand the explicit forward and backward operations of `scaled_dot_product_attention`:
FlashAttention for 16 bits, the memory-efficient one for float32, on the CPU its own. cuDNN's, which
PyTorch prefers on Hopper, was wrong before 9.15.1 for lengths that are no multiple of 128, and
the fake and the real version of its operation disagree on the shape of lse: it is not used.
Owns also `turn`, the rotation itself. Imported by `rope_attention`.

Dims legend: B batch, S tokens incl. prefix, H heads, K head dim, N = B*S rows, T tiles of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trm_fast.kernels._common import begin, down, inlined, round_up, row_scale, up
from trm_fast.kernels._runtime import run
from trm_fast.kernels.launch import Row, pick

ATEN = torch.ops.aten
LSE_MULTIPLE = 32  # tokens that the memory-efficient attention pads its lse to


@inlined
def turn(x1, x2, cos_ptr, sin_ptr, offs, mask, HALF: tl.constexpr, BACK: tl.constexpr):
    """Both halves of a head times its rotation, or, BACK, its transpose; without tables as given.

    Element `offs` of the tables [S, K] is for the first half, HALF further for the second.
    """
    if cos_ptr is None:
        return x1, x2
    else:
        cos1 = tl.load(cos_ptr + offs, mask=mask, other=0.0)
        sin1 = tl.load(sin_ptr + offs, mask=mask, other=0.0)
        cos2 = tl.load(cos_ptr + offs + HALF, mask=mask, other=0.0)
        sin2 = tl.load(sin_ptr + offs + HALF, mask=mask, other=0.0)
        if BACK:
            return x1 * cos1 + x2 * sin2, x2 * cos2 - x1 * sin1
        else:
            return x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2


@inlined
def _offsets(
    count, S: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Of a tile [rows, heads, elements of a half]: rows, then offset and mask of what lies in a
    row, then the same of the tables."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    heads = tl.arange(0, BLOCK_HEADS)[None, :, None]
    half = tl.arange(0, BLOCK_HALF)[None, None, :]
    mask_table = (offs_m < count)[:, None, None] & (half < K // 2)
    offs_table = (offs_m % S)[:, None, None] * K + half
    return offs_m, heads * K + half, mask_table & (heads < HEADS), offs_table, mask_table


@triton.jit
def _turn_fwd_kernel(
    qkv_ptr, out_ptr, cos_ptr, sin_ptr, ssq_ptr, count, eps,
    S: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr,
    SSQ_TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The first PARTS of q, k and v, scaled; q and k rotated."""
    begin(PDL)
    WIDTH: tl.constexpr = HEADS * K
    offs_m, offs_row, mask, offs_table, mask_table = _offsets(
        count, S, HEADS, K, BLOCK_M, BLOCK_HEADS, BLOCK_HALF
    )
    from_ptr = qkv_ptr + offs_m[:, None, None] * (3 * WIDTH) + offs_row
    to_ptr = out_ptr + offs_m[:, None, None] * (PARTS * WIDTH) + offs_row
    out_type = out_ptr.dtype.element_ty
    for part in tl.static_range(PARTS):
        x1 = up(tl.load(from_ptr + part * WIDTH, mask=mask, other=0.0))
        x2 = up(tl.load(from_ptr + part * WIDTH + K // 2, mask=mask, other=0.0))
        if ssq_ptr is not None:
            scale = row_scale(ssq_ptr, offs_m, count, SSQ_TILES, WIDTH, eps)[:, None, None]
            x1, x2 = x1 * scale, x2 * scale
        if part < 2:
            x1, x2 = turn(x1, x2, cos_ptr, sin_ptr, offs_table, mask_table, K // 2, False)
        tl.store(to_ptr + part * WIDTH, down(x1, out_type), mask=mask)
        tl.store(to_ptr + part * WIDTH + K // 2, down(x2, out_type), mask=mask)


@triton.jit
def _turn_bwd_kernel(
    dq_ptr, dk_ptr, dv_ptr, d_ptr, cos_ptr, sin_ptr, count,
    S: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """dq and dk, rotated back, and dv into one tensor."""
    begin(PDL)
    WIDTH: tl.constexpr = HEADS * K
    offs_m, offs_row, mask, offs_table, mask_table = _offsets(
        count, S, HEADS, K, BLOCK_M, BLOCK_HEADS, BLOCK_HALF
    )
    offs = offs_m[:, None, None] * WIDTH + offs_row
    to_ptr = d_ptr + offs_m[:, None, None] * (3 * WIDTH) + offs_row
    d_type = d_ptr.dtype.element_ty
    for part in tl.static_range(3):
        if part == 0:
            from_ptr = dq_ptr
        elif part == 1:
            from_ptr = dk_ptr
        else:
            from_ptr = dv_ptr
        x1 = up(tl.load(from_ptr + offs, mask=mask, other=0.0))
        x2 = up(tl.load(from_ptr + offs + K // 2, mask=mask, other=0.0))
        if part < 2:
            x1, x2 = turn(x1, x2, cos_ptr, sin_ptr, offs_table, mask_table, K // 2, True)
        tl.store(to_ptr + part * WIDTH, down(x1, d_type), mask=mask)
        tl.store(to_ptr + part * WIDTH + K // 2, down(x2, d_type), mask=mask)


def half_block(head_dim: int) -> int:
    """Elements of the tile that holds half a head; matrix products take 16 or more."""
    return max(16, triton.next_power_of_2(head_dim // 2))


def long_lse(like: Tensor, heads: int) -> tuple[int, int, int]:
    """Shape of what `long_fwd` saves beside its result, like [B,S,...]."""
    batch, tokens = like.shape[:2]
    padded = like.device.type != "cpu" and like.element_size() == 4
    return batch, heads, round_up(tokens, LSE_MULTIPLE) if padded else tokens


def long_fwd(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    ssq: Tensor | None,
    eps: float,
    into: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """As `rope_attention_fwd`."""
    q, k, v = _turned(qkv, cos, sin, heads, ssq, eps)
    if qkv.device.type == "cpu":
        out, lse = ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif qkv.element_size() == 4:
        out, lse, _, _ = ATEN._scaled_dot_product_efficient_attention(q, k, v, None, True)
    else:
        out, lse, *_ = ATEN._scaled_dot_product_flash_attention(q, k, v)
    out = _by_token(out)
    return (out, lse.contiguous()) if into is None else (into[0].copy_(out), into[1].copy_(lse))


def long_bwd(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    ssq: Tensor | None,
    eps: float,
    d: Tensor,
) -> None:
    """As `rope_attention_bwd`; writes d [B,S,3HK], which may be qkv."""
    q, k, v = _turned(qkv, cos, sin, heads, ssq, eps)
    grad, out = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (grad, out))
    tokens = qkv.shape[1]
    if qkv.device.type == "cpu":
        found = ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, False
        )
    elif qkv.element_size() == 4:
        unused = lse.new_empty((), dtype=torch.int64)  # the random state: nothing is dropped
        *found, _ = ATEN._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, None, out, lse, unused, unused, 0.0, (True, True, True, False)
        )
    else:
        unused = lse.new_empty(2, dtype=torch.uint64)  # likewise
        found = ATEN._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, tokens, tokens, 0.0, False, unused, unused
        )
    dq, dk, dv = (_by_token(t) for t in found)
    grid, row, sizes = _launch(qkv, heads)
    run(
        _turn_bwd_kernel, grid, row, qkv, dq_ptr=dq, dk_ptr=dk, dv_ptr=dv, d_ptr=d, cos_ptr=cos,
        sin_ptr=sin, **sizes,
    )  # fmt: skip


def _turned(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int, ssq: Tensor | None, eps: float
) -> list[Tensor]:
    """q, k and v [B,H,S,K], views of one tensor, or v of qkv where it is not scaled."""
    batch, tokens, width = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, heads, -1).transpose(1, 3).unbind(2)
    if ssq is None and cos is None:
        return [q, k, v]
    parts = 2 if ssq is None else 3
    turned = qkv.new_empty(batch, tokens, parts, heads, width // (3 * heads))
    grid, row, sizes = _launch(qkv, heads)
    run(
        _turn_fwd_kernel, grid, row, qkv, qkv_ptr=qkv, out_ptr=turned, cos_ptr=cos, sin_ptr=sin,
        ssq_ptr=ssq, eps=eps, PARTS=parts, SSQ_TILES=0 if ssq is None else len(ssq), **sizes,
    )  # fmt: skip
    views = list(turned.transpose(1, 3).unbind(2))
    return views if parts == 3 else [*views, v]


def _launch(qkv: Tensor, heads: int) -> tuple[tuple[int], Row, dict[str, int]]:
    batch, tokens, width = qkv.shape
    head_dim = width // (3 * heads)
    row = pick("rope", qkv, D=width // 3)
    sizes = {
        "count": batch * tokens,
        "S": tokens,
        "HEADS": heads,
        "K": head_dim,
        "BLOCK_HEADS": triton.next_power_of_2(heads),
        "BLOCK_HALF": half_block(head_dim),
    }
    return (triton.cdiv(batch * tokens, row.tiles["BLOCK_M"]),), row, sizes


def _by_token(t: Tensor) -> Tensor:
    """[B,H,S,K] -> [B,S,HK]; no copy where the fused attention kept the layout of its inputs."""
    return t.transpose(1, 2).contiguous().flatten(2)
