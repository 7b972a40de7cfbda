"""stablemax_loss: cross entropy of s(x) = 1 + x or 1 / (1 - x), predictions, correctness.

The backward computes the gradient again from the logits, which are there anyway: with a dozen
classes that costs no more than keeping it would.

Dims legend: N answers (any dimensions), V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trm_fast.extension._common import EXTENSION, Shape, check, unsupported_dtype
from trm_fast.kernels.registration import register

__all__ = ["stablemax_loss", "unsupported"]

LABELS = (torch.int32, torch.int64)  # the dtypes that are read in place


def _fwd_fake(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    kinds = (torch.float32, torch.int64, torch.bool)
    loss, preds, correct = (logits.new_empty(labels.shape, dtype=kind) for kind in kinds)
    return loss, preds, correct


def _bwd_fake(grad: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    return torch.empty_like(logits)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor, None]:
    return _bwd(grad.contiguous(), *ctx.saved_tensors), None


_bwd = register(
    EXTENSION,
    "stablemax_loss_bwd(Tensor grad, Tensor logits, Tensor labels) -> Tensor",
    _bwd_fake,
)
_fwd = register(
    EXTENSION,
    "stablemax_loss(Tensor logits, Tensor labels) -> (Tensor, Tensor, Tensor)",
    _fwd_fake,
    save=_save,
    backward=_backward,
)


def unsupported(dtype: torch.dtype, config: Shape | None, device: torch.device) -> str | None:
    """Why the op cannot serve, or None."""
    return unsupported_dtype(dtype, device)


def stablemax_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logits [..., V], labels [...] of any integers -> loss float32, preds int64, correct bool,
    each [...]; see `trm_fast.ops`.

    Raises:
        ValueError: a dtype or shapes that the kernel does not serve.
        RuntimeError: a label that is neither a class nor -100.
    """
    vocabulary, shape = logits.shape[-1], labels.shape
    check(
        "stablemax_loss",
        unsupported_dtype(logits.dtype),
        None if vocabulary else "needs a vocabulary of 1 or more, not 0",
        None
        if logits.shape[:-1] == shape
        else f"needs labels of {list(logits.shape[:-1])}, not {list(shape)}",
        None
        if not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
        else f"needs labels of integers, not {str(labels.dtype).removeprefix('torch.')}",
    )
    if labels.dtype not in LABELS:
        labels = labels.to(torch.int64)
    found = _fwd(logits.reshape(-1, vocabulary).contiguous(), labels.reshape(-1).contiguous())
    loss, preds, correct = (t.view(shape) for t in found)
    return loss, preds, correct
