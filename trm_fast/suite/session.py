"""The measuring process: runs a stage's items one by one, each within its deadline.

Owns `Session` (what an item is told), `Item`, and the loop. A record is written after every item,
whatever became of it. Imported by the modules of items and by `bench/gpu_suite.py`.
"""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from trm_fast.config import ModelConfig
from trm_fast.console import say
from trm_fast.contenders import ParityError
from trm_fast.op_bench import measure_peaks
from trm_fast.op_cases import OpCase, cases, network
from trm_fast.profiling import wake_profiler
from trm_fast.race import first_line, forget_compiled
from trm_fast.suite import records
from trm_fast.suite.records import BAD
from trm_fast.suite.supervisor import CONTEXT_LOST, Stopped, set_now
from trm_fast.timing import environment

Rows = Iterator[dict[str, Any]]


class Skip(Exception):
    """The item has nothing to measure here; the argument says why."""


class Overtime(BaseException):
    """The deadline has passed. Not an Exception: nothing on the way may swallow it."""


@dataclass
class Session:
    """What the items of a stage are told.

    Attributes:
        stage, run, out: the stage, the run's name in the records, the results file.
        until: when the stage's budget is over, as `time.time()`.
        tiny: sizes for a dry run; kernels then run in Triton's interpreter on the CPU.
        official: a checkout of the official code.
        program: bench/gpu_suite.py, for items that start it under another program.
        commit: recorded where there is no .git to ask.
    """

    stage: str
    run: str
    out: Path
    until: float
    device: torch.device
    tiny: bool = False
    official: Path | None = None
    program: Path = Path("bench/gpu_suite.py")
    commit: str | None = None
    _peaks: dict[str, float] = field(default_factory=dict)

    @property
    def size(self) -> str:
        return "tiny" if self.tiny else "real"

    @property
    def dtype(self) -> str:
        return "float32" if self.tiny else "bfloat16"

    @property
    def compiler(self) -> str:
        """torch.compile's backend: in the dry run the one that compiles nothing."""
        return "eager" if self.tiny else "inductor"

    @property
    def interpreted(self) -> bool:
        return self.tiny and self.device.type == "cpu"

    def need_cuda(self) -> None:
        if self.device.type != "cuda":
            raise Skip("needs a CUDA GPU")

    def need_official(self) -> Path:
        if self.official is None:
            raise Skip("no official code given: --official PATH")
        return self.official

    def config(self, mixer: str, batch: int | None = None) -> ModelConfig:
        """The official network with `mixer`, in the stage's dtype and size."""
        config = network(mixer, self.size, 2 if self.tiny else batch)
        return ModelConfig.from_dict(config.to_dict() | {"forward_dtype": self.dtype})

    def count(self, real: int) -> int:
        """How often to repeat: `real` times, once in the dry run."""
        return 1 if self.tiny else real

    def cases(self, op: str) -> list[OpCase]:
        """Every workload of an operation, one of them in the dry run."""
        found = cases(op, self.size, dtype=self.dtype)
        return found[:1] if self.tiny else found

    def directions(self, case: OpCase) -> tuple[str, ...]:
        """Forward and both; in the dry run the one that contains the other."""
        return case.directions[-1:] if self.tiny else case.directions

    def peaks(self) -> dict[str, float]:
        """What rates are fractions of, measured once per process."""
        if not self._peaks:
            self._peaks = measure_peaks(self.device, getattr(torch, self.dtype), self.tiny)
        return self._peaks


@dataclass(frozen=True)
class Item:
    """One thing to measure.

    Attributes:
        name: unique in its stage.
        measure: yields its numbers one by one; what was yielded before a failure is kept.
        limit: seconds it may take.
        gate: where one of these goes wrong, nothing behind the gates is run.
        dry: has its part in the dry run; others differ from one that has in size only.
    """

    name: str
    measure: Callable[[Session], Rows]
    limit: float
    gate: bool = False
    dry: bool = True


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Inside, `Overtime` is raised after `seconds`, and again while it is not heeded."""
    if not hasattr(signal, "setitimer") or (
        threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise Overtime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_item(item: Item, session: Session, seconds: float) -> dict[str, Any]:
    """Measure for at most `seconds`; returns the record. `Stopped` goes on once it is written."""
    record: dict[str, Any] = {"run": session.run, "stage": session.stage, "item": item.name}
    record |= {"status": "ok", "reason": "", "rows": []}
    begin = time.perf_counter()
    say(f"{session.stage} {item.name}")
    try:
        with deadline(seconds):
            for row in item.measure(session):
                record["rows"].append(row)
                say(records.line(row))
    except Skip as reason:
        record |= {"status": "skipped", "reason": str(reason)}
    except ParityError as error:
        record |= {"status": "wrong", "reason": str(error)}
    except Overtime as error:
        record |= {"status": "overtime", "reason": f"it was given {seconds:.0f} s"}
        record["where"] = _where(error)
    except Stopped as signal_number:
        record |= {"status": "stopped", "reason": f"signal {signal_number}"}
        _write(record, begin, session)
        raise
    except Exception as error:
        record |= {"status": "failed", "reason": first_line(error), "where": _where(error)}
    return _write(record, begin, session)


def _where(error: BaseException) -> list[str]:
    """The last places that an exception passed, innermost last."""
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    return [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]


def _write(record: dict[str, Any], begin: float, session: Session) -> dict[str, Any]:
    record["seconds"] = round(time.perf_counter() - begin, 2)
    records.append(session.out, record)
    if record["status"] != "ok":
        say(f"  {record['status']}: {record['reason']}")
    return record


def clean_up(device: torch.device) -> bool:
    """Give memory back after an item; False if the CUDA context is lost."""
    gc.collect()
    forget_compiled()
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    except RuntimeError:
        return False
    return True


def run_stage(session: Session, items: Sequence[Item], after: str | None = None) -> int:
    """Run the items, from behind `after` if given; returns the exit status.

    0; 1 if an item went wrong or failed; CONTEXT_LOST if the process has to be started again.
    """
    wake_profiler(session.device)
    if after is None:
        begin = {"run": session.run, "stage": session.stage, "size": session.size}
        facts = environment(session.device)
        facts["commit"] = facts["commit"] or session.commit
        records.append(session.out, begin | facts)
        say(f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}; the predictions")
        say("are for one H100 80GB HBM3: hold no other device against them")
    names = [item.name for item in items]
    left = items[names.index(after) + 1 :] if after is not None else items
    done = records.read(session.out, session.run)
    gates = {item.name for item in items if item.gate}
    broken = [r["item"] for r in done if r.get("item") in gates and r["status"] in BAD]
    for item in left:
        if broken and not item.gate:
            _skip(item, session, f"stopped: {', '.join(broken)} went wrong")
            continue
        if session.tiny and not item.dry:
            _skip(item, session, "left out of the dry run")
            continue
        if time.time() >= session.until:
            _skip(item, session, "the stage's budget was used up")
            continue
        seconds = max(0.0, session.until - time.time())
        if not session.tiny:  # a dry run measures nothing, and its machine may be busy
            seconds = min(item.limit, seconds)
        set_now(session.out, item.name, time.time() + seconds)
        record = run_item(item, session, seconds)
        if item.gate and record["status"] in BAD:
            broken.append(item.name)
        if not clean_up(session.device):
            say("  the CUDA context is lost: going on in a new process")
            return CONTEXT_LOST
    set_now(session.out, None)
    found = records.read(session.out, session.run)
    return int(any(r.get("status") in BAD for r in found))


def _skip(item: Item, session: Session, reason: str) -> None:
    record = {"run": session.run, "stage": session.stage, "item": item.name}
    record |= {"status": "skipped", "reason": reason}
    records.append(session.out, {**record, "seconds": 0.0, "rows": []})
