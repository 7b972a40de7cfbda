"""Products in eight bits: deep_recursion without a gradient, and one product alone.

What they compute is said in `trm_fast/quantize.py`, how in csrc/cpu/int8.h; in float32 one product
has the same bits in both.

Dims legend: B batch, S tokens incl. prefix, D width, N rows, E inner width of a product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trm_fast.extension._common import (
    EXTENSION,
    check,
    unsupported_dtype,
    unsupported_width,
)
from trm_fast.kernels.registration import register

__all__ = ["deep_recursion_int8", "linear"]

MOST = 131072  # products of 127 * 127 whose sum an int32 holds


def unsupported_inner(width: int) -> str | None:
    """Why sums over `width` products are not served, or None."""
    return None if width <= MOST else f"serves eight bits up to a width of {MOST}, not {width}"


def _linear_fake(a: Tensor, w: Tensor) -> Tensor:
    return a.new_empty(len(a), len(w))


def _recursion_fake(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    weights: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    mlp_t: bool,
    H_cycles: int,
    L_cycles: int,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y), torch.empty_like(z)


_linear = register(EXTENSION, "int8_linear(Tensor a, Tensor w) -> Tensor", _linear_fake)
# As trm_fast_ext::deep_recursion, whose arguments it takes, but without a policy and gradients.
deep_recursion_int8 = register(
    EXTENSION,
    "deep_recursion_int8(Tensor x, Tensor y, Tensor z, Tensor[] weights, Tensor? cos, Tensor? sin,"
    " bool mlp_t, int H_cycles, int L_cycles, int heads, float eps) -> (Tensor, Tensor)",
    _recursion_fake,
)


def linear(a: Tensor, w: Tensor) -> Tensor:
    """a [N,E], w [D,E] -> a @ w.T [N,D] in a's dtype, by whole numbers; no gradient.

    Raises:
        ValueError: a dtype or widths that the kernel does not serve.
    """
    check(
        "int8_linear",
        unsupported_dtype(a.dtype),
        unsupported_width(a.shape[-1], "width of a"),
        unsupported_width(len(w), "number of columns"),
        unsupported_inner(a.shape[-1]),
        None if w.shape[1:] == a.shape[1:] else f"needs w of width {a.shape[-1]}",
    )
    return _linear(a.detach().contiguous(), w.detach().float().contiguous())
