"""Rollouts of many puzzles: worked on side by side, and what all of them said.

Owns the loop: as many items, each one rollout of one puzzle, as fit in a batch are worked on side
by side (`lanes.py`); one that has ended makes room for the next (`schedule.py`), and a batch that
runs empty is made smaller. Which answers are found does not depend on the size of the batch.
Imported by `inference.py`. Terms are those of `reasoning.py`.

Dims legend: P puzzles, K rollouts, D steps, L tokens, M items of a step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trm_fast.lanes import Lanes, Puzzles, Said
from trm_fast.model import Model
from trm_fast.puzzle_kind import PuzzleKind
from trm_fast.reasoning import Reasoning
from trm_fast.schedule import Schedule
from trm_fast.timing import synchronize

__all__ = ["Budget", "Record", "Result", "Rollouts", "Stepped", "puzzles_at_once", "record_bytes"]

RECORD_BYTES = 1 << 27  # of one record, where it holds more than one puzzle; two live at a time
AHEAD = 16  # items side by side on a CPU up to which a further one costs much less than the first


@dataclass(frozen=True)
class Record:
    """What the rollouts said at every step, but for the answers themselves.

    Attributes:
        q: [P, K, D] float32.  moved: [P, K, D] float32; both see `lanes.Said`.
        said: [P, K, D] int64, the same number for the same answer to a puzzle, and for two that
            differ with a chance of 2**-64 (times the power of two that is in all differences).
        steps: [P, K] int64, steps run: what lies beyond means nothing.
    """

    q: Tensor
    moved: Tensor
    said: Tensor
    steps: Tensor

    def cut(self, rollouts: int | None = None, depth: int | None = None) -> Record:
        """The first rollouts, and of each the first steps."""
        k, d = slice(rollouts), slice(depth)
        steps = self.steps[:, k] if depth is None else self.steps[:, k].clamp(max=depth)
        return Record(self.q[:, k, d], self.moved[:, k, d], self.said[:, k, d], steps)

    @property
    def ran(self) -> Tensor:
        """[P, K, D] bool: which steps were run."""
        return torch.arange(self.q.shape[2]) < self.steps.unsqueeze(-1)


@dataclass(frozen=True)
class Result:
    """A record, and of each rollout the two answers that can be chosen, in the puzzle's own frame
    with the givens written over.

    Attributes:
        best: [P, K, L] of the step of highest q, the first of several.
        last: [P, K, L] of the last step; of a rollout that went further than counts, of one that
            does not count. Both of the type of `token_dtype`.
        valid: [P, K, D] bool, which answers keep the rules; None unless the plan selects by them.
        cut: [P] bool, whether there were more steps to make.
    """

    record: Record
    best: Tensor
    last: Tensor
    valid: Tensor | None
    cut: Tensor

    def tokens(self, rollout: Tensor, step: Tensor) -> Tensor:
        """[P, L] int64, the answers of these rollouts [P] at steps [P], 1-based: the last ones or
        those of highest q; of step 0, any."""
        rows = torch.arange(len(step))
        ended = step == self.record.steps[rows, rollout]
        q = torch.where(self.record.ran[rows, rollout], self.record.q[rows, rollout], -torch.inf)
        held = ended | (step == 0) | (step == q.argmax(-1) + 1)
        assert bool(held.all()), "an answer that is neither the last nor the best"
        best, last = self.best[rows, rollout], self.last[rows, rollout]
        return torch.where(ended.unsqueeze(-1), last, best).long()


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
    """Seconds of work, or None for no limit; only what passes inside `counting` is charged.

    Several puzzles that share one get what those before them left.

    Args:
        timed: whether the seconds used are wanted also where there is no limit, which has the
            device waited for after every step.
    """

    def __init__(self, seconds: float | None = None, timed: bool = True) -> None:
        self._seconds, self._timed = seconds, timed or seconds is not None
        self.used = 0.0

    @contextmanager
    def counting(self, device: torch.device) -> Iterator[None]:
        """Work is done on this device."""
        begun = time.monotonic()
        try:
            yield
        finally:
            if self._timed:
                synchronize(device)
            self.used += time.monotonic() - begun

    @property
    def spent(self) -> bool:
        """Whether nothing is left."""
        return self._seconds is not None and self.used >= self._seconds


def record_bytes(rollouts: int, depth: int, length: int, values: int) -> int:
    """Of the record of one puzzle of `length` tokens of so many values."""
    of_a_step = 4 + 4 + 8 + 1
    return rollouts * (depth * of_a_step + 2 * length * token_dtype(values).itemsize)


def puzzles_at_once(plan: Reasoning, length: int, values: int) -> int:
    """P, so that their records take no more than they may; arguments as `record_bytes`."""
    assert plan.depth is not None
    return max(1, RECORD_BYTES // record_bytes(plan.rollouts, plan.depth, length, values))


class Rollouts:
    """The rollouts of some puzzles: `run` them, then look at the `result`.

    Args:
        model: in evaluation mode, on the device of the puzzles.
        kind: of the puzzles.  plan: resolved for the model.
        width: items side by side, at most.
        budget: when it is spent no further step is made. None is no limit.
        watched, cuda_graph: see `Lanes`; of what is watched nothing is begun ahead.
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
        self._budget = budget or Budget(timed=False)
        self._inputs = puzzles.inputs
        device, (count, length) = puzzles.inputs.device, puzzles.inputs.shape
        shape = (count * plan.rollouts, plan.depth)
        self._q = torch.zeros(shape, device=device)
        self._moved = torch.zeros(shape, device=device)
        self._said = torch.zeros(shape, dtype=torch.int64, device=device)
        self._valid = np.zeros(shape, bool) if plan.select == "valid" else None
        tokens = torch.zeros(
            2, shape[0], length, dtype=token_dtype(model.config.vocab_size), device=device
        )
        self._best, self._last = tokens
        self._highest = torch.full(shape[:1], -torch.inf, device=device)
        self._weights = _fingerprint_weights(length).to(device)
        self._taken = np.zeros(shape[0], np.int64)  # steps of every item
        self._schedule = Schedule(count, plan)
        ahead = width if device.type != "cpu" else AHEAD
        self._ahead = 0 if watched else ahead
        self._items = np.zeros(0, np.int64)  # side by side; -1 where there is room

    def result(self) -> Result:
        """Everything so far, on the CPU."""
        k = self._plan.rollouts
        q, moved, said, best, last = (
            t.cpu().unflatten(0, (-1, k))
            for t in (self._q, self._moved, self._said, self._best, self._last)
        )
        valid = None
        if self._valid is not None:
            valid = torch.from_numpy(self._valid).unflatten(0, (-1, k))
        steps = torch.from_numpy(self._schedule.counted(self._taken))
        cut = torch.from_numpy(self._schedule.unfinished())
        return Result(Record(q, moved, said, steps), best, last, valid, cut)

    @torch.inference_mode()
    def run(self) -> Iterator[Stepped]:
        """Make every step there is to make, and yield what each one did."""
        with self._lanes as lanes:
            while not self._budget.spent:
                with self._budget.counting(self._inputs.device):
                    if not self._refill(lanes):
                        return
                    stepped = self._note(lanes.step())
                yield stepped

    def _refill(self, lanes: Lanes) -> bool:
        """Put the next items where there is room; False where none is left."""
        busy = np.flatnonzero(self._items >= 0)
        taken = self._schedule.take(self._width - len(busy), self._ahead - len(busy))
        items, count = np.array(taken, np.int64), len(busy) + len(taken)
        if not len(busy):
            self._items = items
            if count:
                lanes.begin(self._on_device(items))
            return count > 0
        free = np.flatnonzero(self._items < 0)
        behind = max(0, len(items) - len(free))
        if len(self._items) + behind > lanes.size or lanes.too_wide_for(count):
            lanes.keep(self._on_device(busy), count)
            self._items, free = self._items[busy], free[:0]
        places = free[: len(items)]
        first, rest = np.split(items, [len(places)])
        if len(first):
            self._items[places] = first
            lanes.replace(self._on_device(places), self._on_device(first))
        if len(rest):
            self._items = np.concatenate([self._items, rest])
            lanes.extend(self._on_device(rest))
        return True

    def _on_device(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(self._inputs.device, non_blocking=True)

    def _note(self, said: Said) -> Stepped:
        """Write down a step, and end what it ends."""
        places = np.flatnonzero(self._items >= 0)
        items = self._items[places]
        if len(places) < len(self._items):
            rows = self._on_device(places)
            said = said.of(rows)
        rows, tokens = self._on_device(items), said.tokens.to(self._last.dtype)
        at = rows, self._on_device(self._taken[items])
        self._q[at], self._moved[at] = said.q, said.moved
        self._said[at] = (said.tokens * self._weights).sum(-1)
        better = (said.q > self._highest[rows]) | (at[1] == 0)
        self._highest[rows] = torch.where(better, said.q, self._highest[rows])
        self._best[rows] = torch.where(better.unsqueeze(-1), tokens, self._best[rows])
        self._last[rows] = tokens
        self._taken[items] += 1
        over = self._ended(items, said)
        self._items[places[over]] = -1
        return Stepped(items, self._taken[items], ~over, said)

    def _ended(self, items: np.ndarray, said: Said) -> np.ndarray:
        """Which of the items [M] make no more steps, [M] bool."""
        plan = self._plan
        over, found = np.zeros((2, len(items)), bool)
        if plan.halt == "q":
            over = self._above(said)
        elif plan.halt == "fixed-point":
            over = ((said.moved <= plan.tolerance) & said.stayed).cpu().numpy()
        if plan.stops:
            found = self._above(said) if plan.select == "first-q" else self._keeps(items, said)
        return self._schedule.note(items, self._taken[items], found, over)

    def _above(self, said: Said) -> np.ndarray:
        assert self._plan.threshold is not None
        return (said.q > self._plan.threshold).cpu().numpy()

    def _keeps(self, items: np.ndarray, said: Said) -> np.ndarray:
        assert self._kind.rules is not None and self._valid is not None
        inputs = self._inputs[self._on_device(items // self._plan.rollouts)].cpu().numpy()
        kept = self._kind.rules(inputs, said.tokens.cpu().numpy())
        self._valid[items, self._taken[items] - 1] = kept
        return kept


def _fingerprint_weights(length: int) -> Tensor:
    """[L] int64: sums of tokens times these, modulo 2**64, tell answers apart."""
    ends = torch.iinfo(torch.int64)
    drawn = torch.Generator().manual_seed(0)
    return torch.randint(ends.min, ends.max, (length,), generator=drawn)
