"""Which puzzle a size is, and which answers keep its rules."""

import numpy as np
import pytest
from answering import CELLS, SOLVED, tiny_config

from trm_fast.data.maze_solver import CHARSET, maze_rules
from trm_fast.rules import maze_side, rules_of, sudoku_rules, sudoku_side

GRID = np.array([int(c) for c in SOLVED])


@pytest.mark.parametrize(
    ("tokens", "values", "sudoku", "maze"),
    [
        (16, 6, 4, None),
        (36, 8, 6, None),
        (81, 11, 9, None),
        (16, 7, None, None),
        (25, 6, None, 5),
        (36, 6, None, 6),
        (81, 6, None, 9),
        (900, 6, None, 30),
        (900, 12, None, None),
        (24, 6, None, None),
        (9, 6, None, None),
    ],
)
def test_no_size_is_two_puzzles(tokens, values, sudoku, maze):
    shape = tiny_config(seq_len=tokens, vocab_size=values)
    assert (sudoku_side(shape), maze_side(shape)) == (sudoku, maze)
    assert rules_of(shape) is (sudoku_rules if sudoku else maze_rules if maze else None)


def test_rules_want_clues_kept_and_every_digit_once():
    clues = np.where(np.arange(CELLS) < 4, GRID, 0)
    other = 5 - GRID  # keeps the rules, not the clues
    twice = GRID.copy()
    twice[-1] = 2
    blank, padding = GRID + 1, GRID + 1
    blank[5], padding[5] = 1, 0
    preds = np.stack([GRID + 1, other + 1, twice + 1, blank, padding])
    inputs = np.repeat(clues[None] + 1, len(preds), 0)
    assert sudoku_rules(inputs, preds).tolist() == [True, False, False, False, False]


def test_rules_take_padding_in_the_inputs_for_blanks():
    inputs = np.zeros((1, CELLS), np.uint8)
    assert sudoku_rules(inputs, GRID[None] + 1).tolist() == [True]


MAZE = "      ##  S##G  ###      "
ANSWERS = {
    "shortest": ("oooo o##o S##G  ###      ", True),
    "longer": ("      ##  S##Goo###oooooo", False),
    "nothing": (MAZE, False),
    "a-gap": ("oo o o##o S##G  ###      ", False),
    "a-cell-more": ("oooooo##o S##G  ###      ", False),
    "moved-aside": ("ooo oo##o S##G  ###      ", False),
    "through-a-wall": ("      ##  SooG  ###      ", False),
    "a-wall-gone": ("oooo o# o S##G  ###      ", False),
    "a-wall-more": ("oooo#o##o S##G  ###      ", False),
    "start-gone": ("oooo o##o o##G  ###      ", False),
    "goal-gone": ("oooo o##o S##o  ###      ", False),
    "padding": ("oooo.o##o S##G  ###      ", False),
}


def tokens(*texts):
    return np.array([[0 if c == "." else CHARSET.index(c) + 1 for c in text] for text in texts])


@pytest.mark.parametrize("name", ANSWERS)
def test_a_maze_is_answered_by_a_shortest_path(name):
    answer, right = ANSWERS[name]
    assert maze_rules(tokens(MAZE), tokens(answer)).tolist() == [right]


def test_any_of_several_shortest_paths_is_right():
    maze = "S     ###       ###     G"
    round_one = "Soooo ###o    o ###o    G"
    other = "S    o### ooooo ###o    G"
    both = "Sooooo###oo   oo###oooooG"
    # As many cells as a shortest path has, of two of them.
    mixed = "Soooo ###o      ###   ooG"
    inputs = tokens(maze, maze, maze, maze)
    assert maze_rules(inputs, tokens(round_one, other, both, mixed)).tolist() == [
        *(True, True, False, False)
    ]


def test_what_is_no_maze_has_no_right_answer():
    walled = "S#   ##                 G"
    two_goals = "S   G                   G"
    no_start = "                        G"
    marked = "Sooo                    G"
    inputs = tokens(walled, two_goals, no_start, marked)
    assert maze_rules(inputs, inputs).tolist() == [False] * 4
    assert maze_rules(inputs[:0], inputs[:0]).tolist() == []


def test_start_beside_goal_needs_no_path():
    maze = tokens("SG                       ")
    assert maze_rules(maze, maze).tolist() == [True]
