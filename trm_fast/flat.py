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

__all__ = ["joined", "lay_out"]

ALIGNMENT = 256  # bytes: what allocators give, so that no kernel takes a slower path for a view


def lay_out(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Zeros of the tensors' shapes, contiguous, one after another in one buffer.

    Args:
        tensors: on one device; any strides.  dtype: of the new ones; None takes the first's.
    """
    if not tensors:
        return []
    dtype, device = dtype or tensors[0].dtype, tensors[0].device
    places, end = _places([t.numel() for t in tensors], dtype.itemsize)
    buffer = torch.zeros(end, dtype=dtype, device=device)
    return [
        buffer[place : place + t.numel()].view(t.shape)
        for place, t in zip(places, tensors, strict=True)
    ]


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
