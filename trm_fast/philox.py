"""Random numbers by counter: what is drawn depends on its place, not on what was drawn before.

Owns Philox-4x32-10 in integer operations of PyTorch: no rounding on any device, nothing that a
CUDA graph could not replay, and no state to save. A number is named by seed, purpose, optimizer
step, row of the global batch and position in the row, so that a resumed run and a run on another
number of processes draw the same. Imported by the modules of the training step; imports torch only.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Draws", "integers", "permutations", "philox", "uniform"]

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_ROUNDS = 10


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Four words [...] int64 in [0, 2**32) for each counter.

    Args:
        counter: four words, int64 in [0, 2**32), of shapes that broadcast.  key: two words.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    # In pairs, for half as many operations: the words multiplied, and those they are mixed into.
    factors, others = torch.stack([c0, c2]), torch.stack([c1, c3])
    multipliers, keys = (
        torch.stack([torch.full_like(c0, value) for value in pair]) for pair in (_MULTIPLIERS, key)
    )
    steps = torch.stack([torch.full_like(c0, value) for value in _KEY_STEPS])
    for _ in range(_ROUNDS):
        # 64-bit products wrap around, which leaves all of their bits as they should be.
        product = (factors * multipliers).flip(0)
        factors = (product >> 32 & _WORD).bitwise_xor_(others).bitwise_xor_(keys)
        others = product.bitwise_and_(_WORD)
        keys = (keys + steps).bitwise_and_(_WORD)
    return [factors[0], others[0], factors[1], others[1]]


@dataclass(frozen=True)
class Draws:
    """The random numbers of one optimizer step.

    Args:
        seed: of the run, in [0, 2**64).
        step: optimizer step, 0-d int64 in [0, 2**32); on the device, so that a graph can count it.
        rows: which rows of the global batch are drawn for, [B] int64 in [0, 2**32).
        counts: words of a row by purpose (a number below 2**16, which keeps uses apart). What is
            drawn for one purpose does not depend on the others; all are made at once.
    """

    seed: int
    step: Tensor
    rows: Tensor
    counts: Mapping[int, int]

    @cached_property
    def _words(self) -> dict[int, Tensor]:
        device = self.rows.device
        blocks = {purpose: -(-count // 4) for purpose, count in self.counts.items()}
        position = torch.cat(
            [torch.arange(n, device=device) + (purpose << 16) for purpose, n in blocks.items()]
        )
        counter = (self.step.new_zeros(()), self.step, self.rows[:, None], position)
        words = torch.stack(philox(counter, (self.seed & _WORD, self.seed >> 32)), dim=-1)
        parts = words.split(list(blocks.values()), dim=1)
        return {
            purpose: part.flatten(1)[:, : self.counts[purpose]]
            for purpose, part in zip(blocks, parts, strict=True)
        }

    def words(self, purpose: int) -> Tensor:
        """[B, counts[purpose]] int64 in [0, 2**32)."""
        return self._words[purpose]


def uniform(words: Tensor) -> Tensor:
    """float32 of the same shape, multiples of 2**-24 in [0, 1)."""
    return (words >> 8).float() * 2.0**-24


def integers(words: Tensor, low: int, high: int) -> Tensor:
    """int64 of the same shape in [low, high), of at most 2**16 values: even to 2**-16 of each."""
    return low + (words * (high - low) >> 32)


def permutations(words: Tensor) -> Tensor:
    """words [..., N] -> int64 [..., N]: each row a permutation of 0..N-1."""
    return words.argsort(dim=-1, stable=True)
