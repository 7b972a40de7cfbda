"""Rates of the microkernels: multiply-adds in registers, and a whole product.

Measuring only; no op of the network. The extension times them itself, in CPU time of the calling
thread, so that neither Python nor a neighbour on the machine is in the figure.

Dims legend: M rows, K inner width, N columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trm_fast.extension._common import (
    EXTENSION,
    check,
    mismatch,
    unsupported_dtype,
    unsupported_width,
)
from trm_fast.kernels.registration import register

__all__ = ["peak", "product"]


def _peak_fake(like: Tensor, steps: int, count: int) -> Tensor:
    return like.new_empty(count, dtype=torch.float64)


def _product_fake(a: Tensor, w: Tensor, times: int, count: int) -> tuple[Tensor, Tensor]:
    dtype = torch.float32 if a.dtype == torch.int8 else a.dtype
    return a.new_empty(len(a), len(w), dtype=dtype), a.new_empty(count, dtype=torch.float64)


def _unserved_dtype(dtype: torch.dtype) -> str | None:
    return None if dtype == torch.int8 else unsupported_dtype(dtype)


_peak = register(
    EXTENSION, "micro_rate_peak(Tensor like, int steps, int count) -> Tensor", _peak_fake
)
_product = register(
    EXTENSION,
    "micro_rate_product(Tensor a, Tensor w, int times, int count) -> (Tensor, Tensor)",
    _product_fake,
)


def peak(dtype: torch.dtype, steps: int, count: int) -> Tensor:
    """FLOP/s [count] of `steps` rounds of independent multiply-adds in registers.

    In bfloat16 of the instruction that multiplies pairs, where the CPU has it; else of float32, in
    which the kernels then compute. In int8 of the instruction that adds products of whole numbers.

    Raises:
        ValueError: a dtype that the kernels do not serve.
    """
    check("micro_rate_peak", _unserved_dtype(dtype))
    return _peak(torch.empty(0, dtype=dtype), steps, count)


def product(a: Tensor, w: Tensor, times: int, count: int) -> tuple[Tensor, Tensor]:
    """a [M,K], w [N,K] -> a @ w.T [M,N], and the FLOP/s [count] of `times` such products each.

    Operands are packed before the clock starts. Of int8, from -127 on, the result is float32.

    Raises:
        ValueError: a dtype, width or shapes that the kernel does not serve.
    """
    check(
        "micro_rate_product",
        _unserved_dtype(a.dtype),
        unsupported_width(a.shape[-1], "width of a"),
        unsupported_width(len(w), "number of columns"),
        mismatch("w", w, (len(w), a.shape[-1]), a),
    )
    return _product(a.contiguous(), w.contiguous(), times, count)
