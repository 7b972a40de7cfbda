"""`trm-fast solve --watch`: the board filling in the terminal, a frame per supervision step.

Owns what a frame looks like as text, the terminal it is drawn on again and again, and the options
of watching. Imported by solve. On a terminal with colours the ground of a cell tells how sure the
model is of it, from grey to green; a cell that breaks a rule is red. Elsewhere a frame is plain
text: `[5]` given, ` 5?` less sure than even, ` 5!` breaks a rule.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from trm_fast.answers import Answers, Frame
from trm_fast.board_image import (
    PictureError,
    highest,
    moving_picture,
    need_pillow,
    sheet,
    steps_shown,
)
from trm_fast.board_view import (
    MAZE,
    SUDOKU,
    BoardView,
    Glance,
    answer_glance,
    glances,
    view_of,
)
from trm_fast.console import number_in, say
from trm_fast.durable import CheckpointError, write_bytes
from trm_fast.inference import plan_for, watch
from trm_fast.loading import USAGE, CommandError, check_picture
from trm_fast.model import Model
from trm_fast.reasoning import Reasoning
from trm_fast.rollouts import Budget
from trm_fast.viz import BOLD, PLAIN, side_by_side

__all__ = [
    "Screen",
    "Watching",
    "add_options",
    "board_text",
    "frame_text",
    "is_watched",
]

UNSURE = 0.5
"""Below this probability a cell is marked in plain text."""

# Grounds of the 256-colour palette from unsure to sure, each with a colour that is read on it.
RAMP = ((237, 250), (239, 252), (22, 254), (28, 231), (34, 16), (40, 16))
RAMP_FROM = (0.0, 0.4, 0.6, 0.8, 0.95, 0.99)
BROKEN = (160, 231)
WALL = (244, 244)
GAP = 4  # between boards
WIDTH = 34  # of what stands above a board
FPS = 4.0
HIDE, SHOW = "\033[?25l\033[?7l", "\033[?25h\033[?7h"  # the cursor; and no line is wrapped


def board_text(view: BoardView, glance: Glance, colour: bool) -> str:
    """One rollout's board as lines of equal visible width."""
    line, fixed = view.line(glance.cells), view.fixed
    draw = _coloured if colour else _plain
    parts = [
        draw(view, line[cell], bool(fixed[cell]), float(certainty), bool(broken))
        for cell, (certainty, broken) in enumerate(
            zip(glance.certainty, glance.broken, strict=True)
        )
    ]
    side, (box_rows, box_columns) = view.side, view.box
    rows = [parts[start : start + side] for start in range(0, len(parts), side)]
    if view.kind != SUDOKU:
        return "\n".join("".join(row) for row in rows)
    bar = "+".join("-" * (3 * box_columns) for _ in range(side // box_columns))
    lines = []
    for number, row in enumerate(rows):
        if number and number % box_rows == 0:
            lines.append(bar)
        boxes = ["".join(row[c : c + box_columns]) for c in range(0, side, box_columns)]
        lines.append("|".join(boxes))
    return "\n".join(lines)


def _plain(view: BoardView, shown: str, fixed: bool, certainty: float, broken: bool) -> str:
    if view.kind == MAZE:
        return shown + ("!" if broken else " ") if not (fixed and shown == "#") else "##"
    if fixed:
        return f"[{shown}{'!' if broken else ']'}"
    return f" {shown}{'!' if broken else '?' if certainty < UNSURE else ' '}"


def _coloured(view: BoardView, shown: str, fixed: bool, certainty: float, broken: bool) -> str:
    width = 2 if view.kind == MAZE else 3
    if view.kind == MAZE and fixed and shown == "#":
        return _paint(" " * width, WALL)
    text = shown.center(width)
    if broken:
        return _paint(text, BROKEN, bold=fixed)
    if fixed:
        return f"{BOLD}{text}{PLAIN}"
    return _paint(text, _shade(certainty))


def _shade(certainty: float) -> tuple[int, int]:
    reached = [pair for pair, low in zip(RAMP, RAMP_FROM, strict=True) if certainty >= low]
    return reached[-1] if reached else RAMP[0]  # NaN reaches none


def _paint(text: str, pair: tuple[int, int], bold: bool = False) -> str:
    ground, ink = pair
    return f"\033[{'1;' if bold else ''}48;5;{ground};38;5;{ink}m{text}{PLAIN}"


def head_text(glance: Glance, depth: int, rollouts: int, width: int) -> list[str]:
    """What stands above a board, three lines of at most `width` characters: which rollout and
    step, q and confidence, the rule check."""
    name = f"rollout {glance.rollout} of {rollouts}, " if rollouts > 1 else ""
    if glance.step == 0:
        return [f"{name}not begun", "", ""]
    sure = 1 / (1 + math.exp(-max(-700.0, min(700.0, glance.q))))
    halted = "" if glance.running or glance.step >= depth else ", halted"
    words = glance.words
    if len(words) > width:
        words = f"breaks the rules, {int(glance.broken.sum())} cells marked"
    judged = f"q {glance.q:+.2f}, confidence {sure:.3f}"
    return [f"{name}step {glance.step} of {depth}{halted}"[:width], judged, words[:width]]


def frame_text(
    view: BoardView,
    seen: Sequence[Glance],
    depth: int,
    *,
    colour: bool,
    size: tuple[int, int] | None = None,
) -> str:
    """A frame: the boards of all rollouts beside and below each other.

    Args:
        depth: supervision steps of a rollout.
        colour: for a terminal that knows 256 colours.
        size: columns and lines there are; rollouts that do not fit are left out, those with the
            lowest q first. None shows all, one below the other.
    """
    width = view.side * (2 if view.kind == MAZE else 3) + (
        view.side // view.box[1] - 1 if view.kind == SUDOKU else 0
    )
    width = max(width, WIDTH)
    boards = view.side + 4 + (view.side // view.box[0] - 1 if view.kind == SUDOKU else 0)
    across, down = 1, len(seen)
    if size is not None:
        across = max(1, (size[0] + GAP) // (width + GAP))
        down = max(1, (size[1] - 2) // (boards + 1))
    shown = sorted(highest(seen, across * down), key=lambda glance: glance.rollout)
    blocks = []
    for glance in shown:
        heads = [text.ljust(width) for text in head_text(glance, depth, len(seen), width)]
        blocks.append("\n".join([*heads, "", board_text(view, glance, colour)]))
    rows = [
        side_by_side(blocks[start : start + across], gap=GAP)
        for start in range(0, len(blocks), across)
    ]
    if len(shown) < len(seen):
        rows.append(f"{len(shown)} of {len(seen)} rollouts shown, those with the highest q")
    return "\n\n".join(rows)


class Screen:
    """Where frames are drawn: in place on a terminal with colours, else one after another.

    Args:
        fps: frames per second at most, where they are drawn in place.
        err: standard error in place of standard output.
        environment: the process's own; NO_COLOR and TERM are looked at.
    """

    def __init__(
        self,
        fps: float | None = None,
        *,
        err: bool = False,
        environment: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        stream = sys.stderr if err else sys.stdout
        plain = bool(environment.get("NO_COLOR")) or environment.get("TERM", "dumb") == "dumb"
        self.live = stream is not None and stream.isatty() and not plain
        self._stream, self._before = stream, None  # type: Any, Any
        self._err, self._pause = err, 1 / (fps or FPS)
        self._clock, self._sleep = clock, sleep
        self._height, self._due = 0, -math.inf

    def __enter__(self) -> Screen:
        if self.live:
            with suppress(ValueError):  # not in the main thread
                self._before = signal.signal(signal.SIGTERM, self._ended)
            say(HIDE, err=self._err, end="")
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            say(SHOW, err=self._err, end="")
            if self._before is not None:
                signal.signal(signal.SIGTERM, self._before)

    def _ended(self, number: int, frame: FrameType | None) -> None:
        """The terminal is left as it was found; what the signal does without us follows."""
        with suppress(OSError, ValueError):
            # Not through the stream, in the midst of whose work this may be.
            os.write(self._stream.fileno(), SHOW.encode())
        signal.signal(number, self._before)
        signal.raise_signal(number)

    @property
    def size(self) -> tuple[int, int] | None:
        """Columns and lines of the terminal; None where frames follow each other."""
        if not self.live:
            return None
        try:
            columns, lines = os.get_terminal_size(self._stream.fileno())
        except (OSError, ValueError):
            columns = lines = 0
        return columns or 80, lines or 24

    def draw(self, text: str) -> None:
        """Show a frame in place of the one before, no sooner than it is due. Lines that the
        terminal has no room for are left out at the end: nothing may scroll."""
        if not self.live:
            say(text + "\n", err=self._err)
            return
        self._sleep(max(0.0, self._due - self._clock()))
        self._due = self._clock() + self._pause
        assert self.size is not None
        lines, room = text.split("\n"), max(self.size[1] - 1, 2)
        if len(lines) > room:
            left = len(lines) - room + 1
            text = "\n".join([*lines[: room - 1], f"{left} more lines: the terminal is too small"])
        up = f"\033[{self._height}F" if self._height else ""
        say(f"{up}\033[J{text}", err=self._err)
        self._height = text.count("\n") + 1

    def keep(self) -> None:
        """Leave the frame where it stands: the next one is drawn below."""
        if self.live and self._height:
            say(err=self._err)
        self._height = 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of watching."""
    parser.add_argument(
        "--watch",
        action="store_true",
        help="show the board after every step, and every rollout's, before the answer",
    )
    parser.add_argument(
        "--fps",
        type=number_in(0.1, 50),
        metavar="F",
        help=f"frames a second of --watch and --gif ({FPS:g})",
    )
    parser.add_argument(
        "--gif", metavar="FILE", help="one puzzle's steps as a moving picture (needs trm-fast[viz])"
    )
    parser.add_argument(
        "--png", metavar="FILE", help="the puzzle, its answer and the steps as a picture (the same)"
    )


def is_watched(options: argparse.Namespace) -> bool:
    """Whether any of the options of `add_options` asks for the steps."""
    return bool(options.watch or options.gif or options.png)


class Watching:
    """Answers as `predict` gives them, with every step shown or kept as the options say: call it,
    then have it `draw` the pictures.

    Raises:
        CommandError: pictures without Pillow, of another ending, or in a folder that is not there.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._pictures: Callable[[], None] | None = None
        named = {"gif": options.gif, "png": options.png}
        for kind, name in named.items():
            if name:
                check_picture(name, kind)
        try:
            if any(named.values()):
                need_pillow()
        except PictureError as error:
            raise CommandError(USAGE, error) from None

    def __call__(
        self,
        model: Model,
        inputs: Tensor,
        *,
        reasoning: Reasoning | str | None = None,
        batch_size: int = 256,
        **settings: Any,
    ) -> Answers:
        """What `predict` answers to puzzles [N, L].

        Raises:
            CommandError: pictures of more than one puzzle.
            ValueError: as `predict`.
        """
        options = self._options
        pictures = bool(options.gif or options.png)
        if pictures and len(inputs) != 1:
            raise CommandError(
                USAGE, f"--gif and --png are for one puzzle, {len(inputs)} are given"
            )
        plan = plan_for(model, reasoning, **settings)
        assert plan.depth is not None
        budget, several = Budget(plan.budget), len(inputs) > 1
        parts = []
        with Screen(options.fps, err=options.json) as screen:
            for number, puzzle in enumerate(inputs):
                view = view_of(model.config, puzzle.numpy())
                seen = watch(
                    model,
                    puzzle[None],
                    reasoning=plan,
                    batch_size=batch_size,
                    numbers=torch.tensor([number]),
                    shared=budget,
                )
                frames: list[list[Glance]] = []
                shown: list[Glance] = []
                for frame in seen:
                    shown = _glances(view, frame, shown)
                    if options.watch:
                        text = frame_text(
                            view, shown, plan.depth, colour=screen.live, size=screen.size
                        )
                        head = f"puzzle {number + 1} of {len(inputs)}\n" if several else ""
                        screen.draw(head + text)
                    if pictures:
                        frames.append(shown)
                    if frame.answer is not None:
                        parts.append(frame.answer)
                screen.keep()
        if pictures:
            self._pictures = partial(_draw, view, frames, parts[0], plan.depth, options)
        return Answers(*(torch.cat(t) for t in zip(*map(_columns, parts), strict=True)))

    def draw(self) -> None:
        """Write the pictures of the answer, and say so on standard error.

        Raises:
            CommandError: one cannot be written.
        """
        if self._pictures is not None:
            self._pictures()


def _glances(view: BoardView, frame: Frame, before: Sequence[Glance]) -> list[Glance]:
    """As `glances`; of rollouts that stand where they stood, what was seen of them `before`."""
    now = list(zip(frame.steps.tolist(), frame.running.tolist(), strict=True))
    known = dict(enumerate(before))
    rows = [k for k, at in enumerate(now) if k not in known or _place(known[k]) != at]
    columns = ("tokens", "certainty", "q", "steps", "running")
    moved = replace(frame, **{name: getattr(frame, name)[rows] for name in columns})
    for row, glance in zip(rows, glances(view, moved), strict=True):
        known[row] = replace(glance, rollout=row + 1)
    return [known[k] for k in range(len(now))]


def _place(glance: Glance) -> tuple[int, bool]:
    return glance.step, glance.running


def _columns(part: Answers) -> tuple[Tensor, ...]:
    return tuple(vars(part).values())


def _draw(
    view: BoardView,
    frames: Sequence[Sequence[Glance]],
    answers: Answers,
    depth: int,
    options: argparse.Namespace,
) -> None:
    answer = answer_glance(view, frames, answers)
    try:
        if options.gif:
            shown = len(steps_shown(len(frames)))
            if shown < len(frames):
                say(f"{options.gif} shows {shown} of {len(frames)} steps", err=True)
            content = moving_picture(view, frames, answer, depth, options.fps or FPS)
            write_bytes(Path(options.gif), content)
            say(f"{options.gif} written", err=True)
        if options.png:
            write_bytes(Path(options.png), sheet(view, frames, answer, depth))
            say(f"{options.png} written", err=True)
    except CheckpointError as error:
        raise CommandError(USAGE, error) from None
