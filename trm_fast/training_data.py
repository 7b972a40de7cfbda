"""What a run trains on: the data set as the settings want it visited, and whose rows are whose.

Owns the epochs that are drawn at once, the place of the data, and the names by which puzzle rows of
earlier weights are found again. Imported by the trainer.
"""

from __future__ import annotations

import math

import torch

from trm_fast import memory
from trm_fast.config import TrainConfig
from trm_fast.data.dataset import PuzzleDataset
from trm_fast.data.feed import resident_bytes
from trm_fast.distributed import Ranks
from trm_fast.interop import trained_puzzles
from trm_fast.puzzle_rows import read_identifiers
from trm_fast.splits import Splits, dataset_config

__all__ = ["epochs_per_iteration", "kept_on_device", "puzzle_names", "train_dataset"]


def puzzle_names(
    config: TrainConfig, splits: Splits, rows: int
) -> tuple[list[str], list[str]] | None:
    """With load_identifiers: the names of the puzzles of load_checkpoint, and of this run's.

    Args:
        rows: puzzle rows of the model.

    Raises:
        ValueError: several data directories, or names that are not as many as the rows.
    """
    given, start = config.load_identifiers, config.load_checkpoint
    if given is None or start is None:
        return None
    if len(splits.paths) != 1:
        raise ValueError("load_identifiers is for runs on one data directory")
    own = read_identifiers(splits.paths[0])
    if len(own) != rows:
        raise ValueError(f"{len(own)} identifiers in {splits.paths[0]}: the rows are more")
    return trained_puzzles(start) if given == "auto" else read_identifiers(given), own


def epochs_per_iteration(config: TrainConfig, total_groups: int) -> int:
    """Epochs drawn at once: the evaluation interval, which decides the official order."""
    if config.steps is None:
        return config.eval_interval or config.epochs
    # An iteration drops its short last batch: make it many batches long for tiny data.
    return max(1, math.ceil(16 * config.global_batch_size / total_groups))


def train_dataset(config: TrainConfig, splits: Splits, ranks: Ranks) -> PuzzleDataset:
    """This process's part of the training data."""
    epochs = epochs_per_iteration(config, splits.train.total_groups)
    return PuzzleDataset(dataset_config(config, splits.paths, epochs, test=False, ranks=ranks))


def kept_on_device(dataset: PuzzleDataset, device: torch.device) -> bool:
    """Whether the data is kept there: on GPUs, where it takes a small part of the memory."""
    if device.type == "cpu":
        return False
    return resident_bytes(dataset) < memory.free_bytes(device) / 8
