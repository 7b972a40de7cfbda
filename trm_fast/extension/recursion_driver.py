"""The driver of `deep_recursion` on CUDA: what it serves, and what it keeps for its backward.

Owns what must be known without running csrc/cuda/deep_recursion.cpp, and registers the operations
that it calls. The CPU engine is another: `deep_recursion` asks here for tensors on CUDA only.

Dims legend: B batch, S tokens incl. prefix, D width, F inner width, E = H*K features of the heads,
M = B*S rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trm_fast.extension import inject, residual_rmsnorm, rotate_qkv, swiglu  # noqa: F401

WEIGHTS = 4  # of a block: the mixer's two, gate_up, down
LSE_MULTIPLE = 32  # rows that PyTorch's attention in float32 rounds up to on CUDA
# What PyTorch's fused attention serves; beyond, the backward of FlashAttention lacks some GPUs.
HEAD_DIMS = range(8, 193, 8)


def unsupported_heads(width: int, heads: int) -> str | None:
    """Why `heads` heads of states of `width` cannot be served, or None."""
    head_dim, rest = divmod(width, heads)
    if not rest and head_dim in HEAD_DIMS:
        return None
    most, step = HEAD_DIMS[-1], HEAD_DIMS.step
    given = f"{width} features in {heads}"
    return f"needs heads of a size that is a multiple of {step} up to {most}, not {given}"


def new_saved(
    x: Tensor, weights: Sequence[Tensor], mlp_t: bool, L_cycles: int, heads: int, policy: str
) -> list[Tensor]:
    """Empty tensors like those that the driver's forward returns, for states like x [B,S,D].

    Of each pass its input; then, unless the policy is to recompute, of each block: of attention
    q, k, v [B,S,3E] rotated, its result [B,S,H,K] and lse; the mixer's normed output [M,D] and its
    scales; the block's own; with policy save also gate and up [M,2F].
    """
    if policy == "none" or not x.numel():
        return []
    saved: list[Tensor] = []
    for _ in range(L_cycles + 1):
        saved.append(x.new_empty(x.shape[0] * x.shape[1], x.shape[2]))
        if policy != "recompute":
            for first in range(0, len(weights), WEIGHTS):
                saved += _new_tape(x, weights[first : first + WEIGHTS], mlp_t, heads, policy)
    return saved


def _new_tape(
    x: Tensor, weights: Sequence[Tensor], mlp_t: bool, heads: int, policy: str
) -> list[Tensor]:
    batch, tokens, width = x.shape
    rows, wide = batch * tokens, torch.float32
    tape = []
    if not mlp_t:
        features = weights[1].shape[1]
        rounded = x.device.type == "cuda" and x.dtype == torch.float32
        places = -(-tokens // LSE_MULTIPLE) * LSE_MULTIPLE if rounded else tokens
        tape.append(x.new_empty(batch, tokens, 3 * features))
        tape.append(x.new_empty(batch, tokens, heads, features // heads))
        tape.append(x.new_empty(batch, heads, places, dtype=wide))
    along = batch * width if mlp_t else rows
    for scales in (along, rows):
        tape.append(x.new_empty(rows, width))
        tape.append(x.new_empty(1, scales, dtype=wide))
    if policy == "save":
        tape.append(x.new_empty(rows, weights[2].shape[0]))
    return tape
