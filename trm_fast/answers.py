"""What comes back from a model that was asked: answers, and the frames on the way to one.

Owns these two classes and nothing that makes them (`inference.py`). Imported by `model.py` and by
whatever shows answers; imports torch only.

Dims legend: N puzzles, K rollouts, L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Answers", "Frame"]


@dataclass(frozen=True)
class Answers:
    """Answers to N puzzles, on the CPU.

    Attributes:
        tokens: [N, L] int64, with what the puzzle gives (clues, walls) written over them.
        q: [N] float32, the halting logit of the step that gave the answer.
        step: [N] int64, 1-based; 0 where the budget ran out before the first, then the tokens are
            the puzzle's and q is -inf.
        rollout: [N] int64, from 0.
        passes: [N] int64, supervision steps of all rollouts of the puzzle that were needed.
        confidence: [N] float32 in [0, 1]: sigmoid(q), or with select="mode" the share of votes.
        cut: [N] bool, whether the budget ran out before its rollouts had ended.
    """

    tokens: Tensor
    q: Tensor
    step: Tensor
    rollout: Tensor
    passes: Tensor
    confidence: Tensor
    cut: Tensor


@dataclass(frozen=True)
class Frame:
    """The K rollouts of one puzzle after a supervision step of those that still run.

    Attributes:
        number: 1-based.
        tokens: [K, L] int64 in the puzzle's own frame, the given ones written over; the puzzle
            itself before a rollout's first step.
        certainty: [K, L] float32, the probability of each token shown, of a given one 1.
        q: [K] float32, -inf before a rollout's first step.
        steps: [K] int64, steps each has made.  running: [K] bool, whether it will make more.
        answer: what counts; in the last frame only.
    """

    number: int
    tokens: Tensor
    certainty: Tensor
    q: Tensor
    steps: Tensor
    running: Tensor
    answer: Answers | None = None
