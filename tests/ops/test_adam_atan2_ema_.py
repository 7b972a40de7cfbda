"""adam_atan2_ema_: one optimizer step, the moving average and the low-precision copies, in place.

tests/test_optim.py checks the optimizer built on it; this file checks the operation alone.
"""

import math

import pytest
import torch
from op_checks import DTYPES
from parity import assert_parity, make_inputs

from trm_fast.reference import adam_atan2_ema_

SETTINGS = {"lr": 0.01, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "ema_decay": 0.99}
SHAPES = [(64, 32), (97, 3), (1,), (0, 8)]


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
