"""Runs a function in several processes that meet over gloo on the loopback device.

Imported by tests of several processes.
"""

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from trm_fast.distributed import Ranks, asked_for, join, leave


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _child(rank: int, world: int, port: int, work: Callable[..., Any], folder: str, args: Any):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = join(asked_for(), torch.device("cpu"))
    try:
        torch.save(work(ranks, *args), Path(folder, str(rank)))
    finally:
        leave()


def in_processes(world: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What `work(ranks, *args)`, a function of a module, returns in each process, by rank."""
    if world == 1:
        return [work(Ranks(), *args)]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_child, (world, free_port(), work, folder, args), world)
        return [torch.load(Path(folder, str(r)), weights_only=False) for r in range(world)]
