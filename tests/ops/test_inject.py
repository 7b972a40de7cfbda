"""inject(z, y, x) = z + (y + x), the inner sum rounded first."""

import pytest
import torch
from kernel_checks import DEVICE, check_fullgraph, check_refusals, check_registered
from op_checks import BSD, cases, check_op, token_major
from parity import make_inputs

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
