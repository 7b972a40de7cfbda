"""swiglu(gate_up) = silu(gate) * up, the gate being the first half."""

import pytest
import torch
from kernel_checks import DEVICE, check_fullgraph, check_refusals, check_registered
from op_checks import DTYPES, cases, check_op, silu, token_major
from parity import TOLERANCES, make_inputs

from trm_fast.kernels import swiglu as kernel
from trm_fast.kernels.swiglu import swiglu as triton_swiglu
from trm_fast.reference import _SwiGLU, swiglu

# Feed-forward widths: a power of two, the real 1536, odd; one board, no board.
SHAPES = [(4, 64, 32), (2, 97, 1536), (1, 97, 33), (0, 97, 64)]


def formula(gate_up, axis=-1):
    gate, up = gate_up.tensor_split(2, axis)
    return silu(gate) * up


@pytest.mark.parametrize("shape, dtype", cases("B S F", SHAPES))
def test_value_and_gradient(shape, dtype):
    batch, tokens, inner = shape
    check_op(swiglu, formula, make_inputs((batch, tokens, 2 * inner), dtype=dtype), dtype)


def test_along_the_first_axis():
    (gate_up,) = make_inputs((64, 40))
    check_op(lambda t: _SwiGLU.apply(t, 0), lambda t: formula(t, 0), [gate_up], torch.float32)


@pytest.mark.parametrize("axis", [0, -1])
def test_gradient_is_the_derivative(axis):
    (gate_up,) = make_inputs((6, 4), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: _SwiGLU.apply(t, axis), (gate_up,))


def test_either_memory_layout():
    (gate_up,) = make_inputs((3, 5, 8), requires_grad=True)
    other = token_major(gate_up)
    for t in (gate_up, other):
        swiglu(t).square().sum().backward()
    assert torch.equal(swiglu(gate_up), swiglu(other))
    assert torch.equal(gate_up.grad, other.grad)


@pytest.mark.parametrize("function", [swiglu, triton_swiglu], ids=["reference", "kernel"])
def test_saturated_gates(function):
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], requires_grad=True)
    up = torch.full((5,), 2.0, requires_grad=True)
    out = function(torch.cat((gate, up)).to(DEVICE)).cpu()
    out.sum().backward()
    # silu is x for large x, 0 for very negative x; its slope is 1, 0 and one half at 0.
    floor = TOLERANCES[torch.float32][0]
    torch.testing.assert_close(out, torch.tensor([0, 0, 0, 200.0, 2e4]), atol=floor, rtol=1e-6)
    torch.testing.assert_close(gate.grad, torch.tensor([0, 0, 1.0, 2, 2]), atol=floor, rtol=1e-6)
    torch.testing.assert_close(up.grad, torch.tensor([0, 0, 0, 100.0, 1e4]), atol=floor, rtol=1e-6)


def test_second_derivatives_are_refused():
    (gate_up,) = make_inputs((2, 4), requires_grad=True)
    (grad,) = torch.autograd.grad(swiglu(gate_up).square().sum(), gate_up, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# Several tiles along the rows, along the width, one row, none; widths that are no powers of two.
KERNEL_SHAPES = [(1, 97, 33), (2, 3, 300), (1, 1, 80), (0, 97, 64)]


@pytest.mark.parametrize("shape, dtype", cases("B S F", KERNEL_SHAPES))
def test_kernel_value_and_gradient(shape, dtype, architecture):
    batch, tokens, inner = shape
    check_op(
        triton_swiglu, formula, make_inputs((batch, tokens, 2 * inner), dtype=dtype), dtype, DEVICE
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_kernel_rounds_as_the_reference(dtype):
    (gate_up,) = make_inputs((40, 66), dtype=dtype, requires_grad=True, device=DEVICE)
    (grad,) = make_inputs((40, 33), dtype=dtype, seed=1, device=DEVICE)
    for got, want in zip(
        (triton_swiglu(gate_up), *torch.autograd.grad(triton_swiglu(gate_up), gate_up, grad)),
        (swiglu(gate_up), *torch.autograd.grad(swiglu(gate_up), gate_up, grad)),
        strict=True,
    ):
        if dtype == torch.float32:
            torch.testing.assert_close(got, want)
        else:  # an exponential that differs in its last bit rarely changes a rounding to 16 bits
            assert (got != want).float().mean() < 0.01


def test_kernel_takes_any_number_of_dimensions_and_either_layout():
    (gate_up,) = make_inputs((3, 5, 8), device=DEVICE)
    want = triton_swiglu(gate_up)
    assert want.shape == (3, 5, 4)
    assert torch.equal(triton_swiglu(token_major(gate_up)), want)
    assert torch.equal(triton_swiglu(gate_up[0, 0]), want[0, 0])
    assert torch.equal(triton_swiglu(gate_up[None]), want[None])


def test_kernel_is_registered():
    gate_up, grad = make_inputs((5, 6), (5, 3), requires_grad=True, device=DEVICE)
    check_registered(kernel._fwd, (gate_up,))
    check_registered(kernel._bwd, (grad.detach(), gate_up.detach()))


def test_kernel_compiles_and_refuses():
    inputs = make_inputs((2, 3, 10))
    check_fullgraph(triton_swiglu, inputs)
    check_refusals(triton_swiglu, inputs)
