"""swiglu(gate_up) = silu(gate) * up, the gate being the first half."""

import pytest
import torch
from op_checks import cases, check_op, silu, token_major
from parity import TOLERANCES, make_inputs

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


def test_saturated_gates():
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], requires_grad=True)
    up = torch.full((5,), 2.0, requires_grad=True)
    out = swiglu(torch.cat((gate, up)))
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
