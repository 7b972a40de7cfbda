"""Products of 8-bit floats in the channel MLP: what `arch.quantize=fp8` computes.

e4m3 (torch.float8_e4m3fn) has a sign, 4 bits of exponent and 3 of mantissa: up to 448, rounded by
1/16 at most down to 2^-6, in steps of 2^-9 below. A number t takes part as step * e4m3(t / step),
rounded to the nearest, ties to even, and to 448 if it is larger; what is not finite becomes NaN.
Every step is a power of two, so that division and multiplication by it are exact, and what takes
part is itself a float32. The steps:

    h           the MLP's input, which a norm over n numbers has just made (n = D; n = S behind
                token mixing): none is larger than sqrt(n). One step for all of it, the smallest
                with sqrt(n) <= 448 * step. Nothing has to be measured.
    gate_up, down   one for each output channel: 2^(e - 7) where the largest magnitude of its row
                lies in [2^e, 2^(e + 1)); e is -100 at least.
    a           silu(g) * u of float32 g and u: likewise one for each row and tile of TILE inner
                features, the last tile being what is left. A kernel has such a part of a row at
                hand when it has made it.

Sums are float32, those of the down product tile by tile: the tensor cores of some GPUs keep about
14 bits of a longer sum. Residual and norm are what they are without quantisation.
Quantised are cycles without a gradient, in training too: the one that the backward goes through
stays as it is. Imported by `reference.py` and tests.

Dims legend: see `ops.py`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from trm_fast.ops import BlockWeights, Ops, TokenMixWeights

LARGEST = 448.0  # of e4m3
TILE = 128  # inner features that share a step
SMALLEST = -100  # exponent of the largest magnitude of a row, at least


def rounded(t: Tensor, step: Tensor | float) -> Tensor:
    """What stands for t, float32 of its shape: step * e4m3(t / step)."""
    t = t.float() / step
    t = torch.where(t.isfinite(), t.clamp(-LARGEST, LARGEST), torch.nan)
    return t.to(torch.float8_e4m3fn).float() * step


def norm_step(count: int) -> float:
    """The step of a norm over `count` numbers, whose sum of squares is at most `count`."""
    return 2.0 ** math.ceil(math.log2(count / LARGEST**2) / 2)


def row_steps(t: Tensor) -> Tensor:
    """One step for each row of t [..., K]: [..., 1] float32. Of rows that are not finite, any."""
    most = t.float().abs().amax(-1, keepdim=True).nan_to_num(1, posinf=1)
    _, exponent = torch.frexp(most.clamp_min(2.0**SMALLEST))  # of a fraction in [1/2, 1)
    return torch.ldexp(torch.ones_like(most), exponent - 8)


def weights(w: BlockWeights, dtype: torch.dtype) -> BlockWeights:
    """Master weights as `swiglu_rmsnorm` takes them; those of the mixer in `dtype`."""
    mixer = type(w.mixer)(*(t.to(dtype) for t in w.mixer))
    return BlockWeights(mixer, *(rounded(t, row_steps(t)) for t in (w.gate_up, w.down)))


def channel_swiglu(h: Tensor, gate_up: Tensor, down: Tensor, step: float) -> Tensor:
    """h [..., D] with its step, gate_up [2F,D] and down [D,F] of `weights` -> [..., D] float32."""
    g, u = (rounded(h, step) @ gate_up.t()).chunk(2, -1)
    a = torch.nn.functional.silu(g) * u
    out = torch.zeros(h.shape, dtype=torch.float32, device=h.device)
    for part, w in zip(a.split(TILE, -1), down.split(TILE, -1), strict=True):
        out += rounded(part, row_steps(part)) @ w.t()
    return out


def swiglu_rmsnorm(
    ops: Ops, step: float, h: Tensor, gate_up: Tensor, down: Tensor, eps: float
) -> Tensor:
    """The operation of that name in e4m3, h [B,S,D] -> [B,S,D] in h's dtype."""
    update = channel_swiglu(h, gate_up, down, step).to(h.dtype)
    return ops.residual_rmsnorm(h, update, -1, eps)


def operations(ops: Ops, w: BlockWeights, h: Tensor) -> Ops:
    """`ops` with that operation in place of theirs, for states h [B,S,D] of a network of w."""
    count = h.shape[1] if isinstance(w.mixer, TokenMixWeights) else h.shape[2]
    return replace(ops, swiglu_rmsnorm=partial(swiglu_rmsnorm, ops, norm_step(count)))
