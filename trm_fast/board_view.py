"""What there is to see on a board: its cells, which are given, which break the rules.

Owns the view of one puzzle that the terminal, the pictures and the demo share. Imported by
watching, board_image and the demo. ARC boards are canvases of 30 x 30 tokens whose rules are the
task's secret: there an answer can only be compared with the solution that the data set has.

Dims legend: L tokens of one board.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import numpy as np

from trm_fast.answers import Answers, Frame
from trm_fast.arc_voting import cut
from trm_fast.config import ModelConfig
from trm_fast.data.arc_augment import CELLS, END, VOCABULARY
from trm_fast.data.maze_solver import GOAL, OPEN, PATH, START
from trm_fast.mazes import maze_rows, verdict, with_walls
from trm_fast.puzzles import board_line, breaches
from trm_fast.rules import maze_side, sudoku_side
from trm_fast.symmetry import box_shape

__all__ = [
    "ARC",
    "MAZE",
    "SUDOKU",
    "BoardView",
    "Glance",
    "answer_glance",
    "best_of",
    "glances",
    "kind_of",
    "view_of",
]

SUDOKU, MAZE, ARC = "sudoku", "maze", "arc"


@dataclass(frozen=True)
class BoardView:
    """One puzzle, and what to say of answers to it.

    Attributes:
        kind: "sudoku", "maze" or "arc".
        given: tokens of the question [L] int64.
        label: the data set's solution [L] int64, or None.
        box: rows and columns of a Sudoku box; (0, 0) for others.
        window: rows and columns of the canvas that hold anything: all of it but for ARC.
    """

    kind: str
    given: np.ndarray
    label: np.ndarray | None
    box: tuple[int, int]
    window: tuple[int, int]

    @property
    def side(self) -> int:
        """Cells of a row of the board."""
        return isqrt(len(self.given))

    @property
    def fixed(self) -> np.ndarray:
        """Which cells are the puzzle's own [L] bool: clues; walls, start and goal; none of ARC."""
        if self.kind == SUDOKU:
            return self.given > 1
        return self.given != OPEN if self.kind == MAZE else np.zeros(len(self.given), bool)

    def cells(self, tokens: np.ndarray) -> np.ndarray:
        """What to show of the model's tokens [L]: in a maze the path only, all else is given; of
        ARC the grid in the corner, 0 elsewhere."""
        if self.kind == MAZE:
            return with_walls(tokens, self.given).astype(np.int64)
        if self.kind == ARC:
            (rows,), (columns,) = cut(tokens[None])
            inside = (np.arange(self.side)[:, None] < rows) & (np.arange(self.side) < columns)
            return np.where(inside.reshape(-1), tokens, 0)
        return np.where(self.fixed, self.given, tokens)

    def window_of(self, cells: np.ndarray) -> tuple[int, int]:
        """Rows and columns to show of an answer's cells [L]: the window, and what is beyond it."""
        used = (cells > END).reshape(self.side, self.side)
        if self.kind != ARC or not used.any():
            return self.window
        ends = [int(np.flatnonzero(used.any(axis))[-1]) + 1 for axis in (1, 0)]
        return max(self.window[0], ends[0]), max(self.window[1], ends[1])

    def line(self, tokens: np.ndarray) -> str:
        """The cells [L] on one line, a character each, row by row; ` ` for what is no cell."""
        if self.kind == SUDOKU:
            return board_line(tokens - 1)
        if self.kind == MAZE:
            return maze_rows(tokens).replace("\n", "")
        return "".join(str(t - 2) if 2 <= t < VOCABULARY else " " for t in tokens.tolist())

    def broken(self, tokens: np.ndarray) -> np.ndarray:
        """Which cells break a rule [L] bool.

        Of a Sudoku those whose digit stands twice in a row, a column or a box; of a maze those of
        the path that do not have two neighbours on it, and ends that do not have one; of ARC those
        unlike the solution, as far as it or the answer reaches.
        """
        if self.kind == SUDOKU:
            return self._twice(tokens - 1)
        return self._astray(tokens) if self.kind == MAZE else self._unlike(tokens)

    def judge(self, tokens: np.ndarray) -> tuple[bool | None, str]:
        """Whether an answer [L] keeps the rules, and words for it; None where nobody knows."""
        if self.kind == SUDOKU:
            breach = breaches(np.maximum(tokens - 1, 0).astype(np.uint8))
            return not breach, f"breaks the rules in {breach}" if breach else "valid"
        if self.kind == MAZE:
            return verdict(self.given, tokens)
        return self._compared(tokens)

    def _compared(self, tokens: np.ndarray) -> tuple[bool | None, str]:
        if self.label is None or not (self.label > END).any():
            return None, "the data set has no solution to compare with"
        (mine, right), (across, columns) = cut(np.stack([tokens, self.label]))
        if (mine, across) != (right, columns):
            return False, f"a grid of {mine} x {across}, the solution has {right} x {columns}"
        grid = np.s_[:right, :columns]
        pair = [t.reshape(self.side, self.side)[grid] for t in (tokens, self.label)]
        unlike = int((pair[0] != pair[1]).sum())
        return unlike == 0, f"{unlike} cells unlike the solution" if unlike else "the solution"

    def _unlike(self, tokens: np.ndarray) -> np.ndarray:
        if self.label is None or not (self.label > END).any():
            return np.zeros(len(tokens), bool)
        return np.asarray((tokens != self.label) & ((tokens > END) | (self.label > END)))

    def _twice(self, digits: np.ndarray) -> np.ndarray:
        shape = box_shape(cells=len(digits))
        cell = np.arange(len(digits))
        row, column = cell // shape.side, cell % shape.side
        box = row // shape.rows * (shape.side // shape.cols) + column // shape.cols
        same = (digits[:, None] == digits) & (digits > 0) & (cell[:, None] != cell)
        seen = [unit[:, None] == unit for unit in (row, column, box)]
        return np.asarray((same & (seen[0] | seen[1] | seen[2])).any(1))

    def _astray(self, tokens: np.ndarray) -> np.ndarray:
        on_path, end = tokens == PATH, (tokens == START) | (tokens == GOAL)
        grid = np.zeros((self.side + 2, self.side + 2), np.int64)
        grid[1:-1, 1:-1] = (on_path | end).reshape(self.side, self.side)
        beside = grid[:-2, 1:-1] + grid[2:, 1:-1] + grid[1:-1, :-2] + grid[1:-1, 2:]
        beside = beside.reshape(-1)
        return (on_path & (beside != 2)) | (end & (beside != 1))


@dataclass(frozen=True, eq=False)
class Glance:
    """One rollout in one frame.

    Attributes:
        rollout: its number from 1.
        cells: tokens to show [L] int64.  certainty: probability of each [L] float32.
        broken: cells that break a rule [L] bool.
        q: halting logit, -inf before the first step.  step: steps run.  running: it goes on.
        valid, words: what `BoardView.judge` says.
    """

    rollout: int
    cells: np.ndarray
    certainty: np.ndarray
    broken: np.ndarray
    q: float
    step: int
    running: bool
    valid: bool | None
    words: str


def glances(view: BoardView, frame: Frame) -> list[Glance]:
    """What a frame shows of each rollout."""
    seen = []
    for index, tokens in enumerate(frame.tokens.cpu().numpy()):
        cells = view.cells(tokens)
        valid, words = view.judge(cells)
        seen.append(
            Glance(
                rollout=index + 1,
                cells=cells,
                certainty=frame.certainty[index].cpu().numpy(),
                broken=view.broken(cells),
                q=float(frame.q[index]),
                step=int(frame.steps[index]),
                running=bool(frame.running[index]),
                valid=valid,
                words=words,
            )
        )
    return seen


def answer_glance(view: BoardView, frames: Sequence[Sequence[Glance]], answers: Answers) -> Glance:
    """The answer to the one puzzle, as sure of each cell as its rollout was at its step."""
    cells = view.cells(answers.tokens[0].cpu().numpy())
    valid, words = view.judge(cells)
    rollout, step = int(answers.rollout[0]) + 1, int(answers.step[0])
    own = (glance for seen in frames for glance in seen if glance.rollout == rollout)
    certainty = next((glance.certainty for glance in own if glance.step == step), None)
    return Glance(
        rollout=rollout,
        cells=cells,
        certainty=np.ones(len(cells), np.float32) if certainty is None else certainty,
        broken=view.broken(cells),
        q=float(answers.q[0]),
        step=step,
        running=False,
        valid=valid,
        words=words,
    )


def best_of(seen: Sequence[Glance]) -> Glance:
    """The rollout with the highest q, the first of several; NaN counts least."""
    return max(seen, key=lambda glance: -np.inf if np.isnan(glance.q) else glance.q)


def kind_of(config: ModelConfig) -> str | None:
    """What a model answers: "sudoku", "maze", "arc", or None for puzzles that are not drawn."""
    if sudoku_side(config):
        return SUDOKU
    if maze_side(config):
        return MAZE
    return ARC if (config.seq_len, config.vocab_size) == (CELLS, VOCABULARY) else None


def view_of(
    config: ModelConfig,
    given: Sequence[int] | np.ndarray,
    label: Sequence[int] | np.ndarray | None = None,
) -> BoardView:
    """The view of a puzzle [L] in tokens of a model; ValueError for puzzles that are not drawn."""
    kind = kind_of(config)
    if kind is None:
        raise ValueError(
            "only Sudoku, mazes and ARC are drawn; this model has "
            f"{config.seq_len} tokens of {config.vocab_size} values"
        )
    cells = np.asarray(given, np.int64)
    known = None if label is None else np.asarray(label, np.int64)
    side = isqrt(len(cells))
    shape = box_shape(side) if kind == SUDOKU else None
    window = _window(cells, known) if kind == ARC else (side, side)
    return BoardView(kind, cells, known, (shape.rows, shape.cols) if shape else (0, 0), window)


def _window(given: np.ndarray, label: np.ndarray | None) -> tuple[int, int]:
    """Rows and columns from the corner that hold all colours of question and solution; the whole
    canvas where the solution is not known."""
    side = isqrt(len(given))
    if label is None or not (label > END).any():
        return side, side
    used = ((given > END) | (label > END)).reshape(side, side)
    rows, columns = np.flatnonzero(used.any(1)), np.flatnonzero(used.any(0))
    return int(rows[-1]) + 1, int(columns[-1]) + 1
