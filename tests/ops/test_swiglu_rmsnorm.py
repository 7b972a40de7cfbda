"""swiglu_rmsnorm(h, gate_up, down, eps) = rms_norm(h + down (silu(gate h) * up h))."""

import pytest
import torch
from op_checks import EPS, cases, check_op, counted_ops, rms_norm, silu, token_major
from parity import make_inputs

from trm_fast.reference import swiglu_rmsnorm

SHAPES = [(4, 64, 32, 64), (2, 97, 512, 1536), (1, 97, 64, 33), (0, 97, 64, 128)]


def inputs(shape, dtype=torch.float32, **options):
    batch, tokens, width, inner = shape
    sizes = (batch, tokens, width), (2 * inner, width), (width, inner)
    scale = (1.0, width**-0.5, inner**-0.5)
    return make_inputs(*sizes, dtype=dtype, scale=scale, **options)


def formula(h, gate_up, down):
    inner = down.shape[1]
    gate, up = h @ gate_up[:inner].T, h @ gate_up[inner:].T
    return rms_norm(h + (silu(gate) * up) @ down.T, -1)


@pytest.mark.parametrize("shape, dtype", cases("B S D F", SHAPES))
def test_value_and_gradients(shape, dtype):
    check_op(lambda *t: swiglu_rmsnorm(*t, EPS), formula, inputs(shape, dtype), dtype)


def test_gradient_is_the_derivative():
    given = inputs((2, 3, 4, 3), torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: swiglu_rmsnorm(*t, 0.1), given)


def test_either_memory_layout_without_a_copy():
    h, gate_up, down = inputs((3, 5, 8, 16))
    out = swiglu_rmsnorm(h, gate_up, down, EPS)
    for state in (h, token_major(h)):
        with counted_ops() as names:
            other = swiglu_rmsnorm(state, gate_up, down, EPS)
        torch.testing.assert_close(other, out)
        assert other.stride() == state.stride()
        assert not {"clone", "copy_", "_to_copy"} & set(names)
