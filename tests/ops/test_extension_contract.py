"""What every operation of the compiled extension holds to, whatever it computes."""

import math

import pytest
import torch
from extension_checks import check_same_bits
from parity import make_inputs
from recursion_cases import blocks_of, leaves_for, rotary

from trm_fast import backends, reference
from trm_fast.ops import Recursion

EPS = 1e-5
B, S, D, F, V = 2, 7, 32, 48, 11


def recursion(ops, x, y, z, *flat, mixer):
    tables = rotary(S, D // 2) if mixer == "attention" else None
    settings = Recursion(H_cycles=2, L_cycles=2, heads=2, eps=EPS, policy="save", dropout=0.0)
    return ops.deep_recursion(ops, x, y, z, blocks_of(mixer, flat), tables, settings)[0]


def embed(ops, embedding, y, z, y_init, z_init):
    tokens = (torch.arange(B * S) % V).view(B, S).int()
    halted = torch.tensor([True, False])
    return ops.embed_reset(tokens, None, embedding, None, halted, y, z, y_init, z_init, 2.0)[0]


# name -> shapes of the tensors, (table of operations, *tensors) -> one result
CALLS = {
    "embed_reset": ([(V, D), (B, S, D), (B, S, D), (D,), (D,)], embed),
    "inject": ([(B, S, D)] * 3, lambda o, *t: o.inject(*t)),
    "residual_rmsnorm": ([(B, S, D)] * 2, lambda o, h, u: o.residual_rmsnorm(h, u, -1, EPS)),
    "swiglu": ([(B, S, 2 * F)], lambda o, t: o.swiglu(t)),
    "linear_rmsnorm": (
        [(B, S, F), (D, F), (B, S, D)],
        lambda o, a, w, h: o.linear_rmsnorm(a, w, h, EPS),
    ),
    "swiglu_rmsnorm": (
        [(B, S, D), (2 * F, D), (D, F)],
        lambda o, h, g, d: o.swiglu_rmsnorm(h, g, d, EPS),
    ),
    "token_mix": (
        [(B, S, D), (2 * F, S), (S, F)],
        lambda o, h, g, d: o.token_mix(h, g, d, EPS),
    ),
    "rope_attention": (
        [(B, S, 3 * D)],
        lambda o, qkv: o.rope_attention(qkv, rotary(S, D // 2), 2),
    ),
    "stablemax_loss": (
        [(B, S, V)],
        lambda o, t: o.stablemax_loss(t, (torch.arange(B * S) % V).view(B, S))[0],
    ),
}
for mixer in ("mlp_t", "attention"):
    shapes = [(B, S, D)] * 3 + [tuple(t.shape) for t in leaves_for(mixer, S, D)]
    CALLS[f"deep_recursion-{mixer}"] = (
        shapes,
        lambda o, *t, mixer=mixer: recursion(o, *t, mixer=mixer),
    )
# Whose weights are float32 whatever the states are.
MASTERS = {"deep_recursion-mlp_t": 3, "deep_recursion-attention": 3}


@pytest.fixture
def ops(extension):
    return backends.table("cpp")


def given(name, dtype=torch.float32):
    shapes, _ = CALLS[name]
    tensors = make_inputs(*shapes)
    low = MASTERS.get(name, len(shapes))
    return [t.to(dtype) if i < low else 0.2 * t for i, t in enumerate(tensors)]


@pytest.mark.parametrize("name", CALLS)
def test_tensors_on_several_devices_are_refused(name, ops):
    """A meta tensor among real ones would be answered with memory that nobody has written."""
    tensors = given(name)
    for i in range(len(tensors)):
        if name == "stablemax_loss" or name == "embed_reset" and i == 0:
            continue
        mixed = [t.to("meta") if i == j else t for j, t in enumerate(tensors)]
        if len({t.device for t in mixed}) > 1:
            with pytest.raises((RuntimeError, ValueError), match=r"on cpu|on meta"):
                CALLS[name][1](ops, *mixed)


@pytest.mark.parametrize("name", CALLS)
def test_without_a_gradient_from_downstream(name, ops):
    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    tensors = [t.requires_grad_() for t in given(name)]
    out = CALLS[name][1](ops, *tensors)
    grads = torch.autograd.grad(Nothing.apply(out).sum(), tensors, allow_unused=True)
    assert all(g is None or not g.any() for g in grads)


@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_is_refused(name, ops):
    """Its tangents would be dropped without a word."""
    tensors = given(name)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors[0], torch.ones_like(tensors[0]))
        with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
            CALLS[name][1](ops, dual, *tensors[1:])
    with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
        torch.func.jvp(lambda t: CALLS[name][1](ops, t, *tensors[1:]), (tensors[0],), (tensors[0],))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CALLS)
def test_tensors_may_begin_at_any_element(name, dtype, ops):
    """Two bytes off, words of bfloat16 lie across the alignment of a float."""

    def outcome(tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = CALLS[name][1](ops, *leaves)
        upstream = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream, allow_unused=True)]

    def moved(t):
        return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)

    tensors = given(name, dtype)
    for a, b in zip(outcome(tensors), outcome([moved(t) for t in tensors]), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("name", CALLS)
def test_every_number_of_threads_gives_the_same_bits(name, ops):
    tensors = given(name)
    check_same_bits(lambda: [CALLS[name][1](ops, *tensors)])


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7FC000FF, 0xFFC00003 - 2**32])
def test_every_nan_stays_one_in_attention(bits, ops):
    (qkv,) = given("rope_attention")
    qkv[0, 3, D + 1] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)  # of a key
    want = reference.rope_attention(qkv, None, 2)
    got = ops.rope_attention(qkv, None, 2)
    assert torch.equal(torch.isnan(got), torch.isnan(want)) and torch.isnan(got).any()


@pytest.mark.parametrize("value", [-89.0, -1e3, -1e38, -math.inf, math.inf, 1e30, math.nan])
def test_silu_of_numbers_of_any_size(value, ops):
    gate_up = torch.ones(2, 40)
    gate_up[:, [0, 7, 17]] = value
    want, got = reference.swiglu(gate_up), ops.swiglu(gate_up)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-36, equal_nan=True)


def test_norms_over_no_tokens_leave_nothing_unwritten(ops):
    from trm_fast.extension import residual_rmsnorm

    empty = torch.empty(2, 0, 16)
    _, rstd = residual_rmsnorm._fwd(empty, empty, 1, EPS)
    assert torch.equal(rstd, torch.zeros_like(rstd))
