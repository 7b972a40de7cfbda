"""A network whose operations and memory policy are chosen for the device it lies on.

Owns the choosing again when a network is moved. Imported by the networks, which derive from it.

Dims legend: B batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from trm_fast import backends, memory
from trm_fast.backends import Choice
from trm_fast.config import ModelConfig
from trm_fast.ops import Ops

log = logging.getLogger("trm_fast")


class Served(nn.Module):
    """What every network has beside its weights; `serve` is the last line of its constructor.

    Attributes:
        config: its settings.  forward_dtype: of the states.  ops: its operations.
    """

    ops: Ops

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.forward_dtype: torch.dtype = getattr(torch, config.forward_dtype)
        self._policies: dict[int, str] = {}

    def like(self) -> Tensor:
        """Something of the states' device and dtype."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the states are."""
        return self.like().device

    def serve(self) -> None:
        """Choose the operations for where the network is now."""
        self._policies = {}
        like = self.like()
        try:
            self.ops = backends.select(self.config.backend, like.device, like.dtype, self.config)
        except ValueError as error:
            if like.device.type != "cpu" or not torch.cuda.is_available():
                raise
            self.ops = backends.refusing(error)  # a GPU's backend, asked for before `.to("cuda")`
            return
        log.info("implementations on %s: %s", like.device, self.backend_report())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Served:
        super()._apply(fn, recurse)
        self.serve()
        return self

    def backend_report(self) -> list[Choice]:
        """Which implementation serves each operation here, in training or not as it is now, and
        why."""
        like, config = self.like(), self.config
        return backends.report(config.backend, like.device, like.dtype, config, self.training)

    def policy(self, batch: int) -> str:
        """What the backward keeps. "auto" is decided once per batch size, when a carry is made, so
        that a run does not change its mind and a compiled forward does not ask for free memory."""
        if self.config.policy != "auto":
            return self.config.policy
        if batch not in self._policies:
            like = self.like()
            engine = backends.recursion_engine(like.device, like.dtype, self.config)
            chosen = memory.fastest_policy(self.config, batch, like.device, engine)
            self._policies[batch] = chosen
        return self._policies[batch]
