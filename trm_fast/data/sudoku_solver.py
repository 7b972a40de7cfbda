"""A Sudoku solver that works on all boards at once, in numpy, without a compiler.

Owns the propagation of naked and hidden singles (also used by data.sudoku_generator), the search
that counts solutions, and the checks of the rules. May be imported by the builders and by the
commands that judge answers; imports symmetry (box shapes) and numpy.

Dims: N boards, L cells, side digits. Boards are [N, L] digits, 0 for a blank. Inside, a board is a
column of candidate masks [L, N] uint16, bit d - 1 for digit d: every operation runs over thousands
of boards that lie side by side in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trm_fast.symmetry import BoxShape, box_shape

__all__ = [
    "Solutions",
    "candidates",
    "clashing",
    "digits_of",
    "is_valid",
    "propagate",
    "rules_hold",
    "solve",
]

WIDTH = 2048
"""Boards worked on together: their masks (324 KiB for 9x9) stay in the second-level cache."""


@dataclass(frozen=True)
class Solutions:
    """boards [N, L] uint8: a solution of each board, zeros where there is none;
    counts [N] uint8: 0, 1, or 2 for two or more; given_up [N] bool: there may be more."""

    boards: np.ndarray
    counts: np.ndarray
    given_up: np.ndarray


def candidates(boards: np.ndarray, box: BoxShape) -> np.ndarray:
    """Masks [L, N] of boards [N, L]: one bit for a clue, all bits for a blank."""
    bits = np.concatenate([[(1 << box.side) - 1], 1 << np.arange(box.side)]).astype(np.uint16)
    return bits[np.ascontiguousarray(boards.T)]


def _columns(masks: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """masks[:, chosen], but row-major: plain indexing would give a column-major copy."""
    return masks.take(chosen, axis=1)


def digits_of(masks: np.ndarray) -> np.ndarray:
    """Boards [N, L] uint8 of masks [L, N]: the digit of single bits, 0 for anything else."""
    table = np.zeros(1 << 9, np.uint8)
    table[1 << np.arange(9)] = np.arange(1, 10)
    return np.ascontiguousarray(table[masks].T)


def propagate(masks: np.ndarray, box: BoxShape) -> tuple[np.ndarray, np.ndarray]:
    """One round of naked and hidden singles on masks [L, N] -> (new masks, dead [N] bool).

    A digit known in a cell leaves the other cells of its units; a digit with one place in a unit
    goes there. dead marks boards with a cell without candidates or a unit without a digit.
    """
    n = masks.shape[1]
    full = np.uint16((1 << box.side) - 1)
    shape = (*box.axes, n)
    known = (masks & (masks - np.uint16(1))) == 0
    placed = (masks * known).reshape(shape)
    gone = np.bitwise_or.reduce(placed, (2, 3), keepdims=True)
    gone = gone | np.bitwise_or.reduce(placed, (0, 1), keepdims=True)
    gone = gone | np.bitwise_or.reduce(placed, (1, 3), keepdims=True)
    left = masks & (placed | ~gone).reshape(masks.shape)
    view = left.reshape(shape)
    alone = np.zeros(shape, np.uint16)
    dead = (left == 0).any(0)
    for order in ((0, 1, 2, 3), (2, 3, 0, 1), (0, 2, 1, 3)):
        # Units along the first two axes of the rearranged view, their cells along the next two.
        cells = view.transpose(*order, 4)
        once = np.zeros((*cells.shape[:2], n), np.uint16)
        more = np.zeros_like(once)
        for i in range(cells.shape[2]):
            for j in range(cells.shape[3]):
                cell = cells[:, :, i, j]
                more |= once & cell
                once |= cell
        dead |= (once != full).any((0, 1))
        alone_view = alone.transpose(*order, 4)
        alone_view |= (once & ~more)[:, :, None, None]
    hidden = left & alone.reshape(masks.shape)
    dead |= ((hidden & (hidden - np.uint16(1))) * (hidden != 0)).any(0)
    # hidden where it is not zero, else left.
    return hidden | (left * (hidden == 0)), dead


def solve(
    boards: np.ndarray,
    *,
    limit: int = 2,
    rng: np.random.Generator | None = None,
    guesses: int | None = None,
) -> Solutions:
    """Search all boards [N, L] for up to `limit` (1 or 2) solutions each.

    limit=2 tells boards with one solution from those with several, limit=1 stops at the first.
    Guesses are the smallest digit first, or at random with `rng` (then blank boards give random
    grids). A board that takes more than `guesses` is given up: the hardest puzzles known take 400,
    but some boards without a solution millions. Raises ValueError for digits outside 0..side or a
    board size that is not supported.
    """
    boards = _checked(boards)
    box = box_shape(cells=boards.shape[1])
    search = _Search(boards.shape, box, limit, rng, guesses)
    for start in range(0, len(boards), WIDTH):
        ids = np.arange(start, min(start + WIDTH, len(boards)))
        search.push(candidates(boards[ids], box), ids)
        # The stack is run down before more boards join, so memory does not grow with N.
        search.run(until=WIDTH // 2)
    search.run(until=0)
    return Solutions(search.boards, search.counts, search.given_up & (search.counts < limit))


class _Search:
    """Depth-first search over a stack of partly solved boards, the topmost thousands at a time."""

    def __init__(
        self,
        shape: tuple[int, ...],
        box: BoxShape,
        limit: int,
        rng: np.random.Generator | None,
        guesses: int | None,
    ) -> None:
        self.boards = np.zeros(shape, np.uint8)
        self.counts = np.zeros(shape[0], np.uint8)
        self.given_up = np.zeros(shape[0], bool)
        self._box, self._limit, self._rng, self._most = box, limit, rng, guesses
        self._guesses = np.zeros(shape[0], np.int64)
        self._stack: list[tuple[np.ndarray, np.ndarray]] = []
        self._size = 0
        self._bits = np.array([bin(mask).count("1") for mask in range(1 << 9)], np.uint8)

    def push(self, masks: np.ndarray, ids: np.ndarray) -> None:
        if ids.size:
            self._stack.append((masks, ids))
            self._size += ids.size

    def run(self, until: int) -> None:
        """Work until at most `until` boards are on the stack."""
        while self._size > until:
            masks, ids = self._pop()
            if ids.size:
                self._step(masks, ids)

    def _pop(self) -> tuple[np.ndarray, np.ndarray]:
        """About WIDTH columns off the top, without those of boards that are done."""
        taken: list[tuple[np.ndarray, np.ndarray]] = []
        width = 0
        while self._stack and width < WIDTH:
            masks, ids = self._stack.pop()
            self._size -= ids.size
            wanted = (self.counts[ids] < self._limit) & ~self.given_up[ids]
            if not wanted.all():
                masks, ids = _columns(masks, np.flatnonzero(wanted)), ids[wanted]
            taken.append((masks, ids))
            width += ids.size
        if len(taken) == 1:
            return taken[0]
        return np.concatenate([m for m, _ in taken], 1), np.concatenate([i for _, i in taken])

    def _step(self, masks: np.ndarray, ids: np.ndarray) -> None:
        before, _ = propagate(masks, self._box)
        after, dead = propagate(before, self._box)
        changed = (after != before).any(0)
        unsolved = ((after & (after - np.uint16(1))) != 0).any(0)
        done = np.flatnonzero(~dead & ~changed & ~unsolved)
        if done.size:
            self.boards[ids[done]] = digits_of(_columns(after, done))
            np.add.at(self.counts, ids[done], 1)
            np.minimum(self.counts, self._limit, out=self.counts)
        guess = np.flatnonzero(~dead & ~changed & unsolved)
        going = np.flatnonzero(~dead & changed)
        if guess.size:
            if self._most is not None:
                np.add.at(self._guesses, ids[guess], 1)
                self.given_up = self._guesses > self._most
            chosen, rest = self._branch(_columns(after, guess))
            self.push(rest, ids[guess])
            self.push(chosen, ids[guess])
        if going.size:
            self.push(_columns(after, going), ids[going])

    def _branch(self, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Split each column at a cell with the fewest candidates: one of them, or any other."""
        columns = np.arange(masks.shape[1])
        sizes = self._bits[masks]
        sizes[sizes < 2] = 99
        cell = sizes.argmin(0)
        mask = masks[cell, columns]
        if self._rng is not None:
            drop = (self._rng.random(mask.size) * sizes[cell, columns]).astype(np.int64)
            for i in range(int(drop.max())):
                mask = np.where(drop > i, mask & (mask - np.uint16(1)), mask)
        bit = mask & (~mask + np.uint16(1))
        chosen, rest = masks.copy(), masks
        rest[cell, columns] &= ~bit
        chosen[cell, columns] = bit
        return chosen, rest


def is_valid(boards: np.ndarray) -> np.ndarray:
    """Whether each board [N, L] is full and has every digit once in every unit; bool [N]."""
    boards = _checked(boards)
    box = box_shape(cells=boards.shape[1])
    full = np.uint16((1 << box.side) - 1)
    view = _bits(boards).reshape(len(boards), *box.axes)
    return np.logical_and.reduce(
        [
            (np.bitwise_or.reduce(view, axes) == full).reshape(len(boards), -1).all(1)
            for axes in ((3, 4), (1, 2), (2, 4))
        ]
    )


def clashing(boards: np.ndarray) -> np.ndarray:
    """Whether some digit stands twice in a unit of each board [N, L], blanks apart; bool [N]."""
    boards = _checked(boards)
    box = box_shape(cells=boards.shape[1])
    view = _bits(boards).reshape(len(boards), *box.axes).astype(np.int32)
    # Different bits add up to their union; equal ones carry over and give something else.
    return np.logical_or.reduce(
        [
            (view.sum(axes) != np.bitwise_or.reduce(view, axes)).reshape(len(boards), -1).any(1)
            for axes in ((3, 4), (1, 2), (2, 4))
        ]
    )


def rules_hold(clues: np.ndarray, boards: np.ndarray) -> np.ndarray:
    """Whether each board [N, L] is valid and keeps the clues [N, L] (0 for a blank); bool [N]."""
    clues, boards = _checked(clues), _checked(boards)
    return is_valid(boards) & ((clues == 0) | (clues == boards)).all(1)


def _bits(boards: np.ndarray) -> np.ndarray:
    """Bit d - 1 for digit d, no bit for a blank; uint16."""
    return np.concatenate([[0], 1 << np.arange(9)]).astype(np.uint16)[boards]


def _checked(boards: np.ndarray) -> np.ndarray:
    boards = np.asarray(boards)
    if boards.ndim != 2 or boards.dtype.kind not in "iu":
        raise ValueError(f"boards of {boards.dtype} and shape {boards.shape}: integers [N, L]")
    side = box_shape(cells=boards.shape[1]).side
    if boards.size and not (int(boards.min()) >= 0 and int(boards.max()) <= side):
        row = int(np.flatnonzero(((boards < 0) | (boards > side)).any(1))[0])
        raise ValueError(f"board {row} has a digit outside 0..{side}")
    return boards
