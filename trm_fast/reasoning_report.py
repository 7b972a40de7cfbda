"""How good a way of asking is: accuracy and cost, against depth, rollouts and confidence.

Owns the measuring of rollouts on labelled puzzles; running them is `inference.records`. Imported
by `evaluate.py`. Terms are those of `reasoning.py`. What the rules of the puzzle know is reported
beside what the model alone does, never mixed with it.

Dims legend: P puzzles, K rollouts, D steps, L tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trm_fast.data.format import IGNORE_LABEL_ID
from trm_fast.distributed import SINGLE, Ranks
from trm_fast.inference import records
from trm_fast.lanes import Puzzles
from trm_fast.model import Model
from trm_fast.puzzle_kind import kind_of
from trm_fast.reasoning import Reasoning
from trm_fast.rollouts import Record
from trm_fast.selectors import SELECTORS, Choice, choose, keeps_rules

__all__ = [
    "Labelled",
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
class Labelled:
    """P puzzles with labels: inputs and labels [P, L] int, identifiers [P] int, and their numbers
    [P] int64 in the whole set, all on the CPU."""

    inputs: Tensor
    labels: Tensor
    identifiers: Tensor
    numbers: Tensor

    def right(self, tokens: Tensor) -> Tensor:
        """Which answers [P, ..., L] are the label wherever there is one, [P, ...] bool."""
        count, length = self.labels.shape
        labels = self.labels.view(count, *(1,) * (tokens.dim() - 2), length)
        return ((tokens == labels) | (labels == IGNORE_LABEL_ID)).all(-1)


@dataclass(frozen=True)
class Point:
    """One place on a curve.

    Attributes:
        at: depth, or rollouts.
        exact: share of puzzles right, by the selector.
        rule: share of puzzles of which a step so far kept the rules; None where none are known.
        passes: mean supervision steps of a puzzle.  seconds: mean, by its part of all passes.
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
        seconds, seconds_max: mean of a puzzle, and by the passes of the longest one.
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
    puzzles: Labelled,
    plan: Reasoning,
    *,
    batch_size: int = 256,
    ranks: Ranks = SINGLE,
    observe: Observe | None = None,
    abstain: float | None = None,
) -> ReasoningReport:
    """Measure a way of asking.

    Args:
        model: put into evaluation mode, and back as it was.
        puzzles: of this process; all processes get the results of the whole.
        plan: resolved for the model, see `inference.plan_for`.
        observe: called with "inputs", "labels", "puzzle_identifiers", "preds" and
            "q_halt_logits" of the answers, some puzzles at a time; not of puzzles that no step was
            made for.
        abstain: a confidence in [0, 1] that is to be among those of `risk`.

    Raises ValueError where no process has a puzzle.
    """
    tally = _Tally(model, plan, abstain)
    begun = time.monotonic()
    for rows, record in records(model, _on_device(model, puzzles), plan, batch_size):
        part = Labelled(*(t[rows] for t in vars(puzzles).values()))
        seconds = time.monotonic() - begun
        chosen = tally.add(part, record, seconds)
        there = chosen.step > 0
        if observe is not None and bool(there.any()):
            observe(
                {
                    "inputs": part.inputs[there],
                    "labels": part.labels[there],
                    "puzzle_identifiers": part.identifiers[there],
                    "preds": chosen.of(record.tokens)[there].long(),
                    "q_halt_logits": chosen.q[there],
                }
            )
        begun = time.monotonic()
    return tally.report(ranks)


def traces(
    model: Model, puzzles: Labelled, plan: Reasoning, batch_size: int = 256
) -> tuple[Tensor, Tensor]:
    """q [P, K, D] float32 and whether the answer is right, bool, of every step of a plan that ends
    none early."""
    plan = replace(plan, select="q", halt="never", schedule="parallel", budget=None)
    found = []
    for rows, record in records(model, _on_device(model, puzzles), plan, batch_size):
        part = Labelled(*(t[rows] for t in vars(puzzles).values()))
        found.append((record.q, part.right(record.tokens)))
    q, right = zip(*found, strict=True)
    return torch.cat(q), torch.cat(right)


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

    whole: np.ndarray  # puzzles, exact, cell, valid, rule, passes, seconds
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
        self._plan, self._rules = plan, kind_of(model.config).rules
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

    def add(self, puzzles: Labelled, record: Record, seconds: float) -> Choice:
        plan, sums = self._plan, self._sums
        right = puzzles.right(record.tokens) & record.ran
        kept = torch.zeros_like(right)
        if self._rules is not None:
            kept = keeps_rules(record, puzzles.inputs, self._rules)
        chosen = choose(record, plan, kept)
        exact = chosen.of(right) & (chosen.step > 0)
        labelled = puzzles.labels != IGNORE_LABEL_ID
        same = (chosen.of(record.tokens) == puzzles.labels) & labelled
        cell = same.sum(-1) / labelled.sum(-1) * (chosen.step > 0)
        passes = record.steps.sum(-1)
        columns = (
            torch.ones_like(exact),
            exact,
            cell,
            chosen.of(kept),
            kept.flatten(1).any(-1),
            passes,
        )
        sums.whole += [*(float(c.double().sum()) for c in columns), seconds]
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
        return chosen

    def _point(self, record: Record, right: Tensor, kept: Tensor) -> list[float]:
        chosen = choose(record, self._plan, kept)
        ran = record.ran
        exact = (chosen.of(right) & (chosen.step > 0)).sum()
        return [int(exact), int((kept & ran).flatten(1).any(-1).sum()), int(record.steps.sum())]

    def report(self, ranks: Ranks) -> ReasoningReport:
        sums = self._sums
        parts = [sums.whole, sums.selectors, sums.by_depth, sums.by_rollouts, sums.risk]
        flat = torch.from_numpy(np.concatenate([part.ravel() for part in parts]))
        totals = ranks.totals(flat).numpy()
        whole, selectors, by_depth, by_rollouts, risk = (
            piece.reshape(part.shape)
            for piece, part in zip(
                np.split(totals, np.cumsum([part.size for part in parts])[:-1]), parts, strict=True
            )
        )
        most = max(ranks.numbers(sums.most))
        count = whole[0]
        if not count:
            raise ValueError("there is nothing to evaluate: the data has no puzzles")
        _, exact, cell, valid, rule, passes, seconds = (whole / count).tolist()
        of_a_pass = whole[6] / max(whole[5], 1)

        def curve(places: Sequence[int], values: np.ndarray) -> list[Point]:
            return [
                Point(at, right, known if self._rules else None, steps, steps * of_a_pass)
                for at, (right, known, steps) in zip(places, (values / count).tolist(), strict=True)
            ]

        return ReasoningReport(
            puzzles=int(count),
            exact=exact,
            cell=cell,
            selectors=dict(zip(SELECTORS, (selectors / count).tolist(), strict=True)),
            valid=valid if self._rules else None,
            rule=rule if self._rules else None,
            passes=passes,
            passes_max=most,
            seconds=seconds,
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
