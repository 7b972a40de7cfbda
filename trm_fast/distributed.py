"""Several processes that train one model: how they meet, what they gather, share and agree on.

Owns `Ranks`, through which the package talks to `torch.distributed`; with one process all of it is
nothing. Only what has the official interface does without it: the optimizer of puzzle rows and the
votes of ARC. Imported by whatever trains or measures.

Dims legend: N rows of one process.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

__all__ = ["SINGLE", "Elsewhere", "RankLost", "Ranks", "asked_for", "gather_into_", "join", "leave"]

T = TypeVar("T")
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
# How long a process waits for another: on devices, where nothing tells that one is gone but time;
# and on the host, where data may be built or a checkpoint written meanwhile.
DEVICE_TIMEOUT, HOST_TIMEOUT = timedelta(minutes=10), timedelta(hours=2)
MEETING_TIMEOUT = 600.0  # seconds until all processes have to be there
_FAILED = -1
# What the device reports at the next occasion, which may be a meeting.
_OF_DEVICE = tuple(
    getattr(torch, name)
    for name in ("OutOfMemoryError", "AcceleratorError")
    if hasattr(torch, name)
)


class RankLost(RuntimeError):
    """Another process of the run is gone; one line."""


class Elsewhere(RuntimeError):
    """The run stops for what another of its processes reports."""


def _said(error: Exception) -> str:
    """The first sentence of an error of torch.distributed, without the place in its source."""
    words = re.sub(r"\[\S*/\S*:\d+\] ?", "", " ".join(str(error).split()))
    return words.split(". ")[0][:160]


@contextmanager
def _meeting() -> Iterator[None]:
    """Around whatever waits for the others."""
    try:
        yield
    except _OF_DEVICE:
        raise
    except RuntimeError as error:
        raise RankLost(f"another process of the run is gone ({_said(error)})") from error


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank: 0 .. world - 1; the first one writes files and speaks.
        world: how many there are.
        local: rank among those of this machine, which names its GPU.
        control: the group for agreements on the host, where that is not the one of the devices.

    All methods but `device` are called by all processes, in the same order; they raise
    RankLost where one does not come.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    control: Any = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def device(self, asked: torch.device) -> torch.device:
        """Its own of what was asked for: the GPU of its local rank.

        Raises ValueError where there is none, and for devices that processes cannot share.
        """
        if self.world == 1 or asked.type == "cpu":
            return asked
        if asked.type != "cuda" or asked.index is not None:
            raise ValueError(f"device is {asked}; {self.world} processes take cuda or cpu")
        if self.local >= torch.cuda.device_count():
            raise ValueError(
                f"process {self.local} of this machine has no GPU of its own: there are "
                f"{torch.cuda.device_count()}"
            )
        return torch.device("cuda", self.local)

    # Sums and copies of tensors, on their device

    def add_up_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, the same on all of them."""
        for wait in [self.start_adding_up(tensor) for tensor in tensors]:
            wait()

    def start_adding_up(self, tensor: Tensor) -> Callable[[], None]:
        """The same, under way when this returns; what is returned waits for it."""
        if self.world == 1:
            return lambda: None
        with _meeting():
            work = dist.all_reduce(tensor, async_op=True)

        def wait() -> None:
            with _meeting():
                work.wait()

        return wait

    def copy_first_(self, tensors: Sequence[Tensor]) -> None:
        """Make each tensor what it is in the first process."""
        if self.world > 1:
            with _meeting(), torch.no_grad():
                for tensor in tensors:
                    dist.broadcast(tensor, 0)

    # Agreements on the host

    def collected(self, tensor: Tensor) -> Tensor:
        """[world * N, ...] of all processes' [N, ...] by rank, on the host of the first process;
        the others get back their own."""
        if self.world == 1:
            return tensor
        own = tensor.detach().cpu().contiguous()
        whole = own.new_empty((self.world * len(own), *own.shape[1:])) if self.first else None
        with _meeting():
            parts = None if whole is None else list(whole.split(len(own)))
            dist.gather(own, parts, dst=0, group=self.control)
        return own if whole is None else whole

    def numbers(self, own: int) -> list[int]:
        """What each process gives, by rank."""
        if self.world == 1:
            return [own]
        parts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        with _meeting():
            dist.all_gather(parts, torch.tensor([own]), group=self.control)
        return [int(part) for part in parts]

    def totals(self, own: Tensor) -> Tensor:
        """The sum over the processes of a tensor on the host."""
        if self.world > 1:
            own = own.clone()
            with _meeting():
                dist.all_reduce(own, group=self.control)
        return own

    def any(self, ask: Callable[[], bool]) -> bool:
        """Whether `ask`, which meets nobody, says so in some process; fails as `together` does."""
        return any(self._made(ask, int)[1])

    def of_first(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, which alone calls it; where it fails, that
        process raises its error and the others `Elsewhere`."""
        if self.world == 1:
            return make()
        box = [self.together(lambda: make() if self.first else None)]
        with _meeting():
            dist.broadcast_object_list(box, 0, group=self.control)
        result: Any = box[0]
        return result  # type: ignore[no-any-return]

    def together(self, make: Callable[[], T]) -> T:
        """What `make`, which meets nobody, returns in this process; where it fails in some, the
        first of those raises its error and all others `Elsewhere`."""
        return self._made(make, lambda _: 0)[0]

    def _made(self, make: Callable[[], T], told: Callable[[T], int]) -> tuple[T, list[int]]:
        """What `make` returns, and the number >= 0 that each process tells of its own."""
        if self.world == 1:
            made = make()
            return made, [told(made)]
        results: list[T] = []
        caught: Exception | None = None
        try:
            results.append(make())
        except Exception as error:  # raised below
            caught = error
        try:
            numbers = self.numbers(told(results[0]) if results else _FAILED)
        except RankLost:
            if caught is not None:
                raise caught from None
            raise
        if _FAILED not in numbers:
            return results[0], numbers
        if caught is not None and numbers.index(_FAILED) == self.rank:
            raise caught
        raise Elsewhere(f"process {numbers.index(_FAILED)} of the run says why") from caught

    def in_turn(self, make: Callable[[], T]) -> T:
        """`together`, first in the first process, then in the first of each other machine, then in
        the rest: each finds the files that those before it left."""
        turn, made = min(self.rank, 1) + (self.rank > 0 and self.local > 0), []
        for now in range(3 if self.world > 1 else 1):
            made += self.together(lambda: [make()] if now == turn else [])  # noqa: B023
        return made[0]


SINGLE = Ranks()


def gather_into_(whole: Tensor, own: Tensor) -> None:
    """Fill whole [world * N, ...] with all processes' own [N, ...], by rank, on their devices."""
    # Renamed in PyTorch 2.13.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    with _meeting():
        gather(whole, own.contiguous())


def asked_for() -> Ranks:
    """This process as the launcher numbered it in the environment, not joined yet; `SINGLE`
    without a launcher, or where it made one process.

    Raises ValueError for an environment that is not whole.
    """
    given = {name: os.environ.get(name) for name in VARIABLES}
    if given["WORLD_SIZE"] is None:
        return SINGLE
    values: dict[str, int] = {}
    for name, text in given.items():
        if text is None or not (text.isascii() and text.isdecimal()):
            raise ValueError(f"{name} must be a whole number beside WORLD_SIZE, got {text!r}")
        values[name] = int(text)
    if not 0 <= values["RANK"] < values["WORLD_SIZE"]:
        raise ValueError(f"RANK must be in 0..{values['WORLD_SIZE'] - 1}, got {values['RANK']}")
    if values["WORLD_SIZE"] == 1:
        return SINGLE
    return Ranks(values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"])


def join(ranks: Ranks, device: torch.device) -> Ranks:
    """Meet the others of `asked_for` on this process's device: NCCL on GPUs, gloo elsewhere.

    Raises ValueError where they do not meet.
    """
    if ranks.world == 1:
        return ranks
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=_store(ranks),
            rank=ranks.rank,
            world_size=ranks.world,
            timeout=DEVICE_TIMEOUT if cuda else HOST_TIMEOUT,
            device_id=device if cuda else None,
        )
        control = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT) if cuda else None
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"the {ranks.world} processes did not meet: {_said(error)}") from None
    return replace(ranks, control=control)


def _store(ranks: Ranks) -> dist.Store:
    """Where the processes read each other's addresses."""
    met = next(rendezvous("env://", ranks.rank, ranks.world, timeout=DEVICE_TIMEOUT))
    store: dist.Store = met[0]
    return dist.PrefixStore(_start(store, ranks), store)


def _start(store: dist.Store, ranks: Ranks) -> str:
    """A name for this start of the processes, the same in all of them and in no other start.

    A launcher that starts killed processes again may keep its store, and in it the addresses of the
    dead. So each process greets the first with a word of its own, and takes only an answer to that.
    """
    own, until = uuid.uuid4().hex, time.monotonic() + MEETING_TIMEOUT
    waiting = set(range(1, ranks.world)) if ranks.first else {ranks.rank}
    if not ranks.first:
        store.set(f"hello/{ranks.rank}", own)
    while waiting:
        for rank in sorted(waiting):
            answer = _read(store, f"answer/{rank}")
            if not ranks.first and answer.endswith(own):
                store.set(f"heard/{rank}", answer)
                return answer.removesuffix(own)
            hello = _read(store, f"hello/{rank}")
            if ranks.first and hello and _read(store, f"heard/{rank}") == own + hello:
                waiting.discard(rank)
            elif ranks.first and hello:
                store.set(f"answer/{rank}", own + hello)
        if time.monotonic() > until:
            raise ValueError(f"process {sorted(waiting)[0]} has not met the first one")
        time.sleep(0.01)
    return own


def _read(store: dist.Store, key: str) -> str:
    return str(store.get(key), "ascii") if store.check([key]) else ""


def leave() -> None:
    """Part with the other processes, where they were met."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
