"""The ARC score: answers to all images of a task vote for the answer to the task.

Owns ArcVoting, the evaluator that the official configuration calls `arc@ARC`. Imported by
`evaluators.py`; usable by itself, in one process or in each of several.

The prediction for an augmented puzzle is cut out of its canvas, its augmentation is undone, and it
counts as one vote for the grid so found, for the test input that is found the same way. Grids are
ranked by their number of votes, then by the mean halting probability of these, then by which came
first. pass@k: the part of the test inputs of a task for which the right grid is among the first k,
averaged over the tasks. Source: evaluators/arc.py of the official code; the differences are in
docs/arc.md.

Dims: N predictions, L = 900 tokens of a 30 x 30 canvas.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from trm_fast.data.arc_augment import CELLS, VOCABULARY, parse_name, undo
from trm_fast.data.arc_source import MAX_SIDE, Task, read_test_puzzles
from trm_fast.data.format import DataError, read_metadata
from trm_fast.durable import replace_text
from trm_fast.puzzle_rows import read_identifiers

__all__ = ["ArcVoting", "cut"]

PASS_KS = (1, 2, 5, 10, 100, 1000)
_COLOUR = 2  # the token of colour 0
_UNANSWERED = np.zeros((1, 1), np.uint8)


def cut(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns [N] of the grids that stand in the corner of canvases [N, 900].

    It is the largest rectangle from the corner that holds colours only; of several the one with
    fewest rows. Both are 0 where the corner is no colour.
    """
    canvas = tokens.reshape(-1, MAX_SIDE, MAX_SIDE)
    other = (canvas < _COLOUR) | (canvas >= VOCABULARY)
    runs = np.where(other.any(2), other.argmax(2), MAX_SIDE)  # colours at the start of each row
    widths = np.minimum.accumulate(runs, axis=1)
    areas = widths * np.arange(1, MAX_SIDE + 1)
    rows = areas.argmax(1)
    columns = widths[np.arange(len(rows)), rows]
    return np.where(columns > 0, rows + 1, 0), columns


@dataclass
class _Ballot:
    """The votes for one test input, in the order in which they came."""

    grids: dict[bytes, int] = field(default_factory=dict)
    chosen: array[int] = field(default_factory=lambda: array("i"))
    q: array[float] = field(default_factory=lambda: array("d"))

    def add(self, grid: bytes, q: float) -> None:
        self.chosen.append(self.grids.setdefault(grid, len(self.grids)))
        self.q.append(q)


Ballots = dict[tuple[str, bytes], _Ballot]


class ArcVoting:
    """Collects predictions for augmented puzzles and scores the tasks they belong to.

    Args:
        data_path: a data directory of `trm_fast.data.arc` or of the official builder.
        submission_K: attempts per test input in submission.json.
        pass_Ks: the k of pass@k.
        aggregated_voting: True lets the predictions of all evaluations of a run vote together, as
            the official default does: the score is then of no single checkpoint.

    Memory: 12 bytes per vote, and per different grid its cells in half a byte each; votes for
    anything but a test input of the data are not kept.

    Raises:
        DataError: identifiers.json or test_puzzles.json is missing or damaged.
        ValueError: an option that is no positive number.
    """

    outputs = ("inputs", "puzzle_identifiers", "preds", "q_halt_logits")

    def __init__(
        self,
        data_path: str | os.PathLike[str],
        *,
        submission_K: int = 2,
        pass_Ks: Sequence[int] = PASS_KS,
        aggregated_voting: bool = False,
    ) -> None:
        for name, values in (("submission_K", (submission_K,)), ("pass_Ks", tuple(pass_Ks))):
            if not values or any(type(v) is not int or v < 1 for v in values):
                raise ValueError(f"{name} must be whole numbers from 1, got {list(values)}")
        self.submission_K, self.pass_Ks = submission_K, tuple(pass_Ks)
        self.aggregated_voting = aggregated_voting
        root = Path(data_path)
        self._names = _image_names(root / "identifiers.json")
        _check_fits(root, len(self._names))
        self._tasks = read_test_puzzles(root / "test_puzzles.json")
        if not self._tasks:
            raise DataError(f"{root / 'test_puzzles.json'}: no tasks")
        self._wanted = {
            (name, _packed(x)) for name, task in self._tasks.items() for x, _ in _tests(task)
        }
        self._ballots: Ballots = {}
        self.unanswered = 0
        """Test inputs without any vote in the last `result`."""
        self.submission: dict[str, list[dict[str, Any]]] = {}
        """What the last `result` would submit."""

    def begin(self) -> None:
        """Start an evaluation: earlier votes are forgotten, unless they are to be aggregated."""
        if not self.aggregated_voting:
            self._ballots = {}

    def update(self, outputs: Mapping[str, Tensor]) -> None:
        """Take in a batch: inputs, preds [N, 900] tokens; puzzle_identifiers, q_halt_logits [N].

        Rows with the blank identifier 0 are padding. Raises ValueError for other shapes, and for
        identifiers that identifiers.json does not name.
        """
        inputs, preds, identifiers = (
            outputs[name].cpu().numpy() for name in ("inputs", "preds", "puzzle_identifiers")
        )
        if inputs.shape != (len(identifiers), CELLS) or preds.shape != inputs.shape:
            raise ValueError(
                f"ARC boards have {CELLS} tokens, got inputs {list(inputs.shape)} and "
                f"predictions {list(preds.shape)}"
            )
        qs = outputs["q_halt_logits"].to("cpu", torch.float64).sigmoid().tolist()
        sizes = [np.stack(cut(tokens), 1).tolist() for tokens in (inputs, preds)]
        for row, identifier in enumerate(identifiers.tolist()):
            if identifier == 0:
                continue
            if not 0 < identifier < len(self._names):
                raise ValueError(
                    f"puzzle identifier {identifier} is not among the {len(self._names)} of "
                    "identifiers.json"
                )
            name, symmetry, colours = parse_name(self._names[identifier])
            if name not in self._tasks:
                continue
            keys = []
            for tokens, size in zip((inputs, preds), sizes, strict=True):
                height, width = size[row]
                grid = tokens[row].reshape(MAX_SIDE, MAX_SIDE)[:height, :width] - _COLOUR
                keys.append(_packed(undo(grid.astype(np.uint8), symmetry, colours)))
            if (name, keys[0]) in self._wanted:
                self._ballots.setdefault((name, keys[0]), _Ballot()).add(keys[1], qs[row])

    def result(
        self, folder: Path | None = None, group: dist.ProcessGroup | None = None
    ) -> dict[str, float] | None:
        """`ARC/pass@k` for all k, from the votes of all processes; None on all but the first.

        Args:
            folder: where submission.json is written, {task: [{attempt_1, attempt_2}, ...]}.
            group: processes to gather from, where torch.distributed is initialised; a group of
                CPU tensors (gloo). None is all of them.
        """
        return self.count(self.gathered(group), folder)

    def gathered(self, group: dist.ProcessGroup | None = None) -> list[Ballots] | None:
        """The votes of all processes by rank, on the first of them; None on the others."""
        return _gathered(self._ballots, group)

    def count(
        self, parts: list[Ballots] | None, folder: Path | None = None
    ) -> dict[str, float] | None:
        """`result` from what `gathered` returned."""
        if parts is None:
            return None
        self.unanswered, self.submission = 0, {}
        passed = dict.fromkeys(self.pass_Ks, 0.0)
        for name, task in self._tasks.items():
            self.submission[name] = []
            tests = _tests(task)
            right = dict.fromkeys(self.pass_Ks, 0)
            for x, y in tests:
                ranked = _ranked(parts, (name, _packed(x)))
                self.unanswered += not ranked
                for k in self.pass_Ks:
                    right[k] += _packed(y) in ranked[:k]
                grids = [_unpacked(key) for key in ranked[: self.submission_K]] or [_UNANSWERED]
                grids += grids[:1] * (self.submission_K - len(grids))
                attempts = {f"attempt_{n}": grid.tolist() for n, grid in enumerate(grids, 1)}
                self.submission[name].append(attempts)
            for k, count in right.items():
                passed[k] += count / max(len(tests), 1)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_submission(folder / "submission.json", self.submission)
        return {f"ARC/pass@{k}": total / len(self._tasks) for k, total in passed.items()}


def write_submission(path: Path, submission: dict[str, Any]) -> None:
    """Write a submission as JSON, whole or not at all."""
    replace_text(path, json.dumps(submission))


def _image_names(path: Path) -> list[str]:
    names = read_identifiers(path)
    for name in names:
        try:
            parse_name(name)
        except ValueError as error:
            raise DataError(f"{path}: {error}") from None
    return names


def _check_fits(root: Path, names: int) -> None:
    """Raise unless boards and identifiers of the test split are such as can be voted on."""
    if not (root / "test").is_dir():
        return
    metadata = read_metadata(root, "test")
    if metadata.seq_len != CELLS:
        raise DataError(f"{root}: boards of {metadata.seq_len} tokens, those of ARC have {CELLS}")
    if metadata.num_puzzle_identifiers > names:
        raise DataError(
            f"{root / 'identifiers.json'}: {names} names for "
            f"{metadata.num_puzzle_identifiers} identifiers"
        )


def _tests(task: Task) -> list[tuple[np.ndarray, np.ndarray]]:
    return task.parts.get("test", [])


def _packed(grid: np.ndarray) -> bytes:
    """Rows, columns, and two cells in a byte: equal for equal grids."""
    cells = grid.ravel()
    even = np.zeros(cells.size + cells.size % 2, np.uint8)
    even[: cells.size] = cells
    return bytes(grid.shape) + (even[::2] * np.uint8(16) + even[1::2]).tobytes()


def _unpacked(key: bytes) -> np.ndarray:
    rows, columns = key[:2]
    both = np.frombuffer(key[2:], np.uint8)
    return np.stack([both >> 4, both & 15], 1).reshape(-1)[: rows * columns].reshape(rows, columns)


def _ranked(parts: Sequence[Ballots], key: tuple[str, bytes]) -> list[bytes]:
    """The grids voted for, best first; processes in order, the votes of each in order."""
    count: dict[bytes, int] = {}
    total: dict[bytes, float] = {}
    for ballots in parts:
        ballot = ballots.get(key)
        if ballot is None:
            continue
        grids = list(ballot.grids)
        for chosen, q in zip(ballot.chosen, ballot.q, strict=True):
            grid = grids[chosen]
            count[grid] = count.get(grid, 0) + 1
            total[grid] = total.get(grid, 0.0) + q
    # The sort is stable, so that of equals the one that came first stays first.
    return sorted(count, key=lambda grid: (count[grid], total[grid] / count[grid]), reverse=True)


def _gathered(ballots: Ballots, group: dist.ProcessGroup | None) -> list[Ballots] | None:
    """The votes of every process, on the first of them; None on the others."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return [ballots]
    if group is None and dist.get_backend() != "gloo":
        group = dist.new_group(backend="gloo")
    rank = dist.get_rank(group)
    parts: list[Any] | None = [None] * dist.get_world_size(group) if rank == 0 else None
    dist.gather_object(ballots, parts, group=group, group_dst=0)
    return parts
