"""Puzzle data: the formats on disk, the sampler, augmentation, and the builders.

Owns the public names of the data part, loaded at first use (the format and the Sudoku tools need no
torch). Anything may import it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trm_fast.data.augment import dihedral_augment, hand_back, sudoku_augment
    from trm_fast.data.dataset import Batch, PuzzleDataset, PuzzleDatasetConfig, from_arrays
    from trm_fast.data.format import (
        IGNORE_LABEL_ID,
        DataError,
        Metadata,
        PuzzleArrays,
        read_metadata,
        read_split,
        write_dataset,
    )

__all__ = [
    "IGNORE_LABEL_ID",
    "Batch",
    "DataError",
    "Metadata",
    "PuzzleArrays",
    "PuzzleDataset",
    "PuzzleDatasetConfig",
    "dihedral_augment",
    "from_arrays",
    "hand_back",
    "read_metadata",
    "read_split",
    "sudoku_augment",
    "write_dataset",
]

_HOME = {
    "Batch": "dataset",
    "PuzzleDataset": "dataset",
    "PuzzleDatasetConfig": "dataset",
    "dihedral_augment": "augment",
    "from_arrays": "dataset",
    "hand_back": "augment",
    "sudoku_augment": "augment",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'trm_fast.data' has no attribute {name!r}")
    value = getattr(import_module(f"trm_fast.data.{_HOME.get(name, 'format')}"), name)
    globals()[name] = value
    return value
