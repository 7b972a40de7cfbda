"""Mazes as people write them: parsed with the place they came from, answers shown and judged.

Owns the text forms of mazes that the solve command reads and writes. Imported by solve.

A maze is n lines of n characters, one maze after another, or a maze on one line of n * n: `#` wall,
space or `.` open, `S` start, `G` goal; spaces at the end of a line may lack. Answers have `o` for
the path.

Dims legend: L cells of a maze.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import numpy as np

from trm_fast.data.maze_solver import (
    CHARSET,
    GOAL,
    OPEN,
    PATH,
    SIDES,
    START,
    is_maze,
    maze_rules,
    shortest_paths,
)
from trm_fast.puzzles import PuzzleError, SizeError

__all__ = ["Maze", "looks_like_mazes", "maze_rows", "parse_mazes", "verdict", "with_walls"]


@dataclass(frozen=True)
class Maze:
    """cells [L] uint8 of tokens; place: "argument 2" or "mazes.txt:7"."""

    cells: np.ndarray
    place: str


def looks_like_mazes(text: str) -> bool:
    """Whether a text has a start and a goal, and no digits as Sudoku has them (lines with `#` may
    be comments there); or walls, and next to nothing that a maze does not have."""
    boards = "".join(line for line in text.splitlines() if not line.startswith("#"))
    if any(c.isdigit() for c in boards):
        return False
    foreign = set(text) - set(CHARSET) - set(".\r\n")
    return ("S" in text and "G" in text) or ("#" in text and len(foreign) <= 1)


def parse_mazes(text: str, name: str, numbered: bool = True) -> list[Maze]:
    """All mazes of a text; `name` is for places, with the number of a maze's first line if asked.

    Raises SizeError for lines that make no square, PuzzleError for other faults; one line each.
    """
    text = text.replace("\ufeff", "")
    lines = [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]
    filled = [line for line in lines if line.strip()]
    if all(_is_one_line(line) for line in filled):
        return [
            _maze(line, f"{name}:{number}" if numbered else name)
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]
    # Spaces at the ends of lines may be there or not: whichever fits the number of lines.
    side = max(len(line.rstrip()) for line in filled)
    if len(filled) % side and len(filled) % max(map(len, filled)) == 0:
        side = max(map(len, filled))
    if side > SIDES[-1]:  # before as many lines are made that long
        raise SizeError(f"{name}: a line of {side} characters, mazes have up to {SIDES[-1]} a side")
    mazes = []
    index = 0
    while index < len(lines):
        # Between mazes; a first row without any wall has all of its spaces.
        if not lines[index].strip() and len(lines[index]) != side:
            index += 1
            continue
        rows = [line.ljust(side)[:side] for line in lines[index : index + side]]
        place = f"{name}:{index + 1}" if numbered else name
        if len(rows) < side:
            raise SizeError(
                f"{place}: {len(rows)} lines, but the longest line has {side} characters"
            )
        mazes.append(_maze("".join(rows), place))
        index += side
    return mazes


def _is_one_line(line: str) -> bool:
    """Whether a line is a whole maze."""
    side = isqrt(len(line))
    return side * side == len(line) and side in SIDES and line.count("S") == line.count("G") == 1


def _maze(text: str, place: str) -> Maze:
    side = isqrt(len(text))
    if side not in SIDES:
        raise SizeError(
            f"{place}: {side}x{side} cells, mazes have {SIDES[0]} to {SIDES[-1]} a side"
        )
    known = {**{character: k for k, character in enumerate(CHARSET[:-1], 1)}, ".": OPEN}
    odd = next((character for character in text if character not in known), None)
    if odd is not None:
        raise PuzzleError(f"{place}: {odd!r} is none of the characters of a maze, {CHARSET[:-1]!r}")
    cells = np.array([known[character] for character in text], np.uint8)
    if not is_maze(cells[None])[0]:
        raise PuzzleError(
            f"{place}: {int((cells == START).sum())} S and {int((cells == GOAL).sum())} G, "
            "a maze has one of each"
        )
    return Maze(cells, place)


def with_walls(answer: np.ndarray, maze: np.ndarray) -> np.ndarray:
    """The maze [L] with the answer's path [L] in its open cells."""
    return np.where((maze == OPEN) & (answer == PATH), np.uint8(PATH), maze).astype(np.uint8)


def maze_rows(cells: np.ndarray) -> str:
    """A maze [L] as lines of characters."""
    side = isqrt(len(cells))
    text = "".join("?" if token == 0 else CHARSET[token - 1] for token in cells.tolist())
    return "\n".join(text[start : start + side] for start in range(0, len(text), side))


def verdict(maze: np.ndarray, cells: np.ndarray) -> tuple[bool, str]:
    """Whether an answer [L] is a shortest path through the maze [L], and words for it."""
    length = int(shortest_paths(maze[None])[0][0])
    if maze_rules(maze[None], cells[None])[0]:
        return True, f"a shortest path of {length} steps"
    if length >= maze.size:
        return False, "there is no way from S to G"
    return False, f"not a shortest path from S to G, which has {length} steps"
