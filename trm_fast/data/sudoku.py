"""Builds a Sudoku data set: `python -m trm_fast.data.sudoku --output-dir DIR ...`.

Owns the builder and its command line; imported by trm_fast.__main__ and the runner. Writes the
official layout (data.format) with the official arrays: for the same choices and the same seed the
files hold the same numbers in the same dtypes as those of the official builder under
`numpy.random.seed(seed)`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trm_fast.console import Parser, integer
from trm_fast.data import building
from trm_fast.data.building import Puzzles
from trm_fast.data.format import (
    DataError,
    DatasetWriter,
    open_writer,
    read_manifest,
    sha256,
    verify_manifest,
)
from trm_fast.data.sudoku_generator import generate, generate_apart
from trm_fast.data.sudoku_source import read_puzzles
from trm_fast.symmetry import BoxShape, SudokuSymmetry, box_shape, grid_invariant

__all__ = ["BuildOptions", "build", "main", "split_of_csv"]

DEFAULT_REPO = "sapientinc/sudoku-extreme"
_ROWS = 1 << 13
_ANY_WORD = (1 << 32) - 1
_WORDS = 1 << 15


@dataclass(frozen=True)
class BuildOptions(building.BuildOptions):
    """What to build; the fields are the flags of the command line."""

    clues: tuple[int, int] | None = None
    num_aug: int = 0
    min_difficulty: int | None = None
    compact: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_aug < 0:
            raise ValueError(f"num_aug is {self.num_aug}, expected at least 0")
        if self.clues is not None and self.generate is None:
            raise ValueError("clues are chosen for generated puzzles only")
        if self.size is not None:
            box_shape(self.size)


def build(options: BuildOptions) -> dict[str, Any]:
    """Build the data set and return its manifest (without the files' sha256).

    Raises DataError (bad puzzles, unwritable or foreign output directory) or ValueError (options).
    Nothing appears at output_dir unless all of it was written.
    """
    splits, origin = building.load_splits(
        options,
        lambda path: read_puzzles(
            path,
            size=options.size,
            min_difficulty=options.min_difficulty,
            skip_bad=options.skip_bad,
        ),
        lambda count: _generated(options, count),
        DEFAULT_REPO,
    )
    # The official builder draws from numpy's global generator: the subsample, then augmentations.
    random = np.random.RandomState(options.seed)
    subset = building.subsample(splits, options.subsample_size, random)
    manifest = building.describe(options, origin, subset, splits, 1 + options.num_aug)
    with open_writer(options.output_dir, manifest) as writer:
        for name, puzzles in splits.items():
            num_aug = options.num_aug if name == "train" else 0
            _write_split(writer, name, puzzles, num_aug, random, options.compact)
        writer.json("identifiers.json", ["<blank>"])
    return manifest


def split_of_csv(path: str | os.PathLike[str], parent: str | os.PathLike[str]) -> Path:
    """A puzzle file as a data set of its own under `parent`, one puzzle in twenty held out.

    Built once: as long as the file stays as it is, the folder is used again. Raises as `build`.
    """
    source = Path(path)
    try:
        digest = sha256(source)
        with source.open("rb") as file:
            lines = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    if lines < 3:
        raise DataError(f"{path}: too few puzzles to hold one in twenty out")
    root = Path(parent, f"{source.stem}-{digest[:8]}")
    options = BuildOptions(str(root), source=str(source), test_size=max(1, lines // 20), seed=42)
    manifest = read_manifest(root) if root.is_dir() else None
    if manifest is None or manifest.get("source", {}).get("sha256") != digest:
        build(options)
    elif (damaged := verify_manifest(root, manifest)) is not None:
        raise DataError(
            f"{root / damaged}: missing or damaged; remove {root} to have it made again"
        )
    return root


def _generated(options: BuildOptions, count: int) -> tuple[dict[str, Puzzles], dict[str, Any]]:
    size = options.size or 9
    clues = options.clues or {4: (4, 8), 6: (8, 16), 9: (32, 50)}[size]
    boards, grids = generate(count, clues=clues, size=size, seed=options.seed)
    splits = {"train": Puzzles(boards, grids)}
    if options.test_size:
        # 4x4 and 6x6 have too few grids up to symmetry to hold whole classes out.
        avoid = grid_invariant(grids) if size == 9 else None
        test_seed = options.seed + 1_000_003
        if avoid is None:
            held = generate(options.test_size, clues=clues, size=size, seed=test_seed)
        else:
            held = generate_apart(options.test_size, avoid, clues=clues, size=size, seed=test_seed)
        splits["test"] = Puzzles(*held)
    return splits, {"generated": count, "size": size, "clues": list(clues)}


def _write_split(
    writer: DatasetWriter,
    split: str,
    puzzles: Puzzles,
    num_aug: int,
    random: np.random.RandomState,
    compact: bool,
) -> None:
    """One group per puzzle: the puzzle itself, then num_aug random images of it, as tokens."""
    groups, cells = puzzles.boards.shape
    per_group = 1 + num_aug
    box = box_shape(cells=cells)
    dtype = np.int64 if num_aug and not compact else np.uint8
    shape = (groups * per_group, cells)
    inputs = writer.array(split, "all", "inputs", shape, dtype)
    labels = writer.array(split, "all", "labels", shape, dtype)
    draws = _OfficialDraws(random, box)
    step = max(1, _ROWS // per_group)
    for start in range(0, groups, step):
        boards, grids = puzzles.boards[start : start + step], puzzles.grids[start : start + step]
        rows = slice(start * per_group, (start + len(boards)) * per_group)
        symmetry = _draw(draws, len(boards), num_aug, box)
        for out, digits in ((inputs, boards), (labels, grids)):
            out[rows] = symmetry.apply(np.repeat(digits, per_group, 0)) + np.uint8(1)
    index = np.arange(groups + 1, dtype=np.int32)
    small = {
        "puzzle_identifiers": np.zeros(groups * per_group, np.int32),
        "puzzle_indices": np.arange(groups * per_group + 1, dtype=np.int32),
        "group_indices": index * np.int32(per_group),
    }
    for name, array in small.items():
        writer.array(split, "all", name, array.shape, array.dtype)[:] = array
    inputs.flush()
    labels.flush()
    writer.metadata(split, building.one_kind(box.side + 2, cells, groups))


def _draw(draws: _OfficialDraws, groups: int, num_aug: int, box: BoxShape) -> SudokuSymmetry:
    """For each group the identity and then the next num_aug symmetries drawn."""
    side = box.side
    digits, mirror, rows, cols = draws.take(groups * num_aug)
    cells = np.where(
        mirror[:, None, None],
        cols[:, None, :] * side + rows[:, :, None],
        rows[:, :, None] * side + cols[:, None, :],
    ).reshape(groups, num_aug, box.cells)
    digits = np.pad(digits + 1, ((0, 0), (1, 0))).reshape(groups, num_aug, side + 1)
    same_cells = np.broadcast_to(np.arange(box.cells), (groups, 1, box.cells))
    same_digits = np.broadcast_to(np.arange(side + 1), (groups, 1, side + 1))
    return SudokuSymmetry(
        np.concatenate([same_cells, cells], 1).reshape(-1, box.cells),
        np.concatenate([same_digits, digits], 1).reshape(-1, side + 1),
    )


class _OfficialDraws:
    """Augmentations as the official builder would draw them one by one, many at a time.

    RandomState draws `permutation(n)` by Fisher-Yates from the top: index i is swapped with one of
    0..i, a 32-bit word masked to the bits of i, taken anew while it is too large. `rand` takes two
    words and is below one half if the first has its top bit clear. So one augmentation is a chain
    of words, each the next acceptable one for its bound; where the chain from every word of a block
    ends is worked out for all words at once, and the real ones are then followed from end to start.
    """

    def __init__(self, random: np.random.RandomState, box: BoxShape) -> None:
        self._generator = np.random.MT19937()
        state: Any = random.get_state(legacy=False)
        self._generator.state = state
        self._box = box
        bands, rows_in, stacks, cols_in = box.axes
        # Permutation sizes in the order of drawing; the coin for transposing is after the first.
        self._sizes = [box.side, bands, *[rows_in] * bands, stacks, *[cols_in] * stacks]
        coin = [_ANY_WORD] * 2 if box.has_transpose else []
        bounds = [list(range(size - 1, 0, -1)) for size in self._sizes]
        self._bounds = [*bounds[0], *coin, *(bound for part in bounds[1:] for bound in part)]
        self._words = np.zeros(0, np.int64)

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(digits [count, side] from 0, transpose [count] bool, rows, columns [count, side])."""
        blocks: list[np.ndarray] = [np.zeros((0, len(self._bounds)), np.int64)]
        while (missing := count - sum(map(len, blocks))) > 0:
            if len(self._words) < _WORDS:
                fresh = self._generator.random_raw(_WORDS).astype(np.int64)
                self._words = np.concatenate([self._words, fresh])
            blocks.append(self._parse(missing))
        values = np.concatenate(blocks)
        first = self._box.side - 1
        digits = _fisher_yates(values[:, :first], self._box.side)
        mirror = np.zeros(count, bool)
        if self._box.has_transpose:
            mirror = values[:, first] < 1 << 31
            first += 2
        parts = []
        for size in self._sizes[1:]:
            parts.append(_fisher_yates(values[:, first : first + size - 1], size))
            first += size - 1
        bands, rows_in, _, cols_in = self._box.axes
        rows = _lines(parts[0], parts[1 : bands + 1], rows_in)
        cols = _lines(parts[bands + 1], parts[bands + 2 :], cols_in)
        return digits, mirror, rows, cols

    def _parse(self, count: int) -> np.ndarray:
        """Up to `count` whole chains off the front of the words; [chains, bounds] their values."""
        words, lost = self._words, len(self._words) + 1
        after = {bound: self._after_accepted(bound) for bound in set(self._bounds)}
        place = np.arange(lost + 1, dtype=np.int32)
        for bound in self._bounds:
            place = after[bound][place]
        ends = place.tolist()
        starts: list[int] = []
        position = 0
        while len(starts) < count and ends[position] != lost:
            starts.append(position)
            position = ends[position]
        values = np.empty((len(starts), len(self._bounds)), np.int64)
        place = np.array(starts, np.int32)
        for column, bound in enumerate(self._bounds):
            place = after[bound][place]
            values[:, column] = words[place - 1] & _mask(bound)
        self._words = words[position:]
        return values

    def _after_accepted(self, bound: int) -> np.ndarray:
        """For each place the one after the first word from there on that suits the bound.

        int32 [words + 2]; a place beyond the words means that there is none.
        """
        end = len(self._words)
        places = np.full(end + 2, end + 1, np.int32)
        good = np.flatnonzero((self._words & _mask(bound)) <= bound)
        places[good] = good + 1
        return np.minimum.accumulate(places[::-1])[::-1]


def _mask(bound: int) -> int:
    return (1 << bound.bit_length()) - 1


def _fisher_yates(chosen: np.ndarray, size: int) -> np.ndarray:
    """Permutations [N, size] from the indices [N, size - 1] swapped with size-1, size-2, ..., 1."""
    items = np.tile(np.arange(size), (len(chosen), 1))
    each = np.arange(len(chosen))
    for column, i in enumerate(range(size - 1, 0, -1)):
        j = chosen[:, column]
        items[:, i], items[each, j] = items[each, j], items[:, i].copy()
    return items


def _lines(blocks: np.ndarray, inside: list[np.ndarray], within: int) -> np.ndarray:
    """Line permutations from the order of the blocks and the order inside each new block."""
    return np.concatenate(
        [blocks[:, k : k + 1] * within + part for k, part in enumerate(inside)], axis=1
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 for bad input or options."""
    return building.command(_parser(), argv, "clues", lambda given: build(BuildOptions(**given)))


def _parser() -> Parser:
    parser = Parser(
        "trm-fast data sudoku",
        "Build a Sudoku data set in the official layout. A puzzle file is CSV or bare lines.",
    )
    building.add_shared(parser, DEFAULT_REPO)
    add = parser.add_argument
    add("--size", type=integer, help="4, 6 or 9: of generated puzzles, or expected of those read")
    add("--clues", metavar="A-B", help="givens of generated puzzles (default for 9x9: 32-50)")
    add("--num-aug", type=integer, default=0, help="random symmetric images per training puzzle")
    add("--min-difficulty", type=integer, help="leave out puzzles with a smaller rating")
    add("--compact", action="store_true", help="uint8 also where the official arrays are int64")
    return parser


if __name__ == "__main__":
    sys.exit(main())
