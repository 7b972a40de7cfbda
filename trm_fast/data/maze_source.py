"""Reads mazes from CSV files of the official dialect; checks every row.

Owns the parsing for the maze builder. Imports data.building, data.format (DataError) and
data.maze_solver.

The columns are source,question,answer,rating (source and rating may lack): question and answer are
the rows of a square grid one after another, of `#`, space, `S`, `G` and, in the answer, `o`.
A row is the number of the line in the file, from 1. Dims: N mazes, L cells.
"""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import TextIO

import numpy as np

from trm_fast.data.building import Faults, Puzzles, bounded_lines
from trm_fast.data.format import DataError
from trm_fast.data.maze_solver import (
    CHARSET,
    OPEN,
    PATH,
    SIDES,
    is_maze,
    leads_to_goal,
    maze_rules,
    shortest_paths,
)

__all__ = ["Mazes", "read_mazes", "tokens_of"]

_BLOCK = 1 << 12
_LINE_LIMIT = 1 << 15


@dataclass(frozen=True)
class Mazes(Puzzles):
    """boards, grids [N, L] uint8 of tokens, and how many boards have more than one shortest path,
    how many answers are not shortest."""

    several_paths: int = 0
    not_shortest: int = 0


@dataclass
class _Reader(Faults):
    """Collects checked blocks, and the faults of bad rows."""

    side: int | None = None
    boards: list[np.ndarray] = field(default_factory=list)
    grids: list[np.ndarray] = field(default_factory=list)
    several_paths: int = 0
    not_shortest: int = 0


def tokens_of(texts: list[str]) -> np.ndarray:
    """Tokens [N, L] uint8 of equally long texts; 255 for a character that does not belong."""
    table = np.full(256, 255, np.uint8)
    table[list(CHARSET.encode())] = np.arange(1, len(CHARSET) + 1)
    # Characters beyond Latin-1 become "?", one byte each, and are then found wrong.
    data = "".join(texts).encode("latin-1", "replace")
    return table[np.frombuffer(data, np.uint8)].reshape(len(texts), -1)


def read_mazes(
    path: str | os.PathLike[str], *, size: int | None = None, skip_bad: bool = False
) -> Mazes:
    """All mazes of a file, in order; `size` (cells a side) is that of the first row if not given.

    Raises DataError naming file and row for a grid that is not square or of another size, a wrong
    character, not one start and one goal, an answer that changes more than open cells or does not
    lead to the goal, or columns that are not known. An answer that is longer than it had to be is
    counted and kept.
    """
    reader = _Reader(Path(path), skip_bad, side=size)
    try:
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            _read(file, reader)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    if not reader.boards:
        why = f" ({reader.listed[0]})" if reader.listed else ""
        raise DataError(f"{path}: no mazes to use{why}")
    return Mazes(
        np.concatenate(reader.boards),
        np.concatenate(reader.grids),
        reader.skipped,
        tuple(reader.listed),
        reader.several_paths,
        reader.not_shortest,
    )


def _read(file: TextIO, reader: _Reader) -> None:
    lines = bounded_lines(file, reader.path, _LINE_LIMIT)
    header = [name.strip().lower() for name in _cells(next(lines, (1, ""))[1])]
    if not {"question", "answer"} <= set(header):
        raise DataError(
            f"{reader.path} row 1: columns {','.join(header)[:80]!r}, expected "
            "source,question,answer,rating"
        )
    question, answer = header.index("question"), header.index("answer")
    block: list[tuple[int, str, str]] = []
    for number, line in lines:
        if not line.rstrip("\r\n"):
            continue
        cells = _cells(line)
        if len(cells) != len(header):
            reader.bad(number, f"{len(cells)} columns, expected {len(header)}")
            continue
        block.append((number, cells[question], cells[answer]))
        if len(block) == _BLOCK:
            _check_block(block, reader)
            block = []
    _check_block(block, reader)


def _cells(line: str) -> list[str]:
    """The fields of one line; spaces count, quotes may be around a field."""
    try:
        return next(csv.reader([line.rstrip("\r\n")]), [])
    except csv.Error:  # a field beyond the csv module's own limit
        return []


def _check_block(rows: list[tuple[int, str, str]], reader: _Reader) -> None:
    """Decode and check rows, report the first fault of each, and keep the good ones."""
    if reader.side is None:
        sides = (isqrt(len(text)) for _, text, _ in rows if isqrt(len(text)) ** 2 == len(text))
        reader.side = next((side for side in sides if side in SIDES), None)
    cells = reader.side**2 if reader.side else None
    expected = cells or f"the square of a side of {SIDES[0]} to {SIDES[-1]}"
    fitting: list[tuple[int, str, str]] = []
    for row in rows:
        number, question, answer = row
        if len(question) != cells:
            reader.bad(number, f"{len(question)} characters, expected {expected}")
        elif len(answer) != cells:
            reader.bad(number, f"answer of {len(answer)} characters, expected {expected}")
        else:
            fitting.append(row)
    if not fitting:
        return
    boards = tokens_of([question for _, question, _ in fitting])
    grids = tokens_of([answer for _, _, answer in fitting])
    reasons: dict[int, str] = {}

    def fault(wrong: np.ndarray, reason: str) -> None:
        for i in np.flatnonzero(wrong):
            reasons.setdefault(int(i), reason)

    for texts, tokens in ((1, boards), (2, grids)):
        for i in np.flatnonzero((tokens == 255).any(1)):
            character = fitting[i][texts][int((tokens[i] == 255).argmax())]
            reasons.setdefault(int(i), f"character {character!r}, expected one of {CHARSET!r}")
    fault((boards == PATH).any(1), "a path in the question, expected '# SG' alone")
    fault(~is_maze(boards), "expected one start S and one goal G")
    changed = np.where(grids == PATH, np.uint8(OPEN), grids) != boards
    fault(changed.any(1), "the answer is another maze: more than open cells differ")
    fault(~leads_to_goal(grids), "the answer's path does not lead from S to G")
    for i in sorted(reasons):
        reader.bad(fitting[i][0], reasons[i])
    good = np.setdiff1d(np.arange(len(fitting)), list(reasons))
    if good.size:
        boards, grids = boards[good], grids[good]
        reader.boards.append(boards)
        reader.grids.append(grids)
        reader.several_paths += int((shortest_paths(boards)[1] > 1).sum())
        reader.not_shortest += int((~maze_rules(boards, grids)).sum())
