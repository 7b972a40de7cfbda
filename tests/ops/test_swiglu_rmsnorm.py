"""swiglu_rmsnorm(h, gate_up, down, eps) = rms_norm(h + down (silu(gate h) * up h))."""

import pytest
import torch
from kernel_checks import (
    DEVICE,
    check_fullgraph,
    check_refusals,
    check_registered,
)
from op_checks import EPS, cases, check_op, counted_ops, rms_norm, silu, token_major
from parity import assert_parity, make_inputs

from trm_fast.kernels import swiglu_rmsnorm as kernel
from trm_fast.reference import swiglu_rmsnorm

SHAPES = [(4, 64, 32, 64), (2, 97, 512, 1536), (1, 97, 64, 33), (0, 97, 64, 128)]

# For the kernel: more rows than a tile, widths that are no powers of two, F no multiple of 16.
KERNEL_SHAPES = [(2, 97, 48, 100), (1, 5, 16, 16), (0, 97, 64, 64)]


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
