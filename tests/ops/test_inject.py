"""inject(z, y, x) = z + (y + x), the inner sum rounded first."""

import pytest
import torch
from extension_checks import check_same_bits, extension_cases
from kernel_checks import DEVICE, check_fullgraph, check_refusals, check_registered
from op_checks import BSD, cases, check_op, token_major
from parity import make_inputs

from trm_fast.extension import inject as compiled
from trm_fast.kernels import inject as kernel
from trm_fast.kernels.inject import inject as triton_inject
from trm_fast.reference import inject


@pytest.mark.parametrize("shape, dtype", cases("B S D", BSD))
def test_value_and_gradients(shape, dtype):
    check_op(
        inject, lambda z, y, x: z + y + x, make_inputs(shape, shape, shape, dtype=dtype), dtype
    )


def test_rounds_question_plus_answer_first():
    z, y, x = make_inputs((4, 64, 32), (4, 64, 32), (4, 64, 32), dtype=torch.bfloat16)
    inner = (y.double() + x.double()).bfloat16()
    assert torch.equal(inject(z, y, x), (z.double() + inner.double()).bfloat16())
    other_order = ((z.double() + y.double()).bfloat16().double() + x.double()).bfloat16()
    assert not torch.equal(inject(z, y, x), other_order)


# Several tiles with a rest, less than one, one item, none.
KERNEL_BSD = [(2, 97, 48), (1, 3, 5), (0, 97, 64)]


@pytest.mark.parametrize("shape, dtype", cases("B S D", KERNEL_BSD))
def test_kernel_value_and_gradients(shape, dtype, architecture):
    inputs = make_inputs(shape, shape, shape, dtype=dtype)
    check_op(triton_inject, lambda z, y, x: z + y + x, inputs, dtype, DEVICE)
    assert torch.equal(triton_inject(*(t.to(DEVICE) for t in inputs)).cpu(), inject(*inputs))


def test_kernel_takes_either_layout():
    z, y, x = make_inputs((2, 5, 16), (2, 5, 16), (2, 5, 16), device=DEVICE)
    assert torch.equal(triton_inject(z, token_major(y), token_major(x)), inject(z, y, x))


def test_kernel_is_registered():
    shape = (2, 3, 5)
    states = make_inputs(shape, shape, shape, requires_grad=True, device=DEVICE)
    check_registered(kernel._fwd, states)


def test_kernel_compiles_and_refuses():
    inputs = make_inputs((2, 3, 5), (2, 3, 5), (2, 3, 5))
    check_fullgraph(triton_inject, inputs)
    check_refusals(triton_inject, inputs)


# Tails of every vector width, less than a vector, more than one thread's share, none.
EXTENSION_BSD = [(2, 97, 101), (1, 3, 5), (3, 97, 80), (0, 97, 64)]


@pytest.mark.parametrize("shape, dtype", extension_cases("B S D", EXTENSION_BSD))
def test_extension_value_and_gradients(shape, dtype, extension):
    inputs = make_inputs(shape, shape, shape, dtype=dtype)
    check_op(compiled.inject, lambda z, y, x: z + y + x, inputs, dtype)
    assert torch.equal(compiled.inject(*inputs), inject(*inputs))


def test_extension_keeps_the_layout_of_the_first_state(extension):
    z, y, x = make_inputs((2, 5, 16), (2, 5, 16), (2, 5, 16))
    want = inject(z, y, x)
    assert torch.equal(compiled.inject(z, token_major(y), token_major(x)), want)
    other = compiled.inject(token_major(z), y, token_major(x))
    assert torch.equal(other, want) and other.stride() == token_major(z).stride()


def test_extension_gives_the_same_bits_on_any_threads(extension):
    states = make_inputs(*[(7, 97, 81)] * 3, dtype=torch.bfloat16)
    check_same_bits(lambda: [compiled.inject(*states)])


def test_extension_is_registered_and_compiles(extension):
    check_registered(compiled._fwd, make_inputs(*[(2, 3, 5)] * 3, requires_grad=True))
    check_fullgraph(compiled.inject, make_inputs(*[(2, 3, 5)] * 3))


def test_extension_refuses(extension):
    z, y, x = make_inputs(*[(2, 3, 8)] * 3)
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(
            ValueError, match="inject of the compiled .* serves float32 and bfloat16"
        ):
            compiled.inject(*(t.to(dtype) for t in (z, y, x)))
    with pytest.raises(ValueError, match=r"needs y of \[2, 3, 8\] float32, not \[2, 3, 4\]"):
        compiled.inject(z, y[..., :4], x)
    with pytest.raises(ValueError, match="needs x of .* not .* bfloat16"):
        compiled.inject(z, y, x.bfloat16())
    for given, text in (
        ((z, y[:1], x), r"inject: y is \[1, 3, 8\], expected \[2, 3, 8\]"),
        ((z, y, x.bfloat16()), "x has dtype"),
        ((z.half(), y, x), "expected float32 or bfloat16"),
        ((z, y, token_major(x)), "x is not contiguous"),
        ((z[0], y, x), r"z is \[3, 8\], expected \[B, S, D\]"),
    ):
        with pytest.raises(RuntimeError, match=text):
            compiled._fwd(*given)
