"""The batched solver: right solutions, right counts, the rules; every size."""

import numpy as np
import pytest

from trm_fast.data.sudoku_generator import random_grids
from trm_fast.data.sudoku_solver import (
    candidates,
    clashing,
    digits_of,
    is_valid,
    propagate,
    rules_hold,
    solve,
)
from trm_fast.symmetry import box_shape

# A board whose solution needs many guesses ("AI Escargot"), one of 17 clues, and an easy one.
BOARDS = [
    "1....7.9..3..2...8..96..5....53..9...1..8...26....4...3......1..4......7..7...3..",
    "000000010400000000020000000000050407008000300001090000300400200050100000000806000",
    "530070000600195000098000060800060003400803001700020006060000280000419005000080079",
]
SOLVED = [
    "162857493534129678789643521475312986913586742628794135356478219241935867897261354",
    "693784512487512936125963874932651487568247391741398625319475268856129743274836159",
    "534678912672195348198342567859761423426853791713924856961537284287419635345286179",
]


def parse(*texts: str) -> np.ndarray:
    rows = [[int(c) for c in text.replace(".", "0")] for text in texts]
    return np.array(rows, np.uint8)


def brute_force(board: list[int], side: int, limit: int = 2) -> int:
    """Number of solutions, up to limit, by trying every digit in the first blank."""
    box = box_shape(side)
    if 0 not in board:
        return 1
    cell = board.index(0)
    row, col = divmod(cell, side)
    used = {
        board[other]
        for other in range(side * side)
        if other // side == row
        or other % side == col
        or (other // side // box.rows, other % side // box.cols)
        == (row // box.rows, col // box.cols)
    }
    found = 0
    for digit in range(1, side + 1):
        if digit not in used and found < limit:
            found += brute_force(board[:cell] + [digit] + board[cell + 1 :], side, limit - found)
    return found


def test_known_boards_are_solved() -> None:
    boards = parse(*BOARDS)
    solutions = solve(boards)
    assert solutions.counts.tolist() == [1, 1, 1]
    np.testing.assert_array_equal(solutions.boards[[0, 2]], parse(SOLVED[0], SOLVED[2]))
    assert rules_hold(boards, solutions.boards).all()


@pytest.mark.parametrize("side", [4, 6])
def test_counts_agree_with_brute_force(side: int) -> None:
    rng = np.random.default_rng(side)
    grids = random_grids(150, rng, side)
    boards = np.where(rng.random(grids.shape) < rng.uniform(0.2, 0.7, (150, 1)), grids, 0)
    wrong = rng.random(150) < 0.3
    boards[wrong, 0] = rng.integers(1, side + 1, wrong.sum())
    expected = [min(brute_force(board.tolist(), side), 2) for board in boards]
    # brute_force trusts the clues; a board with clashing ones has no solution.
    expected = [0 if clash else n for clash, n in zip(clashing(boards), expected, strict=True)]
    solutions = solve(boards)
    assert solutions.counts.tolist() == expected
    assert {0, 1, 2} == set(expected)
    solved = solutions.counts > 0
    assert rules_hold(boards[solved], solutions.boards[solved]).all()
    assert (solutions.boards[~solved] == 0).all()


def test_none_one_and_several_solutions_on_full_size() -> None:
    empty = np.zeros(81, np.uint8)
    clash = parse(BOARDS[2])[0].copy()
    clash[2] = 5
    # No clash to be seen, but row 0 leaves nothing for its last cell.
    hidden = empty.copy()
    hidden[:8] = np.arange(1, 9)
    hidden[17] = 9
    full = parse(SOLVED[2])[0]
    counts = solve(np.stack([empty, clash, hidden, full])).counts
    assert counts.tolist() == [2, 0, 0, 1]
    assert solve(empty[None], limit=1).counts.tolist() == [1]


def test_more_boards_than_fit_at_once() -> None:
    boards = np.tile(parse(BOARDS[2]), (2500, 1))
    boards[1234, 0] = 4
    solutions = solve(boards)
    assert solutions.counts[1234] == 0
    assert np.delete(solutions.counts, 1234).all()
    np.testing.assert_array_equal(solutions.boards[2499], parse(SOLVED[2])[0])
    assert solve(boards[:0]).boards.shape == (0, 81)


def test_one_round_finds_naked_and_hidden_singles() -> None:
    box = box_shape(9)
    board = np.zeros((1, 81), np.uint8)
    board[0, :8] = np.arange(1, 9)
    after, dead = propagate(candidates(board, box), box)
    assert digits_of(after)[0, 8] == 9 and not dead[0]
    # Two 1s leave one place for a 1 in the first box: row 2, whose first two cells are taken.
    board = np.zeros((1, 81), np.uint8)
    board[0, [9 + 3, 6, 18, 19]] = [1, 1, 2, 3]
    after, dead = propagate(candidates(board, box), box)
    assert digits_of(after)[0, 20] == 1 and not dead[0]


def test_the_rules() -> None:
    grid = parse(SOLVED[2])
    assert is_valid(grid).all() and not clashing(grid).any()
    for cell in (0, 40, 80):
        wrong = grid.copy()
        wrong[0, cell] = wrong[0, cell] % 9 + 1
        assert not is_valid(wrong)[0] and clashing(wrong)[0]
        blank = grid.copy()
        blank[0, cell] = 0
        assert not is_valid(blank)[0] and not clashing(blank)[0]
        assert rules_hold(blank, grid)[0] and not rules_hold(wrong, grid)[0]
    # Rows and columns hold, boxes do not.
    latin = (np.add.outer(np.arange(9), np.arange(9)) % 9 + 1).reshape(1, 81)
    assert not is_valid(latin)[0] and clashing(latin)[0]


def test_bad_boards_are_named() -> None:
    with pytest.raises(ValueError, match="board 1 has a digit outside 0..9"):
        solve(np.array([[0] * 81, [0] * 80 + [10]]))
    with pytest.raises(ValueError, match="boards of 82 cells"):
        is_valid(np.zeros((1, 82), int))
    with pytest.raises(ValueError, match="float64"):
        solve(np.zeros((1, 81)))


def test_a_board_that_takes_too_many_guesses_is_given_up():
    """Without a limit this one, which has no solution, takes three million."""
    endless = ".....5.8....6.1.43..........1.5........1.6...3.......553.....61........4........."
    solutions = solve(parse(endless, *BOARDS), guesses=400)
    assert solutions.given_up.tolist() == [True, False, False, False]
    assert solutions.counts.tolist() == [0, 1, 1, 1]
    np.testing.assert_array_equal(solutions.boards[1:], parse(*SOLVED))
    assert not solve(parse(*BOARDS)).given_up.any()
