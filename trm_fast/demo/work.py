"""What the demo's page may ask for: its models, a puzzle, the frames of an answer.

Owns the checks of everything that comes from the page: sizes, numbers, texts. Whatever is wrong is
a RequestError of one line. Imported by the server; knows nothing of HTTP.

Dims legend: L tokens of a board, K rollouts.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trm_fast.answers import Answers
from trm_fast.board_view import ARC, MAZE, SUDOKU, BoardView, Glance, glances, kind_of, view_of
from trm_fast.data import maze_generator, sudoku_generator
from trm_fast.data.arc_source import NAME_SEPARATOR
from trm_fast.data.format import DataError, PuzzleArrays, read_split
from trm_fast.inference import watch
from trm_fast.loading import Loaded, supervision_depth
from trm_fast.mazes import maze_rows, parse_mazes
from trm_fast.options import printable
from trm_fast.puzzle_rows import read_identifiers
from trm_fast.puzzles import PuzzleError, SizeError, board_line, parse_text
from trm_fast.reasoning import PRESETS, Reasoning

__all__ = ["LIMITS", "Demo", "RequestError", "Served", "check_drawn", "parse_request"]

LIMITS = {"rollouts": 128, "depth": 128, "passes": 8192, "seconds": 120, "text": 20_000}
"""Most that a page may ask for; passes are rollouts times depth."""

SETTINGS = [field.name for field in fields(Reasoning) if field.name != "budget"]
CLUES = {  # shares of the cells, by the name of the difficulty
    "easy": (0.45, 0.6),
    "medium": (0.345, 0.4),
    "hard": (0.28, 0.34),
}
MOST_EXAMPLES = 2000
FRAME = re.compile("[|+\u2500-\u257f \t-]")  # what people draw around boards
MISSING = {
    SUDOKU: "No Sudoku model is loaded: trm-fast demo --model shipped has one.",
    MAZE: "No maze model is loaded: train one with trm-fast train preset=maze-mini, then "
    "start trm-fast demo --model RUN.",
    ARC: "No ARC model is loaded: build data with trm-fast data arc, train a model on it, then "
    "start trm-fast demo --model RUN.",
}


class RequestError(ValueError):
    """What was asked cannot be done: one printable line."""

    def __init__(self, message: object) -> None:
        super().__init__(printable(" ".join(str(message).split()))[:400])


@dataclass(frozen=True)
class Example:
    """A puzzle of a data set: tokens [L], the solution [L], its identifier and name."""

    inputs: np.ndarray
    label: np.ndarray
    identifier: int
    name: str


@dataclass(frozen=True)
class Served:
    """A model of the page.

    Attributes:
        examples: puzzles of its data set, for ARC.
        note: why there are none, or "".
    """

    loaded: Loaded
    kind: str
    examples: Sequence[Example] = ()
    note: str = ""

    @property
    def side(self) -> int:
        """Cells of a row of its boards."""
        return math.isqrt(self.loaded.model.config.seq_len)


def parse_request(data: bytes) -> dict[str, Any]:
    """The object that the body of a request is; RequestError for anything else."""
    try:
        asked = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise RequestError("the body is no JSON") from None
    if not isinstance(asked, dict):
        raise RequestError("the body must be a JSON object")
    return asked


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


class Demo:
    """The models of the page, and what it can ask of them.

    Raises:
        RequestError: a model that answers neither Sudoku nor mazes nor ARC.
    """

    def __init__(self, loaded: Sequence[Loaded]) -> None:
        self.served = [_served(one) for one in loaded]

    def models(self) -> dict[str, Any]:
        """Everything the page knows beforehand, ready for JSON."""
        there = {one.kind for one in self.served}
        return {
            "models": [_described(one) for one in self.served],
            "missing": {kind: line for kind, line in MISSING.items() if kind not in there},
            "presets": {name: _preset(name) for name in PRESETS},
            "defaults": _settings(Reasoning()),
            "limits": LIMITS,
        }

    def puzzle(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """A puzzle to be shown: of a text, a new one, or one of a data set.

        Args:
            asked: "model", a number, and one of "text", a puzzle as people write it; "seed", for a
                new one, with "level" for Sudoku; "example", the number of one of the data set.
        """
        _known(asked, ("model", "text", "seed", "level", "example"))
        served = self._model(asked)
        view, name = _view(served, asked)
        return {
            "kind": view.kind,
            "line": view.line(view.given),
            "cells": view.given.tolist(),
            "side": view.side,
            "box": list(view.box),
            "window": list(view.window),
            "solution": None if view.label is None else view.label.tolist(),
            "name": name,
        }

    def frames(self, asked: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """What is to be seen of an answer, step by step, the answer itself last.

        The first is {"start": ...}, then {"frame": ...}, then {"answer": ...}. Faults of what is
        asked are raised before the first.

        Args:
            asked: "model", "text" or "example" as in `puzzle`, and "settings" of `Reasoning`.
        """
        _known(asked, ("model", "text", "example", "settings"))
        served = self._model(asked)
        view, _ = _view(served, asked)
        reasoning = _reasoning(served, asked.get("settings", {}))
        identifier = served.examples[asked["example"]].identifier if "example" in asked else 0
        try:
            seen = watch(
                served.loaded.model,
                torch.from_numpy(view.given)[None],
                torch.tensor([identifier]),
                reasoning=reasoning,
            )
            first = next(seen)
        except ValueError as error:  # settings that are not for this model
            raise RequestError(error) from None
        yield {"start": {"rollouts": len(first.q), "depth": reasoning.depth, "cells": view.side**2}}
        steps = [0] * len(first.q)
        last = None
        for frame in itertools.chain([first], seen):
            shown = glances(view, frame)
            rows = [
                _row(view, glance) if glance.step > before else None
                for glance, before in zip(shown, steps, strict=True)
            ]
            steps = [glance.step for glance in shown]
            running = [glance.running for glance in shown]
            yield {"frame": {"number": frame.number, "rollouts": rows, "running": running}}
            last = frame.answer
        if last is not None:
            yield {"answer": _answer(view, last)}

    def _model(self, asked: Mapping[str, Any]) -> Served:
        return self.served[_index(asked, "model", len(self.served))]


def check_drawn(loaded: Loaded) -> str:
    """The kind of puzzle that a model answers; RequestError where it is none that is drawn."""
    config = loaded.model.config
    kind = kind_of(config)
    if kind is None:
        raise RequestError(
            f"{loaded.folder}: answers neither Sudoku nor mazes nor ARC ({config.seq_len} tokens "
            f"of {config.vocab_size} values)"
        )
    return kind


def _served(loaded: Loaded) -> Served:
    kind = check_drawn(loaded)
    if kind != ARC:
        return Served(loaded, kind)
    data = loaded.config.get("data") or {}
    paths = [*(data.get("data_paths_test") or ()), *(data.get("data_paths") or ())]
    if not paths:
        return Served(loaded, kind, note="The checkpoint names no data set to take examples from.")
    try:
        return Served(loaded, kind, _examples(loaded, str(paths[0])))
    except (DataError, OSError) as error:
        return Served(loaded, kind, note=f"No examples: {' '.join(str(error).split())[:300]}")


def _examples(loaded: Loaded, root: str) -> list[Example]:
    """Test examples of the tasks themselves, or of their images where there are no others."""
    metadata, sets = read_split(root, "test")
    config = loaded.model.config
    if (metadata.seq_len, metadata.vocab_size) != (config.seq_len, config.vocab_size):
        raise DataError(f"{root}: {metadata.seq_len} tokens of {metadata.vocab_size} values")
    known = Path(root, "identifiers.json").is_file()
    names = read_identifiers(root) if known else []
    found = list(_walk(sets, names, config.num_puzzle_identifiers))
    own = [one for one in found if NAME_SEPARATOR not in one.name]
    return (own or found)[:MOST_EXAMPLES]


def _walk(
    sets: Mapping[str, PuzzleArrays], names: Sequence[str], identifiers: int
) -> Iterator[Example]:
    for arrays in sets.values():
        ends = arrays.puzzle_indices
        for puzzle, identifier in enumerate(arrays.puzzle_identifiers.tolist()):
            name = names[identifier] if identifier < len(names) else f"puzzle {identifier}"
            for row in range(int(ends[puzzle]), int(ends[puzzle + 1])):
                asked = identifier if identifier < identifiers else 0
                yield Example(arrays.inputs[row], arrays.labels[row], asked, name)


def _described(served: Served) -> dict[str, Any]:
    loaded = served.loaded
    examples = [one.name for one in served.examples]
    return {
        "kind": served.kind,
        "side": served.side,
        "name": _short(loaded),
        "place": str(loaded.folder),
        "weights": loaded.weights,
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "depth": supervision_depth(loaded, None),
        "examples": examples,
        "note": served.note,
    }


def _short(loaded: Loaded) -> str:
    """What to call a checkpoint: the ends of its path."""
    place = loaded.folder
    parts = place.parts[-2:] if place.name.startswith("step_") else place.parts[-1:]
    return "/".join(parts)


def _preset(name: str) -> dict[str, Any]:
    """A preset's settings, by kind of puzzle."""
    kinds = {SUDOKU: "Sudoku", MAZE: "maze", ARC: "puzzle"}
    return {
        kind: _settings(PRESETS[name][word])
        for kind, word in kinds.items()
        if word in PRESETS[name]
    }


def _settings(reasoning: Reasoning) -> dict[str, Any]:
    return {name: getattr(reasoning, name) for name in SETTINGS}


def _known(asked: Mapping[str, Any], allowed: Sequence[str]) -> None:
    other = [key for key in asked if key not in allowed]
    if other:
        raise RequestError(f"unknown key {other[0]!r}; allowed: {', '.join(allowed)}")


def _index(asked: Mapping[str, Any], key: str, count: int) -> int:
    value = asked.get(key)
    if type(value) is not int or not 0 <= value < count:
        raise RequestError(f"{key} is {value!r}; 0 to {count - 1} are allowed")
    return value


def _view(served: Served, asked: Mapping[str, Any]) -> tuple[BoardView, str]:
    """The puzzle that is asked for, and its name."""
    config = served.loaded.model.config
    given = [key for key in ("text", "seed", "example") if key in asked]
    if len(given) != 1:
        raise RequestError("one of text, seed and example is needed")
    if given == ["example"]:
        if not served.examples:
            raise RequestError(served.note or f"a {served.kind} model has no examples")
        one = served.examples[_index(asked, "example", len(served.examples))]
        return view_of(config, one.inputs, one.label), one.name
    if served.kind == ARC:
        raise RequestError("ARC puzzles are examples of the data set: example is needed")
    if given == ["seed"]:
        seed = _index(asked, "seed", 1 << 32)
        return view_of(config, _new(served, seed, asked.get("level", "medium"))), f"seed {seed}"
    return view_of(config, _parsed(served, asked["text"])), ""


def _new(served: Served, seed: int, level: object) -> np.ndarray:
    if served.kind == MAZE:
        return maze_generator.generate(1, size=served.side, seed=seed)[0][0]
    if not isinstance(level, str) or level not in CLUES:
        raise RequestError(f"level is {level!r}; allowed: {', '.join(CLUES)}")
    low, high = (round(share * served.side**2) for share in CLUES[level])
    board = sudoku_generator.generate(1, clues=(low, high), size=served.side, seed=seed)[0][0]
    return board.astype(np.int64) + 1


def _parsed(served: Served, text: object) -> np.ndarray:
    if not isinstance(text, str) or len(text) > LIMITS["text"]:
        raise RequestError(f"text must be a puzzle of at most {LIMITS['text']} characters")
    try:
        if served.kind == MAZE:
            puzzles: list[Any] = parse_mazes(text.strip("\r\n"), "puzzle", numbered=False)
        else:
            lines = [FRAME.sub("", line) for line in text.splitlines()]
            puzzles = _sudoku(lines, served.side**2)
    except (PuzzleError, ValueError) as error:
        raise RequestError(error) from None
    if len(puzzles) != 1:
        raise RequestError(f"puzzle: {len(puzzles) or 'no'} puzzles, one is asked for")
    cells = puzzles[0].cells.astype(np.int64)
    if len(cells) != served.side**2:
        raise RequestError(
            f"puzzle: {len(cells)} cells, the model answers boards of {served.side**2}"
        )
    return cells if served.kind == MAZE else cells + 1


def _sudoku(lines: Sequence[str], cells: int) -> list[Any]:
    """Puzzles of lines, for a model of boards of so many cells; of one line errors name none."""
    filled = [line for line in lines if line.strip()]
    try:
        return list(parse_text("\n".join(lines), "puzzle"))
    except SizeError as error:
        if len(filled) != 1:
            raise
        raise PuzzleError(f"{len(filled[0].strip())} characters: a board has {cells}") from error
    except PuzzleError as error:
        if len(filled) != 1:
            raise
        raise PuzzleError(re.sub("^puzzle:[0-9]+: ", "", str(error))) from error


def _reasoning(served: Served, settings: object) -> Reasoning:
    if not isinstance(settings, dict):
        raise RequestError("settings must be an object")
    _known(settings, SETTINGS)
    try:
        reasoning = Reasoning(**settings, budget=LIMITS["seconds"])
    except (ValueError, TypeError, OverflowError) as error:
        raise RequestError(error) from None
    depth = supervision_depth(served.loaded, reasoning.depth)
    for name, value in (
        ("depth", depth),
        ("rollouts", reasoning.rollouts),
        ("passes", depth * reasoning.rollouts),
    ):
        if value > LIMITS[name]:
            more = " (rollouts times depth)" if name == "passes" else ""
            raise RequestError(f"{name}{more} is {value}; at most {LIMITS[name]} are allowed here")
    return Reasoning(**{**_settings(reasoning), "depth": depth}, budget=LIMITS["seconds"])


def _row(view: BoardView, glance: Glance) -> dict[str, Any]:
    sure = np.nan_to_num(glance.certainty)
    return {
        "cells": glance.cells.tolist(),
        "window": list(view.window_of(glance.cells)),
        "sure": (sure * 100).round().astype(int).tolist(),  # per cent
        "broken": np.flatnonzero(glance.broken).tolist(),
        "q": glance.q if math.isfinite(glance.q) else None,
        "step": glance.step,
        "valid": glance.valid,
        "words": glance.words,
    }


def _answer(view: BoardView, answer: Answers) -> dict[str, Any]:
    cells = view.cells(answer.tokens[0].numpy())
    valid, words = view.judge(cells)
    q = float(answer.q[0])
    text = board_line(cells - 1) if view.kind == SUDOKU else view.line(cells)
    return {
        "cells": cells.tolist(),
        "window": list(view.window_of(cells)),
        "line": maze_rows(cells) if view.kind == MAZE else text,
        "broken": np.flatnonzero(view.broken(cells)).tolist(),
        "q": q if math.isfinite(q) else None,
        "step": int(answer.step[0]),
        "rollout": int(answer.rollout[0]),
        "passes": int(answer.passes[0]),
        "valid": valid,
        "words": words,
    }
