"""What is seen on boards: cells, what is given, what breaks the rules, and words for it."""

import numpy as np
import pytest
import torch
from answering import tiny_config

from trm_fast.answers import Answers, Frame
from trm_fast.board_view import answer_glance, best_of, glances, kind_of, view_of
from trm_fast.config import ModelConfig

SUDOKU = tiny_config()
MAZE = tiny_config(seq_len=25, vocab_size=6)
ARC = tiny_config(seq_len=900, vocab_size=12)
WINDING = "S    #### G    ##########"
THROUGH = "Soooo####oGoooo##########"  # cells 1 to 4, 9, 14 to 11


def tokens(text: str, config: ModelConfig = SUDOKU) -> np.ndarray:
    if config is SUDOKU:
        return np.array([1 if c == "." else int(c) + 1 for c in text])
    return np.array(["# SGo".index(c) + 1 for c in text])


def canvas(*rows: str) -> np.ndarray:
    """An ARC canvas with digits for colours in its corner, and the line of ends around them."""
    grid = np.zeros((30, 30), np.int64)
    for number, row in enumerate(rows):
        grid[number, : len(row)] = [int(c) + 2 for c in row]
        grid[number, len(row)] = 1
    grid[len(rows), : len(rows[0]) + 1] = 1
    return grid.reshape(-1)


@pytest.mark.parametrize(
    ("config", "kind"),
    [(SUDOKU, "sudoku"), (MAZE, "maze"), (ARC, "arc"), (tiny_config(vocab_size=7), None)],
)
def test_kinds_are_told_by_sizes(config, kind):
    assert kind_of(config) == kind


def test_other_puzzles_are_not_drawn():
    with pytest.raises(ValueError, match="^only Sudoku, mazes and ARC are drawn; this model"):
        view_of(tiny_config(vocab_size=7), np.ones(16, int))


def test_a_sudoku():
    view = view_of(SUDOKU, tokens("1..4............"))
    assert (view.kind, view.side, view.box, view.window) == ("sudoku", 4, (2, 2), (4, 4))
    assert np.flatnonzero(view.fixed).tolist() == [0, 3]
    cells = view.cells(tokens("2234341221434321"))
    assert view.line(cells) == "1234341221434321"
    assert view.judge(cells) == (True, "valid")
    assert not view.broken(cells).any()


@pytest.mark.parametrize(
    ("answer", "broken"),
    [
        ("1234341221434324", [3, 10, 12, 15]),  # a 4 twice in row, column and box 4
        ("11..............", [0, 1]),
        ("1....1..........", [0, 5]),
        ("1...........1...", [0, 12]),
        ("1.....1.........", []),
        ("................", []),
    ],
)
def test_digits_that_stand_twice_are_marked(answer, broken):
    view = view_of(SUDOKU, tokens("." * 16))
    assert np.flatnonzero(view.broken(tokens(answer))).tolist() == broken
    assert view.judge(tokens(answer))[0] is False


def test_a_maze():
    view = view_of(MAZE, tokens(WINDING, MAZE))
    assert (view.kind, view.side, view.box, view.window) == ("maze", 5, (0, 0), (5, 5))
    said = np.where(tokens(THROUGH, MAZE) == 5, 5, 1)  # walls of the model's do not count
    cells = view.cells(said)
    assert view.line(cells) == THROUGH
    assert view.judge(cells) == (True, "a shortest path of 10 steps")
    assert not view.broken(cells).any()
    assert not view.fixed[[1, 9, 14]].any() and view.fixed.sum() == 25 - 9


def test_paths_that_go_astray_are_marked():
    view = view_of(MAZE, tokens(WINDING, MAZE))
    gap = tokens(THROUGH, MAZE)
    gap[3] = 2
    assert np.flatnonzero(view.broken(gap)).tolist() == [2, 4]
    assert view.judge(gap) == (False, "not a shortest path from S to G, which has 10 steps")
    assert np.flatnonzero(view.broken(view.given)).tolist() == [0, 10]


def test_arc_is_compared_with_the_solution():
    view = view_of(ARC, canvas("12", "34"), canvas("123", "456"))
    assert (view.kind, view.window) == ("arc", (2, 3))
    cells = view.cells(canvas("123", "456"))
    assert view.judge(cells) == (True, "the solution")
    assert view.judge(view.cells(canvas("123", "457"))) == (False, "1 cells unlike the solution")
    other = view.cells(canvas("12", "45"))
    assert view.judge(other) == (False, "a grid of 2 x 2, the solution has 2 x 3")
    assert not view.broken(cells).any() and not view.fixed.any()
    assert np.flatnonzero(view.broken(other)).tolist() == [2, 32]
    unlike = view.cells(canvas("123", "457"))
    assert np.flatnonzero(view.broken(unlike)).tolist() == [32]
    assert view.window_of(other) == view.window_of(cells) == (2, 3)
    large = view.cells(canvas("1234", "4567", "7891", "1111"))
    assert view.window_of(large) == (4, 4)
    assert view.broken(large).sum() == 4 * 4 - 2 * 3
    beyond = canvas("123", "456")
    beyond[899] = 5
    assert view.cells(beyond)[899] == 0


def test_arc_without_a_solution_is_not_judged():
    view = view_of(ARC, canvas("12"))
    assert view.window == (30, 30)
    assert view.window_of(view.cells(canvas("12"))) == (30, 30)
    assert not view.broken(canvas("12")).any()
    assert view.judge(canvas("12")) == (None, "the data set has no solution to compare with")


def frame(rows: list[str], q: list[float], steps: list[int], **more) -> Frame:
    count = len(rows)
    return Frame(
        number=1,
        tokens=torch.from_numpy(np.stack([tokens(row) for row in rows])),
        certainty=torch.full((count, 16), 0.25),
        q=torch.tensor(q),
        steps=torch.tensor(steps),
        running=torch.tensor([False] * count),
        **more,
    )


def test_glances_of_a_frame():
    view = view_of(SUDOKU, tokens("1..............."))
    seen = glances(view, frame(["1234341221434321", "11" + "." * 14], [-1.0, 2.5], [3, 4]))
    assert [g.rollout for g in seen] == [1, 2]
    assert [(g.q, g.step, g.valid) for g in seen] == [(-1.0, 3, True), (2.5, 4, False)]
    assert seen[1].broken.sum() == 2 and seen[1].certainty.tolist() == [0.25] * 16
    assert best_of(seen).rollout == 2


def test_a_q_that_is_no_number_is_never_best():
    view = view_of(SUDOKU, tokens("." * 16))
    seen = glances(view, frame(["." * 16] * 3, [float("nan"), -torch.inf, -5.0], [1, 0, 1]))
    assert best_of(seen).rollout == 3
    assert best_of(seen[:2]).rollout == 1


def test_the_answer_is_as_sure_as_its_step():
    view = view_of(SUDOKU, tokens("." * 16))
    one = glances(view, frame(["1234341221434321"] * 2, [0.0, 1.0], [1, 1]))
    answers = Answers(
        tokens=torch.from_numpy(tokens("1234341221434321"))[None],
        q=torch.tensor([1.0]),
        step=torch.tensor([1]),
        rollout=torch.tensor([1]),
        passes=torch.tensor([2]),
        confidence=torch.tensor([0.7]),
        cut=torch.tensor([False]),
    )
    glance = answer_glance(view, [one], answers)
    assert (glance.rollout, glance.step, glance.q, glance.valid) == (2, 1, 1.0, True)
    assert glance.certainty.tolist() == [0.25] * 16
    assert answer_glance(view, [], answers).certainty.tolist() == [1.0] * 16
