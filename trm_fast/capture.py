"""The same work on a device again and again: on NVIDIA GPUs a CUDA graph, elsewhere plain calls.

Owns warm-up, capture and replay. A graph repeats launches, not Python: what changes between two
runs must lie in tensors that stay where they are, and nothing may wait for the device. Imported by
the training step and by inference; imports torch only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch

__all__ = ["Capture"]

log = logging.getLogger("trm_fast")
WARMUP = 3  # plain runs before a capture: kernels are compiled and library handles made in them


class Capture:
    """Calls `body`; on CUDA, after a few plain calls, as a graph.

    A capture that fails is said once, as a warning, and plain calls go on.

    Args:
        body: takes and returns nothing; all shapes and, between calls, all places are fixed.
        device: where its work is done.
        enabled: False never captures.

    Attributes:
        captures: whether `body` must leave every tensor in its place: it is, or will be, captured.
    """

    def __init__(
        self, body: Callable[[], None], device: torch.device, enabled: bool = True
    ) -> None:
        self._body, self._device = body, device
        self.captures = enabled and device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._variant: Hashable = None
        self._calls = 0

    def __call__(self, variant: Hashable = None, plain: bool = False) -> None:
        """Run once. `variant`: what decides on the host which work that is; another one than last
        time is warmed up and captured anew. `plain`: call by call, as a profiler wants it."""
        if variant != self._variant:
            self.reset()
            self._variant = variant
        if self._graph is not None and not plain:
            self._graph.replay()
            return
        self._calls += 1
        if not self.captures:
            self._body()
        elif plain or self._calls <= WARMUP:
            self._aside()
        else:
            self._capture()

    def reset(self) -> None:
        """Forget the graph: tensors have moved."""
        self._graph, self._calls = None, 0

    def _aside(self) -> None:
        """A plain call on another stream than the default one, on which nothing is captured."""
        stream, now = torch.cuda.Stream(self._device), torch.cuda.current_stream(self._device)
        stream.wait_stream(now)
        with torch.cuda.stream(stream):
            self._body()
        now.wait_stream(stream)

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._body()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            log.warning("no CUDA graph of this step, it runs without: %s", reason)
            self.captures = False
            self._body()
            return
        self._graph = graph
        graph.replay()
