"""Rollouts side by side on the device: started, stepped, replaced and thinned out one by one.

Owns what happens to an item between the puzzle as it was given and the answer in the same frame:
its image under a symmetry, its first states, the noise before every step, and the way back.
What is drawn for an item depends on the seed, its puzzle's number, its rollout and the step alone.
Imported by `rollouts.py`. Terms are those of `reasoning.py`.

Dims legend: P puzzles, N items side by side, M some of them, L tokens, V token values.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trm_fast.inference_step import InferenceStep, borrowed
from trm_fast.model import Model
from trm_fast.noise import WORDS, normal, starts, truncated_normal
from trm_fast.philox import philox
from trm_fast.puzzle_kind import PuzzleKind
from trm_fast.reasoning import Reasoning, noisy_states
from trm_fast.recursion import named
from trm_fast.symmetry import TokenSymmetry

__all__ = ["Lanes", "Puzzles", "Said", "words_of"]

IMAGE, INIT, NOISE = 1, 2, 3  # purposes of random numbers


@dataclass(frozen=True)
class Puzzles:
    """P puzzles on the model's device.

    Attributes:
        inputs: [P, L] int32.  identifiers: [P] int32.
        numbers: [P] int64 by which random numbers are drawn, in [0, 2**32).
    """

    inputs: Tensor
    identifiers: Tensor
    numbers: Tensor


@dataclass(frozen=True)
class Said:
    """The N items after a step.

    Attributes:
        tokens: [N, L] int64 in the puzzle's own frame, the givens written over.
        q: [N] float32, where NaN is -inf.
        moved: [N] float32, the mean over tokens of the Euclidean norm of the change of the logits
            since the step before; inf at the first, and where it is NaN.
        stayed: [N] bool, whether the tokens are those of the step before.
        certainty: [N, L] float32, the probability of each token shown, of a given one 1; None
            where nobody looks at it.
    """

    tokens: Tensor
    q: Tensor
    moved: Tensor
    stayed: Tensor
    certainty: Tensor | None

    def of(self, rows: Tensor) -> Said:
        """Some of the items, by their places [M] int64."""
        certainty = None if self.certainty is None else self.certainty[rows]
        return Said(self.tokens[rows], self.q[rows], self.moved[rows], self.stayed[rows], certainty)


def words_of(
    seed: int, rollouts: Tensor, steps: Tensor, numbers: Tensor, purpose: int, count: int
) -> Tensor:
    """[N, count] int64 words in [0, 2**32) for items of these rollouts, steps and numbers [N]."""
    position = torch.arange(-(-count // 4), device=numbers.device) + (purpose << 24)
    counter = (rollouts[:, None], steps[:, None], numbers[:, None], position)
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return torch.stack(words, dim=-1).flatten(1)[:, :count]


class Lanes:
    """Up to `width` rollouts side by side; a context manager.

    Args:
        model: in evaluation mode.  kind: of the puzzles.  plan: resolved for the model.
        watched: whether the certainty is wanted.
        cuda_graph: False runs call by call on NVIDIA GPUs too.
    """

    def __init__(
        self,
        model: Model,
        kind: PuzzleKind,
        puzzles: Puzzles,
        plan: Reasoning,
        watched: bool = False,
        cuda_graph: bool = True,
    ) -> None:
        self._model, self._kind, self._puzzles, self._plan = model, kind, puzzles, plan
        self._watched, self._cuda_graph = watched, cuda_graph
        self._moves = plan.by == "symmetry" and plan.rollouts > 1
        self._noisy = noisy_states(model.config, plan.noise_on) if plan.noise else []
        self._step: InferenceStep | None = None
        self._held = ExitStack()
        self._own: dict[str, Tensor] = {}  # what belongs to each item, [N, ...]

    def __enter__(self) -> Lanes:
        return self

    def __exit__(self, *error: Any) -> None:
        self._held.close()
        self._step, self._own = None, {}

    def begin(self, items: Tensor) -> None:
        """Work on these items [N] int64, puzzle * rollouts + rollout, and on no others."""
        self._own, batch = self._fresh(items)
        if len(items) > self.size or self.too_wide_for(len(items)):
            self._held.close()
            self._borrow(len(items))
        assert self._step is not None
        self._step.start(batch)
        self._restart(torch.arange(len(items), device=items.device), batch)

    def replace(self, places: Tensor, items: Tensor) -> None:
        """Work on other items [M] in these places [M] int64."""
        own, batch = self._fresh(items)
        for name, values in own.items():
            self._own[name][places] = values
        self._restart(places, batch)

    def extend(self, items: Tensor) -> None:
        """Work on other items [M], too, behind those there are; at most to `size`."""
        assert self._step is not None
        own, batch = self._fresh(items)
        before, count = self._step.used, self._step.used + len(items)
        self._own = {name: torch.cat([kept, own[name]]) for name, kept in self._own.items()}
        self._step.used = count
        self._restart(torch.arange(before, count, device=items.device), batch)

    def keep(self, places: Tensor, room: int) -> None:
        """Go on with the items in these places [M] only, with room for so many."""
        before, held = self._step, self._held
        assert before is not None
        self._held = ExitStack()
        if before.captures and room > before.size:  # every size is a graph of its own
            room = max(room, 2 * before.size)
        self._borrow(room).go_on_from(before, places)
        self._own = {name: values[places] for name, values in self._own.items()}
        held.close()

    @property
    def size(self) -> int:
        """Items that there is room for."""
        return self._step.size if self._step is not None else 0

    def too_wide_for(self, items: int) -> bool:
        """Whether `keep` is worth while for so few."""
        if self._step is not None and self._step.captures:
            return 4 * items <= self.size
        return items < self.size

    def _borrow(self, count: int) -> InferenceStep:
        self._step = self._held.enter_context(borrowed(self._model, count, self._cuda_graph))
        return self._step

    def _fresh(self, items: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What belongs to items that have made no step, and what the model is given of them."""
        puzzle, rollout = items // self._plan.rollouts, items % self._plan.rollouts
        inputs, number = self._puzzles.inputs[puzzle], self._puzzles.numbers[puzzle]
        config = self._model.config
        own = {
            "rollout": rollout,
            "number": number,
            "taken": torch.zeros_like(rollout),
            "inputs": inputs,
            "tokens": torch.full_like(inputs, -1, dtype=torch.int64),
            "logits": inputs.new_zeros(*inputs.shape, config.vocab_size, dtype=torch.float32),
        }
        if self._moves:
            words = words_of(
                self._plan.seed, rollout, own["taken"], number, IMAGE, self._kind.words
            )
            image = self._kind.images(rollout, words)
            inputs, back = image.apply(inputs), image.inverse()
            own |= {"cells": back.cells, "values": back.values}
        return own, {"inputs": inputs, "puzzle_identifiers": self._puzzles.identifiers[puzzle]}

    def _restart(self, places: Tensor, batch: dict[str, Tensor]) -> None:
        assert self._step is not None
        states = None
        if self._noisy or self._plan.init == "random":
            states = self._first_states(places)
        self._step.restart(places, batch, states)

    def _first_states(self, places: Tensor) -> dict[str, Tensor]:
        """[M, S, D] by name: the model's own, or random ones."""
        inner, count = self._model.inner, len(places)
        flag = torch.ones(count, dtype=torch.bool, device=places.device)
        states = named(inner.reset_carry(flag, inner.empty_carry(count)))
        if self._plan.init == "fixed":
            return states
        drawn = self._streams(places, INIT)
        return {
            name: truncated_normal(drawn, place, state)
            for place, (name, state) in enumerate(states.items())
        }

    def _streams(self, places: Tensor | slice, purpose: int) -> Tensor:
        """Random numbers [M] int64 for `noise.py`, of the items in these places at their next step;
        each state takes those of a field of its own."""
        rollout, taken, number = (self._own[n][places] for n in ("rollout", "taken", "number"))
        return starts(words_of(self._plan.seed, rollout, taken, number, purpose, WORDS))

    def _disturb(self, step: InferenceStep) -> None:
        if not self._noisy:
            return
        drawn = self._streams(slice(None), NOISE)
        for place, (name, state) in enumerate(step.states().items()):
            if name in self._noisy:
                rows = state[: len(drawn)]
                rows += normal(drawn, place, rows) * self._plan.noise

    def step(self) -> Said:
        """One supervision step of every item."""
        assert self._step is not None
        own = self._own
        self._disturb(self._step)
        out = self._step.run()
        logits, tokens = out.logits.float(), out.preds
        moved = (logits - own["logits"]).norm(dim=-1).mean(-1)
        moved = torch.where((own["taken"] == 0) | moved.isnan(), torch.inf, moved)
        if self._moves:
            tokens = TokenSymmetry(own["cells"], own["values"]).apply(tokens)
        given = self._kind.given(own["inputs"])
        tokens = torch.where(given, own["inputs"].long(), tokens)
        certainty = None
        if self._watched:
            certainty = logits.softmax(-1).amax(-1)
            certainty = certainty.gather(1, own["cells"]) if self._moves else certainty
            certainty = torch.where(given, 1.0, certainty)
        stayed = (tokens == own["tokens"]).all(-1)
        own |= {"taken": own["taken"] + 1, "tokens": tokens, "logits": logits}
        q = torch.where(out.q.isnan(), -torch.inf, out.q)
        return Said(tokens, q, moved, stayed, certainty)
