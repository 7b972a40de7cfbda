"""One race: the contenders of a case and step, set up, checked, and timed in turns.

Owns the protocol of a race, what a step needs in memory and launches, and why a contender has no
row. Imported by `bench.py`, `op_bench.py`, `suite` and bench/.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trm_fast.bench_report import ratios, row
from trm_fast.config import ModelConfig
from trm_fast.contenders import (
    Contender,
    Entry,
    ParityError,
    check_parity,
    contenders,
    effective_config,
    kept_for_backward,
    prepare,
    settle,
)
from trm_fast.official import Official
from trm_fast.profiling import launches
from trm_fast.timing import basis, collector_off, timed
from trm_fast.workloads import Case

LEAST_TURNS = 3
WRONG = "wrong: "  # begins the note of a contender that computes something else


def lap(entry: Entry, device: torch.device, keep: bool = True) -> None:
    """One step, timed."""
    wall, cpu = timed(entry.run, device)
    if keep:
        entry.wall.append(wall)
        entry.cpu.append(cpu)


@dataclass
class Race:
    """The contenders of one case and step, checked; `absent` says why others are not."""

    case: Case
    step: str
    device: torch.device
    entries: list[Entry]
    absent: dict[str, str]

    def start(self) -> None:
        """Forget all times; one untimed turn, for what depends on the number of threads."""
        for entry in list(self.entries):
            entry.wall.clear()
            entry.cpu.clear()
            self._lap(entry, keep=False)

    def run(self, rounds: int, seconds: float = float("inf")) -> None:
        """`rounds` timed turns of every contender; each turn starts with another one.

        After LEAST_TURNS no new turn begins once all turns together have taken `seconds`. One that
        runs out of memory becomes absent.
        """
        begin = time.perf_counter()
        with collector_off():
            for turn in range(rounds):
                if turn >= LEAST_TURNS and time.perf_counter() - begin > seconds:
                    break
                first = turn % max(1, len(self.entries))
                for entry in self.entries[first:] + self.entries[:first]:
                    # On a GPU memory that another one had is found again.
                    if self.device.type != "cuda" or self._lap(entry, keep=False):
                        self._lap(entry)

    def _lap(self, entry: Entry, keep: bool = True) -> bool:
        """One step, timed; whether there was memory for it."""
        try:
            lap(entry, self.device, keep)
            return True
        except (torch.OutOfMemoryError, MemoryError) as error:
            why = first_line(error)
        self.entries.remove(entry)
        entry.let_go()  # whoever is in the middle of a turn still has it
        self.absent[entry.contender.name] = f"failed: {why}"
        release(self.device)
        return False

    def result(self, cpus: Sequence[int] | None = None) -> dict:
        """The JSON object of the times since `start`, on the threads that PyTorch has now."""
        rows = [row(e, self.step, self.device) for e in self.entries]
        rows += [
            {"contender": name, "available": False, "note": why}
            for name, why in self.absent.items()
        ]
        return {
            "case": self.case.name,
            "about": self.case.about,
            "step": self.step,
            "threads": torch.get_num_threads(),
            "cpus": None if cpus is None else list(cpus),
            "clock": basis(self.device),
            "launched": "kernels" if self.device.type == "cuda" else "operations",
            "config": self.case.model.to_dict(),
            "rows": rows,
            "ratios": ratios(rows, basis(self.device)),
        }


def set_up(
    case: Case,
    step: str,
    official: Official | None,
    device: torch.device,
    compiling: str = "auto",
    policies: Sequence[str] = (),
    quantized: Sequence[str] = (),
) -> Race:
    """Build and check all contenders of a case, `policies` in place of the case's own, and
    those that are `quantized` so, as far as the step notices. One that computes something else is
    absent, as "wrong: ...".

    Raises:
        ValueError: a configuration that no contender can have.
    """
    entries: list[Entry] = []
    absent: dict[str, str] = {}
    losses: dict[ModelConfig, Tensor] = {}
    chosen = (policies or case.policies) if step == "train" else ("save",)
    # Training does not notice int8.
    ways = [q for q in quantized if q != "int8" or step != "train"]
    forget_compiled()
    for contender in contenders(case, device, compiling, chosen, ways, step):
        if contender.official and official is None:
            absent[contender.name] = "no official code given: --official PATH"
            continue
        try:
            entries.append(_checked(case, contender, step, official, device, losses))
        except ParityError as error:
            absent[contender.name] = f"{WRONG}{error}"
        except ValueError:
            raise
        except Exception as error:  # no compiler, an unsupported graph, no memory
            absent[contender.name] = f"failed: {first_line(error)}"
    return Race(case, step, device, entries, absent)


def _checked(
    case: Case,
    contender: Contender,
    step: str,
    official: Official | None,
    device: torch.device,
    losses: dict[ModelConfig, Tensor],
) -> Entry:
    """A contender ready to be timed: looked into, and compared with the reference."""
    config, before = effective_config(case, contender), _allocated(device)
    graphs = _graphs_compiled()
    entry = prepare(contender, config, step, official, device)
    if device.type == "cuda":
        entry.peak_bytes = _peak(entry, device) - before
    if contender.name != "reference" and not contender.products:
        check_parity(entry, step, official, device, losses)
    lap(entry, device, keep=False)
    if contender.compiled and _graphs_compiled() == graphs:
        raise RuntimeError("torch.compile made no graph of it")
    if step == "train" and not (contender.compiled or contender.products or contender.captured):
        entry.saved_bytes = kept_for_backward(entry)
    if device.type == "cuda" or not contender.compiled:  # compiled code cannot be looked into
        settle(entry)
        entry.launches = launches(entry.run, device)
    return entry


def first_line(error: BaseException) -> str:
    """An exception in one line, with its type where the text alone says too little."""
    lines = str(error).strip().splitlines()
    if not lines or not isinstance(error, RuntimeError):
        return f"{error!r}"[:300]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def forget_compiled() -> None:
    """Let torch.compile begin anew: after some versions of a function, those of other races too, it
    runs plain code without a word."""
    if "torch._dynamo" in sys.modules:  # loading it takes seconds
        torch._dynamo.reset()


def _graphs_compiled() -> int:
    """What torch.compile has made graphs of in this process."""
    if "torch._dynamo" not in sys.modules:
        return 0
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def release(device: torch.device) -> None:
    """Give back the memory that nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _allocated(device: torch.device) -> int:
    """Bytes that tensors hold on a GPU."""
    if device.type != "cuda":
        return 0
    release(device)
    return torch.cuda.memory_allocated(device)


def _peak(entry: Entry, device: torch.device) -> int:
    """The most bytes on a GPU in a step, call by call: the replay of a graph allocates nothing."""
    run = entry.plain or entry.run
    run()  # compiles
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device)
