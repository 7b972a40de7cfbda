"""The state of the recursion between supervision steps: reset, halting, and what is kept.

Owns the states of every network and the adaptive-computation rules around their recursion.
Imported by `model.py` and `trainer.py`. Source: Jolicoeur-Martineau 2025 (arXiv 2510.04871),
sections 3-4; the halting rules are those of Wang et al. 2025 (HRM, arXiv 2506.21734), section 2.

Dims legend: B batch, S tokens incl. prefix, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import torch
from torch import Tensor


@dataclass
class State:
    """The two recurrent states, under the names the published checkpoints and loops use.

    Attributes:
        z_H: answer state y, [B, S, D] in the forward dtype.
        z_L: latent state z, [B, S, D] in the forward dtype; with `latents` K > 1, [B, K, S, D] in
            training.
    """

    z_H: Tensor
    z_L: Tensor


@dataclass
class LatentState:
    """The one state of trm_singlez, which is answer and latent in one: z_L [B, S, D]."""

    z_L: Tensor


@dataclass
class AnswerState:
    """The one state of transformers_baseline: z_H [B, S, D]."""

    z_H: Tensor


@dataclass
class LevelsState:
    """The answer and the six latents of trm_hier6, each [B, S, D]."""

    z_H: Tensor
    z_L1: Tensor
    z_L2: Tensor
    z_L3: Tensor
    z_L4: Tensor
    z_L5: Tensor
    z_L6: Tensor


@dataclass
class NoState:
    """What gated_mlp carries along: nothing."""


AnyState: TypeAlias = State | LatentState | AnswerState | LevelsState | NoState
_STATES: dict[tuple[str, ...], type[AnyState]] = {
    tuple(field.name for field in fields(kind)): kind
    for kind in (State, LatentState, AnswerState, LevelsState, NoState)
}


def named(state: AnyState) -> dict[str, Tensor]:
    """The tensors of a state by name, the answer first."""
    return {field.name: getattr(state, field.name) for field in fields(state)}


def state_of(tensors: dict[str, Tensor]) -> AnyState:
    """The inverse of `named`."""
    return _STATES[tuple(tensors)](**tensors)


@dataclass
class Carry:
    """What a supervision step hands to the next one.

    Attributes:
        inner_carry: the recurrent states.
        steps: supervision steps each item has had, [B] int32.
        halted: items that take new data and start anew in the next step, [B] bool.
        current_data: the batch each item is working on.
    """

    inner_carry: AnyState
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
        own = {"steps": self.steps, "halted": self.halted}
        return {**named(self.inner_carry), **own, "current_data": dict(self.current_data)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], device: torch.device) -> Carry:
        """A copy of what `to_dict` returned, on `device`."""
        data = {n: value.to(device, copy=True) for n, value in values["current_data"].items()}
        own = {n: v.to(device, copy=True) for n, v in values.items() if n != "current_data"}
        steps, halted = own.pop("steps"), own.pop("halted")
        return cls(state_of(own), steps, halted, data)


def _tensors(carry: Carry) -> list[Tensor]:
    states = named(carry.inner_carry).values()
    return [*states, carry.steps, carry.halted, *carry.current_data.values()]


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
    """What a training step draws for a model: for `halting`, uniform [B] float32 in [0, 1) and
    least [B] int in 2..max_steps; for its states, streams [B] int64, of `noise.starts`."""

    uniform: Tensor
    least: Tensor
    streams: Tensor | None = None


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
