"""One optimizer step on the device: no shape depends on data, and the host waits for nothing.

Owns the step and all that changes with it: batch, carries, gradients, schedule, the guard against
gradients that are not finite, metrics. On NVIDIA GPUs the whole of it is one CUDA graph; elsewhere
the same code runs call by call, so that its exactness is tested there. Imported by trainer. The
order of operations is that of the official loop (arXiv 2510.04871, Algorithm 3): count the step,
forward, loss / global batch, backward, learning rate, optimizers, EMA.

Dims legend: B batch, L puzzle tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from trm_fast import optim
from trm_fast.capture import Capture
from trm_fast.config import TrainConfig
from trm_fast.data.augment import augmentation_words, hand_back, sudoku_augment
from trm_fast.data.feed import Feed
from trm_fast.ema import EMA
from trm_fast.flat import joined, lay_out
from trm_fast.losses import ACTLossHead, MetricSums
from trm_fast.philox import Draws, integers, uniform
from trm_fast.recursion import Carry, Exploration

__all__ = ["TrainStep"]

EXPLORATION = 0  # purpose of draws; those of data.augment come after it


class TrainStep:
    """A training run's state on the device, and one step of it.

    The model's parameters are moved into one buffer, and so are their gradients; both stay there.

    Args:
        config: with `global_batch_size` items a step, in `grad_accum` parts.
        head: the loss around a Model in training mode, on its device.
        feed: of batches of `global_batch_size` items.
        total_steps: of the schedule.

    Attributes:
        optimizers: with their base learning rates.  ema: the moving average, or None.
        guard: what became of steps with gradients that are not finite.
        sums: metrics since somebody cleared them.  carries: one for each part of a batch.
        forward: the loss head, compiled where the settings say so.
    """

    def __init__(
        self, config: TrainConfig, head: ACTLossHead, feed: Feed, total_steps: int
    ) -> None:
        self.config, self.feed, self.total_steps = config, feed, total_steps
        model: Any = head.model
        self.model, self.head, self.model_config = model, head, model.config
        self.part = config.global_batch_size // config.grad_accum
        device = feed.device
        _gather(list(model.parameters()))
        self.ema = EMA(model, config.ema_rate, config.ema_warmup) if config.ema else None
        self.optimizers = optim.build_optimizers(model, config)
        self.forward = torch.compile(head) if config.compile else head
        self.carries: list[Carry] = []
        self.sums = MetricSums()
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._rows = torch.arange(config.global_batch_size, device=device)
        ids = torch.zeros(config.global_batch_size, dtype=torch.int32, device=device)
        self.guard = optim.NonFiniteGuard(config.max_skipped, ids)
        self._gradients = self._lay_out_gradients()
        self._hands_back = False
        self._capture = Capture(self._step, device, config.cuda_graph)

    def _lay_out_gradients(self) -> list[Tensor]:
        """Zero gradients of everything that is trained, as few tensors as they can be joined to."""
        params = [p for p in self.model.parameters() if p.requires_grad]
        for p, grad in zip(params, lay_out(params), strict=True):
            p.grad = grad
        grads = joined([p.grad for p in params])
        if self.model_config.puzzle_emb_ndim:
            rows = self.model.puzzle_emb.local_weights
            rows.grad = torch.zeros_like(rows)
            grads.append(rows.grad)
        return grads

    def run(self, name: str, examples: np.ndarray, step: int, plain: bool = False) -> None:
        """Enqueue optimizer step `step` (1-based) on examples [B] int64 of a data set; `plain`
        without a graph."""
        fading = self.config.curriculum * self.total_steps
        self._hands_back = step < fading
        self.feed.put(name, examples)
        self.sums.steps += 1
        self._capture(self._hands_back, plain)

    def _step(self) -> None:
        """What is captured: reads and writes tensors that stay where they are."""
        config = self.config
        self._count.add_(1)
        batch, drawn = self._next_batch()
        for grad in self._gradients:
            grad.zero_()
        loss = self._backward(batch, drawn)
        norm = optim.clip_gradients(self.optimizers, config.grad_clip)
        ids = batch["puzzle_identifiers"]
        found_inf = self.guard.check(self._count, loss, norm, ids)
        optim.set_learning_rates(
            self.optimizers,
            self._count,
            config.lr_warmup_steps,
            self.total_steps,
            config.lr_min_ratio,
        )
        self._apply(found_inf)

    def _next_batch(self) -> tuple[dict[str, Tensor], Exploration]:
        """Augmented, with solution cells handed back; and what halting draws. None of it comes
        from PyTorch's generator."""
        config, batch = self.config, self.feed.batch()
        inputs, labels = batch["inputs"], batch["labels"]
        sudoku = config.augment == "sudoku"
        counts = augmentation_words(inputs.shape[1], sudoku, self._hands_back)
        draws = Draws(config.seed, self._count, self._rows, {EXPLORATION: 2, **counts})
        if sudoku:
            inputs, labels = sudoku_augment(inputs, labels, draws)
        if self._hands_back:
            fraction = 1 - self._count / (config.curriculum * self.total_steps)
            inputs = hand_back(inputs, labels, fraction, draws)
        words = draws.words(EXPLORATION)
        most = self.model_config.halt_max_steps
        drawn = Exploration(uniform(words[:, 0]), integers(words[:, 1], 2, most + 1))
        return batch | {"inputs": inputs, "labels": labels}, drawn

    def _backward(self, batch: dict[str, Tensor], drawn: Exploration) -> Tensor:
        """Gradients of the whole batch, part by part; returns the loss per item, 0-d."""
        total = torch.zeros((), device=self.feed.device)
        row_ids: list[Tensor] = []
        row_gradients: list[Tensor] = []
        for index in range(self.config.grad_accum):
            rows = slice(index * self.part, (index + 1) * self.part)
            part = {name: value[rows] for name, value in batch.items()}
            if len(self.carries) <= index:
                self.carries.append(self.head.initial_carry(part))
            carry, loss, metrics, _, _ = self.forward(
                return_keys=(),
                carry=self.carries[index],
                batch=part,
                drawn=Exploration(drawn.uniform[rows], drawn.least[rows]),
            )
            loss = loss / self.config.global_batch_size
            loss.backward()
            self._keep(index, carry)  # not before: the backward reads what is written over
            total = total + loss.detach()
            self.sums.add(metrics)
            if self.config.grad_accum > 1 and self.model_config.puzzle_emb_ndim:
                emb = self.model.puzzle_emb
                row_ids.append(emb.local_ids[: self.part].clone())
                row_gradients.append(emb.local_weights.grad[: self.part].clone())
                emb.local_weights.grad.zero_()
        if row_gradients:
            emb = self.model.puzzle_emb
            emb.local_ids.copy_(torch.cat(row_ids))
            emb.local_weights.grad.copy_(torch.cat(row_gradients))
        return total

    def _keep(self, index: int, carry: Carry) -> None:
        """What the next step goes on from; in place, where the step is captured."""
        if self._capture.captures:
            self.carries[index].copy_(carry)
        else:
            self.carries[index] = carry

    def _apply(self, found_inf: Tensor) -> None:
        """Optimizers, then the average; nothing where `found_inf` is not 0."""
        averaged = self.ema is None
        for optimizer, _ in self.optimizers:
            optimizer.found_inf = found_inf  # type: ignore[attr-defined]
            if self.ema is not None and isinstance(optimizer, optim.AdamATan2):
                decay = self.ema.advance(found_inf)
                optimizer.step(emas=list(self.ema.shadow.values()), ema_decay=decay)
                averaged = True
            else:
                optimizer.step()
        if not averaged:
            assert self.ema is not None
            self.ema.update(self.model, found_inf)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Everything but weights, their average and the count of steps; waits for the device."""
        return {
            "optimizers": [optimizer.state_dict() for optimizer, _ in self.optimizers],
            "ema_updates": self.ema.updates if self.ema else 0,
            "guard": self.guard.state_dict(),
            "carries": [carry.to_dict() for carry in self.carries],
            "sums": self.sums.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Restore what `state_dict` returned after `step` steps."""
        device = self.feed.device
        for (optimizer, _), values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        self.guard.load_state_dict(state["guard"])
        self.carries = [Carry.from_dict(values, device) for values in state["carries"]]
        self.sums.load_state_dict(state["sums"], device)
        self._count.fill_(step)
        self._capture.reset()


def _gather(params: list[torch.nn.Parameter]) -> None:
    """Move parameters into one buffer, those of each dtype one after another."""
    for dtype in dict.fromkeys(p.dtype for p in params):
        members = [p for p in params if p.dtype == dtype]
        for p, place in zip(members, lay_out(members), strict=True):
            place.copy_(p.detach())
            p.data = place
