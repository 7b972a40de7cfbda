"""What of the answers to ARC test inputs the training data already shows.

Owns the leak report that the builder prints and writes. Imports data.arc_source and numpy only.

Two grids, or two pairs of grids, are equal up to symmetry if one of the eight symmetries of the
square and one permutation of the colours 1..9 make one the other, the same for both grids of a
pair: the augmentations that training data get. Two tasks are called equal up to symmetry if their
pairs are, each under a symmetry of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import numpy as np

from trm_fast.data.arc_source import Pair, Task

__all__ = ["Subset", "leak_report", "report_lines"]

_LISTED = 1000
_ASPECTS = ("pair", "input", "output")
_HOW = ("exact", "symmetric")


@dataclass(frozen=True)
class Subset:
    """One subset of tasks. role: "train" (all its pairs are trained on), "test" (its
    demonstrations are) or "compared" (none). solved: whether the outputs of its test inputs are
    known."""

    name: str
    tasks: Sequence[Task]
    role: str
    solved: bool = True


Form = dict[tuple[str, str], bytes]
"""Of a pair, by aspect and how: bytes that are equal where grids are."""


def leak_report(subsets: Sequence[Subset]) -> dict[str, Any]:
    """Where test pairs stand among the training pairs, and which tasks subsets share.

    Returns a dict for JSON: `test_pairs`, `training_pairs`; `in_training`, for `pair`, `input` and
    `output`, and in it for `exact` and `symmetric`, the number of test pairs found among the
    demonstrations of their `own_task` and among pairs of `other_tasks`; `found`, the places of the
    pairs and inputs among these (at most 1000); `overlap`, per two subsets that share tasks.
    """
    forms = [[[_forms(pair) for pair in task.pairs()] for task in s.tasks] for s in subsets]
    trained, tested = _by_use(subsets, forms)
    where: dict[tuple[str, str], dict[bytes, list[_Place]]] = {
        (aspect, how): defaultdict(list) for aspect in _ASPECTS for how in _HOW
    }
    for place, form in trained:
        for key, value in form.items():
            where[key][value].append(place)
    counts = {
        aspect: {how: {"own_task": 0, "other_tasks": 0} for how in _HOW} for aspect in _ASPECTS
    }
    found: list[dict[str, Any]] = []
    for place, form in tested:
        for (aspect, how), value in form.items():
            if aspect != "input" and not place.subset.solved:
                continue
            places = where[aspect, how].get(value, [])
            own = sum(other.task is place.task for other in places)
            counts[aspect][how]["own_task"] += own > 0
            counts[aspect][how]["other_tasks"] += len(places) > own
            if places and aspect != "output" and len(found) < _LISTED:
                found.append({"test": str(place), aspect: how, "in": [*map(str, places[:10])]})
    return {
        "test_pairs": len(tested),
        "training_pairs": len(trained),
        "in_training": counts,
        "found": found,
        "overlap": _overlaps(subsets, forms),
    }


@dataclass(frozen=True)
class _Place:
    """A pair: the one of this index in a part of a task."""

    subset: Subset
    task: Task
    part: str
    index: int

    def __str__(self) -> str:
        return f"{self.subset.name}/{self.task.name} {self.part} {self.index}"


def _by_use(
    subsets: Sequence[Subset], forms: list[list[list[Form]]]
) -> tuple[list[tuple[_Place, Form]], list[tuple[_Place, Form]]]:
    """The pairs that are trained on, and those that are tested."""
    trained: list[tuple[_Place, Form]] = []
    tested: list[tuple[_Place, Form]] = []
    for subset, of_subset in zip(subsets, forms, strict=True):
        if subset.role == "compared":
            continue
        for task, of_task in zip(subset.tasks, of_subset, strict=True):
            places = (
                _Place(subset, task, part, index)
                for part, pairs in task.parts.items()
                for index in range(len(pairs))
            )
            for place, form in zip(places, of_task, strict=True):
                held_out = subset.role == "test" and place.part == "test"
                (tested if held_out else trained).append((place, form))
    return trained, tested


def _overlaps(subsets: Sequence[Subset], forms: list[list[list[Form]]]) -> list[dict[str, Any]]:
    result = []
    for a, b in combinations_with_replacement(range(len(subsets)), 2):
        row: dict[str, Any] = {"subsets": [subsets[a].name, subsets[b].name]}
        names = [{task.name for task in subsets[k].tasks} for k in (a, b)]
        row["same_name"] = len(names[0] & names[1]) if a != b else 0
        for how in _HOW:
            pairs = [[[form["pair", how] for form in task] for task in forms[k]] for k in (a, b)]
            wholes = [[[b"".join(sorted(task))] for task in keys] for keys in pairs]
            equal, sharing = _matches(wholes, a == b), _matches(pairs, a == b)
            row[f"equal_{how}"], row[f"sharing_a_pair_{how}"] = len(equal), len(sharing)
            row[f"tasks_{how}"] = [
                f"{subsets[a].tasks[i].name} = "
                + ", ".join(subsets[b].tasks[j].name for j in sorted(others))
                for i, others in equal.items()
            ][:_LISTED]
        if any(value for key, value in row.items() if key != "subsets"):
            result.append(row)
    return result


def _matches(keys: list[list[list[bytes]]], within: bool) -> dict[int, set[int]]:
    """For the tasks of the first list that have a key in common with some of the second: which;
    within one subset only the later ones."""
    where: dict[bytes, set[int]] = defaultdict(set)
    for index, task in enumerate(keys[1]):
        for key in task:
            where[key].add(index)
    found = {}
    for index, task in enumerate(keys[0]):
        others = {j for key in task for j in where.get(key, ()) if not within or j > index}
        if others:
            found[index] = others
    return found


def _forms(pair: Pair) -> Form:
    """As the grids are, and up to symmetry: the least of their eight images, with the colours but
    0 numbered in the order of their appearance."""
    images = list(zip(*map(_images, pair), strict=True))
    result: Form = {}
    for aspect, grids in (("pair", slice(0, 2)), ("input", slice(0, 1)), ("output", slice(1, 2))):
        result[aspect, "exact"] = b"".join(bytes(g.shape) + g.tobytes() for g in pair[grids])
        result[aspect, "symmetric"] = min(_renumbered(image[grids]) for image in images)
    return result


def _images(grid: np.ndarray) -> list[np.ndarray]:
    """The grid under the eight symmetries of the square."""
    return [g[::down, ::right] for g in (grid, grid.T) for down in (1, -1) for right in (1, -1)]


def _renumbered(grids: Sequence[np.ndarray]) -> bytes:
    cells = b"".join(grid.tobytes() for grid in grids)
    order = [colour for colour in dict.fromkeys(cells) if colour]
    table = bytearray(range(256))
    for number, colour in enumerate(order, 1):
        table[colour] = number
    return bytes(side for grid in grids for side in grid.shape) + cells.translate(bytes(table))


def report_lines(report: dict[str, Any]) -> Iterable[str]:
    """The report as a few lines of text."""
    yield (
        f"leaks: of {report['test_pairs']} test pairs, found among {report['training_pairs']} "
        "training pairs"
    )
    yield f"  {'':<8}{'exactly':>22}{'up to symmetry':>24}"
    for aspect, rows in report["in_training"].items():
        shown = "".join(
            f"{'own task ' + str(rows[how]['own_task']):>14}, other {rows[how]['other_tasks']:>4}"
            for how in _HOW
        )
        yield f"  {aspect:<8}{shown}"
    for row in report["overlap"]:
        first, second = row["subsets"]
        where = f"of {first} and {second}" if first != second else f"within {first}"
        yield (
            f"  tasks {where}: {row['same_name']} of the same name, {row['equal_exact']} equal "
            f"({row['equal_symmetric']} up to symmetry), {row['sharing_a_pair_exact']} sharing a "
            f"pair ({row['sharing_a_pair_symmetric']} up to symmetry)"
        )
