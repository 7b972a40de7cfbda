"""Training batches in tensors of fixed shape and place, filled without waiting for the device.

Owns where the data lies: all of it on the device, of which a step gathers its batch by a list of
examples (what a CUDA graph can replay), or on the host, from where each batch is copied. Imported
by the training step; imports data.dataset only.

Dims legend: B local batch, E examples, L tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trm_fast.data.dataset import Batch, PuzzleDataset

__all__ = ["Feed", "resident_bytes"]

CHUNK = 1 << 16  # examples converted at once


def resident_bytes(dataset: PuzzleDataset) -> int:
    """Memory that the data takes on a device."""
    tokens = _token_dtypes(dataset.metadata.vocab_size)
    row = sum(dtype.itemsize for dtype in tokens) * dataset.metadata.seq_len
    return sum(len(arrays.inputs) for arrays in dataset.sets.values()) * (row + 4)


class Feed:
    """The local batches of a data set, one at a time.

    Args:
        dataset: in training mode.  device: of the batches.
        resident: keep all of the data on the device.
    """

    def __init__(self, dataset: PuzzleDataset, device: torch.device, resident: bool) -> None:
        self.dataset, self.device, self.resident = dataset, device, resident
        size, length = dataset.local_batch_size, dataset.metadata.seq_len
        if resident:
            self._data = _on_device(dataset, device)
            self._offsets = _offsets(dataset)
            self._examples = torch.zeros(size, dtype=torch.int64, device=device)
        else:
            shapes = {"inputs": (size, length), "labels": (size, length)}
            self._batch = {
                name: torch.zeros(shape, dtype=torch.int32, device=device)
                for name, shape in {**shapes, "puzzle_identifiers": (size,)}.items()
            }

    def put(self, name: str, examples: np.ndarray) -> None:
        """Make examples [B] int64 of a set the batch; on the host, without waiting.

        Raises:
            ValueError: another number of examples than B.
        """
        if len(examples) != self.dataset.local_batch_size:
            raise ValueError(
                f"{len(examples)} examples were given, a batch has {self.dataset.local_batch_size}"
            )
        if self.resident:
            self._copy(self._examples, torch.from_numpy(examples + self._offsets[name]))
        else:
            for key, values in self.dataset.collate(name, examples).items():
                self._copy(self._batch[key], values)

    def batch(self) -> Batch:
        """The Batch that was put last; on the device, of which alone it is made."""
        if not self.resident:
            return dict(self._batch)
        return {
            name: values.index_select(0, self._examples).to(torch.int32)
            for name, values in self._data.items()
        }

    def _copy(self, place: Tensor, values: Tensor) -> None:
        if place.is_cuda:
            # Pinned memory is given back by its allocator only after the copy, so nobody waits.
            place.copy_(values.pin_memory(), non_blocking=True)
        else:
            place.copy_(values)


def _token_dtypes(vocab_size: int) -> tuple[torch.dtype, torch.dtype]:
    """The smallest for inputs, in 0..vocab_size-1, and labels, which -100 is among."""
    inputs = torch.uint8 if vocab_size <= 256 else torch.int32
    return inputs, torch.int8 if vocab_size <= 128 else torch.int32


def _offsets(dataset: PuzzleDataset) -> dict[str, int]:
    """Where the examples of each set begin, all sets one after another."""
    offsets, end = {}, 0
    for name, arrays in dataset.sets.items():
        offsets[name] = end
        end += len(arrays.inputs)
    return offsets


def _on_device(dataset: PuzzleDataset, device: torch.device) -> dict[str, Tensor]:
    """inputs, labels [E, L] and puzzle_identifiers [E] of all sets."""
    metadata, length = dataset.metadata, dataset.metadata.seq_len
    total = sum(len(arrays.inputs) for arrays in dataset.sets.values())
    inputs, labels = _token_dtypes(metadata.vocab_size)
    data = {
        "inputs": torch.empty(total, length, dtype=inputs, device=device),
        "labels": torch.empty(total, length, dtype=labels, device=device),
        "puzzle_identifiers": torch.empty(total, dtype=torch.int32, device=device),
    }
    for name, begin in _offsets(dataset).items():
        count = len(dataset.sets[name].inputs)
        for first in range(0, count, CHUNK):
            examples = np.arange(first, min(first + CHUNK, count))
            for key, values in dataset.collate(name, examples).items():
                rows = data[key][begin + first : begin + first + len(examples)]
                rows.copy_(values[: len(examples)].to(rows.dtype))
    return data
