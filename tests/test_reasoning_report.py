"""Measures of rollouts against plain loops over what every step said; traces; what is refused."""

import math
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from answering import CELLS, SOLVED, boards, tiny_model

from trm_fast import reasoning_report, rollouts
from trm_fast.inference import plan_for, supervision_steps
from trm_fast.labelled import Labelled
from trm_fast.reasoning_report import measure, steps_shown, traces
from trm_fast.rollouts import Budget, Record, Result, Stepped, record_bytes

N, K, D = 16, 4, 5
SELECTORS = ("last", "q", "mode", "residual", "first-q")
GRID = np.array([int(c) for c in SOLVED])
GRIDS = [
    np.array([0, 1, *order])[GRID] + 1 for order in permutations((2, 3, 4))
]  # the clue, 1 in the first cell, stays
IGNORED = -100
CUT = torch.zeros(N, dtype=torch.bool)


def made(seed=22):
    """Boards with one clue, their labels, and rollouts that say a few grids in turn."""
    rng = np.random.default_rng(seed)
    inputs = np.ones((N, CELLS), np.int64)
    inputs[:, 0] = 2
    labels = np.stack([GRIDS[i % 3] for i in range(N)])
    labels[3, 4:] = IGNORED  # the first row alone counts
    labels[4, ::2] = IGNORED
    tokens = np.empty((N, K, D, CELLS), np.uint8)
    for at in np.ndindex(N, K, D):
        said = GRIDS[rng.integers(0, 3)].copy()
        if rng.random() < 0.2:
            said[rng.integers(1, CELLS)] = rng.integers(0, 6)
        tokens[at] = said
    tokens[9:11, ..., 5] = 0  # never valid
    q = rng.normal(0.0, 2.0, (N, K, D)).astype(np.float32)
    moved = rng.random((N, K, D)).astype(np.float32)
    moved[:, :, 0] = np.inf
    steps = rng.integers(1, D + 1, (N, K))
    steps[5:8, 2:] = 0  # answered before, or the time was up
    steps[8] = D
    return inputs, labels, tokens, q, moved, steps


def keeps(puzzle, said):
    """Whether a 4x4 answer keeps the clues and the rules."""
    grid = said.astype(int).reshape(4, 4) - 1
    units = [*grid, *grid.T, *(grid[r : r + 2, c : c + 2] for r in (0, 2) for c in (0, 2))]
    whole = all(sorted(unit.ravel().tolist()) == [1, 2, 3, 4] for unit in units)
    return whole and all(p in (0, 1, s) for p, s in zip(puzzle, said, strict=True))


def chosen_of(select, plan, q, moved, steps, tokens, valid):
    """((rollout, step) from 0, confidence) of one puzzle; (None, 0) where nothing was said."""
    ran = [(k, d) for k in range(len(steps)) for d in range(steps[k])]
    if not ran:
        return None, 0.0
    entries = []
    for k in range(len(steps)):
        own = list(range(steps[k]))
        if own:
            best = max(own, key=lambda d, k=k: q[k][d])
            entries.append((k, best if plan.entry == "best-q" else own[-1]))
    sure = {at: 1 / (1 + math.exp(-q[at[0]][at[1]])) for at in ran}
    highest = max(entries, key=lambda at: q[at[0]][at[1]])
    if select == "last":
        at = (0, steps[0] - 1)
        return at, sure[at]
    if select == "q":
        return highest, sure[highest]
    if select == "mode":
        votes = {}
        for at in entries:
            said = tuple(tokens[at[0]][at[1]])
            votes.setdefault(said, []).append(at)
        weight = {
            said: sum(1.0 if plan.entry == "last" else sure[at] for at in ats)
            for said, ats in votes.items()
        }
        said = max(weight, key=lambda s: weight[s])
        at = max(votes[said], key=lambda a: q[a[0]][a[1]])
        return at, weight[said] / len(entries)
    if select == "residual":
        means = {}
        for k in range(len(steps)):
            late = [moved[k][d] for d in range(max(1, steps[k] - 3), steps[k])]
            means[k] = sum(late) / len(late) if late else math.inf
        k = min(means, key=lambda k: means[k])
        return (k, steps[k] - 1), sure[k, steps[k] - 1]
    if select == "first-q":
        good = [at for at in ran if q[at[0]][at[1]] > plan.threshold]
    else:
        good = [at for at in ran if valid[at[0]][at[1]]]
    if not good:
        return highest, sure[highest]
    if plan.schedule == "parallel":
        first = min(d for _, d in good)
        good = sorted((at for at in good if at[1] == first), key=lambda at: -q[at[0]][at[1]])
    return good[0], sure[good[0]]


def plain_report(plan, inputs, labels, tokens, q, moved, steps, confidences):
    """What `measure` should say but for seconds."""

    def share(values):
        return sum(values) / N

    right = np.zeros((N, K, D), bool)
    valid = np.zeros((N, K, D), bool)
    for n, k, d in np.ndindex(N, K, D):
        if d < steps[n, k]:
            cells = [j for j in range(CELLS) if labels[n, j] != IGNORED]
            right[n, k, d] = all(tokens[n, k, d, j] == labels[n, j] for j in cells)
            valid[n, k, d] = keeps(inputs[n], tokens[n, k, d])

    def one(n, select, most=K, depth=D):
        part = np.minimum(steps[n, :most], depth).tolist()
        at, sure = chosen_of(
            select, plan, q[n].astype(float), moved[n].astype(float), part, tokens[n], valid[n]
        )
        return at, sure, part

    def point(at, most, depth):
        found = [one(n, plan.select, most, depth) for n in range(N)]
        some = [
            any(valid[n, k, d] for k, count in enumerate(found[n][2]) for d in range(count))
            for n in range(N)
        ]
        return {
            "at": at,
            "exact": share(a is not None and right[(n, *a)] for n, (a, _, _) in enumerate(found)),
            "rule": share(some),
            "passes": share(sum(part) for _, _, part in found),
        }

    found = [one(n, plan.select)[:2] for n in range(N)]
    hits = [at is not None and bool(right[(n, *at)]) for n, (at, _) in enumerate(found)]
    cell = []
    for n, (at, _) in enumerate(found):
        cells = [j for j in range(CELLS) if labels[n, j] != IGNORED]
        same = 0 if at is None else sum(tokens[(n, *at)][j] == labels[n, j] for j in cells)
        cell.append(same / len(cells))
    one_after_another = plan.schedule == "sequential"
    curve = plan.select not in ("first-q", "valid") or one_after_another
    risk = []
    for confidence in confidences:
        sure = [hit for hit, (_, c) in zip(hits, found, strict=True) if c >= confidence]
        risk.append((len(sure) / N, sum(sure) / len(sure) if sure else None))
    return {
        "puzzles": N,
        "exact": share(hits),
        "cell": share(cell),
        "selectors": {
            select: share(
                at is not None and bool(right[(n, *at)])
                for n in range(N)
                for at in [one(n, select)[0]]
            )
            for select in SELECTORS
        },
        "valid": share(at is not None and valid[(n, *at)] for n, (at, _) in enumerate(found)),
        "rule": share(valid.any((1, 2))),
        "passes": steps.sum() / N,
        "passes_max": max(steps.sum(1)),
        "cut": 0.0,
        "by_depth": [point(d, 1 if one_after_another else K, d) for d in (1, 2, 3, 4, 5)],
        "by_rollouts": [point(k, k, D) for k in (1, 2, 3, 4)] if curve else [],
        "risk": risk,
    }


def labelled(inputs, labels):
    return Labelled(
        torch.from_numpy(inputs).int(),
        torch.from_numpy(labels).int(),
        torch.arange(N, dtype=torch.int32),
        torch.arange(N),
    )


class Recorded:
    """What rollouts are to the report: steps one by one, then the result."""

    def __init__(self, rows, plan, inputs, labels, tokens, q, moved, steps):
        self.plan, self.inputs = plan, inputs[rows]
        self.tokens, self.q, self.moved, self.steps = (t[rows] for t in (tokens, q, moved, steps))

    def run(self):
        for d in range(D):
            found = [(n, k) for n, k in np.ndindex(self.steps.shape) if d < self.steps[n, k]]
            if found:
                n, k = np.array(found).T
                tokens = torch.from_numpy(self.tokens[n, k, d].astype(np.int64))
                yield Stepped(
                    n * K + k, np.full(len(n), d + 1), None, SimpleNamespace(tokens=tokens)
                )

    def result(self):
        number = {}
        said = [number.setdefault(t.tobytes(), len(number)) for t in self.tokens.reshape(-1, CELLS)]
        at = np.arange(len(self.steps))[:, None], np.arange(K)
        ran = np.arange(D) < self.steps[..., None]
        last = self.tokens[(*at, np.maximum(self.steps - 1, 0))]
        best = self.tokens[(*at, np.where(ran, self.q, -np.inf).argmax(-1))]
        arrays = self.q, self.moved, np.array(said).reshape(self.q.shape), self.steps
        record = Record(*(torch.from_numpy(t.copy()) for t in arrays))
        valid = None
        if self.plan.select == "valid":
            kept = [keeps(self.inputs[at[0]], self.tokens[at]) for at in np.ndindex(self.q.shape)]
            valid = torch.tensor(kept, dtype=torch.bool).view(self.q.shape)
        answers = torch.from_numpy(best), torch.from_numpy(last)
        return Result(record, *answers, valid, CUT[: len(self.q)])


def ended(plan, inputs, tokens, q, steps):
    """The steps [N, K] where what is found ends the rollouts of its puzzle."""
    steps = steps.copy()
    for n in range(N):
        good = [
            (k, d)
            for k in range(K)
            for d in range(steps[n, k])
            if (
                keeps(inputs[n], tokens[n, k, d])
                if plan.select == "valid"
                else q[n, k, d] > plan.threshold
            )
        ]
        if not plan.stops or not good:
            continue
        if plan.schedule == "sequential":
            k, d = good[0]
            steps[n, k], steps[n, k + 1 :] = d + 1, 0
        else:
            steps[n] = np.minimum(steps[n], min(d for _, d in good) + 1)
    return steps


PLANS = {
    "q": {},
    "q-of-the-last": {"entry": "last"},
    "last": {"select": "last"},
    "mode": {"select": "mode"},
    "mode-of-the-last": {"select": "mode", "entry": "last"},
    "residual": {"select": "residual"},
    "first-q": {"select": "first-q", "threshold": 2.0},
    "valid": {"select": "valid", "threshold": 2.0},
    "restarts": {"select": "first-q", "threshold": 2.0, "schedule": "sequential"},
    "restarts-valid": {"select": "valid", "schedule": "sequential"},
    "none-above": {"select": "first-q", "threshold": 60.0},
}


@pytest.mark.parametrize("settings", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("parts", [[N], [1, 4, 0, N - 5]])
def test_the_report_is_a_plain_loop(monkeypatch, settings, parts):
    said = made()
    inputs, labels = said[:2]
    if settings.get("select") == "residual":  # a rollout of one step has not moved yet
        said[5][0], said[5][1] = 1, [1, 1, 2, 1]
    model = tiny_model()
    plan = plan_for(model, rollouts=K, depth=D, **settings)
    said = *said[:5], ended(plan, inputs, said[2], said[3], said[5])
    ends = np.cumsum(parts)
    rows = [slice(end - count, end) for end, count in zip(ends, parts, strict=True)]
    given = []

    def steps_of(model, puzzles, plan, batch_size, budget):
        given.append((puzzles.numbers.tolist(), puzzles.inputs.tolist(), batch_size))
        for part in rows:
            budget.used += 0.5
            yield part, Recorded(part, plan, *said)

    monkeypatch.setattr(reasoning_report, "blocks", steps_of)
    seen = []
    puzzles = labelled(inputs, labels)
    spent = Budget()
    spent.used = 40.0  # on another set
    report = measure(
        model, [puzzles], plan, batch_size=9, abstain=0.7, observe=seen.append, budget=spent
    ).to_dict()
    assert given == [(list(range(N)), inputs.tolist(), 9)]

    logits = sorted([*(quarter / 4 for quarter in range(-32, 33)), math.log(0.7 / 0.3)])
    confidences = [1 / (1 + math.exp(-logit)) for logit in logits]
    want = plain_report(plan, *said, confidences)
    risk = report.pop("risk")
    assert [r["confidence"] for r in risk] == pytest.approx(confidences)
    assert [r["answered"] for r in risk] == pytest.approx([a for a, _ in want["risk"]])
    for got, (_, accuracy) in zip(risk, want.pop("risk"), strict=True):
        assert got["accuracy"] == (None if accuracy is None else pytest.approx(accuracy))

    # Seconds are shared out by passes.
    seconds, most = report.pop("seconds"), report.pop("seconds_max")
    assert seconds == pytest.approx(0.5 * len(parts) / N)
    assert most == pytest.approx(seconds / report["passes"] * report["passes_max"])
    for curve in ("by_depth", "by_rollouts"):
        of_it = want.pop(curve)
        assert [p["at"] for p in report[curve]] == [p["at"] for p in of_it]
        for got, point in zip(report.pop(curve), of_it, strict=True):
            assert got.pop("seconds") == pytest.approx(seconds / want["passes"] * point["passes"])
            assert got == pytest.approx(point)
    assert report.pop("selectors") == pytest.approx(want.pop("selectors"))
    assert report == pytest.approx(want)

    # The answers that are handed on are those that were counted.
    told = {key: torch.cat([part[key] for part in seen]) for key in seen[0]}
    assert [len(part["inputs"]) for part in seen] == [count for count in parts if count]
    assert told["puzzle_identifiers"].tolist() == list(range(N))
    assert told["labels"].tolist() == labels.tolist() and told["inputs"].tolist() == inputs.tolist()
    exact = [
        all(t in (s, IGNORED) for s, t in zip(said_of, label, strict=True))
        for said_of, label in zip(told["preds"].tolist(), labels.tolist(), strict=True)
    ]
    assert sum(exact) / N == pytest.approx(want["exact"])
    assert told["preds"].dtype == torch.int64 and len(told["q_halt_logits"]) == N


def test_the_cases_tell_selectors_and_points_apart():
    said = made()
    model = tiny_model()
    plan = plan_for(model, rollouts=K, depth=D, threshold=2.0)
    want = plain_report(plan, *said, [0.0, 0.5, 0.9, 1.0])
    assert len({round(v, 6) for v in want["selectors"].values()}) >= 4
    assert 0 < want["valid"] < want["rule"] < 1
    assert want["exact"] not in (0, 1, want["cell"], want["valid"])
    assert len({p["exact"] for p in want["by_depth"]}) > 2
    assert len({p["exact"] for p in want["by_rollouts"]}) > 2
    assert [a for a, _ in want["risk"]] == sorted({a for a, _ in want["risk"]}, reverse=True)
    assert want["risk"][-1] == (0, None) and want["passes_max"] == K * D


@pytest.mark.parametrize("abstain", [0.0, 1.0, 1e-320, 0.5])
def test_any_confidence_can_be_asked_for(monkeypatch, abstain):
    said = made()
    monkeypatch.setattr(
        reasoning_report,
        "blocks",
        lambda *a: iter([(slice(N), Recorded(slice(N), plan, *said))]),
    )
    model = tiny_model()
    plan = plan_for(model, rollouts=K, depth=D)
    risk = measure(model, [labelled(*said[:2])], plan, abstain=abstain).risk
    asked = min(risk, key=lambda r: abs(r.confidence - abstain))
    assert asked.confidence == pytest.approx(abstain)
    want = plain_report(plan, *said, [abstain])["risk"][0]
    assert (asked.answered, asked.accuracy) == pytest.approx(want)
    assert len(risk) == (65 if abstain == 0.5 else 66)


def test_where_the_time_was_up_nothing_counts(monkeypatch):
    said = made()
    said[5][:] = 0
    monkeypatch.setattr(
        reasoning_report,
        "blocks",
        lambda *a: iter([(slice(N), Recorded(slice(N), plan, *said))]),
    )
    model, seen = tiny_model(), []
    plan = plan_for(model, rollouts=K, depth=D)
    report = measure(model, [labelled(*said[:2])], plan, observe=seen.append)
    assert (report.exact, report.cell, report.valid, report.rule) == (0, 0, 0, 0)
    assert (report.passes, report.passes_max, report.seconds_max) == (0, 0, 0)
    assert set(report.selectors.values()) == {0}
    assert {(p.exact, p.rule, p.passes) for p in report.by_depth} == {(0, 0, 0)}
    assert seen == [], "what was not answered is no answer"


def test_no_rules_no_valid():
    changes = {"seq_len": 10, "vocab_size": 9}
    model = tiny_model(**changes)
    inputs = torch.from_numpy(boards(3, cells=10, vocab=9)).int()
    puzzles = Labelled(inputs, inputs, torch.zeros(3, dtype=torch.int32), torch.arange(3))
    report = measure(model, [puzzles], plan_for(model, rollouts=2, noise=0.5, depth=2))
    assert report.valid is None and report.rule is None
    assert {p.rule for p in [*report.by_depth, *report.by_rollouts]} == {None}


def test_steps_shown():
    assert [steps_shown(n) for n in (1, 2, 3, 5)] == [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4, 5]]
    assert steps_shown(16) == [1, 2, 3, 4, 6, 8, 12, 16]
    assert steps_shown(100) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 100]


MAZES = {"seq_len": 25, "vocab_size": 6}


def images(rows):
    """The 8 turns and reflections of boards [N, 25]."""
    grids = rows.reshape(-1, 5, 5)
    turned = [np.rot90(g, r, (1, 2)) for g in (grids, grids.swapaxes(1, 2)) for r in range(4)]
    return [g.reshape(-1, 25) for g in turned]


def test_traces_are_every_step_of_every_image():
    """Of a maze's 8 images: the label of the image is right where the label of the maze is."""
    model = tiny_model(3, **MAZES)
    inputs = boards(6, seed=2, cells=25, vocab=6)
    inputs[inputs > 2] = 1
    inputs[:, 0], inputs[:, -1] = 3, 4  # mazes have one start and one goal
    labels = boards(6, seed=3, cells=25, vocab=6).astype(np.int64)
    by_hand, hits = [], []
    answers = []
    for turned in images(inputs):
        batch = {
            "inputs": torch.from_numpy(turned.astype(np.int32)),
            "puzzle_identifiers": torch.zeros(6, dtype=torch.int32),
        }
        outs = list(supervision_steps(model, batch, 4))
        by_hand.append(np.stack([out.q.numpy() for out in outs], 1))
        preds = np.stack([out.preds.numpy() for out in outs], 1)
        answers.append(np.where(turned[:, None] != 2, turned[:, None], preds))
    labels[1], labels[2] = answers[0][1, 2], answers[0][2, 3]
    labels[3, 5:] = IGNORED
    labels[3, :5] = answers[0][3, 1, :5]
    labels[4] = images(np.repeat(answers[2][4:5, 0], 6, 0))[2][0]  # turned back
    for turned, said in zip(images(labels), answers, strict=True):
        same = (said == turned[:, None]) | (turned[:, None] == IGNORED)
        hits.append(same.all(-1))
    puzzles = Labelled(
        torch.from_numpy(inputs).int(),
        torch.from_numpy(labels).int(),
        torch.zeros(6, dtype=torch.int32),
        torch.arange(6),
    )
    asked = {"select": "first-q", "halt": "q", "threshold": -9.0, "budget": 0.0}
    plan = plan_for(model, rollouts=8, depth=4, schedule="sequential", **asked)
    q, right = traces(model, [puzzles], plan, batch_size=5)
    assert q.shape == right.shape == (6, 8, 4)
    assert np.allclose(q[:, 0], by_hand[0], atol=1e-5) and (right[:, 0].numpy() == hits[0]).all()
    want = [sorted((*np.round(by_hand[i][n], 3), *hits[i][n]) for i in range(8)) for n in range(6)]
    got = [
        sorted((*np.round(q[n, i].numpy(), 3), *right[n, i].numpy()) for i in range(8))
        for n in range(6)
    ]
    for one, other in zip(got, want, strict=True):
        assert np.allclose(one, other, atol=2e-3)
    assert right[1].any() and right[2].any() and right[3].any() and right[4].any()
    assert not right[0].any()


def without_seconds(report):
    document = report.to_dict()
    for point in [document, *document["by_depth"], *document["by_rollouts"]]:
        point.pop("seconds")
    document.pop("seconds_max")
    return document


@pytest.mark.parametrize("settings", [{}, {"select": "first-q", "threshold": 0.0}])
def test_records_of_a_few_puzzles_each_give_the_same_report(monkeypatch, settings):
    model = tiny_model()
    inputs = torch.from_numpy(boards(7)).int()
    labels = torch.from_numpy(boards(7, seed=1)).int()
    plan = plan_for(model, rollouts=3, noise=0.3, init="random", **settings)
    answers = model.predict(inputs, reasoning=plan)
    labels[::2] = answers.tokens[::2].int()
    ids = torch.zeros(7, dtype=torch.int32)
    puzzles = Labelled(inputs, labels, ids, torch.arange(7))
    whole = without_seconds(measure(model, [puzzles], plan))
    assert whole["exact"] == pytest.approx(4 / 7)
    assert whole["passes"] == pytest.approx(float(answers.passes.double().mean()))
    size = record_bytes(plan.rollouts, plan.depth, CELLS, 6)
    for room, batch_size in ((2 * size, 4), (1, 256)):
        monkeypatch.setattr(rollouts, "RECORD_BYTES", room)
        assert without_seconds(measure(model, [puzzles], plan, batch_size=batch_size)) == whole


def test_nothing_to_evaluate_and_the_mode_of_the_model():
    model = tiny_model().train()
    plan = plan_for(model, rollouts=2, depth=2)
    nothing = torch.zeros(0, CELLS, dtype=torch.int32)
    none = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="nothing to evaluate: the data has no puzzles"):
        measure(model, [Labelled(nothing, nothing, none, none)], plan)
    assert model.training
