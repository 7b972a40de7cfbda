"""Sudoku puzzles as people write them: parsed with the place they came from, answers judged.

Owns the text forms that the solve command reads and writes, and the list of broken units. Imported
by solve. Sizes are 4x4, 6x6 and 9x9 (16, 36, 81 characters, row by row).

Dims legend: L cells of a board.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isqrt

import numpy as np

from trm_fast.symmetry import BoxShape, box_shape

BLANKS = "0._*"
SIZES = (16, 36, 81)
QUESTION_COLUMNS = ("question", "quizzes", "puzzle")


class PuzzleError(ValueError):
    """A puzzle that cannot be asked: one line that names its place and the fault."""


class SizeError(PuzzleError):
    """A puzzle of a size that is not answered."""


@dataclass(frozen=True)
class Puzzle:
    """cells [L] uint8: digits, 0 for a blank; place: "argument 2" or "boards.txt:7"."""

    cells: np.ndarray
    place: str

    @property
    def text(self) -> str:
        """The puzzle on one line, blanks as 0."""
        return board_line(self.cells, "0")


@dataclass(frozen=True)
class Breach:
    """1-based rows, columns and boxes that do not hold every digit once; boxes row by row."""

    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()
    boxes: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.rows or self.columns or self.boxes)

    def __str__(self) -> str:
        named = {"row": self.rows, "column": self.columns, "box": self.boxes}
        return "; ".join(_numbered(name, which) for name, which in named.items() if which)


def _numbered(name: str, which: tuple[int, ...]) -> str:
    plural = {"box": "boxes"}.get(name, name + "s")
    return f"{plural if len(which) > 1 else name} {', '.join(map(str, which))}"


def breaches(cells: np.ndarray, *, blanks_allowed: bool = False) -> Breach:
    """The units of one board that break the rules.

    Args:
        cells: [L] digits 0..side, 0 for a blank.
        blanks_allowed: then only a digit that stands twice breaks a unit, as for clues.

    Raises:
        ValueError: L is not 16, 36 or 81.
    """
    shape = box_shape(cells=len(cells))
    grid = cells.reshape(shape.side, shape.side)
    boxes = cells.reshape(shape.axes).transpose(0, 2, 1, 3).reshape(shape.side, shape.side)
    return Breach(*(_broken(units, blanks_allowed) for units in (grid, grid.T, boxes)))


def _broken(units: np.ndarray, blanks_allowed: bool) -> tuple[int, ...]:
    digits = range(1, len(units) + 1)
    counts = np.stack([(units == digit).sum(1) for digit in digits])
    wrong = counts > 1 if blanks_allowed else counts != 1
    return tuple(int(unit) + 1 for unit in np.flatnonzero(wrong.any(0)))


def parse_puzzle(text: str, place: str) -> Puzzle:
    """One puzzle of 16, 36 or 81 characters: digits, and 0 . _ or * for a blank.

    Raises:
        SizeError: another number of characters.
        PuzzleError: another character, a digit beyond the board's side, or clues that clash.
    """
    text = text.strip()
    if len(text) not in SIZES:
        shown = text if len(text) <= 24 else text[:21] + "..."
        raise SizeError(f"{place}: {len(text)} characters, expected 16, 36 or 81: {shown!r}")
    side = isqrt(len(text))
    allowed = "123456789"[:side]
    for index, char in enumerate(text):
        if char not in allowed and char not in BLANKS:
            raise PuzzleError(
                f"{place}: character {index + 1} is {char!r}, "
                f"expected a digit 1-{side}, or {' '.join(BLANKS)} for a blank"
            )
    cells = np.array([0 if char in BLANKS else int(char) for char in text], np.uint8)
    clash = breaches(cells, blanks_allowed=True)
    if clash:
        raise PuzzleError(f"{place}: clues clash, a digit stands twice in {clash}")
    return Puzzle(cells, place)


def parse_arguments(words: Sequence[str]) -> list[Puzzle]:
    """Puzzles given on the command line, named by their position from 1."""
    return [parse_puzzle(word, f"argument {number}") for number, word in enumerate(words, 1)]


def parse_text(text: str, name: str) -> list[Puzzle]:
    """Puzzles of a file's text; `name` stands before the line number in errors.

    Read are lines of one puzzle each, grids of one row a line (4, 6 or 9 lines of as many
    characters), and CSV with a header that has a column `question` or `quizzes`. Empty lines and,
    outside CSV, lines that begin with # are skipped.

    Raises:
        PuzzleError: a puzzle that `parse_puzzle` refuses, or a grid or CSV row cut short.
    """
    text = text.removeprefix("\ufeff")
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not lines:
        return []
    header = [cell.strip().lower() for cell in lines[0][1].split(",")]
    column = next((header.index(name) for name in QUESTION_COLUMNS if name in header), None)
    if column is not None:
        return _parse_csv(text, column, name)
    if "," in lines[0][1]:
        raise PuzzleError(
            f"{name}:{lines[0][0]}: a CSV file needs a column named "
            f"{' or '.join(QUESTION_COLUMNS[:2])}"
        )
    return [parse_puzzle(line, f"{name}:{number}") for number, line in _joined(lines, name)]


def _parse_csv(text: str, column: int, name: str) -> list[Puzzle]:
    reader = csv.reader(io.StringIO(text, newline=""))
    puzzles: list[Puzzle] = []
    seen_header = False
    try:
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if not seen_header:
                seen_header = True
                continue
            place = f"{name}:{reader.line_num}"
            if len(row) <= column:
                raise PuzzleError(f"{place}: {len(row)} columns, expected {column + 1} or more")
            puzzles.append(parse_puzzle(row[column], place))
    except csv.Error as error:
        raise PuzzleError(f"{name}:{reader.line_num}: not valid CSV ({error})") from None
    return puzzles


def _joined(lines: Sequence[tuple[int, str]], name: str) -> Iterable[tuple[int, str]]:
    """Lines with the rows of a grid put together, each under the number of its first line."""
    index = 0
    while index < len(lines):
        number, line = lines[index]
        side = len(line)
        if side not in (4, 6, 9):
            yield number, line
            index += 1
            continue
        rows = [row for _, row in lines[index : index + side]]
        odd = next((i for i, row in enumerate(rows) if len(row) != side), len(rows))
        if odd < side:
            at = lines[index + odd][0] if odd < len(rows) else lines[-1][0]
            raise SizeError(f"{name}:{at}: a grid of {side} rows from line {number} is cut short")
        yield number, "".join(rows)
        index += side


def board_line(cells: np.ndarray, blank: str = ".") -> str:
    """A board [L] on one line, row by row; cells that are no digit of the board as `blank`."""
    side = isqrt(len(cells))
    return "".join(str(cell) if 1 <= cell <= side else blank for cell in cells.tolist())


def board_rows(cells: np.ndarray) -> str:
    """A board [L] as one line of digits per row."""
    line, side = board_line(cells), isqrt(len(cells))
    return "\n".join(line[start : start + side] for start in range(0, len(line), side))


def with_clues(answer: np.ndarray, clues: np.ndarray) -> np.ndarray:
    """The answer [L] with the clues [L] written over it; values that are no digit become 0."""
    shape: BoxShape = box_shape(cells=len(clues))
    digits = np.where((answer >= 1) & (answer <= shape.side), answer, 0)
    return np.where(clues > 0, clues, digits).astype(np.uint8)
