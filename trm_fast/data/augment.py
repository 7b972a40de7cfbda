"""Changes made to a batch of Sudoku tokens on the fly: random symmetry, clues handed back.

Owns the augmentation of the training step. It draws by counter (`philox.Draws`), so that a resumed
run draws the same, and runs on the device of the batch without waiting for it. May be imported by
the trainer; imports symmetry and philox only.

Dims: B boards, L cells (16, 36 or 81). Tokens: 0 padding, 1 blank, digit d as d + 1; -100 in labels
is kept.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

from trm_fast.philox import Draws, uniform
from trm_fast.symmetry import sudoku_symmetries_of, sudoku_words

__all__ = ["augmentation_words", "hand_back", "sudoku_augment"]

BLANK_TOKEN = 1
SYMMETRY, HANDED_BACK = 1, 2  # purposes of draws


def augmentation_words(cells: int, symmetry: bool, handed_back: bool) -> dict[int, int]:
    """What `Draws` must have drawn, by purpose, for boards of `cells` tokens."""
    counts = {SYMMETRY: sudoku_words(isqrt(cells))} if symmetry else {}
    return counts | ({HANDED_BACK: cells} if handed_back else {})


def sudoku_augment(inputs: Tensor, labels: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """A random symmetry per board, the same for input and label; [B, L] each, any integer dtype.

    Returns new tensors of the same shapes and dtypes. Raises ValueError for boards that are not
    4x4, 6x6 or 9x9. `draws` has the words of `augmentation_words`.
    """
    side = isqrt(inputs.shape[1])
    symmetry = sudoku_symmetries_of(draws.words(SYMMETRY), side)
    return symmetry.apply_tokens(inputs), symmetry.apply_tokens(labels)


def hand_back(inputs: Tensor, labels: Tensor, fraction: float | Tensor, draws: Draws) -> Tensor:
    """inputs [B, L] with each blank replaced by its solution token with probability `fraction`.

    A curriculum: early in training boards have fewer holes. Blanks whose label is not a digit stay
    blank. `fraction` is a number or 0-d, and may lie outside [0, 1]: none or all.
    """
    chosen = uniform(draws.words(HANDED_BACK)) < fraction
    given = chosen & (inputs == BLANK_TOKEN) & (labels > BLANK_TOKEN)
    return torch.where(given, labels.to(inputs.dtype), inputs)
