"""adam_atan2_ema_: one optimizer step, the moving average and the low-precision copies, in place.

tests/test_optim.py checks the optimizer built on it; this file checks the operation alone.
"""

import math

import pytest
import torch
import torch._inductor.config
import triton
import triton.language as tl
from kernel_checks import DEVICE, check_registered
from op_checks import DTYPES
from parity import assert_parity, make_inputs

from trm_fast.extension import adam_atan2_ema_ as compiled
from trm_fast.kernels import adam_atan2_ema_ as kernel
from trm_fast.kernels.adam_atan2_ema_ import _atan2
from trm_fast.kernels.adam_atan2_ema_ import adam_atan2_ema_ as triton_adam_atan2_ema_
from trm_fast.reference import adam_atan2_ema_

SETTINGS = {"lr": 0.01, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "ema_decay": 0.99}
SHAPES = [(64, 32), (97, 3), (1,), (0, 8)]
EVERY_SETTING = pytest.mark.parametrize(
    "setting",
    [
        {"lr": 0.5},
        {"weight_decay": 0.0},
        {"beta1": 0.2},
        {"beta1": 0.0},
        {"beta2": 0.3},
        {"ema_decay": 0.1},
        {"ema_decay": 1.0},
        {"steps": 20},
    ],
    ids=lambda setting: "-".join(f"{k}{v}" for k, v in setting.items()),
)


def scalar_step(p, g, m, v, ema, step, settings):
    """The published update of one number, in Python's float64."""
    m = settings["beta1"] * m + (1 - settings["beta1"]) * g
    v = settings["beta2"] * v + (1 - settings["beta2"]) * g * g
    p = p * (1 - settings["lr"] * settings["weight_decay"])
    size = math.sqrt(v / (1 - settings["beta2"] ** step))
    p = p - settings["lr"] / (1 - settings["beta1"] ** step) * math.atan2(m, size)
    return p, m, v, settings["ema_decay"] * ema + (1 - settings["ema_decay"]) * p


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_three_steps_against_a_scalar_loop(dtype):
    params = make_inputs(*SHAPES, dtype=dtype)
    emas, exp_avgs, exp_avg_sqs = ([torch.zeros_like(p) for p in params] for _ in range(3))
    emas = [p.clone() for p in params]
    rows = [[(p.item(), 0.0, 0.0, p.item()) for p in tensor.flatten()] for tensor in params]
    for step in (1, 2, 3):
        grads = make_inputs(*SHAPES, dtype=dtype, seed=step, scale=10.0 ** (step - 2))
        grads[1][0] = 0.0
        before = [g.clone() for g in grads]
        adam_atan2_ema_(params, grads, exp_avgs, exp_avg_sqs, emas, [], step=step, **SETTINGS)
        assert all(torch.equal(a, b) for a, b in zip(grads, before, strict=True))
        rows = [
            [
                scalar_step(p, g.item(), m, v, ema, step, SETTINGS)
                for (p, m, v, ema), g in zip(row, grad.flatten(), strict=True)
            ]
            for row, grad in zip(rows, grads, strict=True)
        ]
    for i, (shape, row) in enumerate(zip(SHAPES, rows, strict=True)):
        want = torch.tensor(row, dtype=torch.float64).view(-1, 4).T.reshape(4, *shape)
        got = [params[i], exp_avgs[i], exp_avg_sqs[i], emas[i]]
        for name, g, w in zip(("param", "exp_avg", "exp_avg_sq", "ema"), got, want, strict=True):
            assert_parity(g, w, name=f"{name} {shape}")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_low_precision_copies(dtype):
    params = make_inputs((97, 3), (8,))
    copies = [torch.full_like(p, 7.0, dtype=dtype) for p in params]
    states = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    grads = make_inputs((97, 3), (8,), seed=1)
    adam_atan2_ema_(params, grads, *states, [], copies, step=1, **SETTINGS)
    for p, copy in zip(params, copies, strict=True):
        assert torch.equal(copy, p.to(dtype))


def test_low_precision_gradients_and_parameters():
    """Averages in float32 take gradients as they are; a bf16 parameter stays within its grid."""
    (p, g) = make_inputs((64,), (64,), dtype=torch.bfloat16)
    wide = p.float()
    low_states = [[torch.zeros(64)], [torch.zeros(64)]]
    wide_states = [[torch.zeros(64)], [torch.zeros(64)]]
    adam_atan2_ema_([p], [g], *low_states, [], [], step=1, **SETTINGS)
    adam_atan2_ema_([wide], [g.float()], *wide_states, [], [], step=1, **SETTINGS)
    for low, full in zip(low_states, wide_states, strict=True):
        assert torch.equal(low[0], full[0])
    torch.testing.assert_close(p.float(), wide, atol=1e-2, rtol=1.6e-2)


@pytest.mark.parametrize(
    "change, differs",
    [
        ({"lr": 0.02}, "param"),
        ({"weight_decay": 0.0}, "param"),
        ({"beta1": 0.5}, "exp_avg"),
        ({"beta2": 0.5}, "exp_avg_sq"),
        ({"ema_decay": 0.5}, "ema"),
        ({"step": 5}, "param"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else None,
)
def test_every_setting_counts(change, differs):
    def after(**settings):
        p, g, m, ema = make_inputs((4,), (4,), (4,), (4,))
        v = m.square()
        adam_atan2_ema_([p], [g], [m], [v], [ema], [], **settings)
        return {"param": p, "exp_avg": m, "exp_avg_sq": v, "ema": ema}

    settings = {**SETTINGS, "step": 2}
    plain, changed = after(**settings), after(**{**settings, **change})
    assert not torch.equal(plain[differs], changed[differs])


IMPLEMENTATIONS = {
    "reference": (adam_atan2_ema_, torch.device("cpu")),
    "kernel": (triton_adam_atan2_ema_, DEVICE),
    "extension": (compiled.adam_atan2_ema_, torch.device("cpu")),
}


@pytest.fixture(params=IMPLEMENTATIONS)
def step_of(request):
    """One step on copies of given tensors by an implementation: everything it changes."""
    if request.param == "extension":
        request.getfixturevalue("extension")
    function, device = IMPLEMENTATIONS[request.param]

    def step(given, **settings):
        p, g, m, v, ema, low = (t.clone().to(device) for t in given)
        on_device = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in settings.items()
        }
        function([p], [g], [m], [v], [ema], [low], **on_device)
        torch.testing.assert_close(g.cpu(), given[1], rtol=0, atol=0, equal_nan=True)
        return [t.cpu() for t in (p, m, v, ema, low)]

    return step


def tensors_of_a_step():
    *given, v, low = make_inputs(*[(37,)] * 6)
    p, g, m, ema = given
    return p, g, m, v.square(), ema, low.bfloat16()


def test_what_changes_may_come_in_tensors(step_of):
    given = tensors_of_a_step()
    wide = {name: torch.tensor(SETTINGS[name], dtype=torch.float64) for name in ("lr", "ema_decay")}
    want = step_of(given, step=7, **SETTINGS)
    got = step_of(given, step=torch.tensor(7), **SETTINGS | wide)
    narrow = step_of(given, step=torch.tensor(7), **SETTINGS)
    for w, g, n in zip(want, got, narrow, strict=True):
        assert torch.equal(g, w) and torch.equal(n, w)


@pytest.mark.parametrize("scale", [0.25, torch.tensor(0.25)], ids=["number", "tensor"])
def test_the_gradient_is_scaled(scale, step_of):
    p, g, *rest = tensors_of_a_step()
    want = step_of((p, 0.25 * g, *rest), step=2, **SETTINGS)
    got = step_of((p, g, *rest), step=2, grad_scale=scale, **SETTINGS)
    for w, s in zip(want, got, strict=True):
        assert torch.equal(w, s)


@pytest.mark.parametrize("found", [1.0, torch.tensor(1.0), torch.tensor(True)], ids=str)
def test_nothing_changes_where_the_gradient_is_not_finite(found, step_of):
    p, g, m, v, ema, low = tensors_of_a_step()
    g[3] = float("nan")
    for before, after in zip(
        (p, m, v, ema, low),
        step_of((p, g, m, v, ema, low), step=2, found_inf=found, **SETTINGS),
        strict=True,
    ):
        assert torch.equal(before, after)
    done = step_of((p, g, m, v, ema, low), step=2, found_inf=0 * found, **SETTINGS)
    assert torch.isnan(done[0]).sum() == 1


def test_no_gradient_at_all_keeps_the_weights():
    (p,) = make_inputs((4,))
    before = p.clone()
    zeros = [torch.zeros(4) for _ in range(3)]
    settings = {**SETTINGS, "weight_decay": 0.0}
    adam_atan2_ema_([p], zeros[:1], zeros[1:2], zeros[2:], [], [], step=1, **settings)
    assert torch.equal(p, before)


def test_invariant_to_the_scale_of_the_gradient():
    results = []
    for scale in (1e-3, 1e3):
        p, g = make_inputs((32,), (32,), dtype=torch.float64)
        states = [[torch.zeros_like(p)], [torch.zeros_like(p)]]
        adam_atan2_ema_([p], [g * scale], *states, [], [], step=1, **SETTINGS)
        results.append(p)
    torch.testing.assert_close(*results)


def test_lists_of_unequal_length_are_refused():
    (p, g) = make_inputs((4,), (4,))
    with pytest.raises(ValueError, match="zip"):
        adam_atan2_ema_([p], [g, g], [g], [g], [], [], step=1, **SETTINGS)


@triton.jit
def _atan2_kernel(m_ptr, s_ptr, out_ptr, count, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    m = tl.load(m_ptr + offs, mask=mask, other=0.0)
    s = tl.load(s_ptr + offs, mask=mask, other=0.0)
    tl.store(out_ptr + offs, _atan2(m, s), mask=mask)


def kernel_atan2(m, s):
    m, s = m.to(DEVICE), s.to(DEVICE)
    out = torch.empty_like(m)
    _atan2_kernel[(triton.cdiv(m.numel(), 65536),)](m, s, out, m.numel(), BLOCK=65536)
    return out.cpu()


def test_kernel_atan2_over_the_whole_range():
    """Ratios around every kind of angle, magnitudes over all of float32; errors in last places."""
    generator = torch.Generator().manual_seed(4)
    size = torch.rand(400_000, generator=generator, dtype=torch.float64) * 70 - 35
    angle = torch.rand(400_000, generator=generator, dtype=torch.float64) * math.pi - math.pi / 2
    tilt = torch.linspace(-16, 16, 200_000, dtype=torch.float64)  # beside both axes, too
    m = torch.cat([10.0 ** size[:200_000] * angle[:200_000].sin(), 10.0 ** tilt.clamp(max=0)])
    s = torch.cat([10.0 ** size[:200_000] * angle[:200_000].cos(), 10.0 ** -tilt.clamp(min=0)])
    m, s = m.float(), s.float()
    exact = torch.atan2(m.double(), s.double())
    got = kernel_atan2(m, s)
    last_place = torch.finfo(torch.float32).eps * 2.0 ** torch.floor(torch.log2(exact.abs()))
    assert ((got.double() - exact).abs() / last_place).max() < 2
    assert torch.equal(kernel_atan2(-m, s), -got)


def test_kernel_atan2_at_the_edges():
    inf, nan, tiny, huge = float("inf"), float("nan"), 1e-45, 3.4e38
    values = [0.0, tiny, 1e-38, 1.0, huge, inf, nan]
    s, m = torch.meshgrid(torch.tensor(values), torch.tensor(values), indexing="ij")
    s, m = s.flatten(), torch.stack([m.flatten(), -m.flatten()])
    got = kernel_atan2(m, s.expand_as(m).contiguous())
    torch.testing.assert_close(got, torch.atan2(m, s), rtol=3e-7, atol=0, equal_nan=True)


def on_device(*lists):
    return [[t.to(DEVICE) for t in tensors] for tensors in lists]


def both_after(params, grads, copies_dtype, steps=3, **settings):
    """(reference, kernel) after some steps: params, averages, EMA and copies of each, in order."""
    results = []
    for step_of, device in ((adam_atan2_ema_, "cpu"), (triton_adam_atan2_ema_, DEVICE)):
        p, g = ([t.clone().to(device) for t in tensors] for tensors in (params, grads))
        m, v = ([torch.zeros_like(t, dtype=torch.float32) for t in p] for _ in range(2))
        ema = [t.clone() for t in p]
        copies = [torch.full_like(t, 7.0, dtype=copies_dtype) for t in p]
        for step in range(1, steps + 1):
            step_of(p, g, m, v, ema, copies, step=step, **{**SETTINGS, **settings})
            assert all(torch.equal(a.cpu(), b) for a, b in zip(g, grads, strict=True))
        results.append([t.cpu() for t in (*p, *m, *v, *ema, *copies)])
    return results


@pytest.mark.parametrize("gradients", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("weights", DTYPES.values(), ids=DTYPES)
def test_kernel_against_the_reference(weights, gradients):
    params = make_inputs(*SHAPES, (3, 700), dtype=weights)
    grads = make_inputs(*SHAPES, (3, 700), dtype=gradients, seed=1)
    grads[1][0] = 0.0
    for want, got in zip(*both_after(params, grads, torch.bfloat16), strict=True):
        assert got.dtype == want.dtype
        assert_parity(got, want)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_kernel_copies_are_the_rounded_weights(dtype):
    params, grads = make_inputs((97, 3), (8,)), make_inputs((97, 3), (8,), seed=1)
    _, got = both_after(params, grads, dtype)
    for p, copy in zip(got[:2], got[-2:], strict=True):
        assert torch.equal(copy, p.to(dtype))


@EVERY_SETTING
def test_kernel_every_setting_counts(setting):
    params, grads = make_inputs((40,)), make_inputs((40,), seed=1)
    for want, got in zip(*both_after(params, grads, torch.float16, **setting), strict=True):
        assert_parity(got, want)


def test_kernel_without_averages_and_with_fewer_of_them():
    params, grads = on_device(make_inputs((5,), (6,)), make_inputs((5,), (6,), seed=1))
    plain = [t.clone() for t in params]
    m, v, m2, v2 = ([torch.zeros_like(t) for t in params] for _ in range(4))
    ema = [torch.zeros_like(params[0])]
    triton_adam_atan2_ema_(plain, grads, m, v, [], [], step=1, **SETTINGS)
    triton_adam_atan2_ema_(params, grads, m2, v2, ema, [], step=1, **SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(plain, params, strict=True))
    assert_parity(ema[0], 0.01 * params[0])


def test_kernel_tensors_that_are_not_contiguous():
    base, g = make_inputs((6, 7), (7, 6), device=DEVICE)
    p = base.t()
    m, v, ema, copy = (torch.zeros_like(p) for _ in range(4))  # they keep the layout
    want = [p.contiguous(), *(torch.zeros(7, 6, device=DEVICE) for _ in range(4))]
    got = [p, m, v, ema, copy]
    for tensors in (want, got):
        p, *rest = ([t] for t in tensors)
        triton_adam_atan2_ema_(p, [g], *rest, step=1, **SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_kernel_shows_a_gradient_that_is_not_a_number():
    params = [torch.ones(3, device=DEVICE)]
    grads = [torch.tensor([1.0, float("nan"), 1.0], device=DEVICE)]
    m, v = ([torch.zeros(3, device=DEVICE)] for _ in range(2))
    triton_adam_atan2_ema_(params, grads, m, v, [], [], step=1, **SETTINGS)
    assert torch.isnan(params[0]).tolist() == [False, True, False]


def test_kernel_is_registered_and_tells_what_it_changes():
    values = [[t] for t in make_inputs(*[(3, 4)] * 5, device=DEVICE)]
    values.append([torch.zeros(3, 4, dtype=torch.bfloat16, device=DEVICE)])
    values[3][0].square_()
    coefficients = torch.tensor([1.0, 0.999, 0.05, 0.0975, 0.01, 0.0])
    settings = (coefficients.to(values[0][0].device), 0.9, 0.95)
    check_registered(kernel._fwd, (*values, *settings))
    before = [tensors[0]._version for tensors in values]
    kernel._fwd(*values, *settings)
    changed = [tensors[0]._version > old for tensors, old in zip(values, before, strict=True)]
    assert changed == [True, False, True, True, True, True]


def test_kernel_compiles_as_one_graph():
    def stepped(p, g, m, v):
        p, m, v = p.clone(), m.clone(), v.clone()
        triton_adam_atan2_ema_([p], [g], [m], [v], [], [], step=2, **SETTINGS)
        return p, m, v

    given = make_inputs(*[(3, 4)] * 4, device=DEVICE)
    given[3].square_()
    compiled = torch.compile(stepped, fullgraph=True, dynamic=False)
    for got, want in zip(compiled(*given), stepped(*given), strict=True):
        torch.testing.assert_close(got, want)


def test_kernel_says_what_it_does_not_serve():
    (t,) = make_inputs((4,), device=DEVICE)
    with pytest.raises(ValueError, match=r"adam_atan2_ema_ .* parameters, not \[1, 2, 1, 1\]"):
        triton_adam_atan2_ema_([t], [t, t], [t], [t], [], [], step=1, **SETTINGS)
    with pytest.raises(ValueError, match="bfloat16, float16 and float32, not float64"):
        triton_adam_atan2_ema_([t], [t], [t], [t.double()], [], [], step=1, **SETTINGS)
