"""deep_recursion of the compiled extension in eight bits, and the product that it is made of.

One product has the same bits as the reference. In a recursion a last bit of SwiGLU or of a norm may
turn a whole number into the next one, and then a board differs by a part of what quantising does to
it; most boards differ by rounding only.
"""

from dataclasses import replace

import pytest
import torch
from extension_checks import check_same_bits
from kernel_checks import check_registered
from op_checks import EPS, case_ids
from parity import make_inputs, relative_l2
from recursion_cases import (
    MIXERS,
    OPS,
    assert_as_good,
    blocks_of,
    leaves_for,
    rotary,
    states,
)

from trm_fast import quantize, reference
from trm_fast.extension import deep_recursion as compiled
from trm_fast.extension import int8
from trm_fast.kernels import deep_recursion as kernel
from trm_fast.ops import POLICIES, Recursion

# As of test_deep_recursion_extension: odd tokens, whole and broken panels, one board. The last has
# more rows than a kernel takes at a time.
CASES = [
    ((2, 12, 32), 2, (2, 2)),
    ((1, 97, 48), 1, (1, 3)),
    ((3, 17, 80), 2, (1, 1)),
    ((4, 9, 16), 3, (2, 1)),
    ((1, 130, 32), 1, (1, 1)),
]
IDS = case_ids("B S D", [case[0] for case in CASES])
ROUNDING, QUANTISING, FLIPS = 1e-5, 5e-3, 0.25  # relative L2; share of the quantising error
pytestmark = pytest.mark.usefixtures("extension")


def answers(function, mixer, inputs, flat, cycles=(1, 1), quantized="int8"):
    """y and z of one call without a gradient; heads of 16 features."""
    heads = inputs[0].shape[2] // 16
    tables = rotary(inputs[0].shape[1], 16) if mixer == "attention" else None
    settings = Recursion(*cycles, heads, EPS, quantize=quantized)
    with torch.no_grad():
        return function(OPS, *inputs, blocks_of(mixer, flat), tables, settings)


def same_bits(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7), b.nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("n", "e", "d"), [(0, 16, 16), (1, 16, 16), (97, 48, 80), (230, 96, 304), (13, 2064, 48)]
)
def test_a_product_has_the_bits_of_the_reference(n, e, d, dtype):
    a, w = make_inputs((n, e), (d, e), dtype=dtype)
    a *= torch.logspace(-9, 9, max(n, 1)).view(-1, 1)[:n].to(dtype)
    w *= torch.logspace(-3, 3, d).view(-1, 1).to(dtype)
    w[1] = 0
    if n > 4:
        a[1], a[2], a[3, 5], a[4, 0] = 0, 1e-35, torch.nan, -torch.inf
    got = int8.linear(a, w)
    assert got.dtype == dtype and got.shape == (n, d)
    assert same_bits(got, quantize.linear(a, quantize.rows(w)))
    if n > 4:
        assert not got[1:3].any() and got[3:5].isnan().all()
        others = torch.cat((got[:1], got[5:]))
        assert others.isfinite().all() and not others[:, 1].any()


@pytest.mark.parametrize("shape, layers, cycles", CASES, ids=IDS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_as_the_reference(mixer, shape, layers, cycles):
    flat, inputs = leaves_for(mixer, *shape[1:], layers=layers), states(*shape)
    got, want, exact = (
        answers(f, mixer, inputs, flat, cycles, quantized)
        for f, quantized in (
            (compiled.deep_recursion, "int8"),
            (reference.deep_recursion, "int8"),
            (reference.deep_recursion, "none"),
        )
    )
    for g, w, e in zip(got, want, exact, strict=True):
        assert not g.requires_grad
        assert relative_l2(w, e) > QUANTISING
        assert relative_l2(g, w) < FLIPS * relative_l2(w, e)


@pytest.mark.parametrize("mixer", MIXERS)
def test_most_boards_differ_by_rounding_only(mixer):
    flat, inputs = leaves_for(mixer, 9, 32), states(16, 9, 32)
    got, want = (
        answers(f, mixer, inputs, flat) for f in (compiled.deep_recursion, reference.deep_recursion)
    )
    for g, w in zip(got, want, strict=True):
        assert sum(relative_l2(a, b) < ROUNDING for a, b in zip(g, w, strict=True)) >= 12


@pytest.mark.parametrize("shape, layers, cycles", CASES, ids=IDS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_in_bfloat16(mixer, shape, layers, cycles):
    """One update of each state: as near to quantised float32 as quantised bfloat16 is."""
    flat = leaves_for(mixer, *shape[1:], layers=1)
    inputs = [t.bfloat16() for t in states(*shape)]
    got = answers(compiled.deep_recursion, mixer, inputs, flat)
    plain = answers(reference.deep_recursion, mixer, inputs, flat)
    exact = answers(reference.deep_recursion, mixer, [t.float() for t in inputs], flat)
    assert got[0].dtype == got[1].dtype == torch.bfloat16
    assert_as_good(got, plain, exact, torch.bfloat16)


def test_rows_of_any_size():
    """Steps belong to rows: one large state of an item, a zero one and many small ones."""
    flat, inputs = leaves_for("attention", 9, 32, layers=1), states(2, 9, 32)
    sizes = torch.logspace(-4, 4, 9).view(9, 1)
    sizes[4] = 0
    inputs = [t * sizes for t in inputs]
    got, want = (
        answers(f, "attention", inputs, flat)
        for f in (compiled.deep_recursion, reference.deep_recursion)
    )
    for g, w in zip(got, want, strict=True):
        assert g.isfinite().all()
        for token in range(9):
            assert relative_l2(g[:, token], w[:, token]) < QUANTISING


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("mixer", MIXERS)
def test_what_is_not_finite_stays_in_its_board(mixer, bad):
    flat, inputs = leaves_for(mixer, 9, 32), states(3, 9, 32)
    whole = answers(compiled.deep_recursion, mixer, inputs, flat)
    inputs[1][1, 3, 5] = bad
    got = answers(compiled.deep_recursion, mixer, inputs, flat)
    for g, w in zip(got, whole, strict=True):
        assert g[1].isnan().any()
        assert torch.equal(g[0], w[0]) and torch.equal(g[2], w[2])


@pytest.mark.parametrize("batch", [1, 3, 4])
@pytest.mark.parametrize("mixer", MIXERS)
def test_same_bits_on_any_threads(mixer, batch):
    flat = leaves_for(mixer, 33, 80)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [t.to(dtype) for t in states(batch, 33, 80)]
        check_same_bits(
            lambda given=inputs: answers(compiled.deep_recursion, mixer, given, flat, (2, 2))
        )


@pytest.mark.parametrize("mixer", MIXERS)
def test_boards_do_not_know_of_each_other(mixer):
    flat, inputs = leaves_for(mixer, 13, 48), states(3, 13, 48)
    together = answers(compiled.deep_recursion, mixer, inputs, flat, (2, 2))
    alone = answers(compiled.deep_recursion, mixer, [t[1:2] for t in inputs], flat, (2, 2))
    assert all(torch.equal(a[1:2], b) for a, b in zip(together, alone, strict=True))
    for function in (compiled.deep_recursion, reference.deep_recursion):
        none = answers(function, mixer, [t[:0] for t in inputs], flat)
        assert none[0].shape == none[1].shape == (0, 13, 48)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mixer", MIXERS)
def test_with_a_gradient_it_means_nothing(mixer, policy):
    flat, inputs = leaves_for(mixer, 12, 32), states(2, 12, 32)
    tables = rotary(12, 16) if mixer == "attention" else None
    settings = Recursion(2, 2, 2, EPS, policy)
    for function in (compiled.deep_recursion, reference.deep_recursion):
        plain, given = (
            function(OPS, *inputs, blocks_of(mixer, flat), tables, r)
            for r in (settings, replace(settings, quantize="int8"))
        )
        grads = [torch.autograd.grad(y.square().sum(), flat) for y, _ in (plain, given)]
        pairs = zip((*plain, *grads[0]), (*given, *grads[1]), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("mixer", MIXERS)
def test_registered(mixer):
    flat = [t.detach() for t in leaves_for(mixer, 5, 16)]
    tables = (None, None) if mixer == "mlp_t" else rotary(5, 16)
    given = [*states(1, 5, 16), flat, *tables, mixer == "mlp_t", 2, 1, 1, EPS]
    check_registered(int8.deep_recursion_int8, given)
    check_registered(int8._linear, [torch.randn(3, 16), torch.randn(32, 16)])


@pytest.mark.parametrize("mixer", MIXERS)
def test_compiles_as_one_graph(mixer):
    flat, inputs = leaves_for(mixer, 5, 16, layers=1), states(1, 5, 16)
    blocks, settings = blocks_of(mixer, flat), Recursion(2, 1, 1, EPS, quantize="int8")
    tables = rotary(5, 16) if mixer == "attention" else None

    def answer(x, y, z):
        return compiled.deep_recursion(OPS, x + 1, y, z, blocks, tables, settings)[0] + 1

    with torch.no_grad():
        got = torch.compile(answer, fullgraph=True, dynamic=False, backend="aot_eager")(*inputs)
        assert torch.equal(got, answer(*inputs))


def test_refuses():
    flat, given = leaves_for("attention", 5, 16, layers=1), states(1, 5, 16)
    with pytest.raises(ValueError, match="compiled extension serves no dropout"), torch.no_grad():
        settings = Recursion(1, 1, 1, EPS, dropout=0.1, quantize="int8")
        compiled.deep_recursion(OPS, *given, blocks_of("attention", flat), None, settings)
    a, w = torch.randn(4, 32), torch.randn(48, 32)
    for arguments, text in (
        ((a.half(), w), "not float16"),
        ((a[:, :24], w[:, :24]), "width of a that is a multiple of 16, not 24"),
        ((a, w[:40]), "number of columns"),
        ((a, w[:, :16]), "needs w of width 32"),
        ((torch.zeros(1, 131088), torch.zeros(16, 131088)), "up to a width of 131072"),
    ):
        with pytest.raises(ValueError, match=text):
            int8.linear(*arguments)
    with pytest.raises(ValueError, match="has no products in int8 on GPUs"), torch.no_grad():
        settings = Recursion(1, 1, 1, EPS, quantize="int8")
        kernel.deep_recursion(OPS, *given, blocks_of("attention", flat), None, settings)


def test_the_operations_refuse_what_would_read_out_of_bounds():
    a, w = torch.randn(4, 32), torch.randn(48, 32)
    for arguments, text in (
        ((a[0], w), r"a and w are \[N, E\]"),
        ((a[:, :24].contiguous(), w[:, :24].contiguous()), "multiples of 16"),
        ((a[:, :16].contiguous(), w), "a is"),
        ((a, w.bfloat16()), "w has dtype"),
        ((a.t().contiguous().t(), w), "a is not contiguous"),
        ((torch.zeros(1, 131088), torch.zeros(16, 131088)), "up to 131072"),
    ):
        with pytest.raises(RuntimeError, match=text):
            int8._linear(*arguments)
    flat = [t.detach() for t in leaves_for("mlp_t", 5, 16, layers=1)]
    x, y, z = states(2, 5, 16)
    good = [x, y, z, flat, None, None, True, 1, 1, 1, EPS]
    for changes, text in (
        ({1: y[:1]}, "y is"),
        ({2: z.bfloat16()}, "z has dtype"),
        ({0: x.transpose(0, 1).contiguous().transpose(0, 1)}, "x is not contiguous"),
        ({3: flat[:3]}, "four weights per block"),
        ({3: [*flat[:3], flat[3].t()]}, "gate_up is|down is"),
        ({7: 0}, "must be positive"),
    ):
        given = [changes.get(i, value) for i, value in enumerate(good)]
        with pytest.raises(RuntimeError, match=text):
            int8.deep_recursion_int8(*given)
