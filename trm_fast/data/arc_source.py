"""ARC tasks as the Kaggle files hold them: read, every grid checked.

Owns Task, and what a grid may be. Imported by the builder, its leak report and the evaluator;
imports data.format and numpy only.

Files: `<prefix>_<subset>_challenges.json`, {task: {"train": [{"input", "output"}, ...], "test":
[{"input"}, ...]}}, and `<prefix>_<subset>_solutions.json`, {task: [output of each test input]}. A
grid is a list of 1 to 30 rows of 1 to 30 colours 0..9.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trm_fast.data.format import DataError, read_json

__all__ = [
    "COLOURS",
    "MAX_SIDE",
    "NAME_SEPARATOR",
    "Pair",
    "Task",
    "parse_tasks",
    "read_subset",
    "read_test_puzzles",
]

MAX_SIDE = 30
COLOURS = 10
NAME_SEPARATOR = "|||"
"""Between a task's name and its augmentation in the name of an augmented puzzle."""

_MAX_BYTES = 1 << 28
_MAX_NAME = 200
_PARTS = ("train", "test")

Pair = tuple[np.ndarray, np.ndarray]
"""Input and output grid, uint8 [rows, columns]."""


@dataclass(frozen=True)
class Task:
    """One task; `parts` holds the pairs of "train" and of "test" in the order of the file."""

    name: str
    parts: dict[str, list[Pair]]

    def pairs(self) -> Iterator[Pair]:
        """All pairs, in the order of the file."""
        return (pair for part in self.parts.values() for pair in part)

    def to_json(self) -> dict[str, Any]:
        """As a challenges file holds it, with the outputs of the test inputs."""
        return {
            part: [{"input": x.tolist(), "output": y.tolist()} for x, y in pairs]
            for part, pairs in self.parts.items()
        }


def read_subset(prefix: str, subset: str) -> tuple[list[Task], bool]:
    """The tasks of `<prefix>_<subset>_challenges.json`, and whether their solutions are there.

    Where there is no file of solutions, test inputs without an output get the 1x1 grid 0, as
    officially. Raises DataError naming file, task and place.
    """
    path = Path(f"{prefix}_{subset}_challenges.json")
    raw = _tasks_of(path)
    solutions_path = Path(f"{prefix}_{subset}_solutions.json")
    solved = os.path.isfile(solutions_path)
    if solved:
        _add_solutions(path, raw, solutions_path)
    return list(parse_tasks(path, raw, [[0]])), solved


def read_test_puzzles(path: Path) -> dict[str, Task]:
    """The tasks of a `test_puzzles.json` by name; DataError as `read_subset`."""
    return {task.name: task for task in parse_tasks(path, _tasks_of(path))}


def _tasks_of(path: Path) -> dict[str, Any]:
    if not os.path.isfile(path):  # False too for a name that is too long
        raise DataError(f"{path}: no such file")
    raw = read_json(path, _MAX_BYTES)
    if not isinstance(raw, dict):
        raise DataError(f"{path}: expected an object of tasks, got {_kind(raw)}")
    return raw


def _add_solutions(path: Path, raw: dict[str, Any], solutions_path: Path) -> None:
    """Put the outputs of the test inputs into the tasks as they were read."""
    solutions = _tasks_of(solutions_path)
    for name, task in raw.items():
        outputs = solutions.get(name)
        where = f"{solutions_path}: task {_shown(name)}"
        if not isinstance(outputs, list):
            raise DataError(f"{where}: expected a list of outputs, got {_kind(outputs)}")
        tests = task.get("test") if isinstance(task, dict) else None
        if not isinstance(tests, list) or len(tests) != len(outputs):
            count = len(tests) if isinstance(tests, list) else 0
            raise DataError(f"{where}: {len(outputs)} outputs for {count} test inputs in {path}")
        for example, output in zip(tests, outputs, strict=True):
            if isinstance(example, dict):
                example["output"] = output


def parse_tasks(path: Path, raw: dict[str, Any], missing: object = None) -> Iterator[Task]:
    """Tasks from parsed JSON, checked; `missing` stands for the absent output of a test input.

    Raises DataError naming path, task and place.
    """
    for name, task in raw.items():
        where = f"{path}: task {_shown(name)}"
        if not name or len(name) > _MAX_NAME or not name.isprintable() or NAME_SEPARATOR in name:
            raise DataError(
                f"{where}: a task's name is 1 to {_MAX_NAME} printable characters without "
                f"{NAME_SEPARATOR}"
            )
        if not isinstance(task, dict):
            raise DataError(f"{where}: expected an object, got {_kind(task)}")
        if odd := [key for key in task if key not in _PARTS]:
            raise DataError(f"{where}: {_shown(odd[0])} is neither train nor test")
        parts = {
            part: _pairs(f"{where} {part}", examples, missing if part == "test" else None)
            for part, examples in task.items()
        }
        if not any(parts.values()):
            raise DataError(f"{where}: no pairs")
        yield Task(name, parts)


def _pairs(where: str, examples: object, missing: object) -> list[Pair]:
    if not isinstance(examples, list):
        raise DataError(f"{where}: expected a list of pairs, got {_kind(examples)}")
    pairs = []
    for index, example in enumerate(examples):
        place = f"{where} pair {index}"
        if not isinstance(example, dict):
            raise DataError(f"{place}: expected an object, got {_kind(example)}")
        output = example.get("output", missing)
        pairs.append((_grid(f"{place} input", example.get("input")), _grid(place, output)))
    return pairs


def _grid(where: str, value: object) -> np.ndarray:
    """A grid of JSON as uint8 [rows, columns]; `where` of an output is that of its pair."""
    where = where if where.endswith("input") else f"{where} output"
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_SIDE:
        got = f"{len(value)} rows" if isinstance(value, list) else _kind(value)
        raise DataError(f"{where}: expected 1 to {MAX_SIDE} rows, got {got}")
    first = value[0]
    width = len(first) if isinstance(first, list) else 0
    for index, row in enumerate(value):
        if not isinstance(row, list) or not 1 <= len(row) <= MAX_SIDE:
            got = f"{len(row)} colours" if isinstance(row, list) else _kind(row)
            raise DataError(f"{where} row {index}: expected 1 to {MAX_SIDE} colours, got {got}")
        if len(row) != width:
            raise DataError(f"{where} row {index}: {len(row)} colours, the first row has {width}")
        for column, colour in enumerate(row):
            # Booleans are ints in Python, and NaN is a float that JSON readers let through.
            if type(colour) is not int or not 0 <= colour < COLOURS:
                raise DataError(
                    f"{where} row {index} column {column}: {_shown(colour)} is not a colour "
                    f"0..{COLOURS - 1}"
                )
    return np.array(value, np.uint8)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean"}
    numbers = {int: "a number", float: "a number", type(None): "nothing"}
    return (names | numbers).get(type(value), type(value).__name__)


def _shown(value: object) -> str:
    """A value of the file for an error message: short, on one line, printable."""
    if isinstance(value, (list, dict)):
        return _kind(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**20:
        return "a huge number"
    text = str(value)
    return ascii(text if len(text) <= 40 else text[:37] + "...")[1:-1]
