"""One optimizer step on the device: no shape depends on data, and the host waits for nothing.

Owns the step and all that changes with it: batch, carries, gradients, schedule, the guard against
gradients that are not finite, metrics. On NVIDIA GPUs the whole of it is one CUDA graph, with
several processes two and what they exchange between them; elsewhere the same code runs call by
call, so that its exactness is tested there. Imported by trainer. The
order of operations is that of the official loop (arXiv 2510.04871, Algorithm 3): count the step,
forward, loss / global batch, backward, learning rate, optimizers, EMA.

Dims legend: B batch, L puzzle tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trm_fast import noise, optim
from trm_fast.capture import Capture
from trm_fast.config import TrainConfig
from trm_fast.data.augment import AUGMENTATIONS, augmentation_words, hand_back
from trm_fast.data.feed import Feed
from trm_fast.distributed import SINGLE, Ranks
from trm_fast.ema import EMA
from trm_fast.flat import joined, lay_out
from trm_fast.gradient_sum import GradientSum
from trm_fast.losses import ACTLossHead, MetricSums
from trm_fast.philox import Draws, integers, uniform
from trm_fast.recursion import Carry, Exploration
from trm_fast.rules import blank_token

__all__ = ["TrainStep"]

# Purposes of draws; those of data.augment lie between them.
EXPLORATION, STATES = 0, 3


class TrainStep:
    """A training run's state on the device, and one step of it.

    The model's parameters are moved into one buffer, and so are their gradients; both stay there.

    Args:
        config: with `global_batch_size` items a step, in `grad_accum` parts.
        head: the loss around a Model in training mode, on its device.
        feed: of this process's part of batches of `global_batch_size` items.
        total_steps: of the schedule.
        ranks: the processes of the run; each has a part of every batch, and all make the same step.

    Attributes:
        optimizers: with their base learning rates.  ema: the moving average, or None.
        guard: what became of steps with gradients that are not finite.
        sums: metrics since somebody cleared them.  carries: one for each part of a batch.
        forward: the loss head, compiled where the settings say so.
    """

    def __init__(
        self,
        config: TrainConfig,
        head: ACTLossHead,
        feed: Feed,
        total_steps: int,
        ranks: Ranks = SINGLE,
    ) -> None:
        self.config, self.feed, self.total_steps, self.ranks = config, feed, total_steps, ranks
        model: Any = head.model
        self.model, self.head, self.model_config = model, head, model.config
        local = config.local_batch_size(ranks.world)
        self.part = local // config.grad_accum
        device = feed.device
        if feed.dataset.local_batch_size != local:
            raise ValueError(
                f"the feed has batches of {feed.dataset.local_batch_size}, each process has "
                f"{local} of global_batch_size={config.global_batch_size}"
            )
        _gather(list(model.parameters()))
        self.ema = EMA(model, config.ema_rate, config.ema_warmup) if config.ema else None
        self.optimizers = optim.build_optimizers(model, config, world_size=ranks.world)
        self._of_rows = [
            optimizer
            for optimizer, _ in self.optimizers
            if isinstance(optimizer, optim.SparseEmbeddingSignSGD)
        ]
        for optimizer in self._of_rows:
            optimizer.gathers = False  # `_exchange` does it
        self.forward = torch.compile(head) if config.compile else head
        self.carries: list[Carry] = []
        self.sums = MetricSums()
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        # Draws are by the place in the global batch, whoever works on it.
        self._rows = torch.arange(local, device=device) + ranks.rank * local
        self._ids = torch.zeros(local, dtype=torch.int32, device=device)  # worked on
        self._seen = torch.zeros(2, device=device)  # loss, norm of the puzzle rows' gradient
        self.guard = optim.NonFiniteGuard(config.max_skipped, self._ids)
        self._places = self._lay_out_gradients()
        weights = [(p, grad) for p, grad in self._places if isinstance(p, nn.Parameter)]
        self._gradients = joined([grad for _, grad in weights])
        self._gradients += [g for p, g in self._places if not isinstance(p, nn.Parameter)]
        self._sum = GradientSum(() if config.freeze_weights else weights, ranks)
        self._weights = [p.data_ptr() for p, _ in self._places]
        self._hands_back = False
        self._blank = blank_token(self.model_config)
        # Dropout draws from PyTorch's generator, which a recomputed pass looks up on the host.
        captured = config.cuda_graph and not self.model_config.dropout
        # Nothing that waits for another process is captured: it lies between two graphs.
        body = self._step if ranks.world == 1 else self._gradients_of_batch
        self._capture = Capture(body, device, captured)
        self._capture_update = Capture(self._update, device, captured)

    def _lay_out_gradients(self) -> list[tuple[Tensor, Tensor]]:
        """Everything that is trained, each with the tensor that is its gradient from now on."""
        params: list[Tensor] = [p for p in self.model.parameters() if p.requires_grad]
        places = list(zip(params, lay_out(params), strict=True))
        if self.model_config.puzzle_emb_ndim:
            rows = self.model.puzzle_emb.local_weights
            places.append((rows, torch.zeros_like(rows).detach()))
        return places

    @property
    def captured(self) -> bool:
        """Whether the next step is the replay of a graph."""
        return self._capture.captured

    def run(self, name: str, examples: np.ndarray, step: int, plain: bool = False) -> None:
        """Enqueue optimizer step `step` (1-based) on examples [B] int64 of a data set; `plain`
        without a graph.

        Raises:
            ValueError: another number of examples; a model in evaluation mode, or whose weights
                were moved meanwhile.
        """
        if not self.model.training:
            raise ValueError("the model is in evaluation mode: call train() before a step")
        if self._weights != [p.data_ptr() for p, _ in self._places]:
            raise ValueError("the model's weights were moved after its training step was made")
        for p, grad in self._places:
            p.grad = grad  # whatever became of it between two steps
        self.feed.put(name, examples)
        self._count.fill_(step)
        self._hands_back = step < self.config.curriculum * self.total_steps
        self.sums.steps += 1
        # Other cycles are other work: a graph of it is captured anew, a compiled step compiled.
        self.model.inner.cycles = self.config.cycles(step, self.total_steps)
        self._capture((self._hands_back, self.model.inner.cycles), plain)
        if self.ranks.world > 1:
            self._exchange()
            self._capture_update(plain=plain)

    # What is captured reads and writes tensors that stay where they are.

    def _step(self) -> None:
        self._gradients_of_batch()
        self._update()

    def _gradients_of_batch(self) -> None:
        """This process's part of everything that the update needs."""
        batch, drawn = self._next_batch()
        for grad in self._gradients:
            grad.zero_()
        loss, ids = self._backward(batch, drawn)
        self._ids.copy_(ids)
        self._seen[0].copy_(loss)
        rows = [p for p, _ in self._places if not isinstance(p, nn.Parameter)]
        if rows and self.ranks.world > 1:  # each has gradients of other rows
            self._seen[1].copy_(optim.gradient_norm(rows))

    def _exchange(self) -> None:
        """Make them those of all processes: a fault of one is a fault of all."""
        self._sum.finish()
        for optimizer in self._of_rows:
            optimizer.gather()
        self.ranks.add_up_([self._seen])

    def _update(self) -> None:
        """The change of weights, rows and average."""
        config, (loss, rows_norm) = self.config, self._seen.unbind()
        norm = optim.clip_gradients(self.optimizers, config.grad_clip)
        if self.ranks.world > 1:
            norm = torch.where(rows_norm.isfinite(), norm, torch.nan)
        found_inf = self.guard.check(self._count, loss, norm, self._ids)
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
        counts = augmentation_words(inputs.shape[1], config.augment, self._hands_back)
        counts = {EXPLORATION: 2, **counts}
        if self.model_config.draws_states:
            counts[STATES] = noise.WORDS
        draws = Draws(config.seed, self._count, self._rows, counts)
        if config.augment != "none":
            inputs, labels = AUGMENTATIONS[config.augment](inputs, labels, draws)
        if self._hands_back:
            fraction = 1 - self._count / (config.curriculum * self.total_steps)
            inputs = hand_back(inputs, labels, fraction, draws, self._blank)
        words = draws.words(EXPLORATION)
        most = self.model_config.halt_max_steps
        drawn = Exploration(uniform(words[:, 0]), integers(words[:, 1], 2, most + 1))
        if STATES in counts:
            drawn.streams = noise.starts(draws.words(STATES))
        return batch | {"inputs": inputs, "labels": labels}, drawn

    def _backward(self, batch: dict[str, Tensor], drawn: Exploration) -> tuple[Tensor, Tensor]:
        """Gradients of the whole batch, part by part; returns the loss per item, 0-d, and the
        puzzle identifiers [B] of what was worked on."""
        total = torch.zeros((), device=self.feed.device)
        worked_on: list[Tensor] = []
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
                drawn=Exploration(
                    drawn.uniform[rows],
                    drawn.least[rows],
                    None if drawn.streams is None else drawn.streams[rows],
                ),
            )
            loss = loss / self.config.global_batch_size
            if index + 1 == self.config.grad_accum and not self._capture.captures:
                self._sum.begin()
            loss.backward()
            self._keep(index, carry)  # not before: the backward reads what is written over
            total = total + loss.detach()
            worked_on.append(carry.current_data["puzzle_identifiers"])
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
        return total, torch.cat(worked_on)

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
        """Everything but weights, their average and the count of steps: the live tensors. Waits for
        the device. All processes must call it, and the first gets the whole."""
        return {
            "optimizers": [optimizer.state_dict() for optimizer, _ in self.optimizers],
            "ema_updates": self.ema.updates if self.ema else 0,
            "guard": self.guard.state_dict(),
            "carries": self._whole_carries(),
            "sums": self.sums.state_dict(self.ranks),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        device = self.feed.device
        for (optimizer, _), values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        self.guard.load_state_dict(state["guard"])
        self.carries = self._own_carries(state["carries"])
        self.sums.load_state_dict(state["sums"], device, self.ranks)
        self._capture.reset()
        self._capture_update.reset()

    def worked_on(self) -> list[int]:
        """Puzzle identifiers, each once, of the batch that stopped the run; waits for the device.
        All processes must call it, and the first gets those of all."""
        return sorted(self.ranks.collected(self.guard.identifiers()).unique().tolist())

    def _whole_carries(self) -> list[dict[str, Any]]:
        """Those of all processes, as one for the whole batch; of one process as they are."""
        own = [carry.to_dict() for carry in self.carries]
        if self.ranks.world == 1 or not own:
            return own
        return [_mapped(lambda ts: self.ranks.collected(torch.cat([t.cpu() for t in ts])), *own)]

    def _own_carries(self, saved: list[dict[str, Any]]) -> list[Carry]:
        """This process's part of them, in as many as a batch has parts now."""
        device, local = self.feed.device, len(self._rows)
        if len(saved) == self.config.grad_accum and self.ranks.world == 1:
            return [Carry.from_dict(values, device) for values in saved]
        if not saved:
            return []
        whole, first = _mapped(torch.cat, *saved), self.ranks.rank * local
        parts = []
        for begin in range(first, first + local, self.part):
            rows = slice(begin, begin + self.part)
            parts.append(Carry.from_dict(_mapped(lambda ts: ts[0][rows], whole), device))  # noqa: B023
        return parts


def _mapped(function: Callable[[Any], Tensor], *nested: Any) -> Any:
    """function([tensors in the same place of each]) in every place of nested dictionaries."""
    if isinstance(nested[0], dict):
        return {key: _mapped(function, *(d[key] for d in nested)) for key in nested[0]}
    return function(list(nested))


def _gather(params: list[torch.nn.Parameter]) -> None:
    """Move parameters into one buffer, those of each dtype one after another."""
    for p, place in zip(params, lay_out(params), strict=True):
        place.copy_(p.detach())
        p.data = place
