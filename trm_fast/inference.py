"""Answers of a trained model, step by step, and how good they are.

Owns the evaluation loop: every command and the trainer measure through it. Imported by trainer
and the modules around it, evaluate and solve. Terms: a supervision step is one call of the model;
`last` is the answer of the last step, `best_q` that of the step with the highest halting logit (a
model trained with early halting may leave a right answer again; arXiv 2605.19943 selects by the
same logit).

Dims legend: B batch, L puzzle tokens, M supervision steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trm_fast.answers import Answers, Frame
from trm_fast.data.format import IGNORE_LABEL_ID
from trm_fast.distributed import SINGLE, Ranks
from trm_fast.inference_step import StepOutput, borrowed
from trm_fast.labelled import Batches, labelled_batches
from trm_fast.lanes import Puzzles
from trm_fast.losses import LOSSES
from trm_fast.model import Model
from trm_fast.puzzle_kind import kind_of
from trm_fast.reasoning import Reasoning, reasoning_of
from trm_fast.rollouts import Budget, Result, Rollouts, puzzles_at_once
from trm_fast.rules import Rules
from trm_fast.selectors import choose

Observer = Callable[[str, dict[str, Tensor]], None]


def _depth(model: Model, steps: int | None) -> int:
    depth = model.config.halt_max_steps if steps is None else steps
    if depth < 1:
        raise ValueError(f"steps must be at least 1, got {depth}")
    return depth


@torch.inference_mode()
def supervision_steps(
    model: Model, batch: dict[str, Tensor], steps: int, cuda_graph: bool = True
) -> Iterator[StepOutput]:
    """The model's outputs after each of `steps` supervision steps, none of them halting early.

    Args:
        model: in evaluation mode.
        batch: "inputs" [B, L] int32 and "puzzle_identifiers" [B] int32 on the model's device.
        steps: M >= 1, also beyond halt_max_steps.
        cuda_graph: False runs call by call on NVIDIA GPUs too.

    Raises:
        ValueError: steps < 1.
    """
    depth = _depth(model, steps)
    with borrowed(model, len(batch["inputs"]), cuda_graph) as step:
        step.start(batch)
        for _ in range(depth):
            yield step.run()


@dataclass
class SetReport:
    """Results on one set of puzzles; the lists have one entry per supervision step.

    Attributes:
        puzzles: number of boards with labels.
        accuracy: mean fraction of labelled tokens that are right.
        exact_accuracy: fraction of boards that are right in every labelled token.
        valid: fraction of boards that keep clues and rules; empty where no rules are known.
        q_halt_accuracy: fraction of boards where q >= 0 agrees with being right.
        lm_loss, q_halt_loss: mean per board at the last step, as the training losses.
        best_q_accuracy, best_q_exact_accuracy, best_q_valid: of the answer of the step with the
            highest q, the earliest of several.
        best_q_steps: mean 1-based step that answer comes from.
    """

    puzzles: int = 0
    accuracy: list[float] = field(default_factory=list)
    exact_accuracy: list[float] = field(default_factory=list)
    valid: list[float] = field(default_factory=list)
    q_halt_accuracy: list[float] = field(default_factory=list)
    lm_loss: float = 0.0
    q_halt_loss: float = 0.0
    best_q_accuracy: float = 0.0
    best_q_exact_accuracy: float = 0.0
    best_q_valid: float | None = None
    best_q_steps: float = 0.0

    def metrics(self) -> dict[str, float]:
        """The last step under the official metric names, and the best-q answer beside it."""
        values = {
            "accuracy": self.accuracy[-1],
            "exact_accuracy": self.exact_accuracy[-1],
            "q_halt_accuracy": self.q_halt_accuracy[-1],
            "steps": float(len(self.accuracy)),
            "lm_loss": self.lm_loss,
            "q_halt_loss": self.q_halt_loss,
            "best_q_exact_accuracy": self.best_q_exact_accuracy,
        }
        return values | ({"valid": self.valid[-1]} if self.valid else {})

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


class _Tally:
    """Sums over batches of one set; `report` divides them."""

    def __init__(
        self, steps: int, loss_type: str, rules: Rules | None, cuda_graph: bool = True
    ) -> None:
        self.per_step = np.zeros((steps, 4))  # accuracy, exact, q agrees, valid
        self.ends = np.zeros(6)  # lm loss, q loss; best-q accuracy, exact, valid, step
        self.puzzles = 0
        self.loss = LOSSES[loss_type]
        self.rules = rules
        self.cuda_graph = cuda_graph

    def add(self, model: Model, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Count a batch in which every row has at least one label that is not ignored; returns it
        with the answers of the last step."""
        labels = batch["labels"]
        mask = labels != IGNORE_LABEL_ID
        counts = mask.sum(-1)
        self.puzzles += len(labels)
        best_q = torch.full((len(labels),), -torch.inf, device=labels.device)
        best = torch.zeros(4, len(labels), device=labels.device)  # accuracy, exact, valid, step
        inputs = batch["inputs"].cpu().numpy()
        outputs = supervision_steps(model, batch, len(self.per_step), self.cuda_graph)
        for index, out in enumerate(outputs):
            right = mask & (out.preds == labels)
            solved = right.sum(-1) == counts
            accuracy = right.sum(-1) / counts
            valid = torch.zeros_like(solved)
            if self.rules is not None:
                kept = self.rules(inputs, out.preds.cpu().numpy())
                valid = torch.as_tensor(kept, device=labels.device)
            agrees = (out.q >= 0) == solved
            columns = torch.stack([c.float() for c in (accuracy, solved, agrees, valid)])
            self.per_step[index] += columns.cpu().double().sum(-1).numpy()
            here = [accuracy, solved, valid, torch.full_like(accuracy, index + 1)]
            best = torch.where(out.q > best_q, torch.stack([row.float() for row in here]), best)
            best_q = torch.maximum(best_q, out.q)
        per_token = self.loss(out.logits, labels)
        q_loss = torch.nn.functional.softplus(torch.where(solved, -out.q, out.q))
        losses = torch.stack([per_token.sum(-1).float() / counts, q_loss])
        self.ends += torch.cat([losses, best]).cpu().double().sum(-1).numpy()
        return batch | {"logits": out.logits, "preds": out.preds, "q_halt_logits": out.q}

    def report(self, ranks: Ranks) -> SetReport:
        own = [self.per_step.ravel(), self.ends, np.array([float(self.puzzles)])]
        whole = ranks.totals(torch.from_numpy(np.concatenate(own))).numpy()
        per_step, ends = whole[: self.per_step.size].reshape(-1, 4), whole[-7:-1]
        count = max(whole[-1], 1.0)
        accuracy, exact, agrees, valid = (per_step / count).T.tolist()
        lm_loss, q_loss, *best = (ends / count).tolist()
        return SetReport(
            puzzles=int(whole[-1]),
            accuracy=accuracy,
            exact_accuracy=exact,
            valid=valid if self.rules else [],
            q_halt_accuracy=agrees,
            lm_loss=lm_loss,
            q_halt_loss=q_loss,
            best_q_accuracy=best[0],
            best_q_exact_accuracy=best[1],
            best_q_valid=best[2] if self.rules else None,
            best_q_steps=best[3],
        )


def evaluate(
    model: Model,
    batches: Batches,
    *,
    steps: int | None = None,
    max_puzzles: int | None = None,
    loss_type: str = "stablemax_cross_entropy",
    rules: Rules | None = None,
    collect: dict[str, list[Tensor]] | None = None,
    observe: Observer | None = None,
    cuda_graph: bool = True,
    ranks: Ranks = SINGLE,
) -> dict[str, SetReport]:
    """Measure a model on labelled puzzles, set by set.

    Args:
        model: put into evaluation mode, and back as it was.
        batches, max_puzzles, ranks: see `labelled_batches`; all processes get the results of the
            whole.
        steps: supervision steps M; None is the model's halt_max_steps.
        loss_type: a name in `LOSSES`.  rules: adds `valid`, see `rules_of`.
        collect: lists that get, batch by batch, the tensors they are named after: those of the
            batch, or "logits", "preds", "q_halt_logits" of the last step.
        observe: called with the set's name and all of these, batch by batch.
        cuda_graph: False runs call by call on NVIDIA GPUs too.

    Raises:
        ValueError: no puzzles at all, or steps < 1.
    """
    device = model.inner.device
    depth = _depth(model, steps)
    tallies: dict[str, _Tally] = {}
    with evaluating(model):
        for name, batch, *_ in labelled_batches(batches, max_puzzles, ranks):
            tally = tallies.setdefault(name, _Tally(depth, loss_type, rules, cuda_graph))
            if len(batch["labels"]):
                outputs = tally.add(model, {key: t.to(device) for key, t in batch.items()})
                for key, parts in (collect or {}).items():
                    parts.append(outputs[key].cpu())
                if observe is not None:
                    observe(name, outputs)
    if not tallies:
        raise ValueError("there is nothing to evaluate: the data has no puzzles")
    return {name: tally.report(ranks) for name, tally in tallies.items()}


def predict(
    model: Model,
    inputs: Tensor,
    puzzle_identifiers: Tensor | None = None,
    *,
    reasoning: Reasoning | str | None = None,
    batch_size: int = 256,
    numbers: Tensor | None = None,
    **settings: Any,
) -> Answers:
    """Answer puzzles given as tokens.

    Args:
        model: put into evaluation mode, and back as it was.
        inputs: [N, L] int, on any device.  puzzle_identifiers: [N] int; None is the blank one.
        reasoning: how, or the name of a preset; None is one rollout of the model's own depth and
            its answer of highest q.
        batch_size: rollouts side by side; changes speed and memory, not what is drawn.
        numbers: [N] int64 in [0, 2**32), by which random numbers are drawn; None is 0, 1, ...
        settings: fields of `Reasoning`, in place of those of `reasoning`.

    Raises:
        ValueError: a wrong dtype or shape, or a setting that is wrong or not for this model.
    """
    puzzles = _puzzles(model, inputs, puzzle_identifiers, numbers)
    plan = plan_for(model, reasoning, **settings)
    budget, parts = Budget(plan.budget, timed=False), []
    for rows, rollouts in blocks(model, puzzles, plan, batch_size, budget):
        for _ in rollouts.run():
            pass
        parts.append(_answers(puzzles.inputs[rows].cpu(), rollouts.result(), plan))
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return Answers(*(torch.cat(column) for column in columns))


def watch(
    model: Model,
    inputs: Tensor,
    puzzle_identifiers: Tensor | None = None,
    *,
    reasoning: Reasoning | str | None = None,
    batch_size: int = 256,
    numbers: Tensor | None = None,
    shared: Budget | None = None,
    **settings: Any,
) -> Iterator[Frame]:
    """Answer one puzzle, inputs [1, L], and see every step; arguments and errors as `predict`.

    The model is in evaluation mode until the last frame; whoever stops looking stops the work. The
    time between two frames in which the caller does not wait for one is not charged to the budget.

    Args:
        shared: seconds that several puzzles share, in place of those of `reasoning`.
    """
    puzzles = _puzzles(model, inputs, puzzle_identifiers, numbers)
    if len(puzzles.inputs) != 1:
        raise ValueError(f"one puzzle is watched at a time, got {len(puzzles.inputs)}")
    plan = plan_for(model, reasoning, **settings)
    return _frames(model, puzzles, plan, batch_size, shared or Budget(plan.budget, timed=False))


def _frames(
    model: Model, puzzles: Puzzles, plan: Reasoning, width: int, budget: Budget
) -> Iterator[Frame]:
    kind, k = kind_of(model.config), plan.rollouts
    tokens = puzzles.inputs.cpu().long().repeat(k, 1)
    certainty = kind.given(tokens).float()
    q, steps = torch.full((k,), -torch.inf), torch.zeros(k, dtype=torch.int64)
    running = torch.ones(k, dtype=torch.bool)
    with evaluating(model):
        rollouts = Rollouts(model, kind, puzzles, plan, width, budget, watched=True)
        held: Frame | None = None
        for number, seen in enumerate(rollouts.run(), 1):
            if held is not None:
                yield held
            rows = torch.from_numpy(seen.items)
            assert seen.said.certainty is not None
            tokens[rows] = seen.said.tokens.cpu()
            certainty[rows] = seen.said.certainty.cpu()
            q[rows] = seen.said.q.cpu()
            steps[rows] = torch.from_numpy(seen.taken)
            running[rows] = torch.from_numpy(seen.going_on)
            now = [t.clone() for t in (tokens, certainty, q, steps, running)]
            held = Frame(number, now[0], now[1], now[2], now[3], now[4])
        answer = _answers(puzzles.inputs.cpu(), rollouts.result(), plan)
        if held is None:
            held = Frame(0, tokens, certainty, q, steps, running)
        yield replace(held, running=torch.zeros_like(running), answer=answer)


def plan_for(model: Model, reasoning: Reasoning | str | None = None, **settings: Any) -> Reasoning:
    """The reasoning that `predict` would follow, everything filled in; arguments and errors as
    there."""
    kind = kind_of(model.config)
    return reasoning_of(reasoning, kind, settings).resolved(model.config, kind, model.q_threshold)


def blocks(
    model: Model, puzzles: Puzzles, plan: Reasoning, batch_size: int, budget: Budget
) -> Iterator[tuple[slice, Rollouts]]:
    """The rollouts of all puzzles, as many puzzles at a time as memory for their records allows:
    which puzzles, and their rollouts, to be run before the next ones are asked for."""
    kind = kind_of(model.config)
    at_once = puzzles_at_once(plan, puzzles.inputs.shape[1], model.config.vocab_size)
    with evaluating(model):
        for start in range(0, max(len(puzzles.inputs), 1), at_once):
            rows = slice(start, start + at_once)
            part = Puzzles(*(t[rows] for t in vars(puzzles).values()))
            yield rows, Rollouts(model, kind, part, plan, batch_size, budget)


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """In evaluation mode, and back as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _answers(inputs: Tensor, result: Result, plan: Reasoning) -> Answers:
    record = result.record
    choice = choose(record, plan, result.valid)
    answered = choice.step.unsqueeze(-1) > 0
    tokens = torch.where(answered, result.tokens(choice.rollout, choice.step), inputs.long())
    passes = record.steps.sum(-1)
    return Answers(
        tokens, choice.q, choice.step, choice.rollout, passes, choice.confidence, result.cut
    )


def _puzzles(
    model: Model, inputs: Tensor, identifiers: Tensor | None, numbers: Tensor | None
) -> Puzzles:
    """On the model's device, checked."""
    config = model.config
    given = {"inputs": inputs, "puzzle_identifiers": identifiers, "numbers": numbers}
    for name, t in given.items():
        if t is not None and not isinstance(t, Tensor):
            raise ValueError(f"{name} must be a tensor of integers, got {type(t).__name__}")
    count = len(inputs)
    for name, t in given.items():
        if t is not None and (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool):
            raise ValueError(f"{name} must be integers, got {t.dtype}")
        if t is not None and name != "inputs" and t.shape != (count,):
            raise ValueError(f"{name} must be [{count}], got {list(t.shape)}")
    if inputs.dim() != 2 or inputs.shape[1] != config.seq_len:
        raise ValueError(f"inputs must be [N, {config.seq_len}], got {list(inputs.shape)}")
    if inputs.numel() and not 0 <= int(inputs.min()) <= int(inputs.max()) < config.vocab_size:
        raise ValueError(f"tokens must be in 0..{config.vocab_size - 1}")
    rows = config.num_puzzle_identifiers if config.puzzle_emb_ndim else 1 << 31
    ends = (("numbers", numbers, 1 << 32), ("puzzle_identifiers", identifiers, rows))
    for name, t, end in ends:
        if t is not None and t.numel() and not 0 <= int(t.min()) <= int(t.max()) < end:
            raise ValueError(f"{name} must be in 0..{end - 1}")
    if kind_of(config).rules is not None and bool((inputs == 0).any()):
        raise ValueError("0 is padding: tokens of a puzzle begin at 1 (blank, or a wall)")
    device = model.inner.device
    if identifiers is None:
        identifiers = torch.zeros(count, dtype=torch.int32)
    if numbers is None:
        numbers = torch.arange(count)
    return Puzzles(
        inputs.to(device, torch.int32),
        identifiers.to(device, torch.int32),
        numbers.to(device, torch.int64),
    )
