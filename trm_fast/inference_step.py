"""One supervision step in evaluation mode, on tensors that stay where they are.

Owns the step that every answer comes from: on NVIDIA GPUs it is one CUDA graph for each of a few
batch sizes, smaller batches being padded; elsewhere the same code runs call by call at the size
given. Imported by `inference.py`.

Dims legend: B items of a batch, N items of the step, N >= B, L puzzle tokens, V vocabulary.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from trm_fast.capture import Capture
from trm_fast.model import Model
from trm_fast.recursion import named

__all__ = ["InferenceStep", "StepOutput", "borrowed", "padded_size"]

KEPT = 12  # steps of one model that wait to be used again


@dataclass
class StepOutput:
    """One supervision step of a batch: preds [B, L] int64, q [B] float32, logits [B, L, V]."""

    preds: Tensor
    q: Tensor
    logits: Tensor


def padded_size(batch: int) -> int:
    """Items of the graph that serves a batch: powers of two to 64, then whole 64s."""
    if batch <= 64:
        return 1 << max(0, batch - 1).bit_length()
    return -(-batch // 64) * 64


class InferenceStep:
    """Supervision steps of up to `size` items, none of them halting early.

    Args:
        model: in evaluation mode whenever the step runs; not kept alive by it.
        size: N.  cuda_graph: False never captures.

    Attributes:
        size: N.  used: B; where it is raised, `restart` has to be given the new ones.
    """

    def __init__(self, model: Model, size: int, cuda_graph: bool = True) -> None:
        self._model = weakref.ref(model)
        device, length = model.inner.device, model.config.seq_len
        self._data = {
            "inputs": torch.zeros(size, length, dtype=torch.int32, device=device),
            "puzzle_identifiers": torch.zeros(size, dtype=torch.int32, device=device),
        }
        self._carry = model.initial_carry(self._data)
        self.size, self.used = size, size
        self._output: StepOutput | None = None
        self._capture = Capture(self._run, device, cuda_graph)
        self._weights = _places(model) if self.captures else ()
        self._rounded = _rounded(model) if self.captures else {}

    @property
    def captures(self) -> bool:
        """Whether it is worth keeping: a graph is, or will be, captured."""
        return self._capture.captures

    @property
    def captured(self) -> bool:
        """Whether the next run is the replay of a graph."""
        return self._capture.captured

    def fits(self, model: Model) -> bool:
        """Whether the weights still lie where a graph reads them."""
        return self._weights == _places(model)

    def start(self, batch: dict[str, Tensor]) -> None:
        """Take new puzzles, "inputs" [B, L] int, "puzzle_identifiers" [B] int, B <= N; and the
        weights as they are now."""
        self._refresh()
        self.used = len(batch["inputs"])
        for name, place in self._data.items():
            place[: self.used].copy_(batch[name])
            place[self.used :].zero_()
        self._carry.halted.fill_(True)
        self._carry.steps.zero_()

    def _refresh(self) -> None:
        model = self._model()
        assert model is not None, "the model is gone"
        masters = dict(model.named_parameters())
        for name, copy in self._rounded.items():
            copy.copy_(masters[name])

    def restart(
        self, items: Tensor, batch: dict[str, Tensor], states: dict[str, Tensor] | None = None
    ) -> None:
        """Other puzzles, one for each of the `items` [M] int64 in place of what they worked on.

        `states` [M, S, D] by name are what they start from; None is the model's own beginning.
        """
        for name, place in self._data.items():
            place[items] = batch[name].to(place.dtype)
        self._carry.halted[items] = states is None
        if states is not None:
            for name, state in named(self._carry.inner_carry).items():
                state[items] = states[name]
            for name, place in self._carry.current_data.items():
                place[items] = batch[name].to(place.dtype)
            self._carry.steps[items] = 0

    def go_on_from(self, other: InferenceStep, items: Tensor) -> None:
        """Take over the `items` [B] int64 of another step of the model, B <= N, as they stand."""
        self._refresh()
        self.used = len(items)
        theirs, mine = other._carry, self._carry
        pairs = [(theirs.steps, mine.steps), (theirs.halted, mine.halted)]
        pairs += [(other._data[name], place) for name, place in self._data.items()]
        pairs += [(theirs.current_data[n], place) for n, place in mine.current_data.items()]
        states = named(theirs.inner_carry)
        pairs += [(states[n], state) for n, state in named(mine.inner_carry).items()]
        for source, place in pairs:
            place[: self.used] = source[items]

    def states(self) -> dict[str, Tensor]:
        """The states [N, S, D] that the next step starts from, by name, to be changed in place; of
        items that `restart` left at the model's own beginning, any content."""
        return named(self._carry.inner_carry)

    def run(self) -> StepOutput:
        """The next supervision step; the tensors are the caller's."""
        self._capture()
        assert self._output is not None
        found, rows = self._output, slice(self.used)
        if not self.captures and self.used == self.size:
            return found
        return StepOutput(
            found.preds[rows].clone(), found.q[rows].clone(), found.logits[rows].clone()
        )

    def _run(self) -> None:
        """What is captured."""
        model = self._model()
        assert model is not None, "the model is gone"
        if self._rounded:
            carry, outputs = functional_call(model, self._rounded, (self._carry, self._data))
        else:  # functional_call looks through all modules even so
            carry, outputs = model(self._carry, self._data)
        carry.halted = torch.zeros_like(carry.halted)
        logits, q = outputs["logits"], outputs["q_halt_logits"]
        if self.captures:
            self._carry.copy_(carry)
        else:
            self._carry = carry
        # A graph's own tensors: every replay writes them again.
        self._output = StepOutput(logits.argmax(-1), q, logits)


_free: weakref.WeakKeyDictionary[Model, list[InferenceStep]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def borrowed(model: Model, batch: int, cuda_graph: bool = True) -> Iterator[InferenceStep]:
    """A step for batches of `batch` items that nobody else uses meanwhile.

    With CUDA graphs it is used again by later calls: capturing takes much longer than a step. A
    model with hooks is run call by call, so that they are.
    """
    graphs = cuda_graph and _is_captured(model.inner.device) and not _hooks(model)
    step = _take(model, padded_size(batch)) if graphs else None
    if step is None:
        step = InferenceStep(model, padded_size(batch) if graphs else batch, graphs)
    try:
        yield step
    finally:
        if step.captures:
            with _lock:
                _free.setdefault(model, []).append(step)
                del _free[model][:-KEPT]


def _take(model: Model, size: int) -> InferenceStep | None:
    """One that waits, if there is one of this size; those that fit no more are dropped."""
    with _lock:
        waiting = [step for step in _free.get(model, []) if step.fits(model)]
        found = next((step for step in waiting if step.size == size), None)
        _free[model] = [step for step in waiting if step is not found]
    return found


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda"


def _hooks(model: Model) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def _rounded(model: Model) -> dict[str, Tensor]:
    """Copies of the weights in the forward dtype, made once for many steps; {} where they are in it
    already, or are to be quantised from more."""
    dtype = model.inner.forward_dtype
    if dtype == torch.float32 or model.config.quantize != "none":
        return {}
    return {name: p.detach().to(dtype) for name, p in model.named_parameters()}


def _places(model: Model) -> tuple[object, ...]:
    """Where everything lies that a graph of the model reads, and what decides its work."""
    inner = model.inner
    tensors = [*inner.parameters(), *inner.buffers()]
    return (inner.ops, inner.config, model.config, *(t.data_ptr() for t in tensors))
