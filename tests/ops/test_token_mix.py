"""token_mix: SwiGLU along the tokens, then rms_norm over the tokens, prefix included."""

import pytest
import torch
from op_checks import EPS, cases, check_op, counted_ops, rms_norm, silu, token_major
from parity import make_inputs

from trm_fast.reference import token_mix

# F is the width along the tokens; 97 = 81 cells + 16 prefix tokens goes with 512.
SHAPES = [(4, 64, 32, 64), (2, 97, 128, 512), (1, 97, 64, 33), (0, 97, 64, 128)]


def inputs(shape, dtype=torch.float32, **options):
    batch, tokens, width, inner = shape
    sizes = (batch, tokens, width), (2 * inner, tokens), (tokens, inner)
    scale = (1.0, tokens**-0.5, inner**-0.5)
    return make_inputs(*sizes, dtype=dtype, scale=scale, **options)


def formula(h, gate_up, down):
    inner = down.shape[1]
    gate = torch.einsum("bsd,fs->bfd", h, gate_up[:inner])
    up = torch.einsum("bsd,fs->bfd", h, gate_up[inner:])
    return rms_norm(h + torch.einsum("bfd,sf->bsd", silu(gate) * up, down), 1)


@pytest.mark.parametrize("shape, dtype", cases("B S D F", SHAPES))
def test_value_and_gradients(shape, dtype):
    check_op(lambda *t: token_mix(*t, EPS), formula, inputs(shape, dtype), dtype)


def test_gradient_is_the_derivative():
    given = inputs((2, 3, 4, 3), torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: token_mix(*t, 0.1), given)


def test_boards_do_not_mix():
    h, gate_up, down = inputs((3, 5, 8, 16))
    alone = torch.cat([token_mix(board, gate_up, down, EPS) for board in h.split(1)])
    torch.testing.assert_close(token_mix(h, gate_up, down, EPS), alone)


def test_either_memory_layout_and_no_copy_of_a_token_major_state():
    h, gate_up, down = inputs((3, 5, 8, 16))
    out = token_mix(h, gate_up, down, EPS)
    with counted_ops() as names:
        other = token_mix(token_major(h), gate_up, down, EPS)
    torch.testing.assert_close(other, out)
    assert names.count("clone") == 1  # token_major's own
    assert not {"copy_", "_to_copy"} & set(names)
