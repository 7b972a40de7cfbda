"""The table of operations that a Tiny Recursive Model is made of.

Owns the types only: `Ops` names every operation once, `BlockWeights` names the weights that the
recursion is given. May be imported by everything below it; imports nothing of the package.
Implementations live in `reference.py` (the executable specification) and, per backend, in the
compiled ones; `backends.py` alone chooses among them.

Dims legend
    B batch, P puzzle-prefix tokens, L puzzle tokens, S = P + L tokens, D width, H heads,
    K head dim, F feed-forward width (F_t along the tokens), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Rotary: TypeAlias = tuple[Tensor, Tensor]  # cos and sin, each [S, K] float32


class AttentionWeights(NamedTuple):
    """Self-attention of one block: qkv [3*H*K, D] with q, k, v head-major; out [D, H*K]."""

    qkv: Tensor
    out: Tensor


class TokenMixWeights(NamedTuple):
    """SwiGLU along the tokens (`mlp_t`): gate_up [2*F_t, S], down [S, F_t]."""

    gate_up: Tensor
    down: Tensor


class BlockWeights(NamedTuple):
    """One post-norm block: a mixer over tokens, then SwiGLU: gate_up [2*F, D], down [D, F]."""

    mixer: AttentionWeights | TokenMixWeights
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Recursion:
    """Everything about `deep_recursion` that is not a tensor.

    Attributes:
        H_cycles, L_cycles: outer cycles; updates of z within each.
        heads: attention heads; unused by token mixing.
        eps: epsilon of the RMS norm.
        policy: what the backward of the last cycle keeps: "save" everything it reads, "light"
            without the products inside SwiGLU, "recompute" the states between passes only.
        dropout: probability of dropping an element of a sublayer's output; 0.0 in evaluation.
        quantize: "int8": where gradients are off and nothing is dropped, products with weights over
            the features are made in eight bits (`quantize.py`); elsewhere it means nothing. "fp8":
            in all cycles without a gradient, those of training included, where nothing is dropped,
            the channel MLP's products are made of 8-bit floats (`fp8.py`).
    """

    H_cycles: int
    L_cycles: int
    heads: int
    eps: float
    policy: str = "save"
    dropout: float = 0.0
    quantize: str = "none"


@dataclass(frozen=True)
class Ops:
    """One implementation of every operation.

    All floating tensors share one dtype (the forward dtype) unless a line says otherwise;
    weights of `deep_recursion` and `embed_reset` are master weights, cast inside. RMS norms have
    no weight and are computed in float32 (float64 for float64 inputs).

    embed_reset(tokens [B,L] int, rows [B,P,D] or None, embedding [V,D], positions [S,D] or None,
        halted [B] bool, y [B,S,D], z [B,S,D], y_init [D], z_init [D], scale) -> x, y, z [B,S,D]
        Question states, and both recurrent states with halted items back at their start.
    inject(z, y, x: [B,S,D]) -> [B,S,D]                            z + (y + x)
    residual_rmsnorm(h, u: [B,S,D], axis, eps) -> [B,S,D]          rms_norm(h + u) along axis
    swiglu(gate_up [..., 2F]) -> [..., F]                          silu(gate) * up
    linear_rmsnorm(a [B,S,E], w [D,E], h [B,S,D], eps) -> [B,S,D]  rms_norm(h + a @ w.T)
    swiglu_rmsnorm(h [B,S,D], gate_up [2F,D], down [D,F], eps) -> [B,S,D]
    token_mix(h [B,S,D], gate_up [2F_t,S], down [S,F_t], eps) -> [B,S,D]
        The same along the tokens; the norm runs over all S tokens, prefix included.
    rope_attention(qkv [B,S,3*H*K], rotary or None, heads) -> [B,S,H*K]
    stablemax_loss(logits [B,L,V], labels [B,L] int) -> loss [B,L] float32 or float64,
        preds [B,L] int64, correct [B,L] bool. Labels of -100 cost nothing and are never correct.
    deep_recursion(ops, x, y, z: [B,S,D], blocks, rotary, Recursion) -> y, z
        All cycles; gradient to x and the weights through the last one only; z is detached.
    adam_atan2_ema_(params, grads, exp_avgs, exp_avg_sqs, emas, copies, *, lr, weight_decay, beta1,
        beta2, step, ema_decay, grad_scale=1, found_inf=0) -> None
        One optimizer step over lists of tensors, in place; emas and copies may be empty. Gradients
        count `grad_scale` times; nothing changes where found_inf is not 0. Both, lr, step and
        ema_decay may be 0-d tensors on the parameters' device: then nothing waits for it.
    """

    embed_reset: Callable[..., tuple[Tensor, Tensor, Tensor]]
    inject: Callable[[Tensor, Tensor, Tensor], Tensor]
    residual_rmsnorm: Callable[[Tensor, Tensor, int, float], Tensor]
    swiglu: Callable[[Tensor], Tensor]
    linear_rmsnorm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    swiglu_rmsnorm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    token_mix: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    rope_attention: Callable[[Tensor, Rotary | None, int], Tensor]
    stablemax_loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    deep_recursion: Callable[
        [Ops, Tensor, Tensor, Tensor, Sequence[BlockWeights], Rotary | None, Recursion],
        tuple[Tensor, Tensor],
    ]
    adam_atan2_ema_: Callable[..., None]


def wide_dtype(device: torch.device) -> torch.dtype:
    """What losses, sums and rates are computed in: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


OP_NAMES = tuple(field.name for field in fields(Ops))
POLICIES = ("save", "light", "recompute")
