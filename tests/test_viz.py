"""Boards as text, exactly; the learning curve drawn, and its absence survived."""

import math
import sys

import numpy as np
import pytest
import torch

from trm_fast.viz import _curves, format_board, learning_curve, side_by_side

ROWS = [
    {"step": 1, "train/lm_loss": 2.0, "train/exact_accuracy": 0.0, "train/accuracy": 0.1},
    {"step": 2, "train/lm_loss": None, "train/exact_accuracy": 0.25},
    {"step": 2, "all/exact_accuracy": 0.5, "all/lm_loss": 1.5},
    {"step": 3, "train/lm_loss": math.inf, "name": "x"},
    {"step": 3, "exact_accuracy": 1},
]


def test_curves_are_picked_by_set_and_gaps_left_out():
    assert _curves(ROWS, "lm_loss") == {"train": [(1, 2.0)], "all": [(2, 1.5)]}
    accuracies = {"train": [(1, 0.0), (2, 25.0)], "all": [(2, 50.0)], "run": [(3, 100)]}
    assert _curves(ROWS, "exact_accuracy") == accuracies


@pytest.mark.parametrize("rows", [ROWS, ROWS[2:], [{"step": 1, "train/lm_loss": 0.0}]])
def test_the_learning_curve_is_a_picture(tmp_path, rows):
    image = pytest.importorskip("matplotlib.image")
    path = tmp_path / "learning_curve.png"
    path.write_text("old")
    assert learning_curve(rows, path, "run") is None
    pixels = image.imread(path)
    assert pixels.shape[:2] == (660, 880)
    assert pixels[..., :3].min() < 0.1 and (pixels[..., :3] == 1).mean() > 0.5
    assert [entry.name for entry in tmp_path.iterdir()] == ["learning_curve.png"]


def test_without_matplotlib_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = learning_curve(ROWS, tmp_path / "learning_curve.png")
    assert said == 'learning_curve.png is not drawn: pip install "trm-fast[viz]"'
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_draw_or_nowhere_to_draw_is_one_line(tmp_path):
    pytest.importorskip("matplotlib")
    assert learning_curve([{"step": 1}], tmp_path / "c.png") == "c.png is not drawn: no metrics yet"
    said = learning_curve(ROWS, tmp_path / "missing" / "c.png")
    assert said == "c.png is not drawn: No such file or directory"
    (tmp_path / "c.png").mkdir()
    assert learning_curve(ROWS, tmp_path / "c.png") == "c.png is not drawn: Is a directory"
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.png"]


def test_a_small_board():
    text = format_board("1234341221434321", "1..4..1.2....3..")
    assert text == ("[1] 2 | 3 [4]\n 3  4 |[1] 2 \n------+------\n[2] 1 | 4  3 \n 4 [3]| 2  1 ")


def test_a_board_of_six_has_boxes_two_high_and_three_wide():
    cells = [(row * 3 + row // 2 + column) % 6 + 1 for row in range(6) for column in range(6)]
    lines = format_board(cells).split("\n")
    assert lines[0] == " 1  2  3 | 4  5  6 " and lines[1] == " 4  5  6 | 1  2  3 "
    assert [i for i, line in enumerate(lines) if set(line) == {"-", "+"}] == [2, 5]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_a_board_of_nine_from_any_sequence(kind):
    digits = [(i * 7) % 10 for i in range(81)]
    lines = format_board(kind(digits), kind(digits), size=9).split("\n")
    assert lines[0] == " . [7][4]|[1][8][5]|[2][9][6]"
    assert [i for i, line in enumerate(lines) if set(line) == {"-", "+"}] == [3, 7]
    assert {len(line) for line in lines} == {29}


def test_givens_are_bold_on_a_terminal():
    text = format_board("1" * 16, "1" + "." * 15, ansi=True)
    assert text.startswith(" \033[1m1\033[0m  1 | 1  1 \n 1  1 ")


@pytest.mark.parametrize(
    "board, settings, said",
    [
        ("1" * 15, {}, "board has 15 cells; 16 or 36 or 81 are allowed"),
        ("1" * 16, {"size": 9}, "board has 16 cells; 81 are allowed"),
        ("1" * 16, {"size": 5}, "board size is 5; 4, 6 and 9"),
        ("1" * 15 + "5", {}, "board has '5' in cell 16; 0 to 4"),
        ("1" * 15 + "x", {}, "board has 'x' in cell 16"),
        ([1] * 15 + [-1], {}, "board has '-1' in cell 16"),
        ("1" * 16, {"givens": "1" * 81}, "givens has 81 cells; 16 are allowed"),
    ],
)
def test_other_boards_are_refused(board, settings, said):
    with pytest.raises(ValueError, match=said):
        format_board(board, **settings)


def test_side_by_side():
    bold = format_board("1" * 16, "1" * 16, ansi=True)
    text = side_by_side(["ab\nc", bold, "x"], ["before", "after", ""], gap=2)
    lines = text.split("\n")
    assert lines[0] == "before  after"
    assert lines[1].startswith("ab       \033[1m1\033[0m ") and lines[1].endswith("  x")
    assert lines[2].startswith("c        \033[1m1") and not lines[2].endswith(" ")
    assert len(lines) == 6
    assert side_by_side([]) == ""
    with pytest.raises(ValueError, match="1 titles for 2 boards"):
        side_by_side(["a", "b"], ["one"])
