"""The networks around one set of blocks: TRM and the four that it is compared with.

Owns what tells them apart: their states, initial values and networks under the published names,
and the order in which the networks are applied. TRM's order is one operation, `deep_recursion`;
the others are composed of the smaller ones here. Imported by `model.py`.
Sources: Jolicoeur-Martineau 2025 (arXiv 2510.04871), Algorithm 3 and the ablations of section 5;
Wang et al. 2025 (HRM, arXiv 2506.21734), section 2; damping and noise: EqR (arXiv 2605.21488).

Dims legend: B batch, S tokens incl. prefix, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import TypeAlias

import torch
from torch import Tensor

from trm_fast import noise
from trm_fast.ops import BlockWeights, Ops, Recursion, Rotary
from trm_fast.reference import free_network, laid_out, tracked_network

States: TypeAlias = tuple[Tensor, ...]  # each [B, S, D], the one that is read out first
Networks: TypeAlias = Sequence[Callable[[Tensor], Tensor]]
Run: TypeAlias = Callable[
    [Ops, Tensor, States, Sequence[Sequence[BlockWeights]], Rotary | None, Recursion], States
]


@dataclass(frozen=True)
class Variant:
    """What a network is made of.

    Attributes:
        networks: names of its stacks of blocks, in the order in which their weights are drawn.
        initial: name of each state, the answer first, with the name of its initial value [D].
        run: (ops, x [B, S, D], states, weights of each stack, rotary, settings) -> states. The
            answer carries the gradient to x and the weights; other states may.
    """

    networks: tuple[str, ...]
    initial: dict[str, str]
    run: Run


def _one_operation(
    ops: Ops,
    x: Tensor,
    states: States,
    stacks: Sequence[Sequence[BlockWeights]],
    rotary: Rotary | None,
    r: Recursion,
) -> States:
    y, z = states
    return ops.deep_recursion(ops, x, y, z, stacks[0], rotary, r)


def _composed(
    cycle: Callable[[Networks, Ops, Tensor, States, Recursion], States],
    one_step: bool,
    ops: Ops,
    x: Tensor,
    states: States,
    stacks: Sequence[Sequence[BlockWeights]],
    rotary: Rotary | None,
    r: Recursion,
) -> States:
    """H_cycles cycles, the last one with gradient; `one_step`: only the last update of each state
    in it has one."""
    x, *laid = laid_out(stacks[0], x, *states)
    states = tuple(laid)
    tracked = torch.is_grad_enabled()
    with torch.no_grad():
        free = [free_network(ops, blocks, rotary, r, x, tracked) for blocks in stacks]
        for _ in range(r.H_cycles - 1 if tracked else r.H_cycles):
            states = cycle(free, ops, x, states, r)
        if tracked and one_step:
            y, z = states
            for _ in range(r.L_cycles - 1):
                z = free[-1](ops.inject(z, y, x))
            states, r = (y, z), replace(r, L_cycles=1)
    if not tracked:
        return states
    states = tuple(state.detach() for state in states)
    networks = [tracked_network(ops, blocks, rotary, r) for blocks in stacks]
    return cycle(networks, ops, x, states, r)


def _single(networks: Networks, ops: Ops, x: Tensor, states: States, r: Recursion) -> States:
    """One state: improved L_cycles times given the question, then once without it."""
    (network,), (z,) = networks, states
    for _ in range(r.L_cycles):
        z = network(z + x)
    return (network(z),)


def _levels(networks: Networks, ops: Ops, x: Tensor, states: States, r: Recursion) -> States:
    """A latent for each update of a cycle; every update reads the sum of all of them."""
    (network,), (y, *z) = networks, states
    for level in range(r.L_cycles):
        z[level] = network(ops.inject(reduce(torch.add, z), y, x))
    return (network(y + reduce(torch.add, z)), *z)


def _two_networks(networks: Networks, ops: Ops, x: Tensor, states: States, r: Recursion) -> States:
    """A network for the answer and one for the latent."""
    (answer, latent), (y, z) = networks, states
    for _ in range(r.L_cycles):
        z = latent(ops.inject(z, y, x))
    return answer(y + z), z


class Damped:
    """TRM's order of passes, where every update keeps a part of the state before it and adds noise:
    (1 - share) * state + share * network(state + rest) + deviation * normal.

    Args:
        share: in (0, 1].  deviation: of the noise.
        streams: [B] int64, of `noise.starts`; None for no noise.  field: the first of them to take;
            every update takes the next.
    """

    def __init__(
        self, share: float, deviation: float = 0.0, streams: Tensor | None = None, field: int = 0
    ) -> None:
        self.share, self.deviation = share, deviation
        self.streams = streams if deviation else None
        self.field = field

    def __call__(
        self,
        ops: Ops,
        x: Tensor,
        states: States,
        stacks: Sequence[Sequence[BlockWeights]],
        rotary: Rotary | None,
        r: Recursion,
    ) -> States:
        y, z = _composed(self._cycle, False, ops, x, states, stacks, rotary, r)
        return y, z.detach()

    def _cycle(
        self, networks: Networks, ops: Ops, x: Tensor, states: States, r: Recursion
    ) -> States:
        (network,), (y, z) = networks, states
        for _ in range(r.L_cycles):
            z = self._updated(z, network(ops.inject(z, y, x)))
        return self._updated(y, network(y + z)), z

    def _updated(self, state: Tensor, new: Tensor) -> Tensor:
        if self.share < 1:
            new = torch.add((1 - self.share) * state, new, alpha=self.share)
        if self.streams is None:
            return new
        drawn = noise.normal(self.streams, self.field, new)
        self.field += 1
        return torch.add(new, drawn, alpha=self.deviation)


def _plain(networks: Networks, ops: Ops, x: Tensor, states: States, r: Recursion) -> States:
    """A transformer."""
    (network,), (y,) = networks, states
    return (network(y + x),)


def _once(
    ops: Ops,
    x: Tensor,
    states: States,
    stacks: Sequence[Sequence[BlockWeights]],
    rotary: Rotary | None,
    r: Recursion,
) -> States:
    """The transformer, applied once: the official class has the cycles' keys and does not look."""
    return _composed(_plain, False, ops, x, states, stacks, rotary, replace(r, H_cycles=1))


VARIANTS: dict[str, Variant] = {
    "trm": Variant(("L_level",), {"z_H": "H_init", "z_L": "L_init"}, _one_operation),
    "trm_singlez": Variant(("L_level",), {"z_L": "L_init"}, partial(_composed, _single, False)),
    "trm_hier6": Variant(
        ("L_level",),
        {"z_H": "H_init", **{f"z_L{i}": f"L{i}_init" for i in range(1, 7)}},
        partial(_composed, _levels, False),
    ),
    "hrm": Variant(
        ("H_level", "L_level"),
        {"z_H": "H_init", "z_L": "L_init"},
        partial(_composed, _two_networks, True),
    ),
    "transformers_baseline": Variant(("H_level",), {"z_H": "H_init"}, _once),
}
