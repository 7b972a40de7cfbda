"""What is known of a puzzle by the sizes of its model: givens, and symmetries and their undoing."""

import numpy as np
import pytest
import torch
from answering import SOLVED, tiny_config

from trm_fast.data.maze_solver import maze_rules
from trm_fast.lanes import IMAGE, words_of
from trm_fast.puzzle_kind import kind_of
from trm_fast.rules import sudoku_rules

NINE = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
SUDOKU = {4: SOLVED, 9: NINE}
MAZE = "#####" "#Soo#" "###o#" "#Goo#" "#####"  # fmt: skip
TOKENS = {char: token for token, char in enumerate("# SGo", 1)}


def words(kind, count, seed=0):
    zeros = torch.zeros(count, dtype=torch.int64)
    return words_of(seed, torch.arange(count), zeros, zeros, IMAGE, kind.words)


@pytest.mark.parametrize("side", [4, 9])
def test_images_of_a_solved_board_keep_the_rules_and_can_be_undone(side):
    kind = kind_of(tiny_config(seq_len=side * side, vocab_size=side + 2))
    assert (kind.name, kind.side, kind.symmetries) == ("Sudoku", side, None)
    board = torch.tensor([int(c) + 1 for c in SUDOKU[side]]).expand(50, -1)
    image = kind.images(torch.arange(50), words(kind, 50))
    shown = image.apply(board)
    assert torch.equal(shown[0], board[0]), "rollout 0 sees the puzzle as it is"
    assert len({tuple(row) for row in shown.tolist()}) > 40
    blank = np.ones_like(shown.numpy())
    assert sudoku_rules(blank, shown.numpy()).all()
    assert torch.equal(image.inverse().apply(shown), board)
    holes = board.clone()
    holes[:, ::3] = 1
    seen = image.apply(holes)
    assert torch.equal(seen == 1, image.apply(board.where(holes > 1, 0)) == 0), "blanks stay"
    assert not torch.equal(kind.images(torch.arange(50), words(kind, 50, 1)).apply(board), shown)


def test_a_maze_has_eight_images():
    kind = kind_of(tiny_config(seq_len=25, vocab_size=6))
    assert (kind.name, kind.side, kind.symmetries) == ("maze", 5, 8)
    maze = torch.tensor([TOKENS[char] for char in MAZE]).expand(10, -1)
    image = kind.images(torch.arange(10), torch.zeros(10, 0, dtype=torch.int64))
    shown = image.apply(maze)
    assert torch.equal(shown[0], maze[0])
    assert len({tuple(row) for row in shown[:8].tolist()}) == 8
    assert torch.equal(shown[8:], shown[:2])
    assert torch.equal(image.inverse().apply(shown), maze)
    bare = torch.where(shown == TOKENS["o"], TOKENS[" "], shown)
    assert maze_rules(bare.numpy(), shown.numpy()).all()


def test_what_is_given():
    sudoku = kind_of(tiny_config())
    assert sudoku.given(torch.tensor([[0, 1, 2, 5]])).tolist() == [[False, False, True, True]]
    maze = kind_of(tiny_config(seq_len=25, vocab_size=6))
    seen = maze.given(torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 3, 4], [1, 2, 3, 2, 5]]))
    assert seen.tolist() == [[True, False, True, True, True], [False] * 5, [False] * 5]
    other = kind_of(tiny_config(seq_len=9, vocab_size=7))
    assert not other.given(torch.tensor([[1, 2, 3]])).any()
    assert (other.name, other.rules, other.symmetries) == ("puzzle", None, 0)
