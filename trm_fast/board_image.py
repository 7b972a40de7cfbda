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
from functools import cache
from typing import Any

import numpy as np

from trm_fast.board_view import MAZE, SUDOKU, BoardView, Glance, best_of
from trm_fast.data.maze_solver import GOAL, PATH, START, WALL

__all__ = ["PictureError", "highest", "moving_picture", "need_pillow", "sheet", "steps_shown"]

PAPER, INK, FAINT, RULE = "#ffffff", "#1b1f24", "#5b6570", "#c4cad1"
GIVEN, UNSURE, SURE, BROKEN = "#e4e7eb", (242, 240, 234), (147, 214, 160), "#f6c1ba"
BROKEN_INK, MARK, CHOSEN = "#8f1409", "#c0261a", "#1a7f37"
LINES = ("#1a7f37", "#0b63ce", "#b54708", "#8a3ffc", "#b0246d", "#0f766e", "#6b5900", "#57606a")
MARGIN, GAP, LINE = 16, 14, 18
HOLD_MS = 3000
"""How long the last frame of a GIF stands."""
BOARDS = 25
"""Rollouts whose boards a GIF shows, at most."""
FRAMES = 240
"""Frames of a GIF, at most."""
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
    three seconds. Of more steps than `FRAMES` that many are shown, see `steps_shown`.

    Args:
        frames: what `glances` returned, of every frame.  depth: steps of a rollout.
        answer: what came of it; its rollout is framed.

    Raises:
        PictureError: Pillow is not installed.
    """
    need_pillow()
    limits, chosen, tiles = _limits(frames), _chosen(frames, answer), _Tiles()
    curves, shown = _points(frames), steps_shown(len(frames))
    # The answer stands in the last step's board: in a thinned picture that is enough of it.
    ends = [*shown[: None if len(frames) < FRAMES else -1], -1]

    def draw(end: int) -> Any:
        number = end % len(frames)
        so_far = [[(s, q) for at, s, q in curve if at <= number] for curve in curves]
        last = answer if end < 0 else None
        return _frame(view, frames[number], so_far, last, depth, limits, chosen, tiles)

    palette = _palette([draw(end) for end in (ends[0], ends[len(ends) // 2], -1)])
    pictures = [draw(end).quantize(palette=palette, dither=0) for end in ends]
    target = io.BytesIO()
    step_ms = max(20, round(1000 / fps))
    pictures[0].save(
        target,
        "GIF",
        save_all=True,
        append_images=pictures[1:],
        duration=[*[step_ms] * (len(ends) - 1), HOLD_MS],
        loop=0,
        optimize=True,
    )
    return target.getvalue()


def steps_shown(count: int) -> list[int]:
    """Which of so many steps, from 0, a GIF shows: all, or `FRAMES` of them, evenly, the first and
    the last among them."""
    if count <= FRAMES:
        return list(range(count))
    return [round(number * (count - 1) / (FRAMES - 1)) for number in range(FRAMES)]


def _palette(picked: Sequence[Any]) -> Any:
    """64 colours of the first frame, a middle and the last, for all of them: what stays the same is
    then the same in the file, which is far shorter."""
    from PIL import Image

    width, height = picked[0].size
    together = Image.new("RGB", (width, height * len(picked)))
    for number, picture in enumerate(picked):
        together.paste(picture, (0, number * height))
    return together.quantize(64)


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
    pen = _Pen(image, _Tiles())
    left, right = width // 2 - board[0] - GAP, width // 2 + GAP
    pen.text(left, MARGIN, "puzzle", 14, FAINT)
    several = len(frames[-1]) > 1
    which = f"answer of rollout {answer.rollout}, step" if several else "answer at step"
    indent = pen.key(answer.rollout, right, MARGIN) if several else 0
    pen.text(right + indent, MARGIN, f"{which} {answer.step}, q {answer.q:+.2f}", 14, FAINT)
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
    others = [glance for glance in frames[-1] if glance.rollout != answer.rollout]
    return {answer.rollout, *(glance.rollout for glance in highest(others, BOARDS - 1))}


def highest(seen: Sequence[Glance], count: int) -> list[Glance]:
    """So many of the rollouts at most, those with the highest q, that first."""
    left = list(seen)
    taken: list[Glance] = []
    while left and len(taken) < count:
        taken.append(best_of(left))
        left.remove(taken[-1])
    return taken


def _limits(frames: Sequence[Sequence[Glance]]) -> tuple[float, float]:
    """Lowest and highest q to draw; 0 is between them."""
    values = [q for curve in curves_of(frames) for _, q in curve]
    low, high = min([0.0, *values]), max([0.0, *values])
    return low, high if high > low else low + 1.0


def _frame(
    view: BoardView,
    frame: Sequence[Glance],
    curves: Sequence[Sequence[tuple[int, float]]],
    answer: Glance | None,
    depth: int,
    limits: tuple[float, float],
    chosen: set[int],
    tiles: _Tiles,
) -> Any:
    """One frame of the GIF, with the curves so far."""
    from PIL import Image

    seen = [glance for glance in frame if glance.rollout in chosen]
    columns = math.ceil(math.sqrt(len(seen))) if len(seen) != 2 else 2
    rows = math.ceil(len(seen) / columns)
    cell = _cell(view, {1: 324, 2: 225, 3: 180}.get(columns, 135))
    board = _extent(view, cell)
    block = (max(board[0], 150), board[1] + 2 * LINE + 6)
    chart = 90
    width = 2 * MARGIN + columns * block[0] + (columns - 1) * GAP
    height = 2 * MARGIN + rows * (block[1] + GAP) + chart
    image = Image.new("RGB", (width, height), PAPER)
    pen = _Pen(image, tiles)
    for index, glance in enumerate(seen):
        if answer is not None and glance.rollout == answer.rollout:
            glance = answer
        x = MARGIN + index % columns * (block[0] + GAP)
        y = MARGIN + index // columns * (block[1] + GAP)
        pen.heading(glance, x, y, len(seen), depth, block[0] // 7)
        left, top = x + (block[0] - board[0]) // 2, y + 2 * LINE + 2
        pen.board(view, glance, left, top, cell)
        if answer is not None and glance is answer:
            edge = (left - 4, top - 4, left + board[0] + 3, top + board[1] + 3)
            pen.draw.rectangle(edge, outline=CHOSEN, width=3)
    top = height - MARGIN - chart
    box = (MARGIN, top, width - MARGIN, height - MARGIN)
    pen.chart(curves, answer, depth, limits, box)
    return image


@cache
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


_Tiles = dict[tuple[Any, ...], Any]
"""Cells as they were drawn before, by all that they show: most of a moving picture is repeated."""


class _Pen:
    """Draws boards and words on an image; what is a cell's comes from, and goes to, `tiles`."""

    def __init__(self, image: Any, tiles: _Tiles) -> None:
        from PIL import ImageDraw

        self.draw = ImageDraw.Draw(image)
        self._image, self._tiles = image, tiles

    def text(
        self, x: float, y: float, words: str, size: int, ink: str, anchor: str = "la", bold: int = 0
    ) -> None:
        self.draw.text((x, y), words, ink, _font(size), anchor=anchor, stroke_width=bold)

    def key(self, rollout: int, x: int, y: int) -> int:
        """The colour of a rollout's curve beside its title; returns the room that it takes."""
        self.draw.rectangle((x, y + 3, x + 9, y + 12), _colour(rollout))
        return 15

    def heading(
        self, glance: Glance, x: int, y: int, rollouts: int, depth: int, characters: int
    ) -> None:
        """Two lines over a board: which step and q, and the rule check."""
        name = f"{glance.rollout}: " if rollouts > 1 else ""
        indent = self.key(glance.rollout, x, y) if rollouts > 1 else 0
        if glance.step == 0:
            self.text(x + indent, y, f"{name}not begun", 13, FAINT)
            return
        title = f"{name}step {glance.step} of {depth}, q {glance.q:+.1f}"
        self.text(x + indent, y, title, 13, INK)
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
                tile = self._tile(view, glance, index, line[index], bool(fixed[index]), cell)
                self._image.paste(tile, (x + 1 + column * cell, y + 1 + row * cell))
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

    def _tile(
        self, view: BoardView, glance: Glance, index: int, shown: str, fixed: bool, cell: int
    ) -> Any:
        token, broken = int(glance.cells[index]), bool(glance.broken[index])
        ground: Any = GIVEN
        if broken:
            ground = BROKEN
        elif view.kind == MAZE and token == WALL:
            ground = "#3d444d"
        elif not fixed and glance.step:
            ground = _shade(float(glance.certainty[index])) if self._told(view, token) else PAPER
        elif not fixed:
            ground = PAPER
        key = (view.kind, token, shown, fixed, broken, ground, cell)
        if key not in self._tiles:
            self._tiles[key] = _tile(*key)
        return self._tiles[key]

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
        for rollout, curve in enumerate(curves, 1):
            places = [at(step, q) for step, q in curve]
            colour = _colour(rollout)
            if len(places) > 1:
                self.draw.line(places, colour, 2)
            for x, y in places if len(places) == 1 else ():
                self.draw.ellipse((x - 2, y - 2, x + 2, y + 2), colour)
        if answer is not None and math.isfinite(answer.q) and answer.step <= depth:
            x, y = at(answer.step, min(max(answer.q, low), high))
            self.draw.ellipse((x - 5, y - 5, x + 5, y + 5), PAPER, CHOSEN, 3)


def _tile(
    kind: str, token: int, shown: str, fixed: bool, broken: bool, ground: Any, cell: int
) -> Any:
    """A cell, as an image of its own."""
    from PIL import Image

    image = Image.new("RGB", (cell, cell), ground)
    pen = _Pen(image, {})
    middle, ink = cell / 2, BROKEN_INK if broken else INK
    if kind == MAZE and token == PATH:
        r = cell * 0.24
        dot = (middle - r, middle - r, middle + r, middle + r)
        pen.draw.ellipse(dot, MARK if broken else CHOSEN)
    elif (kind == SUDOKU and shown.isdigit()) or token in (START, GOAL):
        size = max(8, round(cell * 0.62))
        bold = int(fixed and cell >= 30)
        pen.text(middle, middle, shown, size, ink, anchor="mm", bold=bold)
    if broken and cell >= 12:
        corner = cell * 0.26
        pen.draw.polygon(((0, 0), (corner, 0), (0, corner)), MARK)
    return image


def _colour(rollout: int) -> str:
    """Of a rollout's curve."""
    return LINES[(rollout - 1) % len(LINES)]


def curves_of(frames: Sequence[Sequence[Glance]]) -> list[list[tuple[int, float]]]:
    """Per rollout (step, q) of the steps it ran, those that are no numbers left out."""
    return [[(step, q) for _, step, q in curve] for curve in _points(frames)]


def _points(frames: Sequence[Sequence[Glance]]) -> list[list[tuple[int, int, float]]]:
    """As `curves_of`, and before each the frame from which on it is known."""
    curves: list[dict[int, tuple[int, int, float]]] = [{} for _ in frames[-1]] if frames else []
    for number, seen in enumerate(frames):
        for glance in seen:
            if glance.step and math.isfinite(glance.q):
                known = curves[glance.rollout - 1]
                known.setdefault(glance.step, (number, glance.step, glance.q))
    return [[curve[step] for step in sorted(curve)] for curve in curves]


def _shade(certainty: float) -> tuple[int, int, int]:
    share = 0.0 if math.isnan(certainty) else max(0.0, min(1.0, certainty))
    mixed = [round(a + (b - a) * share) for a, b in zip(UNSURE, SURE, strict=True)]
    return mixed[0], mixed[1], mixed[2]
