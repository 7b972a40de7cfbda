"""The optimizers: AdamATan2, sign descent for the puzzle rows, Muon.

Owns their updates. All follow PyTorch's convention for steps that a CUDA graph replays: the rate of
a group may be a 0-d tensor, and where the attribute `found_inf` (0-d float on the device, or None)
is not 0, a step changes nothing. Imported by `optim.py`, which chooses among them; imports ops,
reference and flat only.

Dims legend: B slots of a batch, N puzzle identifiers, E width of a puzzle row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer

from trm_fast import reference
from trm_fast.distributed import gather_into_
from trm_fast.flat import joined, lay_out
from trm_fast.ops import Ops

__all__ = ["AdamATan2", "Muon", "SparseEmbeddingSignSGD", "sign_descend_rows_"]


class AdamATan2(Optimizer):
    """Adam with atan2(m, sqrt(v)) in place of m / (sqrt(v) + eps), decoupled weight decay.

    With bc_i = 1 - beta_i^step, one step is: m, v <- their moving averages; p <- p (1 - lr wd);
    p <- p - lr / bc1 * atan2(m, sqrt(v / bc2)). No epsilon, and invariant to the gradient's scale.
    Per parameter the state is exp_avg and exp_avg_sq (the parameter's shape; float32, or float64
    for float64 parameters) and step (int); `state_dict` round trips continue bitwise.
    Parameters without a gradient are skipped; those that lie as `flat.lay_out` lays them, and whose
    gradients do, are updated as one. Source: https://arxiv.org/abs/2407.05872, section 5.

    Args:
        params: tensors or parameter groups, any floating dtype.
        lr: learning rate >= 0; the trainer sets it before each step.
        betas: decay rates of the two averages, each in [0, 1).
        weight_decay: decoupled, >= 0.
        ops: the implementation of `adam_atan2_ema_`; None is the reference.
        capturable: steps are counted on the device, as 0-d int64 tensors, so that a CUDA graph may
            be replayed; all state is there from the beginning.

    Raises:
        ValueError: a setting out of range; a sparse gradient in `step`.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        ops: Ops | None = None,
        capturable: bool = False,
    ) -> None:
        _check_rate("lr", lr)
        _check_rate("weight_decay", weight_decay)
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas is {betas!r}; two numbers in [0, 1) are allowed")
        self._update: Callable[..., None] = (ops or reference).adam_atan2_ema_
        self.capturable = capturable
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})
        if capturable:
            for group in self.param_groups:
                self._make_state(group["params"])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_update": self._update, "capturable": self.capturable}

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        emas: Sequence[Tensor] = (),
        ema_decay: float | Tensor = 0.0,
    ) -> Any:
        """Update every parameter that has a gradient; returns what `closure` returned, or None.

        Args:
            emas: moving averages of all parameters of the first group, updated in the same pass:
                ema <- ema_decay ema + (1 - ema_decay) p.
        """
        loss = _evaluate(closure)
        average_of = dict(zip(self.param_groups[0]["params"], emas, strict=True)) if emas else {}
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            self._make_state(params)
            for step, members in self._advance(params):
                states = [self.state[p] for p in members]
                lists: list[list[Tensor]] = [
                    members,
                    [p.grad for p in members if p.grad is not None],
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                    [average_of[p] for p in members if p in average_of],
                ]
                flat = [joined(tensors) for tensors in lists]
                if len({len(tensors) for tensors in flat if tensors}) > 1:
                    flat = lists
                self._update(
                    *flat,
                    [],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    step=step,
                    ema_decay=ema_decay,
                    found_inf=0.0 if self.found_inf is None else self.found_inf,
                )
        return loss

    def _make_state(self, params: Sequence[Tensor]) -> None:
        """State for those of `params` that have none yet."""
        new = [p for p in params if not self.state[p]]
        if any(p.grad is not None and p.grad.is_sparse for p in new):
            raise ValueError("AdamATan2 was given a sparse gradient; only dense ones are allowed")
        if not new:
            return
        count = torch.zeros((), dtype=torch.int64, device=new[0].device)
        averages = lay_out(new, torch.float32), lay_out(new, torch.float32)
        for p, exp_avg, exp_avg_sq in zip(new, *averages, strict=True):
            step = count if self.capturable else 0
            self.state[p] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}

    def _advance(self, params: Sequence[Tensor]) -> list[tuple[int | Tensor, list[Tensor]]]:
        """Count one more step; the parameters grouped by their 1-based step."""
        by_step: dict[int, list[Tensor]] = {}
        for p in params:
            step = self.state[p]["step"]
            by_step.setdefault(id(step) if self.capturable else step, []).append(p)
        grouped: list[tuple[int | Tensor, list[Tensor]]] = []
        for members in by_step.values():
            step = self.state[members[0]]["step"]
            made = 1 if self.found_inf is None else (self.found_inf == 0).to(torch.int64)
            if self.capturable:
                # An update that is left out still needs a number to divide by.
                grouped.append((step.add_(made).clamp(min=1), members))
            else:
                for p in members:
                    self.state[p]["step"] = step + int(made)
                grouped.append((max(step + int(made), 1), members))
        return grouped

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, copying it; averages keep their own dtype.

        (The base class would cast them to the parameter's dtype and share the given tensors.)
        """
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        given = {p: state_dict["state"].get(i, {}) for p, i in zip(params, ids, strict=True)}
        self.state.clear()
        for group in self.param_groups:
            by_step: dict[int, list[Tensor]] = {}
            for p in group["params"]:
                if given[p]:
                    by_step.setdefault(int(given[p]["step"]), []).append(p)
            for step, members in by_step.items():
                self._make_state(members)
                for p in members:
                    for name in ("exp_avg", "exp_avg_sq"):
                        self.state[p][name].copy_(given[p][name])
                    if not self.capturable:
                        self.state[p]["step"] = step
                if self.capturable:
                    self.state[members[0]]["step"].fill_(step)
            if self.capturable:
                self._make_state(group["params"])


class Muon(Optimizer):
    """Momentum whose step is made orthogonal, for matrices: https://kellerjordan.github.io/posts/muon

    buf <- mu buf + (1 - mu) g; the step is the Newton-Schulz approximation of the orthogonal factor
    of g + mu (buf - g), times lr sqrt(max(1, rows / columns)), after the decay p <- p (1 - lr wd).
    Equal to `torch.optim.Muon` with its defaults, which a CUDA graph cannot replay with another lr.

    Args:
        params: matrices.  lr: learning rate >= 0.  weight_decay: decoupled, >= 0.
        momentum: mu in [0, 1).

    Raises:
        ValueError: a setting out of range, or a parameter that is no matrix.
    """

    found_inf: Tensor | None = None
    COEFFICIENTS = (3.4445, -4.7750, 2.0315)
    ITERATIONS = 5
    SMALLEST = 1e-7

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
    ) -> None:
        _check_rate("lr", lr)
        _check_rate("weight_decay", weight_decay)
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum is {momentum!r}; a number in [0, 1) is allowed")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.ndim != 2:
                raise ValueError(f"Muon was given a tensor of shape {tuple(p.shape)}, not a matrix")
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient; returns what `closure` returned, or None."""
        loss = _evaluate(closure)
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in (p for p in group["params"] if p.grad is not None):
                buffer = self.state[p]["momentum_buffer"]
                averaged = buffer.lerp(p.grad, 1 - momentum)
                direction = self._orthogonal(p.grad.lerp(averaged, momentum)).to(p.dtype)
                rate = lr * math.sqrt(max(1, p.shape[0] / p.shape[1]))
                new = p * (1 - lr * group["weight_decay"]) - direction * rate
                for t, value in ((buffer, averaged), (p, new)):
                    if self.found_inf is not None:
                        value = torch.where(self.found_inf != 0, t, value)
                    t.copy_(value)
        return loss

    def _orthogonal(self, g: Tensor) -> Tensor:
        """About U V^T of g = U S V^T [M, N], in bfloat16, singular values between 0.5 and 1.5."""
        a, b, c = self.COEFFICIENTS
        tall = g.shape[0] > g.shape[1]
        x = (g.t() if tall else g).bfloat16()
        x = x / x.norm().clamp(min=self.SMALLEST)
        for _ in range(self.ITERATIONS):
            gram = x @ x.t()
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.t() if tall else x


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
        world_size: processes of torch.distributed whose slots are gathered before the step.

    Attributes:
        gathers: whether `step` calls `gather`; False leaves that to the caller.

    Raises:
        ValueError: other than those three tensors, or a setting out of range.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        *,
        world_size: int = 1,
    ) -> None:
        there = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if world_size not in (1, there):
            raise ValueError(f"world_size is {world_size!r}; torch.distributed has {there} here")
        self.world_size, self.gathers = world_size, True
        # By group, of all processes: gradients [world_size * B, E], identifiers [world_size * B].
        self._slots: dict[int, tuple[Tensor, Tensor]] = {}
        _check_rate("lr", lr)
        _check_rate("weight_decay", weight_decay)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        for group in self.param_groups:
            _puzzle_buffers(group["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the rows named by local_ids; nothing happens without a gradient."""
        loss = _evaluate(closure)
        if self.world_size > 1 and self.gathers:
            self.gather()
        for index, group in enumerate(self.param_groups):
            weights, local_weights, local_ids = _puzzle_buffers(group["params"])
            if local_weights.grad is not None:
                own = (local_weights.grad, local_ids)
                grad, ids = own if self.world_size == 1 else self._slots[index]
                rates = group["lr"], group["weight_decay"]
                sign_descend_rows_(weights, grad, ids, *rates, self.found_inf)
        return loss

    def gather(self) -> None:
        """Fetch gradients and identifiers of all processes' slots; they stay in their places."""
        for index, group in enumerate(self.param_groups):
            _, local_weights, local_ids = _puzzle_buffers(group["params"])
            if local_weights.grad is None:
                continue
            own = (local_weights.grad, local_ids)
            count = self.world_size * len(local_ids)
            if index not in self._slots or len(self._slots[index][1]) != count:
                grad, ids = (t.new_empty((count, *t.shape[1:])) for t in own)
                self._slots[index] = (grad, ids)
            for whole, part in zip(self._slots[index], own, strict=True):
                gather_into_(whole, part)


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
    weights: Tensor,
    grad: Tensor,
    ids: Tensor,
    lr: float | Tensor,
    weight_decay: float,
    found_inf: Tensor | None = None,
) -> None:
    """weights[id] <- weights[id] (1 - lr wd) - lr sign(sum of grad over the slots of id), in place.

    Every slot computes its identifier's new row from the same sum, so slots that share a row write
    equal values and need no owner, no `unique` and no data-dependent shape.

    Args:
        weights: [N, E] float. grad: [B, E] float. ids: [B] int in [0, N). lr: a number or 0-d.
        found_inf: 0-d; nothing changes where it is not 0.
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
    rows = weights[ids]
    new = rows * (1.0 - lr * weight_decay) - torch.sign(sums[first]).to(rows.dtype) * lr
    weights[ids] = new if found_inf is None else torch.where(found_inf != 0, rows, new)


def _evaluate(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _check_rate(name: str, value: float) -> None:
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} is {value!r}; a finite number >= 0 is allowed")
