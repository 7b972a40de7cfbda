"""The state of the recursion between supervision steps: reset, halting, and what is kept.

Owns `State` and the adaptive-computation rules around `Ops.deep_recursion`. Imported by
`model.py` and `trainer.py`. Source: Jolicoeur-Martineau 2025 (arXiv 2510.04871), sections 3-4; the
halting rules are those of Wang et al. 2025 (HRM, arXiv 2506.21734), section 2.

Dims legend: B batch, S tokens incl. prefix, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class State:
    """The two recurrent states, under the names the published checkpoints and loops use.

    Attributes:
        z_H: answer state y, [B, S, D] in the forward dtype.
        z_L: latent state z, [B, S, D] in the forward dtype.
    """

    z_H: Tensor
    z_L: Tensor


@dataclass
class Carry:
    """What a supervision step hands to the next one.

    Attributes:
        inner_carry: the recurrent states.
        steps: supervision steps each item has had, [B] int32.
        halted: items that take new data and start anew in the next step, [B] bool.
        current_data: the batch each item is working on.
    """

    inner_carry: State
    steps: Tensor
    halted: Tensor
    current_data: dict[str, Tensor]

    def copy_(self, other: Carry) -> None:
        """Take another one's values, in place."""
        with torch.no_grad():
            for mine, its in zip(_tensors(self), _tensors(other), strict=True):
                mine.copy_(its)

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionary of the tensors themselves, for a checkpoint."""
        states = {"z_H": self.inner_carry.z_H, "z_L": self.inner_carry.z_L}
        own = {"steps": self.steps, "halted": self.halted}
        return {**states, **own, "current_data": dict(self.current_data)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], device: torch.device) -> Carry:
        """A copy of what `to_dict` returned, on `device`."""
        data = {n: value.to(device, copy=True) for n, value in values["current_data"].items()}
        names = ("z_H", "z_L", "steps", "halted")
        y, z, steps, halted = (values[name].to(device, copy=True) for name in names)
        return cls(State(y, z), steps, halted, data)


def _tensors(carry: Carry) -> list[Tensor]:
    state = carry.inner_carry
    return [state.z_H, state.z_L, carry.steps, carry.halted, *carry.current_data.values()]


def take_new_data(
    halted: Tensor, batch: dict[str, Tensor], current: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Rows of `batch` for halted items, of `current` for the others; their new rows are dropped."""
    return {
        name: torch.where(halted.view(-1, *(1,) * (old.dim() - 1)), batch[name], old)
        for name, old in current.items()
    }


@dataclass
class Exploration:
    """What `halting` draws: uniform [B] float32 in [0, 1), least [B] int in 2..max_steps."""

    uniform: Tensor
    least: Tensor


def halting(
    steps: Tensor,
    q_halt: Tensor,
    q_continue: Tensor | None,
    max_steps: int,
    exploration: float,
    drawn: Exploration | None = None,
) -> Tensor:
    """Which items of a training batch stop after this step, [B] bool.

    Args:
        steps: supervision steps so far, this one included, [B] int32.
        q_halt: halting logits, [B] float32.
        q_continue: continuation logits to compare with, or None to compare with 0.
        max_steps: steps after which an item always stops.
        exploration: probability of drawing a least number of steps in 2..max_steps.
        drawn: the random numbers; None draws exactly one `rand_like(q_halt)` and one
            `randint_like(steps)`, in this order.
    """
    wants_to = q_halt > (0 if q_continue is None else q_continue)
    if drawn is None:
        uniform = torch.rand_like(q_halt)
        drawn = Exploration(uniform, torch.randint_like(steps, low=2, high=max_steps + 1))
    least = (drawn.uniform < exploration) * drawn.least
    return ((steps >= max_steps) | wants_to) & (steps >= least)
