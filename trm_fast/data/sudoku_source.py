"""Reads Sudoku puzzles from text: two CSV dialects and bare lines; checks every row.

Owns the parsing of puzzle files for the builder and the commands that take puzzles. Imports
data.building, data.format (DataError), data.sudoku_solver and symmetry (box shapes).

Dialects, told apart by the first line: `source,question,answer,rating` (blanks `.` or `0`; source
and rating may lack), `quizzes,solutions`, and no header at all: one board a line, `#` comments
allowed, solved here. An empty answer is solved here too. A row is the number of the line in the
file, from 1. Dims: N puzzles, L cells (16, 36 or 81).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np

from trm_fast.data.building import Faults, Puzzles, bounded_lines
from trm_fast.data.format import DataError
from trm_fast.data.sudoku_solver import clashing, is_valid, solve
from trm_fast.symmetry import box_shape

__all__ = ["read_puzzles"]

_BLOCK = 1 << 16
_LINE_LIMIT = 4096
_GUESSES = 1 << 18  # two seconds for one board; an empty one takes half of them
_DIALECTS = (("question", "answer"), ("quizzes", "solutions"))


@dataclass
class _Row:
    number: int
    question: str
    answer: str


@dataclass
class _Reader(Faults):
    """Collects checked blocks, and the faults of bad rows."""

    size: int | None = None
    boards: list[np.ndarray] = field(default_factory=list)
    grids: list[np.ndarray] = field(default_factory=list)


def read_puzzles(
    path: str | os.PathLike[str],
    *,
    size: int | None = None,
    min_difficulty: int | None = None,
    skip_bad: bool = False,
) -> Puzzles:
    """All puzzles of a file, in order; `size` (4, 6, 9) is that of the first row if not given.

    With min_difficulty rows of a smaller rating are left out, unchecked. Raises DataError naming
    file and row for a wrong length or character, clashing clues, an answer that breaks the rules or
    the clues, no or several solutions where no answer is given, a board that is too hard to say,
    or columns that are not known.
    """
    reader = _Reader(Path(path), skip_bad, size=size)
    try:
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            block: list[_Row] = []
            for row in _rows(file, reader, min_difficulty):
                block.append(row)
                if len(block) == _BLOCK:
                    _check_block(block, reader)
                    block = []
            _check_block(block, reader)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    if not reader.boards:
        why = f" ({reader.listed[0]})" if reader.listed else ""
        raise DataError(f"{path}: no puzzles to use{why}")
    return Puzzles(
        np.concatenate(reader.boards),
        np.concatenate(reader.grids),
        reader.skipped,
        tuple(reader.listed),
    )


def _rows(file: TextIO, reader: _Reader, min_difficulty: int | None) -> Iterator[_Row]:
    lines = ((n, text.strip()) for n, text in bounded_lines(file, reader.path, _LINE_LIMIT))
    first = next(((n, text) for n, text in lines if text and not text.startswith("#")), None)
    if first is None:
        return
    if "," not in first[1]:
        if min_difficulty is not None:
            raise DataError(f"{reader.path}: bare lines have no rating for a minimum difficulty")
        yield _Row(first[0], first[1], "")
        for number, text in lines:
            if text and not text.startswith("#"):
                yield _Row(number, text, "")
        return
    header = [name.strip().strip('"').lower() for name in first[1].split(",")]
    names = next((pair for pair in _DIALECTS if set(pair) <= set(header)), None)
    if names is None:
        raise DataError(
            f"{reader.path} row {first[0]}: columns {first[1][:80]!r}, expected "
            "source,question,answer,rating or quizzes,solutions"
        )
    if min_difficulty is not None and "rating" not in header:
        raise DataError(f"{reader.path} row {first[0]}: no column rating for a minimum difficulty")
    question, answer = (header.index(name) for name in names)
    rating = header.index("rating") if "rating" in header else None
    for number, text in lines:
        if not text:
            continue
        cells = [cell.strip().strip('"') for cell in text.split(",")]
        if len(cells) != len(header):
            reader.bad(number, f"{len(cells)} columns, expected {len(header)}")
            continue
        if min_difficulty is not None and rating is not None:
            value = cells[rating]
            if not value.lstrip("-").isdecimal() or len(value) > 18:
                reader.bad(number, f"rating {value[:20]!r} is not an integer")
                continue
            if int(value) < min_difficulty:
                continue
        yield _Row(number, cells[question], cells[answer])


def _check_block(rows: list[_Row], reader: _Reader) -> None:
    """Decode and check rows, report the first fault of each, and keep the good ones."""
    if reader.size is None:
        known = (row for row in rows if len(row.question) in (16, 36, 81))
        first = next(known, None)
        reader.size = None if first is None else box_shape(cells=len(first.question)).side
    cells = reader.size**2 if reader.size else None
    fitting: list[_Row] = []
    for row in rows:
        length = len(row.question)
        if length != cells:
            reader.bad(row.number, f"{length} characters, expected {cells or '16, 36 or 81'}")
        elif row.answer and len(row.answer) != cells:
            reader.bad(row.number, f"answer of {len(row.answer)} characters, expected {cells}")
        else:
            fitting.append(row)
    if not fitting or cells is None or reader.size is None:
        return
    side = reader.size
    boards = _decode([row.question for row in fitting], side)
    unsolved = np.array([not row.answer for row in fitting])
    grids = _decode([row.answer or "0" * cells for row in fitting], side)
    reasons: dict[int, str] = {}

    def fault(wrong: np.ndarray, reason: str) -> None:
        for i in np.flatnonzero(wrong):
            reasons.setdefault(int(i), reason)

    wrong_board, wrong_grid = (boards == 255).any(1), (grids == 255).any(1)
    for i in np.flatnonzero(wrong_board):
        character = fitting[i].question[int((boards[i] == 255).argmax())]
        reasons[int(i)] = f"character {character!r}, expected a digit 1-{side}, '.' or '0'"
    fault(wrong_grid, f"the answer has a character that is not a digit 1-{side}")
    boards[wrong_board], grids[wrong_grid] = 0, 0
    fault(clashing(boards), "clues clash: a digit stands twice in a row, column or box")
    fault(~unsolved & ~is_valid(grids), "the answer breaks the rules")
    fault(~unsolved & ((boards != 0) & (boards != grids)).any(1), "the answer contradicts a clue")
    todo = np.setdiff1d(np.flatnonzero(unsolved), list(reasons))
    solutions = solve(boards[todo], guesses=_GUESSES)
    grids[todo] = solutions.boards
    for i, count, given_up in zip(todo, solutions.counts, solutions.given_up, strict=True):
        if given_up:
            reasons[int(i)] = f"not solved in {_GUESSES} guesses; a file may hold the answer"
        elif count != 1:
            reasons[int(i)] = "no solution" if count == 0 else "several solutions, so no one label"
    for i in sorted(reasons):
        reader.bad(fitting[i].number, reasons[i])
    good = np.setdiff1d(np.arange(len(fitting)), list(reasons))
    if good.size:
        reader.boards.append(boards[good])
        reader.grids.append(grids[good])


def _decode(texts: list[str], side: int) -> np.ndarray:
    """Boards [N, L] uint8 of equally long texts; 255 for a character that does not belong."""
    table = np.full(256, 255, np.uint8)
    table[[ord("."), ord("0")]] = 0
    table[ord("1") : ord("1") + side] = np.arange(1, side + 1)
    # Characters beyond Latin-1 become "?", one byte each, and are then found wrong.
    data = "".join(texts).encode("latin-1", "replace")
    return table[np.frombuffer(data, np.uint8)].reshape(len(texts), side * side)
