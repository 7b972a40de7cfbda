"""stablemax_loss: cross entropy of s(x) = 1 + x or 1 / (1 - x), predictions, correctness.

Owns the op. With rest the sum of s over the other classes, loss = log(1 + rest / s_label), whose
gradient is s_j / (s_label + rest) / (1 + |x_j|) for the others and -rest / (s_label + rest) /
(1 + |x|) for the label: right to a few last places in float32, where the textbook form divides by
zero at x = 1 and loses the gradient of confident rows. The backward computes it again from the
logits, which are there anyway.
Imported by `trm_fast.backends` only.

Dims legend: N answers (any dimensions), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from trm_fast.kernels._common import begin, check, down, inlined, unsupported_dtype, up
from trm_fast.kernels._runtime import run
from trm_fast.kernels.launch import pick
from trm_fast.kernels.registration import TRITON, register

__all__ = ["stablemax_loss", "unsupported"]

IGNORED = tl.constexpr(-100)  # the label of an answer that costs nothing
MAX_VOCABULARY = 1024  # a row of logits is in one tile


class Vocabulary(Protocol):
    """What `unsupported` reads of a model's configuration."""

    vocab_size: int


@inlined
def _log1p(u):
    """log(1 + u) for u >= 0. What the sum loses of a small u, the quotient puts right (Kahan)."""
    w = 1.0 + u
    lost = tl.where(u < 1.0, u / (w - 1.0), 1.0)
    return tl.where(w == 1.0, u, tl.log(w) * lost)


@inlined
def _parts(
    logits_ptr, labels_ptr, count,
    VOCABULARY: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_M answers: their numbers, classes, what is inside, x, label, 1 + |x|, s, whether a
    class is the label, s of the label (0 for none), the sum of the others."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_v = tl.arange(0, COLUMNS)[None, :]
    mask = (offs_n < count)[:, None] & (offs_v < VOCABULARY)
    x = up(tl.load(logits_ptr + offs_n[:, None] * VOCABULARY + offs_v, mask=mask, other=0.0))
    label = tl.load(labels_ptr + offs_n, mask=offs_n < count, other=0).to(tl.int64)
    size = 1.0 + tl.abs(x)
    s = tl.where(mask, tl.where(x < 0, 1.0 / size, size), 0.0)
    is_label = offs_v == label[:, None]
    s_label = tl.sum(tl.where(is_label, s, 0.0), 1)
    rest = tl.sum(tl.where(is_label, 0.0, s), 1)
    return offs_n, offs_v, mask, x, label, size, s, is_label, s_label, rest


@triton.jit
def _stablemax_fwd_kernel(
    logits_ptr, labels_ptr, loss_ptr, preds_ptr, correct_ptr, count,
    VOCABULARY: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    offs_n, offs_v, mask, x, label, _, _, _, s_label, rest = _parts(
        logits_ptr, labels_ptr, count, VOCABULARY, COLUMNS, BLOCK_M
    )
    inside = offs_n < count
    loss = tl.where(label == IGNORED, 0.0, _log1p(rest / s_label))
    tl.store(loss_ptr + offs_n, loss, mask=inside)
    # As torch.argmax: the first of equals, and a NaN is larger than every number.
    is_nan = mask & (x != x)
    top = tl.max(tl.where(mask & (x == x), x, float("-inf")), 1)[:, None]
    any_nan = tl.max(is_nan.to(tl.int32), 1)[:, None] > 0
    largest = tl.where(any_nan, is_nan, mask & (x == top))
    preds = tl.min(tl.where(largest, offs_v, COLUMNS), 1).to(tl.int64)
    tl.store(preds_ptr + offs_n, preds, mask=inside)
    tl.store(correct_ptr + offs_n, preds == label, mask=inside)  # no prediction is IGNORED


@triton.jit
def _stablemax_bwd_kernel(
    grad_ptr, logits_ptr, labels_ptr, d_ptr, count,
    VOCABULARY: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    offs_n, offs_v, mask, _, label, size, s, is_label, s_label, rest = _parts(
        logits_ptr, labels_ptr, count, VOCABULARY, COLUMNS, BLOCK_M
    )
    grad = tl.load(grad_ptr + offs_n, mask=offs_n < count, other=0.0)
    d = tl.where(is_label, -rest[:, None], s) / (s_label + rest)[:, None] / size
    d = tl.where((label == IGNORED)[:, None], 0.0, d) * grad[:, None]
    offs = offs_n[:, None] * VOCABULARY + offs_v
    tl.store(d_ptr + offs, down(d, d_ptr.dtype.element_ty), mask=mask)


def _launch(kernel: Any, logits: Tensor, **pointers: Tensor) -> None:
    """`kernel` over every row of logits [N,V]."""
    count, vocabulary = logits.shape
    if count:
        row = pick("stablemax_loss", logits, V=vocabulary)
        run(
            kernel, (triton.cdiv(count, row.tiles["BLOCK_M"]),), row, logits,
            logits_ptr=logits, count=count, VOCABULARY=vocabulary,
            COLUMNS=triton.next_power_of_2(vocabulary), **pointers,
        )  # fmt: skip


def stablemax_loss_fwd(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logits [N,V], labels [N] int -> loss float32, preds int64, correct bool, each [N]."""
    loss, preds, correct = _fwd_fake(logits, labels)
    _launch(
        _stablemax_fwd_kernel, logits,
        labels_ptr=labels, loss_ptr=loss, preds_ptr=preds, correct_ptr=correct,
    )  # fmt: skip
    return loss, preds, correct


def stablemax_loss_bwd(grad: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Gradient to logits [N,V] from that of the loss, grad [N] float32."""
    d = torch.empty_like(logits)
    _launch(_stablemax_bwd_kernel, logits, grad_ptr=grad, labels_ptr=labels, d_ptr=d)
    return d


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
    TRITON,
    "stablemax_loss_bwd(Tensor grad, Tensor logits, Tensor labels) -> Tensor",
    _bwd_fake,
    stablemax_loss_bwd,
)
_fwd = register(
    TRITON,
    "stablemax_loss(Tensor logits, Tensor labels) -> (Tensor, Tensor, Tensor)",
    _fwd_fake,
    stablemax_loss_fwd,
    save=_save,
    backward=_backward,
)


def _unsupported_vocabulary(size: int) -> str | None:
    if 0 < size <= MAX_VOCABULARY:
        return None
    return f"needs a vocabulary of 1 to {MAX_VOCABULARY}, not {size}"


def unsupported(
    dtype: torch.dtype, config: Vocabulary | None, device: torch.device | None = None
) -> str | None:
    """Why the op cannot serve, or None."""
    return unsupported_dtype(dtype) or (
        _unsupported_vocabulary(config.vocab_size) if config else None
    )


def stablemax_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logits [..., V], labels [...] of any integers -> loss float32, preds int64, correct bool,
    each [...]; see `trm_fast.ops`. A label that is no class costs infinitely much.

    Raises:
        ValueError: a dtype or vocabulary that the kernel does not serve.
    """
    vocabulary = logits.shape[-1]
    check("stablemax_loss", unsupported_dtype(logits.dtype), _unsupported_vocabulary(vocabulary))
    assert logits.shape[:-1] == labels.shape, "a label for each row of logits"
    found = _fwd(logits.reshape(-1, vocabulary).contiguous(), labels.reshape(-1).contiguous())
    loss, preds, correct = (t.view(labels.shape) for t in found)
    return loss, preds, correct


def examples(make: Callable[..., Tensor]) -> Iterator[None]:
    """Every launch of this file, for the report: the official size, and larger vocabularies."""
    for count, vocabulary in ((768 * 81, 11), (768 * 900, 100), (4096, MAX_VOCABULARY)):
        logits, labels = make(count, vocabulary), make(count, dtype=torch.int32)
        loss, _, _ = stablemax_loss_fwd(logits, labels)
        yield
        stablemax_loss_bwd(loss, logits, labels)
        yield
