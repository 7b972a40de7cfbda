"""One step of deep_recursion by any implementation, and by every cycle written out.

Imported by tests/ops/test_deep_recursion*.py.
"""

import torch
from op_checks import EPS, rms_norm, silu
from parity import L2_FLOORS, assert_l2, make_inputs, relative_l2

from trm_fast import backends
from trm_fast.ops import (
    AttentionWeights,
    BlockWeights,
    Recursion,
    TokenMixWeights,
)
from trm_fast.reference import deep_recursion

OPS = backends.table("reference")
MIXERS = ("attention", "mlp_t")
HEADS = 2
SHAPES = [(2, 97, 32), (4, 16, 16), (1, 9, 8), (0, 9, 8)]


def rotary(tokens, head_dim):
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.outer(torch.arange(tokens), frequency).repeat(1, 2)
    return angles.cos(), angles.sin()


def leaves_for(mixer, tokens, width, layers=2, dtype=torch.float32):
    """Weights of every block in a flat list: two of the mixer, gate_up, down; widths F = 2 D."""
    flat = []
    for layer in range(layers):
        if mixer == "mlp_t":
            sizes, scale = [(4 * width, tokens), (tokens, 2 * width)], [tokens**-0.5, 0.3]
        else:
            sizes, scale = [(3 * width, width), (width, width)], [width**-0.5] * 2
        sizes += [(4 * width, width), (width, 2 * width)]
        scale += [width**-0.5, (2 * width) ** -0.5]
        flat += make_inputs(*sizes, dtype=dtype, seed=layer, scale=scale, requires_grad=True)
    return flat


def blocks_of(mixer, flat):
    kind = TokenMixWeights if mixer == "mlp_t" else AttentionWeights
    return [
        BlockWeights(kind(flat[i], flat[i + 1]), flat[i + 2], flat[i + 3])
        for i in range(0, len(flat), 4)
    ]


def states(batch, tokens, width, dtype=torch.float32):
    shape = (batch, tokens, width)
    return make_inputs(shape, shape, shape, dtype=dtype, seed=5)


def step(
    mixer,
    inputs,
    flat,
    *,
    H_cycles=2,
    L_cycles=2,
    policy="save",
    dropout=0.0,
    rope=True,
    heads=HEADS,
    function=deep_recursion,
):
    """y, z and the gradients to x and the weights of one call, from a fixed upstream gradient."""
    x, y, z = inputs
    x = x.detach().clone().requires_grad_()
    tables = None
    if mixer == "attention" and rope:
        tables = tuple(t.to(x.device) for t in rotary(x.shape[1], x.shape[2] // heads))
    settings = Recursion(H_cycles, L_cycles, heads, EPS, policy, dropout)
    new_y, new_z = function(OPS, x, y, z, blocks_of(mixer, flat), tables, settings)
    upstream = torch.linspace(-1, 1, new_y.numel()).view(new_y.shape).to(new_y)
    grads = torch.autograd.grad(new_y, [x, *flat], upstream)
    return [new_y.detach(), new_z, *grads]


def formula(mixer, x, y, z, flat, H_cycles, L_cycles, heads=HEADS):
    """Every cycle written out; what comes from before the last one is detached."""

    def attention(h, qkv, out):
        batch, tokens, width = h.shape
        q, k, v = (h @ qkv.T).view(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        cos, sin = (t.double() for t in rotary(tokens, width // heads))
        half = width // heads // 2
        q, k = (t * cos + torch.cat((-t[..., half:], t[..., :half]), -1) * sin for t in (q, k))
        weights = torch.softmax(q @ k.mT / (width // heads) ** 0.5, -1)
        return (weights @ v).transpose(1, 2).flatten(2) @ out.T

    def gated(h, gate_up, down):
        gate, up = (h @ gate_up.T).tensor_split(2, -1)
        return (silu(gate) * up) @ down.T

    def network(h):
        for i in range(0, len(flat), 4):
            a, b, gate_up, down = flat[i : i + 4]
            if mixer == "mlp_t":
                h = rms_norm(h + gated(h.mT, a, b).mT, 1)
            else:
                h = rms_norm(h + attention(h, a, b), -1)
            h = rms_norm(h + gated(h, gate_up, down), -1)
        return h

    for cycle in range(H_cycles):
        if cycle == H_cycles - 1:
            y, z = y.detach(), z.detach()
        for _ in range(L_cycles):
            z = network(z + (y + x))
        y = network(y + z)
    return y, z.detach()


def exact_step(mixer, inputs, flat, heads, H_cycles, L_cycles):
    """What `step` gives, by the formula in float64."""
    x, y, z = (t.detach().double() for t in inputs)
    flat = [t.detach().double().requires_grad_() for t in flat]
    x.requires_grad_()
    new_y, new_z = formula(mixer, x, y, z, flat, H_cycles, L_cycles, heads)
    upstream = torch.linspace(-1, 1, new_y.numel()).view(new_y.shape).to(inputs[0]).double()
    return [new_y, new_z, *torch.autograd.grad(new_y, [x, *flat], upstream)]


def assert_as_good(got, plain, exact, dtype, factor=2):
    """At most `factor` times the error of plain PyTorch in the same dtype, tensor by tensor."""
    for i, (g, p, e) in enumerate(zip(got, plain, exact, strict=True)):
        limit = factor * relative_l2(p, e) + L2_FLOORS[dtype]
        assert_l2(g.cpu(), e, limit, name=f"tensor {i}")
