"""swiglu: silu(gate) * up, of rows whose first half is the gate.

Owns the op on its own, for products that are not fused with it. Rounds where the reference does:
silu(g) before the product, and in the backward the products with the gradient too.
Formula, s = sigmoid(g): d gate = d up s (1 + g (1 - s)), d up = d silu(g), d the gradient.
Imported by `trm_fast.backends` only.

Dims legend: N rows, F inner width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trm_fast.kernels._common import begin, check, down, inlined, unsupported, unsupported_dtype, up
from trm_fast.kernels._runtime import run
from trm_fast.kernels.launch import pick
from trm_fast.kernels.registration import TRITON, register

__all__ = ["swiglu", "unsupported"]


@inlined
def _offsets(count, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of one tile: rows [BLOCK_M, 1] int64, columns [1, BLOCK_N], what lies inside."""
    columns: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    row = tl.program_id(0).to(tl.int64) // columns * BLOCK_M
    offs_m = (row + tl.arange(0, BLOCK_M))[:, None]
    offs_f = (tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    return offs_m, offs_f, (offs_m < count) & (offs_f < F)


@triton.jit
def _swiglu_fwd_kernel(
    gate_up_ptr, out_ptr, count,
    F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    offs_m, offs_f, mask = _offsets(count, F, BLOCK_M, BLOCK_N)
    out_type = out_ptr.dtype.element_ty
    gate_ptr = gate_up_ptr + offs_m * (2 * F) + offs_f
    gate = up(tl.load(gate_ptr, mask=mask, other=0.0))
    silu = down(gate * tl.sigmoid(gate), out_type)
    out = up(silu) * up(tl.load(gate_ptr + F, mask=mask, other=0.0))
    tl.store(out_ptr + offs_m * F + offs_f, down(out, out_type), mask=mask)


@triton.jit
def _swiglu_bwd_kernel(
    grad_ptr, gate_up_ptr, d_ptr, count,
    F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    offs_m, offs_f, mask = _offsets(count, F, BLOCK_M, BLOCK_N)
    d_type = d_ptr.dtype.element_ty
    gate_ptr = gate_up_ptr + offs_m * (2 * F) + offs_f
    d_gate_ptr = d_ptr + offs_m * (2 * F) + offs_f
    grad = up(tl.load(grad_ptr + offs_m * F + offs_f, mask=mask, other=0.0))
    gate = up(tl.load(gate_ptr, mask=mask, other=0.0))
    sigmoid = tl.sigmoid(gate)
    d_up = grad * up(down(gate * sigmoid, d_type))
    tl.store(d_gate_ptr + F, down(d_up, d_type), mask=mask)
    d_silu = up(down(grad * up(tl.load(gate_ptr + F, mask=mask, other=0.0)), d_type))
    d_gate = d_silu * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(d_gate_ptr, down(d_gate, d_type), mask=mask)


def _launch(kernel: Any, gate_up: Tensor, **pointers: Tensor) -> None:
    """`kernel` over every tile of one half of gate_up [N,2F]."""
    count, inner = gate_up.shape[0], gate_up.shape[1] // 2
    if count and inner:
        row = pick("swiglu", gate_up)
        grid = triton.cdiv(count, row.tiles["BLOCK_M"]) * triton.cdiv(inner, row.tiles["BLOCK_N"])
        run(
            kernel, (grid,), row, gate_up,
            gate_up_ptr=gate_up, count=count, F=inner, **pointers,
        )  # fmt: skip


def swiglu_fwd(gate_up: Tensor) -> Tensor:
    """gate_up [N,2F] -> silu(gate) * up [N,F]."""
    out = _fwd_fake(gate_up)
    _launch(_swiglu_fwd_kernel, gate_up, out_ptr=out)
    return out


def swiglu_bwd(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient to gate_up [N,2F] from that of the result, grad [N,F]."""
    d = torch.empty_like(gate_up)
    _launch(_swiglu_bwd_kernel, gate_up, grad_ptr=grad, d_ptr=d)
    return d


def _fwd_fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


def _bwd_fake(grad: Tensor, gate_up: Tensor) -> Tensor:
    return torch.empty_like(gate_up)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return _bwd(grad.contiguous(), *ctx.saved_tensors)


_bwd = register(TRITON, "swiglu_bwd(Tensor grad, Tensor gate_up) -> Tensor", _bwd_fake, swiglu_bwd)
_fwd = register(
    TRITON,
    "swiglu(Tensor gate_up) -> Tensor",
    _fwd_fake,
    swiglu_fwd,
    save=_save,
    backward=_backward,
)


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2F] -> silu(gate) * up [..., F], any F; see `trm_fast.ops`.

    Raises:
        ValueError: a dtype that the kernel does not serve.
    """
    check("swiglu", unsupported_dtype(gate_up.dtype))
    shape = gate_up.shape
    inner = shape[-1] // 2
    return _fwd(gate_up.reshape(-1, shape[-1]).contiguous()).view(*shape[:-1], inner)


def examples(make: Callable[..., Tensor]) -> Iterator[None]:
    """Every launch of this file at the official size, for the report; an odd width too."""
    for inner in (1536, 33):
        gate_up = make(768 * 97, 2 * inner)
        out = swiglu_fwd(gate_up)
        yield
        swiglu_bwd(out, gate_up)
        yield
