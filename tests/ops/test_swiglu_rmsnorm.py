"""swiglu_rmsnorm(h, gate_up, down, eps) = rms_norm(h + down (silu(gate h) * up h))."""

import pytest
import torch
from extension_checks import check_extension_refusals, check_same_bits, extension_cases
from kernel_checks import (
    DEVICE,
    check_fullgraph,
    check_refusals,
    check_registered,
)
from op_checks import EPS, cases, check_op, counted_ops, rms_norm, silu, token_major
from parity import assert_parity, make_inputs

from trm_fast.extension import swiglu_rmsnorm as compiled
from trm_fast.kernels import swiglu_rmsnorm as kernel
from trm_fast.reference import swiglu_rmsnorm

SHAPES = [(4, 64, 32, 64), (2, 97, 512, 1536), (1, 97, 64, 33), (0, 97, 64, 128)]

# For the kernel: more rows than a tile, widths that are no powers of two, F no multiple of 16.
KERNEL_SHAPES = [(2, 97, 48, 100), (1, 5, 16, 16), (0, 97, 64, 64)]

# For the extension: widths of one panel and a half, inner widths that need padding, few rows.
EXTENSION_SHAPES = [(2, 97, 48, 100), (1, 3, 16, 7), (2, 64, 80, 144), (0, 97, 64, 64)]


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


@pytest.mark.parametrize("shape, dtype", cases("B S D F", KERNEL_SHAPES))
def test_kernel(shape, dtype, architecture):
    given = inputs(shape, dtype)
    check_op(lambda *t: kernel.swiglu_rmsnorm(*t, EPS), formula, given, dtype, DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_halves_with_a_deferred_norm_and_in_place(dtype, architecture):
    """What the recursion does: h not normed yet, gate and up alone, gradients over them."""
    h, w_gate_up, w_down = (t.flatten(0, -2).to(DEVICE) for t in inputs((1, 70, 48, 40), dtype))
    gate_up, down = kernel.pack(w_gate_up, w_down, dtype)
    assert gate_up.shape == (2, 48, 48) and down.shape == (48, 48)
    assert not gate_up[:, 40:].any() and not down[:, 40:].any()
    ssq = h.float().square().sum(1)[None]
    normed = rms_norm(h.double(), -1)
    g, u = (normed @ w.double().t() for w in w_gate_up.chunk(2))
    a, gu = h.new_empty(70, 48), h.new_empty(70, 2, 48)
    kernel.gate_up(h, gate_up, a=a, ssq=ssq, eps=EPS)
    assert_parity(a[:, :40], silu(g) * u, dtype=dtype)
    kernel.gate_up(h, gate_up, gu=gu, ssq=ssq, eps=EPS)
    assert_parity(gu[:, 0, :40], g, dtype=dtype)
    assert_parity(gu[:, 1, :40], u, dtype=dtype)
    leaf = gu[:, :, :40].double().requires_grad_()
    out = silu(leaf[:, 0]) * leaf[:, 1] @ w_down.double().t()
    (exact,) = torch.autograd.grad(out, leaf, h.double())
    again = torch.empty_like(a)
    kernel.swiglu_bwd(h, down, gu, d_gu=gu, a=again)
    assert_parity(gu[:, :, :40], exact, dtype=dtype)
    assert_parity(again, a, dtype=dtype)
    assert not gu[:, :, 40:].any()


def test_kernel_is_registered():
    h, w_gate_up, w_down = inputs((1, 6, 32, 24), requires_grad=True)
    rows = [h.flatten(0, 1), w_gate_up, w_down, EPS]
    check_registered(kernel._fwd, rows)
    _, total, ssq, gu = (t.detach() for t in kernel._fwd(*rows))
    plain = [t.detach() for t in rows[:3]]
    check_registered(kernel._bwd, [total, *plain, total, ssq, gu, EPS])
    check_fullgraph(lambda *t: kernel.swiglu_rmsnorm(*t, EPS), inputs((1, 6, 32, 24)))


def test_kernel_refuses():
    check_refusals(lambda *t: kernel.swiglu_rmsnorm(*t, EPS), inputs((1, 2, 32, 16)))
    with pytest.raises(ValueError, match="swiglu_rmsnorm of the triton backend .* not 40"):
        kernel.swiglu_rmsnorm(*inputs((1, 2, 40, 16)), EPS)
    h, w_gate_up, w_down = inputs((1, 2, 32, 16))
    for given in (
        (h, w_gate_up[:, :16], w_down),
        (h, w_gate_up, w_down[:16]),
        (h.half(), w_gate_up, w_down),
    ):
        with pytest.raises(ValueError, match="needs w_"):
            kernel.swiglu_rmsnorm(*given, EPS)


@pytest.mark.parametrize("shape, dtype", extension_cases("B S D F", EXTENSION_SHAPES))
def test_extension(shape, dtype, extension):
    given = inputs(shape, dtype)
    check_op(lambda *t: compiled.swiglu_rmsnorm(*t, EPS), formula, given, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_extension_gives_the_same_bits_on_any_threads(dtype, extension):
    def step():
        given = inputs((3, 97, 80, 100), dtype, requires_grad=True)
        out = compiled.swiglu_rmsnorm(*given, EPS)
        return [out, *torch.autograd.grad(out.square().sum(), given)]

    check_same_bits(step)


def test_extension_keeps_nothing_without_gradient(extension):
    given = [t.flatten(0, -2) for t in inputs((1, 6, 32, 24))]
    out, _, gu = compiled._fwd(*given, EPS, False)
    kept_out, _, kept = compiled._fwd(*given, EPS, True)
    assert gu.shape == (0, 64) and kept.shape == (6, 64)
    assert torch.equal(out, kept_out)


def test_extension_is_registered(extension):
    h, w_gate_up, w_down = inputs((1, 6, 32, 24), requires_grad=True)
    rows = [h.flatten(0, 1), w_gate_up, w_down, EPS, True]
    check_registered(compiled._fwd, rows)
    out, rstd, gu = (t.detach() for t in compiled._fwd(*rows))
    plain = [t.detach() for t in rows[:3]]
    check_registered(compiled._bwd, [out, *plain, out, rstd, gu])
    check_fullgraph(lambda *t: compiled.swiglu_rmsnorm(*t, EPS), inputs((1, 6, 32, 24)))


def test_extension_refuses(extension):
    check_extension_refusals(lambda *t: compiled.swiglu_rmsnorm(*t, EPS), inputs((1, 2, 32, 16)))
    with pytest.raises(ValueError, match="swiglu_rmsnorm of the compiled extension .* not 40"):
        compiled.swiglu_rmsnorm(*inputs((1, 2, 40, 16)), EPS)
    h, w_gate_up, w_down = inputs((1, 2, 32, 16))
    with pytest.raises(ValueError, match="needs w_gate_up of"):
        compiled.swiglu_rmsnorm(h, w_gate_up[:, :16], w_down, EPS)
    x = h[0]
    for given, text in (
        ((x, w_gate_up[:16], w_down), r"gate_up is \[16, 32\], expected \[32, 32\]"),
        ((x, w_gate_up, w_down.bfloat16()), "down has dtype"),
        ((x.t().contiguous().t(), w_gate_up, w_down), "x is not contiguous"),
        ((x[0], w_gate_up, w_down), r"x and down are \[N, D\]"),
    ):
        with pytest.raises(RuntimeError, match=text):
            compiled._fwd(*given, EPS, True)
