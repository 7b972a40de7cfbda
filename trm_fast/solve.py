"""`trm-fast solve PUZZLE ...`: answers of a trained model to Sudoku puzzles and mazes.

Owns where puzzles come from, where answers go, and how they are shown; answering is
`inference.predict`. Imported by `__main__.py` only. An answer has the clues, or the walls, written
over it, and is checked against the rules, so that a wrong one is never passed off as right.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trm_fast.answers import Answers
from trm_fast.console import say, show_builds
from trm_fast.inference import predict
from trm_fast.loading import (
    MISMATCH,
    UNREADABLE,
    USAGE,
    CommandError,
    Loaded,
    Parser,
    load_or_stop,
)
from trm_fast.mazes import Maze, looks_like_mazes, maze_rows, parse_mazes, verdict, with_walls
from trm_fast.pretrained import SHIPPED
from trm_fast.puzzles import (
    Breach,
    Puzzle,
    PuzzleError,
    SizeError,
    board_line,
    board_rows,
    breaches,
    parse_arguments,
    parse_text,
    with_clues,
)
from trm_fast.reasoning import Reasoning
from trm_fast.reasoning_options import add_reasoning, asked_reasoning, is_asked, share
from trm_fast.rules import maze_side, sudoku_side
from trm_fast.watching import Watching, add_options, is_watched

__all__ = ["main", "newest_run"]

BROKEN = 1
CUT = ", cut short by --budget"
"""Exit status when at least one answer breaks the rules or is withheld."""

RUNS = "checkpoints"


@dataclass(frozen=True)
class Found:
    """Where an answer comes from, and how sure the model is of it.

    Attributes:
        plan: how the model was asked.
        confidence: see `Answers`.  step: 1-based, 0 where none was made.
        rollout: 1-based.  passes: supervision steps of all rollouts.
        cut: whether the budget ran out before they had ended.
        abstain: the confidence below which there is no answer.
    """

    plan: Reasoning
    confidence: float
    step: int
    rollout: int
    passes: int
    cut: bool
    abstain: float

    @property
    def withheld(self) -> str:
        """Why there is no answer, or ""."""
        if not self.step:
            return "no answer: the time was up before a step was made"
        if self.confidence < self.abstain:
            return f"no answer: {self.text()}, below {self.abstain:g}"
        return ""

    def text(self) -> str:
        """How sure, and at what cost."""
        mode, several = self.plan.select == "mode", self.plan.rollouts > 1
        text = f"halting confidence {self.confidence:.3f} at step {self.step}"
        if mode:
            text = f"{self.confidence:.3f} of the votes"
        elif several:
            text += f" of rollout {self.rollout}"
        return text + (f", {self.passes} passes" if several else "") + (CUT if self.cut else "")

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "confidence": self.confidence,
            "step": self.step,
            "rollout": self.rollout,
            "passes": self.passes,
            "cut": self.cut,
            "abstained": bool(self.withheld),
        }


@dataclass(frozen=True)
class Solved:
    """One answer: digits [L] with the clues kept, the broken units, where it comes from."""

    puzzle: Puzzle
    cells: np.ndarray
    breach: Breach
    found: Found

    @property
    def good(self) -> bool:
        """Whether there is an answer and it keeps the rules."""
        return not self.breach and not self.found.withheld

    def text(self) -> str:
        """One line, an empty line, the rows, and what to think of it."""
        if self.found.withheld:
            return self.found.withheld
        verdict = f"breaks the rules in {self.breach}" if self.breach else "valid"
        judged = f"{verdict}; {self.found.text()}"
        return f"{board_line(self.cells)}\n\n{board_rows(self.cells)}\n\n{judged}"

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; `broken` names 1-based units, None where there is no answer."""
        return {
            "place": self.puzzle.place,
            "puzzle": self.puzzle.text,
            "answer": None if self.found.withheld else board_line(self.cells),
            "valid": self.good,
            "broken": None
            if self.found.withheld
            else {
                "rows": list(self.breach.rows),
                "columns": list(self.breach.columns),
                "boxes": list(self.breach.boxes),
            },
            **self.found.to_dict(),
        }


@dataclass(frozen=True)
class SolvedMaze:
    """One answer: tokens [L] with the maze kept, what is wrong or "", where it comes from."""

    puzzle: Maze
    cells: np.ndarray
    breach: str
    found: Found

    @property
    def good(self) -> bool:
        """Whether there is an answer and it is right."""
        return not self.breach and not self.found.withheld

    def text(self) -> str:
        """The rows, and what to think of it."""
        if self.found.withheld:
            return self.found.withheld
        said = self.breach or verdict(self.puzzle.cells, self.cells)[1]
        return f"{maze_rows(self.cells)}\n\n{said}; {self.found.text()}"

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "place": self.puzzle.place,
            "puzzle": maze_rows(self.puzzle.cells).split("\n"),
            "answer": None if self.found.withheld else maze_rows(self.cells).split("\n"),
            "valid": self.good,
            "broken": None if self.found.withheld else self.breach or None,
            **self.found.to_dict(),
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Answer and print. Returns 0 if every answer keeps the rules, 1 if not, else as `Parser`."""
    show_builds()
    try:
        options = _parser().parse_args(argv)
        watching = Watching(options) if is_watched(options) else None
        puzzles = _puzzles(options)
        path = options.model if options.model is not None else newest_run()
        loaded = load_or_stop(SHIPPED if path is None else path, options)
        if path is None:
            say(f"answered by the model that comes with trm_fast: no run in ./{RUNS}", err=True)
        elif options.model is None:
            say(f"answered by {loaded.folder} ({loaded.weights} weights)", err=True)
        _check_sizes(puzzles, loaded)
        answers = _answer(puzzles, loaded, options, watching or predict)
        _write(_shown(answers, loaded, options), options.output)
        if watching is not None:
            watching.draw()
    except CommandError as error:
        say(f"trm-fast solve: {error}", err=True)
        return error.status
    broken = sum(not answer.good for answer in answers)
    if broken and not is_asked(options) and sys.stderr.isatty():
        say(
            f"{broken} of {len(answers)} not solved: --preset restarts looks at symmetric images "
            "of a puzzle until the model is sure of one",
            err=True,
        )
    return BROKEN if broken else 0


def _parser() -> Parser:
    parser = Parser(
        "trm-fast solve",
        "Answer Sudoku puzzles of 16, 36 or 81 characters, row by row; 0 . _ or * is a blank. Or\n"
        "mazes, n lines of n characters: # wall, space or . open, S start, G goal.\n"
        "Shown are the answer with the clues kept, whether it keeps the rules, and how sure the\n"
        "model is.",
    )
    parser.add_argument("puzzles", nargs="*", metavar="PUZZLE", help="a puzzle on one line")
    parser.add_argument(
        "-i",
        "--input",
        metavar="FILE",
        help="puzzles one a line, one row a line, or CSV (- is standard input, which is also read "
        "when there are no arguments)",
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="write the answers there")
    parser.add_argument(
        "-m",
        "--model",
        metavar="CHECKPOINT",
        help=f"a run folder, RUN/last, RUN/best or RUN/step_N (default: newest in ./{RUNS}; with "
        f"none there, `{SHIPPED}`, the 9x9 Sudoku model that comes with trm_fast)",
    )
    parser.add_argument(
        "--unsafe-load", action="store_true", help="no effect: nothing in a file is ever run"
    )
    parser.add_argument(
        "--abstain",
        type=share,
        metavar="C",
        help="give no answer where the confidence is below C, from 0 to 1 (default: 0)",
    )
    add_options(parser)
    parser.add_shared()
    add_reasoning(parser)
    return parser


def newest_run(root: str | os.PathLike[str] = RUNS) -> Path | None:
    """The run folder below `root` whose `last` checkpoint was written last; None without a run."""
    found: list[tuple[float, Path]] = []
    for folder, names, files in os.walk(root):
        # A run's own folders hold no runs.
        names[:] = [name for name in names if not name.startswith((".", "step_"))]
        if "last" in files:
            pointer = Path(folder) / "last"
            found.append((pointer.stat().st_mtime, pointer.parent))
    return max(found)[1] if found else None


def _puzzles(options: argparse.Namespace) -> list[Puzzle] | list[Maze]:
    """The puzzles of the arguments, then those of the file or stdin: Sudoku, or mazes."""
    status = USAGE
    try:
        if any(looks_like_mazes(text) for text in options.puzzles):
            mazes = [
                maze
                for number, text in enumerate(options.puzzles, 1)
                for maze in parse_mazes(text, f"argument {number}", numbered=False)
            ]
            if options.input is not None:
                mazes += parse_mazes(*_read(options.input))
            return mazes
        puzzles = parse_arguments(options.puzzles)
        status = UNREADABLE
        if options.input is not None or not options.puzzles:
            text, name = _read(options.input)
            if not puzzles and looks_like_mazes(text):
                return parse_mazes(text, name)
            if "," in text.partition("\n")[0] and "#" in text:
                raise PuzzleError(
                    f"{name}: mazes are read as lines of text, not as CSV; trm-fast data maze "
                    "--source FILE and trm-fast evaluate --data DIR take one"
                )
            puzzles += parse_text(text, name)
    except SizeError as error:
        raise CommandError(MISMATCH, error) from None
    except PuzzleError as error:
        raise CommandError(status, error) from None
    if not puzzles:
        raise CommandError(USAGE, "no puzzle given: 81 characters as argument, -i FILE, or stdin")
    return puzzles


def _read(path: str | None) -> tuple[str, str]:
    """(text, name for errors) of a file or of stdin, which is not waited for at a terminal."""
    try:
        if path is not None and path != "-":
            return Path(path).read_bytes().decode("utf-8"), path
        if path is None and (sys.stdin is None or sys.stdin.isatty()):
            return "", "stdin"
        return sys.stdin.read(), "stdin"
    except FileNotFoundError:
        raise CommandError(USAGE, f"{path}: no such file") from None
    except OSError as error:
        raise CommandError(UNREADABLE, f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise CommandError(UNREADABLE, f"{path or 'stdin'}: not UTF-8 text") from None


def _check_sizes(puzzles: Sequence[Puzzle] | Sequence[Maze], loaded: Loaded) -> None:
    config = loaded.model.config
    mazes = isinstance(puzzles[0], Maze)
    what, side = ("maze", maze_side(config)) if mazes else ("Sudoku", sudoku_side(config))
    if side is None:
        other = "Sudoku" if mazes else "mazes"
        answers = f", it answers {other}" if (sudoku_side if mazes else maze_side)(config) else ""
        raise CommandError(
            MISMATCH,
            f"{loaded.folder}: not a {what} model{answers} ({config.seq_len} tokens of "
            f"{config.vocab_size} values)",
        )
    for puzzle in puzzles:
        if len(puzzle.cells) != config.seq_len:
            raise CommandError(
                MISMATCH,
                f"{puzzle.place}: {len(puzzle.cells)} characters, the model {loaded.folder} "
                f"answers boards of {config.seq_len}; -m CHECKPOINT names another",
            )


def _answer(
    puzzles: Sequence[Puzzle] | Sequence[Maze],
    loaded: Loaded,
    options: argparse.Namespace,
    asking: Callable[..., Answers],
) -> list[Solved] | list[SolvedMaze]:
    cells = np.stack([puzzle.cells for puzzle in puzzles]).astype(np.int32)
    mazes = isinstance(puzzles[0], Maze)
    plan = asked_reasoning(options, loaded)
    answers = asking(
        loaded.model,
        torch.from_numpy(cells if mazes else cells + 1),
        reasoning=plan,
        batch_size=options.batch_size,
    )
    tokens = answers.tokens.numpy()
    rollout = answers.rollout + 1
    columns = (answers.confidence, answers.step, rollout, answers.passes, answers.cut)
    facts = list(zip(*(column.tolist() for column in columns), strict=True))
    solved: list[Any] = []
    asked: list[Any] = list(puzzles)
    for index, puzzle in enumerate(asked):
        sure, step, turn, passes, cut = facts[index]
        found = Found(plan, sure, step, turn, passes, cut, options.abstain or 0.0)
        if isinstance(puzzle, Maze):
            path = with_walls(tokens[index], puzzle.cells)
            right, words = verdict(puzzle.cells, path)
            solved.append(SolvedMaze(puzzle, path, "" if right else words, found))
        else:
            digits = with_clues(tokens[index] - 1, puzzle.cells)
            solved.append(Solved(puzzle, digits, breaches(digits), found))
    return solved


def _shown(
    answers: Sequence[Solved | SolvedMaze], loaded: Loaded, options: argparse.Namespace
) -> str:
    if not options.json:
        return "\n\n".join(_named(answer, len(answers) > 1) for answer in answers)
    plan = asked_reasoning(options, loaded)
    document = {
        "checkpoint": str(loaded.folder),
        "optimizer_step": loaded.step,
        "weights": loaded.weights,
        "quantize": loaded.model.config.quantize,
        "supervision_steps": plan.depth,
        "reasoning": asdict(plan),
        "answers": [answer.to_dict() for answer in answers],
    }
    return json.dumps(document, indent=2)


def _named(answer: Solved | SolvedMaze, several: bool) -> str:
    """The answer as text; one that is withheld shows nothing of its puzzle, which is then named."""
    named = several and answer.found.withheld
    return f"{answer.puzzle.place}: {answer.text()}" if named else answer.text()


def _write(text: str, path: str | None) -> None:
    if path is None or path == "-":
        say(text)
        return
    try:
        Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise CommandError(
            USAGE, f"{path}: cannot be written ({error.strerror or error})"
        ) from None


if __name__ == "__main__":
    raise SystemExit(main())
