"""embed_reset: question states from tokens, puzzle rows and positions; states that start anew.

Owns the op: one pass writes x, y and z, and reads no state that is thrown away. The gradient to the
embedding is a product with the tokens' one-hot rows, in partial sums over chunks of tokens: the
same in every run, without atomics. Everything else of the backward is a line of PyTorch, and what
nobody asked for is not computed: in training that is all of y and z.
Imported by `trm_fast.backends` only.

Dims legend: B batch, P puzzle-prefix tokens, L puzzle tokens, S = P + L tokens, D width,
V vocabulary, N = B*L puzzle tokens of the batch, C chunks of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trm_fast.kernels._common import (
    begin,
    check,
    dot,
    down,
    inlined,
    unsupported,
    unsupported_dtype,
    unsupported_width,
    up,
)
from trm_fast.kernels._runtime import run
from trm_fast.kernels.launch import pick
from trm_fast.kernels.registration import TRITON, register

__all__ = ["embed_reset", "unsupported"]

POSITION_SCALE = tl.constexpr(0.707106781)  # keeps the variance of token + position at a token's
MAX_ONE_HOT = 64  # vocabularies up to which the gradient is a product with one-hot rows


@inlined
def _restart(state_ptr, init_ptr, out_ptr, offs, offs_d, mask, reset):
    """Rows of a state, those of `reset` taken from its start; what they held is not even read."""
    init = up(tl.load(init_ptr + offs_d, mask=mask, other=0.0))
    kept = up(tl.load(state_ptr + offs, mask=mask & ~reset, other=0.0))
    state = tl.where(reset, init, kept)
    tl.store(out_ptr + offs, down(state, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _embed_reset_fwd_kernel(
    tokens_ptr, rows_ptr, embedding_ptr, positions_ptr, halted_ptr, y_ptr, z_ptr, y_init_ptr,
    z_init_ptr, x_out_ptr, y_out_ptr, z_out_ptr, count, scale,
    S: tl.constexpr, PREFIX: tl.constexpr, VOCABULARY: tl.constexpr,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, COLUMNS)[None, :]
    inside = offs_m < count
    columns = offs_d < WIDTH
    item, s = offs_m // S, offs_m % S
    x_type = x_out_ptr.dtype.element_ty

    is_token = inside & (s >= PREFIX)
    token_ptr = tokens_ptr + item * (S - PREFIX) + s - PREFIX
    token = tl.load(token_ptr, mask=is_token, other=0).to(tl.int64)
    # An identifier outside the vocabulary shows as NaN and reads nothing.
    known = is_token & (token >= 0) & (token < VOCABULARY)
    offs = token[:, None] * WIDTH + offs_d
    x = tl.load(embedding_ptr + offs, mask=known[:, None] & columns, other=float("nan"))
    x = up(down(up(x), x_type))
    if rows_ptr is not None:
        is_row = inside & (s < PREFIX)
        offs = (item * PREFIX + s)[:, None] * WIDTH + offs_d
        row = tl.load(rows_ptr + offs, mask=is_row[:, None] & columns, other=0.0)
        x = tl.where(is_row[:, None], up(down(up(row), x_type)), x)
    mask = inside[:, None] & columns
    if positions_ptr is not None:
        position = tl.load(positions_ptr + s[:, None] * WIDTH + offs_d, mask=mask, other=0.0)
        x = up(down(x + up(down(up(position), x_type)), x_type))
        x = up(down(x * POSITION_SCALE, x_type))
    offs = offs_m[:, None] * WIDTH + offs_d
    tl.store(x_out_ptr + offs, down(x * scale, x_type), mask=mask)

    reset = (tl.load(halted_ptr + item, mask=inside, other=0) != 0)[:, None]
    _restart(y_ptr, y_init_ptr, y_out_ptr, offs, offs_d, mask, reset)
    _restart(z_ptr, z_init_ptr, z_out_ptr, offs, offs_d, mask, reset)


@triton.jit
def _embedding_bwd_kernel(
    grad_ptr, tokens_ptr, partial_ptr, count,
    S: tl.constexpr, PREFIX: tl.constexpr, VOCABULARY: tl.constexpr, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """partial[c, v] = sum of grad over the tokens of chunk c that are v; COLUMNS >= VOCABULARY.

    A gradient that is not finite spreads to every v of its chunk; the step is lost with either.
    """
    begin(PDL)
    num_d: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    chunk = tl.program_id(0).to(tl.int64) // num_d
    offs_d = tl.program_id(0) % num_d * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_v = tl.arange(0, COLUMNS)
    # Features outermost, so that the few words of a vocabulary are the short side of the product.
    acc = tl.zeros((BLOCK_D, COLUMNS), tl.float32)
    for k in range(0, CHUNK, BLOCK_K):
        n = chunk * CHUNK + k + tl.arange(0, BLOCK_K)
        inside = n < count
        token = tl.load(tokens_ptr + n, mask=inside, other=-1)
        row = n // (S - PREFIX) * S + PREFIX + n % (S - PREFIX)
        mask = inside[:, None] & (offs_d < WIDTH)[None, :]
        grad = tl.load(grad_ptr + row[:, None] * WIDTH + offs_d[None, :], mask=mask, other=0.0)
        one_hot = (token[:, None] == offs_v[None, :]).to(tl.float32)
        acc = dot(grad.T, down(one_hot, grad_ptr.dtype.element_ty), acc)
    offs = (chunk * VOCABULARY + offs_v)[None, :] * WIDTH + offs_d[:, None]
    mask = (offs_v < VOCABULARY)[None, :] & (offs_d < WIDTH)[:, None]
    tl.store(partial_ptr + offs, acc, mask=mask)


def embed_reset_fwd(
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
    """x, y, z [B,S,D] in the dtype of y; contiguous arguments as `trm_fast.ops` names them."""
    x_out, y_out, z_out = torch.empty_like(y), torch.empty_like(y), torch.empty_like(y)
    batch, seq, width = y.shape
    if y.numel():
        row = pick("embed_reset", y)
        run(
            _embed_reset_fwd_kernel, (triton.cdiv(batch * seq, row.tiles["BLOCK_M"]),), row, y,
            tokens_ptr=tokens, rows_ptr=rows, embedding_ptr=embedding, positions_ptr=positions,
            halted_ptr=halted, y_ptr=y, z_ptr=z, y_init_ptr=y_init, z_init_ptr=z_init,
            x_out_ptr=x_out, y_out_ptr=y_out, z_out_ptr=z_out, count=batch * seq, scale=scale,
            S=seq, PREFIX=seq - tokens.shape[1], VOCABULARY=len(embedding), WIDTH=width,
            COLUMNS=triton.next_power_of_2(width),
        )  # fmt: skip
    return x_out, y_out, z_out


def embed_reset_bwd(grad: Tensor, tokens: Tensor, vocabulary: int) -> Tensor:
    """Sums [V,D] float32 of grad [B,S,D] over the places of each token, tokens [B,L]."""
    _, seq, width = grad.shape
    prefix, count = seq - tokens.shape[1], tokens.numel()
    if count == 0 or vocabulary > MAX_ONE_HOT:
        sums = grad.new_zeros(vocabulary, width, dtype=torch.float32)
        values = grad[:, prefix:].reshape(-1, width).float()
        # Sorted on a GPU, hence the same in every run; index_add_ there is atomic.
        return sums.index_put_((tokens.flatten().long(),), values, accumulate=True)
    row = pick("embed_reset_bwd", grad)
    chunks = triton.cdiv(count, row.tiles["CHUNK"])
    partial = grad.new_empty(chunks, vocabulary, width, dtype=torch.float32)
    run(
        _embedding_bwd_kernel, (chunks * triton.cdiv(width, row.tiles["BLOCK_D"]),), row, grad,
        grad_ptr=grad, tokens_ptr=tokens, partial_ptr=partial, count=count, S=seq, PREFIX=prefix,
        VOCABULARY=vocabulary, WIDTH=width, COLUMNS=max(16, triton.next_power_of_2(vocabulary)),
    )  # fmt: skip
    return partial.sum(0)


def _fwd_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    y = args[5]
    return torch.empty_like(y), torch.empty_like(y), torch.empty_like(y)


def _bwd_fake(grad: Tensor, tokens: Tensor, vocabulary: int) -> Tensor:
    return grad.new_empty(vocabulary, grad.shape[2], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tokens, rows, embedding, positions, halted, _, _, y_init, z_init, scale = inputs
    ctx.save_for_backward(tokens, halted)
    ctx.prefix = output[0].shape[1] - tokens.shape[1]
    ctx.vocabulary = len(embedding)
    ctx.factor = scale if positions is None else scale * POSITION_SCALE.value
    ctx.dtypes = [t if t is None else t.dtype for t in (rows, embedding, positions, y_init, z_init)]
    ctx.set_materialize_grads(False)  # no zeros for a result whose gradient nobody has
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
        if rows:
            d_rows = (d_x[:, : ctx.prefix] * ctx.factor).to(ctx.dtypes[0])
        if embedding:
            sums = _bwd(d_x.contiguous(), tokens, ctx.vocabulary)
            d_embedding = (sums * ctx.factor).to(ctx.dtypes[1])
        if positions:
            sums = d_x.sum(0, dtype=torch.float32)
            d_positions = (sums * ctx.factor).to(ctx.dtypes[2])
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
    TRITON,
    "embed_reset_bwd(Tensor grad, Tensor tokens, int vocabulary) -> Tensor",
    _bwd_fake,
    embed_reset_bwd,
)
_fwd = register(
    TRITON,
    "embed_reset(Tensor tokens, Tensor? rows, Tensor embedding, Tensor? positions, Tensor halted,"
    " Tensor y, Tensor z, Tensor y_init, Tensor z_init, float scale) -> (Tensor, Tensor, Tensor)",
    _fwd_fake,
    embed_reset_fwd,
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

    Raises:
        ValueError: a dtype or width that the kernel does not serve.
    """
    whole = tokens.dtype in (torch.int32, torch.int64)
    check(
        "embed_reset",
        unsupported_dtype(y.dtype),
        unsupported_width(y.shape[-1]),
        None if whole else f"takes tokens of int32 and int64, not {str(tokens.dtype)[6:]}",
    )
    prefix = 0 if rows is None else rows.shape[1]
    assert y.shape[1] == prefix + tokens.shape[1], "the states have a place for each token"
    tensors = (tokens, rows, embedding, positions, halted, y, z, y_init, z_init)
    return _fwd(*(t if t is None else t.contiguous() for t in tensors), scale)


def examples(make: Callable[..., Tensor]) -> Iterator[None]:
    """Every launch of this file at the official sizes, for the report: puzzle rows, positions and
    neither of them, with master weights; the gradient of the usual and the largest vocabulary."""
    batch, prefix, length, width = 768, 16, 81, 512
    halted = make(batch, dtype=torch.bool)
    tokens = make(batch, length, dtype=torch.int32)
    for before, learned in ((prefix, False), (prefix, True), (0, False)):
        state, init = make(batch, before + length, width), make(width)
        rows = make(batch, before, width) if before else None
        positions = make(before + length, width, dtype=torch.float32) if learned else None
        embedding = make(11, width, dtype=torch.float32)
        embed_reset_fwd(
            *(tokens, rows, embedding, positions, halted, state, state, init, init, width**0.5)
        )
        yield
    for vocabulary in (11, MAX_ONE_HOT):
        embed_reset_bwd(make(batch, prefix + length, width), tokens, vocabulary)
        yield
