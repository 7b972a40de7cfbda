"""solve --watch, --gif and --png: frames as text, the terminal they are drawn on, pictures."""

import argparse
import errno
import io
import os
import select
import signal
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from answering import SOLVED, save_run, tiny_config, tiny_model

from trm_fast import rollouts, solve, watching
from trm_fast.board_view import Glance, glances, view_of
from trm_fast.inference import predict, watch
from trm_fast.loading import CommandError
from trm_fast.viz import side_by_side
from trm_fast.watching import Screen, Watching, board_text, frame_text, head_text

CLUES = "12..34..21..43.."
MAZE = tiny_config(seq_len=25, vocab_size=6)


def sudoku(text):
    return np.array([1 if c == "." else int(c) + 1 for c in text])


def glance(view, cells, rollout=1, q=0.0, step=1, certainty=0.9, **more):
    valid, words = view.judge(cells)
    return Glance(
        rollout,
        cells,
        np.full(len(cells), certainty),
        view.broken(cells),
        q,
        step,
        True,
        valid,
        words,
        **more,
    )


VIEW = view_of(tiny_config(), sudoku(CLUES))
PLAIN = argparse.Namespace(watch=False, gif=None, png=None, fps=None, json=False)


def test_plain_text_marks_given_unsure_and_broken():
    one = glance(VIEW, sudoku("1234341221434322"))
    one.certainty[2] = 0.4
    want = "[1][2]| 3? 4 \n[3][4]| 1  2!\n------+------\n[2][1]| 4  3 \n[4][3]| 2! 2!"
    assert board_text(VIEW, one, colour=False) == want


def test_colours_are_the_ramp_by_certainty():
    one = glance(VIEW, sudoku("1234341221434322"))
    one.certainty[2:4] = 0.0, 0.999
    first = board_text(VIEW, one, colour=True).split("\n")[0]
    assert first == (
        "\033[1m 1 \033[0m\033[1m 2 \033[0m|"
        "\033[48;5;237;38;5;250m 3 \033[0m\033[48;5;40;38;5;16m 4 \033[0m"
    )
    assert "\033[48;5;160;38;5;231m 2 \033[0m" in board_text(VIEW, one, colour=True)
    assert watching._shade(float("nan")) == watching.RAMP[0]


def test_a_maze_is_two_characters_a_cell():
    maze = "S    #### G    ##########"
    view = view_of(MAZE, np.array(["# SGo".index(c) + 1 for c in maze]))
    cells = view.given.copy()
    cells[[1, 3]] = 5
    text = board_text(view, glance(view, cells), colour=False).split("\n")
    assert text[:3] == ["S o!  o!  ", "########  ", "G!        "]
    assert board_text(view, glance(view, cells), colour=True).count("\033[48;5;244") == 14


@pytest.mark.parametrize(
    ("q", "step", "want"),
    [
        (0.0, 2, ["rollout 1 of 3, step 2 of 4", "q +0.00, confidence 0.500", "valid"]),
        (-800.0, 4, ["rollout 1 of 3, step 4 of 4", "q -800.00, confidence 0.000", "valid"]),
        (-np.inf, 0, ["rollout 1 of 3, not begun", "", ""]),
    ],
)
def test_the_head(q, step, want):
    assert head_text(glance(VIEW, sudoku(SOLVED), q=q, step=step), 4, 3, 34) == want


def test_a_rollout_that_halted_says_so_and_long_words_are_counted():
    stopped = Glance(**{**vars(glance(VIEW, sudoku("1111111111111111"))), "running": False})
    assert head_text(stopped, 4, 1, 34) == [
        "step 1 of 4, halted",
        "q +0.00, confidence 0.500",
        "breaks the rules, 16 cells marked",
    ]


def test_rollouts_stand_side_by_side_and_those_that_do_not_fit_are_left_out():
    seen = [glance(VIEW, sudoku(SOLVED), rollout=k + 1, q=float(-k)) for k in range(5)]
    text = frame_text(VIEW, seen, 4, colour=False, size=(80, 30))
    lines = text.split("\n")
    assert lines[0].split("   ")[0] == "rollout 1 of 5, step 1 of 4"
    assert "rollout 2 of 5" in lines[0] and "rollout 3 of 5" not in lines[0]
    assert max(map(len, lines)) <= 80 and len(lines) <= 30
    assert lines[-1] == "4 of 5 rollouts shown, those with the highest q"
    assert "rollout 5" not in text
    whole = frame_text(VIEW, seen, 4, colour=False)
    assert [f"rollout {k} of 5" in whole for k in range(1, 6)] == [True] * 5


def test_side_by_side_does_not_count_colours():
    assert side_by_side(["\033[48;5;22;38;5;1mab\033[0m\nabc", "x\ny"], gap=1) == (
        "\033[48;5;22;38;5;1mab\033[0m  x\nabc y"
    )


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_frames_are_drawn_in_place_on_a_terminal(monkeypatch):
    terminal, slept = Terminal(), []
    monkeypatch.setattr(sys, "stdout", terminal)
    times = iter([0.0, 0.0, 0.1, 0.5, 9.0, 9.0])
    screen = Screen(
        2.0, environment={"TERM": "xterm"}, clock=lambda: next(times), sleep=slept.append
    )
    with screen:
        assert screen.live and screen.size is not None
        screen.draw("a\nb")
        screen.draw("c\nd")
        screen.keep()
        screen.draw("e")
    hide, show = watching.HIDE, watching.SHOW
    want = f"{hide}\033[Ja\nb\n\033[2F\033[Jc\nd\n\n\033[Je\n{show}"
    assert terminal.getvalue() == want
    assert slept == [0.0, 0.4, 0.0]


@pytest.fixture
def terminal():
    """A real one of 40 columns and 6 lines: the stream to draw on, and what reads it."""
    termios = pytest.importorskip("termios")
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (6, 40))

    def read():
        """All that was written: the kernel hands it on a little later, and in pieces."""
        parts = []
        while select.select([ours], [], [], 0.2)[0]:
            parts.append(os.read(ours, 1 << 16))
        return b"".join(parts).decode()

    with os.fdopen(theirs, "w") as stream:
        yield stream, read
    os.close(ours)


def test_a_frame_that_does_not_fit_keeps_its_head_and_scrolls_nothing(terminal, monkeypatch):
    stream, read = terminal
    monkeypatch.setattr(sys, "stdout", stream)
    with Screen(environment={"TERM": "xterm"}, sleep=lambda s: None) as screen:
        assert screen.size == (40, 6), "measured on another stream"
        screen.draw("head\n" + "row\n" * 8 + "row")
        screen.draw("a\nb\nc\nd\ne")
    drawn = read().replace("\r\n", "\n")
    first = "head\nrow\nrow\nrow\n6 more lines: the terminal is too small\n"
    want = f"{watching.HIDE}\033[J{first}\033[5F\033[Ja\nb\nc\nd\ne\n{watching.SHOW}"
    assert drawn == want


def test_a_process_that_is_ended_leaves_the_terminal_as_it_was(terminal, monkeypatch):
    stream, read = terminal
    monkeypatch.setattr(sys, "stdout", stream)
    ended = []
    before = signal.signal(signal.SIGTERM, lambda *args: ended.append(read()))
    try:
        with Screen(environment={"TERM": "xterm"}):
            signal.raise_signal(signal.SIGTERM)
            assert [text.endswith(watching.SHOW) for text in ended] == [True]
        with Screen(environment={"TERM": "xterm"}):
            pass
        signal.raise_signal(signal.SIGTERM)
        assert len(ended) == 2, "the handler that was there is not put back"
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("environment", [{"TERM": "xterm", "NO_COLOR": "1"}, {"TERM": "dumb"}, {}])
def test_without_colours_frames_follow_each_other(monkeypatch, environment):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with Screen(environment=environment, sleep=lambda s: pytest.fail("waits")) as screen:
        assert not screen.live and screen.size is None
        screen.draw("a")
        screen.draw("b")
        screen.keep()
    assert terminal.getvalue() == "a\n\nb\n\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "tiny")


def ask(run, capsys, *arguments):
    status = solve.main([*map(str, arguments), "-m", str(run)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_watching_shows_every_step_and_answers_the_same(run, capsys):
    _, plain, _ = ask(run, capsys, CLUES, SOLVED)
    status, out, _ = ask(run, capsys, CLUES, SOLVED, "--watch")
    assert status == 1
    frames, answers = out[: -len(plain)], out[-len(plain) :]
    assert answers == plain
    heads = [line for line in frames.split("\n") if line.startswith("step ")]
    assert heads == [f"step {step} of 3" for step in (1, 2, 3)] * 2
    named = [line for line in frames.split("\n") if line.startswith("puzzle ")]
    assert named == ["puzzle 1 of 2"] * 3 + ["puzzle 2 of 2"] * 3
    assert "puzzle 1" not in ask(run, capsys, CLUES, "--watch")[1]
    assert "[1][2]|" in frames and "\033" not in out


def test_json_stays_one_document(run, capsys):
    plain = ask(run, capsys, CLUES, "--json")[1]
    status, out, err = ask(run, capsys, CLUES, "--json", "--watch")
    assert (status, out) == (1, plain)
    assert "step 3 of 3" in err


def test_watched_is_predict_for_every_puzzle():
    model = tiny_model(3)
    inputs = torch.from_numpy(np.stack([sudoku(CLUES), sudoku("." * 16), sudoku(SOLVED)]))
    settings = {"rollouts": 3, "depth": 4, "noise": 0.2, "by": "symmetry", "seed": 5}
    want = predict(model, inputs, **settings)
    got = Watching(PLAIN)(model, inputs, **settings)
    assert (got.tokens == want.tokens).all() and (got.rollout == want.rollout).all()
    assert got.q.tolist() == pytest.approx(want.q.tolist(), rel=1e-5)
    assert (got.passes == want.passes).all() and (got.step == want.step).all()


def test_a_budget_is_for_all_puzzles_together_and_watching_is_not_charged(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(rollouts, "time", SimpleNamespace(monotonic=lambda: now[0]))
    step, shown = rollouts.Lanes.step, watching.frame_text

    def stepped(self):
        now[0] += 1.0
        return step(self)

    def looked_at(*args, **how):
        now[0] += 50.0
        return shown(*args, **how)

    monkeypatch.setattr(rollouts.Lanes, "step", stepped)
    monkeypatch.setattr(watching, "frame_text", looked_at)
    inputs = torch.from_numpy(np.stack([sudoku(CLUES)] * 3))
    options = argparse.Namespace(**{**vars(PLAIN), "watch": True})
    found = Watching(options)(tiny_model(), inputs, depth=4, budget=5.5)
    assert found.passes.tolist() == [4, 2, 0], "6 steps begin within 5.5 seconds"
    assert found.step.tolist()[2] == 0


def test_rollouts_that_stand_still_are_looked_at_once():
    puzzle = torch.from_numpy(sudoku(CLUES))[None]
    asked = {"reasoning": "restarts", "rollouts": 3, "depth": 2, "threshold": 99.0}
    before = []
    for frame in watch(tiny_model(3), puzzle, **asked):
        seen = watching._glances(VIEW, frame, before)
        for now, want in zip(seen, glances(VIEW, frame), strict=True):
            same = [replace(g, cells=0, certainty=0, broken=0) for g in (now, want)]
            assert vars(same[0]) == vars(same[1])
            assert (now.cells == want.cells).all() and (now.certainty == want.certainty).all()
        kept = [a is b for a, b in zip(before, seen, strict=False)]
        assert kept.count(False) <= 2
        before = seen
    assert [g.step for g in before] == [2, 2, 2]


def test_the_answer_comes_first_and_a_long_gif_says_what_it_leaves_out(
    run, capsys, monkeypatch, tmp_path
):
    image = pytest.importorskip("PIL.Image")
    monkeypatch.setattr("trm_fast.board_image.FRAMES", 10)
    drawn, said = watching.moving_picture, []

    def noted(*args):
        said.append(capsys.readouterr())
        return drawn(*args)

    monkeypatch.setattr(watching, "moving_picture", noted)
    gif = tmp_path / "a.GIF"
    _, out, err = ask(run, capsys, CLUES, "--depth", "25", "--gif", gif)
    assert "halting confidence" in said[0].out and out == ""
    assert said[0].err == f"{gif} shows 10 of 25 steps\n" and err == f"{gif} written\n"
    assert image.open(gif).n_frames == 10


def test_pictures_of_an_answer(run, capsys, tmp_path):
    image = pytest.importorskip("PIL.Image")
    gif, png = tmp_path / "a.gif", tmp_path / "a.png"
    gif.write_text("old")
    ask(run, capsys, CLUES, "--gif", gif, "--png", png, "--fps", "10")
    moving = image.open(gif)
    assert (moving.format, moving.n_frames) == ("GIF", 4)
    durations = []
    for number in range(4):
        moving.seek(number)
        durations.append(moving.info["duration"])
    assert durations == [100, 100, 100, 3000]
    still = image.open(png)
    assert still.format == "PNG" and still.width > 480
    shades = {colour for _, colour in still.convert("RGB").getcolors(1 << 20)}
    assert (0xE4, 0xE7, 0xEB) in shades, "no given cell"
    assert (0xF6, 0xC1, 0xBA) in shades, "no cell that breaks a rule"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gif", "a.png"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((CLUES, SOLVED, "--gif", "x.gif"), "--gif and --png are for one puzzle, 2 are given"),
        ((CLUES, "--fps", "0"), "argument --fps: '0' is not a number from 0.1 to 50; see --help"),
        ((CLUES, "--fps", "nan"), "argument --fps: 'nan' is not a number from 0.1 to 50; see"),
        ((CLUES, "--gif", "."), ".: is to be a GIF, its name must end in .gif"),
        ((CLUES, "--png", "x.gif"), "x.gif: is to be a PNG, its name must end in .png"),
        ((CLUES, "--gif", "../d.gif"), "../d.gif: cannot be written: it is a folder"),
        ((CLUES, "--png", "a/x.png"), "a/x.png: cannot be written: there is no folder a"),
        ((CLUES, "--png", "/dev/null/x.png"), "/dev/null/x.png: cannot be written: there is no f"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(run, capsys, monkeypatch, tmp_path, arguments, said):
    (tmp_path / "d.gif").mkdir()
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    status, out, err = ask(run, capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"trm-fast solve: {said}")
    assert err.count("\n") == 1 and list(here.iterdir()) == []


def test_a_disk_that_is_full_takes_neither_the_answer_nor_the_old_picture(
    run, capsys, monkeypatch, tmp_path
):
    def full(*places):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "x.png").write_text("old")
    monkeypatch.setattr("trm_fast.durable.os.replace", full)
    status, out, err = ask(run, capsys, CLUES, "--png", tmp_path / "x.png")
    assert status == 2 and "halting confidence" in out
    assert err.startswith(f"trm-fast solve: {tmp_path / 'x.png'}: cannot be written: ")
    assert err.count("\n") == 1 and "No space left on device" in err
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
    assert (tmp_path / "x.png").read_text() == "old"


def test_a_name_of_another_ending_is_refused_before_a_model_is_read(capsys):
    assert solve.main([CLUES, "--gif", "x.png", "-m", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("trm-fast solve: x.png: is to be a GIF")


def test_without_pillow_there_is_one_line(run, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "PIL.ImageDraw", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    status, out, err = ask(run, capsys, CLUES, "--gif", tmp_path / "x.gif")
    assert (status, out) == (2, "")
    assert err == 'trm-fast solve: pictures need Pillow: pip install "trm-fast[viz]"\n'


def test_two_pictures_are_refused_before_any_work(monkeypatch):
    options = argparse.Namespace(**{**vars(PLAIN), "gif": "x.gif"})
    monkeypatch.setattr(watching, "watch", lambda *a, **k: pytest.fail("worked"))
    with pytest.raises(CommandError, match="for one puzzle, 2 are given"):
        Watching(options)(tiny_model(), torch.ones(2, 16, dtype=torch.int64))
