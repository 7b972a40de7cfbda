"""How good a way of asking is: accuracy and cost, against depth, rollouts and confidence.

Owns the measuring of rollouts on labelled puzzles; running them is `inference.blocks`. Imported
by `evaluate.py`. Terms are those of `reasoning.py`. What the rules of the puzzle know is reported
beside what the model alone does, never mixed with it.

Dims legend: P puzzles, K rollouts, D steps, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trm_fast.data.format import IGNORE_LABEL_ID
from trm_fast.distributed import SINGLE, Ranks
from trm_fast.inference import blocks
from trm_fast.labelled import Labelled
from trm_fast.lanes import Puzzles
from trm_fast.model import Model
from trm_fast.puzzle_kind import kind_of
from trm_fast.reasoning import Reasoning
from trm_fast.rollouts import Budget, Record, Result, Stepped
from trm_fast.rules import Rules
from trm_fast.selectors import SELECTORS, Choice, choose

__all__ = [
    "Point",
    "ReasoningReport",
    "Risk",
    "confidence_of",
    "measure",
    "steps_shown",
    "traces",
]

LOGITS = np.arange(-32, 33) / 4  # confidences that are told apart, as logits


@dataclass(frozen=True)
class Point:
    """One place on a curve.

    Attributes:
        at: depth, or rollouts.
        exact: share of puzzles right, by the selector.
        rule: share of puzzles of which a step so far kept the rules; None where none are known.
        passes: mean supervision steps of a puzzle.  seconds: what they take at the mean of all
            passes, those in vain (`schedule.py`) among them.
    """

    at: int
    exact: float
    rule: float | None
    passes: float
    seconds: float


@dataclass(frozen=True)
class Risk:
    """Of the answers whose confidence is at least this: their share, and that of them right."""

    confidence: float
    answered: float
    accuracy: float | None


@dataclass(frozen=True)
class ReasoningReport:
    """Results on one set of puzzles.

    Attributes:
        puzzles: with labels.
        exact: share right by the plan's selector.  cell: mean share of labelled tokens right.
        selectors: share right by each selector that does not know the rules, of the same steps.
        valid: share of chosen answers that keep the rules.  rule: share of puzzles of which any
            step kept them.  Both None where no rules are known.
        passes, passes_max: mean and maximum over puzzles.
        cut: share of puzzles whose rollouts the budget ended.
        seconds: mean of a puzzle, with passes in vain.  seconds_max: by the passes of the longest.
        by_depth: against depth: of all rollouts, of sequential ones of the first.
        by_rollouts: against their number; empty where they end each other at the same step.
        risk: against confidence.
    """

    puzzles: int
    exact: float
    cell: float
    selectors: dict[str, float]
    valid: float | None
    rule: float | None
    passes: float
    passes_max: int
    cut: float
    seconds: float
    seconds_max: float
    by_depth: list[Point]
    by_rollouts: list[Point]
    risk: list[Risk]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def steps_shown(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... and `most`."""
    found, step = {most}, 1
    while step < most:
        found |= {step, 3 * step // 2}
        step *= 2
    return sorted(n for n in found if n <= most)


Observe = Callable[[dict[str, Tensor]], None]


def measure(
    model: Model,
    parts: Iterable[Labelled],
    plan: Reasoning,
    *,
    batch_size: int = 256,
    budget: Budget | None = None,
    ranks: Ranks = SINGLE,
    observe: Observe | None = None,
    abstain: float | None = None,
    made: Callable[[int], None] | None = None,
) -> ReasoningReport:
    """Measure a way of asking.

    Args:
        model: put into evaluation mode, and back as it was.
        parts: the puzzles of this process, some at a time; all processes get the results of the
            whole.
        plan: resolved for the model, see `inference.plan_for`.
        budget: seconds shared with other sets; None is the plan's, for these puzzles alone.
        observe: called with "inputs", "labels", "puzzle_identifiers", "preds" and
            "q_halt_logits" of the answers, some puzzles at a time; not of puzzles that no step was
            made for.
        abstain: a confidence in [0, 1] that is to be among those of `risk`.
        made: told how many passes were made, again and again.

    Raises ValueError where no process has a puzzle.
    """
    tally = _Tally(model, plan, abstain)
    budget = budget or Budget(plan.budget)
    before, passes = budget.used, 0

    def tell(count: int) -> None:
        nonlocal passes
        passes += count
        if made is not None:
            made(count)

    for puzzles, result, marks in _run(model, parts, plan, batch_size, budget, tally.rules, tell):
        chosen, tokens = tally.add(puzzles, result, marks)
        there = chosen.step > 0
        if observe is not None and bool(there.any()):
            observe(
                {
                    "inputs": puzzles.inputs[there],
                    "labels": puzzles.labels[there],
                    "puzzle_identifiers": puzzles.identifiers[there],
                    "preds": tokens[there],
                    "q_halt_logits": chosen.q[there],
                }
            )
    return tally.report(ranks, budget.used - before, passes)


def traces(
    model: Model,
    parts: Iterable[Labelled],
    plan: Reasoning,
    batch_size: int = 256,
    made: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """q [P, K, D] float32 and whether the answer is right, bool, of every step of a plan that ends
    none early; arguments as `measure`."""
    plan = replace(plan, select="q", halt="never", schedule="parallel", budget=None)
    found = [
        (result.record.q, marks.right)
        for _, result, marks in _run(model, parts, plan, batch_size, Budget(), None, made)
    ]
    q, right = zip(*found, strict=True)
    return torch.cat(q), torch.cat(right)


class _Marks:
    """What is known of the answers of every step: `right` and whether the rules are `kept`,
    [P, K, D] bool; False where no step was made."""

    def __init__(self, puzzles: Labelled, plan: Reasoning, rules: Rules | None) -> None:
        assert plan.depth is not None
        self._puzzles, self._rules = puzzles, rules
        self.right, self.kept = torch.zeros(
            2, len(puzzles.inputs), plan.rollouts, plan.depth, dtype=torch.bool
        )

    def see(self, stepped: Stepped) -> None:
        """Note a step."""
        puzzle, rollout = np.divmod(stepped.items, self.right.shape[1])
        rows = torch.from_numpy(puzzle)
        at = rows, torch.from_numpy(rollout), torch.from_numpy(stepped.taken - 1)
        tokens = stepped.said.tokens.cpu()
        self.right[at] = self._puzzles.right(rows, tokens)
        if self._rules is not None:
            kept = self._rules(self._puzzles.inputs[rows].numpy(), tokens.numpy())
            self.kept[at] = torch.from_numpy(kept)


def _run(
    model: Model,
    parts: Iterable[Labelled],
    plan: Reasoning,
    batch_size: int,
    budget: Budget,
    rules: Rules | None,
    made: Callable[[int], None] | None,
) -> Iterator[tuple[Labelled, Result, _Marks]]:
    """Run all rollouts, some puzzles at a time."""
    for part in parts:
        for rows, rollouts in blocks(model, _on_device(model, part), plan, batch_size, budget):
            puzzles = part.of(rows)
            # A plan that selects by the rules asks about every answer itself.
            marks = _Marks(puzzles, plan, None if plan.select == "valid" else rules)
            for stepped in rollouts.run():
                marks.see(stepped)
                if made is not None:
                    made(len(stepped.items))
            result = rollouts.result()
            if result.valid is not None:
                marks.kept = result.valid
            yield puzzles, result, marks


def _on_device(model: Model, puzzles: Labelled) -> Puzzles:
    device = model.inner.device
    return Puzzles(
        puzzles.inputs.to(device, torch.int32),
        puzzles.identifiers.to(device, torch.int32),
        puzzles.numbers.to(device, torch.int64),
    )


@dataclass
class _Sums:
    """Sums over puzzles of one process."""

    whole: np.ndarray  # puzzles, exact, cell, valid, rule, passes, cut
    selectors: np.ndarray
    by_depth: np.ndarray  # [points, exact, rule, passes]
    by_rollouts: np.ndarray
    risk: np.ndarray  # [confidences, (answered, right)]
    most: int = 0


def confidence_of(logit: float) -> float:
    """The confidence that an answer of this q has."""
    with np.errstate(over="ignore"):
        return float(1 / (1 + np.exp(-logit)))


def _logit(confidence: np.ndarray) -> np.ndarray:
    """Of 0 and 1, such as a vote without dissent, below and above all others."""
    with np.errstate(divide="ignore"):
        return np.log(confidence) - np.log1p(-confidence)


class _Tally:
    def __init__(self, model: Model, plan: Reasoning, abstain: float | None) -> None:
        assert plan.depth is not None
        self._plan, self.rules = plan, kind_of(model.config).rules
        self._depths = steps_shown(plan.depth)
        # Parallel rollouts that end each other would have gone on without the later ones.
        ended = plan.stops and plan.schedule == "parallel" and plan.rollouts > 1
        self._rollouts = [] if ended else steps_shown(plan.rollouts)
        more = [] if abstain is None else [_logit(np.array(abstain))]
        self._logits = np.unique([*LOGITS, *more])
        self._sums = _Sums(
            np.zeros(7),
            np.zeros(len(SELECTORS)),
            np.zeros((len(self._depths), 3)),
            np.zeros((len(self._rollouts), 3)),
            np.zeros((len(self._logits), 2)),
        )

    def add(self, puzzles: Labelled, result: Result, marks: _Marks) -> tuple[Choice, Tensor]:
        """Count some puzzles; what was chosen for each, and the answers [P, L] int64."""
        plan, sums, record = self._plan, self._sums, result.record
        right, kept = marks.right & record.ran, marks.kept & record.ran
        chosen = choose(record, plan, kept)
        tokens = result.tokens(chosen.rollout, chosen.step)
        exact = chosen.of(right) & (chosen.step > 0)
        labelled = puzzles.labels != IGNORE_LABEL_ID
        same = (tokens == puzzles.labels) & labelled
        cell = same.sum(-1) / labelled.sum(-1) * (chosen.step > 0)
        passes = record.steps.sum(-1)
        columns = (
            torch.ones_like(exact),
            exact,
            cell,
            chosen.of(kept),
            kept.flatten(1).any(-1),
            passes,
            result.cut,
        )
        sums.whole += [float(c.double().sum()) for c in columns]
        sums.most = max(sums.most, int(passes.max()) if len(passes) else 0)
        for place, select in enumerate(SELECTORS.values()):
            by = select(record, plan)
            sums.selectors[place] += int((by.of(right) & (by.step > 0)).sum())
        first = 1 if plan.schedule == "sequential" else None
        for curve, points in (
            (sums.by_depth, [(first, depth) for depth in self._depths]),
            (sums.by_rollouts, [(rollouts, None) for rollouts in self._rollouts]),
        ):
            for place, (k, d) in enumerate(points):
                curve[place] += self._point(record.cut(k, d), right[:, :k, :d], kept[:, :k, :d])
        logit = chosen.q.double().numpy()  # which a confidence in float32 would round
        if plan.select == "mode":
            logit = _logit(chosen.confidence.double().numpy())
        at_least = logit[:, None] >= self._logits
        sums.risk += np.stack([at_least.sum(0), (at_least & exact.numpy()[:, None]).sum(0)], -1)
        return chosen, tokens

    def _point(self, record: Record, right: Tensor, kept: Tensor) -> list[float]:
        chosen = choose(record, self._plan, kept)
        exact = (chosen.of(right) & (chosen.step > 0)).sum()
        return [int(exact), int(kept.flatten(1).any(-1).sum()), int(record.steps.sum())]

    def report(self, ranks: Ranks, seconds: float, made: int) -> ReasoningReport:
        """Of all processes, this one having made so many passes in so many seconds."""
        sums = self._sums
        parts = [
            np.array([seconds, made]),
            sums.whole,
            sums.selectors,
            sums.by_depth,
            sums.by_rollouts,
            sums.risk,
        ]
        flat = torch.from_numpy(np.concatenate([part.ravel() for part in parts]))
        totals = ranks.totals(flat).numpy()
        time, whole, selectors, by_depth, by_rollouts, risk = (
            piece.reshape(part.shape)
            for piece, part in zip(
                np.split(totals, np.cumsum([part.size for part in parts])[:-1]), parts, strict=True
            )
        )
        most = max(ranks.numbers(sums.most))
        count = whole[0]
        if not count:
            raise ValueError("there is nothing to evaluate: the data has no puzzles")
        _, exact, cell, valid, rule, passes, cut = (whole / count).tolist()
        of_a_pass = float(time[0]) / max(time[1], 1)

        def curve(places: Sequence[int], values: np.ndarray) -> list[Point]:
            return [
                Point(at, right, known if self.rules else None, steps, steps * of_a_pass)
                for at, (right, known, steps) in zip(places, (values / count).tolist(), strict=True)
            ]

        return ReasoningReport(
            puzzles=int(count),
            exact=exact,
            cell=cell,
            selectors=dict(zip(SELECTORS, (selectors / count).tolist(), strict=True)),
            valid=valid if self.rules else None,
            rule=rule if self.rules else None,
            passes=passes,
            passes_max=most,
            cut=cut,
            seconds=float(time[0]) / count,
            seconds_max=most * of_a_pass,
            by_depth=curve(self._depths, by_depth),
            by_rollouts=curve(self._rollouts, by_rollouts),
            risk=[
                Risk(
                    confidence_of(logit),
                    answered / count,
                    hits / answered if answered else None,
                )
                for logit, (answered, hits) in zip(self._logits, risk.tolist(), strict=True)
            ],
        )
