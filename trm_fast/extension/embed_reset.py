"""embed_reset: question states from tokens, puzzle rows and positions; states that start anew.

One pass writes x, y and z, and reads no state that is thrown away. The gradients to the embedding
and the positions are sums in a fixed order in float32; the rest of the backward is a line of
PyTorch each, and what nobody asked for is not computed: in training that is all of y and z.

Dims legend: B batch, P puzzle-prefix tokens, L puzzle tokens, S = P + L tokens, D width,
V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trm_fast.extension._common import (
    EXTENSION,
    check,
    mismatch,
    unsupported,
    unsupported_dtype,
)
from trm_fast.kernels.registration import register

__all__ = ["embed_reset", "unsupported"]

POSITION_SCALE = 0.707106781  # keeps the variance of token + position at that of a token


def _fwd_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    y = args[5]
    return y.new_empty(y.shape), y.new_empty(y.shape), y.new_empty(y.shape)


def _bwd_fake(grad: Tensor, tokens: Tensor, vocabulary: int, factor: float) -> Tensor:
    return grad.new_empty(vocabulary, grad.shape[2], dtype=torch.float32)


def _positions_bwd_fake(grad: Tensor, factor: float) -> Tensor:
    return grad.new_empty(grad.shape[1:], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tokens, rows, embedding, positions, halted, _, _, y_init, z_init, scale = inputs
    ctx.save_for_backward(tokens, halted)
    ctx.prefix = output[0].shape[1] - tokens.shape[1]
    ctx.vocabulary = len(embedding)
    ctx.factor = scale if positions is None else scale * POSITION_SCALE
    ctx.dtypes = [t if t is None else t.dtype for t in (rows, embedding, positions, y_init, z_init)]
    _, new_y, new_z = output
    needs = ctx.needs_input_grad
    fixed = [(new_y, needs[5] or needs[7]), (new_z, needs[6] or needs[8])]
    ctx.mark_non_differentiable(*(state for state, needed in fixed if not needed))


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    tokens, halted = ctx.saved_tensors
    d_x, d_y, d_z = grads
    _, rows, embedding, positions, _, y, z, y_init, z_init, _ = ctx.needs_input_grad
    d_rows = d_embedding = d_positions = None
    if d_x is not None:
        d_x = d_x.contiguous()
        if rows:
            d_rows = (d_x[:, : ctx.prefix] * ctx.factor).to(ctx.dtypes[0])
        if embedding:
            d_embedding = _bwd(d_x, tokens, ctx.vocabulary, ctx.factor).to(ctx.dtypes[1])
        if positions:
            d_positions = _positions_bwd(d_x, ctx.factor).to(ctx.dtypes[2])
    reset = halted.view(-1, 1, 1)
    d_y, d_y_init = _state_bwd(d_y, reset, y, y_init, ctx.dtypes[3])
    d_z, d_z_init = _state_bwd(d_z, reset, z, z_init, ctx.dtypes[4])
    return None, d_rows, d_embedding, d_positions, None, d_y, d_z, d_y_init, d_z_init, None


def _state_bwd(
    grad: Tensor | None, reset: Tensor, state: bool, init: bool, init_dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to a state [B,S,D] and to its start [D], each if asked for."""
    if grad is None:
        return None, None
    d_state = torch.where(reset, 0, grad) if state else None
    if not init:
        return d_state, None
    return d_state, torch.where(reset, grad, 0).sum((0, 1), dtype=torch.float32).to(init_dtype)


_bwd = register(
    EXTENSION,
    "embed_reset_bwd(Tensor grad, Tensor tokens, int vocabulary, float factor) -> Tensor",
    _bwd_fake,
)
_positions_bwd = register(
    EXTENSION,
    "embed_reset_positions_bwd(Tensor grad, float factor) -> Tensor",
    _positions_bwd_fake,
)
_fwd = register(
    EXTENSION,
    "embed_reset(Tensor tokens, Tensor? rows, Tensor embedding, Tensor? positions, Tensor halted,"
    " Tensor y, Tensor z, Tensor y_init, Tensor z_init, float scale) -> (Tensor, Tensor, Tensor)",
    _fwd_fake,
    save=_save,
    backward=_backward,
)


def embed_reset(
    tokens: Tensor,
    rows: Tensor | None,
    embedding: Tensor,
    positions: Tensor | None,
    halted: Tensor,
    y: Tensor,
    z: Tensor,
    y_init: Tensor,
    z_init: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """tokens [B,L] int32 or int64, rows [B,P,D] or None, embedding [V,D], positions [S,D] or None,
    halted [B] bool, y and z [B,S,D], y_init and z_init [D] -> x, y, z [B,S,D]; see `trm_fast.ops`.

    Weights and starts may be of another dtype than y: they are cast. The states may have any
    memory layout, the results are contiguous.

    Raises:
        ValueError: a dtype or shapes that the kernel does not serve.
        RuntimeError: a token outside the vocabulary.
    """
    batch, _, width = y.shape
    prefix = 0 if rows is None else rows.shape[1]
    places = prefix + tokens.shape[1]
    whole = tokens.dtype in (torch.int32, torch.int64)
    weights = [t for t in (rows, embedding, positions, y_init, z_init) if t is not None]
    check(
        "embed_reset",
        *(unsupported_dtype(t.dtype, y.device) for t in (y, *weights)),
        None if whole else f"takes tokens of int32 and int64, not {str(tokens.dtype)[6:]}",
        mismatch("halted", halted, (batch,), halted.bool()),
        mismatch("y", y, (batch, places, width), y),
        mismatch("z", z, y.shape, y),
    )
    given = (t if t is None else t.contiguous() for t in (tokens, rows, embedding, positions))
    y, z = (t if t.stride(2) == 1 else t.contiguous() for t in (y, z))
    return _fwd(*given, halted.contiguous(), y, z, y_init.contiguous(), z_init.contiguous(), scale)
