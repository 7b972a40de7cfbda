"""rope_attention(qkv, rotary, heads): rotate queries and keys, then plain softmax attention."""

import pytest
import torch
from op_checks import cases, check_op, token_major
from parity import make_inputs

from trm_fast.reference import _rotate, rope_attention

SHAPES = [(4, 64, 2, 16), (2, 97, 8, 64), (1, 97, 3, 10), (0, 97, 2, 8)]


def angles(tokens, head_dim, base=10000.0):
    """Position times frequency, [S, K/2] float64."""
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return torch.arange(tokens, dtype=torch.float64).unsqueeze(1) * frequency


def tables(tokens, head_dim):
    twice = angles(tokens, head_dim).repeat(1, 2)
    return twice.cos().float(), twice.sin().float()


def rotate(t, by):
    """Element i of the first half and i of the second are the parts of one complex number."""
    wide = t.to(torch.promote_types(t.dtype, torch.float32))
    half = wide.shape[-1] // 2
    turned = torch.complex(wide[..., :half], wide[..., half:]) * torch.polar(
        torch.ones_like(by), by
    ).to(wide.dtype.to_complex())
    return torch.cat((turned.real, turned.imag), -1).to(t.dtype)


def formula(qkv, heads, rope):
    batch, tokens, width = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    if rope:
        q, k = (rotate(t, angles(tokens, t.shape[-1])) for t in (q, k))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    weights = scores.double().exp()
    weights = (weights / weights.sum(-1, keepdim=True)).to(v.dtype)
    return (weights @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("rope", [True, False], ids=["rope", "none"])
@pytest.mark.parametrize("shape, dtype", cases("B S H K", SHAPES))
def test_value_and_gradient(shape, dtype, rope):
    batch, tokens, heads, head_dim = shape
    (qkv,) = make_inputs((batch, tokens, 3 * heads * head_dim), dtype=dtype)
    rotary = tables(tokens, head_dim) if rope else None
    check_op(
        lambda t: rope_attention(t, rotary, heads),
        lambda t: formula(t, heads, rope),
        [qkv],
        dtype,
    )


def test_gradient_is_the_derivative():
    (qkv,) = make_inputs((2, 3, 24), dtype=torch.float64, requires_grad=True)
    rotary = tables(3, 4)
    assert torch.autograd.gradcheck(lambda t: rope_attention(t, rotary, 2), (qkv,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_rotation_rounds_once(dtype):
    (t,) = make_inputs((2, 97, 8), dtype=dtype)
    cos, sin = tables(97, 8)
    exact = rotate(t.double(), angles(97, 8))
    ulp = torch.finfo(dtype).eps
    # Half a unit in the last place: a rotation in the low precision is off by more.
    error = (_rotate(t, cos, sin).double() - exact).abs()
    assert (error <= 0.51 * ulp * exact.abs() + 1e-6).all()


def test_scores_depend_on_the_distance_only():
    (token,) = make_inputs((1, 1, 24))
    cos, sin = tables(8, 8)
    far = rope_attention(token.expand(1, 4, 24), (cos[4:], sin[4:]), 1)
    torch.testing.assert_close(rope_attention(token.expand(1, 4, 24), (cos[:4], sin[:4]), 1), far)


def test_either_memory_layout():
    (qkv,) = make_inputs((3, 5, 24))
    rotary = tables(5, 4)
    torch.testing.assert_close(
        rope_attention(token_major(qkv), rotary, 2), rope_attention(qkv, rotary, 2)
    )
