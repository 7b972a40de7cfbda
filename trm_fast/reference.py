"""The executable specification: one plain PyTorch function per operation, for any device.

This is the product path on CPU and MPS and what every kernel is checked against. Each function
runs in the dtype of its inputs and rounds where the published model rounds: matrix products,
SiLU, products and residuals in that dtype, norms and rotations in float32 at least. The oracle is
the same function on float32 or float64 inputs. Imported by `backends.py`, tests and benches;
`linear` also by `model.py` for the heads, the networks by `variants.py`, and the optimizer's step
by `optim.py` as its default.

Dims legend: see `ops.py`. States may lie batch-major or token-major in memory ([B,S,D] with
strides of [S,B,D]); token mixing needs no transposed copy in the second layout, so the recursion
uses it there. Source: Jolicoeur-Martineau 2025, "Less is More: Recursive Reasoning with Tiny
Networks" (arXiv 2510.04871), Algorithm 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from trm_fast import fp8, quantize
from trm_fast.data.format import IGNORE_LABEL_ID
from trm_fast.kernels.coefficients import step_coefficients
from trm_fast.ops import BlockWeights, Ops, Recursion, Rotary, TokenMixWeights, wide_dtype

FEATURES, TOKENS = -1, 1  # the axes of [B, S, D] that a norm can run along
POSITION_SCALE = 0.707106781  # keeps the variance of token + position at that of a token


def linear(h: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """h @ weight.T + bias over the last axis, without a copy for either memory layout of h."""
    if _is_token_major(h):
        return F.linear(h.transpose(0, 1), weight, bias).transpose(0, 1)
    return F.linear(h, weight, bias)


def _is_token_major(h: Tensor) -> bool:
    return h.dim() == 3 and h.stride(0) < h.stride(1)


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype norms and rotations are computed in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


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
    x = F.embedding(tokens, embedding.to(y.dtype))
    if rows is not None:
        x = torch.cat((rows, x), dim=1)
    if positions is not None:
        x = POSITION_SCALE * (x + positions.to(y.dtype))
    reset = halted.view(-1, 1, 1)
    return scale * x, torch.where(reset, y_init, y), torch.where(reset, z_init, z)


def inject(z: Tensor, y: Tensor, x: Tensor) -> Tensor:
    return z + (y + x)


class _ResidualRMSNorm(torch.autograd.Function):
    """Keeps the sum and one scale per row for the backward; autograd would keep three tensors."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, u: Tensor, axis: int, eps: float) -> Tensor:
        total = h + u
        wide = total.to(norm_dtype(total.dtype))
        scale = torch.rsqrt(wide.square().mean(axis, keepdim=True) + eps)
        ctx.save_for_backward(total, scale)
        ctx.axis = axis
        return (wide * scale).to(total.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        total, scale = ctx.saved_tensors
        normed = total.to(scale.dtype) * scale
        grad = grad.to(scale.dtype)
        projection = (grad * normed).mean(ctx.axis, keepdim=True)
        d = torch.addcmul(grad, normed, projection, value=-1).mul_(scale).to(total.dtype)
        return d, d, None, None


def residual_rmsnorm(h: Tensor, u: Tensor, axis: int, eps: float) -> Tensor:
    return _ResidualRMSNorm.apply(h, u, axis, eps)


class _SwiGLU(torch.autograd.Function):
    """Writes both gradients into one tensor; autograd would concatenate two (a compiler fuses)."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, axis: int) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.axis = axis
        gate, up = gate_up.chunk(2, axis)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, ctx.axis)
        if torch.compiler.is_compiling():  # Dynamo takes no strided `out=`
            d_gate = torch.ops.aten.silu_backward(grad * up, gate)
            return torch.cat((d_gate, grad * F.silu(gate)), ctx.axis), None
        d = torch.empty_like(gate_up)
        d_gate, d_up = d.chunk(2, ctx.axis)
        torch.mul(grad, F.silu(gate), out=d_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=d_gate)
        return d, None


def swiglu(gate_up: Tensor) -> Tensor:
    return _SwiGLU.apply(gate_up, FEATURES)


def linear_rmsnorm(a: Tensor, w: Tensor, h: Tensor, eps: float) -> Tensor:
    return residual_rmsnorm(h, linear(a, w), FEATURES, eps)


def swiglu_rmsnorm(h: Tensor, w_gate_up: Tensor, w_down: Tensor, eps: float) -> Tensor:
    return residual_rmsnorm(h, _channel_swiglu(h, w_gate_up, w_down), FEATURES, eps)


def token_mix(h: Tensor, w_gate_up: Tensor, w_down: Tensor, eps: float) -> Tensor:
    return residual_rmsnorm(h, _token_swiglu(h, w_gate_up, w_down), TOKENS, eps)


def rope_attention(qkv: Tensor, rotary: Rotary | None, heads: int) -> Tensor:
    q, k, v = rearrange(qkv, "b s (n h k) -> n b h s k", n=3, h=heads).unbind(0)
    if rotary is not None:
        q, k = (_rotate(t, *rotary) for t in (q, k))
    out = F.scaled_dot_product_attention(q, k, v)
    return rearrange(out, "b h s k -> b s (h k)")


def _rotate(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = t.to(norm_dtype(t.dtype))
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(t.dtype)


class _StablemaxLoss(torch.autograd.Function):
    """Closed form with its own gradient, right where the published form is not (x = 1 in float32).

    s(x) = 1 + x for x >= 0, else 1 / (1 - x); loss = log(1 + rest / s_label), where rest is the sum
    over the other classes; ds/dx = s / (1 + |x|).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = logits.to(wide_dtype(logits.device))
        size = 1 + wide.abs()
        s = torch.where(wide < 0, 1 / size, size)
        valid = labels != IGNORE_LABEL_ID
        index = torch.where(valid, labels, 0).long().unsqueeze(-1)
        s_label = s.gather(-1, index)
        others = s.scatter(-1, index, 0)
        rest = others.sum(-1, keepdim=True)
        d = others.scatter(-1, index, -rest).div_(s_label + rest).div_(size)
        ctx.save_for_backward(torch.where(valid.unsqueeze(-1), d, 0))
        ctx.dtype = logits.dtype
        preds = logits.argmax(-1)
        loss = torch.where(valid, torch.log1p(rest / s_label).squeeze(-1), 0)
        correct = valid & (preds == labels)
        ctx.mark_non_differentiable(preds, correct)
        return loss, preds, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor, None]:
        (d,) = ctx.saved_tensors
        return (d * grad.unsqueeze(-1)).to(ctx.dtype), None


def stablemax_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _StablemaxLoss.apply(logits, labels)


def deep_recursion(
    ops: Ops,
    x: Tensor,
    y: Tensor,
    z: Tensor,
    blocks: Sequence[BlockWeights],
    rotary: Rotary | None,
    r: Recursion,
) -> tuple[Tensor, Tensor]:
    x, y, z = laid_out(blocks, x, y, z)
    tracked = torch.is_grad_enabled()
    with torch.no_grad():
        free = free_network(ops, blocks, rotary, r, x, tracked)
        for _ in range(r.H_cycles - 1 if tracked else r.H_cycles):
            y, z = latent_cycle(free, ops, x, y, z, r)
    if tracked:
        y, z = y.detach(), z.detach()  # with one cycle they are still the caller's
        y, z = latent_cycle(tracked_network(ops, blocks, rotary, r), ops, x, y, z, r)
    return y, z.detach()


def laid_out(blocks: Sequence[BlockWeights], *states: Tensor) -> list[Tensor]:
    """States [B,S,D] in the memory layout that these blocks read without a copy."""
    if not isinstance(blocks[0].mixer, TokenMixWeights):
        return list(states)
    return [t.transpose(0, 1).contiguous().transpose(0, 1) for t in states]


def tracked_network(
    ops: Ops, blocks: Sequence[BlockWeights], rotary: Rotary | None, r: Recursion
) -> Callable[[Tensor], Tensor]:
    """The network of the cycles with a gradient, whose backward keeps what the policy says."""
    network = partial(_cast_network, ops, blocks, rotary, r)
    if r.policy == "recompute":
        return partial(recomputed, network, draws=r.dropout > 0)
    return network


def free_network(
    ops: Ops,
    blocks: Sequence[BlockWeights],
    rotary: Rotary | None,
    r: Recursion,
    x: Tensor,
    tracked: bool,
) -> Callable[[Tensor], Tensor]:
    """The network of the cycles without a gradient, whose weights are prepared once."""
    how = "none" if r.dropout or (r.quantize == "int8" and tracked) else r.quantize
    if how == "int8":
        # A graph to be exported has its weights prepared already.
        prepared = [
            w if isinstance(w, quantize.Block) else quantize.block(w, x.dtype) for w in blocks
        ]
        return partial(quantize.network, ops, prepared, rotary, r)
    if how == "fp8":
        ops = fp8.operations(ops, blocks[0], x)
        return partial(_network, ops, [fp8.weights(w, x.dtype) for w in blocks], rotary, r)
    return partial(_network, ops, [_cast(w, x.dtype) for w in blocks], rotary, r)


def latent_cycle(
    network: Callable[[Tensor], Tensor], ops: Ops, x: Tensor, y: Tensor, z: Tensor, r: Recursion
) -> tuple[Tensor, Tensor]:
    """Improve the latent L_cycles times given question and answer, then the answer once."""
    for _ in range(r.L_cycles):
        z = network(ops.inject(z, y, x))
    return network(y + z), z


def _network(
    ops: Ops,
    blocks: Sequence[BlockWeights],
    rotary: Rotary | None,
    r: Recursion,
    h: Tensor,
) -> Tensor:
    for block in blocks:
        apply = _block_with_dropout if r.dropout else _block
        h = apply(ops, block, rotary, r, h)
    return h


def _cast_network(
    ops: Ops,
    blocks: Sequence[BlockWeights],
    rotary: Rotary | None,
    r: Recursion,
    h: Tensor,
) -> Tensor:
    """The network on master weights: cast on each pass, so that gradients add up in their dtype."""
    return _network(ops, [_cast(block, h.dtype) for block in blocks], rotary, r, h)


def _block(ops: Ops, w: BlockWeights, rotary: Rotary | None, r: Recursion, h: Tensor) -> Tensor:
    run = recomputed if r.policy == "light" and torch.is_grad_enabled() else direct
    if isinstance(w.mixer, TokenMixWeights):
        h = run(ops.token_mix, h, w.mixer.gate_up, w.mixer.down, r.eps)
    else:
        attended = ops.rope_attention(linear(h, w.mixer.qkv), rotary, r.heads)
        h = ops.linear_rmsnorm(attended, w.mixer.out, h, r.eps)
    return run(ops.swiglu_rmsnorm, h, w.gate_up, w.down, r.eps)


def _block_with_dropout(
    ops: Ops, w: BlockWeights, rotary: Rotary | None, r: Recursion, h: Tensor
) -> Tensor:
    """The same with elements of each sublayer's output dropped before the residual."""
    run = recomputed if r.policy == "light" and torch.is_grad_enabled() else direct
    if isinstance(w.mixer, TokenMixWeights):
        update, axis = run(_token_swiglu, h, w.mixer.gate_up, w.mixer.down), TOKENS
    else:
        attended = ops.rope_attention(linear(h, w.mixer.qkv), rotary, r.heads)
        update, axis = linear(attended, w.mixer.out), FEATURES
    h = ops.residual_rmsnorm(h, F.dropout(update, r.dropout), axis, r.eps)
    update = run(_channel_swiglu, h, w.gate_up, w.down)
    return ops.residual_rmsnorm(h, F.dropout(update, r.dropout), FEATURES, r.eps)


def _channel_swiglu(h: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """SwiGLU over the features, features outermost inside: gate and up are contiguous halves."""
    if _is_token_major(h):
        return _channel_swiglu(h.transpose(0, 1), w_gate_up, w_down).transpose(0, 1)
    gate_up = w_gate_up @ h.flatten(0, 1).t()  # [2F, N]
    return (_SwiGLU.apply(gate_up, 0).t() @ w_down.t()).view(h.shape)


def _token_swiglu(h: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    by_token = h.transpose(0, 1)  # [S, B, D]
    gate_up = w_gate_up @ by_token.flatten(1)  # [2F_t, B*D]
    return (w_down @ _SwiGLU.apply(gate_up, 0)).view(by_token.shape).transpose(0, 1)


def direct(f: Callable[..., Tensor], *args: object) -> Tensor:
    return f(*args)


def recomputed(f: Callable[..., Tensor], *args: object, draws: bool = False) -> Tensor:
    """f(*args), whose inner tensors the backward computes again; `draws` if f draws numbers."""
    return checkpoint(f, *args, use_reentrant=False, preserve_rng_state=draws)


def _cast(w: BlockWeights, dtype: torch.dtype) -> BlockWeights:
    mixer = type(w.mixer)(*(t.to(dtype) for t in w.mixer))
    return BlockWeights(mixer, w.gate_up.to(dtype), w.down.to(dtype))


def adam_atan2_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor],
    copies: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    beta1: float,
    beta2: float,
    step: int | Tensor,
    ema_decay: float | Tensor,
    grad_scale: float | Tensor = 1.0,
    found_inf: float | Tensor = 0.0,
) -> None:
    if not params:
        return
    scale, decay, rate, correction, ema_weight, skipped = step_coefficients(
        params[0].device, lr, weight_decay, beta1, beta2, step, ema_decay, grad_scale, found_inf
    ).unbind()

    def put(t: Tensor, new: Tensor) -> None:
        torch.where(skipped != 0, t, new.to(t.dtype), out=t)

    # Together with the coefficients, which are 0-d and wide, a 0-d tensor would be wide too.
    params, grads, exp_avgs, exp_avg_sqs, emas, copies = (
        [t.view(1) if t.dim() == 0 else t for t in given]
        for given in (params, grads, exp_avgs, exp_avg_sqs, emas, copies)
    )
    for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        g = g.to(m.dtype) * scale
        put(m, m.lerp(g, 1 - beta1))
        put(v, v.lerp(g.square(), 1 - beta2))
        put(p, p * decay - rate * torch.atan2(m, (v / correction).sqrt_()))
        if i < len(emas):
            put(emas[i], emas[i].lerp(p.to(emas[i].dtype), ema_weight))
        if i < len(copies):
            put(copies[i], p)
