"""A model small enough for a test of anything, its batches and steps; what autograd holds.

Imported by tests of the model, of its parts and of the operations.

Dims legend: B batch, L puzzle tokens (10), V vocabulary (9), D width (16), P prefix tokens (2).
"""

import gc
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trm_fast.model import Model
from trm_fast.recursion import Carry

IDENTIFIERS = 6
VOCABULARY = 9


def tiny_config(**changes: Any) -> dict[str, Any]:
    """Every key without a default, at a tiny size, and `changes`."""
    return {
        "batch_size": 4,
        "seq_len": 10,
        "num_puzzle_identifiers": IDENTIFIERS,
        "vocab_size": VOCABULARY,
        "H_cycles": 2,
        "L_cycles": 2,
        "L_layers": 1,
        "hidden_size": 16,
        "expansion": 2.0,
        "intermediate_multiple": 8,
        "num_heads": 2,
        "pos_encodings": "rope",
        "halt_max_steps": 4,
        "halt_exploration_prob": 0.0,
        "puzzle_emb_ndim": 16,
        "puzzle_emb_len": 2,
        "forward_dtype": "float32",
        "policy": "save",
        **changes,
    }


# One of each mixer; further arguments of tiny_config.
MIXERS: dict[str, dict[str, Any]] = {
    "attention": {},
    "mlp_t": {"mlp_t": True, "pos_encodings": "none"},
}


def tiny_model(seed: int = 0, **changes: Any) -> Model:
    """A model whose puzzle rows and halting head are not zero, so that every input counts."""
    torch.manual_seed(seed)
    model = Model(tiny_config(**changes))
    with torch.no_grad():
        if model.config.puzzle_emb_ndim:
            model.puzzle_emb.weights.normal_()
        model.inner.q_head.weight.normal_()
        model.inner.q_head.bias.zero_()
    return model


def tiny_batch(
    batch: int = 4, seed: int = 1, length: int = 10, vocab: int = 9
) -> dict[str, Tensor]:
    """inputs and labels [B, L] int32 (some labels ignored), puzzle_identifiers [B] int32."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, dtype=torch.int32)

    labels = draw(VOCABULARY, batch, length)
    labels[draw(4, batch, length) == 0] = -100
    return {
        "inputs": draw(VOCABULARY, batch, length),
        "labels": labels,
        "puzzle_identifiers": draw(IDENTIFIERS, batch),
    }


def step(
    model: Model, batch: dict[str, Tensor] | None = None, carry: Carry | None = None, seed: int = 5
) -> tuple[Carry, dict[str, Tensor]]:
    """Carry and outputs of one supervision step."""
    batch = tiny_batch() if batch is None else batch
    torch.manual_seed(seed)
    return model(carry=carry or model.initial_carry(batch), batch=batch)


def loss_of(outputs: dict[str, Tensor]) -> Tensor:
    """A number that every output and, through them, every parameter counts in."""
    logits = outputs["logits"].float()
    weights = torch.linspace(-1, 1, logits.numel()).view(logits.shape)
    halting = [value.sum() for name, value in outputs.items() if name.startswith("q_")]
    return (logits * weights).sum() + torch.stack(halting).sum()


def gradients(model: Model, batch: dict[str, Tensor] | None = None) -> dict[str, Tensor | None]:
    """Of every parameter, by one step; those of the puzzle rows add up in their buffer."""
    model.zero_grad()
    loss_of(step(model, batch)[1]).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """The same names and bitwise the same tensors."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def compilable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget earlier compilations and the poisoned allocators, which Dynamo cannot trace."""
    monkeypatch.undo()
    torch._dynamo.reset()


class HeldStorages(TorchDispatchMode):
    """Storages that operations make inside, to ask afterwards which of them are still held.

    Args:
        given: tensors made before, whose storages do not count.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.given = {t.untyped_storage()._cdata for t in given}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and (t.is_floating_point() or t.dtype == torch.uint8):
                storage = t.untyped_storage()
                ref = StorageWeakRef(storage)
                if ref.cdata not in self.given:
                    self.made[ref.cdata] = (ref, storage.nbytes())
        return out

    def held_bytes(self, but: Iterable[Tensor] = ()) -> int:
        """Bytes still held of floating-point tensors and of tapes, those of `but` not counted."""
        gc.collect()
        excluded = {t.untyped_storage()._cdata for t in but}
        return sum(
            size
            for key, (ref, size) in self.made.items()
            if key not in excluded and not ref.expired()
        )


class Peak(HeldStorages):
    """The most bytes of floating-point tensors held at once."""

    peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.made = {key: made for key, made in self.made.items() if not made[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.made.values()))
        return out
