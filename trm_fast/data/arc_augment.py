"""Images of ARC tasks under the square's symmetries and colour permutations, and their tokens.

Owns Plan (which images of a task are taken, drawn as the official builder draws them), the names
of augmented puzzles, and the tokens of grids. Imported by the builder and the evaluator.

Tokens: 0 padding, 1 end, colour c as c + 2, on a canvas of 30 x 30. A grid stands at an offset;
below its last row and right of its last column stands a line of ends, where the canvas has room.

Dims: A images of a task (the task itself first), N pairs of a task, E examples = A * N.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from trm_fast.data.arc_source import COLOURS, MAX_SIDE, NAME_SEPARATOR, Pair, Task
from trm_fast.symmetry import DIHEDRAL_INVERSE, dihedral_transform, invert_permutation

__all__ = [
    "CELLS",
    "END",
    "PAD",
    "VOCABULARY",
    "Offsets",
    "Plan",
    "draw_plan",
    "encode",
    "image_name",
    "parse_name",
    "undo",
]

PAD, END = 0, 1
VOCABULARY = COLOURS + 2
CELLS = MAX_SIDE * MAX_SIDE
_TRIES = 5  # trials per wanted image
_SIDES = 2  # input and output
_ZERO = np.uint8(ord("0"))
_IMAGE = re.compile(r"(.+)\|\|\|t([0-7])\|\|\|([0-9]{10})", re.ASCII)
# Of a quarter turn or a mirror in a diagonal rows become columns.
_TURNED = np.array([False, True, False, True, False, False, True, True])
# Bounds of the draws of one trial: the symmetry, then Fisher-Yates over nine colours.
_TRIAL = [8, *range(COLOURS - 1, 1, -1)]


@dataclass(frozen=True)
class Plan:
    """The images of one task that become puzzles.

    symmetries: [A] uint8, ids of dihedral_transform.  colours: [A, 10] uint8, colour c becomes
    colours[c]. The first is the task itself.
    """

    symmetries: np.ndarray
    colours: np.ndarray

    def __len__(self) -> int:
        return len(self.symmetries)

    def names(self, name: str) -> Iterator[str]:
        """The puzzles' names: the task's own, then `<name>|||t<symmetry>|||<colours>`."""
        yield name
        for symmetry, colours in zip(self.symmetries[1:], self.colours[1:], strict=True):
            yield image_name(name, int(symmetry), colours)


def image_name(name: str, symmetry: int, colours: np.ndarray) -> str:
    """The name of an augmented puzzle; `colours` [10] uint8 0..9."""
    digits = (colours + _ZERO).tobytes().decode("ascii")
    return f"{name}{NAME_SEPARATOR}t{symmetry}{NAME_SEPARATOR}{digits}"


def parse_name(name: str) -> tuple[str, int, np.ndarray]:
    """(task, symmetry, colours [10] uint8) of a puzzle's name; the identity where it has none.

    Raises ValueError for a name with separators that is not of that form.
    """
    if NAME_SEPARATOR not in name:
        return name, 0, np.arange(COLOURS, dtype=np.uint8)
    match = _IMAGE.fullmatch(name)
    if match and len(set(match[3])) == COLOURS:
        return match[1], int(match[2]), np.frombuffer(match[3].encode(), np.uint8) - _ZERO
    raise ValueError(f"{name[:80]!r} is not TASK{NAME_SEPARATOR}tK{NAME_SEPARATOR}COLOURS")


def draw_plan(task: Task, count: int, random: np.random.RandomState) -> Plan:
    """The task and `count` different random images of it (fewer where few are found).

    The draws are those of the official builder: per trial a symmetry and a permutation of the
    colours 1..9, at most five trials per image; an image equal to an earlier one, whatever the
    order of its pairs, is left out.
    """
    seen = _Seen(task)
    symmetries, colours = np.zeros(1, np.uint8), np.arange(COLOURS, dtype=np.uint8)[None]
    seen.fresh(symmetries, colours)
    kept = [(symmetries, colours)]
    tried = found = 0
    # As many trials as are needed in any case, so that none is drawn in vain.
    while found < count and (trials := min(count - found, _TRIES * count - tried)) > 0:
        draws = random.randint(0, np.tile(_TRIAL, trials)).reshape(trials, len(_TRIAL))
        symmetries, colours = draws[:, 0].astype(np.uint8), _permuted(draws[:, 1:])
        fresh = seen.fresh(symmetries, colours)
        kept.append((symmetries[fresh], colours[fresh]))
        tried, found = tried + trials, found + int(fresh.sum())
    return Plan(*(np.concatenate(part) for part in zip(*kept, strict=True)))


def _permuted(chosen: np.ndarray) -> np.ndarray:
    """Colour maps [n, 10] from the Fisher-Yates choices [n, 8] among the colours 1..9."""
    maps = np.tile(np.arange(COLOURS, dtype=np.uint8), (len(chosen), 1))
    each = np.arange(len(chosen))
    for column, last in enumerate(range(COLOURS - 1, 1, -1)):
        at = chosen[:, column] + 1
        maps[:, last], maps[each, at] = maps[each, at], maps[:, last].copy()
    return maps


class _Seen:
    """Which images of one task have come before.

    Two images differ only by what symmetry and colour map do to the colours that occur, which is a
    number per image; and images of different numbers are equal only where a fingerprint is, a sum
    over cells of words by place times a word by colour. Where both leave doubt the grids decide.
    """

    def __init__(self, task: Task) -> None:
        words = np.random.Generator(np.random.Philox(seed=7))
        self._by_place = words.integers(0, 2**63, (_SIDES, MAX_SIDE, MAX_SIDE)).astype(np.uint64)
        self._by_colour = words.integers(0, 2**63, COLOURS).astype(np.uint64) | np.uint64(1)
        self._pairs = list(task.pairs())
        used = np.unique(np.concatenate([grid.ravel() for pair in self._pairs for grid in pair]))
        self._scale = np.zeros(COLOURS, np.int64)
        self._scale[used] = 10 ** np.arange(len(used))
        self._sums: dict[int, np.ndarray] = {}
        self._numbers: set[int] = set()
        self._marks: dict[int, list[Any]] = {}

    def fresh(self, symmetries: np.ndarray, colours: np.ndarray) -> np.ndarray:
        """[n] bool: whether each image [n], [n, 10] differs from all before it; they are noted."""
        numbers = symmetries * np.int64(10**COLOURS) + colours.astype(np.int64) @ self._scale
        marks = self._fingerprints(symmetries, colours)
        result = np.zeros(len(numbers), bool)
        for i, (number, mark) in enumerate(zip(numbers.tolist(), marks.tolist(), strict=True)):
            if number in self._numbers:
                continue
            self._numbers.add(number)
            image = symmetries[i], colours[i]
            others = self._marks.setdefault(mark, [])
            if others and any(self._grids(*image) == self._grids(*other) for other in others):
                continue
            others.append(image)
            result[i] = True
        return result

    def _fingerprints(self, symmetries: np.ndarray, colours: np.ndarray) -> np.ndarray:
        marks = np.zeros(len(symmetries), np.uint64)
        for symmetry in np.unique(symmetries).tolist():
            rows = np.flatnonzero(symmetries == symmetry)
            if symmetry not in self._sums:
                self._sums[symmetry] = self._colour_sums(symmetry)
            pairs = self._by_colour[colours[rows]] @ self._sums[symmetry]
            pairs = (pairs ^ (pairs >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            pairs ^= pairs >> np.uint64(32)
            marks[rows] = (pairs * (pairs | np.uint64(1))).sum(1)
        return marks

    def _colour_sums(self, symmetry: int) -> np.ndarray:
        """For each colour and pair the sum of the words of its places; uint64 [10, N]."""
        sums = np.zeros((len(self._pairs), COLOURS), np.uint64)
        for row, pair in zip(sums, self._pairs, strict=True):
            for side, grid in enumerate(pair):
                moved = dihedral_transform(grid, symmetry)
                height, width = moved.shape
                np.add.at(row, moved, self._by_place[side, :height, :width])
        return sums.T

    def _grids(self, symmetry: np.uint8, colours: np.ndarray) -> list[tuple[Any, ...]]:
        """The image itself, its pairs sorted."""
        pairs = []
        for pair in self._pairs:
            moved = [colours[dihedral_transform(grid, int(symmetry))] for grid in pair]
            pairs.append(tuple(part for grid in moved for part in (grid.shape, grid.tobytes())))
        return sorted(pairs)


class Offsets:
    """Draws where the grids of training puzzles stand, as the official builder does.

    Of each puzzle one random pair stays in the corner; every other one is moved to a random place
    at which both its grids fit.
    """

    _BLOCK = 1 << 16

    def __init__(self, random: np.random.RandomState) -> None:
        self._random = random
        self._words: Iterator[int] = chain.from_iterable(self._blocks())

    def _blocks(self) -> Iterator[list[int]]:
        while True:
            yield self._random.randint(0, 2**32, self._BLOCK, dtype=np.uint32).tolist()

    def draw(self, pairs: list[Pair], symmetries: np.ndarray) -> np.ndarray:
        """Rows and columns [A, N, 2] uint8 for the images [A] of the N pairs of a task."""
        last = len(pairs) - 1
        upright = [[MAX_SIDE - max(x.shape[k], y.shape[k]) for k in (0, 1)] for x, y in pairs]
        moves = [_moves(upright), _moves([room[::-1] for room in upright])]
        turned, masked = _TURNED[symmetries].tolist(), _mask(last)
        at: list[int] = []
        values: list[int] = []
        # numpy's rejection: a word is masked to the bits of the bound, and taken anew while it is
        # larger; a bound of 0 takes none.
        for image, is_turned in enumerate(turned):
            still = 0
            if last:
                for word in self._words:
                    still = word & masked
                    if still <= last:
                        break
            base = image * len(pairs) * 2
            for slot, bound, mask in moves[is_turned][still]:
                value = 0
                for word in self._words:
                    value = word & mask
                    if value <= bound:
                        break
                at.append(base + slot)
                values.append(value)
        result = np.zeros((len(symmetries), len(pairs), 2), np.uint8)
        result.reshape(-1)[at] = values
        return result


def _mask(bound: int) -> int:
    return (1 << bound.bit_length()) - 1


def _moves(rooms: list[list[int]]) -> list[list[tuple[int, int, int]]]:
    """By the pair that stays: what is drawn, in order, as (slot, bound, mask)."""
    slots = [
        (2 * pair + axis, bound, _mask(bound))
        for pair, room in enumerate(rooms)
        for axis, bound in enumerate(room)
        if bound
    ]
    return [[slot for slot in slots if slot[0] // 2 != still] for still in range(len(rooms))]


def encode(pairs: list[Pair], plan: Plan, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the inputs and of the outputs of a plan's images, each [A, N, 900] uint8.

    offsets: [A, N, 2], the row and the column at which both grids of a pair stand.
    """
    inputs, outputs = (
        _encode([pair[side] for pair in pairs], plan, offsets.astype(np.int64)) for side in (0, 1)
    )
    return inputs, outputs


def _encode(grids: list[np.ndarray], plan: Plan, offsets: np.ndarray) -> np.ndarray:
    side = MAX_SIDE + 1  # room for the line of ends that the canvas may lack
    canvas = np.zeros((len(plan), len(grids), side * side), np.uint8)
    flat = canvas.reshape(-1)
    tokens = np.full((len(plan), COLOURS + 2), PAD, np.uint8)
    tokens[:, :COLOURS] = plan.colours + np.uint8(2)
    tokens[:, COLOURS] = END
    start = np.arange(len(plan))[:, None] * len(grids) + np.arange(len(grids))
    start = start * (side * side) + offsets[:, :, 0] * side + offsets[:, :, 1]
    for symmetry in np.unique(plan.symmetries).tolist():
        rows = np.flatnonzero(plan.symmetries == symmetry)
        of_rows = tokens[rows]
        for index, grid in enumerate(grids):
            moved = dihedral_transform(grid, symmetry)
            height, width = moved.shape
            block = np.full((height + 1, width + 1), COLOURS, np.intp)
            block[:height, :width] = moved
            block[height, width] = COLOURS + 1  # the corner between the lines stays padding
            place = np.arange(height + 1)[:, None] * side + np.arange(width + 1)
            where = start[rows, index][:, None] + place.ravel()
            flat[where] = of_rows[:, block.ravel()]
    full = canvas.reshape(len(plan), len(grids), side, side)
    return full[:, :, :MAX_SIDE, :MAX_SIDE].reshape(len(plan), len(grids), CELLS)


def undo(grid: np.ndarray, symmetry: int, colours: np.ndarray) -> np.ndarray:
    """The grid [rows, columns] uint8 whose image under a symmetry and a colour map is `grid`."""
    inverse = invert_permutation(colours).astype(np.uint8)
    return inverse[dihedral_transform(grid, DIHEDRAL_INVERSE[symmetry])]
