"""Mazes as text: every form read, every fault named with its place; answers judged in words."""

import json

import numpy as np
import pytest
import torch
from answering import save_run

from trm_fast import solve
from trm_fast.inference import Answers
from trm_fast.mazes import looks_like_mazes, maze_rows, parse_mazes, verdict, with_walls
from trm_fast.puzzles import PuzzleError, SizeError

ROWS = ["S#   ", " ### ", "     ", "# ## ", "#   G"]
TEXT = "\n".join(ROWS)
ANSWER = "\n".join(["S#   ", "o### ", "oo   ", "#o## ", "#oooG"])


def cells(text: str) -> np.ndarray:
    return np.array(["?# SGo".index(c) for c in text.replace("\n", "")], np.uint8)


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        TEXT.replace(" ", "."),
        "\n".join(row.rstrip() for row in ROWS),
        "\r\n".join(ROWS) + "\r\n\r\n",
        "\ufeff\n" + TEXT,
        "".join(ROWS),
    ],
    ids=["rows", "dots", "stripped", "crlf", "mark", "line"],
)
def test_every_form_is_the_same_maze(text):
    assert looks_like_mazes(text)
    (maze,) = parse_mazes(text, "m.txt")
    assert maze.cells.dtype == np.uint8 and maze.cells.tolist() == cells(TEXT).tolist()
    assert maze_rows(maze.cells) == TEXT


def test_sudoku_is_no_maze():
    assert not looks_like_mazes("# Some Good boards\n12..34..21..43..\n")
    assert not looks_like_mazes("Source,Question,Given\nx,12..34..21..43..,1\n")
    assert not looks_like_mazes("................")
    assert looks_like_mazes("S.#\n#..\n..X\n") and looks_like_mazes("#####\n")


def test_several_mazes_have_their_places():
    open_row = "\n".join(["     ", "S   G", "", "", "#"])
    text = f"\n{TEXT}\n\n{open_row}\n{TEXT}\n"
    found = parse_mazes(text, "m.txt")
    assert [maze.place for maze in found] == ["m.txt:2", "m.txt:8", "m.txt:13"]
    assert found[1].cells.tolist() == cells("     S   G" + " " * 10 + "#    ").tolist()
    lines = parse_mazes("".join(ROWS) + "\n\n" + "".join(ROWS), "m.txt")
    assert [maze.place for maze in lines] == ["m.txt:1", "m.txt:3"]
    assert parse_mazes(TEXT, "argument 2", numbered=False)[0].place == "argument 2"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            "S\n\n    G\n#",
            SizeError,
            "m:1: 4 lines, but the longest line has 5 characters",
        ),
        ("#####\n#S G#\n#   #\n#####\n", SizeError, "m:1: 4 lines, but the longest line has 5"),
        (TEXT + "  #", SizeError, "m:1: 5 lines, but the longest line has 8 characters"),
        ("SG\n##", SizeError, "m:1: 2x2 cells, mazes have 5 to 100 a side"),
        (TEXT.replace("#  ", "x  ", 1), PuzzleError, "m:1: 'x' is none of the characters"),
        (ANSWER, PuzzleError, "m:1: 'o' is none of the characters of a maze, '# SG'"),
        (TEXT.replace("# ## ", "# S# "), PuzzleError, "m:1: 2 S and 1 G, a maze has one of each"),
        (TEXT.replace("G", "#"), PuzzleError, "m:1: 1 S and 0 G"),
    ],
)
def test_faults_are_named(text, error, message):
    with pytest.raises(error, match=message) as caught:
        parse_mazes(text, "m")
    assert "\n" not in str(caught.value)


def test_an_answer_keeps_the_maze_and_is_judged():
    maze = cells(TEXT)
    assert verdict(maze, cells(ANSWER)) == (True, "a shortest path of 8 steps")
    scrawl = np.full(25, 5, np.uint8)
    assert maze_rows(with_walls(scrawl, maze)) == TEXT.replace(" ", "o")
    assert verdict(maze, with_walls(scrawl, maze)) == (
        False,
        "not a shortest path from S to G, which has 8 steps",
    )
    walled = cells(TEXT.replace("#   G", "#  #G").replace("# ## ", "# ###"))
    assert verdict(walled, walled) == (False, "there is no way from S to G")
    assert maze_rows(np.zeros(25, np.uint8)) == "\n".join(["?????"] * 5)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return str(save_run(tmp_path_factory.mktemp("runs") / "m", changes={"seq_len": 25}))


def test_solve_answers_mazes_of_a_file(run, tmp_path, capsys, monkeypatch):
    path = tmp_path / "mazes.txt"
    path.write_text(TEXT + "\n\n" + TEXT)
    assert solve.main(["-i", str(path), "-m", run]) == solve.BROKEN
    first = capsys.readouterr().out.split("\n\n")
    assert first[1].startswith("not a shortest path from S to G, which has 8 steps; halting")
    assert first[0].replace("o", " ") == TEXT

    def right(model, tokens, **options):
        assert tokens.tolist() == [cells(TEXT).tolist()] * len(tokens)
        n = len(tokens)
        answer = torch.from_numpy(cells(ANSWER)).long().repeat(n, 1)
        first = torch.zeros(n, dtype=torch.int64)
        sure = torch.full((n,), 0.5)
        return Answers(answer, torch.zeros(n), first + 2, first, first + 3, sure, first > 0)

    monkeypatch.setattr(solve, "predict", right)
    assert solve.main(["-i", str(path), "-m", run]) == 0
    shown = f"{ANSWER}\n\na shortest path of 8 steps; halting confidence 0.500 at step 2"
    assert capsys.readouterr().out == f"{shown}\n\n{shown}\n"
    assert solve.main(["--json", "-m", run, "".join(ROWS)]) == 0
    (told,) = json.loads(capsys.readouterr().out)["answers"]
    assert told == {
        "place": "argument 1",
        "puzzle": ROWS,
        "answer": ANSWER.split("\n"),
        "valid": True,
        "broken": None,
        "confidence": 0.5,
        "step": 2,
        "rollout": 1,
        "cut": False,
        "passes": 3,
        "abstained": False,
    }


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["." * 16], 5, "not a Sudoku model, it answers mazes (25 tokens of 6 values)"),
        (["S" + " " * 34 + "G"], 5, "argument 1: 36 characters, the model"),
        (["S G"], 5, "argument 1: 1 lines, but the longest line has 3"),
        (["S" + "x" * 23 + "G"], 2, "argument 1: 'x' is none of the characters"),
        ([TEXT, "1" * 16], 5, "argument 2: 1 lines, but the longest line has 16"),
    ],
)
def test_solve_refuses_in_one_line(run, capsys, arguments, status, message):
    assert solve.main([*arguments, "-m", run]) == status
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
