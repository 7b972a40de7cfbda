"""Builds a maze data set: `python -m trm_fast.data.maze --output-dir DIR ...`.

Owns the builder and its command line; imported by trm_fast.__main__ only. Writes the official
layout (data.format) with the official arrays: for the same choices and the same seed the files
hold the same numbers in the same dtypes as those of the official builder under
`numpy.random.seed(seed)`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np

from trm_fast.console import Parser, integer
from trm_fast.data import building
from trm_fast.data.building import Puzzles
from trm_fast.data.format import DatasetWriter, open_writer
from trm_fast.data.maze_generator import (
    check_range,
    generate_splits,
    longest_path,
)
from trm_fast.data.maze_solver import CHARSET, SIDES
from trm_fast.data.maze_source import Mazes, read_mazes
from trm_fast.symmetry import dihedral_transform

__all__ = ["BuildOptions", "build", "main"]

DEFAULT_REPO = "sapientinc/maze-30x30-hard-1k"
_IMAGES = 8


@dataclass(frozen=True)
class BuildOptions(building.BuildOptions):
    """What to build; the fields are the flags of the command line."""

    min_path: int | None = None
    max_path: int | None = None
    loops: tuple[int, int] | None = None
    aug: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [self.min_path, self.max_path, self.loops]
        if self.generate is None and any(choice is not None for choice in given):
            raise ValueError("paths and loops are chosen for generated mazes only")
        if self.generate is not None:
            check_range(self.side, *self.path)
        elif self.size is not None and self.size not in SIDES:
            raise ValueError(f"size {self.size}: mazes have {SIDES[0]} to {SIDES[-1]} cells a side")

    @property
    def side(self) -> int:
        """Cells a side of generated mazes."""
        return 10 if self.size is None else self.size

    @property
    def path(self) -> tuple[int, int]:
        """Fewest and most steps of the shortest path of generated mazes."""
        low = self.side if self.min_path is None else self.min_path
        return low, longest_path(self.side) if self.max_path is None else self.max_path


def build(options: BuildOptions) -> dict[str, Any]:
    """Build the data set and return its manifest (without the files' sha256).

    Raises DataError (bad mazes, unwritable or foreign output directory) or ValueError (options).
    Nothing appears at output_dir unless all of it was written.
    """
    paths = {}  # by file, as it was read: what is held out of one, or left out, counts too

    def read(path: Path) -> Mazes:
        mazes = read_mazes(path, size=options.size, skip_bad=options.skip_bad)
        paths[path.stem] = {
            "several_shortest": mazes.several_paths,
            "not_shortest": mazes.not_shortest,
        }
        return mazes

    splits, origin = building.load_splits(
        options,
        read,
        lambda count: _generated(options, count),
        DEFAULT_REPO,
    )
    # The official builder draws the subset from numpy's global generator, and nothing else.
    subset = building.subsample(splits, options.subsample_size, np.random.RandomState(options.seed))
    images = _IMAGES if options.aug else 1
    manifest = building.describe(options, origin, subset, splits, images)
    if paths:
        manifest["paths_in_source"] = paths
    with open_writer(options.output_dir, manifest) as writer:
        for name, puzzles in splits.items():
            _write_split(writer, name, puzzles, images if name == "train" else 1)
        writer.json("identifiers.json", ["<blank>"])
    return manifest


def _generated(options: BuildOptions, count: int) -> tuple[dict[str, Puzzles], dict[str, Any]]:
    splits = generate_splits(
        count,
        options.test_size,
        size=options.side,
        path=options.path,
        loops=options.loops,
        seed=options.seed,
    )
    origin = {"generated": count, "size": options.side, "path": list(options.path)}
    return {name: Puzzles(*mazes) for name, mazes in splits.items()}, origin


def _write_split(writer: DatasetWriter, split: str, puzzles: Puzzles, images: int) -> None:
    """One group per maze: the maze itself, then its other images, a puzzle each."""
    groups, cells = puzzles.boards.shape
    side, rows = isqrt(cells), groups * images
    for name, tokens in (("inputs", puzzles.boards), ("labels", puzzles.grids)):
        out = writer.array(split, "all", name, (rows, cells), np.uint8)
        grids = tokens.reshape(groups, side, side)
        for k in range(images):
            out[k::images] = dihedral_transform(grids, k).reshape(groups, cells)
        out.flush()
    small = {
        "puzzle_identifiers": np.zeros(rows, np.int32),
        "puzzle_indices": np.arange(rows + 1, dtype=np.int32),
        "group_indices": np.arange(groups + 1, dtype=np.int32) * np.int32(images),
    }
    for name, array in small.items():
        writer.array(split, "all", name, array.shape, array.dtype)[:] = array
    writer.metadata(split, building.one_kind(len(CHARSET) + 1, cells, groups))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 for bad input or options."""
    return building.command(_parser(), argv, "loops", lambda given: build(BuildOptions(**given)))


def _parser() -> Parser:
    parser = Parser(
        "trm-fast data maze",
        "Build a maze data set in the official layout, from CSV files with the columns "
        "source,question,answer,rating, or of generated mazes with one shortest path.",
    )
    building.add_shared(parser, DEFAULT_REPO)
    add = parser.add_argument
    add(
        "--size",
        type=integer,
        help="cells a side of generated mazes (10), or expected of those read",
    )
    add(
        "--min-path", type=integer, help="fewest steps from S to G, generated mazes (default: size)"
    )
    add("--max-path", type=integer, help="most steps from S to G, generated mazes")
    add("--loops", metavar="A-B", help="loops of generated mazes (default: 0 to 6 %% of the cells)")
    add(
        "--aug",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="add the 7 other rotations and reflections of every training maze",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
