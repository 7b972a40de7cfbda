"""residual_rmsnorm(h, u, axis, eps) = rms_norm(h + u) along features or tokens."""

import pytest
import torch
from op_checks import BSD, EPS, cases, check_op, rms_norm, token_major
from parity import make_inputs

from trm_fast.reference import FEATURES, TOKENS, residual_rmsnorm

AXES = pytest.mark.parametrize("axis", [FEATURES, TOKENS], ids=["features", "tokens"])


@AXES
@pytest.mark.parametrize("shape, dtype", cases("B S D", BSD))
def test_value_and_gradients(shape, dtype, axis):
    check_op(
        lambda h, u: residual_rmsnorm(h, u, axis, EPS),
        lambda h, u: rms_norm(h + u, axis),
        make_inputs(shape, shape, dtype=dtype),
        dtype,
    )


@AXES
@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_gradient_is_the_derivative(axis, eps):
    h, u = make_inputs((2, 3, 4), (2, 3, 4), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h, u: residual_rmsnorm(h, u, axis, eps), (h, u))


def test_by_hand():
    h = torch.tensor([[[1.0, 2.0], [5.0, 3.0]]])
    u = torch.tensor([[[2.0, 2.0], [1.0, 5.0]]])
    # sums (3, 4) and (6, 8): squares 9, 16 and 36, 64
    features = torch.tensor([[[3 / 12.5**0.5, 4 / 12.5**0.5], [6 / 50**0.5, 8 / 50**0.5]]])
    tokens = torch.tensor([[[3 / 22.5**0.5, 4 / 40**0.5], [6 / 22.5**0.5, 8 / 40**0.5]]])
    torch.testing.assert_close(residual_rmsnorm(h, u, FEATURES, 0.0), features)
    torch.testing.assert_close(residual_rmsnorm(h, u, TOKENS, 0.0), tokens)
    torch.testing.assert_close(residual_rmsnorm(h, u, FEATURES, 37.5)[0, 0, 0].item(), 3 / 50**0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_sum_is_rounded_before_the_norm_and_the_norm_only_at_the_end(dtype):
    h, u = make_inputs((2, 97, 64), (2, 97, 64), dtype=dtype)
    total = (h.double() + u.double()).to(dtype)
    assert torch.equal(residual_rmsnorm(h, u, FEATURES, EPS), rms_norm(total.float(), -1).to(dtype))


def test_fp16_values_whose_squares_overflow():
    h, u = make_inputs((2, 4, 8), (2, 4, 8), dtype=torch.float16, scale=1000.0)
    check_op(
        lambda h, u: residual_rmsnorm(h, u, FEATURES, EPS),
        lambda h, u: rms_norm(h + u, -1),
        [h, u],
        torch.float16,
    )


@AXES
def test_zeros_stay_zero_with_a_finite_gradient(axis):
    h = torch.zeros(1, 3, 4, requires_grad=True)
    out = residual_rmsnorm(h, torch.zeros(1, 3, 4), axis, EPS)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(1, 3, 4))
    torch.testing.assert_close(h.grad, torch.full((1, 3, 4), EPS**-0.5))


@AXES
def test_either_memory_layout(axis):
    h, u = make_inputs((3, 5, 8), (3, 5, 8), requires_grad=True)
    other_h, other_u = token_major(h), token_major(u)
    out, other = residual_rmsnorm(h, u, axis, EPS), residual_rmsnorm(other_h, other_u, axis, EPS)
    out.pow(3).sum().backward()
    other.pow(3).sum().backward()
    torch.testing.assert_close(other, out)
    assert other.stride() == other_h.stride()  # no hidden change of layout
    torch.testing.assert_close(other_h.grad, h.grad)
    torch.testing.assert_close(other_u.grad, u.grad)


def test_keeps_the_sum_and_one_scale_per_row():
    h, u = make_inputs((2, 5, 8), (2, 5, 8), requires_grad=True)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda t: t):
        residual_rmsnorm(h, u, FEATURES, EPS)
    assert kept == [(2, 5, 8), (2, 5, 1)]


def test_second_derivatives_are_refused():
    h, u = make_inputs((1, 2, 4), (1, 2, 4), requires_grad=True)
    out = residual_rmsnorm(h, u, FEATURES, EPS).pow(3).sum()
    (grad,) = torch.autograd.grad(out, h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
