"""inject(z, y, x) = z + (y + x), the inner sum rounded first."""

import pytest
import torch
from op_checks import BSD, cases, check_op
from parity import make_inputs

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
