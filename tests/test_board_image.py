"""Pictures of thinking: which steps are drawn, the colours of cells, the curve."""

import io
from dataclasses import replace

import numpy as np
import pytest
from answering import tiny_config

from trm_fast import board_image
from trm_fast.board_image import curves_of, moving_picture, sheet
from trm_fast.board_view import Glance, view_of

image = pytest.importorskip("PIL.Image")

VIEW = view_of(tiny_config(), np.array([2, *[1] * 15]))
MAZE = view_of(
    tiny_config(seq_len=25, vocab_size=6),
    np.array(["# SGo".index(c) + 1 for c in "S    #### G    ##########"]),
)


def glance(view, cells, rollout=1, q=0.0, step=1, certainty=1.0) -> Glance:
    cells = np.asarray(cells)
    broken = view.broken(cells)
    valid, words = view.judge(cells)
    sure = np.full(len(cells), certainty)
    return Glance(rollout, cells, sure, broken, q, step, True, valid, words)


def run(view, cells, steps, rollouts=1):
    """Frames in which q rises by one a step, from -2."""
    return [
        [glance(view, cells, k + 1, float(step - 3 + k), step) for k in range(rollouts)]
        for step in range(1, steps + 1)
    ]


GRID = [int(c) + 1 for c in "1234341221434321"]


def pixels(data: bytes, frame: int = 0) -> set[tuple[int, ...]]:
    picture = image.open(io.BytesIO(data))
    picture.seek(frame)
    return {colour for _, colour in picture.convert("RGB").getcolors(1 << 22)}


def test_the_shade_is_the_certainty():
    assert board_image._shade(0.0) == board_image.UNSURE
    assert board_image._shade(1.0) == board_image.SURE == board_image._shade(7.0)
    assert board_image._shade(float("nan")) == board_image.UNSURE
    assert board_image._shade(0.5) == (194, 227, 197)


def test_sure_unsure_and_broken_cells_differ():
    drawn = [
        pixels(sheet(VIEW, [[one]], one, 1))
        for one in (glance(VIEW, GRID), glance(VIEW, GRID, certainty=0.0), glance(VIEW, [2] * 16))
    ]
    sure, unsure, broken = (147, 214, 160), (242, 240, 234), (0xF6, 0xC1, 0xBA)
    assert [[c in d for c in (sure, unsure, broken)] for d in drawn] == [
        [True, False, False],
        [False, True, False],
        [False, False, True],
    ]


def test_a_maze_shows_its_path():
    path = np.array(["# SGo".index(c) + 1 for c in "Soooo####oGoooo##########"])
    with_path = pixels(sheet(MAZE, [[glance(MAZE, path)]], glance(MAZE, path), 1))
    without = pixels(sheet(MAZE, [[glance(MAZE, MAZE.given)]], glance(MAZE, MAZE.given), 1))
    green = (0x1A, 0x7F, 0x37)
    assert green in with_path and (0x3D, 0x44, 0x4D) in with_path and (0x3D, 0x44, 0x4D) in without


def test_the_strip_has_the_first_the_last_and_the_answer():
    frames = run(VIEW, GRID, 40)
    answer = replace(frames[16][0], running=False)  # step 17, which an even choice leaves out
    steps = [g.step for g in board_image._strip(frames, answer)]
    assert len(steps) == 8 and steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (1, 40) and 17 in steps
    few = [g.step for g in board_image._strip(frames[:5], frames[0][0])]
    assert few == [1, 2, 3, 4, 5]


def test_the_strip_is_of_the_answers_rollout():
    frames = run(VIEW, GRID, 3, rollouts=2)
    assert {g.rollout for g in board_image._strip(frames, frames[1][1])} == {2}


def test_curves_leave_out_what_is_no_number_or_not_begun():
    frames = run(VIEW, GRID, 3, rollouts=2)
    frames[1][0] = replace(frames[1][0], q=float("nan"))
    frames[0][1] = replace(frames[0][1], q=-np.inf, step=0)
    assert curves_of(frames) == [[(1, -2.0), (3, 0.0)], [(2, 0.0), (3, 1.0)]]
    assert curves_of([]) == []
    assert board_image._limits(frames) == (-2.0, 1.0)
    assert board_image._limits([[glance(VIEW, GRID)]]) == (0.0, 1.0)


@pytest.mark.parametrize("rollouts", [1, 2, 5, 16])
def test_a_gif_has_a_frame_per_step_and_frames_the_answer(rollouts):
    frames = run(VIEW, GRID, 3, rollouts)
    data = moving_picture(VIEW, frames, frames[2][-1], 3)
    picture = image.open(io.BytesIO(data))
    assert (picture.format, picture.n_frames, picture.info["loop"]) == ("GIF", 4, 0)
    size = picture.size
    picture.seek(3)
    assert picture.size == size and picture.info["duration"] == 3000
    framed = picture.convert("RGB").tobytes()
    picture.seek(2)
    assert picture.convert("RGB").tobytes() != framed


def test_a_gif_of_many_rollouts_shows_the_answer_and_those_of_highest_q():
    frames = run(VIEW, GRID, 2, rollouts=60)
    chosen = board_image._chosen(frames, frames[1][2])
    assert chosen == {3, *range(37, 61)}
    picture = image.open(io.BytesIO(moving_picture(VIEW, frames, frames[1][2], 2)))
    assert picture.size[0] < 1000 and picture.n_frames == 3


def test_steps_that_were_not_run_are_drawn_too():
    frames = [[glance(VIEW, GRID), glance(VIEW, VIEW.given, 2, -np.inf, 0)]]
    moving_picture(VIEW, frames, frames[0][0], 1)
    nothing = glance(VIEW, VIEW.given, 1, -np.inf, 0)
    assert image.open(io.BytesIO(sheet(VIEW, [[nothing]], nothing, 4))).width >= 480
