"""Losses over answers and halting, and the metrics of a supervision step.

Owns `ACTLossHead`, a drop-in for the official class of that name. Imported by trainer,
inference, contenders and users' own loops. Source: arXiv 2510.04871, section 4; stablemax from
Prieto et al. 2025, "Grokking at the Edge of Numerical Stability" (arXiv 2501.04697).

Dims legend: B batch, L puzzle tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from trm_fast import backends
from trm_fast.config import did_you_mean
from trm_fast.data.format import IGNORE_LABEL_ID
from trm_fast.distributed import SINGLE, Ranks
from trm_fast.ops import Ops, wide_dtype
from trm_fast.recursion import Exploration
from trm_fast.symmetry import box_shape


def _ignored(labels: Tensor, ignore_index: int, valid_mask: Tensor | None) -> Tensor:
    valid = labels != ignore_index if valid_mask is None else valid_mask
    return torch.where(valid, labels, IGNORE_LABEL_ID)


def stablemax_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = IGNORE_LABEL_ID,
    valid_mask: Tensor | None = None,
    ops: Ops | None = None,
) -> Tensor:
    """Cross entropy with s(x) = x + 1 (x >= 0) or 1 / (1 - x) in place of exp.

    Args:
        logits: [..., V], any floating dtype.  labels: [...] int; `ignore_index` costs nothing.
        valid_mask: [...] bool, in place of comparing with `ignore_index`.
        ops: whose `stablemax_loss` to run; the reference if None.

    Returns:
        [...] float64 (float32 on MPS and from fused implementations).
    """
    if ops is None:
        ops = backends.select("reference", logits.device, logits.dtype)
    return ops.stablemax_loss(logits, _ignored(labels, ignore_index, valid_mask))[0]


def softmax_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = IGNORE_LABEL_ID,
    valid_mask: Tensor | None = None,
    ops: Ops | None = None,
) -> Tensor:
    """Cross entropy in float32. Arguments as `stablemax_cross_entropy`; returns [...] float32."""
    targets = _ignored(labels, ignore_index, valid_mask).long()
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(
        wide.flatten(0, -2), targets.flatten(), ignore_index=IGNORE_LABEL_ID, reduction="none"
    )
    return loss.view(labels.shape)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "stablemax_cross_entropy": stablemax_cross_entropy,
    "softmax_cross_entropy": softmax_cross_entropy,
}


def constraint_loss(logits: Tensor, boxes: bool = True) -> Tensor:
    """How much a Sudoku's units are expected to hold of a digit beyond one, [B] float32.

    For each row, column and, with `boxes`, box: the sum over its cells of a digit's probability,
    where that exceeds 1, less 1; averaged over units of a kind and digits, added over the kinds.

    Args:
        logits: [B, L, V] of tokens 0 padding, 1 empty, digit d as d + 1; L = side^2, V = side + 2.

    Raises:
        ValueError: sizes that are not those of a Sudoku.

    Source: the training of s4nj1th/tiny-recursive-model, which has rows and columns.
    """
    box = box_shape(cells=logits.shape[1])
    if logits.shape[2] != box.side + 2:
        raise ValueError(
            f"constraint_weight is for Sudoku: {logits.shape[1]} cells have {box.side + 2} token "
            f"values, not {logits.shape[2]}"
        )
    wide = logits[..., 2:].to(torch.promote_types(logits.dtype, torch.float32))
    grid = wide.softmax(-1).unflatten(1, (box.side, box.side))
    sums = [grid.sum(2), grid.sum(1)]
    if boxes:
        split = "b (r i) (c j) v -> b (r c) (i j) v"
        sums.append(rearrange(grid, split, i=box.rows, j=box.cols).sum(2))
    return torch.stack([(units - 1).clamp_min(0).mean((1, 2)) for units in sums]).sum(0)


class ACTLossHead(nn.Module):
    """Runs a model for one supervision step and adds loss and metrics.

    Args:
        model: `Model`, the official model class, or either under torch.compile.
        loss_type: a name in `LOSSES`.
        constraint_weight: of `constraint_loss` beside it; 0 leaves that out.
        constraint_boxes: whether boxes count there too.
        step_decay: weight of the cells' loss in a supervision step, of that in the one before; the
            first has weight 1. Metrics are without it (arXiv 2511.08653, lambda = 0.7).

    Raises:
        ValueError: an unknown loss_type.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_type: str,
        constraint_weight: float = 0.0,
        constraint_boxes: bool = True,
        step_decay: float = 1.0,
    ) -> None:
        super().__init__()
        self.step_decay = step_decay
        self.constraint_weight, self.constraint_boxes = constraint_weight, constraint_boxes
        if loss_type not in LOSSES:
            hint = did_you_mean(loss_type, LOSSES)
            raise ValueError(f"unknown loss_type {loss_type!r}{hint}; allowed: {', '.join(LOSSES)}")
        self.model = model
        self.loss_fn = LOSSES[loss_type]

    def initial_carry(self, batch: dict[str, Tensor]) -> Any:
        """The model's carry for batches shaped as this one."""
        return self.model.initial_carry(batch)  # type: ignore[operator]

    def _per_item(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of the cells with labels, logits [N, L, V] and labels [N, L] -> [N]."""
        mask = labels != IGNORE_LABEL_ID
        ops = getattr(self.model, "ops", None)
        per_token = self.loss_fn(logits, labels, valid_mask=mask, ops=ops)
        return (per_token / mask.sum(-1, keepdim=True).clamp_min(1)).sum(-1)

    def forward(
        self,
        return_keys: Iterable[str],
        carry: Any,
        batch: dict[str, Tensor],
        drawn: Exploration | None = None,
    ) -> tuple[Any, Tensor, dict[str, Tensor], dict[str, Tensor], Tensor]:
        """One supervision step.

        Args:
            return_keys: outputs to return, detached: those of the model, and "preds" [B, L] int64.
            carry, batch: as `Model.forward`, with "labels" [B, L] int32, -100 ignored.
            drawn: as `Model.forward`; for our model only.

        Returns:
            The next carry; the loss summed over the batch (divide by the global batch size);
            metrics summed over halted items that have labels, losses over all items: count,
            accuracy, exact_accuracy, q_halt_accuracy, steps, lm_loss, q_halt_loss
            [, q_continue_loss] [, constraint_loss], scalars; the outputs asked for; whether all
            items halted.
        """
        given: dict[str, Any] = {} if drawn is None else {"drawn": drawn}
        if self.training and getattr(getattr(self.model, "config", None), "latents", 1) > 1:
            given["losses"] = self._per_item
        carry, outputs = self.model(carry=carry, batch=batch, **given)
        labels = carry.current_data["labels"]
        q_halt = outputs["q_halt_logits"]
        with torch.no_grad():
            outputs["preds"] = outputs["logits"].argmax(-1)
            mask = labels != IGNORE_LABEL_ID
            counts = mask.sum(-1)
            divisor = counts.clamp_min(1).unsqueeze(-1)
            correct = mask & (outputs["preds"] == labels)
            solved = correct.sum(-1) == counts
            metrics = _metrics(carry, counts, divisor, correct, solved, q_halt)
        per_token = self.loss_fn(
            outputs["logits"], labels, valid_mask=mask, ops=getattr(self.model, "ops", None)
        )
        per_token = per_token / divisor
        lm_loss = per_token.sum()
        q_loss = F.binary_cross_entropy_with_logits(
            q_halt, solved.to(q_halt.dtype), reduction="sum"
        )
        metrics |= {"lm_loss": lm_loss.detach(), "q_halt_loss": q_loss.detach()}
        if self.step_decay < 1:
            weights = self.step_decay ** (carry.steps - 1).to(per_token.dtype)
            lm_loss = (per_token.sum(-1) * weights).sum()
        if "target_q_continue" in outputs:
            continue_loss = F.binary_cross_entropy_with_logits(
                outputs["q_continue_logits"], outputs["target_q_continue"], reduction="sum"
            )
            metrics["q_continue_loss"] = continue_loss.detach()
            q_loss = q_loss + continue_loss
        if self.constraint_weight:
            broken = constraint_loss(outputs["logits"], self.constraint_boxes).sum()
            metrics["constraint_loss"] = broken.detach()
            lm_loss = lm_loss + self.constraint_weight * broken
        returned = {key: outputs[key].detach() for key in return_keys if key in outputs}
        return carry, lm_loss + 0.5 * q_loss, metrics, returned, carry.halted.all()


def _metrics(
    carry: Any, counts: Tensor, divisor: Tensor, correct: Tensor, solved: Tensor, q_halt: Tensor
) -> dict[str, Tensor]:
    """Sums over items that halted and have labels."""
    counted = carry.halted & (counts > 0)
    accuracy = (correct.float() / divisor).sum(-1)
    return {
        "count": counted.sum(),
        "accuracy": torch.where(counted, accuracy, 0).sum(),
        "exact_accuracy": (counted & solved).sum(),
        "q_halt_accuracy": (counted & ((q_halt >= 0) == solved)).sum(),
        "steps": torch.where(counted, carry.steps, 0).sum(),
    }


class MetricSums:
    """Metrics of several steps, added up on the device: reading them is left to the log line.

    Attributes:
        steps: batches counted.  names: of the sums, empty before the first.
        totals: the sums, [len(names)] float64 (float32 on MPS), or None before the first.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.names: tuple[str, ...] = ()
        self.totals: Tensor | None = None

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add what `ACTLossHead` returned for one batch, or a part of it, in place."""
        values = torch.stack([v.to(wide_dtype(v.device)) for v in metrics.values()])
        if self.totals is None:
            self.names, self.totals = tuple(metrics), torch.zeros_like(values)
        self.totals.add_(values)

    def clear(self) -> None:
        """Forget the values, not where they are."""
        self.steps = 0
        self._zero()

    def means(self, batch: int, ranks: Ranks = SINGLE) -> dict[str, float]:
        """Losses per item of the batch, everything else per halted item with labels, over all
        processes; waits for the device."""
        sums = {name: float(value) for name, value in self._of_all(ranks).items()}
        count = max(sums.get("count", 0.0), 1.0)
        per_item = batch * max(self.steps, 1)
        return {
            f"train/{name}": value / (per_item if name.endswith("loss") else count)
            for name, value in sums.items()
        }

    def state_dict(self, ranks: Ranks = SINGLE) -> dict[str, Any]:
        """{"steps": int, "values": {name: 0-d tensor}} over all processes."""
        return {"steps": self.steps, "values": self._of_all(ranks)}

    def load_state_dict(
        self, state: Mapping[str, Any], device: torch.device, ranks: Ranks = SINGLE
    ) -> None:
        """Restore what `state_dict` returned: the first process has it all."""
        self.clear()
        self.steps = int(state["steps"])
        wide = wide_dtype(device)
        if values := {name: value.to(wide).to(device) for name, value in state["values"].items()}:
            self.add(values)
            if not ranks.first:
                self._zero()

    def _zero(self) -> None:
        if self.totals is not None:
            self.totals.zero_()

    def _of_all(self, ranks: Ranks) -> dict[str, Tensor]:
        """The sums over all processes by name, on the host; waits for the device."""
        if self.totals is None:
            return {}
        return dict(zip(self.names, ranks.totals(self.totals.to("cpu", copy=True)), strict=True))
