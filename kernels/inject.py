"""inject: z + (y + x), how the recursion shows the latent state the question and the answer.

Owns the op. Both sums are rounded, as published. The gradient to each input is that of the result.
Imported by `trm_fast.backends` only.

Dims legend: B batch, S tokens incl. prefix, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trm_fast.kernels._common import begin, check, down, unsupported, unsupported_dtype, up
from trm_fast.kernels._runtime import run
from trm_fast.kernels.launch import pick
from trm_fast.kernels.registration import TRITON, register

__all__ = ["inject", "unsupported"]


@triton.jit
def _inject_fwd_kernel(
    z_ptr, y_ptr, x_ptr, out_ptr, count, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    begin(PDL)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    out_type = out_ptr.dtype.element_ty
    y = up(tl.load(y_ptr + offs, mask=mask, other=0.0))
    shown = down(y + up(tl.load(x_ptr + offs, mask=mask, other=0.0)), out_type)
    out = up(tl.load(z_ptr + offs, mask=mask, other=0.0)) + up(shown)
    tl.store(out_ptr + offs, down(out, out_type), mask=mask)


def inject_fwd(z: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """z, y, x: of one shape, contiguous -> z + (y + x) in the dtype of z."""
    out = torch.empty_like(z)
    count = out.numel()
    if count:
        row = pick("inject", z)
        run(
            _inject_fwd_kernel, (triton.cdiv(count, row.tiles["BLOCK"]),), row, z,
            z_ptr=z, y_ptr=y, x_ptr=x, out_ptr=out, count=count,
        )  # fmt: skip
    return out


def _fwd_fake(z: Tensor, y: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(z)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """The gradient needs nothing."""


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return grad, grad, grad


_fwd = register(
    TRITON,
    "inject(Tensor z, Tensor y, Tensor x) -> Tensor",
    _fwd_fake,
    inject_fwd,
    save=_save,
    backward=_backward,
)


def inject(z: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """z, y, x: [B,S,D] -> z + (y + x) [B,S,D]; see `trm_fast.ops`.

    Raises:
        ValueError: a dtype that the kernel does not serve.
    """
    check("inject", unsupported_dtype(z.dtype))
    assert z.shape == y.shape == x.shape, "the states are of one shape"
    return _fwd(z.contiguous(), y.contiguous(), x.contiguous())


def examples(make: Callable[..., Tensor]) -> Iterator[None]:
    """Every launch of this file at the official size, for the report."""
    states = make(768, 97, 512)
    inject_fwd(states, states, states)
    yield
