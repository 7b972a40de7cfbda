"""Puzzles as people write them: read, refused with a reason, judged by the rules, printed."""

import numpy as np
import pytest
from answering import BLANK, SOLVED

from trm_fast import puzzles as text

CLUES = "12..34..21..43.."
NINE = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
SIX = "123456456123231564564231312645645312"


@pytest.mark.parametrize("blank", "0._*")
def test_every_blank_is_read(blank):
    puzzle = text.parse_puzzle(f" {CLUES.replace('.', blank)}\n", "here")
    assert puzzle.cells.tolist() == [1, 2, 0, 0, 3, 4, 0, 0, 2, 1, 0, 0, 4, 3, 0, 0]
    assert puzzle.text == CLUES.replace(".", "0")
    assert puzzle.place == "here"


@pytest.mark.parametrize("board", [SOLVED, SIX, NINE])
def test_full_boards_keep_the_rules(board):
    cells = text.parse_puzzle(board, "x").cells
    assert not text.breaches(cells)
    assert text.board_line(cells) == board


def test_breaches_name_rows_columns_and_boxes():
    cells = text.parse_puzzle(NINE, "x").cells.copy()
    cells[[0, 1]] = cells[[1, 0]]  # swapped within row 1 and box 1
    assert text.breaches(cells) == text.Breach((), (1, 2), ())
    assert str(text.breaches(cells)) == "columns 1, 2"
    cells[80] = 1
    assert text.breaches(cells) == text.Breach((9,), (1, 2, 9), (9,))
    assert str(text.breaches(cells)) == "row 9; columns 1, 2, 9; box 9"


def test_boxes_of_six_are_two_rows_by_three_columns():
    cells = text.parse_puzzle(SIX, "x").cells.copy()
    cells[15] = 0  # row 3, column 4: box 4
    assert text.breaches(cells) == text.Breach((3,), (4,), (4,))
    assert not text.breaches(cells, blanks_allowed=True)
    cells[:] = 0
    cells[[14, 18]] = 6  # row 3 column 3, row 4 column 1: box 3
    assert text.breaches(cells, blanks_allowed=True) == text.Breach((), (), (3,))


def test_with_clues_keeps_clues_and_blanks_what_is_no_digit():
    clues = np.array([1] + [0] * 15, np.uint8)
    answer = np.array([4, -1, 0, 5, 3] + [2] * 11)
    assert text.with_clues(answer, clues).tolist() == [1, 0, 0, 0, 3] + [2] * 11
    assert text.board_line(text.with_clues(answer, clues)) == "1...3" + "2" * 11


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ("123", text.SizeError, "p: 3 characters, expected 16, 36 or 81: '123'"),
        ("", text.SizeError, "p: 0 characters, expected 16, 36 or 81: ''"),
        ("1" * 80, text.SizeError, f"p: 80 characters, expected 16, 36 or 81: '{'1' * 21}...'"),
        (
            "x" + BLANK[1:],
            text.PuzzleError,
            "p: character 1 is 'x', expected a digit 1-4, or 0 . _ * for a blank",
        ),
        (
            BLANK[1:] + "5",
            text.PuzzleError,
            "p: character 16 is '5', expected a digit 1-4, or 0 . _ * for a blank",
        ),
        (
            "²" + BLANK[1:],
            text.PuzzleError,
            "p: character 1 is '²', expected a digit 1-4, or 0 . _ * for a blank",
        ),
        (
            "11" + BLANK[2:],
            text.PuzzleError,
            "p: clues clash, a digit stands twice in row 1; box 1",
        ),
        (
            "1" + "." * 11 + "1...",
            text.PuzzleError,
            "p: clues clash, a digit stands twice in column 1",
        ),
    ],
)
def test_puzzles_that_are_refused(given, error, said):
    with pytest.raises(text.PuzzleError) as caught:
        text.parse_puzzle(given, "p")
    assert type(caught.value) is error
    assert str(caught.value) == said


def test_lines_grids_and_both_csv_dialects_read_alike():
    rows = [CLUES, BLANK, SOLVED]
    grid = "\n".join(CLUES[i : i + 4] for i in range(0, 16, 4))
    forms = {
        "lines": f"{CLUES}\n\n{BLANK}\r\n# three\n{SOLVED}",
        "grid": f"\ufeff\n{grid}\n\n{BLANK}\n{SOLVED}\n",
        "hf": "source,question,answer,rating\n"
        + "".join(f'"a, b",{row},{SOLVED},0\n' for row in rows),
        "kaggle": "quizzes,solutions\r\n" + "".join(f"{row},{SOLVED}\r\n" for row in rows),
    }
    places = {
        "lines": ["f:1", "f:3", "f:5"],
        "grid": ["f:2", "f:7", "f:8"],
        "hf": ["f:2", "f:3", "f:4"],
        "kaggle": ["f:2", "f:3", "f:4"],
    }
    for form, content in forms.items():
        found = text.parse_text(content, "f")
        assert [p.text for p in found] == [row.replace(".", "0") for row in rows], form
        assert [p.place for p in found] == places[form], form
    assert text.parse_text("\n \n", "f") == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (f"{CLUES}\n{CLUES}1\n", "f:2: 17 characters"),
        ("12..\n34..\n", "f:2: a grid of 4 rows from line 1 is cut short"),
        (f"12..\n{CLUES}\n", "f:2: a grid of 4 rows from line 1 is cut short"),
        ("1,2,3\n", "f:1: a CSV file needs a column named question or quizzes"),
        (f"rating,question\n0,{CLUES}\n\n0\n", "f:4: 1 columns, expected 2 or more"),
        (f"question\n{'.' * 15}\n", "f:2: 15 characters"),
        (f"question\n{CLUES}\n11{BLANK[2:]}\n", "f:3: clues clash, a digit stands twice in row 1"),
        (f"question\n{'9' * 140000}\n", "f:2: not valid CSV"),
    ],
)
def test_faults_in_a_file_name_the_line(content, said):
    with pytest.raises(text.PuzzleError) as caught:
        text.parse_text(content, "f")
    assert str(caught.value).startswith(said)
