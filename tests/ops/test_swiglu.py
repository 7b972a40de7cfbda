"""swiglu(gate_up) = silu(gate) * up, the gate being the first half."""

import pytest
import torch
from extension_checks import check_extension_refusals, check_same_bits, extension_cases
from kernel_checks import DEVICE, check_fullgraph, check_refusals, check_registered
from op_checks import DTYPES, cases, check_op, silu, token_major
from parity import TOLERANCES, make_inputs

from trm_fast.extension import swiglu as compiled
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


@pytest.mark.parametrize(
    "function",
    [swiglu, triton_swiglu, compiled.swiglu],
    ids=["reference", "kernel", "extension"],
)
def test_saturated_gates(function, request):
    if function is compiled.swiglu:
        request.getfixturevalue("extension")
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


# Tails of every vector width, less than a vector, several shares of a thread, one row, none.
EXTENSION_SHAPES = [(2, 97, 101), (1, 97, 3), (2, 3, 4099), (1, 1, 80), (0, 97, 64)]


@pytest.mark.parametrize("shape, dtype", extension_cases("B S F", EXTENSION_SHAPES))
def test_extension_value_and_gradient(shape, dtype, extension):
    batch, tokens, inner = shape
    (gate_up,) = make_inputs((batch, tokens, 2 * inner), dtype=dtype)
    check_op(compiled.swiglu, formula, [gate_up], dtype)


def test_extension_rounds_once(extension):
    (gate_up,) = make_inputs((40, 202), dtype=torch.bfloat16)
    want = formula(gate_up.double()).bfloat16()
    assert (compiled.swiglu(gate_up) != want).float().mean() < 1e-3


def test_extension_takes_any_number_of_dimensions_and_either_layout(extension):
    (gate_up,) = make_inputs((3, 5, 8))
    want = compiled.swiglu(gate_up)
    assert want.shape == (3, 5, 4)
    assert torch.equal(compiled.swiglu(token_major(gate_up)), want)
    assert torch.equal(compiled.swiglu(gate_up[0, 0]), want[0, 0])
    assert torch.equal(compiled.swiglu(gate_up[None]), want[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_extension_gives_the_same_bits_on_any_threads(dtype, extension):
    gate_up, grad = make_inputs((331, 198), (331, 99), dtype=dtype)
    check_same_bits(lambda: [compiled._fwd(gate_up), compiled._bwd(grad, gate_up)])


def test_extension_is_registered_and_compiles(extension):
    gate_up, grad = make_inputs((5, 6), (5, 3), requires_grad=True)
    check_registered(compiled._fwd, (gate_up,))
    check_registered(compiled._bwd, (grad.detach(), gate_up.detach()))
    check_fullgraph(compiled.swiglu, make_inputs((2, 3, 10)))


def test_extension_refuses(extension):
    check_extension_refusals(compiled.swiglu, make_inputs((2, 3, 10)))
    for shape in ((2, 5), ()):
        with pytest.raises(
            ValueError, match="swiglu of the compiled extension needs a gate and as"
        ):
            compiled.swiglu(torch.zeros(shape))
    gate_up, grad = make_inputs((4, 6), (4, 3))
    for call, text in (
        (lambda: compiled._fwd(gate_up[:, :5].contiguous()), r"is \[4, 5\], expected \[4, 4\]"),
        (lambda: compiled._fwd(gate_up[0]), r"gate_up is \[6\], expected \[N, 2F\]"),
        (lambda: compiled._fwd(gate_up.half()), "expected float32 or bfloat16"),
        (lambda: compiled._fwd(gate_up.t().contiguous().t()), "gate_up is not contiguous"),
        (lambda: compiled._bwd(grad[:3], gate_up), r"gate_up is \[4, 6\], expected \[3, 6\]"),
        (lambda: compiled._bwd(grad, gate_up.bfloat16()), "gate_up has dtype"),
        (lambda: compiled._bwd(grad[0], gate_up), r"grad is \[3\], expected \[N, F\]"),
    ):
        with pytest.raises(RuntimeError, match=text):
            call()
