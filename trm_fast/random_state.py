"""PyTorch's random generators of a run: kept, and set again.

Only dropout draws from them; everything else that is random has its own counter. Imported by the
trainer.

Dims legend: R processes, S bytes of a generator's state.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trm_fast.distributed import Ranks

__all__ = ["random_state", "set_random_state"]


def random_state(device: torch.device, ranks: Ranks) -> dict[str, Tensor]:
    """States of the generators of host and device, uint8 [S], of one process; of several [R, S],
    in the first process, all of which must call it."""
    own = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        own["mps"] = torch.mps.get_rng_state()
    if ranks.world == 1:
        return own
    return {name: ranks.collected(state.unsqueeze(0)) for name, state in own.items()}


def set_random_state(saved: Mapping[str, Tensor], device: torch.device, ranks: Ranks) -> None:
    """Restore what `random_state` returned; a process that was not there keeps what it has."""
    own = {}
    for name, state in saved.items():
        rows = state.reshape(-1, state.shape[-1])
        if ranks.rank < len(rows):
            own[name] = rows[ranks.rank].clone()  # PyTorch reads it from its storage's beginning
    if "cpu" in own:
        torch.set_rng_state(own["cpu"])
    if device.type == "cuda" and "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"], device)
    elif device.type == "mps" and "mps" in own:
        torch.mps.set_rng_state(own["mps"])
