"""Which of the answers that rollouts gave is the one.

Owns the choice among recorded steps, for whole records and for their first rollouts and steps.
Imported by `inference.py`. Terms are those of `reasoning.py`; a step is chosen, whose answer,
rollout and q follow. No selector but "valid" knows the rules of the puzzle, and none its label.

Dims legend: P puzzles, K rollouts, D steps, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trm_fast.reasoning import Reasoning
from trm_fast.rollouts import Record

__all__ = ["SELECTORS", "Choice", "choose"]


@dataclass(frozen=True)
class Choice:
    """The chosen step of P puzzles.

    Attributes:
        rollout: [P] int64, from 0.  step: [P] int64, 1-based; 0 where no step was made.
        q: [P] float32 of the step.
        confidence: [P] float32 in [0, 1]: sigmoid(q), of "mode" the share of the votes.
    """

    rollout: Tensor
    step: Tensor
    q: Tensor
    confidence: Tensor

    def of(self, values: Tensor) -> Tensor:
        """[P, K, D, ...] -> [P, ...] at the chosen steps; where none was made, of the first."""
        rows = torch.arange(len(values))
        return values[rows, self.rollout, (self.step - 1).clamp(min=0)]


def choose(record: Record, plan: Reasoning, valid: Tensor | None = None) -> Choice:
    """The answer that counts by `plan.select`.

    Args:
        record: of at least one rollout and step.
        plan: resolved for the model.
        valid: [P, K, D] bool, which answers keep the rules; for select="valid" only.
    """
    if plan.select == "valid":
        assert valid is not None, "select='valid' needs to know which answers keep the rules"
        return _first(record, plan, valid & record.ran)
    return SELECTORS[plan.select](record, plan)


def _at(record: Record, rollout: Tensor, step: Tensor) -> Choice:
    """The choice of 0-based steps; 0 steps where that one was not run."""
    rows = torch.arange(len(step))
    ran = record.ran[rows, rollout, step]
    q = torch.where(ran, record.q[rows, rollout, step], -torch.inf)
    return Choice(rollout, torch.where(ran, step + 1, 0), q, torch.sigmoid(q))


def _entries(record: Record, plan: Reasoning) -> tuple[Tensor, Tensor]:
    """The 0-based step [P, K] of the entry of each rollout, and its q, -inf where it has none."""
    q = torch.where(record.ran, record.q, -torch.inf)
    step = q.argmax(-1) if plan.entry == "best-q" else (record.steps - 1).clamp(min=0)
    return step, q.gather(-1, step.unsqueeze(-1)).squeeze(-1)


def _last(record: Record, plan: Reasoning) -> Choice:
    first = torch.zeros(len(record.steps), dtype=torch.int64)
    return _at(record, first, (record.steps[:, 0] - 1).clamp(min=0))


def _highest_q(record: Record, plan: Reasoning) -> Choice:
    """The earliest rollout and step of several."""
    step, q = _entries(record, plan)
    rollout = q.argmax(-1)
    return _at(record, rollout, step[torch.arange(len(step)), rollout])


def _mode(record: Record, plan: Reasoning) -> Choice:
    """The entry of highest q among those that say what was found most often."""
    step, q = _entries(record, plan)
    rows = torch.arange(len(step))
    answer = _alike(record.said.gather(2, step.unsqueeze(-1)).squeeze(2))
    voted = record.steps > 0
    weights = voted.double() if plan.entry == "last" else torch.sigmoid(q.double()) * voted
    of_answer = np.bincount(answer.numpy().ravel(), weights.numpy().ravel(), minlength=1)
    votes = torch.from_numpy(of_answer)[answer] - (~voted).double()  # without a step: behind all
    winner = votes.argmax(-1)
    alike = (answer == answer[rows, winner][:, None]) & voted
    rollout = torch.where(alike, q, -torch.inf).argmax(-1)
    # Where every q is -inf, the argmax may be of another answer.
    rollout = torch.where(alike[rows, rollout], rollout, winner)
    chosen = _at(record, rollout, step[rows, rollout])
    share = votes[rows, winner].clamp(min=0) / voted.sum(-1).clamp(min=1)
    return Choice(chosen.rollout, chosen.step, chosen.q, share.float())


def _alike(said: Tensor) -> Tensor:
    """[P, K] int64 from 0: the same number for the same answer [P, K] to a puzzle, for no other."""
    ordered, order = said.sort(-1)
    differs = torch.ones_like(ordered, dtype=torch.int64)  # the first of a puzzle, too
    differs[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    number = differs.flatten().cumsum(0).view_as(said) - 1
    return torch.empty_like(number).scatter_(1, order, number)


def _residual(record: Record, plan: Reasoning) -> Choice:
    """The last answer of the rollout whose logits moved least in its last three steps."""
    number = torch.arange(record.q.shape[2])
    # The first step has nothing before it.
    counted = record.ran & (number >= record.steps.unsqueeze(-1) - 3) & (number > 0)
    total = torch.where(counted, record.moved, 0).sum(-1)
    amount = counted.sum(-1)
    moved = torch.where(amount > 0, total / amount.clamp(min=1), torch.inf)
    rollout = moved.argmin(-1)
    last = record.steps[torch.arange(len(rollout)), rollout] - 1
    return _at(record, rollout, last.clamp(min=0))


def _first_q(record: Record, plan: Reasoning) -> Choice:
    assert plan.threshold is not None
    return _first(record, plan, (record.q > plan.threshold) & record.ran)


def _first(record: Record, plan: Reasoning, good: Tensor) -> Choice:
    """The first good step: of the first rollout that has one, or, of parallel rollouts, the
    earliest step, of several the one of highest q; else the entry of highest q."""
    rows, depth = torch.arange(len(good)), good.shape[2]
    if plan.schedule == "sequential":
        place = good.flatten(1).int().argmax(-1)
        rollout, step = place // depth, place % depth
    else:
        step = good.any(1).int().argmax(-1)
        here = good[rows, :, step]
        q = torch.where(here, record.q[rows, :, step], -torch.inf)
        # Behind a q of -inf, which "valid" may take, argmax may find one that is not good.
        rollout = torch.where(q.amax(-1) > -torch.inf, q.argmax(-1), here.int().argmax(-1))
    found, other = _at(record, rollout, step), _highest_q(record, plan)
    there = good.flatten(1).any(-1)
    pairs = zip(vars(found).values(), vars(other).values(), strict=True)
    return Choice(*(torch.where(there, a, b) for a, b in pairs))


SELECTORS: dict[str, Callable[[Record, Reasoning], Choice]] = {
    "last": _last,
    "q": _highest_q,
    "mode": _mode,
    "residual": _residual,
    "first-q": _first_q,
}
"""Selectors that do not know the rules."""
