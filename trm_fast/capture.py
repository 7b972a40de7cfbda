"""The same work on a device again and again: on NVIDIA GPUs a CUDA graph, elsewhere plain calls.

Owns warm-up, capture and replay. A graph repeats launches, not Python: what changes between two
runs must lie in tensors that stay where they are, and nothing may wait for the device. All graphs
of a device share one pool of memory and are warmed up on one stream, so they must be used from one
stream at a time. Imported by the training step and by inference; imports torch only.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import logging
import os
import weakref
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Capture", "graphs_allowed"]

log = logging.getLogger("trm_fast")
WARMUP = 3  # plain runs before a capture: kernels are compiled and library handles made in them


def graphs_allowed() -> bool:
    """Whether TRM_FAST_CUDA_GRAPH lets graphs be captured; ValueError for what is not 0 or 1."""
    given = os.environ.get("TRM_FAST_CUDA_GRAPH") or "1"
    if given not in ("0", "1"):
        raise ValueError(f"TRM_FAST_CUDA_GRAPH is 0 or 1, not {given!r}")
    return given == "1"


@dataclass
class _Shared:
    """What all captures on one device share. `refused`: why no more are tried."""

    stream: Any
    pool: Any
    refused: str | None = None


_shared: dict[torch.device, _Shared] = {}


def _shared_on(device: torch.device) -> _Shared:
    if device not in _shared:
        # Freed memory is kept by stream: a new one for each warm-up would hold it once more.
        stream = torch.cuda.Stream(device)
        _shared[device] = _Shared(stream, torch.cuda.graph_pool_handle())
    return _shared[device]


class Capture:
    """Calls `body`; on CUDA, after a few plain calls, as a graph.

    The environment variable TRM_FAST_CUDA_GRAPH=0 turns graphs off. A capture that fails is said
    once, as a warning, no other is tried on that device, and plain calls go on.

    Args:
        body: takes and returns nothing; all shapes and, between calls, all places are fixed. A
            method does not keep its object alive.
        device: where its work is done.
        enabled: False never captures.

    Attributes:
        captures: whether `body` must leave every tensor in its place: it is, or will be, captured.
    """

    def __init__(
        self, body: Callable[[], None], device: torch.device, enabled: bool = True
    ) -> None:
        self._body = weakref.WeakMethod(body) if inspect.ismethod(body) else lambda: body
        self.captures = enabled and device.type == "cuda"
        self.captures &= graphs_allowed()
        if self.captures:
            index = torch.cuda.current_device() if device.index is None else device.index
            device = torch.device("cuda", index)
            self.captures = _shared_on(device).refused is None
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._variant: Hashable = None
        self._calls = 0

    @property
    def captured(self) -> bool:
        """Whether the next call is the replay of a graph."""
        return self._graph is not None

    def __call__(self, variant: Hashable = None, plain: bool = False) -> None:
        """Run once. `variant`: what decides on the host which work that is; another one than last
        time is warmed up and captured anew. `plain`: call by call, as a profiler wants it."""
        if variant != self._variant:
            self.reset()
            self._variant = variant
        if self._graph is not None and not plain:
            self._graph.replay()
            return
        if not self.captures:
            self._run()
            return
        self._calls += 1
        if plain or self._calls <= WARMUP:
            with _aside(self._device):
                self._run()
            return
        reason = self._capture()
        if reason is None:
            assert self._graph is not None
            self._graph.replay()
            return
        # Only here, where nothing holds what the failed capture had taken.
        log.warning("no CUDA graph, all goes on without: %s", reason)
        self.captures, _shared[self._device].refused = False, reason
        self._run()

    def reset(self) -> None:
        """Forget the graph: tensors have moved."""
        self._graph, self._calls = None, 0

    def _run(self) -> None:
        body = self._body()
        assert body is not None, "its object is gone"
        body()

    def _capture(self) -> str | None:
        """Make the graph, or say why there is none."""
        shared, graph = _shared_on(self._device), torch.cuda.CUDAGraph()
        failed: list[str] = []

        def body() -> None:
            try:
                self._run()
            except Exception as error:  # what is said at the end of a capture hides it
                failed.append(_first_line(error))
                raise

        before = torch.cuda.current_stream(self._device)
        try:
            with (
                torch.cuda.device(self._device),
                torch.cuda.stream(before),  # comes back to it, whatever a failed capture leaves
                _no_collection(),
                torch.cuda.graph(
                    graph,
                    pool=shared.pool,
                    stream=shared.stream,
                    capture_error_mode="thread_local",
                ),
            ):
                body()
        except Exception as error:
            with contextlib.suppress(Exception):  # where the end of the capture failed itself
                torch._C._cuda_endAllocateToPool(self._device.index, shared.pool)
            return [*failed, _first_line(error)][0]
        self._graph = graph
        return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)


@contextlib.contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """On the stream of captures: on the default one nothing is captured."""
    stream, now = _shared_on(device).stream, torch.cuda.current_stream(device)
    stream.wait_stream(now)
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield
    now.wait_stream(stream)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage is collected inside: it could free another graph in the middle of a capture."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
