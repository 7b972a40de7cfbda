"""The moving average of a model's weights, which is what gets evaluated.

Owns EMA. May be imported by the trainer; imports nothing of the package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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
        self.updates = 0
        self.shadow = {name: p.detach().clone() for name, p in _trained(model)}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average one step towards `model`'s parameters."""
        self.updates += 1
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        params, shadow = self._pairs(model)
        # Two products and a sum, not a lerp: rounds as the official average does.
        if params:
            torch._foreach_mul_(shadow, decay)
            torch._foreach_add_(shadow, torch._foreach_mul(params, 1.0 - decay))

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
        self.updates = int(state["updates"])

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
