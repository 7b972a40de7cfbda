"""The data of a run: opened, and checked against the settings before the first step.

Owns `Splits`. Imported by trainer, runner and evaluate: what would stop a run at its first
evaluation, hours later, is an error here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trm_fast.config import TrainConfig
from trm_fast.data.dataset import PuzzleDataset, PuzzleDatasetConfig
from trm_fast.data.format import DataError, Metadata
from trm_fast.data.manifest import body_digest, read_manifest
from trm_fast.distributed import SINGLE, Ranks
from trm_fast.puzzle_rows import puzzles_of
from trm_fast.rules import rules_of, sudoku_side


@dataclass(frozen=True)
class Splits:
    """The data of a run: where it lies, its training and test metadata, which puzzles its
    identifiers are (`puzzles_of` the training data), and which bytes its arrays (`arrays_of`)."""

    paths: tuple[str, ...]
    paths_test: tuple[str, ...]
    train: Metadata
    test: Metadata | None
    puzzles: str | None
    arrays: str | None
    arrays_test: str | None

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, ready for JSON."""
        return {
            "data_paths": list(self.paths),
            "data_paths_test": list(self.paths_test),
            "metadata": self.train.to_dict(),
            "puzzles": self.puzzles,
            "arrays": self.arrays,
        }

    def changed(self, then: Mapping[str, Any]) -> list[str]:
        """What of the training data is not as `then`, an earlier `record`, has it, in words."""
        old, now = then.get("metadata"), self.record()["metadata"]
        if not isinstance(old, Mapping):
            return ["nothing says what it was"]
        words = [f"{k} {now[k]} (was {old.get(k)})" for k in now if now[k] != old.get(k)]
        others = {
            "puzzles": "identifiers.json names other puzzles",
            "arrays": "the arrays are of another build",
        }
        for name, other in others.items():
            was, mine = then.get(name), getattr(self, name)
            # Records of data without these files, and of several directories, do not say.
            if was is not None and mine is not None and was != mine:
                words.append(other)
        return words

    def unlike(self, other: Splits) -> list[str]:
        """What is not as in `other`, of another process of the run, in words."""
        test = self.test != other.test or self.arrays_test != other.arrays_test
        return self.changed(other.record()) + ["another test split"] * test


def open_splits(config: TrainConfig) -> Splits:
    """Read the metadata of the training data and, where there is one, of the test data.

    Raises:
        DataError: missing or malformed training data; malformed or empty test data, or test data
            unlike the training data; `data_paths_test` given without a test split.
        ValueError: augmentation or curriculum that does not fit the puzzles.
    """
    paths, paths_test = config.data_paths, config.data_paths_test or config.data_paths
    train = PuzzleDataset(dataset_config(config, paths, 1, test=False)).metadata
    _check_kind(config, train, paths[0])
    test = None
    if config.data_paths_test or all(Path(path, "test").is_dir() for path in paths_test):
        test = PuzzleDataset(dataset_config(config, paths_test, 1, test=True), "test").metadata
        _check_alike(config, train, test, paths_test[0])
    bytes_of = arrays_of(paths), arrays_of(paths_test, "test")
    return Splits(tuple(paths), tuple(paths_test), train, test, puzzles_of(paths), *bytes_of)


def arrays_of(paths: Sequence[str], split: str = "train") -> str | None:
    """A digest of a split's arrays, by their manifest; None without one, or of several
    directories."""
    manifest = read_manifest(paths[0]) if len(paths) == 1 else None
    files = manifest["files"] if manifest else {}
    own = {k: v for k, v in files.items() if k.startswith(f"{split}/") and k.endswith(".npy")}
    return body_digest(own) if own else None


def _check_kind(config: TrainConfig, train: Metadata, path: str) -> None:
    """Raise unless the puzzles are of a kind that the settings can change on the fly."""
    has = f"{path} has {train.seq_len} tokens of {train.vocab_size} values"
    if config.augment == "sudoku" and sudoku_side(train) is None:
        raise ValueError(f"augment=sudoku is for Sudoku: {has}")
    if config.augment == "dihedral" and rules_of(train) is None:
        # Of other puzzles it is not known that they may be turned: tasks of ARC must not.
        raise ValueError(f"augment=dihedral is for Sudoku and mazes: {has}")
    if config.augment == "dihedral" and sudoku_side(train) == 6:
        raise ValueError(f"augment=dihedral would turn the oblong boxes of 6x6 Sudoku: {path}")
    if config.curriculum > 0 and rules_of(train) is None:
        raise ValueError(f"curriculum is for Sudoku and mazes: {has}")
    others = {
        "arch=gated_mlp": config.arch.kind == "gated_mlp",
        "constraint_weight": config.constraint_weight > 0,
    }
    for key, used in others.items():
        if used and sudoku_side(train) is None:
            raise ValueError(f"{key} is for Sudoku: {has}")


def _check_alike(config: TrainConfig, train: Metadata, test: Metadata, path: str) -> None:
    """Raise unless the model of the training data can be measured on the test data."""
    if test.total_groups == 0:
        raise DataError(f"{path}: the test split has no puzzles")
    for name in ("seq_len", "vocab_size", "num_puzzle_identifiers"):
        ours, theirs = getattr(train, name), getattr(test, name)
        fits = ours == theirs
        if name == "num_puzzle_identifiers":  # without puzzle rows they are not looked at
            fits = theirs <= ours or config.arch.puzzle_emb_ndim == 0
        if not fits:
            raise DataError(f"{path}: {name} of the test split is {theirs}, in training {ours}")


def dataset_config(
    config: TrainConfig,
    paths: tuple[str, ...],
    epochs_per_iter: int,
    *,
    test: bool,
    ranks: Ranks = SINGLE,
) -> PuzzleDatasetConfig:
    """How this process of a run visits its training or its test data."""
    batch = config.global_batch_size
    return PuzzleDatasetConfig(
        seed=config.seed,
        dataset_paths=paths,
        global_batch_size=(config.eval_batch_size or batch) if test else batch,
        test_set_mode=test,
        epochs_per_iter=epochs_per_iter,
        rank=ranks.rank,
        num_replicas=ranks.world,
    )
