"""Several latents of a board in training, of which the one with the lowest loss learns.

Owns that competition. All latents share question and answer; they differ in their initial values
and go on from there. After a supervision step the winner's answer is everybody's, and each latent
is kept. A trained model answers with the first of them and is a plain one then. Imported by
`model.py`. Source: Dillon 2026, "Speed is Confidence" (arXiv 2601.19085), K = 4.

Dims legend: B batch, K latents, S tokens incl. prefix, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from trm_fast.ops import Recursion

States = tuple[Tensor, ...]
Run = Callable[[Tensor, States, Recursion], States]

__all__ = ["competed"]


def competed(
    run: Run, x: Tensor, states: States, r: Recursion, losses: Callable[[Tensor], Tensor]
) -> States:
    """One supervision step of all latents; the winner's last cycle is made once more for gradients.

    Args:
        run: all cycles, (x [N, S, D], y and z [N, S, D], settings) -> y and z.
        x: [B, S, D].  states: y [B, S, D] and z [B, K, S, D].  r: settings of the recursion.
        losses: what the lowest of wins, y [B * K, S, D] -> [B, K].

    Returns:
        The winner's y with its gradient to x and the weights; all z without.
    """
    y, z = states
    batch, count = z.shape[:2]
    last = replace(r, H_cycles=1)
    with torch.no_grad():
        question = x.detach().repeat_interleave(count, 0)
        begun: States = (y.repeat_interleave(count, 0), z.flatten(0, 1))
        if r.H_cycles > 1:
            begun = run(question, begun, replace(r, H_cycles=r.H_cycles - 1))
        ended = run(question, begun, last)
        winner = losses(ended[0]).argmin(1)
        rows = torch.arange(batch, device=x.device) * count + winner
        chosen = tuple(state.index_select(0, rows) for state in begun)
    answer, _ = run(x, chosen, last)
    return answer, ended[1].unflatten(0, (batch, count))
