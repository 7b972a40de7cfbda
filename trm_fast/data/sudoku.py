"""Builds a Sudoku data set: `python -m trm_fast.data.sudoku --output-dir DIR ...`.

Owns the builder and its command line; imported by trm_fast.__main__ only. Writes the official
layout (data.format) with the official arrays: for the same choices and the same seed the files
hold the same numbers in the same dtypes as those of the official builder under
`numpy.random.seed(seed)`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trm_fast import __version__
from trm_fast.console import say
from trm_fast.data.format import DataError, DatasetWriter, one_line, open_writer, sha256
from trm_fast.data.sudoku_generator import generate, generate_apart, sudoku_metadata
from trm_fast.data.sudoku_source import Puzzles, read_puzzles
from trm_fast.symmetry import BoxShape, SudokuSymmetry, box_shape, grid_invariant

__all__ = ["BuildOptions", "build", "main"]

DEFAULT_REPO = "sapientinc/sudoku-extreme"
_ROWS = 1 << 13
_ANY_WORD = (1 << 32) - 1
_WORDS = 1 << 15
_SHOWN = 20


@dataclass(frozen=True)
class BuildOptions:
    """What to build; the fields are the flags of the command line.

    One of source (a file, or a directory with train.csv and test.csv), source_repo (a data set on
    the Hugging Face hub) and generate (how many puzzles) says where puzzles come from.
    """

    output_dir: str
    source: str | None = None
    source_repo: str | None = None
    generate: int | None = None
    size: int | None = None
    clues: tuple[int, int] | None = None
    test_size: int = 0
    subsample_size: int | None = None
    num_aug: int = 0
    min_difficulty: int | None = None
    seed: int = 0
    compact: bool = False
    skip_bad: bool = False

    def __post_init__(self) -> None:
        origins = [self.source, self.source_repo, self.generate]
        if sum(origin is not None for origin in origins) > 1:
            raise ValueError("give only one of source, source_repo and generate")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}, expected 0..{2**32 - 1}")
        for name, low in (("generate", 1), ("subsample_size", 1), ("num_aug", 0), ("test_size", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} is {value}, expected at least {low}")
        if self.clues is not None and self.generate is None:
            raise ValueError("clues are chosen for generated puzzles only")
        if self.size is not None:
            box_shape(self.size)


def build(options: BuildOptions) -> dict[str, Any]:
    """Build the data set and return its manifest (without the files' sha256).

    Raises DataError (bad puzzles, unwritable or foreign output directory) or ValueError (options).
    Nothing appears at output_dir unless all of it was written.
    """
    splits, origin = _load_splits(options)
    # The official builder draws from numpy's global generator: the subsample, then augmentations.
    random = np.random.RandomState(options.seed)
    train = splits["train"]
    subset = {"of": len(train.boards), "kept": len(train.boards)}
    if options.subsample_size is not None and options.subsample_size < len(train.boards):
        kept = random.choice(len(train.boards), size=options.subsample_size, replace=False)
        splits["train"] = Puzzles(
            train.boards[kept], train.grids[kept], train.skipped, train.listed
        )
        subset["kept"] = options.subsample_size
    manifest = {
        "version": __version__,
        "source": origin,
        "options": {k: v for k, v in asdict(options).items() if k != "output_dir"},
        "seed": options.seed,
        "subset": subset,
        "counts": {
            name: {
                "groups": len(puzzles.boards),
                "examples": len(puzzles.boards) * (1 + (options.num_aug if name == "train" else 0)),
                "skipped": puzzles.skipped,
            }
            for name, puzzles in splits.items()
        },
        "skipped": [line for puzzles in splits.values() for line in puzzles.listed],
    }
    with open_writer(options.output_dir, manifest) as writer:
        for name, puzzles in splits.items():
            num_aug = options.num_aug if name == "train" else 0
            _write_split(writer, name, puzzles, num_aug, random, options.compact)
        writer.json("identifiers.json", ["<blank>"])
    return manifest


def _load_splits(options: BuildOptions) -> tuple[dict[str, Puzzles], dict[str, Any]]:
    """Puzzles per split, and where they came from."""
    if options.generate is not None:
        return _generated(options, options.generate)
    if options.source is not None and not Path(options.source).is_dir():
        whole = _read(options, Path(options.source))
        origin = {"file": Path(options.source).name, "sha256": sha256(Path(options.source))}
        return _hold_out(whole, options), origin
    if options.test_size:
        raise ValueError("test_size is for generated puzzles and single files")
    if options.source is not None:
        paths = {name: Path(options.source) / f"{name}.csv" for name in ("train", "test")}
        origin = {"directory": Path(options.source).resolve().name}
    else:
        repo = options.source_repo or DEFAULT_REPO
        paths = {name: _download(repo, f"{name}.csv") for name in ("train", "test")}
        origin = {"repo": repo}
    splits = {name: _read(options, path) for name, path in paths.items()}
    lengths = {puzzles.boards.shape[1] for puzzles in splits.values()}
    if len(lengths) > 1:
        raise DataError(f"{paths['test']}: boards of another size than in {paths['train']}")
    return splits, {**origin, **{f"{k}_sha256": sha256(p) for k, p in paths.items()}}


def _read(options: BuildOptions, path: Path) -> Puzzles:
    return read_puzzles(
        path,
        size=options.size,
        min_difficulty=options.min_difficulty,
        skip_bad=options.skip_bad,
    )


def _download(repo: str, name: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise DataError(
            f"{repo}: needs huggingface_hub (pip install 'trm-fast[hub]'), or a local copy with "
            "--source"
        ) from None
    try:
        return Path(hf_hub_download(repo, name, repo_type="dataset"))
    except (OSError, ValueError) as error:
        raise DataError(f"{repo}: {name} cannot be downloaded ({one_line(error)})") from None


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


def _hold_out(whole: Puzzles, options: BuildOptions) -> dict[str, Puzzles]:
    """A single file as train split, with test_size random puzzles of it held out."""
    if not options.test_size:
        return {"train": whole}
    total = len(whole.boards)
    if options.test_size >= total:
        raise ValueError(f"test_size {options.test_size} leaves nothing of {total} puzzles")
    order = np.random.Generator(np.random.Philox(seed=[options.seed, 2])).permutation(total)
    test, train = np.sort(order[: options.test_size]), np.sort(order[options.test_size :])
    return {
        "train": Puzzles(whole.boards[train], whole.grids[train], whole.skipped, whole.listed),
        "test": Puzzles(whole.boards[test], whole.grids[test]),
    }


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
    writer.metadata(split, sudoku_metadata(box.side, groups))


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
    arguments = vars(_parser().parse_args(argv))
    try:
        if arguments["clues"] is not None:
            arguments["clues"] = _parse_range(arguments["clues"])
        options = BuildOptions(**arguments)
        manifest = build(options)
    except (ValueError, OSError) as error:
        say(f"error: {error}", err=True)
        return 2
    except MemoryError:
        say("error: not enough memory for so many puzzles", err=True)
        return 2
    for line in manifest["skipped"][:_SHOWN]:
        say(f"skipped {line}", err=True)
    for name, count in manifest["counts"].items():
        bad = f", {count['skipped']} bad rows skipped" if count["skipped"] else ""
        say(f"{name}: {count['groups']} puzzles, {count['examples']} examples{bad}")
    say(f"written to {options.output_dir}")
    return 0


def _parse_range(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    if not low.isdecimal() or not (high or low).isdecimal():
        raise ValueError(f"clues {text!r}: expected a number or a range such as 32-50")
    return int(low), int(high or low)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trm_fast.data.sudoku",
        description="Build a Sudoku data set in the official layout.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--output-dir", required=True, help="where the data set appears, whole or not at all")
    add("--source", help="puzzle file (CSV or bare lines), or directory with train.csv, test.csv")
    add("--source-repo", help=f"data set on the Hugging Face hub (default {DEFAULT_REPO})")
    add("--generate", type=int, metavar="N", help="make N puzzles instead")
    add("--size", type=int, help="4, 6 or 9: of generated puzzles, or expected of those read")
    add("--clues", metavar="A-B", help="givens of generated puzzles (default for 9x9: 32-50)")
    add("--test-size", type=int, default=0, help="held-out puzzles (generated, or of one file)")
    add("--subsample-size", type=int, help="keep that many random training puzzles")
    add("--num-aug", type=int, default=0, help="random symmetric images per training puzzle")
    add("--min-difficulty", type=int, help="leave out puzzles with a smaller rating")
    add("--seed", type=int, default=0, help="of subsample, augmentation and generation")
    add("--compact", action="store_true", help="uint8 also where the official arrays are int64")
    add("--skip-bad", action="store_true", help="leave bad rows out, counted and listed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
