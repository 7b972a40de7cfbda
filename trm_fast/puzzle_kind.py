"""What is known of the puzzles a model answers: what is given, their symmetries, their rules.

Owns the choice, by the sizes of the model as `rules.py` makes it. Imported by what runs rollouts
and chooses among their answers. A kind without symmetries or rules is served as well: rollouts
then differ by noise or initial states.

Dims legend: N boards, L tokens, V token values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trm_fast.config import ModelConfig
from trm_fast.data.augment import BLANK_TOKEN
from trm_fast.data.maze_solver import GOAL, OPEN, START
from trm_fast.rules import Rules, maze_side, rules_of, sudoku_side
from trm_fast.symmetry import (
    TokenSymmetry,
    dihedral_cells,
    sudoku_symmetries_of,
    sudoku_words,
)

__all__ = ["PuzzleKind", "kind_of"]


@dataclass(frozen=True)
class PuzzleKind:
    """One kind of puzzle.

    Attributes:
        name: "Sudoku", "maze" or "puzzle".
        side: of the board, 0 where it is not known to be square.
        rules: what judges answers, see `rules_of`; None where nothing does.
        symmetries: how many there are; 0 where none is known, None where more than can be used up.
        words: random words that `images` takes for each board.
    """

    name: str
    side: int
    tokens: int
    rules: Rules | None
    symmetries: int | None
    words: int = 0

    def given(self, inputs: Tensor) -> Tensor:
        """Which tokens of the puzzles [N, L] every answer must repeat, [N, L] bool."""
        if self.name == "Sudoku":
            return inputs > BLANK_TOKEN
        if self.name == "maze":
            # Other puzzles have as many cells and values; only mazes have one start and one goal.
            one_start, one_goal = (
                (inputs == token).sum(-1, keepdim=True) == 1 for token in (START, GOAL)
            )
            return (inputs != OPEN) & one_start & one_goal
        return torch.zeros_like(inputs, dtype=torch.bool)

    def images(self, rollouts: Tensor, words: Tensor) -> TokenSymmetry:
        """The symmetry under which each rollout sees its puzzle; that of rollout 0 is none.

        Args:
            rollouts: [N] int64.  words: [N, self.words] int64 in [0, 2**32), see `philox`.
        """
        if self.name == "maze":
            cells = dihedral_cells(self.side, rollouts.device)[rollouts % 8]
            values = torch.arange(self.tokens, device=rollouts.device)
            return TokenSymmetry(cells, values.expand(len(rollouts), -1))
        drawn = sudoku_symmetries_of(words, self.side)
        cells, values, first = drawn.cells, drawn.token_maps(), (rollouts == 0).unsqueeze(-1)
        return TokenSymmetry(
            torch.where(first, torch.arange(cells.shape[1], device=cells.device), cells),
            torch.where(first, torch.arange(values.shape[1], device=values.device), values),
        )


def kind_of(config: ModelConfig) -> PuzzleKind:
    """The kind of puzzle that a model with these sizes answers."""
    side, tokens = sudoku_side(config), config.vocab_size
    if side:
        return PuzzleKind("Sudoku", side, tokens, rules_of(config), None, sudoku_words(side))
    side = maze_side(config)
    if side:
        return PuzzleKind("maze", side, tokens, rules_of(config), 8)
    return PuzzleKind("puzzle", 0, tokens, None, 0)
