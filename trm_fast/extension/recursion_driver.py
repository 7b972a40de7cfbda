"""What the driver of `deep_recursion` on CUDA keeps for its backward.

Owns the shapes that a compiler must know of without running csrc/cuda/deep_recursion.cpp. The CPU
engine keeps other things: `deep_recursion` asks here for tensors on CUDA only.

Dims legend: B batch, S tokens incl. prefix, D width, F inner width, E = H*K features of the heads,
M = B*S rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import trm_fast.extension.rotate_qkv  # noqa: F401  (the driver calls it)

WEIGHTS = 4  # of a block: the mixer's two, gate_up, down
LSE_MULTIPLE = 32  # rows that PyTorch's attention in float32 rounds up to on CUDA


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
