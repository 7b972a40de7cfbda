"""token_mix: SwiGLU along the tokens, then rms_norm over the tokens, prefix included."""

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
from parity import make_inputs

from trm_fast.extension import token_mix as compiled
from trm_fast.kernels import token_mix as kernel
from trm_fast.kernels.token_mix import token_mix as triton_token_mix
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


# Fewer tokens than a tile, 112 in pieces of 64 + 32 + 16, one piece of 64, two; more than one
# program can hold. Features of two programs, and less than a tile. F that must be padded. No board.
KERNEL_SHAPES = [(2, 5, 144, 16), (1, 97, 48, 40), (1, 64, 16, 33), (1, 128, 16, 16)]
LONG_SHAPES = [(1, 130, 48, 40)]
NO_BOARD = [(0, 97, 64, 128), (0, 130, 64, 128)]


@pytest.mark.parametrize("shape, dtype", cases("B S D F", KERNEL_SHAPES + LONG_SHAPES + NO_BOARD))
def test_kernel_value_and_gradients(shape, dtype, architecture):
    given = inputs(shape, dtype)
    check_op(lambda *t: triton_token_mix(*t, EPS), formula, given, dtype, DEVICE)


def test_kernel_takes_either_memory_layout():
    given = [t.to(DEVICE) for t in inputs((3, 5, 16, 16))]
    out = triton_token_mix(*given, EPS)
    assert torch.equal(triton_token_mix(token_major(given[0]), *given[1:], EPS), out)


TOKENS = pytest.mark.parametrize("tokens", [97, 130])


@TOKENS
def test_deferred_norm_and_injection_come_first(tokens):
    h, gate_up, down = (t.to(DEVICE) for t in inputs((2, tokens, 16, 16), torch.bfloat16))
    (add,) = make_inputs(h.shape, dtype=h.dtype, seed=1, device=DEVICE)
    weights = kernel.pack(gate_up, down, h.dtype)
    ssq = h.float().square().view(2 * tokens, 2, 8).sum(-1).t().contiguous()
    normed = rms_norm(h, -1)
    for options, want in (
        ({"add": add}, (h.float() + add.float()).bfloat16()),
        ({"ssq": ssq}, normed),
        ({"ssq": ssq, "add": add}, (normed.float() + add.float()).bfloat16()),
    ):
        y, rstd, s = kernel.token_mix_fwd(h, *weights, EPS, keep=True, **options)
        # A scale whose last bit differs rounds a few numbers to the next one.
        torch.testing.assert_close(s, want, rtol=0.01, atol=0.01)
        assert (s != want).float().mean() < 0.01
    # What follows is the op on that.
    plain, plain_rstd, none = kernel.token_mix_fwd(s, *weights, EPS)
    assert none is None
    assert torch.equal(y, plain) and torch.equal(rstd, plain_rstd)


@TOKENS
def test_kept_state_scale_and_given_memory(tokens):
    h, gate_up, down = (t.to(DEVICE) for t in inputs((2, tokens, 16, 16)))
    weights = kernel.pack(gate_up, down, h.dtype)
    out = torch.empty_like(h), torch.empty(2, 16, device=DEVICE), torch.empty_like(h)
    given = kernel.token_mix_fwd(h, *weights, EPS, keep=True, out=out)
    assert all(a is b for a, b in zip(given, out, strict=True))
    y, rstd, s = out
    assert torch.equal(s, h)
    assert torch.equal(y, kernel.token_mix_fwd(h, *weights, EPS)[0])
    inner = down.shape[1]
    gate, up = (torch.einsum("bsd,fs->bfd", h, w) for w in gate_up.split(inner))
    total = h + torch.einsum("bfd,sf->bsd", silu(gate) * up, down)
    torch.testing.assert_close(rstd, total.square().mean(1).add(EPS).rsqrt())


def test_boards_behind_do_not_leak_into_the_tokens_that_pad_a_board():
    h, gate_up, down = (t.to(DEVICE) for t in inputs((2, 5, 16, 16)))
    h[1, 0] = 0.0  # without eps its norm is not a number
    ssq = h.square().sum(-1).view(1, 10)
    y, _, _ = kernel.token_mix_fwd(h, *kernel.pack(gate_up, down, h.dtype), 0.0, ssq=ssq)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


@TOKENS
def test_weight_gradients_are_added_to_what_is_given(tokens):
    h, gate_up, down = (t.to(DEVICE) for t in inputs((1, tokens, 16, 20)))
    weights = kernel.pack(gate_up, down, h.dtype)
    y, rstd, _ = kernel.token_mix_fwd(h, *weights, EPS)
    ds, *wanted = kernel.token_mix_bwd(h, h, y, rstd, *weights)
    assert [t.shape for t in wanted] == [t.shape for t in weights]
    assert {t.dtype for t in wanted} == {torch.float32}
    into = [torch.ones_like(t) for t in wanted]
    again, *added = kernel.token_mix_bwd(h, h, y, rstd, *weights, into=tuple(into))
    assert torch.equal(again, ds)
    for got, given, want in zip(added, into, wanted, strict=True):
        torch.testing.assert_close(got, want + 1)
        assert got.data_ptr() == given.data_ptr()


def test_packed_weights_end_in_zeros():
    gate_up, down = make_inputs((2 * 20, 5), (5, 20))
    packed_gate_up, packed_down = kernel.pack(gate_up, down, torch.bfloat16)
    assert packed_gate_up.shape == (2, 32, 16) and packed_down.shape == (16, 32)
    want = torch.zeros(2, 32, 16)
    want[0, :20, :5], want[1, :20, :5] = gate_up[:20], gate_up[20:]
    assert torch.equal(packed_gate_up, want.bfloat16())
    assert torch.equal(packed_down[:5, :20], down.bfloat16())
    assert packed_down[5:].count_nonzero() == 0 and packed_down[:, 20:].count_nonzero() == 0


@pytest.mark.parametrize("tokens", range(1, 129, 9))
def test_pieces_hold_every_token_and_few_more(tokens):
    pieces = kernel.piece_sizes(tokens, 1)
    assert sum(pieces) == -(-tokens // 16) * 16 and 1 <= len(pieces) <= 3
    assert all(size in (16, 32, 64) for size in pieces)
    (whole,) = kernel.piece_sizes(tokens, 0)
    assert whole in (16, 32, 64, 128) and whole // 2 < max(tokens, 16) <= whole


def test_kernel_is_registered():
    given = [t.to(DEVICE).requires_grad_() for t in inputs((2, 5, 16, 20))]
    check_registered(kernel._fwd, (*given, EPS))
    h, gate_up, down = (t.detach() for t in given)
    y, rstd = kernel._fwd(h, gate_up, down, EPS)
    check_registered(kernel._bwd, (h, h, y, rstd, gate_up, down))


def test_kernel_compiles_as_one_graph():
    check_fullgraph(lambda *t: triton_token_mix(*t, EPS), inputs((2, 5, 16, 16)))


def test_kernel_says_what_it_does_not_serve():
    check_refusals(lambda *t: triton_token_mix(*t, EPS), inputs((1, 5, 16, 16)))
    with pytest.raises(ValueError, match="token_mix .* multiple of 16 up to 1024, not 24"):
        triton_token_mix(*(t.to(DEVICE) for t in inputs((1, 5, 24, 16))), EPS)


# Panels of two, one and three vectors, tails of tokens and of the inner width, a single token, more
# tokens than blocks can be made of evenly, several pieces of K for the weights' gradients.
EXTENSION_SHAPES = [
    *[(2, 97, 80, 40), (30, 81, 48, 96), (1, 1, 16, 1), (3, 17, 144, 33), (1, 130, 32, 130)],
    (0, 97, 64, 64),
]


@pytest.mark.parametrize("shape, dtype", extension_cases("B S D F", EXTENSION_SHAPES))
def test_extension(shape, dtype, extension):
    given = inputs(shape, dtype)
    check_op(lambda *t: compiled.token_mix(*t, EPS), formula, given, dtype)


@pytest.mark.parametrize("shape", [(3, 97, 80, 100), (2, 33, 48, 16)], ids=["D80", "D48"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_extension_gives_the_same_bits_on_any_threads(shape, dtype, extension):
    def step():
        given = inputs(shape, dtype, requires_grad=True)
        out = compiled.token_mix(*given, EPS)
        return [out, *torch.autograd.grad(out.square().sum(), given)]

    check_same_bits(step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_extension_takes_extreme_gates(dtype, extension):
    h, gate_up, down = inputs((1, 5, 16, 16), dtype)
    gate_up[:8] *= 1e4
    check_op(lambda *t: compiled.token_mix(*t, EPS), formula, (h, gate_up, down), dtype)


def test_extension_keeps_nothing_without_gradient(extension):
    given = inputs((2, 6, 32, 24))
    out, _, gu = compiled._fwd(*given, EPS, False)
    kept_out, _, kept = compiled._fwd(*given, EPS, True)
    assert gu.shape == (0, 48, 32) and kept.shape == (2, 48, 32)
    assert torch.equal(out, kept_out)


def test_extension_takes_either_memory_layout(extension):
    given = inputs((3, 5, 16, 16))
    out = compiled.token_mix(*given, EPS)
    assert torch.equal(compiled.token_mix(token_major(given[0]), *given[1:], EPS), out)


def test_extension_is_registered(extension):
    given = [*inputs((2, 5, 32, 24), requires_grad=True), EPS, True]
    check_registered(compiled._fwd, given)
    out, rstd, gu = (t.detach() for t in compiled._fwd(*given))
    plain = [t.detach() for t in given[:3]]
    check_registered(compiled._bwd, [out, *plain, out, rstd, gu])
    check_fullgraph(lambda *t: compiled.token_mix(*t, EPS), inputs((2, 5, 32, 24)))


def test_extension_refuses(extension):
    check_extension_refusals(lambda *t: compiled.token_mix(*t, EPS), inputs((1, 2, 32, 16)))
    with pytest.raises(ValueError, match="token_mix of the compiled extension .* not 40"):
        compiled.token_mix(*inputs((1, 2, 40, 16)), EPS)
    s, gate_up, down = inputs((1, 8, 32, 16))
    with pytest.raises(ValueError, match="needs w_gate_up of"):
        compiled.token_mix(s, gate_up[:, :4], down, EPS)
    with pytest.raises(ValueError, match="needs tokens to mix, not 8 by 0"):
        compiled.token_mix(s, gate_up[:0], down[:, :0], EPS)
    for given, text in (
        ((s, gate_up[:16], down), r"gate_up is \[16, 8\], expected \[32, 8\]"),
        ((s, gate_up, down.bfloat16()), "down has dtype"),
        ((s.mT.contiguous().mT, gate_up, down), "s is not contiguous"),
        ((s[0], gate_up, down), r"s and down are \[B, S, D\]"),
        ((s[:, :0], gate_up[:, :0], down[:0]), "no tokens"),
    ):
        with pytest.raises(RuntimeError, match=text):
            compiled._fwd(*given, EPS, True)
    out, rstd, gu = compiled._fwd(s, gate_up, down, EPS, False)
    with pytest.raises(RuntimeError, match=r"gu is \[0, 32, 32\], expected \[1, 32, 32\]"):
        compiled._bwd(out, s, gate_up, down, out, rstd, gu)
