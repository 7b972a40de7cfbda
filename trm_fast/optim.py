"""Which optimizers train a model; their schedule, gradient clipping, and steps left out.

Owns the choice of optimizers, the learning rate, the gradient norm and the guard against gradients
that are not finite; hands on the optimizers themselves. May be imported by the training step,
trainer and the command modules; imports optimizers, ops and config types only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from trm_fast.flat import joined
from trm_fast.ops import Ops, wide_dtype
from trm_fast.optimizers import AdamATan2, Muon, SparseEmbeddingSignSGD, sign_descend_rows_

if TYPE_CHECKING:
    from trm_fast.config import TrainConfig

__all__ = [
    "AdamATan2",
    "GuardState",
    "Muon",
    "NonFiniteGuard",
    "SparseEmbeddingSignSGD",
    "build_optimizers",
    "clip_gradients",
    "cosine_schedule",
    "gradient_norm",
    "learning_rate",
    "set_learning_rates",
    "sign_descend_rows_",
]


def cosine_schedule(
    step: int, base_lr: float, warmup: int, total: int, min_ratio: float = 0.0
) -> float:
    """Learning rate of the 1-based optimizer step `step`: linear warm-up, then half a cosine.

    The first step runs at base_lr / warmup; at `total` the rate is base_lr * min_ratio; with
    min_ratio = 1 it is constant. Steps beyond `total` are the caller's not to make (the cosine
    would rise again), as in the official training loop.
    """
    if step < warmup:
        return base_lr * step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return base_lr * (min_ratio + max(0.0, (1.0 - min_ratio) * cosine))


def learning_rate(
    step: Tensor, base_lr: float, warmup: int, total: int, min_ratio: float = 0.0
) -> Tensor:
    """`cosine_schedule` of a step counted on the device: 0-d int64 -> 0-d float64 (float32 on MPS),
    without waiting for it."""
    now = step.to(wide_dtype(step.device))
    progress = (now - warmup) / max(1, total - warmup)
    cosine = 0.5 * (1.0 + torch.cos(math.pi * progress))
    decayed = base_lr * (min_ratio + ((1.0 - min_ratio) * cosine).clamp(min=0.0))
    return torch.where(now < warmup, base_lr * now / max(1, warmup), decayed)


def build_optimizers(
    model: nn.Module, config: TrainConfig, ops: Ops | None = None, world_size: int = 1
) -> list[tuple[Optimizer, float]]:
    """The optimizers of a model with their base learning rates, in the order they step.

    Puzzle rows (where the model has any) take SparseEmbeddingSignSGD at `puzzle_emb_lr`, and with
    `freeze_weights` they alone are trained. The weights take, by `optimizer`: "adam_atan2";
    "adamw"; "muon" for the matrices of the blocks at `muon_lr`, and AdamW at `lr` for embeddings,
    heads and biases. Learning rates start at 0. A CUDA graph may replay their steps.

    Args:
        model: a Model or the loss head around it, compiled or not.
        config: reads optimizer, lr, muon_lr, weight_decay, weight_decay_on, beta1, beta2,
            freeze_weights, puzzle_emb_lr, puzzle_emb_weight_decay.
        ops: the model's operations; None takes the model's own `ops`, else the reference.
        world_size: processes whose puzzle rows are gathered.

    Raises:
        ValueError: muon for a model without block matrices.
    """
    inner = model if hasattr(model, "puzzle_emb") else getattr(model, "model", model)
    rows = getattr(inner, "puzzle_emb", None)
    if rows is not None and not any(b.requires_grad for b in rows.buffers()):
        rows = None
    built: list[tuple[Optimizer, float]] = []
    if rows is not None:
        decay = config.puzzle_emb_weight_decay
        signs = SparseEmbeddingSignSGD(rows.buffers(), 0.0, decay, world_size=world_size)
        built.append((signs, config.puzzle_emb_lr))
    if config.freeze_weights:
        assert rows is not None, "TrainConfig refuses freeze_weights without puzzle rows"
        return built
    ops = ops or getattr(inner, "ops", None)
    built += _weight_optimizers(model, config, ops)
    return built


def _weight_optimizers(
    model: nn.Module, config: TrainConfig, ops: Ops | None
) -> list[tuple[Optimizer, float]]:
    betas, decay = (config.beta1, config.beta2), config.weight_decay
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if config.optimizer == "adam_atan2":
        weights = [p for _, p in named]
        return [(AdamATan2(weights, 0.0, betas, decay, ops, capturable=True), config.lr)]
    built: list[tuple[Optimizer, float]] = []
    if config.optimizer == "muon":
        matrices = [p for name, p in named if _is_block_matrix(name, p)]
        if not matrices:
            raise ValueError("optimizer is 'muon' but the model has no block matrices")
        named = [(name, p) for name, p in named if not _is_block_matrix(name, p)]
        built.append((Muon(matrices, 0.0, decay), config.muon_lr))
    else:
        assert config.optimizer == "adamw", config.optimizer
    if named:
        others: Any = [p for _, p in named]
        if config.weight_decay_on == "matrices":
            groups = {decay: [p for p in others if p.ndim > 1]}
            groups[0.0] = groups.get(0.0, []) + [p for p in others if p.ndim < 2]
            others = [{"params": ps, "weight_decay": d} for d, ps in groups.items() if ps]
        settings: Any = {"betas": betas, "weight_decay": decay, "fused": True, "capturable": True}
        adamw = torch.optim.AdamW(others, 0.0, **settings)
        # Without this it warns of the plain steps before a capture.
        adamw._warned_capturable_if_run_uncaptured = True  # type: ignore[attr-defined]
        built.append((adamw, config.lr))
    return built


def _is_block_matrix(name: str, p: Tensor) -> bool:
    return ".layers." in name and p.ndim == 2


def set_learning_rates(
    optimizers: Iterable[tuple[Optimizer, float]],
    step: Tensor,
    warmup: int,
    total: int,
    ratio: float,
) -> None:
    """Give every parameter group the rate of the 1-based step, 0-d int64 on the device."""
    for optimizer, base_lr in optimizers:
        rate = learning_rate(step, base_lr, warmup, total, ratio)
        if isinstance(optimizer, torch.optim.AdamW):
            rate = rate.float()  # its fused kernel reads no other
        for group in optimizer.param_groups:
            group["lr"] = rate


def gradient_norm(tensors: Iterable[Tensor]) -> Tensor:
    """L2 norm over the gradients of `tensors` (those that have one): 0-d float, 0 for none.

    Non-finite if any gradient is. Stays on the device: reading it is the caller's decision.
    """
    grads = [t.grad for t in tensors if t.grad is not None]
    if not grads:
        return torch.zeros(())
    return nn.utils.get_total_norm(grads).detach()


def clip_gradients(
    optimizers: Iterable[tuple[Optimizer, float]], max_norm: float | None = None
) -> Tensor:
    """Scale the weights' gradients so that their joint norm is at most `max_norm`; once per step.

    Returns the norm before clipping, 0-d, without reading it; None or 0 clips nothing. Puzzle rows
    are neither counted nor scaled (their step is a sign), unless nothing else is trained; but a
    non-finite gradient of theirs makes the returned norm NaN, so that one number tells whether the
    step may be made.
    """
    rows: list[Tensor] = []
    weights: list[Tensor] = []
    for optimizer, _ in optimizers:
        chosen = rows if isinstance(optimizer, SparseEmbeddingSignSGD) else weights
        chosen += [p for group in optimizer.param_groups for p in group["params"]]
    if not weights:
        return gradient_norm(rows)
    norm = gradient_norm(weights)
    if max_norm:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for grad in joined([p.grad for p in weights if p.grad is not None]):
            grad.mul_(factor)
    if any(row.grad is not None for row in rows):
        row_norm = gradient_norm(rows).to(norm.device)
        norm = torch.where(torch.isfinite(row_norm), norm, torch.full_like(norm, torch.nan))
    return norm


class NonFiniteGuard:
    """Decides on the device, before optimizers and average see a gradient, whether a step is made.

    A step whose gradient is not finite is left out. After `limit` of them in a row, or a loss that
    is not finite, all further steps are left out too, so that nothing is lost until somebody reads
    what happened.

    Args:
        limit: refusals in a row that stop the run.  ids: puzzle identifiers of a batch [B] int, for
            their shape and device.
    """

    def __init__(self, limit: int, ids: Tensor) -> None:
        self.limit = limit
        self._counts = torch.zeros(3, dtype=torch.int64, device=ids.device)
        self._seen = torch.zeros(2, device=ids.device)
        self._ids = torch.zeros_like(ids)

    def check(self, step: Tensor, loss: Tensor, norm: Tensor, ids: Tensor) -> Tensor:
        """0-d float32, not 0 where this step must change nothing.

        Args:
            step: 1-based, 0-d int64.  loss: 0-d.  norm: of `clip_gradients`, 0-d.
            ids: puzzle identifiers of the batch, [B] int.
        """
        skipped, consecutive, stopped_at = self._counts.unbind()
        loss, norm = loss.detach().float(), norm.float()
        finite_loss = loss.isfinite()
        bad = ~(finite_loss & norm.isfinite())
        goes_on = stopped_at == 0
        now = torch.where(bad, consecutive + 1, 0)
        consecutive = torch.where(goes_on, now, consecutive)
        stops = goes_on & (~finite_loss | (consecutive >= self.limit))
        at = torch.where(stops, step, stopped_at)
        self._counts.copy_(torch.stack([skipped + (bad & goes_on), consecutive, at]))
        self._seen.copy_(torch.where(bad & goes_on, torch.stack([loss, norm]), self._seen))
        self._ids.copy_(torch.where(stops, ids, self._ids))
        return (bad | (at != 0)).float()

    def read(self) -> GuardState:
        """What happened so far; waits for the device."""
        skipped, consecutive, stopped_at = self._counts.tolist()
        loss, norm = self._seen.tolist()
        return GuardState(skipped, consecutive, stopped_at, loss, norm)

    def identifiers(self) -> Tensor:
        """Puzzle identifiers [B] of the batch that stopped the run."""
        return self._ids

    def state_dict(self) -> dict[str, int]:
        state = self.read()
        return {"skipped": state.skipped, "consecutive": state.consecutive}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        counts = torch.tensor([int(state["skipped"]), int(state["consecutive"]), 0])
        self._counts.copy_(counts)


class GuardState(NamedTuple):
    """Steps left out so far, and in a row; the step that stopped the run (0: none did); loss and
    gradient norm of the step left out last."""

    skipped: int
    consecutive: int
    stopped_at: int
    loss: float
    norm: float
