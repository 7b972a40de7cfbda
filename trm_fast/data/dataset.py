"""PuzzleDataset: the seeded, rank-aware, resumable sequence of batches of a puzzle data set.

Owns the order in which groups, puzzles and examples are visited, which is that of the official
code: one epoch visits every group once and takes one random puzzle of it. May be imported by the
inference and training modules; imports data.format and torch.

Batch: {"inputs" [B, L] int32, "labels" [B, L] int32 (IGNORE_LABEL_ID where ignored),
"puzzle_identifiers" [B] int32}, with B = global_batch_size / num_replicas examples of L tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from trm_fast.data.format import (
    IGNORE_LABEL_ID,
    DataError,
    Metadata,
    PuzzleArrays,
    check_arrays,
    one_puzzle_per_group,
    read_split,
)
from trm_fast.options import show

__all__ = ["Batch", "PuzzleDataset", "PuzzleDatasetConfig", "from_arrays"]

Batch: TypeAlias = dict[str, torch.Tensor]
Sets: TypeAlias = dict[str, PuzzleArrays]


@dataclass(frozen=True)
class PuzzleDatasetConfig:
    """How to visit a data set; field names are the official ones.

    global_batch_size counts examples over all ranks. test_set_mode visits every example once, in
    order; else an iteration is epochs_per_iter random epochs. Raises ValueError for bad values.
    """

    seed: int
    dataset_paths: tuple[str, ...]
    global_batch_size: int
    test_set_mode: bool
    epochs_per_iter: int = 1
    rank: int = 0
    num_replicas: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.dataset_paths, str | os.PathLike):
            raise ValueError(f"dataset_paths is {self.dataset_paths!r}, expected a list of paths")
        object.__setattr__(self, "dataset_paths", tuple(str(path) for path in self.dataset_paths))
        for name in ("global_batch_size", "epochs_per_iter", "num_replicas"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, expected at least 0")
        if not 0 <= self.rank < self.num_replicas:
            raise ValueError(f"rank {self.rank} is not in 0..{self.num_replicas - 1}")
        if self.global_batch_size % self.num_replicas:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of the "
                f"{self.num_replicas} replicas"
            )


def from_arrays(
    inputs: np.ndarray | torch.Tensor,
    labels: np.ndarray | torch.Tensor,
    *,
    vocab_size: int | None = None,
    puzzle_identifiers: np.ndarray | torch.Tensor | None = None,
    pad_id: int = 0,
    ignore_label_id: int | None = None,
) -> tuple[Metadata, PuzzleArrays]:
    """A user's own puzzles, one group each, for PuzzleDataset(..., data=from_arrays(...)).

    inputs, labels: [E, L] integers in 0..vocab_size-1 (default: the largest token + 1); labels may
    also hold IGNORE_LABEL_ID or ignore_label_id. puzzle_identifiers [E], default all 0 (blank).
    Raises DataError naming the array and the row.
    """
    arrays = one_puzzle_per_group(
        np.asarray(inputs),
        np.asarray(labels),
        None if puzzle_identifiers is None else np.asarray(puzzle_identifiers),
    )
    for name, tokens in (("inputs", arrays.inputs), ("labels", arrays.labels)):
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or not tokens.size:
            raise DataError(
                f"{name}: {tokens.dtype} of shape {tokens.shape}, expected integers [E, L]"
            )
    if vocab_size is None:
        vocab_size = 1 + max(int(arrays.inputs.max()), int(arrays.labels.max()), pad_id)
    identifiers = arrays.puzzle_identifiers
    metadata = Metadata(
        pad_id=pad_id,
        ignore_label_id=ignore_label_id,
        blank_identifier_id=0,
        vocab_size=vocab_size,
        seq_len=arrays.inputs.shape[1],
        num_puzzle_identifiers=int(identifiers.max()) + 1 if identifiers.size else 1,
        total_groups=len(arrays.inputs),
        mean_puzzle_examples=1.0,
        total_puzzles=len(arrays.inputs),
        sets=("all",),
    )
    check_arrays(metadata, arrays, "from_arrays: ")
    return metadata, arrays


class PuzzleDataset(IterableDataset):  # type: ignore[type-arg]
    """Iterating yields (set name, Batch, examples in the global batch without padding).

    Each `iter()` is one iteration: in training epochs_per_iter epochs over each set, a short last
    batch dropped; in test_set_mode every example in order, the last batch padded. The k-th of
    several paths adds its sets under names with k appended. Training order equals the official
    code's for the same seed; the choice of examples inside a puzzle of several has its own seeded
    stream, the same on all ranks. `data` gives arrays in memory instead of paths.

    Attributes:
        directories: by set name, the index of the path that the set is of.

    Raises DataError for data that cannot be used, when built.
    """

    def __init__(
        self,
        config: PuzzleDatasetConfig,
        split: str = "train",
        *,
        data: tuple[Metadata, PuzzleArrays | Mapping[str, PuzzleArrays]] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.split = split
        self.local_batch_size = config.global_batch_size // config.num_replicas
        if data is None:
            self.metadata, self._sets, self.directories = _read_paths(config.dataset_paths, split)
        else:
            sets = data[1]
            named = {"all": sets} if isinstance(sets, PuzzleArrays) else dict(sets)
            self.metadata, self._sets = data[0], named
            self.directories = dict.fromkeys(named, 0)
        if not config.test_set_mode:
            for name, arrays in self._sets.items():
                _check_nothing_empty(name, arrays)
        self._iters = 0
        # Where the iteration under way stands, and whether the next iter() must go on from there.
        self._position: dict[str, Any] | None = None
        self._resume = False

    @property
    def sets(self) -> Mapping[str, PuzzleArrays]:
        """The arrays by set name."""
        return self._sets

    def __iter__(self) -> Iterator[tuple[str, Batch, int]]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(
                f"PuzzleDataset in {worker.num_workers} workers would repeat batches: use 1 or 0"
            )
        start = self._position if self._resume else None
        self._resume = False
        return self._iter_test(start) if self.config.test_set_mode else self._iter_train(start)

    def state_dict(self) -> dict[str, Any]:
        """The position after the batch yielded last: ints and strings only.

        Together with the same config and data, load_state_dict makes the next batch the one that
        would have come. After a finished iteration the next one starts.
        """
        return {
            "iters": self._iters,
            "position": None if self._position is None else dict(self._position),
            "config": {
                "seed": self.config.seed,
                "global_batch_size": self.config.global_batch_size,
                "epochs_per_iter": self.config.epochs_per_iter,
                "test_set_mode": self.config.test_set_mode,
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`. Raises ValueError if it was taken under another config, or is no
        position in this data."""
        try:
            then, iters, position = dict(state["config"]), state["iters"], state["position"]
            counts, texts = [iters], []
            if position is not None:
                test = self.config.test_set_mode
                counts += [position["set"], position["first" if test else "next"]]
                texts = [] if test else [position["rng"], position["inner"]]
            whole = all(type(count) is int and 0 <= count < 2**63 for count in counts)
            if not whole or (position is not None and position["set"] >= len(self._sets)):
                raise ValueError("a count out of range")
            for text in texts:
                _words(text)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"the position in the data is damaged ({show(str(error))})") from None
        for name, now in self.state_dict()["config"].items():
            if then.get(name) != now:
                raise ValueError(
                    f"data position was saved with {name}={show(then.get(name))}, "
                    f"this run has {name}={now}"
                )
        self._iters = iters
        self._position = None if position is None else dict(position)
        self._resume = self._position is not None

    def choices(self) -> Iterator[tuple[str, np.ndarray]]:
        """One iteration over the training data, its batches by name only.

        Yields (set name, examples [B] int64 of that set), of which `collate` makes what `iter()`
        yields. Counts and resumes as `iter()` does.
        """
        start = self._position if self._resume else None
        self._resume = False
        yield from self._choices(start)

    def _choices(self, start: dict[str, Any] | None) -> Iterator[tuple[str, np.ndarray]]:
        names = list(self._sets)
        rank = self.config.rank
        mine = slice(rank * self.local_batch_size, (rank + 1) * self.local_batch_size)
        for set_index in range(start["set"] if start else 0, len(names)):
            name, arrays = names[set_index], self._sets[names[set_index]]
            if start is None:
                self._iters += 1
            sampler = _TrainSampler(arrays, self.config, self._iters, start)
            start = None
            while (chosen := sampler.draw()) is not None:
                self._position = {"set": set_index, **sampler.state()}
                yield name, chosen[mine]
        self._position = None

    def _iter_train(self, start: dict[str, Any] | None) -> Iterator[tuple[str, Batch, int]]:
        for name, examples in self._choices(start):
            yield name, self.collate(name, examples), self.config.global_batch_size

    def skip_set(self) -> None:
        """Go on with the next set in the test-mode iteration that is under way."""
        here = self._position
        if self.config.test_set_mode and here is not None and here["first"]:
            following = here["set"] + 1
            self._position = {"set": following, "first": 0} if following < len(self._sets) else None

    def _iter_test(self, start: dict[str, Any] | None) -> Iterator[tuple[str, Batch, int]]:
        names = list(self._sets)
        size = self.config.global_batch_size
        for set_index in range(start["set"] if start else 0, len(names)):
            name, arrays = names[set_index], self._sets[names[set_index]]
            total = len(arrays.inputs)
            first = start["first"] if start else 0
            start = None
            for begin in range(first, total, size):
                end = min(total, begin + size)
                local = begin + self.config.rank * self.local_batch_size
                examples = np.arange(local, max(local, min(local + self.local_batch_size, end)))
                self._position = {"set": set_index, "first": begin + size}
                yield name, self.collate(name, examples), end - begin
                if self._position is None or self._position["set"] > set_index:
                    break
        self._position = None

    def collate(self, name: str, examples: np.ndarray) -> Batch:
        """The Batch of examples [N] int of a set: ignored labels marked, padded to the local batch
        size."""
        arrays = self._sets[name]
        puzzles = np.searchsorted(arrays.puzzle_indices, examples, side="right") - 1
        missing = max(0, self.local_batch_size - len(examples))
        labels = arrays.labels[examples].astype(np.int32)
        if self.metadata.ignore_label_id is not None:
            labels[labels == self.metadata.ignore_label_id] = IGNORE_LABEL_ID
        parts = {
            "inputs": (arrays.inputs[examples].astype(np.int32), self.metadata.pad_id),
            "labels": (labels, IGNORE_LABEL_ID),
            "puzzle_identifiers": (
                arrays.puzzle_identifiers[puzzles].astype(np.int32),
                self.metadata.blank_identifier_id,
            ),
        }
        batch = {}
        for key, (values, pad) in parts.items():
            if missing:
                filler = np.full((missing, *values.shape[1:]), pad, np.int32)
                values = np.concatenate([values, filler])
            batch[key] = torch.from_numpy(values)
        return batch


class _TrainSampler:
    """Draws the global batches of one iteration over one set.

    The official order: a Philox generator seeded with seed + iters draws one permutation of the
    groups per epoch, then one integer per visited group, the puzzle. A puzzle that does not fit
    is cut at the end of the batch.
    """

    def __init__(
        self,
        arrays: PuzzleArrays,
        config: PuzzleDatasetConfig,
        iters: int,
        start: Mapping[str, Any] | None,
    ) -> None:
        seed = config.seed + iters
        self._rng = np.random.Generator(np.random.Philox(seed=seed))
        # Its own key, so that it never meets the stream above.
        self._inner = np.random.Generator(np.random.Philox(seed=[seed, 1]))
        groups = arrays.group_indices.size - 1
        self._order = np.concatenate(
            [self._rng.permutation(groups) for _ in range(config.epochs_per_iter)]
        )
        self._groups = arrays.group_indices.astype(np.int64)
        self._begin = arrays.puzzle_indices[:-1].astype(np.int64)
        self._sizes = np.diff(arrays.puzzle_indices.astype(np.int64))
        self._largest = int(self._sizes.max(initial=1))
        self._batch_size = config.global_batch_size
        self._next = 0
        if start is not None:
            self._next = int(start["next"])
            _set_state(self._rng, start["rng"])
            _set_state(self._inner, start["inner"])

    def state(self) -> dict[str, Any]:
        return {"next": self._next, "rng": _state(self._rng), "inner": _state(self._inner)}

    def draw(self) -> np.ndarray | None:
        """The examples of the next global batch, or None if there is no full one."""
        examples: list[np.ndarray] = []
        room = self._batch_size
        while room > 0:
            # As many groups as are needed whatever their puzzles' sizes, so none is drawn in vain.
            count = -(-room // self._largest)
            visited = self._order[self._next : self._next + count]
            if visited.size == 0:
                return None
            self._next += visited.size
            drawn = self._rng.integers(self._groups[visited], self._groups[visited + 1])
            sizes = self._sizes[drawn]
            taken = np.minimum(sizes, room - (np.cumsum(sizes) - sizes))
            examples.append(self._choose(drawn, sizes, taken))
            room -= int(taken.sum())
        return np.concatenate(examples)

    def _choose(self, drawn: np.ndarray, sizes: np.ndarray, taken: np.ndarray) -> np.ndarray:
        """`taken[i]` different examples of puzzle drawn[i], in random order, for all i."""
        if self._largest == 1:
            return self._begin[drawn]
        return np.concatenate(
            [
                begin + (self._inner.permutation(size)[:take] if size > 1 else np.zeros(1, int))
                for begin, size, take in zip(self._begin[drawn], sizes, taken, strict=True)
            ]
        )


def _state(rng: np.random.Generator) -> str:
    """The state of a Philox generator as a string: hexadecimal words separated by blanks."""
    state: Any = rng.bit_generator.state
    words = [*state["state"]["counter"], *state["state"]["key"], *state["buffer"]]
    words += [state["buffer_pos"], state["has_uint32"], state["uinteger"]]
    return " ".join(f"{int(word):x}" for word in words)


def _words(text: str) -> list[int]:
    """The numbers in what `_state` returned; ValueError for other text. NumPy does not check where
    in its buffer a generator is said to stand."""
    words = [int(word, 16) for word in text.split()]
    most = [2**64 - 1] * 10 + [4, 1, 2**32 - 1]
    if len(words) != 13 or not all(0 <= w <= m for w, m in zip(words, most, strict=True)):
        raise ValueError("no state of a generator")
    return words


def _set_state(rng: np.random.Generator, text: str) -> None:
    words = _words(text)
    rng.bit_generator.state = {
        "bit_generator": "Philox",
        "state": {
            "counter": np.array(words[0:4], np.uint64),
            "key": np.array(words[4:6], np.uint64),
        },
        "buffer": np.array(words[6:10], np.uint64),
        "buffer_pos": words[10],
        "has_uint32": words[11],
        "uinteger": words[12],
    }


def _read_paths(paths: tuple[str, ...], split: str) -> tuple[Metadata, Sets, dict[str, int]]:
    """Metadata over all paths and the sets of all, keyed <set>, <set>1, <set>2, ...; and the index
    of the path that each is of."""
    if not paths:
        raise DataError("no data directory given")
    loaded = [read_split(path, split) for path in paths]
    first = loaded[0][0]
    summed = ("num_puzzle_identifiers", "total_groups", "mean_puzzle_examples", "total_puzzles")
    for path, (other, _) in zip(paths, loaded, strict=True):
        for field in fields(Metadata):
            ours, theirs = getattr(first, field.name), getattr(other, field.name)
            # The official code sums the identifiers of equal data sets; unequal ones it refuses.
            if (field.name not in summed[1:]) and ours != theirs:
                raise DataError(
                    f"{path}: {field.name} is {theirs}, but {ours} in {paths[0]}; "
                    "data sets read together must agree"
                )
    puzzles = sum(meta.total_puzzles for meta, _ in loaded)
    examples = sum(meta.mean_puzzle_examples * meta.total_puzzles for meta, _ in loaded)
    merged = replace(
        first,
        num_puzzle_identifiers=sum(meta.num_puzzle_identifiers for meta, _ in loaded),
        total_groups=sum(meta.total_groups for meta, _ in loaded),
        total_puzzles=puzzles,
        mean_puzzle_examples=examples / puzzles if puzzles else 0.0,
    )
    names = [(name, k) for name in first.sets for k in range(len(loaded))]
    directories = {f"{name}{k or ''}": k for name, k in names}
    if len(directories) != len(names):
        raise DataError(f"{paths[0]}: sets {', '.join(first.sets)} of several paths: names collide")
    sets = {f"{name}{k or ''}": loaded[k][1][name] for name, k in names}
    return merged, sets, directories


def _check_nothing_empty(name: str, arrays: PuzzleArrays) -> None:
    for what, index in (("group", arrays.group_indices), ("puzzle", arrays.puzzle_indices)):
        empty = np.flatnonzero(np.diff(index.astype(np.int64)) == 0)
        if empty.size:
            raise DataError(
                f"{name}__{what}_indices.npy row {empty[0]}: an empty {what} cannot be trained on"
            )
    if arrays.group_indices.size < 2:
        raise DataError(f"{name}__group_indices.npy: no groups to train on")
