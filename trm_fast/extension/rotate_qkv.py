"""rotate_qkv: rotary embedding on the queries and keys of packed qkv, and its backward.

A part of `deep_recursion` on CUDA, where attention itself is PyTorch's: no operation of the table,
no gradient of its own. Other devices, tests above all, take the plain formula below. Formula, of
the halves x1, x2 of a head: (x1 cos1 - x2 sin1, x2 cos2 + x1 sin2).

Dims legend: B batch, S tokens incl. prefix, H heads, K head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trm_fast.extension._common import EXTENSION
from trm_fast.kernels.registration import register

__all__: list[str] = []


def _fwd_plain(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """qkv [B,S,3*H*K], cos and sin [S,K] float32 -> q and k rotated, rounded once."""
    batch, tokens, width = qkv.shape
    split = qkv.view(batch, tokens, 3, heads, width // (3 * heads))
    t = split[:, :, :2].float()
    first, second = t.chunk(2, -1)
    turned = t * cos[:, None, None] + torch.cat((-second, first), -1) * sin[:, None, None]
    return torch.cat((turned.to(qkv.dtype), split[:, :, 2:]), 2).view(qkv.shape)


def _bwd_plain(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor | None, sin: Tensor | None
) -> Tensor:
    """dq, dk, dv [B,S,H,K] -> [B,S,3*H*K], dq and dk rotated back if there are tables."""
    if cos is not None and sin is not None:
        dq, dk = (_turned_back(d, cos[:, None], sin[:, None]) for d in (dq, dk))
    return torch.stack((dq, dk, dv), 2).flatten(2)


def _turned_back(d: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = (d.float() * sin).chunk(2, -1)
    return (d.float() * cos + torch.cat((second, -first), -1)).to(d.dtype)


def _fwd_fake(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    return torch.empty_like(qkv)


def _bwd_fake(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    return dq.new_empty(*dq.shape[:2], 3 * dq.shape[2] * dq.shape[3])


_fwd = register(
    EXTENSION,
    "rotate_qkv(Tensor qkv, Tensor cos, Tensor sin, int heads) -> Tensor",
    _fwd_fake,
    _fwd_plain,
)
_bwd = register(
    EXTENSION,
    "rotate_qkv_bwd(Tensor dq, Tensor dk, Tensor dv, Tensor? cos, Tensor? sin) -> Tensor",
    _bwd_fake,
    _bwd_plain,
)
