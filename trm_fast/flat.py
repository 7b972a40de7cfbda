"""Tensors that lie one after another in one buffer, so that one kernel serves all of them.

Owns the layout: `lay_out` makes it, `joined` finds it again. An elementwise operation over the
parameters, their gradients, averages and optimizer states is then one launch, and zeroing the
gradients one more. Imported by optimizers, the moving average and the training step; imports torch
only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["bits_sum", "joined", "lay_out"]

CHUNK = 1 << 24  # elements
ALIGNMENT = 256  # bytes: what allocators give, so that no kernel takes a slower path for a view


def lay_out(tensors: Sequence[Tensor], least: torch.dtype | None = None) -> list[Tensor]:
    """Zeros like the tensors, contiguous, those of each dtype one after another in one buffer.

    Args:
        tensors: on one device; any strides.
        least: a dtype that each one's is promoted with; None leaves them.
    """
    found: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        members = [i for i, t in enumerate(tensors) if t.dtype == dtype]
        new = dtype if least is None else torch.promote_types(dtype, least)
        places, end = _places([tensors[i].numel() for i in members], new.itemsize)
        buffer = torch.zeros(end, dtype=new, device=tensors[0].device)
        for i, place in zip(members, places, strict=True):
            found[i] = buffer[place : place + tensors[i].numel()].view(tensors[i].shape)
    return [found[i] for i in range(len(tensors))]


def joined(tensors: Sequence[Tensor]) -> list[Tensor]:
    """[one 1-d view over all of them, gaps included] if they lie as `lay_out` lays tensors of their
    shapes; else the tensors themselves. Gaps are zeros, and 0 is what every update makes of 0."""
    if len(tensors) < 2:
        return list(tensors)
    first = tensors[0]
    places, end = _places([t.numel() for t in tensors], first.element_size())
    storage, start = first.untyped_storage().data_ptr(), first.storage_offset()
    together = all(
        t.untyped_storage().data_ptr() == storage
        and t.dtype == first.dtype
        and t.storage_offset() == start + place
        and t.is_contiguous()
        for t, place in zip(tensors, places, strict=True)
    )
    return [first.detach().as_strided((end,), (1,), start)] if together else list(tensors)


def _places(counts: Sequence[int], itemsize: int) -> tuple[list[int], int]:
    """Where tensors of so many elements begin, in elements, and the end of the last one."""
    places, end = [], 0
    for count in counts:
        places.append(-(-end * itemsize // ALIGNMENT) * ALIGNMENT // itemsize)
        end = places[-1] + count
    return places, end


def bits_sum(tensors: Sequence[Tensor]) -> int:
    """A sum over all bits, in 62 bits: two lists of tensors of different values hardly have the
    same. Waits for the device."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    total = 0
    for t in tensors:
        bits = t.detach().reshape(-1).view(whole[t.element_size()])
        for part in bits.split(CHUNK):  # a sum in a wider dtype may copy what it adds up
            total = (total * 31 + int(part.sum(dtype=torch.int64))) % (1 << 62)
    return total
