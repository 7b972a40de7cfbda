"""embed_reset: question states from tokens, rows and positions; halted boards back at the start."""

import pytest
import torch
from extension_checks import check_same_bits, extension_cases
from kernel_checks import DEVICE, check_fullgraph, check_refusals, check_registered
from op_checks import cases, check_op, counted_ops, token_major
from parity import assert_parity, make_inputs

from trm_fast.extension import embed_reset as compiled
from trm_fast.kernels import embed_reset as kernel
from trm_fast.kernels.embed_reset import embed_reset as triton_embed_reset
from trm_fast.reference import embed_reset

V = 11
SHAPES = [(4, 2, 62, 32), (2, 16, 81, 512), (1, 16, 81, 64), (0, 16, 81, 64)]
# Which boards start anew.
HALTED = {
    "all": lambda batch: torch.ones(batch, dtype=torch.bool),
    "none": lambda batch: torch.zeros(batch, dtype=torch.bool),
    "some": lambda batch: torch.arange(batch) % 2 == 0,
}


def inputs(shape, dtype=torch.float32):
    batch, prefix, length, width = shape
    tokens = prefix + length
    generator = torch.Generator().manual_seed(1)
    question = torch.randint(V, (batch, length), generator=generator, dtype=torch.int32)
    sizes = [(batch, prefix, width), (V, width), (tokens, width)]
    sizes += [(batch, tokens, width)] * 2 + [(width,)] * 2
    scale = [width**-0.5] * 3 + [1.0] * 4
    return question, *make_inputs(*sizes, dtype=dtype, scale=scale)


def formula(tokens, rows, table, positions, halted, y, z, y_init, z_init, scale):
    question = torch.nn.functional.one_hot(tokens.long(), V).to(table.dtype) @ table
    x = question if rows is None else torch.cat([rows, question], 1)
    if positions is not None:
        x = (x + positions) / 2**0.5
    keep = (~halted).to(y.dtype).view(-1, 1, 1)
    return x * scale, keep * y + (1 - keep) * y_init, keep * z + (1 - keep) * z_init


@pytest.mark.parametrize("halted", HALTED)
@pytest.mark.parametrize("shape, dtype", cases("B P L D", SHAPES))
def test_values_and_gradients(shape, dtype, halted):
    question, rows, table, positions, y, z, y_init, z_init = inputs(shape, dtype)
    flags = HALTED[halted](shape[0])
    given = [rows, table, positions, y, z, y_init, z_init]
    scale = shape[-1] ** 0.5

    def call(function):
        return lambda rows, table, positions, y, z, y_init, z_init: function(
            question, rows, table, positions, flags, y, z, y_init, z_init, scale
        )

    check_op(call(embed_reset), call(formula), given, dtype)


@pytest.mark.parametrize("with_rows", [True, False], ids=["rows", "norows"])
@pytest.mark.parametrize("with_positions", [True, False], ids=["learned", "nopositions"])
def test_without_rows_or_positions(with_rows, with_positions):
    question, rows, table, positions, y, z, y_init, z_init = inputs((2, 3, 5, 8))
    if not with_rows:
        positions, y, z = positions[3:], y[:, 3:], z[:, 3:]
    flags = HALTED["some"](2)

    def call(function):
        return lambda table: function(
            question,
            rows if with_rows else None,
            table,
            positions if with_positions else None,
            flags,
            y,
            z,
            y_init,
            z_init,
            3.0,
        )

    x, _, _ = call(embed_reset)(table)
    assert x.shape == (2, 8 if with_rows else 5, 8)
    check_op(call(embed_reset), call(formula), [table], torch.float32)


@pytest.mark.parametrize("halted", HALTED)
def test_what_halted_boards_held_never_leaks(halted):
    question, rows, table, positions, y, z, y_init, z_init = inputs((4, 2, 6, 8))
    flags = HALTED[halted](4)
    y, z = y.clone(), z.clone()
    y[flags], z[flags] = float("nan"), float("inf")
    table.requires_grad_()
    x, new_y, new_z = embed_reset(
        question, rows, table, positions, flags, y, z, y_init, z_init, 1.0
    )
    assert torch.equal(new_y[flags], y_init.expand(int(flags.sum()), 8, 8))
    assert torch.equal(new_z[flags], z_init.expand(int(flags.sum()), 8, 8))
    assert torch.equal(new_y[~flags], y[~flags])
    assert torch.equal(new_z[~flags], z[~flags])
    (x.sum() + new_y.sum() + new_z.sum()).backward()
    assert torch.isfinite(x).all()
    assert torch.isfinite(table.grad).all()


def test_master_weights_are_cast_and_keep_their_gradient_dtype():
    question, rows, table, positions, y, z, y_init, z_init = inputs((2, 2, 6, 8))
    low = torch.bfloat16
    table.requires_grad_()
    positions.requires_grad_()
    x, new_y, _ = embed_reset(
        question,
        rows.to(low),
        table,
        positions,
        HALTED["some"](2),
        y.to(low),
        z.to(low),
        y_init.to(low),
        z_init.to(low),
        8**0.5,
    )
    assert x.dtype == new_y.dtype == low
    # Embedding, sum with the position, 0.7071, sqrt(D): each rounded, as published.
    plain = torch.cat([rows.to(low), table.to(low)[question.long()]], 1) + positions.to(low)
    assert torch.equal(x, 8**0.5 * (0.707106781 * plain))
    x.sum().backward()
    assert table.grad.dtype == positions.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_token_dtypes(dtype):
    question, rows, table, _, y, z, y_init, z_init = inputs((2, 2, 6, 8))
    rest = (rows, table, None, HALTED["all"](2), y, z, y_init, z_init, 1.0)
    if dtype == torch.uint8:
        with pytest.raises(RuntimeError, match="indices"):  # the model casts; the op takes int
            embed_reset(question.to(dtype), *rest)
        return
    assert torch.equal(embed_reset(question.to(dtype), *rest)[0], embed_reset(question, *rest)[0])


# The official puzzle with its prefix, several boards, none; widths that are no powers of two.
KERNEL_SHAPES = [(1, 16, 81, 48), (3, 1, 3, 80), (0, 16, 81, 64)]
BOTH = pytest.mark.parametrize("function", [embed_reset, triton_embed_reset], ids=["ref", "kernel"])


def on_device(values):
    return [v.to(DEVICE) if isinstance(v, torch.Tensor) else v for v in values]


@pytest.mark.parametrize("shape, dtype", cases("B P L D", KERNEL_SHAPES))
def test_kernel_values_and_gradients(shape, dtype, architecture):
    check_kernel(shape, dtype, "some")


@pytest.mark.parametrize("halted", ["all", "none"])
def test_kernel_with_all_boards_halted_or_none(halted):
    check_kernel((2, 1, 3, 16), torch.float32, halted)


def check_kernel(shape, dtype, halted):
    question, *given = inputs(shape, dtype)

    def call(function):
        return lambda rows, table, positions, *states: function(
            question, rows, table, positions, HALTED[halted](shape[0]), *states, shape[-1] ** 0.5
        )

    check_op(call(triton_embed_reset), call(formula), given, dtype, DEVICE)


@pytest.mark.parametrize("with_rows", [True, False], ids=["rows", "norows"])
@pytest.mark.parametrize("with_positions", [True, False], ids=["learned", "nopositions"])
def test_kernel_rounds_as_the_reference(with_rows, with_positions):
    """Rows and states in bfloat16, master weights in float32: equal to the bit."""
    question, rows, table, positions, *states = inputs((2, 3, 5, 16))
    states = [t.bfloat16() for t in states]
    rows = rows.bfloat16() if with_rows else None
    if not with_rows:
        positions, states[0], states[1] = positions[3:], states[0][:, 3:], states[1][:, 3:]
    given = (question, rows, table, positions if with_positions else None, HALTED["some"](2))
    scale = 48**0.5  # no power of two: multiplying by it rounds
    got = triton_embed_reset(*on_device((*given, *states, scale)))
    for g, want in zip(got, embed_reset(*given, *states, scale), strict=True):
        assert torch.equal(g.cpu(), want)


def test_kernel_gradients_of_master_weights_have_their_dtype():
    question, rows, table, positions, *states = on_device(inputs((2, 3, 5, 16)))
    rows, *states = (t.bfloat16() for t in (rows, *states))
    wanted = [t.requires_grad_() for t in (rows, table, positions)]
    flags = HALTED["some"](2).to(DEVICE)
    x, _, _ = triton_embed_reset(question, rows, table, positions, flags, *states, 4.0)
    grads = torch.autograd.grad(x.float().square().sum(), wanted)
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]


def test_kernel_computes_no_gradient_that_nobody_asked_for():
    question, rows, table, _, *states = on_device(inputs((2, 3, 5, 16)))
    flags = HALTED["some"](2).to(DEVICE)
    table.requires_grad_()
    x, y, z = triton_embed_reset(question, rows, table, None, flags, *states, 4.0)
    assert [t.requires_grad for t in (x, y, z)] == [True, False, False]
    upstream = torch.ones_like(x)
    with counted_ops() as names:
        torch.autograd.grad(x, table, upstream)
    assert names[0] == "trm_fast_triton::embed_reset_bwd"
    assert set(names[1:]) <= {"mul", "_to_copy", "view", "detach"}

    states[3].requires_grad_()  # the start of z
    x, y, z = triton_embed_reset(question, rows, table, None, flags, *states, 4.0)
    assert [t.requires_grad for t in (x, y, z)] == [True, False, True]
    with counted_ops() as names:
        _, d_init = torch.autograd.grad(z, (table, states[3]), upstream, allow_unused=True)
    assert "trm_fast_triton::embed_reset_bwd" not in names
    assert_parity(d_init, torch.full_like(d_init, 8))  # places of the one board that halted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocabulary", [2, 11, 64, 65])
def test_embedding_gradient(vocabulary, dtype, architecture):
    """Over more than one chunk of tokens, by products and, for the largest, by a sorted sum."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(vocabulary, (13, 81), generator=generator, dtype=torch.int32)
    (grad,) = make_inputs((13, 83, 16), dtype=dtype)
    exact = torch.zeros(vocabulary, 16, dtype=torch.float64)
    exact.index_add_(0, tokens.flatten().long(), grad[:, 2:].reshape(-1, 16).double())
    got = kernel.embed_reset_bwd(grad.to(DEVICE), tokens.to(DEVICE), vocabulary)
    assert got.dtype == torch.float32
    assert_parity(got, exact)  # in float32 whatever the gradient's dtype


@BOTH
@pytest.mark.parametrize("halted", ["all", "some"])
def test_either_keeps_out_what_halted_boards_held(halted, function):
    question, rows, table, positions, y, z, y_init, z_init = inputs((2, 2, 6, 16))
    flags = HALTED[halted](2)
    y[flags], z[flags] = float("nan"), float("inf")
    given = (question, rows, table, positions, flags, y, z, y_init, z_init, 1.0)
    _, new_y, new_z = (t.cpu() for t in function(*on_device(given)))
    assert torch.equal(new_y[flags], y_init.expand(int(flags.sum()), 8, 16))
    assert torch.equal(new_z[flags], z_init.expand(int(flags.sum()), 8, 16))
    assert torch.equal(new_y[~flags], y[~flags])


def test_kernel_shows_a_token_outside_the_vocabulary():
    question, *rest = on_device(inputs((1, 1, 3, 16)))
    question[0, 0], question[0, 1] = V, -1
    x, _, _ = triton_embed_reset(question, *rest[:3], HALTED["all"](1).to(DEVICE), *rest[3:], 1.0)
    assert torch.isnan(x[0, 1:3]).all()
    assert torch.isfinite(x[0, 0]).all() and torch.isfinite(x[0, 3]).all()


def test_kernel_token_dtypes():
    question, *rest = on_device(inputs((2, 2, 6, 16)))
    given = (*rest[:3], HALTED["all"](2).to(DEVICE), *rest[3:], 1.0)
    want = triton_embed_reset(question, *given)[0]
    assert torch.equal(triton_embed_reset(question.long(), *given)[0], want)
    with pytest.raises(ValueError, match="embed_reset .* tokens of int32 and int64, not uint8"):
        triton_embed_reset(question.to(torch.uint8), *given)


def test_kernel_is_registered():
    question, *rest = on_device(inputs((2, 2, 3, 16)))
    flags = HALTED["some"](2).to(DEVICE)
    rest = [t.requires_grad_() for t in rest]
    check_registered(kernel._fwd, (question, *rest[:3], flags, *rest[3:], 4.0))
    check_registered(kernel._bwd, (torch.ones(2, 5, 16, device=DEVICE), question, V))


def test_kernel_compiles_and_refuses():
    question, *given = inputs((2, 2, 3, 16))
    flags = HALTED["some"](2)

    def summed(rows, table, positions, *states_and_tokens):
        *states, question, flags = states_and_tokens
        x, y, z = triton_embed_reset(question, rows, table, positions, flags, *states, 4.0)
        return x + y * 2 + z * 3

    check_fullgraph(summed, [*given, question, flags])
    check_refusals(summed, [*given, question, flags])
    narrow = [t[..., :8] for t in given]
    with pytest.raises(ValueError, match="multiple of 16 up to 1024, not 8"):
        summed(*narrow, question, flags)


# The official puzzle with its prefix, widths with a tail and below a vector, one board, none.
EXTENSION_SHAPES = [(3, 16, 81, 43), (1, 1, 3, 80), (2, 2, 5, 3), (0, 16, 81, 64)]


@pytest.mark.parametrize("shape, dtype", extension_cases("B P L D", EXTENSION_SHAPES))
def test_extension_values_and_gradients(shape, dtype, extension):
    check_extension(shape, dtype, "some")


@pytest.mark.parametrize("halted", ["all", "none"])
def test_extension_with_all_boards_halted_or_none(halted, extension):
    check_extension((2, 1, 3, 21), torch.float32, halted)


def check_extension(shape, dtype, halted):
    question, *given = inputs(shape, dtype)

    def call(function):
        return lambda rows, table, positions, *states: function(
            question, rows, table, positions, HALTED[halted](shape[0]), *states, shape[-1] ** 0.5
        )

    check_op(call(compiled.embed_reset), call(formula), given, dtype)


@pytest.mark.parametrize("with_rows", [True, False], ids=["rows", "norows"])
@pytest.mark.parametrize("with_positions", [True, False], ids=["learned", "nopositions"])
@pytest.mark.parametrize("token_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_extension_rounds_as_the_reference(with_rows, with_positions, token_dtype, extension):
    """Rows and states in bfloat16, master weights in float32: equal to the bit."""
    question, rows, table, positions, *states = inputs((2, 3, 5, 21))
    states = [t.bfloat16() for t in states]
    rows = rows.bfloat16() if with_rows else None
    if not with_rows:
        positions, states[0], states[1] = positions[3:], states[0][:, 3:], states[1][:, 3:]
    positions = positions if with_positions else None
    given = (question.to(token_dtype), rows, table, positions, HALTED["some"](2))
    scale = 48**0.5  # no power of two: multiplying by it rounds
    got = compiled.embed_reset(*given, *states, scale)
    for g, want in zip(got, embed_reset(*given, *states, scale), strict=True):
        assert g.is_contiguous() and torch.equal(g, want)
    got = compiled.embed_reset(*given, *map(token_major, states[:2]), *states[2:], scale)
    for g, want in zip(got, embed_reset(*given, *states, scale), strict=True):
        assert g.is_contiguous() and torch.equal(g, want)


def test_extension_casts_bfloat16_weights_to_float32_states(extension):
    question, rows, table, positions, *states = inputs((2, 3, 5, 21))
    weights = [t.bfloat16() for t in (rows, table, positions)]
    starts = [t.bfloat16() for t in states[2:]]
    flags = HALTED["some"](2)
    got = compiled.embed_reset(question, *weights, flags, *states[:2], *starts, 3.0)
    wide = [t.float() for t in weights], [t.float() for t in starts]
    want = embed_reset(question, *wide[0], flags, *states[:2], *wide[1], 3.0)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.float32 and torch.equal(g, w)


def test_extension_computes_no_gradient_that_nobody_asked_for(extension):
    question, rows, table, positions, *states = inputs((2, 3, 5, 16))
    states = [t.bfloat16() for t in states]
    flags = HALTED["some"](2)
    wanted = [t.requires_grad_() for t in (table, positions)]
    x, y, z = compiled.embed_reset(question, rows.bfloat16(), *wanted, flags, *states, 4.0)
    assert [t.requires_grad for t in (x, y, z)] == [True, False, False]
    upstream = torch.ones_like(x)
    with counted_ops() as names:
        grads = torch.autograd.grad(x, wanted, upstream)
    assert [g.dtype for g in grads] == [torch.float32] * 2  # of the weights
    assert set(names) <= {
        *("trm_fast_ext::embed_reset_bwd", "trm_fast_ext::embed_reset_positions_bwd"),
        *("view", "detach"),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocabulary", [1, 11, 700])
def test_extension_embedding_gradient(vocabulary, dtype, extension):
    """Over more than one chunk of tokens, and a vocabulary larger than a chunk."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(vocabulary, (13, 81), generator=generator)
    (grad,) = make_inputs((13, 83, 21), dtype=dtype)
    exact = torch.zeros(vocabulary, 21, dtype=torch.float64)
    exact.index_add_(0, tokens.flatten(), grad[:, 2:].reshape(-1, 21).double(), alpha=0.5)
    got = compiled._bwd(grad, tokens, vocabulary, 0.5)
    assert got.dtype == torch.float32
    assert_parity(got, exact)  # in float32 whatever the gradient's dtype
    assert_parity(compiled._positions_bwd(grad, 0.5), grad.double().sum(0) / 2)
    check_same_bits(lambda: [compiled._bwd(grad, tokens, vocabulary, 0.5)])


def test_extension_gives_the_same_bits_on_any_threads(extension):
    question, *given = inputs((23, 2, 81, 61), torch.bfloat16)
    given = [t.requires_grad_() for t in given]
    flags = HALTED["some"](23)

    def step():
        out = compiled.embed_reset(question, *given[:3], flags, *given[3:], 7.0)
        return [*out, *torch.autograd.grad(sum(t.square().sum() for t in out), given)]

    check_same_bits(step)


def test_extension_keeps_out_what_halted_boards_held(extension):
    question, rows, table, positions, y, z, y_init, z_init = inputs((2, 2, 6, 16))
    flags = HALTED["some"](2)
    y[flags], z[flags] = float("nan"), float("inf")
    given = (question, rows, table, positions, flags, y, z, y_init, z_init, 1.0)
    for got, want in zip(compiled.embed_reset(*given), embed_reset(*given), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("token_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("token", [V, -1, 2**31 - 1, -(2**31)])
def test_extension_refuses_a_token_outside_the_vocabulary(token, token_dtype, extension):
    question, *rest = inputs((2, 1, 3, 16))
    question = question.to(token_dtype)
    question[1, 2] = token
    with pytest.raises(RuntimeError, match=rf"token {token} at \[1, 2\] .* vocabulary of {V}"):
        compiled.embed_reset(question, *rest[:3], HALTED["all"](2), *rest[3:], 1.0)
    with pytest.raises(RuntimeError, match=rf"embed_reset_bwd: token {token} at"):
        compiled._bwd(torch.ones(2, 4, 16), question, V, 1.0)


def test_extension_is_registered(extension):
    question, *rest = inputs((2, 2, 3, 5))
    flags = HALTED["some"](2)
    rest = [t.requires_grad_() for t in rest]
    check_registered(compiled._fwd, (question, *rest[:3], flags, *rest[3:], 4.0))
    check_registered(compiled._bwd, (torch.ones(2, 5, 5), question, V, 0.5))
    check_registered(compiled._positions_bwd, (torch.ones(2, 5, 5), 0.5))


def test_extension_compiles(extension):
    question, rows, *weights = inputs((2, 2, 3, 16))
    states, weights = weights[2:], weights[:2]
    flags = HALTED["some"](2)

    def question_states(table, positions):
        return compiled.embed_reset(question, rows, table, positions, flags, *states, 4.0)[0]

    check_fullgraph(question_states, weights)


# Argument by position in embed_reset, its replacement, what the function says, what the op says.
WRONG = [
    (0, lambda t: t.to(torch.uint8), "tokens of int32 and int64, not uint8", "tokens are int32 or"),
    (0, lambda t: t[:, :2], "needs y of", r"tokens is \[2, 2\], expected \[2, 3\]"),
    (1, lambda t: t.half(), "serves float32 and bfloat16, not float16", "bfloat16, not float16"),
    (1, lambda t: t[:1], None, "rows is"),
    (2, lambda t: t[:, :3], None, r"embedding is \[11, 3\], expected \[11, 8\]"),
    (2, lambda t: t.double(), "not float64", "bfloat16, not float64"),
    (3, lambda t: t[:4], None, r"positions is \[4, 8\], expected \[5, 8\]"),
    (4, lambda t: t.int(), "needs halted of .2. bool", "halted has dtype"),
    (4, lambda t: t[:1], "needs halted of", "halted is"),
    (5, lambda t: t.double(), "not float64", "expected float32 or bfloat16"),
    (6, lambda t: t[:, :2], "needs z of", "z is"),
    (6, lambda t: t.bfloat16(), "needs z of", "z has dtype"),
    (7, lambda t: t[:3], None, r"y_init is \[3\], expected \[8\]"),
    (8, lambda t: t[None], None, r"z_init is \[1, 8\], expected \[8\]"),
]


@pytest.mark.parametrize("position, wrong, function_says, op_says", WRONG)
def test_extension_refuses(position, wrong, function_says, op_says, extension):
    question, *rest = inputs((2, 2, 3, 8))
    given = [question, *rest[:3], HALTED["some"](2), *rest[3:], 1.0]
    given[position] = wrong(given[position])
    if function_says:
        with pytest.raises(ValueError, match=function_says) as e:
            compiled.embed_reset(*given)
        assert "\n" not in str(e.value)
    contiguous = [t.contiguous() if isinstance(t, torch.Tensor) else t for t in given]
    with pytest.raises(RuntimeError, match=op_says):
        compiled._fwd(*contiguous)


def test_extension_op_refuses_strides_and_shapes_of_the_gradient(extension):
    question, *rest = inputs((2, 2, 3, 8))
    given = [question, *rest[:3], HALTED["some"](2), *rest[3:], 1.0]
    for position, text in ((1, "rows is not"), (2, "embedding is not"), (5, "rows of y are not")):
        strided = given.copy()
        strided[position] = given[position].repeat_interleave(2, -1)[..., ::2]
        with pytest.raises(RuntimeError, match=text):
            compiled._fwd(*strided)
    grad = torch.ones(2, 2, 8)
    with pytest.raises(RuntimeError, match=r"tokens are \[2, 3\], expected \[2, at most 2\]"):
        compiled._bwd(grad, question, V, 1.0)
    with pytest.raises(RuntimeError, match="grad is not contiguous"):
        compiled._positions_bwd(grad.transpose(0, 2), 1.0)
