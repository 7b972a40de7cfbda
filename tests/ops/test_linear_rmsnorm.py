"""linear_rmsnorm(a, w, h, eps) = rms_norm(h + a w^T): a projection with its residual and norm."""

import pytest
import torch
from extension_checks import check_extension_refusals, check_same_bits, extension_cases
from kernel_checks import (
    DEVICE,
    check_fullgraph,
    check_refusals,
    check_registered,
)
from op_checks import EPS, cases, check_op, rms_norm, token_major
from parity import assert_parity, make_inputs

from trm_fast.extension import linear_rmsnorm as compiled
from trm_fast.kernels import linear_rmsnorm as kernel
from trm_fast.kernels.residual_rmsnorm import finish_norm, norm_bwd
from trm_fast.reference import linear_rmsnorm

# E is the width of a: as wide as D (attention's projection), wider (SwiGLU's), odd.
SHAPES = [(4, 64, 32, 32), (2, 97, 256, 512), (1, 97, 64, 33), (0, 97, 64, 128)]

# For the kernel: more rows than a tile, features that are no power of two, E no multiple of 16.
KERNEL_SHAPES = [(2, 97, 48, 33), (1, 5, 16, 96), (0, 97, 64, 64)]

# For the extension: a width that no vector divides evenly, fewer rows than a block, inner tails.
# The third is more rows than a weight's gradient takes at a time.
EXTENSION_SHAPES = [(2, 97, 48, 96), (1, 3, 16, 16), (12, 97, 16, 32), (2, 64, 272, 80)]
EXTENSION_SHAPES += [(0, 97, 64, 64)]


def formula(a, w, h):
    return rms_norm(h + torch.einsum("bse,de->bsd", a, w), -1)


def inputs(shape, dtype=torch.float32, **options):
    batch, tokens, width, inner = shape
    sizes = (batch, tokens, inner), (width, inner), (batch, tokens, width)
    return make_inputs(*sizes, dtype=dtype, scale=(1.0, inner**-0.5, 1.0), **options)


@pytest.mark.parametrize("shape, dtype", cases("B S D E", SHAPES))
def test_value_and_gradients(shape, dtype):
    check_op(
        lambda a, w, h: linear_rmsnorm(a, w, h, EPS),
        formula,
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


@pytest.mark.parametrize("shape, dtype", cases("B S D E", KERNEL_SHAPES))
def test_kernel(shape, dtype, architecture):
    given = inputs(shape, dtype)
    check_op(lambda *t: kernel.linear_rmsnorm(*t, EPS), formula, given, dtype, DEVICE)


def product(dtype, *, w_is_kn=False):
    """a [70,48], w [80,48] or its transpose, h [70,80]."""
    a, w, h = make_inputs((70, 48), (80, 48), (70, 80), dtype=dtype, scale=(1, 48**-0.5, 1))
    return a.to(DEVICE), (w.t().contiguous() if w_is_kn else w).to(DEVICE), h.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("w_is_kn", [False, True], ids=["nk", "kn"])
def test_linear_with_residual_and_sums_of_squares(dtype, w_is_kn, architecture):
    a, w, h = product(dtype, w_is_kn=w_is_kn)
    w64 = w.double() if w_is_kn else w.double().t()
    exact = a.double() @ w64 + h.double()
    out, ssq = kernel.linear(a, w, h, w_is_kn=w_is_kn, squares=True)
    assert_parity(out, exact, dtype=dtype)
    assert_parity(ssq.sum(0), exact.square().sum(1), dtype=dtype)
    alone, none = kernel.linear(a, w, w_is_kn=w_is_kn)
    assert none is None
    assert_parity(alone, a.double() @ w64, dtype=dtype)
    given = kernel.new_squares(a, 70, 80)
    into, taken = kernel.linear(a, w, h.clone(), w_is_kn=w_is_kn, squares=given, out=h)
    assert into is h and taken is given
    assert torch.equal(h, out) and torch.equal(given, ssq)


def test_linear_takes_a_residual_whose_norm_is_deferred(architecture):
    a, w, h = product(torch.float32)
    parts = torch.stack([h[:, :50].square().sum(1), h[:, 50:].square().sum(1)])
    out, _ = kernel.linear(a, w, h, h_ssq=parts, eps=EPS)
    assert_parity(out, a.double() @ w.double().t() + rms_norm(h.double(), -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_deferred_norm_and_its_backward(dtype):
    total, add, grad = (
        t.to(DEVICE) for t in make_inputs((21, 48), (21, 48), (21, 48), dtype=dtype, scale=2.0)
    )
    wide = total.double().requires_grad_()
    exact = rms_norm(wide, -1)
    (exact_grad,) = torch.autograd.grad(exact, wide, grad.double())
    ssq = torch.stack([total.float()[:, :7].square().sum(1), total.float()[:, 7:].square().sum(1)])
    assert_parity(finish_norm(total, ssq, EPS), exact, dtype=dtype)
    assert_parity(finish_norm(total, ssq, EPS, add), exact + add.double(), dtype=dtype)
    assert_parity(norm_bwd(grad, total, ssq, EPS), exact_grad, dtype=dtype)
    normed = total.clone()
    d = norm_bwd(grad, normed, ssq, EPS, out=grad, normed=normed)  # both over their inputs
    assert d is grad
    assert_parity(d, exact_grad, dtype=dtype)
    assert_parity(normed, exact, dtype=dtype)


def test_kernel_is_registered():
    a, w, h = inputs((1, 6, 32, 48), requires_grad=True)
    rows = [a.flatten(0, 1), w, h.flatten(0, 1), EPS]
    check_registered(kernel._fwd, rows)
    _, total, ssq = (t.detach() for t in kernel._fwd(*rows))
    check_registered(kernel._bwd, [total, rows[0].detach(), w.detach(), total, ssq, EPS])
    check_fullgraph(lambda *t: kernel.linear_rmsnorm(*t, EPS), inputs((1, 6, 32, 48)), "inductor")


def test_kernel_refuses():
    check_refusals(lambda *t: kernel.linear_rmsnorm(*t, EPS), inputs((1, 2, 32, 16)))
    with pytest.raises(ValueError, match="linear_rmsnorm of the triton backend .* not 40"):
        kernel.linear_rmsnorm(*inputs((1, 2, 40, 16)), EPS)
    a, w, h = inputs((1, 2, 32, 16))
    for given, text in (
        ((a, w[:, :8], h), r"needs w of \[32, 16\] float32, not \[32, 8\]"),
        ((a[:, :1], w, h), "needs a of"),
        ((a.half(), w, h), "not .* float16"),
    ):
        with pytest.raises(ValueError, match=text):
            kernel.linear_rmsnorm(*given, EPS)


@pytest.mark.parametrize("shape, dtype", extension_cases("B S D E", EXTENSION_SHAPES))
def test_extension(shape, dtype, extension):
    given = inputs(shape, dtype)
    check_op(lambda *t: compiled.linear_rmsnorm(*t, EPS), formula, given, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_extension_gives_the_same_bits_on_any_threads(dtype, extension):
    def step():
        given = inputs((3, 97, 80, 96), dtype, requires_grad=True)
        out = compiled.linear_rmsnorm(*given, EPS)
        return [out, *torch.autograd.grad(out.square().sum(), given)]

    check_same_bits(step)


def test_extension_is_registered(extension):
    a, w, h = inputs((1, 6, 32, 48), requires_grad=True)
    rows = [a.flatten(0, 1), w, h.flatten(0, 1), EPS]
    check_registered(compiled._fwd, rows)
    out, rstd = (t.detach() for t in compiled._fwd(*rows))
    check_registered(compiled._bwd, [out, rows[0].detach(), w.detach(), out, rstd])
    check_fullgraph(lambda *t: compiled.linear_rmsnorm(*t, EPS), inputs((1, 6, 32, 48)), "inductor")


def test_extension_refuses(extension):
    check_extension_refusals(lambda *t: compiled.linear_rmsnorm(*t, EPS), inputs((1, 2, 32, 16)))
    with pytest.raises(ValueError, match="linear_rmsnorm of the compiled extension .* not 40"):
        compiled.linear_rmsnorm(*inputs((1, 2, 40, 16)), EPS)
    a, w, h = (t.flatten(0, -2) for t in inputs((1, 2, 32, 16)))
    for given, text in (
        ((a[:1], w, h), r"linear_rmsnorm: a is \[1, 16\], expected \[2, 16\]"),
        ((a, w.t(), h), r"w is \[16, 32\], expected \[32, 16\]"),
        ((a, w.bfloat16(), h), "w has dtype"),
        ((a.repeat(1, 2)[:, ::2], w, h), "a is not contiguous"),
        ((a[0], w, h), r"a and h are \[N, E\]"),
    ):
        with pytest.raises(RuntimeError, match=text):
            compiled._fwd(*given, EPS)
