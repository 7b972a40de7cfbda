"""Puzzle rows for other puzzles than those they were trained on, by the puzzles' names.

Owns reading identifiers.json and the rule by which rows are carried over. Imported by interop,
splits, trainer, evaluate and the ARC evaluator.

Dims: N rows trained, M rows wanted, E width of a row.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from trm_fast.data.format import DataError, read_json, sha256

__all__ = ["carried_rows", "mean_rows", "puzzles_of", "read_identifiers"]

_FILE = "identifiers.json"
_MAX_BYTES = 1 << 30


def read_identifiers(path: str | Path) -> list[str]:
    """The puzzles' names by identifier, from a data directory or its identifiers.json.

    Raises DataError naming the file.
    """
    path = Path(path)
    file = path / _FILE if os.path.isdir(path) else path
    names = read_json(file, _MAX_BYTES)
    if not isinstance(names, list) or not all(type(name) is str for name in names):
        raise DataError(f"{file}: expected a list of names")
    return names


def puzzles_of(paths: Sequence[str]) -> str | None:
    """The sha256 of identifiers.json, equal where identifiers name the same puzzles; None where
    there is no such file, or several."""
    file = Path(paths[0], _FILE)
    return sha256(file) if len(paths) == 1 and file.is_file() else None


def mean_rows(rows: Tensor, count: int) -> Tensor:
    """[count, E], each the mean of rows [N, E]: the official rule for another number of puzzles."""
    return rows.mean(dim=0, keepdim=True).expand(count, -1)


def carried_rows(rows: Tensor, known: Sequence[str], wanted: Sequence[str]) -> tuple[Tensor, int]:
    """Rows [M, E] for the puzzles `wanted`: those that `known` names keep their row of rows [N, E],
    the others get the mean row. Also how many kept theirs.

    Raises ValueError where known does not name N rows.
    """
    if len(known) != len(rows):
        raise ValueError(f"{len(known)} identifiers name {len(rows)} puzzle rows")
    at = {name: index for index, name in enumerate(known)}
    pairs = [(to, at[name]) for to, name in enumerate(wanted) if name in at]
    result = mean_rows(rows, len(wanted)).clone()
    if pairs:
        to, of = torch.tensor(pairs).T
        result[to] = rows[of]
    return result, len(pairs)
