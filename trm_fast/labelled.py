"""Labelled puzzles of a data set: which of them are measured on, and their numbers.

Owns that choice for everything that measures: boards without a label do not count, nor do those
behind the first so many of a set, of which no more is read then. Imported by `inference.py` and
what measures rollouts.

Dims legend: P puzzles, L tokens, B batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from trm_fast.data.dataset import PuzzleDataset
from trm_fast.data.format import IGNORE_LABEL_ID, PuzzleArrays
from trm_fast.distributed import SINGLE, Ranks

__all__ = ["Batches", "Labelled", "labelled_batches", "labelled_sets", "unlabelled"]

PART_BYTES = 1 << 27  # of the puzzles of a set that a process holds at a time
Batches = Iterable[tuple[str, dict[str, Tensor], int]]


@dataclass(frozen=True)
class Labelled:
    """P puzzles with labels: inputs and labels [P, L] int, identifiers [P] int, and their numbers
    [P] int64 in the whole set, all on the CPU."""

    inputs: Tensor
    labels: Tensor
    identifiers: Tensor
    numbers: Tensor

    def of(self, rows: slice | Tensor) -> Labelled:
        """Some of the puzzles."""
        return Labelled(*(t[rows] for t in vars(self).values()))

    def right(self, puzzles: Tensor, tokens: Tensor) -> Tensor:
        """Which answers [M, L] to puzzles [M] are the label wherever there is one, [M] bool."""
        labels = self.labels[puzzles]
        return ((tokens == labels) | (labels == IGNORE_LABEL_ID)).all(-1)


def labelled_batches(
    batches: Batches, max_puzzles: int | None = None, ranks: Ranks = SINGLE, numbered: bool = False
) -> Iterator[tuple[str, dict[str, Tensor], Tensor | None, int]]:
    """(set name, the rows of this process that count, as the Batch [B, ...], their numbers [B]
    int64 if `numbered`, size as it was), also where none of a batch does.

    Args:
        batches: (set name, Batch, size) as `PuzzleDataset` yields them; rows that are all padding
            (every label -100) do not count.
        max_puzzles: boards of each set, from its start; None is all.
        ranks: the processes among which each batch is divided.
    """
    before: dict[str, int] = {}  # labelled boards of a set so far, of all processes
    for name, batch, size in batches:
        rows = (batch["labels"] != IGNORE_LABEL_ID).any(-1).nonzero().squeeze(-1)
        first = 0
        if numbered or max_puzzles is not None:
            sizes = ranks.numbers(len(rows))
            first = before.setdefault(name, 0) + sum(sizes[: ranks.rank])
            before[name] += sum(sizes)
        if max_puzzles is not None:
            rows = rows[: max(0, max_puzzles - first)]
            if before[name] >= max_puzzles and isinstance(batches, PuzzleDataset):
                batches.skip_set()
        numbers = first + torch.arange(len(rows)) if numbered else None
        yield name, {key: value[rows] for key, value in batch.items()}, numbers, size


def labelled_sets(
    batches: Batches, max_puzzles: int | None = None, ranks: Ranks = SINGLE
) -> Iterator[tuple[str, Iterator[Labelled]]]:
    """Set by set its name and its puzzles of this process, numbered through all processes, a part
    at a time; the parts of a set are to be taken before the next set. Arguments as
    `labelled_batches`."""
    every = labelled_batches(batches, max_puzzles, ranks, numbered=True)
    for name, group in groupby(every, key=lambda item: item[0]):
        yield name, _parts((item[1:] for item in group), ranks.world)


def unlabelled(dataset: PuzzleDataset) -> list[str]:
    """The sets in which no board has a label."""
    ignored = dataset.metadata.ignore_label_id

    def labels(arrays: PuzzleArrays) -> bool:
        parts = range(0, len(arrays.labels), 1024)
        return any(bool((arrays.labels[p : p + 1024] != ignored).any()) for p in parts)

    return [name for name, arrays in dataset.sets.items() if not labels(arrays)]


def _parts(
    batches: Iterable[tuple[dict[str, Tensor], Tensor | None, int]], world: int
) -> Iterator[Labelled]:
    """All processes end a part behind the same batch: they number each batch together, and one that
    works on its part meanwhile would keep the others waiting."""
    held: list[Labelled] = []
    rows = 0  # of all processes
    for batch, numbers, size in batches:
        assert numbers is not None
        inputs, labels = batch["inputs"].cpu(), batch["labels"].cpu()
        held.append(Labelled(inputs, labels, batch["puzzle_identifiers"].cpu(), numbers))
        rows += size
        of_a_row = inputs.shape[1] * (inputs.itemsize + labels.itemsize)
        if rows * of_a_row >= PART_BYTES * world:
            yield _joined(held)
            held, rows = [], 0
    if held:
        yield _joined(held)


def _joined(parts: list[Labelled]) -> Labelled:
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return Labelled(*(torch.cat(column) for column in columns))
