"""Small ARC subsets in the Kaggle layout, and predictions to vote with; imported by tests.

The tasks are drawn by us: no file of a published collection is here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

SUBSETS = ("training", "evaluation", "concept")
Grid = list[list[int]]


@dataclass(frozen=True)
class Choice:
    """Options of a build that the official builder was run with too."""

    subsets: tuple[str, ...]
    test_set_name: str
    num_aug: int
    test_set_name2: str = "your_test_set"
    seed: int = 42
    puzzle_identifiers_start: int = 1


CHOICES = {
    "as-arc-1": Choice(SUBSETS, "evaluation", 20),
    "unsolved": Choice(("training", "unsolved"), "unsolved", 3, seed=7),
    "two-test-sets": Choice(SUBSETS, "evaluation", 4, "concept", 3, 5),
    "plain": Choice(("training", "concept"), "concept", 0),
}
VOTED = "as-arc-1"


def _pair(draws: np.random.RandomState, colours: int, side: int) -> dict[str, Grid]:
    grid = draws.randint(0, colours, (draws.randint(1, side + 1), draws.randint(1, side + 1)))
    return {"input": grid.tolist(), "output": grid[::-1].tolist()}


def _task(draws: np.random.RandomState, tests: int, colours: int, side: int) -> dict[str, Any]:
    parts = {"train": draws.randint(1, 5), "test": tests}
    return {part: [_pair(draws, colours, side) for _ in range(n)] for part, n in parts.items()}


def make_subsets() -> dict[str, dict[str, Any]]:
    """Tasks by subset and name: of one colour and of ten, of 1x1 and of 30x30, some that equal
    images of themselves, one with its parts the other way round."""
    draws = np.random.RandomState(11)
    subsets: dict[str, dict[str, Any]] = {"training": {}, "evaluation": {}, "concept": {}}
    for index, (colours, side) in enumerate([(10, 30), (2, 3), (3, 4), (1, 5), (10, 8), (4, 12)]):
        subsets["training"][f"a{index:07x}"] = _task(draws, 1 + index % 2, colours, side)
    for index, (colours, side) in enumerate([(10, 9), (5, 30), (3, 3), (2, 2)]):
        subsets["evaluation"][f"e{index:07x}"] = _task(draws, 1 + index % 3, colours, side)
    for index in range(2):
        subsets["concept"][f"Order{index}"] = _task(draws, 3, 6, 7)
    one = {"input": [[1]], "output": [[1]]}
    full = {"input": [[5] * 30] * 30, "output": [[0, 5], [5, 0]]}
    subsets["training"]["single"] = {"test": [one], "train": [one]}
    subsets["training"]["full"] = {"test": [full, one], "train": [full]}
    # A task that a test set has too, and a test pair that a training task shows, turned.
    subsets["concept"]["a0000002"] = subsets["training"]["a0000002"]
    shown = subsets["evaluation"]["e0000001"]["test"][0]
    turned = {name: np.rot90(np.array(grid)).tolist() for name, grid in shown.items()}
    subsets["training"]["shows"] = {"train": [turned], "test": [one]}
    subsets["unsolved"] = {
        name: {"train": task["train"], "test": [{"input": p["input"]} for p in task["test"]]}
        for name, task in subsets["evaluation"].items()
    }
    return subsets


def write_subsets(folder: Path) -> str:
    """Challenges and solutions in `folder`; returns the prefix of the files."""
    for name, tasks in make_subsets().items():
        solutions = {}
        if name != "unsolved":
            solutions = {n: [pair["output"] for pair in t["test"]] for n, t in tasks.items()}
        challenges = {
            n: {
                part: [{"input": p["input"]} if part == "test" else p for p in pairs]
                for part, pairs in task.items()
            }
            for n, task in tasks.items()
        }
        (folder / f"arc_{name}_challenges.json").write_text(json.dumps(challenges))
        if solutions:
            (folder / f"arc_{name}_solutions.json").write_text(json.dumps(solutions))
    return str(folder / "arc")


def digests(root: Path, left_out: tuple[str, ...] = ("manifest.json", "leaks.json")) -> Any:
    """sha256, shortened, of every file below `root`."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in left_out
    }


def predictions(root: Path, batch: int = 32, seed: int = 5) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of made-up answers to the test split of a data set, with padding in the last.

    Wrong in one of a few ways, seldom right; some end nowhere, some are nothing; halting logits
    from a few values, so that votes tie.
    """
    draws = np.random.RandomState(seed)
    inputs, labels, ids, starts = (
        np.load(root / "test" / f"all__{name}.npy")
        for name in ("inputs", "labels", "puzzle_identifiers", "puzzle_indices")
    )
    ids = np.repeat(ids, np.diff(starts))
    preds = labels.copy()
    for row, kind in enumerate(draws.randint(0, 12, len(preds)).tolist()):
        if kind < 5:
            preds[row] = inputs[row]
        elif kind == 5:
            preds[row, draws.randint(0, 3)] = 1
        elif kind == 6:
            preds[row] = draws.randint(0, 12, 900)
        elif kind == 7:
            preds[row] = 0
        elif kind < 11:
            preds[row, :2] = np.maximum(preds[row, :2], 2) % 11 + 1
    logits = draws.choice([-1.5, 0.0, 0.25, 3.0], len(preds)).astype(np.float32)
    for start in range(0, len(preds), batch):
        rows = slice(start, start + batch)
        missing = max(0, start + batch - len(preds))
        yield {
            "inputs": torch.from_numpy(np.pad(inputs[rows], ((0, missing), (0, 0)))),
            "preds": torch.from_numpy(np.pad(preds[rows], ((0, missing), (0, 0)))),
            "puzzle_identifiers": torch.from_numpy(np.pad(ids[rows], (0, missing))),
            "q_halt_logits": torch.from_numpy(np.pad(logits[rows], (0, missing))),
        }
