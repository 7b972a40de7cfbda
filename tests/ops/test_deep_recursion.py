"""deep_recursion: all cycles, the last one with gradient, under every policy of what to keep."""

import pytest
import torch
from op_checks import DTYPES, EPS, case_ids, counted_ops, rms_norm, silu, token_major
from parity import assert_l2, make_inputs
from tiny import HeldStorages

from trm_fast import reference
from trm_fast.ops import (
    OP_NAMES,
    POLICIES,
    AttentionWeights,
    BlockWeights,
    Ops,
    Recursion,
    TokenMixWeights,
)
from trm_fast.reference import deep_recursion

OPS = Ops(**{name: getattr(reference, name) for name in OP_NAMES})
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


def step(mixer, inputs, flat, *, H_cycles=2, L_cycles=2, policy="save", dropout=0.0, rope=True):
    """y, z and the gradients to x and the weights of one call, from a fixed upstream gradient."""
    x, y, z = inputs
    x = x.detach().clone().requires_grad_()
    tables = rotary(x.shape[1], x.shape[2] // HEADS) if mixer == "attention" and rope else None
    settings = Recursion(H_cycles, L_cycles, HEADS, EPS, policy, dropout)
    new_y, new_z = deep_recursion(OPS, x, y, z, blocks_of(mixer, flat), tables, settings)
    upstream = torch.linspace(-1, 1, new_y.numel()).view(new_y.shape).to(new_y.dtype)
    grads = torch.autograd.grad(new_y, [x, *flat], upstream)
    return [new_y.detach(), new_z, *grads]


def formula(mixer, x, y, z, flat, H_cycles, L_cycles):
    """Every cycle written out; what comes from before the last one is detached."""

    def attention(h, qkv, out):
        batch, tokens, width = h.shape
        q, k, v = (h @ qkv.T).view(batch, tokens, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        cos, sin = (t.double() for t in rotary(tokens, width // HEADS))
        half = width // HEADS // 2
        q, k = (t * cos + torch.cat((-t[..., half:], t[..., :half]), -1) * sin for t in (q, k))
        weights = torch.softmax(q @ k.mT / (width // HEADS) ** 0.5, -1)
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


@pytest.mark.parametrize("H_cycles, L_cycles", [(1, 1), (2, 3), (3, 1)])
@pytest.mark.parametrize("shape", SHAPES, ids=case_ids("B S D", SHAPES))
@pytest.mark.parametrize("mixer", MIXERS)
def test_against_every_cycle_written_out(mixer, shape, H_cycles, L_cycles):
    flat = leaves_for(mixer, *shape[1:], dtype=torch.float64)
    x, y, z = states(*shape, dtype=torch.float64)
    got = step(mixer, (x, y, z), flat, H_cycles=H_cycles, L_cycles=L_cycles)
    leaf = x.clone().requires_grad_()
    want_y, want_z = formula(mixer, leaf, y, z, flat, H_cycles, L_cycles)
    upstream = torch.linspace(-1, 1, want_y.numel()).view(want_y.shape).double()
    want = [want_y, want_z, *torch.autograd.grad(want_y, [leaf, *flat], upstream)]
    # The rotary tables are float32 on both sides; rounding differs by the order of sums alone.
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert_l2(g, w, 1e-9, name=f"tensor {i}")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("policy", ["light", "recompute"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_policies_are_bitwise_equal(mixer, policy, dtype):
    flat = leaves_for(mixer, 12, 16)  # master weights in float32, cast inside
    inputs = states(3, 12, 16, dtype)
    saved = step(mixer, inputs, flat)
    other = step(mixer, inputs, flat, policy=policy)
    assert saved[0].dtype == saved[1].dtype == saved[2].dtype == dtype
    assert all(g.dtype == torch.float32 for g in saved[3:])
    assert all(torch.equal(a, b) for a, b in zip(saved, other, strict=True))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mixer", MIXERS)
def test_dropout(mixer, policy):
    flat = leaves_for(mixer, 12, 16)
    inputs = states(3, 12, 16)

    def dropped(seed, policy=policy, dropout=0.4):
        torch.manual_seed(seed)
        return step(mixer, inputs, flat, policy=policy, dropout=dropout)

    first, again, other = dropped(1), dropped(1), dropped(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    # What is drawn again in the backward is what was drawn in the forward.
    assert all(torch.equal(a, b) for a, b in zip(first, dropped(1, "save"), strict=True))
    # So little dropout that nothing is dropped is none; nearly all leaves the norm of h.
    for kept, plain in zip(dropped(1, dropout=1e-12), step(mixer, inputs, flat), strict=True):
        torch.testing.assert_close(kept, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", MIXERS)
def test_dropout_spares_the_residual(mixer):
    flat = leaves_for(mixer, 12, 16)
    inputs = states(3, 12, 16)
    x, y, z = inputs
    got_y, got_z = step(
        mixer, inputs, flat, H_cycles=1, L_cycles=1, dropout=1 - 1e-12, policy="save"
    )[:2]

    def normed(h):
        for _ in range(2):
            h = rms_norm(rms_norm(h, 1 if mixer == "mlp_t" else -1), -1)
        return h

    want_z = normed(z + (y + x))
    torch.testing.assert_close(got_z, want_z)
    torch.testing.assert_close(got_y, normed(y + want_z))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("H_cycles", [1, 2])
@pytest.mark.parametrize("mixer", MIXERS)
def test_no_gradient_to_the_states(mixer, H_cycles, policy):
    flat = leaves_for(mixer, 6, 8)
    x, y, z = (t.requires_grad_() for t in states(2, 6, 8))
    tables = rotary(6, 8 // HEADS) if mixer == "attention" else None
    settings = Recursion(H_cycles, 2, HEADS, EPS, policy)
    new_y, new_z = deep_recursion(OPS, x, y, z, blocks_of(mixer, flat), tables, settings)
    assert new_y.requires_grad
    assert not new_z.requires_grad
    new_y.sum().backward()
    assert y.grad is None
    assert z.grad is None
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("mixer", MIXERS)
def test_values_without_gradient_are_the_same(mixer):
    flat = leaves_for(mixer, 12, 16)
    inputs = states(3, 12, 16)
    want_y, want_z = step(mixer, inputs, flat)[:2]
    tables = rotary(12, 16 // HEADS) if mixer == "attention" else None
    settings = Recursion(2, 2, HEADS, EPS, "recompute")
    with torch.no_grad():
        y, z = deep_recursion(OPS, *inputs, blocks_of(mixer, flat), tables, settings)
    assert torch.equal(y, want_y)
    assert torch.equal(z, want_z)
    assert not y.requires_grad


@pytest.mark.parametrize("mixer", MIXERS)
def test_positions_count_only_for_attention_with_tables(mixer):
    flat = leaves_for(mixer, 12, 16)
    inputs = states(3, 12, 16)
    with_tables, without = (step(mixer, inputs, flat, rope=rope)[0] for rope in (True, False))
    assert torch.equal(with_tables, without) == (mixer == "mlp_t")


@pytest.mark.parametrize("mixer", MIXERS)
def test_inputs_are_unchanged_and_either_layout_serves(mixer):
    flat = leaves_for(mixer, 12, 16)
    inputs = states(3, 12, 16)
    before = [t.detach().clone() for t in (*inputs, *flat)]
    plain = step(mixer, inputs, flat)
    other = step(mixer, [token_major(t) for t in inputs], flat)
    assert all(torch.equal(a, b) for a, b in zip(before, (*inputs, *flat), strict=True))
    for a, b in zip(plain, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_token_mixing_stays_token_major():
    """Three copies of the states on the way in; none if they lie token-major already."""
    flat = leaves_for("mlp_t", 12, 16)
    settings = Recursion(2, 2, HEADS, EPS)
    for layout, copies in ((torch.Tensor.detach, 3), (token_major, 0)):
        inputs = [layout(t) for t in states(3, 12, 16)]
        with torch.no_grad(), counted_ops() as names:
            y, z = deep_recursion(OPS, *inputs, blocks_of("mlp_t", flat), None, settings)
        assert names.count("clone") == copies
        assert y.transpose(0, 1).is_contiguous()
        assert z.transpose(0, 1).is_contiguous()


@pytest.mark.parametrize("name", ["inject", "swiglu_rmsnorm", "token_mix", "rope_attention"])
def test_runs_on_the_ops_that_it_is_given(name):
    calls = []

    def counting(*args):
        calls.append(name)
        return getattr(reference, name)(*args)

    ops = Ops(**{**vars(OPS), name: counting})
    mixer = "mlp_t" if name == "token_mix" else "attention"
    settings = Recursion(H_cycles=3, L_cycles=4, heads=HEADS, eps=EPS)
    flat = leaves_for(mixer, 6, 8)
    deep_recursion(ops, *states(2, 6, 8), blocks_of(mixer, flat), None, settings)
    passes = 3 * 4 if name == "inject" else 3 * 5 * 2  # the network has two blocks
    assert len(calls) == passes


@pytest.mark.parametrize("mixer", MIXERS)
def test_each_policy_keeps_less(mixer):
    batch, tokens, width = 8, 32, 32
    flat = leaves_for(mixer, tokens, width)
    tables = rotary(tokens, width // HEADS) if mixer == "attention" else None
    held = {}
    for policy in POLICIES:
        inputs = states(batch, tokens, width)
        settings = Recursion(2, 2, HEADS, EPS, policy)
        with HeldStorages([*inputs, *flat]) as storages:
            out = deep_recursion(OPS, *inputs, blocks_of(mixer, flat), tables, settings)
        held[policy] = storages.held_bytes(but=out)
    assert held["save"] > 1.5 * held["light"] > 1.5 * 1.5 * held["recompute"]
    assert held["recompute"] == 3 * 4 * batch * tokens * width  # the inputs of three passes
