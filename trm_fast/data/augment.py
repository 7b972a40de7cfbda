"""Changes made to a batch of tokens on the fly: random symmetry, clues handed back.

Owns the augmentation of the training step. It draws by counter (`philox.Draws`), so that a resumed
run draws the same, and runs on the device of the batch without waiting for it. May be imported by
the trainer; imports symmetry and philox only.

Dims: B boards, L cells of a square grid. Tokens of Sudoku: 0 padding, 1 blank, digit d as d + 1.
-100 in labels is kept.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

from trm_fast.philox import Draws, integers, uniform
from trm_fast.symmetry import dihedral_cells, sudoku_symmetries_of, sudoku_words

__all__ = ["AUGMENTATIONS", "augmentation_words", "dihedral_augment", "hand_back", "sudoku_augment"]

BLANK_TOKEN = 1
SYMMETRY, HANDED_BACK = 1, 2  # purposes of draws


def augmentation_words(cells: int, augment: str, handed_back: bool) -> dict[int, int]:
    """What `Draws` must have drawn, by purpose, for boards of `cells` tokens; `augment` is "none"
    or a name in AUGMENTATIONS."""
    counts = {}
    if augment != "none":
        counts[SYMMETRY] = 1 if augment == "dihedral" else sudoku_words(isqrt(cells))
    return counts | ({HANDED_BACK: cells} if handed_back else {})


def sudoku_augment(inputs: Tensor, labels: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """A random symmetry per board, the same for input and label; [B, L] each, any integer dtype.

    Returns new tensors of the same shapes and dtypes. Raises ValueError for boards that are not
    4x4, 6x6 or 9x9. `draws` has the words of `augmentation_words`.
    """
    side = isqrt(inputs.shape[1])
    symmetry = sudoku_symmetries_of(draws.words(SYMMETRY), side)
    return symmetry.apply_tokens(inputs), symmetry.apply_tokens(labels)


def dihedral_augment(inputs: Tensor, labels: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """One of the 8 symmetries of the square per board, the same for input and label; [B, L] each.

    For puzzles on a square grid whose rules know no direction: mazes, and Sudoku with square boxes.
    Any integer dtype; returns new tensors of the same shapes and dtypes. Raises ValueError for
    boards that are not square. `draws` has the words of `augmentation_words`.
    """
    cells = inputs.shape[1]
    side = isqrt(cells)
    if side * side != cells:
        raise ValueError(f"boards of {cells} tokens are not square")
    chosen = integers(draws.words(SYMMETRY)[:, 0], 0, 8)
    came_from = dihedral_cells(side, inputs.device)[chosen]
    return inputs.gather(1, came_from), labels.gather(1, came_from)


def hand_back(
    inputs: Tensor,
    labels: Tensor,
    fraction: float | Tensor,
    draws: Draws,
    blank: int = BLANK_TOKEN,
) -> Tensor:
    """inputs [B, L] with each blank replaced by its solution token with probability `fraction`.

    A curriculum: early in training boards have fewer holes. `blank` is the token of a cell to be
    filled in, 1 in Sudoku, 2 (open) in mazes; where the label is no higher token (padding, or a
    cell that stays open) the cell stays as it is. `fraction` is a number or 0-d, and may lie
    outside [0, 1]: none or all.
    """
    chosen = uniform(draws.words(HANDED_BACK)) < fraction
    given = chosen & (inputs == blank) & (labels > blank)
    return torch.where(given, labels.to(inputs.dtype), inputs)


AUGMENTATIONS = {"sudoku": sudoku_augment, "dihedral": dihedral_augment}
