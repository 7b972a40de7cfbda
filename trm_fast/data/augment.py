"""Changes made to a batch of Sudoku tokens on the fly: random symmetry, clues handed back.

Owns the augmentation of the training step, which draws from a counter-based generator, e.g.
`np.random.Generator(np.random.Philox(key=(seed, step)))`, so that a resumed run draws the same.
May be imported by the trainer and the builders; imports symmetry only.

Dims: B boards, L cells (16, 36 or 81). Tokens: 0 padding, 1 blank, digit d as d + 1; -100 in labels
is kept.
"""

from __future__ import annotations

from math import isqrt

import numpy as np

from trm_fast.symmetry import sudoku_symmetries

__all__ = ["hand_back", "sudoku_augment"]

BLANK_TOKEN = 1


def sudoku_augment(
    inputs: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A random symmetry per board, the same for input and label; [B, L] each, any integer dtype.

    Returns new arrays of the same shapes and dtypes. Raises ValueError for boards that are not
    4x4, 6x6 or 9x9.
    """
    symmetry = sudoku_symmetries(len(inputs), rng, isqrt(inputs.shape[1]))
    return symmetry.apply_tokens(inputs), symmetry.apply_tokens(labels)


def hand_back(
    inputs: np.ndarray, labels: np.ndarray, fraction: float, rng: np.random.Generator
) -> np.ndarray:
    """inputs [B, L] with each blank replaced by its solution token with probability `fraction`.

    A curriculum: early in training boards have fewer holes. Blanks whose label is not a digit stay
    blank. Draws B * L numbers whatever the fraction. Raises ValueError unless 0 <= fraction <= 1.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction={fraction} is not between 0 and 1")
    chosen = rng.random(inputs.shape, dtype=np.float32) < fraction
    given = chosen & (inputs == BLANK_TOKEN) & (labels > BLANK_TOKEN)
    return np.where(given, labels.astype(inputs.dtype), inputs)
