"""residual_rmsnorm(h, u, axis, eps) = rms_norm(h + u) along features or tokens."""

import pytest
import torch
from extension_checks import check_extension_refusals, check_same_bits, extension_cases
from kernel_checks import DEVICE, check_fullgraph, check_refusals, check_registered
from op_checks import BSD, EPS, cases, check_op, rms_norm, token_major
from parity import assert_parity, make_inputs

from trm_fast.extension import residual_rmsnorm as compiled
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


# Columns in blocks of every size and a tail, less than a vector, one item, none.
EXTENSION_BSD = [(2, 97, 243), (3, 5, 48), (1, 150, 133), (1, 1, 3), (0, 97, 64)]


@AXES
@pytest.mark.parametrize("shape, dtype", extension_cases("B S D", EXTENSION_BSD))
def test_extension_value_and_gradients(shape, dtype, axis, extension):
    check_op(
        lambda h, u: compiled.residual_rmsnorm(h, u, axis, EPS),
        lambda h, u: rms_norm(h + u, axis),
        make_inputs(shape, shape, dtype=dtype),
        dtype,
    )


@AXES
def test_extension_rounds_the_sum_before_the_norm(axis, extension):
    h, u = make_inputs((2, 97, 51), (2, 97, 51), dtype=torch.bfloat16)
    want = rms_norm((h.double() + u.double()).bfloat16().float(), axis).bfloat16()
    assert (compiled.residual_rmsnorm(h, u, axis, EPS) != want).float().mean() < 0.01


@AXES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_extension_in_token_major_memory(axis, dtype, extension):
    h, u = make_inputs((3, 5, 43), (3, 5, 43), dtype=dtype, requires_grad=True)
    (grad,) = make_inputs((3, 5, 43), dtype=dtype, seed=1)
    out = compiled.residual_rmsnorm(h, u, axis, 0.5)
    wanted = torch.autograd.grad(out, (h, u), grad)
    other_h, other_u = token_major(h), token_major(u)
    other = compiled.residual_rmsnorm(other_h, other_u, axis, 0.5)
    assert other.stride() == other_h.stride()
    assert torch.equal(other, out)
    for got, want in zip(torch.autograd.grad(other, (other_h, other_u), grad), wanted, strict=True):
        assert torch.equal(got, want)
    assert torch.equal(compiled.residual_rmsnorm(h, other_u, axis, 0.5), out)
    other_end = axis - 3 if axis > 0 else axis + 3
    assert torch.equal(compiled.residual_rmsnorm(h, u, other_end, 0.5), out)


def test_extension_keeps_the_result_and_one_scale_per_row(extension):
    h, u = make_inputs((2, 5, 8), (2, 5, 8), requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = compiled.residual_rmsnorm(h, u, FEATURES, EPS)
    assert [t.shape for t in kept] == [(2, 5, 8), (2, 5)]
    assert kept[0].data_ptr() == out.data_ptr()


@AXES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_extension_gives_the_same_bits_on_any_threads(dtype, axis, extension):
    def step():
        h, u = make_inputs((5, 97, 301), (5, 97, 301), dtype=dtype, requires_grad=True)
        out = compiled.residual_rmsnorm(h, u, axis, EPS)
        return [out, *torch.autograd.grad(out.square().sum(), (h, u))]

    check_same_bits(step)


@pytest.mark.parametrize("axis", [compiled.FEATURES, compiled.TOKENS], ids=["features", "tokens"])
def test_extension_is_registered(axis, extension):
    h, u = make_inputs((2, 3, 5), (2, 3, 5), requires_grad=True)
    check_registered(compiled._fwd, (h, u, axis, EPS))
    out, rstd = compiled._fwd(h.detach(), u.detach(), axis, EPS)
    check_registered(compiled._bwd, (h.detach(), out, rstd, axis))


def test_extension_compiles_and_refuses(extension):
    inputs = make_inputs((2, 3, 6), (2, 3, 6))
    check_fullgraph(lambda h, u: compiled.residual_rmsnorm(h, u, TOKENS, EPS), inputs)
    check_extension_refusals(lambda h, u: compiled.residual_rmsnorm(h, u, FEATURES, EPS), inputs)
    h, u = inputs
    for given, text in (
        ((h, u[:1], FEATURES), r"needs u of \[2, 3, 6\] float32, not \[1, 3, 6\]"),
        ((h, u.bfloat16(), FEATURES), "needs u of .* not .* bfloat16"),
        ((h, u, 0), "axis 1 .tokens. or 2 .features., not 0"),
        ((h[0], u[0], 1), r"normalises \[B, S, D\]"),
    ):
        with pytest.raises(ValueError, match=text):
            compiled.residual_rmsnorm(*given, EPS)
    out, rstd = compiled._fwd(h, u, 2, EPS)
    for call, text in (
        (lambda: compiled._fwd(h, u[:1], 2, EPS), r"u is \[1, 3, 6\], expected \[2, 3, 6\]"),
        (lambda: compiled._fwd(h, u.bfloat16(), 2, EPS), "u has dtype"),
        (lambda: compiled._fwd(h, token_major(u), 2, EPS), "u is not contiguous"),
        (lambda: compiled._fwd(h, u, -1, EPS), "axis is -1, expected 1 or 2"),
        (lambda: compiled._fwd(h[0], u, 2, EPS), r"expected \[B, S, D\]"),
        (lambda: compiled._bwd(h, out, rstd, 1), r"rstd is \[2, 3\], expected \[2, 6\]"),
        (lambda: compiled._bwd(h, out[:1], rstd, 2), "out is"),
        (lambda: compiled._bwd(h, out, rstd.bfloat16(), 2), "rstd has dtype"),
        (lambda: compiled._bwd(h, out, rstd, 3), "axis is 3"),
    ):
        with pytest.raises(RuntimeError, match=text):
            call()
