"""Products in eight bits, for passes without a gradient: what `arch.quantize=int8` computes.

A row of activations and a row of a weight (one output channel) each become whole numbers from -127
to 127, in steps of their largest magnitude / 127. The sums of their products are exact, and a sum
times both steps is the result. The compiled extension (csrc/cpu/int8.h) gives the same bits.
Quantised are the products with weights over the features: gate and up, down, and with attention q,
k, v and the output; token mixing, attention itself, norms and residuals stay as they are.
Imported by `reference.py` and tests.

Dims legend: see `ops.py`; K inner width of a product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trm_fast.ops import AttentionWeights, BlockWeights, Ops, Recursion, Rotary, TokenMixWeights

LEVELS = 127
SMALLEST = 1e-30  # a row without a larger magnitude counts as zeros: 127 / it would overflow
CHUNK = 1024  # products of 127 * 127 that float32 sums exactly


class Rows(NamedTuple):
    """numbers [..., K], whole, and steps [..., 1]: both float32; t is about numbers * steps. A
    graph to be exported keeps a weight's numbers as int8."""

    numbers: Tensor
    steps: Tensor


class Block(NamedTuple):
    """One block's weights: rows where products are quantised; token mixing in the states' dtype."""

    mixer: TokenMixWeights | tuple[Rows, Rows]
    gate_up: Rows
    down: Rows


def rows(t: Tensor) -> Rows:
    """t [..., K] of any floating dtype, row by row.

    A row of zeros has the step 0; one with an infinity or a NaN has the step NaN.
    """
    t = t.float()
    most = t.abs().amax(-1, keepdim=True)
    usual = (most >= SMALLEST) & most.isfinite()
    inverse = torch.full_like(most, LEVELS) / most  # a number / tensor would round twice
    numbers = torch.where(usual, t * inverse, 0).round()
    other = torch.where(most < SMALLEST, 0.0, torch.nan)
    return Rows(numbers, torch.where(usual, most / LEVELS, other))


def linear(h: Tensor, weight: Rows) -> Tensor:
    """h [..., K], weight of [D, K] -> h @ weight.T [..., D], by whole numbers, in h's dtype."""
    given = rows(h)
    sums = _whole_products(given.numbers.flatten(0, -2), weight.numbers)
    out = sums.float().view(*h.shape[:-1], sums.shape[1])
    return (out * weight.steps.view(-1) * given.steps).to(h.dtype)


def _whole_products(numbers: Tensor, weight: Tensor) -> Tensor:
    """numbers [N, K], weight [D, K], whole, -127 to 127 -> numbers @ weight.T [N, D] int32."""
    if torch.compiler.is_exporting():  # one operation, which ONNX has too (`portable.py`)
        return torch._int_mm(numbers.to(torch.int8), weight.to(torch.int8).t())
    sums = torch.zeros(len(numbers), len(weight), dtype=torch.int32, device=numbers.device)
    for start in range(0, numbers.shape[-1], CHUNK):
        part = slice(start, start + CHUNK)
        sums += (numbers[:, part] @ weight[:, part].t().to(numbers.dtype)).int()
    return sums


def block(w: BlockWeights, dtype: torch.dtype) -> Block:
    """Master weights as `network` takes them; `dtype` is the states'."""
    mixer: TokenMixWeights | tuple[Rows, Rows]
    if isinstance(w.mixer, AttentionWeights):
        mixer = rows(w.mixer.qkv), rows(w.mixer.out)
    else:
        mixer = TokenMixWeights(w.mixer.gate_up.to(dtype), w.mixer.down.to(dtype))
    return Block(mixer, rows(w.gate_up), rows(w.down))


def network(
    ops: Ops, blocks: Sequence[Block], rotary: Rotary | None, r: Recursion, h: Tensor
) -> Tensor:
    """One pass [B,S,D] -> [B,S,D]: `ops` for everything but the products with weights."""
    for w in blocks:
        if isinstance(w.mixer, TokenMixWeights):
            h = ops.token_mix(h, w.mixer.gate_up, w.mixer.down, r.eps)
        else:
            qkv, out = w.mixer
            attended = ops.rope_attention(linear(h, qkv), rotary, r.heads)
            h = ops.residual_rmsnorm(h, linear(attended, out), -1, r.eps)
        update = linear(ops.swiglu(linear(h, w.gate_up)), w.down)
        h = ops.residual_rmsnorm(h, update, -1, r.eps)
    return h
