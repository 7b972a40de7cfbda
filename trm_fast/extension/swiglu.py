"""swiglu: silu(gate) * up, of rows whose first half is the gate.

For products that are not fused with it. Computed in float32 and rounded once: the reference rounds
silu(g) before the product too.

Dims legend: N rows, F inner width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trm_fast.extension._common import EXTENSION, check, unsupported, unsupported_dtype
from trm_fast.kernels.registration import register

__all__ = ["swiglu", "unsupported"]


def _fwd_fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


def _bwd_fake(grad: Tensor, gate_up: Tensor) -> Tensor:
    return torch.empty_like(gate_up)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return _bwd(grad.contiguous(), *ctx.saved_tensors)


_bwd = register(EXTENSION, "swiglu_bwd(Tensor grad, Tensor gate_up) -> Tensor", _bwd_fake)
_fwd = register(
    EXTENSION, "swiglu(Tensor gate_up) -> Tensor", _fwd_fake, save=_save, backward=_backward
)


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2F] -> silu(gate) * up [..., F], any F; see `trm_fast.ops`.

    Raises:
        ValueError: a dtype or an odd width.
    """
    shape = gate_up.shape
    even = len(shape) > 0 and shape[-1] % 2 == 0
    check(
        "swiglu",
        unsupported_dtype(gate_up.dtype, gate_up.device),
        None if even else f"needs a gate and as many features up, not a shape of {list(shape)}",
    )
    rows = gate_up.reshape(shape[:-1].numel(), shape[-1]).contiguous()
    return _fwd(rows).view(*shape[:-1], shape[-1] // 2)
