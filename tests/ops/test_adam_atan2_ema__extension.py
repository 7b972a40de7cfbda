"""adam_atan2_ema_ of the compiled extension: against the reference, at the edges, refused."""

import math

import pytest
import torch
import torch._inductor.config
from extension_checks import check_same_bits
from kernel_checks import check_registered
from op_checks import CPU, DTYPES
from parity import assert_parity, make_inputs
from test_adam_atan2_ema_ import EVERY_SETTING, SETTINGS, SHAPES

from trm_fast.extension import adam_atan2_ema_ as compiled
from trm_fast.reference import adam_atan2_ema_

# Tails of every vector, an empty tensor, and enough elements for several threads.
EXTENSION_SHAPES = [*SHAPES, (5,), (3, 700), (300, 129)]
EXTENSION_DTYPES = {tag: DTYPES[tag] for tag in ("fp32", "bf16")}


def after_steps(function, params, grads, copies_dtype, steps=3, **settings):
    """Parameters, averages, EMA and copies after some steps, in order."""
    p = [t.clone() for t in params]
    m, v = ([torch.zeros_like(t, dtype=torch.float32) for t in p] for _ in range(2))
    ema = [t.clone() for t in p]
    copies = [torch.full_like(t, 7.0, dtype=copies_dtype) for t in p]
    for step in range(1, steps + 1):
        given = [-0.7 * step * g for g in grads]
        before = [g.clone() for g in given]
        function(p, given, m, v, ema, copies, step=step, **{**SETTINGS, **settings})
        torch.testing.assert_close(given, before, rtol=0, atol=0, equal_nan=True)
    return [*p, *m, *v, *ema, *copies]


@pytest.mark.parametrize("gradients", EXTENSION_DTYPES.values(), ids=EXTENSION_DTYPES)
@pytest.mark.parametrize("weights", EXTENSION_DTYPES.values(), ids=EXTENSION_DTYPES)
def test_extension_against_the_reference(weights, gradients, extension):
    params = make_inputs(*EXTENSION_SHAPES, dtype=weights)
    grads = make_inputs(*EXTENSION_SHAPES, dtype=gradients, seed=1)
    grads[1][0] = 0.0
    want, got = (
        after_steps(f, params, grads, torch.bfloat16)
        for f in (adam_atan2_ema_, compiled.adam_atan2_ema_)
    )
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        assert_parity(g, w)
    count = len(params)
    for p, copy in zip(got[:count], got[-count:], strict=True):
        assert torch.equal(copy, p.to(torch.bfloat16))


@EVERY_SETTING
def test_extension_every_setting_counts(setting, extension):
    params, grads = make_inputs((40,)), make_inputs((40,), seed=1)
    want, got = (
        after_steps(f, params, grads, torch.float32, **setting)
        for f in (adam_atan2_ema_, compiled.adam_atan2_ema_)
    )
    for g, w in zip(got, want, strict=True):
        assert_parity(g, w)


def extension_atan2(m, v):
    """atan2(m, sqrt(v)) of the kernel: a weight of zero, no gradient, halved averages, rate -1."""
    p, grad = torch.zeros_like(m), torch.zeros_like(m)
    settings = {"lr": -0.5, "weight_decay": 0.0, "beta1": 0.5, "beta2": 0.5, "ema_decay": 0.0}
    compiled.adam_atan2_ema_([p], [grad], [2 * m], [v.clone()], [], [], step=1, **settings)
    return p


def test_extension_atan2_over_the_whole_range(extension):
    """Ratios around every kind of angle, magnitudes over all that a square holds."""
    generator = torch.Generator().manual_seed(4)
    size = torch.rand(400_000, generator=generator, dtype=torch.float64) * 34 - 17
    angle = torch.rand(400_000, generator=generator, dtype=torch.float64) * math.pi - math.pi / 2
    tilt = torch.linspace(-15, 15, 200_000, dtype=torch.float64)  # beside both axes, too
    m = torch.cat([10.0**size * angle.sin(), 10.0 ** tilt.clamp(max=0)]).float()
    s = torch.cat([10.0**size * angle.cos(), 10.0 ** -tilt.clamp(min=0)])
    v = s.square().float()
    exact = torch.atan2(m.double(), v.double().sqrt())
    got = extension_atan2(m, v)
    last_place = torch.finfo(torch.float32).eps * 2.0 ** torch.floor(torch.log2(exact.abs()))
    assert ((got.double() - exact).abs() / last_place).max() < 3  # one of them is the root's
    assert torch.equal(extension_atan2(-m, v), -got)


def test_extension_atan2_at_the_edges(extension):
    inf, nan = float("inf"), float("nan")
    values = [0.0, 3e-45, 1e-38, 1.0, 1.6e38, inf, nan]
    v, m = torch.meshgrid(torch.tensor(values), torch.tensor(values), indexing="ij")
    v, m = v.flatten(), torch.stack([m.flatten(), -m.flatten()])
    got = extension_atan2(m, v.expand_as(m))
    torch.testing.assert_close(got, torch.atan2(m, v.sqrt()), rtol=4e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, 1e-30])
def test_extension_takes_odd_gradients_as_the_reference_does(value, extension):
    params, grads = make_inputs((21,)), make_inputs((21,), seed=1)
    grads[0][[1, 20]] = value  # one in a vector, one in a tail
    want, got = (
        after_steps(f, params, grads, torch.float32)
        for f in (adam_atan2_ema_, compiled.adam_atan2_ema_)
    )
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, equal_nan=True)
    assert torch.isfinite(got[0][[0, 2, 15, 16, 19]]).all()  # its neighbours never notice


def test_extension_without_averages_and_with_fewer_of_them(extension):
    params, grads = make_inputs((5,), (6,)), make_inputs((5,), (6,), seed=1)
    plain = [t.clone() for t in params]
    m, v, m2, v2 = ([torch.zeros_like(t) for t in params] for _ in range(4))
    ema, more = [torch.zeros_like(params[0])], [torch.zeros(5), torch.zeros(6), torch.ones(7)]
    compiled.adam_atan2_ema_(plain, grads, m, v, [], [], step=1, **SETTINGS)
    compiled.adam_atan2_ema_(params, grads, m2, v2, ema, more, step=1, **SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(plain, params, strict=True))
    assert_parity(ema[0], 0.01 * params[0])
    assert torch.equal(more[1], params[1])
    assert torch.equal(more[2], torch.ones(7))
    compiled.adam_atan2_ema_([], [], [], [], [], [], step=1, **SETTINGS)


def test_extension_tensors_that_are_not_contiguous(extension):
    base, g = make_inputs((6, 7), (7, 6))
    p = base.t()
    m, v, ema, copy = (torch.zeros_like(p) for _ in range(4))  # they keep the layout
    want = [p.contiguous(), *(torch.zeros(7, 6) for _ in range(4))]
    got = [p, m, v, ema, copy]
    for tensors in (want, got):
        p, *rest = ([t] for t in tensors)
        compiled.adam_atan2_ema_(p, [g], *rest, step=1, **SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_extension_gives_the_same_bits_on_any_threads(extension):
    params = make_inputs(*EXTENSION_SHAPES)
    grads = make_inputs(*EXTENSION_SHAPES, seed=1)
    check_same_bits(lambda: after_steps(compiled.adam_atan2_ema_, params, grads, torch.bfloat16))


def test_extension_does_not_depend_on_where_a_tensor_begins(extension):
    """The same elements alone, and behind others that shift vectors and threads' shares."""
    (p, g) = make_inputs((40_000,), (40_000,))
    cuts = [(0, 13), (13, 33_001), (33_001, 40_000)]
    whole = after_steps(compiled.adam_atan2_ema_, [p], [g], torch.bfloat16)
    parts = after_steps(
        compiled.adam_atan2_ema_, *([t[a:b] for a, b in cuts] for t in (p, g)), torch.bfloat16
    )
    for i, t in enumerate(whole):
        assert torch.equal(torch.cat(parts[3 * i : 3 * i + 3]), t)


def test_extension_is_registered_and_tells_what_it_changes(extension):
    values = [[t] for t in make_inputs(*[(3, 4)] * 5)]
    values.append([torch.zeros(3, 4, dtype=torch.bfloat16)])
    values[3][0].square_()
    coefficients = torch.tensor([1.0, 0.999, 0.05, 0.0975, 0.01, 0.0])
    settings = (coefficients.to(values[0][0].device), 0.9, 0.95)
    check_registered(compiled._step, (*values, *settings))
    for mode in (torch.enable_grad, torch.no_grad):
        before = [tensors[0]._version for tensors in values]
        with mode():
            compiled._step(*values, *settings)
        changed = [tensors[0]._version > old for tensors, old in zip(values, before, strict=True)]
        assert changed == [True, False, True, True, True, True]


def test_extension_compiles_as_one_graph(extension):
    def stepped(p, g, m, v):
        p, m, v = p.clone(), m.clone(), v.clone()
        compiled.adam_atan2_ema_([p], [g], [m], [v], [], [], step=2, **SETTINGS)
        return p, m, v

    given = make_inputs(*[(3, 4)] * 4)
    given[3].square_()
    # What a compiler makes of in-place work, without one that takes half a minute over it.
    graph = torch.compile(stepped, fullgraph=True, dynamic=False, backend="aot_eager")
    for got, want in zip(graph(*given), stepped(*given), strict=True):
        torch.testing.assert_close(got, want)


def test_extension_refuses(extension):
    t, other = torch.ones(4), torch.ones(2, 2)
    for lists, text in (
        (([t], [t, t], [t], [t], [], []), r"gradients and averages .*, not \[1, 2, 1, 1\]"),
        (([t], [t], [t], [t.double()], [], []), "float32 and bfloat16, not float64"),
        (([t], [t], [t], [t], [], [t.half()]), "float32 and bfloat16, not float16"),
        (([t], [t], [other], [t], [], []), r"needs tensors of \[4\] .*, not \[2, 2\]"),
        (([t], [t], [t], [t], [other], []), r"needs tensors of \[4\] .*, not \[2, 2\]"),
    ):
        with pytest.raises(ValueError, match=f"adam_atan2_ema_ of the .* {text}"):
            compiled.adam_atan2_ema_(*lists, step=1, **SETTINGS)
    strided = torch.ones(8)[::2]
    for i, name in enumerate(("params", "grads", "exp_avgs", "exp_avg_sqs", "emas", "copies")):
        for wrong, text in (
            (torch.ones(5), "expected [45] elements as its parameter has"),
            (strided, f"one of {name} is not contiguous"),
            (t.half(), "expected float32 or bfloat16"),
        ):
            lists = [[t] for _ in range(6)]
            lists[i] = [wrong]
            with pytest.raises(RuntimeError, match=text):
                compiled._step(*lists, torch.ones(6), 0.9, 0.95)
    with pytest.raises(RuntimeError, match="2 gradients, 1 and 1 averages for 1 parameters"):
        compiled._step([t], [t, t], [t], [t], [], [], torch.ones(6), 0.9, 0.95)
    for wrong in (torch.ones(5), torch.ones(6).double(), torch.ones(12)[::2]):
        with pytest.raises(RuntimeError, match="coefficients"):
            compiled._step([t], [t], [t], [t], [], [], wrong, 0.9, 0.95)


def test_extension_says_beforehand_what_it_does_not_serve():
    assert compiled.unsupported(torch.bfloat16, None, CPU) is None
    assert "not float64" in compiled.unsupported(torch.float64, None, CPU)
