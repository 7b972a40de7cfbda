"""Several processes that train one model: what they add up, gather, share and agree on.

Owns `Ranks`, the only thing in the package that talks to `torch.distributed`; with one process all
of it is nothing. Imported by the training step, the trainer and the runner. Gradients are summed,
as the official code sums them: each process divides its loss by the global batch.

Dims legend: B examples of the global batch, B / world of them in each process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trm_fast.flat import joined

__all__ = ["SINGLE", "GradientSum", "Ranks", "asked_for", "join", "leave"]

T = TypeVar("T")
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank: 0 .. world - 1; the first one writes files and speaks.
        world: how many there are.
        local: rank among those of this machine, which names its GPU.
        control: the group for agreements on the host, beside that of the devices.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    control: Any = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> int:
        """Its part of `count`; ValueError where they cannot be divided."""
        if count % self.world:
            raise ValueError(f"{count} is not a multiple of the {self.world} processes")
        return count // self.world

    def add_up_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, the same on all of them."""
        if self.world > 1:
            for work in [dist.all_reduce(t, async_op=True) for t in tensors]:
                work.wait()

    def start_adding_up(self, tensor: Tensor) -> Callable[[], None]:
        """The same, under way when this returns; what is returned waits for it."""
        if self.world == 1:
            return lambda: None
        work = dist.all_reduce(tensor, async_op=True)
        return lambda: work.wait() and None

    def gathered(self, tensor: Tensor) -> Tensor:
        """[world * N, ...] of all processes' [N, ...], by rank; on all of them."""
        if self.world == 1:
            return tensor
        out = tensor.new_empty((self.world * len(tensor), *tensor.shape[1:]))
        dist.all_gather_into_tensor(out, tensor.contiguous())
        return out

    def copy_first_(self, tensors: Sequence[Tensor]) -> None:
        """Make each tensor what it is in the first process."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def of_first(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, which alone calls it; an error of it is raised
        in all of them."""
        if self.world == 1:
            return make()
        box: list[Any] = [None, None]
        if self.first:
            try:
                box[0] = make()
            except Exception as error:  # raised below, and in the others
                box[1] = error
        dist.broadcast_object_list(box, 0, group=self.control)
        if box[1] is not None:
            raise box[1]
        result: T = box[0]
        return result

    def any(self, flag: bool) -> bool:
        """Whether it is true in some process."""
        if self.world == 1:
            return flag
        seen = torch.tensor(int(flag))
        dist.all_reduce(seen, dist.ReduceOp.MAX, group=self.control)
        return bool(seen)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier(group=self.control)


SINGLE = Ranks()


class GradientSum:
    """Adds gradients up over the processes while the backward that makes them goes on.

    A context around the backward: in it, a stretch of gradients is sent as soon as all of it is
    there, in the same order everywhere; at its end all are summed. With one process it does
    nothing.

    Args:
        places: parameters with the tensors that are their gradients.
        bytes_at_once: stretches are of about this size; gradients that lie one after another in
            memory go together.
    """

    def __init__(
        self,
        places: Sequence[tuple[Tensor, Tensor]],
        ranks: Ranks,
        bytes_at_once: int = 4 << 20,
    ) -> None:
        self.ranks, self._inside = ranks, False
        self._buckets: list[Tensor] = []
        self._missing: list[int] = []
        self._full: list[int] = []
        if ranks.world == 1:
            return
        # Backward comes to the last parameters first.
        for parameters, bucket in _buckets(places, bytes_at_once):
            index = len(self._buckets)
            self._buckets.append(bucket)
            self._full.append(len(parameters))
            for p in parameters:
                p.register_post_accumulate_grad_hook(lambda _, i=index: self._arrived(i))  # type: ignore[attr-defined]

    def __enter__(self) -> None:
        self._inside, self._missing = True, list(self._full)
        self._sent: list[Callable[[], None]] = []

    def __exit__(self, kind: object, *rest: object) -> None:
        self._inside = False
        if kind is None:
            while len(self._sent) < len(self._buckets):  # those that had no gradient in this pass
                self._send()
            for wait in self._sent:
                wait()

    def _arrived(self, index: int) -> None:
        if not self._inside:
            return
        self._missing[index] -= 1
        while len(self._sent) < len(self._buckets) and self._missing[len(self._sent)] == 0:
            self._send()

    def _send(self) -> None:
        self._sent.append(self.ranks.start_adding_up(self._buckets[len(self._sent)]))


def _buckets(
    places: Sequence[tuple[Tensor, Tensor]], bytes_at_once: int
) -> list[tuple[list[Tensor], Tensor]]:
    """Stretches of gradients from the last parameter to the first, each with its parameters and
    one tensor over all of it."""
    found: list[tuple[list[Tensor], list[Tensor]]] = []
    size = bytes_at_once
    for p, grad in reversed(places):
        if size >= bytes_at_once or not joinable([grad, *found[-1][1]]):
            found.append(([], []))
            size = 0
        found[-1][0].append(p)
        found[-1][1].insert(0, grad)
        size += grad.numel() * grad.element_size()
    return [(parameters, joined(grads)[0]) for parameters, grads in found]


def joinable(tensors: Sequence[Tensor]) -> bool:
    """Whether `flat.joined` makes one of them."""
    return len(joined(tensors)) == 1


def asked_for() -> int:
    """Processes that the launcher made, by its environment; 1 without one.

    Raises ValueError for an environment that is not whole.
    """
    given = {name: os.environ.get(name) for name in VARIABLES}
    if given["WORLD_SIZE"] is None:
        return 1
    values: dict[str, int] = {}
    for name, text in given.items():
        if text is None or not text.isdecimal():
            raise ValueError(f"{name} must be a whole number beside WORLD_SIZE, got {text!r}")
        values[name] = int(text)
    if not 0 <= values["RANK"] < values["WORLD_SIZE"]:
        raise ValueError(f"RANK must be in 0..{values['WORLD_SIZE'] - 1}, got {values['RANK']}")
    return values["WORLD_SIZE"]


def join(device: torch.device) -> Ranks:
    """Meet the other processes that the launcher made; `SINGLE` where there are none.

    NCCL on NVIDIA GPUs, gloo elsewhere. Raises ValueError where they do not meet.
    """
    if asked_for() == 1:
        return SINGLE
    rank, local, world = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if not dist.is_initialized():
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.set_device(device)
        try:
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                timeout=TIMEOUT,
                device_id=device if cuda else None,
            )
        except (ValueError, RuntimeError) as error:
            said = " ".join(str(error).split())[:200]
            raise ValueError(f"the {world} processes did not meet: {said}") from None
    control = dist.new_group(backend="gloo") if dist.get_backend() != "gloo" else None
    return Ranks(rank, world, local, control)


def leave(ranks: Ranks) -> None:
    """Part with the other processes."""
    if ranks.world > 1 and dist.is_initialized():
        dist.destroy_process_group()
