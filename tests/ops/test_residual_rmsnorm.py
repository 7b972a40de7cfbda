"""residual_rmsnorm(h, u, axis, eps) = rms_norm(h + u) along features or tokens."""

import pytest
import torch
from kernel_checks import DEVICE, check_fullgraph, check_refusals, check_registered
from op_checks import BSD, EPS, cases, check_op, rms_norm, token_major
from parity import assert_parity, make_inputs

from trm_fast.kernels import residual_rmsnorm as kernel
from trm_fast.kernels.residual_rmsnorm import residual_rmsnorm as triton_residual_rmsnorm
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


# More tokens than a tile of the kernel holds, widths that are no powers of two, one item, none.
KERNEL_BSD = [(2, 97, 48), (1, 150, 80), (1, 1, 16), (0, 97, 64)]


@AXES
@pytest.mark.parametrize("shape, dtype", cases("B S D", KERNEL_BSD))
def test_kernel_value_and_gradients(shape, dtype, axis, architecture):
    check_op(
        lambda h, u: triton_residual_rmsnorm(h, u, axis, EPS),
        lambda h, u: rms_norm(h + u, axis),
        make_inputs(shape, shape, dtype=dtype),
        dtype,
        DEVICE,
    )


@AXES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_kernel_rounds_the_sum_before_the_norm(axis, dtype):
    h, u = make_inputs((2, 97, 48), (2, 97, 48), dtype=dtype, device=DEVICE)
    want = rms_norm((h.double() + u.double()).to(dtype).float(), axis).to(dtype)
    got = triton_residual_rmsnorm(h, u, axis, EPS)
    # The order of the sum over squares moves a few results to the next number.
    assert (got != want).float().mean() < 0.01
    assert (got.float() - want.float()).abs().max() < 0.03


@AXES
def test_kernel_values_whose_squares_overflow_in_fp16(axis):
    h, u = make_inputs((2, 4, 16), (2, 4, 16), dtype=torch.float16, scale=1000.0)
    check_op(
        lambda h, u: triton_residual_rmsnorm(h, u, axis, EPS),
        lambda h, u: rms_norm(h + u, axis),
        [h, u],
        torch.float16,
        DEVICE,
    )


@AXES
def test_kernel_counts_axes_from_either_end_and_takes_either_layout(axis):
    h, u = make_inputs((2, 5, 16), (2, 5, 16), device=DEVICE)
    out = triton_residual_rmsnorm(h, u, axis, 0.5)
    assert_parity(out, rms_norm((h + u).double(), axis, 0.5))
    other_end = axis - 3 if axis > 0 else axis + 3
    assert torch.equal(triton_residual_rmsnorm(h, u, other_end, 0.5), out)
    assert torch.equal(triton_residual_rmsnorm(token_major(h), token_major(u), axis, 0.5), out)


@pytest.mark.parametrize("axis", [kernel.FEATURES, kernel.TOKENS], ids=["features", "tokens"])
def test_kernel_is_registered(axis):
    h, u = make_inputs((2, 3, 16), (2, 3, 16), requires_grad=True, device=DEVICE)
    check_registered(kernel._fwd, (h, u, axis, EPS))
    _, total, ssq = kernel._fwd(h.detach(), u.detach(), axis, EPS)
    check_registered(kernel._bwd, (h.detach(), total, ssq, axis, EPS))


def test_kernel_compiles_and_refuses():
    inputs = make_inputs((2, 3, 16), (2, 3, 16))
    check_fullgraph(lambda h, u: triton_residual_rmsnorm(h, u, TOKENS, EPS), inputs)
    check_refusals(lambda h, u: triton_residual_rmsnorm(h, u, FEATURES, EPS), inputs)
    h = torch.zeros(1, 2, 24, device=DEVICE)
    with pytest.raises(ValueError, match="residual_rmsnorm .* multiple of 16 up to 1024, not 24"):
        triton_residual_rmsnorm(h, h, FEATURES, EPS)
    h = torch.zeros(1, 2, 16, device=DEVICE)
    with pytest.raises(ValueError, match="axis 1 .tokens. or 2 .features., not 0"):
        triton_residual_rmsnorm(h, h, 0, EPS)


@pytest.mark.parametrize("shape, dtype", cases("B S D", [(1, 33, 48), (0, 97, 64)]))
def test_deferred_norm(shape, dtype, architecture):
    count, width = shape[0] * shape[1], shape[2]
    total, add, grad = make_inputs(*[(count, width)] * 3, dtype=dtype, device=DEVICE)
    parts = total.float().square().view(count, 2, width // 2).sum(-1).t().contiguous()
    exact = total.double().requires_grad_()
    want = rms_norm(exact, -1)

    got = kernel.finish_norm(total, parts, EPS)
    assert_parity(got, want, rms_norm(total, -1))
    added = kernel.finish_norm(total, parts, EPS, add)
    assert torch.equal(added, (got.double() + add.double()).to(dtype))  # rounded before the sum

    normed = torch.full_like(total, 7.0)
    d = kernel.norm_bwd(grad, total, parts, EPS, normed=normed)
    assert_parity(d, *torch.autograd.grad(want, exact, grad.double()))
    assert torch.equal(normed, got)
    assert kernel.norm_bwd(grad, total, parts, EPS, out=grad) is grad
    assert torch.equal(grad, d)
