"""Steps that must change nothing: optimizers, the average, and the guard that says which."""

import math

import pytest
import torch
from test_optim import Toy, assert_same, config, state_of
from torch import nn

from trm_fast.ema import EMA
from trm_fast.optim import AdamATan2, NonFiniteGuard, build_optimizers, clip_gradients

KINDS = ["adam_atan2", "adamw", "muon"]


def step(model, optimizers, ema, found_inf, bad=None):
    model(torch.arange(5).repeat(2)[:6]).square().sum().backward()
    if bad is not None:
        for p in [*model.parameters(), model.puzzle_emb.local_weights]:
            p.grad.fill_(bad)
    for optimizer, _ in optimizers:
        optimizer.found_inf = None if found_inf is None else torch.tensor(found_inf)
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(1e-2)
        optimizer.step()
        optimizer.zero_grad()
    ema.update(model, None if found_inf is None else torch.tensor(found_inf))


def values(optimizers):
    """All state of the optimizers as one flat list."""
    return [
        float(value) if torch.as_tensor(value).ndim == 0 else value.clone()
        for optimizer, _ in optimizers
        for state in optimizer.state_dict()["state"].values()
        for value in state.values()
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_left_out_changes_nothing_and_the_next_goes_on(kind, bad):
    torch.manual_seed(0)
    one = Toy()
    torch.manual_seed(0)
    other = Toy()
    settings = config(optimizer=kind)
    runs = [(m, build_optimizers(m, settings), EMA(m, 0.9, True)) for m in (one, other)]
    for model, optimizers, ema in runs:
        step(model, optimizers, ema, 0.0)
    before, kept = state_of(one), values(runs[0][1])
    step(*runs[0], 1.0, bad)
    assert_same(before, state_of(one))
    for was, now in zip(kept, values(runs[0][1]), strict=True):
        assert torch.equal(torch.as_tensor(was), torch.as_tensor(now))
    for model, optimizers, ema in runs:
        step(model, optimizers, ema, 0.0)
    assert_same(state_of(one), state_of(other))
    assert_same(runs[0][2].shadow, runs[1][2].shadow)
    assert runs[0][2].updates == runs[1][2].updates == 2
    assert not torch.equal(before["q_head.weight"], one.q_head.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_that_says_no_is_no_number_at_all(kind):
    runs = []
    for found_inf in (0.0, None):
        torch.manual_seed(0)
        model = Toy()
        optimizers, ema = build_optimizers(model, config(optimizer=kind)), EMA(model, 0.9)
        for _ in range(3):
            step(model, optimizers, ema, found_inf)
        runs.append(state_of(model) | {f"ema.{n}": v for n, v in ema.shadow.items()})
    assert_same(*runs)


IDS = torch.tensor([3, 1, 3])
FINE = torch.tensor(1.0)


def check(guard, number, loss=FINE, norm=FINE, ids=IDS):
    loss, norm = torch.as_tensor(loss), torch.as_tensor(norm)
    return float(guard.check(torch.tensor(number), loss, norm, ids))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_gradient_is_refused_counted_and_finally_too_much(bad):
    guard = NonFiniteGuard(2, IDS)
    assert check(guard, 1) == 0 and check(guard, 2, norm=bad) == 1 and check(guard, 3) == 0
    state = guard.read()
    assert (state.skipped, state.consecutive, state.stopped_at) == (1, 0, 0)
    assert str(state.norm) == str(bad) and state.loss == 1
    again = NonFiniteGuard(2, IDS)
    again.load_state_dict(guard.state_dict())
    assert check(again, 4, norm=bad) == 1 and again.read().stopped_at == 0
    assert check(again, 5, norm=bad, ids=torch.tensor([2, 7, 2])) == 1
    assert again.read()[:3] == (3, 2, 5) and again.identifiers().unique().tolist() == [2, 7]
    assert check(again, 6) == 1, "nothing is changed any more"
    assert again.read()[:3] == (3, 2, 5) and again.identifiers().unique().tolist() == [2, 7]


def test_a_loss_that_is_not_finite_stops_at_once():
    guard = NonFiniteGuard(5, IDS)
    assert check(guard, 7, loss=math.nan) == 1
    state = guard.read()
    assert state.stopped_at == 7 and math.isnan(state.loss)
    assert guard.identifiers().unique().tolist() == [1, 3]
    assert check(guard, 8, loss=math.inf) == 1 and guard.read().stopped_at == 7
    assert math.isnan(guard.read().loss), "the first one is what is told"


def test_gradients_of_rows_count_too():
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.tensor([1.0, math.nan])
    guard = NonFiniteGuard(5, IDS)
    assert check(guard, 1, norm=clip_gradients([(AdamATan2([p]), 1.0)], 1.0)) == 1
