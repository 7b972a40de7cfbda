"""embed_reset: question states from tokens, rows and positions; halted boards back at the start."""

import pytest
import torch
from op_checks import cases, check_op
from parity import make_inputs

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
