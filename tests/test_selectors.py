"""The choice among recorded answers, against loops over puzzles, rollouts and steps."""

import math

import numpy as np
import pytest
import torch

from trm_fast.reasoning import Reasoning
from trm_fast.rollouts import Record
from trm_fast.selectors import choose

P, K, D = 60, 4, 5


def some_record(seed=0, whole=False):
    """Few different answers, q's and steps, so that ties and gaps are frequent."""
    rng = np.random.default_rng(seed)
    steps = np.full((P, K), D) if whole else rng.integers(0, D + 1, (P, K))
    q = rng.choice([-np.inf, -1.0, 0.5, 1.0, 2.0, 3.0], (P, K, D)).astype(np.float32)
    moved = rng.choice([0.25, 0.5, 1.0, 4.0], (P, K, D)).astype(np.float32)
    moved[:, :, 0] = np.inf
    said = rng.integers(-4, 4, (P, K, D)) << 60
    return Record(*map(torch.from_numpy, (q, moved, said, steps)))


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > -math.inf else 0.0


def entry(record, plan, p, k):
    """(0-based step, q) of a rollout, or None."""
    ran = int(record.steps[p, k])
    if not ran:
        return None
    if plan.entry == "last":
        return ran - 1, float(record.q[p, k, ran - 1])
    values = [float(v) for v in record.q[p, k, :ran]]
    return values.index(max(values)), max(values)


def by_loops(record, plan, valid, p):
    """(rollout, 0-based step, confidence) of one puzzle; step -1 where nothing was run."""
    ran = [int(n) for n in record.steps[p]]
    entries = {k: found for k in range(K) if (found := entry(record, plan, p, k))}
    if plan.select == "last":
        return 0, ran[0] - 1, None
    if not entries:
        return 0, -1, None
    if plan.select in ("first-q", "valid"):
        good = [
            (k, d)
            for k in range(K)
            for d in range(ran[k])
            if (valid[p, k, d] if plan.select == "valid" else record.q[p, k, d] > plan.threshold)
        ]
        if good and plan.schedule == "sequential":
            return *good[0], None
        if good:
            first = min(d for _, d in good)
            return *max((kd for kd in good if kd[1] == first), key=lambda kd: record.q[p][kd]), None
    if plan.select == "mode":
        votes = {}
        for k, (d, q) in entries.items():
            said = int(record.said[p, k, d])
            votes[said] = votes.get(said, 0.0) + (1.0 if plan.entry == "last" else sigmoid(q))
        won = max(votes, key=votes.get)  # the first of several
        backers = {k: q for k, (d, q) in entries.items() if int(record.said[p, k, d]) == won}
        k = max(backers, key=backers.get)
        return k, entries[k][0], votes[won] / len(entries)
    if plan.select == "residual":
        scores = {}
        for k in range(K):
            last = [float(record.moved[p, k, d]) for d in range(max(1, ran[k] - 3), ran[k])]
            scores[k] = sum(last) / len(last) if last else math.inf
        k = min(scores, key=scores.get)
        return k, ran[k] - 1, None
    k = max(entries, key=lambda k: entries[k][1])
    return k, entries[k][0], None


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kept", ["best-q", "last"])
@pytest.mark.parametrize(
    ("select", "schedule"),
    [(name, "parallel") for name in ("last", "q", "mode", "residual", "first-q", "valid")]
    + [(name, "sequential") for name in ("first-q", "valid")],
)
def test_every_selector(select, schedule, kept, whole):
    for seed in range(3):
        record = some_record(seed, whole)
        plan = Reasoning(
            depth=D, rollouts=K, select=select, entry=kept, schedule=schedule, threshold=1.5
        )
        valid = torch.from_numpy(np.random.default_rng(seed).random((P, K, D)) < 0.05)
        chosen = choose(record, plan, valid)
        said, q = chosen.of(record.said), chosen.of(record.q)
        for p in range(P):
            k, d, share = by_loops(record, plan, valid, p)
            assert chosen.step[p] == d + 1
            if d < 0:
                assert chosen.q[p] == -math.inf and chosen.confidence[p] == 0
                continue
            assert chosen.rollout[p] == k
            assert said[p] == record.said[p, k, d]
            assert chosen.q[p] == q[p] == record.q[p, k, d]
            want = sigmoid(float(record.q[p, k, d])) if share is None else share
            assert float(chosen.confidence[p]) == pytest.approx(want, rel=1e-5)


def test_a_cut_is_what_fewer_rollouts_and_steps_would_have_said():
    record = some_record()
    part = record.cut(rollouts=2, depth=3)
    assert part.q.shape == part.moved.shape == part.said.shape == (P, 2, 3)
    assert torch.equal(part.steps, record.steps[:, :2].clamp(max=3))
    assert torch.equal(part.ran.sum(-1), part.steps)
    assert torch.equal(record.cut().q, record.q) and torch.equal(record.cut().steps, record.steps)


def test_no_puzzles():
    record = Record(*(t[:0] for t in vars(some_record()).values()))
    for select in ("last", "q", "mode", "residual", "first-q"):
        assert len(choose(record, Reasoning(select=select, threshold=1.0)).step) == 0
