"""The rules of puzzles: which puzzle data or a model is for, and which answers keep its rules.

Owns the choice, made by the number of tokens and of their values; the rules themselves are the
solvers'. Imported by the modules that measure and show answers. Sudoku has 16, 36 or 81 tokens and
as many values as digits and two more, mazes have the six of "# SGo" with padding on any other
square of 5x5 or more: no size is both.

Dims legend: N boards, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt

import numpy as np

from trm_fast.config import ModelConfig
from trm_fast.data.augment import BLANK_TOKEN
from trm_fast.data.format import Metadata
from trm_fast.data.maze_solver import CHARSET, OPEN, SIDES, maze_rules
from trm_fast.data.sudoku_solver import rules_hold

__all__ = [
    "Rules",
    "blank_token",
    "maze_side",
    "rules_of",
    "square_side",
    "sudoku_rules",
    "sudoku_side",
]

Rules = Callable[[np.ndarray, np.ndarray], np.ndarray]
SUDOKU_SIZES = {16: 4, 36: 6, 81: 9}  # tokens -> side


def sudoku_side(shape: Metadata | ModelConfig) -> int | None:
    """Side of the board (4, 6, 9) if data or model have the sizes of Sudoku, or None."""
    side = SUDOKU_SIZES.get(shape.seq_len)
    return side if side is not None and shape.vocab_size == side + 2 else None


def maze_side(shape: Metadata | ModelConfig) -> int | None:
    """Side of the maze if data or model have the sizes of mazes, or None."""
    side = square_side(shape)
    return side if side in SIDES and shape.vocab_size == len(CHARSET) + 1 else None


def blank_token(shape: Metadata | ModelConfig) -> int:
    """Token of the cells that an answer fills in: open cells of a maze, empty ones of Sudoku."""
    return OPEN if maze_side(shape) else BLANK_TOKEN


def square_side(shape: Metadata | ModelConfig) -> int | None:
    """Side of the grid if the tokens fill a square, or None."""
    side = isqrt(shape.seq_len)
    return side if side * side == shape.seq_len else None


def rules_of(shape: Metadata | ModelConfig) -> Rules | None:
    """What judges answers to the puzzle that data or model are for; None for other puzzles.

    The function takes inputs and answers, tokens [N, L] each, and returns bool [N]: whether an
    answer leaves what is given alone and keeps the rules, be it the labelled answer or not.
    """
    if sudoku_side(shape):
        return sudoku_rules
    return maze_rules if maze_side(shape) else None


def sudoku_rules(inputs: np.ndarray, preds: np.ndarray) -> np.ndarray:
    """Whether answers keep the clues and the rules: tokens [N, L] and [N, L] -> [N] bool."""
    clues = np.maximum(inputs.astype(np.int64) - 1, 0)
    answers = preds.astype(np.int64) - 1
    digits = (answers >= 1) & (answers <= SUDOKU_SIZES[inputs.shape[1]])
    full = np.asarray(digits.all(1))
    return full & rules_hold(clues, np.where(full[:, None], answers, 1))
