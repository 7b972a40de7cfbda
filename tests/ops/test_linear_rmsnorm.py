"""linear_rmsnorm(a, w, h, eps) = rms_norm(h + a w^T): a projection with its residual and norm."""

import pytest
import torch
from op_checks import EPS, cases, check_op, rms_norm, token_major
from parity import make_inputs

from trm_fast.reference import linear_rmsnorm

# E is the width of a: as wide as D (attention's projection), wider (SwiGLU's), odd.
SHAPES = [(4, 64, 32, 32), (2, 97, 256, 512), (1, 97, 64, 33), (0, 97, 64, 128)]


def inputs(shape, dtype=torch.float32, **options):
    batch, tokens, width, inner = shape
    sizes = (batch, tokens, inner), (width, inner), (batch, tokens, width)
    return make_inputs(*sizes, dtype=dtype, scale=(1.0, inner**-0.5, 1.0), **options)


@pytest.mark.parametrize("shape, dtype", cases("B S D E", SHAPES))
def test_value_and_gradients(shape, dtype):
    check_op(
        lambda a, w, h: linear_rmsnorm(a, w, h, EPS),
        lambda a, w, h: rms_norm(h + torch.einsum("bse,de->bsd", a, w), -1),
        inputs(shape, dtype),
        dtype,
    )


def test_gradient_is_the_derivative():
    a, w, h = inputs((2, 3, 4, 5), torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: linear_rmsnorm(*t, 0.1), (a, w, h))


def test_either_memory_layout():
    a, w, h = inputs((3, 5, 8, 16))
    out = linear_rmsnorm(a, w, h, EPS)
    torch.testing.assert_close(linear_rmsnorm(token_major(a), w, token_major(h), EPS), out)
    torch.testing.assert_close(linear_rmsnorm(token_major(a), w, h, EPS), out)
