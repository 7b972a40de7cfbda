"""Normal numbers for whole states, by counter and at the cost of a few operations each.

Owns the noise that training adds to states and the states it starts from. `philox.Draws` gives each
row of the global batch the start of a stream, and the stream is SplitMix64: its n-th number is a
function of start and n alone, a tenth of the work of Philox. So what is drawn depends on seed,
optimizer step, row, field and place, not on how a batch is divided or when a run was taken up.
Imported by the model and the training step; imports torch only.

Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".

Dims legend: B rows of a batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["WORDS", "normal", "starts", "truncated_normal"]

WORDS = 2  # of Draws for the start of a row's stream
# 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9 and 0x94D049BB133111EB as signed numbers: products of
# 64-bit integers wrap around, which leaves all of their bits as they should be.
_GAMMA, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685
_FIELD = 1 << 32  # numbers of a stream that one field may take


def starts(words: Tensor) -> Tensor:
    """Where the rows' streams begin, [B] int64, of words [B, 2] int64 in [0, 2**32)."""
    return (words[:, 0] << 32) + words[:, 1]


def _mixed(number: Tensor) -> Tensor:
    """SplitMix64's function of its counter, int64 of any shape; shifts fill with zeros there."""
    number = (number ^ (number >> 30 & (1 << 34) - 1)) * _FIRST
    number = (number ^ (number >> 27 & (1 << 37) - 1)) * _SECOND
    return number ^ (number >> 31 & (1 << 33) - 1)


def _uniform(streams: Tensor, field: int, count: int) -> Tensor:
    """[B, count] float32 in (0, 1), the middles of 2**16 equal parts; count is a multiple of 4."""
    places = torch.arange(1, count // 4 + 1, device=streams.device) + field * _FIELD
    parts = _mixed(streams[:, None] + places * _GAMMA).view(torch.int16)  # four of each number
    return parts.float().mul_(2.0**-16).add_(0.5 + 2.0**-17)


def _shaped(drawn: Tensor, like: Tensor) -> Tensor:
    count = math.prod(like.shape[1:])
    return drawn[:, :count].view(like.shape).to(like.dtype)


def normal(streams: Tensor, field: int, like: Tensor) -> Tensor:
    """Standard normal numbers of the shape [B, ...], dtype and device of `like`.

    Args:
        streams: of `starts`, [B] int64.  field: which of a row's numbers, a natural number.

    Box and Muller's transform of pairs of 16-bit numbers: nothing is beyond 4.9.
    """
    count = -(-math.prod(like.shape[1:]) // 8) * 8
    first, second = _uniform(streams, field, count).chunk(2, dim=-1)
    radius, angle = (first.log() * -2).sqrt_(), second * (2 * math.pi)
    return _shaped(torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1), like)


def truncated_normal(streams: Tensor, field: int, like: Tensor) -> Tensor:
    """The same of a normal that is cut at two sigma and has deviation 1 then, as initial states are
    drawn (`layers.truncated_normal_`)."""
    edge = math.erf(math.sqrt(2))
    sigma = (1 - 4 * math.exp(-2) / (math.sqrt(2 * math.pi) * edge)) ** -0.5
    count = -(-math.prod(like.shape[1:]) // 4) * 4
    places = _uniform(streams, field, count).mul_(2).sub_(1).mul_(edge)
    return _shaped(places.erfinv_().mul_(math.sqrt(2) * sigma), like)
