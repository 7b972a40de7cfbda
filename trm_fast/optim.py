"""Optimizers, their schedule, gradient clipping.

Owns AdamATan2 (scale-free Adam, https://arxiv.org/abs/2407.05872), sign descent for the puzzle
rows, and the choice of optimizers for a model. May be imported by trainer and the command modules;
imports ops, reference and config types only.

Dims legend: B slots of a batch, N puzzle identifiers, E width of a puzzle row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from trm_fast import reference
from trm_fast.ops import Ops

if TYPE_CHECKING:
    from trm_fast.config import TrainConfig

__all__ = [
    "AdamATan2",
    "NonFiniteGuard",
    "SparseEmbeddingSignSGD",
    "build_optimizers",
    "clip_gradients",
    "cosine_schedule",
    "gradient_norm",
    "set_learning_rates",
    "sign_descend_rows_",
    "zero_gradients",
]


class AdamATan2(Optimizer):
    """Adam with atan2(m, sqrt(v)) in place of m / (sqrt(v) + eps), decoupled weight decay.

    With bc_i = 1 - beta_i^step, one step is: m, v <- their moving averages; p <- p (1 - lr wd);
    p <- p - lr / bc1 * atan2(m, sqrt(v / bc2)). No epsilon, and invariant to the gradient's scale.
    Per parameter the state is exp_avg and exp_avg_sq (the parameter's shape; float32, or float64
    for float64 parameters) and step (int); `state_dict` round trips continue bitwise.
    Parameters without a gradient are skipped. Source: https://arxiv.org/abs/2407.05872, section 5.

    Args:
        params: tensors or parameter groups, any floating dtype.
        lr: learning rate >= 0; the trainer sets it before each step.
        betas: decay rates of the two averages, each in [0, 1).
        weight_decay: decoupled, >= 0.
        ops: the implementation of `adam_atan2_ema_`; None is the reference.

    Raises:
        ValueError: a setting out of range; a sparse gradient in `step`.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        ops: Ops | None = None,
    ) -> None:
        _check_rate("lr", lr)
        _check_rate("weight_decay", weight_decay)
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas is {betas!r}; two numbers in [0, 1) are allowed")
        self._update: Callable[..., None] = (ops or reference).adam_atan2_ema_
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_update": self._update}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient; returns what `closure` returned, or None."""
        loss = _evaluate(closure)
        for group in self.param_groups:
            by_step: dict[int, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_step.setdefault(self._advance(p), []).append(p)
            for step, params in by_step.items():
                states = [self.state[p] for p in params]
                self._update(
                    params,
                    [p.grad for p in params],
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                    [],
                    [],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    step=step,
                    ema_decay=0.0,
                )
        return loss

    def _advance(self, p: Tensor) -> int:
        """Count one more step of `p`, creating its state on the first; returns the 1-based step."""
        assert p.grad is not None
        if p.grad.is_sparse:
            raise ValueError("AdamATan2 was given a sparse gradient; only dense ones are allowed")
        state = self.state[p]
        if not state:
            dtype = torch.promote_types(p.dtype, torch.float32)
            state["step"] = 0
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        state["step"] += 1
        return state["step"]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, copying it; averages keep their own dtype.

        (The base class would cast them to the parameter's dtype and share the given tensors.)
        """
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for p, saved_id in zip(params, saved_ids, strict=True):
            for name, value in state_dict["state"].get(saved_id, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.to(p.device, copy=True)


class SparseEmbeddingSignSGD(Optimizer):
    """Sign descent on the puzzle rows that a batch used, each identifier once, decoupled decay.

    For rarely seen rows Adam's step is the sign of the gradient. A row used by several slots gets
    the sign of the SUM of their gradients, and its decay once; the blank identifier's row too.
    No state. Shapes are fixed by the batch, so that a step can be captured into a graph.
    Source: the puzzle embedding of HRM (https://arxiv.org/abs/2506.21734) as TRM trains it.

    Args:
        params: the three buffers of the puzzle embedding in any order: weights [N, E] float,
            local_weights [B, E] float with requires_grad (its `.grad` is read), local_ids [B] int.
        lr: learning rate >= 0; the trainer sets it before each step.
        weight_decay: decoupled, >= 0.
        world_size: 1, as official loops pass it; more processes come with a later version.

    Raises:
        ValueError: other than those three tensors, or a setting out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        *,
        world_size: int = 1,
    ) -> None:
        if world_size != 1:
            raise ValueError(f"world_size is {world_size!r}; this version trains in 1 process")
        _check_rate("lr", lr)
        _check_rate("weight_decay", weight_decay)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        for group in self.param_groups:
            _puzzle_buffers(group["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the rows named by local_ids; nothing happens without a gradient."""
        loss = _evaluate(closure)
        for group in self.param_groups:
            weights, local_weights, local_ids = _puzzle_buffers(group["params"])
            if local_weights.grad is not None:
                sign_descend_rows_(
                    weights, local_weights.grad, local_ids, group["lr"], group["weight_decay"]
                )
        return loss


def _puzzle_buffers(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(weights, local_weights, local_ids) told apart by gradient and rank; ValueError if not so."""
    local = [t for t in tensors if t.requires_grad]
    ids = [t for t in tensors if not t.requires_grad and t.ndim == 1]
    rows = [t for t in tensors if not t.requires_grad and t.ndim == 2]
    if len(tensors) != 3 or len(local) != 1 or len(ids) != 1 or len(rows) != 1:
        shapes = [tuple(t.shape) for t in tensors]
        raise ValueError(
            f"SignSGD was given tensors of shapes {shapes}; allowed are the three buffers of a "
            "puzzle embedding: weights, local_weights (requires_grad), local_ids"
        )
    return rows[0], local[0], ids[0]


def sign_descend_rows_(
    weights: Tensor, grad: Tensor, ids: Tensor, lr: float, weight_decay: float
) -> None:
    """weights[id] <- weights[id] (1 - lr wd) - lr sign(sum of grad over the slots of id), in place.

    Every slot computes its identifier's new row from the same sum, so slots that share a row write
    equal values and need no owner, no `unique` and no data-dependent shape.

    Args:
        weights: [N, E] float. grad: [B, E] float. ids: [B] int in [0, N).
    """
    slots = ids.shape[0]
    ids = ids.long()
    index = torch.arange(slots, device=ids.device)
    same = ids.unsqueeze(0) == ids.unsqueeze(1)  # [B, B]
    first = torch.where(same, index, slots).amin(1) if slots else index  # slot that saw it first
    sums = torch.zeros_like(grad)
    if grad.is_cuda:  # sorted, hence the same sum in every run; index_add_ there is atomic
        sums.index_put_((first,), grad, accumulate=True)
    else:
        sums.index_add_(0, first, grad)
    rows = weights[ids].mul_(1.0 - lr * weight_decay)
    weights[ids] = rows.add_(torch.sign(sums[first]).to(rows.dtype), alpha=-lr)


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


def build_optimizers(
    model: nn.Module, config: TrainConfig, ops: Ops | None = None
) -> list[tuple[Optimizer, float]]:
    """The optimizers of a model with their base learning rates, in the order they step.

    Puzzle rows (where the model has any) take SparseEmbeddingSignSGD at `puzzle_emb_lr`, and with
    `freeze_weights` they alone are trained. The weights take, by `optimizer`: "adam_atan2";
    "adamw"; "muon" for the matrices of the blocks at `muon_lr`, and AdamW at `lr` for embeddings,
    heads and biases. Learning rates start at 0.

    Args:
        model: a Model or the loss head around it, compiled or not.
        config: reads optimizer, lr, muon_lr, weight_decay, beta1, beta2, freeze_weights,
            puzzle_emb_lr, puzzle_emb_weight_decay.
        ops: the model's operations; None takes the model's own `ops`, else the reference.

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
        built.append((SparseEmbeddingSignSGD(rows.buffers(), 0.0, decay), config.puzzle_emb_lr))
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
        return [(AdamATan2([p for _, p in named], 0.0, betas, decay, ops), config.lr)]
    built: list[tuple[Optimizer, float]] = []
    if config.optimizer == "muon":
        matrices = [p for name, p in named if _is_block_matrix(name, p)]
        if not matrices:
            raise ValueError("optimizer is 'muon' but the model has no block matrices")
        named = [(name, p) for name, p in named if not _is_block_matrix(name, p)]
        built.append((torch.optim.Muon(matrices, 0.0, weight_decay=decay), config.muon_lr))
    else:
        assert config.optimizer == "adamw", config.optimizer
    if named:
        others = [p for _, p in named]
        adamw = torch.optim.AdamW(others, 0.0, betas, weight_decay=decay, foreach=True)
        built.append((adamw, config.lr))
    return built


def _is_block_matrix(name: str, p: Tensor) -> bool:
    return ".layers." in name and p.ndim == 2


def set_learning_rates(
    optimizers: Iterable[tuple[Optimizer, float]], step: int, warmup: int, total: int, ratio: float
) -> float:
    """Give every parameter group the rate of 1-based step `step`; returns the last one's rate."""
    rate = 0.0
    for optimizer, base_lr in optimizers:
        rate = cosine_schedule(step, base_lr, warmup, total, ratio)
        for group in optimizer.param_groups:
            group["lr"] = rate
    return rate


def zero_gradients(model: nn.Module, optimizers: Iterable[tuple[Optimizer, float]]) -> None:
    """Drop every gradient: the optimizers' and, for frozen weights, the model's own."""
    model.zero_grad(set_to_none=True)
    for optimizer, _ in optimizers:
        optimizer.zero_grad(set_to_none=True)


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
        nn.utils.clip_grads_with_norm_(weights, max_norm, norm, foreach=True)
    if any(row.grad is not None for row in rows):
        row_norm = gradient_norm(rows).to(norm.device)
        norm = torch.where(torch.isfinite(row_norm), norm, torch.full_like(norm, torch.nan))
    return norm


class NonFiniteGuard:
    """Tells, before the optimizer and the EMA see a gradient, whether the step may be made.

    Attributes:
        skipped: steps refused so far. consecutive: refused in a row.
    After `limit` refusals in a row it is exhausted, and the run should stop.
    """

    def __init__(self, limit: int = 5) -> None:
        self.limit = limit
        self.skipped = 0
        self.consecutive = 0

    def allows(self, norm: Tensor | float) -> bool:
        """Whether `norm` (from `clip_gradients`) is finite; counts it if not. Reads the device."""
        if math.isfinite(float(norm)):
            self.consecutive = 0
            return True
        self.skipped += 1
        self.consecutive += 1
        return False

    @property
    def exhausted(self) -> bool:
        """Whether the last `limit` steps were all refused."""
        return self.consecutive >= self.limit

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "consecutive": self.consecutive}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.skipped, self.consecutive = int(state["skipped"]), int(state["consecutive"])


def _evaluate(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _check_rate(name: str, value: float) -> None:
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} is {value!r}; a finite number >= 0 is allowed")
