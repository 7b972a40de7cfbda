"""Pictures of a run: its curves as images, its boards as text.

Owns `learning_curve.png` and the curves of an evaluation (matplotlib, from the `viz` extra,
imported only when drawing) and the text form of a board. May be imported by trainer and the command
modules; imports symmetry.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trm_fast.symmetry import box_shape

__all__ = ["Curve", "accuracy_curves", "format_board", "learning_curve", "side_by_side"]

BOLD, PLAIN = "\033[1m", "\033[0m"
ACCURACY = "exact_accuracy"
LOSS = "lm_loss"


def learning_curve(
    rows: Iterable[Mapping[str, Any]], path: str | os.PathLike[str], title: str = ""
) -> str | None:
    """Draw loss and exact accuracy over the steps into a PNG.

    A row's `train/lm_loss` and `<set>/lm_loss` go into the upper panel (logarithmic),
    `train/exact_accuracy` and `<set>/exact_accuracy` into the lower one; evaluations are dotted.

    Args:
        rows: rows of metrics.jsonl (`progress.read_metrics`); absent and null values leave gaps.
        path: the file, replaced atomically.
        title: above the panels.

    Returns:
        None, or one line saying why there is no picture: a run never fails for one.
    """
    target = Path(path)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return f'{target.name} is not drawn: pip install "trm-fast[viz]"'
    rows = list(rows)
    losses = _curves(rows, LOSS)
    accuracies = _curves(rows, ACCURACY)
    if not losses and not accuracies:
        return f"{target.name} is not drawn: no metrics yet"
    figure = Figure(figsize=(8, 6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, accuracy_axes = figure.subplots(2, 1, sharex=True)
    for axes, curves, label in (
        (loss_axes, losses, "loss"),
        (accuracy_axes, accuracies, "boards right, %"),
    ):
        _plot(axes, curves, label)
    if any(value > 0 for curve in losses.values() for _, value in curve):
        loss_axes.set_yscale("log")
    accuracy_axes.set_ylim(-2, 102)
    accuracy_axes.set_xlabel("step")
    figure.suptitle(title)
    return _saved(figure, target)


def _saved(figure: Any, target: Path) -> str | None:
    """The picture as a PNG, replaced atomically; or one line saying why there is none."""
    temp = target.parent / f".{target.name}.tmp"
    try:
        figure.savefig(temp, format="png", metadata={"Software": None})
        os.replace(temp, target)
    except OSError as error:
        temp.unlink(missing_ok=True)
        return f"{target.name or target} is not drawn: {error.strerror or error}"
    return None


@dataclass(frozen=True)
class Curve:
    """Shares in percent against what is on the x axis, and what each place costs in passes."""

    at: Sequence[int]
    percent: Sequence[float]
    passes: Sequence[float]
    dashed: bool = False


def accuracy_curves(
    panels: Mapping[str, Mapping[str, Curve]], path: str | os.PathLike[str], title: str = ""
) -> str | None:
    """Draw accuracy, and above every point its cost, into a PNG.

    Args:
        panels: by the words on its x axis, the curves of a panel by name.
        path: the file, replaced atomically.  title: above the panels.

    Returns:
        None, or one line saying why there is no picture.
    """
    target = Path(path)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return f'{target.name} is not drawn: pip install "trm-fast[viz]"'
    figure = Figure(figsize=(5.5 * len(panels), 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (words, curves) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for name, curve in curves.items():
            style = ":" if curve.dashed else "-"
            axes.plot(curve.at, curve.percent, style, marker="o", markersize=4, label=name)
            for x, y, cost in zip(curve.at, curve.percent, curve.passes, strict=True):
                if not curve.dashed:
                    axes.annotate(
                        f"{cost:.3g}", (x, y), (6, -12), textcoords="offset points",
                        ha="center", fontsize=7, alpha=0.7,
                    )  # fmt: skip
        axes.set_xscale("log", base=2)
        ticks = sorted({x for curve in curves.values() for x in curve.at})
        axes.set_xticks(ticks, [str(x) for x in ticks], fontsize=8)
        axes.minorticks_off()
        axes.set_ylim(-6, 104)
        axes.set_xlabel(words)
        axes.set_ylabel("boards right, %; small: passes a board")
        axes.grid(True, alpha=0.3)
        axes.legend(loc="lower right")
    figure.suptitle(title)
    return _saved(figure, target)


def _curves(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[str, list[tuple[int, float]]]:
    """{"train" or the set: [(step, value), ...]} of one metric; accuracies in percent."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            group, _, last = name.rpartition("/")
            if last == metric and isinstance(value, (int, float)) and math.isfinite(value):
                shown = 100 * value if metric == ACCURACY else value
                curves.setdefault(group or "run", []).append((row["step"], shown))
    return curves


def _plot(axes: Any, curves: Mapping[str, Sequence[tuple[int, float]]], label: str) -> None:
    for group, points in curves.items():
        steps, values = zip(*points, strict=True)
        train = group == "train"
        axes.plot(
            steps,
            values,
            label=group,
            linewidth=1.0 if train else 1.8,
            alpha=0.6 if train else 1.0,
            marker=None if train and len(points) > 1 else "o",
            markersize=4,
        )
    axes.set_ylabel(label)
    axes.grid(True, alpha=0.3)
    if curves:
        axes.legend()


def format_board(
    board: str | Sequence[int],
    givens: str | Sequence[int] | None = None,
    size: int | None = None,
    *,
    ansi: bool = False,
) -> str:
    """A Sudoku board as lines of text, boxes ruled off, givens told apart from answers.

    Args:
        board: size * size cells row by row: digits, and 0 or "." for a blank; numbers in any
            sequence (a list, an array, a tensor), or one text.
        givens: the puzzle in the same form; its digits are shown as `[5]`, or in bold with `ansi`.
        size: 4, 6 or 9; None takes it from the length.
        ansi: for a terminal that knows bold.

    Returns:
        Lines of equal width joined by newlines; `side_by_side` puts several next to each other.

    Raises:
        ValueError: another number of cells, or a cell that is no digit of this size.
    """
    cells = _cells(board, size, "board")
    size = math.isqrt(len(cells))
    given = _cells(givens, size, "givens") if givens is not None else [0] * len(cells)
    shape = box_shape(size)
    texts = [_cell(cell, bool(fixed), ansi) for cell, fixed in zip(cells, given, strict=True)]
    bar = "+".join("-" * (3 * shape.cols) for _ in range(size // shape.cols))
    lines = []
    for row in range(size):
        if row and row % shape.rows == 0:
            lines.append(bar)
        parts = texts[row * size : (row + 1) * size]
        boxes = ["".join(parts[c : c + shape.cols]) for c in range(0, size, shape.cols)]
        lines.append("|".join(boxes))
    return "\n".join(lines)


def _cell(digit: int, given: bool, ansi: bool) -> str:
    shown = str(digit) if digit else "."
    if given:
        return f" {BOLD}{shown}{PLAIN} " if ansi else f"[{shown}]"
    return f" {shown} "


def _cells(board: str | Sequence[int], size: int | None, what: str) -> list[int]:
    if size is not None and size not in (4, 6, 9):
        raise ValueError(f"board size is {size!r}; 4, 6 and 9 are allowed")
    items: Sequence[Any] = board.replace(".", "0") if isinstance(board, str) else board
    allowed = [size * size] if size is not None else [16, 36, 81]
    if len(items) not in allowed:
        counts = " or ".join(map(str, allowed))
        raise ValueError(f"{what} has {len(items)} cells; {counts} are allowed")
    highest = math.isqrt(len(items))
    cells = []
    for place, item in enumerate(items):
        text = item if isinstance(item, str) else str(int(item))
        if not (text.isascii() and text.isdigit() and int(text) <= highest):
            raise ValueError(f"{what} has {text!r} in cell {place + 1}; 0 to {highest} are allowed")
        cells.append(int(text))
    return cells


def side_by_side(boards: Sequence[str], titles: Sequence[str] = (), gap: int = 4) -> str:
    """Texts next to each other, such as a board before and after.

    Args:
        boards: what `format_board` returned; lines of one text have one visible width.
        titles: one over each, or none.
        gap: spaces between them.

    Raises:
        ValueError: titles of another number than the boards.
    """
    if titles and len(titles) != len(boards):
        raise ValueError(f"{len(titles)} titles for {len(boards)} boards; one each is allowed")
    columns = [board.split("\n") for board in boards]
    if titles:
        columns = [[title, *lines] for title, lines in zip(titles, columns, strict=True)]
    widths = [max(map(_visible, lines)) for lines in columns]
    height = max(map(len, columns), default=0)
    rows = []
    for row in range(height):
        parts = [lines[row] if row < len(lines) else "" for lines in columns]
        padded = [
            part + " " * (width - _visible(part)) for part, width in zip(parts, widths, strict=True)
        ]
        rows.append((" " * gap).join(padded).rstrip())
    return "\n".join(rows)


def _visible(text: str) -> int:
    return len(re.sub("\033\\[[0-9;]*m", "", text))
