"""Rollouts of many puzzles: which is worked on when, when each ends, and what all of them said.

Owns the loop: as many items, each one rollout of one puzzle, as fit in a batch are worked on side
by side (`lanes.py`); one that has ended makes room for the next, and a batch that runs empty is
made smaller. Which answers are found does not depend on the size of the batch. Imported by
`inference.py`. Terms are those of `reasoning.py`.

Dims legend: P puzzles, K rollouts, D steps, L tokens, M items of a step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trm_fast.lanes import Lanes, Puzzles, Said
from trm_fast.model import Model
from trm_fast.puzzle_kind import PuzzleKind
from trm_fast.reasoning import Reasoning

__all__ = ["Budget", "Record", "Rollouts", "Stepped", "puzzles_at_once"]

RECORD_BYTES = 1 << 28  # of one record, where it holds more than one puzzle


@dataclass(frozen=True)
class Record:
    """What the rollouts said at every step, in each puzzle's own frame, the givens written over.

    Attributes:
        tokens: [P, K, D, L], of the type of `token_dtype`.
        q: [P, K, D] float32.  moved: [P, K, D] float32; both see `lanes.Said`.
        steps: [P, K] int64, steps run: what lies beyond means nothing.
    """

    tokens: Tensor
    q: Tensor
    moved: Tensor
    steps: Tensor

    def cut(self, rollouts: int | None = None, depth: int | None = None) -> Record:
        """The first rollouts, and of each the first steps."""
        k, d = slice(rollouts), slice(depth)
        steps = self.steps[:, k] if depth is None else self.steps[:, k].clamp(max=depth)
        return Record(self.tokens[:, k, d], self.q[:, k, d], self.moved[:, k, d], steps)

    @property
    def ran(self) -> Tensor:
        """[P, K, D] bool: which steps were run."""
        return torch.arange(self.q.shape[2]) < self.steps.unsqueeze(-1)


@dataclass(frozen=True)
class Stepped:
    """What one step made of the items in it, for those who watch.

    Attributes:
        items: [M] int64, puzzle * K + rollout.  taken: [M] int64, steps each has made.
        going_on: [M] bool, whether it will make more.  said: of the M items.
    """

    items: np.ndarray
    taken: np.ndarray
    going_on: np.ndarray
    said: Said


def token_dtype(values: int) -> torch.dtype:
    """The smallest integer type for tokens of so many values."""
    return torch.uint8 if values <= 256 else torch.int16 if values <= 1 << 15 else torch.int32


class Budget:
    """Seconds of work, or None for no limit; only what passes between `start` and `pause` counts.

    Several puzzles that share one get what those before them left.
    """

    def __init__(self, seconds: float | None) -> None:
        self._left, self._since = seconds, 0.0

    def start(self) -> None:
        """Work begins, or goes on."""
        self._since = time.monotonic()

    def pause(self) -> None:
        """Others have their turn, which is not charged."""
        if self._left is not None:
            self._left -= time.monotonic() - self._since

    @property
    def spent(self) -> bool:
        """Whether nothing is left; to be asked while work goes on."""
        return self._left is not None and time.monotonic() - self._since >= self._left


def puzzles_at_once(plan: Reasoning, length: int, values: int) -> int:
    """P, so that the record of a plan on puzzles of `length` tokens of so many values takes no more
    than it may."""
    assert plan.depth is not None
    step = length * token_dtype(values).itemsize + 8
    return max(1, RECORD_BYTES // (plan.rollouts * plan.depth * step))


class Rollouts:
    """The rollouts of some puzzles: `run` them, then look at the `record`.

    Args:
        model: in evaluation mode, on the device of the puzzles.
        kind: of the puzzles.  plan: resolved for the model.
        width: items side by side, at most.
        budget: started; when it is spent no further step is made. None is no limit.
        watched, cuda_graph: see `Lanes`.
    """

    def __init__(
        self,
        model: Model,
        kind: PuzzleKind,
        puzzles: Puzzles,
        plan: Reasoning,
        width: int,
        budget: Budget | None = None,
        watched: bool = False,
        cuda_graph: bool = True,
    ) -> None:
        assert plan.depth is not None
        if type(width) is not int or width < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, got {width!r}")
        self._lanes = Lanes(model, kind, puzzles, plan, watched, cuda_graph)
        self._kind, self._plan, self._width = kind, plan, width
        self._budget = budget or Budget(None)
        self._inputs = puzzles.inputs
        device, (count, length) = puzzles.inputs.device, puzzles.inputs.shape
        dtype = token_dtype(model.config.vocab_size)
        shape = (count * plan.rollouts, plan.depth)
        self._tokens = torch.zeros(*shape, length, dtype=dtype, device=device)
        self._q = torch.full(shape, -torch.inf, device=device)
        self._moved = torch.full(shape, torch.inf, device=device)
        self._taken = np.zeros(shape[0], np.int64)  # steps of every item
        self._limit = np.full(count, plan.depth)  # steps that count of every rollout of a puzzle
        self._answered = np.zeros(count, bool)
        self._waiting = deque(self._order(count))
        self._items = np.zeros(0, np.int64)  # side by side; -1 where there is room

    def _order(self, count: int) -> list[int]:
        k = self._plan.rollouts
        items = np.arange(count * k).reshape(count, k)
        if self._plan.schedule == "sequential":
            return items[:, 0].tolist()
        # Rollouts that one answer ends go together; else every puzzle has its first one early.
        return (items if self._plan.stops else items.T).ravel().tolist()

    def record(self) -> Record:
        """Everything so far, on the CPU."""
        k = self._plan.rollouts
        taken = np.minimum(self._taken.reshape(-1, k), self._limit[:, None])
        tokens, q, moved = (
            t.cpu().unflatten(0, (-1, k)) for t in (self._tokens, self._q, self._moved)
        )
        return Record(tokens, q, moved, torch.from_numpy(taken))

    @torch.inference_mode()
    def run(self) -> Iterator[Stepped]:
        """Make every step there is to make, and yield what each one did."""
        with self._lanes as lanes:
            while self._refill(lanes):
                if self._budget.spent:
                    return
                yield self._note(lanes.step())

    def _refill(self, lanes: Lanes) -> bool:
        """Put waiting items where there is room; False where none is left."""
        waiting = self._waiting
        if not len(self._items):
            first = [waiting.popleft() for _ in range(min(self._width, len(waiting)))]
            if first:
                self._items = np.array(first)
                lanes.begin(self._on_device(self._items))
            return bool(first)
        room = np.flatnonzero(self._items < 0)[: len(waiting)]
        if len(room):
            self._items[room] = [waiting.popleft() for _ in room]
            lanes.replace(self._on_device(room), self._on_device(self._items[room]))
        busy = np.flatnonzero(self._items >= 0)
        if len(busy) and lanes.too_wide_for(len(busy)):
            lanes.keep(self._on_device(busy))
            self._items = self._items[busy]
        return bool(len(busy))

    def _on_device(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(self._inputs.device)

    def _note(self, said: Said) -> Stepped:
        """Write down a step, and end what it ends."""
        places = np.flatnonzero(self._items >= 0)
        items = self._items[places]
        if len(places) < len(self._items):
            rows = self._on_device(places)
            said = said.of(rows)
        at = self._on_device(items), self._on_device(self._taken[items])
        self._tokens[at] = said.tokens.to(self._tokens.dtype)
        self._q[at], self._moved[at] = said.q, said.moved
        self._taken[items] += 1
        over = self._ended(items, said)
        self._items[places[over]] = -1
        return Stepped(items, self._taken[items], ~over, said)

    def _ended(self, items: np.ndarray, said: Said) -> np.ndarray:
        """Which of the items [M] make no more steps, [M] bool."""
        plan, taken = self._plan, self._taken[items]
        puzzle, rollout = np.divmod(items, plan.rollouts)
        over = np.zeros(len(items), bool)
        if plan.halt == "q":
            over |= self._above(said)
        elif plan.halt == "fixed-point":
            over |= ((said.moved <= plan.tolerance) & said.stayed).cpu().numpy()
        if plan.stops:
            found = self._above(said) if plan.select == "first-q" else self._valid(puzzle, said)
            over |= found
            if plan.schedule == "sequential":
                self._answered[puzzle[found]] = True
            else:
                np.minimum.at(self._limit, puzzle[found], taken[found])
        over |= taken >= self._limit[puzzle]
        if plan.schedule == "sequential":
            again = over & ~self._answered[puzzle] & (rollout + 1 < plan.rollouts)
            self._waiting.extend((items[again] + 1).tolist())
        return over

    def _above(self, said: Said) -> np.ndarray:
        assert self._plan.threshold is not None
        return (said.q > self._plan.threshold).cpu().numpy()

    def _valid(self, puzzle: np.ndarray, said: Said) -> np.ndarray:
        assert self._kind.rules is not None
        inputs = self._inputs[self._on_device(puzzle)].cpu().numpy()
        return self._kind.rules(inputs, said.tokens.cpu().numpy())
