"""Which rollout is worked on next, which have ended, and which steps count.

Owns the order of rollouts and what an answer that is found ends. Imported by `rollouts.py`, which
tells it what every step found. Terms are those of `reasoning.py`.

Of rollouts in sequence some are begun ahead where there is room: of a puzzle twice as many as have
failed one after another, so that at most half of them are in vain. What those find that come after
an answer does not count, and neither do their steps: answers and costs are those of one at a time.

Dims legend: P puzzles, K rollouts, M items of a step.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from trm_fast.reasoning import Reasoning

__all__ = ["Schedule"]


class Schedule:
    """Of the rollouts of P puzzles; an item is puzzle * K + rollout.

    Args:
        plan: resolved for the model.
    """

    def __init__(self, puzzles: int, plan: Reasoning) -> None:
        assert plan.depth is not None
        self._k, self._sequential = plan.rollouts, plan.schedule == "sequential"
        items = np.arange(puzzles * self._k).reshape(puzzles, self._k)
        # Parallel rollouts that one answer ends go together; else every puzzle has its first early.
        order = items[:, 0] if self._sequential else items if plan.stops else items.T
        self._waiting = deque(order.ravel().tolist())
        self._limit = np.full(puzzles, plan.depth)  # steps that count of every rollout of a puzzle
        at_once = 1 if self._sequential else self._k
        self._running = np.full(puzzles, at_once)  # or waiting for a place
        # Of rollouts in sequence:
        self._answer = np.full(puzzles, self._k)  # the first that has found one
        self._begun = np.ones(puzzles, np.int64)
        self._failed = np.zeros((puzzles, self._k + 1), bool)
        self._first = np.zeros(puzzles, np.int64)  # that has not failed

    def take(self, room: int, spare: int) -> list[int]:
        """The next items, at most `room`; such that are begun ahead only while there are fewer than
        `spare` in all."""
        waiting = self._waiting
        taken = [waiting.popleft() for _ in range(min(room, len(waiting)))]
        spare = min(spare, room) - len(taken)
        if spare > 0 and self._sequential:
            taken += self._ahead(spare)
        return taken

    def _ahead(self, spare: int) -> list[int]:
        more = np.minimum(2 * self._first, self._answer) - self._begun
        taken: list[int] = []
        for puzzle in np.flatnonzero(more > 0).tolist():
            count = min(int(more[puzzle]), spare - len(taken))
            first = puzzle * self._k + int(self._begun[puzzle])
            taken += range(first, first + count)
            self._begun[puzzle] += count
            self._running[puzzle] += count
        return taken

    def note(
        self, items: np.ndarray, taken: np.ndarray, found: np.ndarray, over: np.ndarray
    ) -> np.ndarray:
        """Which of the items make no more steps, [M] bool.

        Args:
            items: [M] int64.  taken: [M] int64, the steps each has made.
            found: [M] bool, whether this one was an answer that ends its puzzle.
            over: [M] bool, whether it has ended by itself.
        """
        puzzle, rollout = np.divmod(items, self._k)
        if not self._sequential:
            np.minimum.at(self._limit, puzzle[found], taken[found])
            over = over | found | (taken >= self._limit[puzzle])
            np.subtract.at(self._running, puzzle[over], 1)
            return over
        np.minimum.at(self._answer, puzzle[found], rollout[found])
        ended = over | found | (taken >= self._limit[puzzle])
        over = ended | (rollout > self._answer[puzzle])
        failed = ended & ~found
        self._failed[puzzle[failed], rollout[failed]] = True
        np.subtract.at(self._running, puzzle[over], 1)
        for p in np.unique(puzzle[over]).tolist():
            while self._failed[p, self._first[p]]:
                self._first[p] += 1
            if not self._running[p] and self._begun[p] < self._answer[p]:
                self._waiting.append(p * self._k + int(self._begun[p]))
                self._begun[p] += 1
                self._running[p] += 1
        return over

    def unfinished(self) -> np.ndarray:
        """[P] bool: of which puzzles there are steps to make."""
        return self._running > 0

    def counted(self, taken: np.ndarray) -> np.ndarray:
        """[P, K] int64, of the steps that each item made, [P * K], those that count."""
        steps = np.minimum(taken.reshape(-1, self._k), self._limit[:, None])
        return np.where(np.arange(self._k) <= self._answer[:, None], steps, 0)
