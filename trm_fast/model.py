"""The Tiny Recursive Model: embed, recurse, read out; with adaptive computation around it.

Owns `Model`, a drop-in for the official `TinyRecursiveReasoningModel_ACTV1` and, by its key `name`,
for the official classes of the networks it is compared with: the same dictionary, carry, outputs,
state_dict and random draws. Imported by whatever runs one.
Source: Jolicoeur-Martineau 2025 (arXiv 2510.04871), Algorithm 3.

Dims legend: B batch, P puzzle-prefix tokens, L puzzle tokens, S = P + L tokens, D width,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trm_fast import noise
from trm_fast.answers import Answers, Frame
from trm_fast.backends import Choice
from trm_fast.config import ModelConfig
from trm_fast.gated_mlp import GatedMLP
from trm_fast.hub import Card
from trm_fast.latents import competed
from trm_fast.layers import (
    Embedding,
    HaltingHead,
    Linear,
    Network,
    PuzzleEmbedding,
    RotaryTables,
    truncated_normal_,
)
from trm_fast.ops import Ops, Recursion, Rotary
from trm_fast.recursion import (
    AnyState,
    Carry,
    Exploration,
    halting,
    named,
    state_of,
    take_new_data,
)
from trm_fast.reference import linear
from trm_fast.served import Served
from trm_fast.variants import VARIANTS, Damped, Run, States

Losses = Callable[[Tensor, Tensor], Tensor]


class InnerModel(Served):
    """One supervision step: question in, all cycles, answer and halting logits out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.embed_tokens = Embedding(config.vocab_size, width)
        self.lm_head = Linear(width, config.vocab_size)
        self.q_head = HaltingHead(width, config.q_logits)
        if config.puzzle_emb_ndim > 0:
            self.puzzle_emb = PuzzleEmbedding(
                config.num_puzzle_identifiers, config.puzzle_emb_ndim, config.batch_size
            )
        if config.pos_encodings == "rope":
            self.rotary_emb = RotaryTables(config.head_dim, config.total_len, config.rope_theta)
        elif config.pos_encodings == "learned":
            self.embed_pos = Embedding(config.total_len, width)
        self.variant = VARIANTS[config.kind]
        for name in self.variant.networks:
            layers = config.H_layers if name == "H_level" else config.L_layers
            setattr(self, name, Network(config, layers))
        # Drawn in the forward dtype: dtype and order of the draws decide the initial weights.
        for name in self.variant.initial.values():
            setattr(self, name, nn.Buffer(self._initial_state()))
        if config.latents > 1:  # of the further ones, [K - 1, D]
            more = [self._initial_state() for _ in range(config.latents - 1)]
            self.L_init_more = nn.Buffer(torch.stack(more))
        # H and L cycles of training steps, where they are not the model's own.
        self.cycles: tuple[int, int] | None = None
        self.serve()

    def _initial_state(self) -> Tensor:
        return truncated_normal_(torch.empty(self.config.hidden_size, dtype=self.forward_dtype), 1)

    def _initial(self) -> dict[str, Tensor]:
        """The initial value [D] of each state, the answer's first."""
        names = self.variant.initial.items()
        return {state: getattr(self, buffer) for state, buffer in names}

    def like(self) -> Tensor:
        """Something of the states' device and dtype."""
        return next(iter(self._initial().values()))

    @property
    def competes(self) -> bool:
        """Whether items have several latents now: z_L is [B, K, S, D]."""
        return self.training and self.config.latents > 1

    def empty_carry(self, batch_size: int) -> AnyState:
        """Uninitialised states [batch_size, S, D]: the first step overwrites all of them. While
        training with several latents there are K of z_L, [batch_size, K, S, D]."""
        self.policy(batch_size)
        shape = (batch_size, self.config.total_len, self.config.hidden_size)
        states = {name: value.new_empty(shape) for name, value in self._initial().items()}
        if self.competes:
            many = (batch_size, self.config.latents, *shape[1:])
            states["z_L"] = states["z_L"].new_empty(many)
        return state_of(states)

    def reset_carry(self, reset_flag: Tensor, carry: AnyState) -> AnyState:
        """States of flagged items [B] bool back at their initial values."""
        initial = self._initial()
        return state_of(
            {n: self._restarted(reset_flag, initial[n], s) for n, s in named(carry).items()}
        )

    def _restarted(self, flag: Tensor, value: Tensor, state: Tensor) -> Tensor:
        """A state, [B, S, D] or [B, K, S, D], with flagged items at its initial value [D]."""
        if state.dim() == 4:
            value = torch.cat([value[None], self.L_init_more])[:, None]
        return torch.where(flag.view(-1, *(1,) * (state.dim() - 1)), value, state)

    def _prefix(self, identifiers: Tensor) -> Tensor | None:
        """Puzzle rows as P tokens [B, P, D], zero-padded; zeros where there is no embedding."""
        config, batch = self.config, len(identifiers)
        if config.prefix_len == 0:
            return None
        size = config.prefix_len * config.hidden_size
        if config.puzzle_emb_ndim > 0:
            rows = self.puzzle_emb(identifiers).to(self.forward_dtype)
            rows = F.pad(rows, (0, size - config.puzzle_emb_ndim))
        else:
            rows = self.like().new_zeros(batch, size)
        return rows.view(batch, config.prefix_len, config.hidden_size)

    def _rotary(self) -> Rotary | None:
        return self.rotary_emb.tables() if hasattr(self, "rotary_emb") else None

    def _recursion(self, batch: int) -> Recursion:
        config = self.config
        # int8 is for answers; fp8 for every cycle without a gradient.
        trains = self.training or torch.is_grad_enabled()
        own = config.H_cycles, config.L_cycles
        H_cycles, L_cycles = self.cycles if self.training and self.cycles else own
        quantize = "none" if trains and config.quantize == "int8" else config.quantize
        return Recursion(
            H_cycles,
            L_cycles,
            config.num_heads,
            config.rms_norm_eps,
            self.policy(batch),
            config.dropout if self.training else 0.0,
            quantize,
        )

    def _begin(
        self,
        carry: AnyState,
        batch: dict[str, Tensor],
        halted: Tensor,
        streams: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The question and the states, those of halted items at their initial values."""
        states, initial = list(named(carry).values()), list(self._initial().values())
        apart = states[1:] if self.competes else states[2:]
        # The operation sets two states; where there is one it does so twice, further ones follow.
        states = states[: len(states) - len(apart)]
        x, *first = self.ops.embed_reset(
            batch["inputs"].to(torch.int32),
            self._prefix(batch["puzzle_identifiers"]),
            self.embed_tokens.embedding_weight,
            self.embed_pos.embedding_weight if hasattr(self, "embed_pos") else None,
            halted,
            states[0],
            states[:2][-1],
            initial[0],
            initial[:2][-1],
            math.sqrt(self.config.hidden_size),
        )
        values = initial[len(states) :]
        further = (self._restarted(halted, i, s) for i, s in zip(values, apart, strict=True))
        begun = (*first[: len(states)], *further)
        if streams is None or not self.config.random_init:
            return x, begun
        flag = halted.view(-1, 1, 1)
        drawn = (noise.truncated_normal(streams, n, state) for n, state in enumerate(begun))
        return x, tuple(torch.where(flag, new, s) for new, s in zip(drawn, begun, strict=True))

    def _run(self, streams: Tensor | None) -> Run:
        """The order in which the network is applied."""
        config = self.config
        if not config.mixes_states(self.training):
            return self.variant.run
        # The first fields are those of random initial states.
        return Damped(config.damping, config.noise, streams, field=config.states)

    def _logits(self, y: Tensor) -> Tensor:
        return linear(y, self.lm_head.weight.to(y.dtype))[:, self.config.prefix_len :]

    def forward(
        self,
        carry: AnyState,
        batch: dict[str, Tensor],
        halted: Tensor | None = None,
        streams: Tensor | None = None,
        losses: Losses | None = None,
    ) -> tuple[AnyState, Tensor, tuple[Tensor, Tensor | None]]:
        """One supervision step.

        Args:
            carry: states [B, S, D]; of items that `halted` flags, any content.
            batch: "inputs" [B, L] int, "puzzle_identifiers" [B] int.
            halted: items to start anew, [B] bool; None for none.
            streams: of random states and noise, [B] int64; None for neither.
            losses: with several latents, what the lowest of wins: (logits [N, L, V],
                batch["labels"] [N, L]) -> [N].

        Returns:
            The new states without gradient, logits [B, L, V] in the forward dtype, and the
            (halt, continue) logits, each [B] float32 (continue: None with q_logits = 1).
        """
        inputs = batch["inputs"]
        if halted is None:
            halted = torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)
        x, states = self._begin(carry, batch, halted, streams)
        stacks = [getattr(self, name).weights() for name in self.variant.networks]
        settings, run, rotary = self._recursion(len(inputs)), self._run(streams), self._rotary()

        def cycles(x: Tensor, states: States, r: Recursion) -> States:
            return run(self.ops, x, states, stacks, rotary, r)

        if self.competes:
            assert losses is not None, "ACTLossHead says which latent wins"
            labels = batch["labels"].repeat_interleave(self.config.latents, 0)
            shape = len(inputs), self.config.latents
            judge = lambda y: losses(self._logits(y), labels).view(shape)  # noqa: E731
            states = competed(cycles, x, states, settings, judge)
        else:
            states = cycles(x, states, settings)
        y = states[0]
        logits = self._logits(y)
        readout = y[:, 0] if self.config.q_readout == "first" else y.mean(dim=1)
        weight, bias = self.q_head.weight.to(y.dtype), self.q_head.bias.to(y.dtype)
        if torch.is_grad_enabled() or y.dtype != torch.float32:
            q = linear(readout, weight, bias).float()
        else:  # row by row: a product of matrices rounds otherwise for other batches
            q = (readout.unsqueeze(1) * weight).sum(-1) + bias
        q_continue = q[..., 1] if self.config.q_logits == 2 else None
        names = self.variant.initial
        new = state_of({n: state.detach() for n, state in zip(names, states, strict=True)})
        return new, logits.contiguous(), (q[..., 0], q_continue)


class Model(nn.Module):
    """Drop-in for the official model classes, built from the same dictionary.

    Args:
        config_dict: a `ModelConfig` or its dictionary; official keys without a meaning are
            accepted, unknown ones are an error.

    Raises:
        ValueError: an unknown key, a value out of range, or a backend that cannot serve.

    Attributes:
        config: the checked configuration.  inner: one supervision step.  ops: its operations.
        q_threshold: the q logit above which its answers are trusted, as fitted on other puzzles;
            None where none was.
    """

    def __init__(self, config_dict: Mapping[str, Any] | ModelConfig) -> None:
        super().__init__()
        given = config_dict
        self.config = given if isinstance(given, ModelConfig) else ModelConfig.from_dict(given)
        self.q_threshold: float | None = None
        gated = self.config.kind == "gated_mlp"
        self.inner = GatedMLP(self.config) if gated else InnerModel(self.config)

    @property
    def puzzle_emb(self) -> PuzzleEmbedding:
        """The puzzle rows; AttributeError where the model has none (puzzle_emb_ndim = 0)."""
        return self.inner.puzzle_emb  # type: ignore[return-value]

    @property
    def ops(self) -> Ops:
        return self.inner.ops

    def backend_report(self) -> list[Choice]:
        """Which implementation serves each operation here, and why."""
        return self.inner.backend_report()

    def initial_carry(self, batch: dict[str, Tensor]) -> Carry:
        """A carry for batches shaped as this one, on its device: every item counts as halted."""
        inputs = batch["inputs"]
        size = len(inputs)
        return Carry(
            inner_carry=self.inner.empty_carry(size),
            steps=torch.zeros(size, dtype=torch.int32, device=inputs.device),
            halted=torch.ones(size, dtype=torch.bool, device=inputs.device),
            current_data={name: torch.empty_like(value) for name, value in batch.items()},
        )

    def forward(
        self,
        carry: Carry,
        batch: dict[str, Tensor],
        drawn: Exploration | None = None,
        compute_target_q: bool | None = None,
        losses: Losses | None = None,
    ) -> tuple[Carry, dict[str, Tensor]]:
        """One supervision step of every item; halted ones take their row of `batch` first.

        Args:
            carry: of `initial_carry` or of the step before.
            batch: "inputs" [B, L] int32, "puzzle_identifiers" [B] int32, and whatever else
                should travel with the items ("labels" [B, L]).
            drawn: the random numbers of training; None draws them from PyTorch's generator, as the
                official code does.
            compute_target_q: whether to make "target_q_continue" in training; None is what the
                official trainer does with this network.
            losses: of `ACTLossHead`, for training with several latents; as `InnerModel.forward`.

        Returns:
            The next carry and the outputs: "logits" [B, L, V] in the forward dtype,
            "q_halt_logits" [B] float32, "q_continue_logits" [B] float32 (not with q_logits = 1),
            "target_q_continue" [B] float32 (training with no_ACT_continue=False only).
            In evaluation every item runs halt_max_steps; with act_inference until its Q values say
            halt, "actual_steps" [B] float32 being the steps it has had.
        """
        config = self.config
        data = take_new_data(carry.halted, batch, carry.current_data)
        extra = self._of_training(carry.halted, drawn, losses) if self.training else {}
        state, logits, (q_halt, q_continue) = self.inner(
            carry.inner_carry, data, carry.halted, **extra
        )
        outputs = {"logits": logits, "q_halt_logits": q_halt}
        if q_continue is not None:
            outputs["q_continue_logits"] = q_continue
        with torch.no_grad():
            steps = torch.where(carry.halted, 0, carry.steps) + 1
            last = steps >= config.halt_max_steps
            halted = last
            adaptive = config.act_enabled if self.training else config.act_inference
            against = None if config.no_ACT_continue else q_continue
            if adaptive and config.halt_max_steps > 1 and not self.training:
                halted = last | (q_halt > (0 if against is None else against))
                outputs["actual_steps"] = steps.float()
            elif adaptive and config.halt_max_steps > 1:
                halted = halting(
                    steps,
                    q_halt,
                    against,
                    config.halt_max_steps,
                    config.halt_exploration_prob,
                    drawn,
                )
                wanted = config.learns_to_continue if compute_target_q is None else compute_target_q
                if wanted:
                    outputs["target_q_continue"] = self._continue_target(state, data, last)
        return Carry(state, steps, halted, data), outputs

    def _of_training(
        self, halted: Tensor, drawn: Exploration | None, losses: Losses | None
    ) -> dict[str, Any]:
        """What else the network is given in training, for the options that want it."""
        if self.config.latents > 1:
            if losses is None:
                raise ValueError(
                    f"latents={self.config.latents} is trained through ACTLossHead, which says "
                    "which of them wins"
                )
            return {"losses": losses}
        if not self.config.draws_states:
            return {}
        if drawn is None or drawn.streams is None:
            words = torch.randint(1 << 32, (len(halted), noise.WORDS), device=halted.device)
            return {"streams": noise.starts(words)}
        return {"streams": drawn.streams}

    def _continue_target(self, state: AnyState, data: dict[str, Tensor], last: Tensor) -> Tensor:
        """What going on is worth: the better Q of the next step; only halting's on the last."""
        _, _, (q_halt, q_continue) = self.inner(state, data)
        if q_continue is None:
            raise ValueError("compute_target_q needs q_logits=2, the model has 1")
        return torch.sigmoid(torch.where(last, q_halt, torch.maximum(q_halt, q_continue)))

    def predict(
        self, inputs: Tensor, puzzle_identifiers: Tensor | None = None, **how: Any
    ) -> Answers:
        """Answers to puzzles, tokens [N, L] int; see `inference.predict`, whose keywords it takes:
        model.predict(inputs, rollouts=16, select="mode"), reasoning="ptrm", ..."""
        return _later("inference").predict(self, inputs, puzzle_identifiers, **how)

    def watch(
        self, inputs: Tensor, puzzle_identifiers: Tensor | None = None, **how: Any
    ) -> Iterator[Frame]:
        """The frames of answering one puzzle, tokens [1, L] int; see `inference.watch`."""
        return _later("inference").watch(self, inputs, puzzle_identifiers, **how)

    @classmethod
    def from_pretrained(
        cls,
        source: str | PathLike[str],
        *,
        weights: str | None = None,
        config: Mapping[str, Any] | None = None,
        file: str | None = None,
        revision: str | None = None,
    ) -> Model:
        """A trained model from a run, a folder of `save_pretrained`, a file of another project or
        the hub, on the CPU, in evaluation mode; see `pretrained.from_pretrained`."""
        return _later("pretrained").from_pretrained(
            source, weights=weights, config=config, file=file, revision=revision
        )

    def save_pretrained(
        self, folder: str | PathLike[str], *, card: Card | None = None, step: int = 0
    ) -> Path:
        """Write config.json, model.safetensors and README.md; see `pretrained.save_pretrained`."""
        return _later("pretrained").save_pretrained(self, folder, card, step)

    def push_to_hub(
        self, repo: str, *, card: Card | None = None, private: bool = False, step: int = 0
    ) -> str:
        """Send those files to the hub, as owner/name; see `pretrained.push_to_hub`."""
        return _later("pretrained").push_to_hub(self, repo, card, private=private, step=step)


def _later(module: str) -> Any:
    """A module that stands after this one and imports it."""
    return import_module(f"trm_fast.{module}")
