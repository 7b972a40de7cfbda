"""The moving average of a model's weights, which is what gets evaluated.

Owns EMA. May be imported by the training step and the trainer; imports flat and ops
only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trm_fast.flat import joined, lay_out
from trm_fast.ops import wide_dtype

__all__ = ["EMA"]


class EMA:
    """Exponential moving average of a model's parameters: shadow <- d shadow + (1 - d) param.

    d is `decay`, or with `warmup` min(decay, (1 + t) / (10 + t)) for the t-th update (1-based).
    Covers parameters that require gradients, as the official code does; buffers (puzzle rows,
    initial states) are left alone. Names are the model's, with or without a loss head around it.

    Args:
        model: the module to follow; the average starts as a copy of its parameters.
        decay: in [0, 1].
        warmup: let the average forget its start quickly.

    Raises:
        ValueError: decay out of range; a model or state with other parameters.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, warmup: bool = False) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"ema decay is {decay!r}; a number in [0, 1] is allowed")
        self.decay = decay
        self.warmup = warmup
        named = dict(_trained(model))
        self.shadow = dict(zip(named, lay_out(list(named.values())), strict=True))
        _copy_all(list(self.shadow.values()), list(named.values()))
        device = next(iter(self.shadow.values())).device if self.shadow else torch.device("cpu")
        self._updates = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def updates(self) -> int:
        """Updates made so far; waits for the device, where they are counted."""
        return int(self._updates)

    @torch.no_grad()
    def advance(self, found_inf: Tensor | None = None) -> Tensor:
        """Count one more update, and return its decay d, 0-d float64 (float32 on MPS).

        Where `found_inf` (0-d) is not 0 nothing is counted; the update is the caller's to leave
        out.
        """
        made = 1 if found_inf is None else (found_inf == 0).to(torch.int64)
        self._updates.add_(made)
        wide = wide_dtype(self._updates.device)
        decay = torch.full((), self.decay, dtype=wide, device=self._updates.device)
        if self.warmup:
            t = self._updates.to(wide)
            decay = torch.minimum(decay, (1 + t) / (10 + t))
        return decay

    @torch.no_grad()
    def update(self, model: nn.Module, found_inf: Tensor | None = None) -> None:
        """Move the average one step towards `model`'s parameters, unless `found_inf` is not 0."""
        decay = self.advance(found_inf)
        if found_inf is not None:
            decay = torch.where(found_inf != 0, 1.0, decay)
        params, shadow = self._pairs(model)
        if len(joined(params)) == len(joined(shadow)):
            params, shadow = joined(params), joined(shadow)
        # Two products and a sum, not a lerp: rounds as the official average does.
        for p, average in zip(params, shadow, strict=True):
            kept, taken = decay.to(average.dtype), (1.0 - decay).to(average.dtype)
            average.mul_(kept).add_(p * taken)

    @contextmanager
    def swap(self, model: nn.Module) -> Iterator[None]:
        """Within the context, `model` computes with the average; afterwards it is as before.

        Values are copied in place (storages and captured graphs stay valid), the parameters come
        back bitwise also after an exception, and the average itself cannot be changed meanwhile.
        """
        params, shadow = self._pairs(model)
        with torch.no_grad():
            before = [p.detach().clone() for p in params]
        try:
            _copy_all(params, shadow)
            yield
        finally:
            _copy_all(params, before)

    def merged(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`state_dict` of the model (or of its loss head) with the average as its parameters."""
        keys = {_plain(key): key for key in state_dict}
        return {**state_dict, **{keys[name]: value for name, value in self.shadow.items()}}

    def load_merged(self, state_dict: Mapping[str, Tensor], updates: int) -> None:
        """Take the average from what `merged` returned, so that it need be stored only once."""
        shadow = {_plain(k): v for k, v in state_dict.items() if _plain(k) in self.shadow}
        self.load_state_dict({"updates": updates, "shadow": shadow})

    def state_dict(self) -> dict[str, Any]:
        """{"updates": int, "shadow": {name: tensor}}; the tensors are the live ones."""
        return {"updates": self.updates, "shadow": dict(self.shadow)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, copying into the present tensors."""
        shadow: Mapping[str, Tensor] = state["shadow"]
        self._check_names(shadow)
        for name, value in shadow.items():
            if value.shape != self.shadow[name].shape:
                raise ValueError(
                    f"ema state of {name!r} has shape {tuple(value.shape)}; "
                    f"the model has {tuple(self.shadow[name].shape)}"
                )
        with torch.no_grad():
            for name, value in shadow.items():
                self.shadow[name].copy_(value)
        self._updates.fill_(int(state["updates"]))

    def _check_names(self, given: Mapping[str, Tensor]) -> None:
        if odd := sorted(given.keys() ^ self.shadow.keys()):
            raise ValueError(f"ema and model differ in {len(odd)} parameters, first {odd[0]!r}")

    def _pairs(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        params = dict(_trained(model))
        self._check_names(params)
        return [params[name] for name in self.shadow], list(self.shadow.values())


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, p in model.named_parameters():
        if p.requires_grad:
            yield _plain(name), p


def _plain(name: str) -> str:
    """The name inside the model, without torch.compile's and the loss head's prefix."""
    return name.replace("_orig_mod.", "").removeprefix("model.")


@torch.no_grad()
def _copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
