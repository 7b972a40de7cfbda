"""Pictures of a model thinking: `solve --gif` and `solve --png`.

Owns how boards are drawn, the moving picture of all steps and the sheet of puzzle, answer and
steps. Imported by solve. Pillow, from the `viz` extra, is imported only when drawing; its built-in
font is used, so that a picture looks the same everywhere.

The ground of a cell tells how sure the model is of it, from grey to green; a cell that breaks a
rule is red and has a mark in its corner, so that nothing is told by colour alone.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from trm_fast.board_view import ARC, MAZE, SUDOKU, BoardView, Glance, best_of
from trm_fast.data.maze_solver import GOAL, PATH, START, WALL

__all__ = ["PictureError", "moving_picture", "need_pillow", "sheet"]

PAPER, INK, FAINT, RULE = "#ffffff", "#1b1f24", "#5b6570", "#c4cad1"
GIVEN, UNSURE, SURE, BROKEN = "#e4e7eb", (242, 240, 234), (147, 214, 160), "#f6c1ba"
BROKEN_INK, MARK, CHOSEN = "#8f1409", "#c0261a", "#1a7f37"
LINES = ("#1a7f37", "#0b63ce", "#b54708", "#8a3ffc", "#b0246d", "#0f766e", "#6b5900", "#57606a")
# Colours 0..9 of ARC as its own editor shows them.
ARC_COLOURS = "#000000 #1e93ff #f93c31 #4fcc30 #ffdc00 #999999 #e53aa3 #ff851b #87d8f1 #921231"
MARGIN, GAP, LINE = 16, 14, 18
HOLD_MS = 3000
"""How long the last frame of a GIF stands."""
BOARDS = 25
"""Rollouts whose boards a GIF shows, at most."""
STRIP = 8
"""Steps of the answer's rollout on a sheet, at most."""


class PictureError(ValueError):
    """No picture can be drawn; one line."""


def need_pillow() -> None:
    """PictureError unless Pillow is installed."""
    try:
        import PIL.ImageDraw  # noqa: F401
    except ImportError:
        raise PictureError('pictures need Pillow: pip install "trm-fast[viz]"') from None


def moving_picture(
    view: BoardView,
    frames: Sequence[Sequence[Glance]],
    answer: Glance,
    depth: int,
    fps: float = 4.0,
) -> bytes:
    """A GIF: a frame per supervision step with the boards of the rollouts (of at most 25, with the
    highest q in the end) and q of all so far, and the last one, with the answer framed, held for
    three seconds.

    Args:
        frames: what `glances` returned, of every frame.  depth: steps of a rollout.
        answer: what came of it; its rollout is framed.

    Raises:
        PictureError: Pillow is not installed.
    """
    need_pillow()
    limits, chosen = _limits(frames), _chosen(frames, answer)
    drawn: list[Any] = []
    for end in range(1, len(frames) + 1):
        drawn.append(_frame(view, frames[:end], None, depth, limits, chosen))
    drawn.append(_frame(view, frames, answer, depth, limits, chosen))
    pictures = _in_few_colours(drawn)
    target = io.BytesIO()
    step_ms = max(20, round(1000 / fps))
    pictures[0].save(
        target,
        "GIF",
        save_all=True,
        append_images=pictures[1:],
        duration=[*[step_ms] * len(frames), HOLD_MS],
        loop=0,
        optimize=True,
    )
    return target.getvalue()


def _in_few_colours(drawn: Sequence[Any]) -> list[Any]:
    """The images in one palette, made from the first, a middle and the last: what stays the same
    is then the same in the file, which is far shorter."""
    from PIL import Image

    picked = [drawn[0], drawn[len(drawn) // 2], drawn[-1]]
    width, height = drawn[0].size
    together = Image.new("RGB", (width, height * len(picked)))
    for number, picture in enumerate(picked):
        together.paste(picture, (0, number * height))
    palette = together.quantize(64)
    return [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in drawn]


def sheet(view: BoardView, frames: Sequence[Sequence[Glance]], answer: Glance, depth: int) -> bytes:
    """A PNG: the puzzle and its answer, below them the steps that led there, and q over the steps.

    Arguments and errors as `moving_picture`.
    """
    need_pillow()
    from PIL import Image

    steps = _strip(frames, answer)
    small = _cell(view, 150)
    large = _cell(view, 330)
    each, board = _extent(view, small), _extent(view, large)
    strip = len(steps) * each[0] + (len(steps) - 1) * GAP
    width = max(strip, 2 * board[0] + 3 * GAP, 480) + 2 * MARGIN
    chart = 110
    height = MARGIN + LINE + board[1] + 2 * LINE + GAP + each[1] + 2 * LINE + chart + MARGIN + 10
    image = Image.new("RGB", (width, height), PAPER)
    pen = _Pen(image)
    left, right = width // 2 - board[0] - GAP, width // 2 + GAP
    pen.text(left, MARGIN, "puzzle", 14, FAINT)
    sure = f"answer at step {answer.step}, q {answer.q:+.2f}"
    pen.text(right, MARGIN, sure, 14, FAINT)
    top = MARGIN + LINE + 4
    blank = np.where(view.fixed, view.given, 0 if view.kind == SUDOKU else view.given)
    pen.board(view, _still(view, blank), left, top, large)
    pen.board(view, answer, right, top, large)
    top += board[1] + 6
    pen.text(right, top, _short(answer, board[0] // 7), 14, CHOSEN if answer.valid else BROKEN_INK)
    top += 2 * LINE
    x = (width - strip) // 2
    for glance in steps:
        pen.text(x, top, f"step {glance.step}, q {glance.q:+.1f}", 12, FAINT)
        pen.board(view, glance, x, top + LINE, small)
        x += each[0] + GAP
    top += LINE + each[1] + LINE
    box = (MARGIN, top, width - MARGIN, top + chart)
    pen.chart(curves_of(frames), answer, depth, _limits(frames), box)
    target = io.BytesIO()
    image.save(target, "PNG", optimize=True)
    return target.getvalue()


def _strip(frames: Sequence[Sequence[Glance]], answer: Glance) -> list[Glance]:
    """At most STRIP steps of the answer's rollout, evenly: its first, its last, the answer's."""
    own: dict[int, Glance] = {}
    for seen in frames:
        for glance in seen:
            if glance.rollout == answer.rollout and glance.step:
                own.setdefault(glance.step, glance)
    steps = sorted(own)
    if len(steps) > STRIP:
        picked = {steps[round(i * (len(steps) - 1) / (STRIP - 1))] for i in range(STRIP)}
        if answer.step in own and answer.step not in picked:
            nearest = min(picked - {steps[0], steps[-1]}, key=lambda s: abs(s - answer.step))
            picked = picked - {nearest} | {answer.step}
        steps = sorted(picked)
    return [own[step] for step in steps]


def _still(view: BoardView, cells: np.ndarray) -> Glance:
    """Cells as they are, nothing said of them."""
    nothing = np.zeros(len(cells), bool)
    return Glance(0, cells, np.zeros(len(cells), np.float32), nothing, 0.0, 0, False, None, "")


def _short(glance: Glance, characters: int) -> str:
    if len(glance.words) <= characters:
        return glance.words
    return f"breaks the rules in {int(glance.broken.sum())} cells"


def _cell(view: BoardView, extent: int) -> int:
    """Pixels of a cell so that the board has about `extent`."""
    return max(4, extent // max(view.window))


def _extent(view: BoardView, cell: int) -> tuple[int, int]:
    """Width and height of a board, its outer lines included."""
    return view.window[1] * cell + 3, view.window[0] * cell + 3


def _chosen(frames: Sequence[Sequence[Glance]], answer: Glance) -> set[int]:
    """The rollouts to show: the answer's, and those of highest q in the end."""
    left = [glance for glance in frames[-1] if glance.rollout != answer.rollout]
    taken = {answer.rollout}
    while left and len(taken) < BOARDS:
        best = best_of(left)
        left.remove(best)
        taken.add(best.rollout)
    return taken


def _limits(frames: Sequence[Sequence[Glance]]) -> tuple[float, float]:
    """Lowest and highest q to draw; 0 is between them."""
    values = [q for curve in curves_of(frames) for _, q in curve]
    low, high = min([0.0, *values]), max([0.0, *values])
    return low, high if high > low else low + 1.0


def _frame(
    view: BoardView,
    frames: Sequence[Sequence[Glance]],
    answer: Glance | None,
    depth: int,
    limits: tuple[float, float],
    chosen: set[int],
) -> Any:
    """One frame of the GIF: the last of `frames`, with the curve of all of them."""
    from PIL import Image

    seen = [glance for glance in frames[-1] if glance.rollout in chosen]
    columns = math.ceil(math.sqrt(len(seen))) if len(seen) != 2 else 2
    rows = math.ceil(len(seen) / columns)
    cell = _cell(view, {1: 324, 2: 225, 3: 180}.get(columns, 135))
    board = _extent(view, cell)
    block = (max(board[0], 150), board[1] + 2 * LINE + 6)
    chart = 90
    width = 2 * MARGIN + columns * block[0] + (columns - 1) * GAP
    height = 2 * MARGIN + rows * (block[1] + GAP) + chart
    image = Image.new("RGB", (width, height), PAPER)
    pen = _Pen(image)
    for index, glance in enumerate(seen):
        if answer is not None and glance.rollout == answer.rollout:
            glance = answer
        x = MARGIN + index % columns * (block[0] + GAP)
        y = MARGIN + index // columns * (block[1] + GAP)
        pen.heading(glance, x, y, len(seen), depth, block[0] // 7)
        left, top = x + (block[0] - board[0]) // 2, y + 2 * LINE + 2
        pen.board(view, glance, left, top, cell)
        if answer is not None and glance is answer:
            frame = (left - 4, top - 4, left + board[0] + 3, top + board[1] + 3)
            pen.draw.rectangle(frame, outline=CHOSEN, width=3)
    top = height - MARGIN - chart
    box = (MARGIN, top, width - MARGIN, height - MARGIN)
    pen.chart(curves_of(frames), answer, depth, limits, box)
    return image


class _Pen:
    """Draws boards and words on an image."""

    def __init__(self, image: Any) -> None:
        from PIL import ImageDraw

        self.draw = ImageDraw.Draw(image)
        self._fonts: dict[int, Any] = {}

    def _font(self, size: int) -> Any:
        from PIL import ImageFont

        if size not in self._fonts:
            self._fonts[size] = ImageFont.load_default(size)
        return self._fonts[size]

    def text(
        self, x: float, y: float, words: str, size: int, ink: str, anchor: str = "la", bold: int = 0
    ) -> None:
        font = self._font(size)
        self.draw.text((x, y), words, ink, font, anchor=anchor, stroke_width=bold)

    def heading(
        self, glance: Glance, x: int, y: int, rollouts: int, depth: int, characters: int
    ) -> None:
        """Two lines over a board: which step and q, and the rule check."""
        if glance.step == 0:
            self.text(x, y, f"{glance.rollout}: not begun", 13, FAINT)
            return
        name = f"{glance.rollout}: " if rollouts > 1 else ""
        self.text(x, y, f"{name}step {glance.step} of {depth}, q {glance.q:+.1f}", 13, INK)
        ink = {True: CHOSEN, False: BROKEN_INK, None: FAINT}[glance.valid]
        words = _short(glance, characters)
        if len(words) > characters:
            words = f"{int(glance.broken.sum())} cells break rules"
        self.text(x, y + LINE, words, 13, ink)

    def board(self, view: BoardView, glance: Glance, x: int, y: int, cell: int) -> None:
        rows, columns = view.window
        fixed, line = view.fixed, view.line(glance.cells)
        for row in range(rows):
            for column in range(columns):
                index = row * view.side + column
                place = (x + 1 + column * cell, y + 1 + row * cell)
                self._cell(view, glance, index, line[index], bool(fixed[index]), place, cell)
        right, bottom = x + 1 + columns * cell, y + 1 + rows * cell
        if view.kind == SUDOKU:
            pens = ((RULE, 1), (INK, 2 if cell >= 22 else 1))
            for number in range(view.side + 1):
                heavy = (number % view.box[1] == 0, number % view.box[0] == 0)
                across, down = x + 1 + number * cell, y + 1 + number * cell
                for is_heavy in (False, True):
                    if heavy[0] is is_heavy:
                        self.draw.line((across, y, across, bottom), *pens[is_heavy])
                    if heavy[1] is is_heavy:
                        self.draw.line((x, down, right, down), *pens[is_heavy])
        self.draw.rectangle((x, y, right + 1, bottom + 1), outline=INK, width=2)

    def _cell(
        self,
        view: BoardView,
        glance: Glance,
        index: int,
        shown: str,
        fixed: bool,
        place: tuple[int, int],
        cell: int,
    ) -> None:
        x, y = place
        token, broken = int(glance.cells[index]), bool(glance.broken[index])
        box = (x, y, x + cell - 1, y + cell - 1)
        if view.kind == ARC:
            known = 2 <= token < 12
            self.draw.rectangle(box, ARC_COLOURS.split()[token - 2] if known else PAPER, RULE)
            return
        ground: Any = GIVEN
        if broken:
            ground = BROKEN
        elif view.kind == MAZE and token == WALL:
            ground = "#3d444d"
        elif not fixed and glance.step:
            ground = _shade(float(glance.certainty[index])) if self._told(view, token) else PAPER
        elif not fixed:
            ground = PAPER
        self.draw.rectangle(box, ground)
        centre = (x + cell / 2, y + cell / 2)
        ink = BROKEN_INK if broken else INK
        if view.kind == MAZE and token == PATH:
            r = cell * 0.24
            dot = (centre[0] - r, centre[1] - r, centre[0] + r, centre[1] + r)
            self.draw.ellipse(dot, MARK if broken else CHOSEN)
        elif (view.kind == SUDOKU and shown.isdigit()) or token in (START, GOAL):
            size = max(8, round(cell * 0.62))
            bold = int(fixed and cell >= 30)
            self.text(*centre, shown, size, ink, anchor="mm", bold=bold)
        if broken and cell >= 12:
            corner = cell * 0.26
            self.draw.polygon(((x, y), (x + corner, y), (x, y + corner)), MARK)

    @staticmethod
    def _told(view: BoardView, token: int) -> bool:
        """Whether the cell shows an answer: in a maze the path, all else stays paper."""
        return view.kind == SUDOKU or token == PATH

    def chart(
        self,
        curves: Sequence[Sequence[tuple[int, float]]],
        answer: Glance | None,
        depth: int,
        limits: tuple[float, float],
        box: tuple[int, int, int, int],
    ) -> None:
        """q over the steps, a line per rollout; a dot at the answer."""
        low, high = limits
        x0, y0, x1, y1 = box[0] + 34, box[1] + 8, box[2] - 8, box[3] - 18

        def at(step: int, q: float) -> tuple[float, float]:
            across = (step - 1) / max(1, depth - 1)
            return x0 + across * (x1 - x0), y1 - (q - low) / (high - low) * (y1 - y0)

        for q in {low, 0.0, high}:
            y = at(1, q)[1]
            self.draw.line((x0, y, x1, y), RULE)
            self.text(x0 - 6, y, f"{q:.0f}", 11, FAINT, anchor="rm")
        self.text(x0, y1 + 5, "q at step 1", 11, FAINT)
        self.text(x1, y1 + 5, f"step {depth}", 11, FAINT, anchor="ra")
        for number, curve in enumerate(curves):
            places = [at(step, q) for step, q in curve]
            colour = LINES[number % len(LINES)]
            if len(places) > 1:
                self.draw.line(places, colour, 2)
            for x, y in places if len(places) == 1 else ():
                self.draw.ellipse((x - 2, y - 2, x + 2, y + 2), colour)
        if answer is not None and math.isfinite(answer.q) and answer.step <= depth:
            x, y = at(answer.step, min(max(answer.q, low), high))
            self.draw.ellipse((x - 5, y - 5, x + 5, y + 5), PAPER, CHOSEN, 3)


def curves_of(frames: Sequence[Sequence[Glance]]) -> list[list[tuple[int, float]]]:
    """Per rollout (step, q) of the steps it ran, those that are no numbers left out."""
    curves: list[dict[int, float]] = [{} for _ in frames[-1]] if frames else []
    for seen in frames:
        for glance in seen:
            if glance.step and math.isfinite(glance.q):
                curves[glance.rollout - 1].setdefault(glance.step, glance.q)
    return [sorted(curve.items()) for curve in curves]


def _shade(certainty: float) -> tuple[int, int, int]:
    share = 0.0 if math.isnan(certainty) else max(0.0, min(1.0, certainty))
    mixed = [round(a + (b - a) * share) for a, b in zip(UNSURE, SURE, strict=True)]
    return mixed[0], mixed[1], mixed[2]
