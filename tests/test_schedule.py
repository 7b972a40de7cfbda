"""The order of rollouts and what ends them, against one at a time, for any room."""

import numpy as np
import pytest

from trm_fast.reasoning import Reasoning
from trm_fast.schedule import Schedule

P, K, D = 7, 9, 4


def script(seed):
    """Per item: the step it ends at by itself, and the one at which it finds an answer, D + 1 for
    never."""
    rng = np.random.default_rng(seed)
    ends = rng.integers(1, D + 1, P * K)
    finds = np.where(rng.random(P * K) < 0.12, rng.integers(1, D + 1, P * K), D + 1)
    finds[:K] = D + 1  # a puzzle that none answers
    return ends, finds


def plan_of(**settings):
    asked = {"depth": D, "rollouts": K, "select": "first-q", "threshold": 1.0}
    return Reasoning(**asked | settings)


def work(schedule, ends, finds, width, spare):
    """(steps of each item, the most items of a puzzle at a time, steps made)."""
    taken, places, made, most = np.zeros(P * K, np.int64), [], 0, 0
    begun = set()
    while True:
        new = schedule.take(width - len(places), spare - len(places))
        assert len(places) + len(new) <= width and not begun & set(new), "each is begun once"
        begun |= set(new)
        places += new
        if not places:
            return taken, most, made
        items = np.array(places)
        taken[items] += 1
        made += 1
        most = max(most, int(np.bincount(items // K).max()))
        over = schedule.note(
            items, taken[items], taken[items] == finds[items], taken[items] >= ends[items]
        )
        places = items[~over].tolist()


def one_at_a_time(ends, finds):
    steps = np.zeros((P, K), np.int64)
    for p in range(P):
        for k in range(K):
            steps[p, k] = min(ends[p * K + k], finds[p * K + k], D)
            if finds[p * K + k] == steps[p, k]:
                break
    return steps


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("width", "spare"), [(1, 0), (1, 9), (4, 4), (16, 0), (16, 16), (99, 8)])
def test_what_is_begun_ahead_changes_no_record(seed, width, spare):
    ends, finds = script(seed)
    schedule = Schedule(P, plan_of(schedule="sequential"))
    taken, most, made = work(schedule, ends, finds, width, spare)
    want = one_at_a_time(ends, finds)
    assert schedule.counted(taken).tolist() == want.tolist()
    assert want[0, -1] > 0 and (want == 0).any(), "a puzzle without an answer, and one with"
    if min(width, spare) <= 1:
        assert most == 1 and taken.sum() == want.sum(), "nothing is done in vain"
    else:
        assert most > 1 and (taken.reshape(P, K) > 0).sum(1).max() == K
        begun = (taken.reshape(P, K) > 0).sum(1)
        needed = (want > 0).sum(1)
        assert (begun <= np.maximum(2 * needed - 2, needed)).all()
    if width >= P:
        assert made <= max(want.sum(1))


def test_a_puzzle_alone_doubles():
    schedule = Schedule(1, plan_of(schedule="sequential", rollouts=20))
    rounds = []
    while items := schedule.take(99, 99):
        rounds.append(len(items))
        array = np.array(items)
        none, all_over = np.zeros(len(items), bool), np.ones(len(items), bool)
        schedule.note(array, np.full(len(items), D), none, all_over)
    assert rounds == [1, 1, 2, 4, 8, 4]


def test_those_that_wait_come_before_those_begun_ahead():
    schedule = Schedule(3, plan_of(schedule="sequential"))
    assert schedule.take(2, 2) == [0, K]
    no, yes = np.zeros(2, bool), np.ones(2, bool)
    for step in (1, 2):  # two rollouts of the first two puzzles fail
        items = np.array([step - 1, K + step - 1])
        assert schedule.note(items, np.full(2, D), no, yes).all()
        if step == 1:
            assert schedule.take(2, 2) == [2 * K, 1], "the third puzzle has waited longest"
            schedule.note(np.array([2 * K]), np.array([1]), no[:1], no[:1])
            assert schedule.take(1, 1) == [K + 1]
    assert schedule.take(8, 8) == [2, K + 2, 3, K + 3]


def test_an_answer_ends_the_later_ones_and_waits_for_the_earlier():
    schedule = Schedule(1, plan_of(schedule="sequential"))
    no, yes = np.zeros(1, bool), np.ones(1, bool)
    for k in (0, 1):
        assert schedule.take(9, 9) == [k]
        schedule.note(np.array([k]), np.array([D]), no, yes)
    assert schedule.take(9, 9) == [2, 3]
    assert schedule.take(9, 9) == []
    both = schedule.note(np.array([2, 3]), np.array([1, 1]), np.array([False, True]), no.repeat(2))
    assert both.tolist() == [False, True]
    assert schedule.take(9, 9) == [], "after an answer nothing is begun"
    assert schedule.counted(np.array([D, D, 1, 1] + [0] * 5))[0].tolist() == [D, D, 1, 1] + [0] * 5
    assert schedule.note(np.array([2]), np.array([2]), yes, no).tolist() == [True]
    assert schedule.counted(np.array([D, D, 2, 1] + [0] * 5))[0].tolist() == [D, D, 2] + [0] * 6


@pytest.mark.parametrize("width", [3, 20, 100])
def test_parallel_rollouts_end_each_other_at_a_step(width):
    ends, finds = script(1)
    schedule = Schedule(P, plan_of())
    taken, _, _ = work(schedule, ends, finds, width, width)
    steps = schedule.counted(taken)
    for p in range(P):
        own = slice(p * K, (p + 1) * K)
        found = finds[own][finds[own] <= ends[own]]
        limit = min(found) if len(found) else D
        assert steps[p].tolist() == np.minimum(ends[own], limit).tolist()


def test_the_order_of_parallel_rollouts():
    assert Schedule(2, plan_of(rollouts=3)).take(9, 0) == [0, 1, 2, 3, 4, 5], "ending together"
    assert Schedule(2, plan_of(rollouts=3, select="q")).take(9, 0) == [0, 3, 1, 4, 2, 5]
