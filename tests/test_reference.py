"""What the reference operations share: the projection in either layout, and wide norms."""

import pytest
import torch
from parity import make_inputs
from torch.utils._python_dispatch import TorchDispatchMode

from trm_fast.reference import linear, norm_dtype

COPIES = {"clone", "copy_", "_to_copy"}


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def batch_major(h):
    return h.contiguous()


def token_major(h):
    return h.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("layout", [batch_major, token_major])
def test_linear(layout, batch, bias):
    h, weight, offset = make_inputs((batch, 5, 8), (6, 8), (6,), requires_grad=True)
    offset = offset if bias else None
    out = linear(layout(h), weight, offset)
    exact = torch.einsum("bsd,ed->bse", h.double(), weight.double())
    if offset is not None:
        exact = exact + offset.double()
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1.3e-6)
    out.square().sum().backward()
    want = torch.autograd.grad(exact.square().sum(), [h, weight])
    for got, expected in zip((h.grad, weight.grad), want, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("layout", [batch_major, token_major])
def test_linear_keeps_the_layout_and_copies_nothing(layout):
    h, weight = make_inputs((3, 5, 8), (8, 8))
    h = layout(h)
    with Names() as recorder:
        out = linear(h, weight)
    assert out.stride() == h.stride()
    assert not recorder.names & COPIES


def test_linear_of_one_vector_per_board():
    h, weight, bias = make_inputs((3, 8), (2, 8), (2,))
    torch.testing.assert_close(linear(h, weight, bias), h @ weight.T + bias)


def test_norms_are_computed_in_float32_at_least():
    wide = {dtype: norm_dtype(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)}
    assert set(wide.values()) == {torch.float32}
    assert norm_dtype(torch.float64) == torch.float64
