"""`profile=true`: where the time of a few training steps went, as a trace and as a table per op.

Owns `StepProfile`, which the trainer tells of every step. After a warm-up it counts one step (which
ops there are, their calls, bytes and operations), then lets PyTorch's profiler record some, writes
three files into the folder `profile` of the run, and is out of the way from then on. What goes
wrong here is said in one line and never ends a training. Imported by the trainer, and by the
benchmarks for `launches`.

An op is what PyTorch's dispatcher is asked for: a product, an elementwise operation, one of our
fused operations. Its time contains everything it calls, so that the times of the ops add up.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, schedule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trm_fast import flops
from trm_fast.timing import copy_peak, device_name, matmul_peak, synchronize

__all__ = ["FOLDER", "OpCounts", "StepProfile", "launches", "wake_profiler"]

FOLDER = "profile"
TRACE, TEXT, DATA = "trace.json.gz", "ops.txt", "ops.json"
WARM_UP, STEPS = 10, 5
SHOWN = 40  # rows of the text
_PEAK_SIZES = {"cpu": (1024, 2**26), "cuda": (4096, 2**28)}  # of matrices; bytes of a copy


@dataclass
class Count:
    """Of one op in one step. `bytes`: every argument read once, every result written once.
    `working`: the calls that move any."""

    calls: int = 0
    working: int = 0
    bytes: int = 0
    flops: int = 0


class OpCounts(TorchDispatchMode):
    """Inside, every op is counted by its name; bytes none for views and fresh memory."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Count] = defaultdict(Count)
        flops.register_formulas()
        from torch.utils.flop_counter import flop_registry

        self.formulas = flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = self.found[func._schema.name]
        count.calls += 1
        with contextlib.suppress(Exception):  # an op of somebody else's: a training goes on
            size = moved(func, (args, kwargs), out)
            count.bytes += size
            count.working += size > 0
            formula = self.formulas.get(func._overloadpacket)
            if formula is not None:
                count.flops += formula(*args, **kwargs, out_val=out)
        return out


def moved(func: Any, given: Any, out: Any) -> int:
    """Bytes that an op must read and write."""
    read = [t for t in tree_leaves(given) if isinstance(t, Tensor)]
    written = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    name = func._schema.name
    if name.startswith(("aten::empty", "aten::new_empty")):
        return 0
    if not func._schema.is_mutable:
        storages = {t.untyped_storage()._cdata for t in read}
        written = [t for t in written if t.untyped_storage()._cdata not in storages]
        if not written:  # views, and questions about a tensor
            return 0
    return sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in (*read, *written))


def launches(run: Callable[[], Any], device: torch.device) -> int:
    """What one call of `run`, made here, gives the device to do: on CUDA kernels, copies and fills,
    also of a replayed graph; elsewhere operations that read or write data, without views."""
    if device.type != "cuda":
        with OpCounts() as counts:
            run()
        return sum(count.working for count in counts.found.values())
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        synchronize(device)
    return sum(map(_on_gpu, profiler.events() or []))


def wake_profiler(device: torch.device) -> None:
    """Let PyTorch's profiler load what it needs on a GPU: to be done before the first CUDA graph is
    made, because one that loads later may crash at the graph's replay."""
    if device.type != "cuda":
        return
    gpu = [ProfilerActivity.CUDA]
    # What is wrong is said by whoever needs it.
    with contextlib.suppress(RuntimeError, AssertionError), torch.profiler.profile(activities=gpu):
        pass


def _on_gpu(event: Any) -> bool:
    """Whether this is a kernel, a copy or a fill; not a range that somebody named."""
    return event.device_type == DeviceType.CUDA and not event.is_user_annotation


@dataclass
class Row:
    """One op or kernel, per step: rates are None where nothing is known of operations or bytes."""

    name: str
    calls: float
    ms: float
    share: float
    mb: float | None = None
    gflop: float | None = None
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    fraction_of_copy: float | None = None
    fraction_of_matmul: float | None = None


@dataclass
class Table:
    """What is written: per-step figures of `steps` recorded steps."""

    device: str
    dtype: str
    steps: int
    step_ms: float
    useful_gflop: float
    mfu: float | None
    peak_tflop_per_s: float | None
    peak_gb_per_s: float | None
    peaks: str
    ops: list[Row] = field(default_factory=list)
    kernels: list[Row] = field(default_factory=list)


def _peaks(device: torch.device, dtype: torch.dtype) -> tuple[flops.Peak | None, str]:
    """What rates are fractions of, and where that is from."""
    known = flops.device_peak(device_name(device)) if device.type == "cuda" else None
    if known is not None and dtype in (torch.bfloat16, torch.float16):
        return known, "the maker's"
    if device.type not in _PEAK_SIZES:
        return None, "unknown"
    size, copied = _PEAK_SIZES[device.type]
    rate = matmul_peak(dtype, device, size) / 1e3
    return flops.Peak(rate, copy_peak(device, copied)), "measured, torch.mm and a copy"


class StepProfile:
    """A context around a training loop that calls `step` after every step.

    Args:
        folder: the run's; the files go into its folder `profile`.
        device, dtype: of the forward pass.
        useful: useful operations of one step, `flops.step_flops(config, "train", boards)`.
        warm_up, steps: steps before anything is looked at, and steps recorded. One more is counted
            between them, and one more warms the profiler up.
        counted: False where counting would disturb, as in compiled code: the table then has times
            only. Of a step that is replayed as a CUDA graph there are only kernels.
        tell: is given one line: where the files are, or why there are none.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        useful: float,
        warm_up: int = WARM_UP,
        steps: int = STEPS,
        counted: bool = True,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.folder, self.device, self.dtype, self.useful = folder / FOLDER, device, dtype, useful
        self.warm_up, self.steps, self.tell = warm_up, steps, tell
        self.done = False
        self._counted, self._counting = counted, False
        self._counts: OpCounts | None = None  # made when it is needed: it loads Triton
        self._profiler: torch.profiler.profile | None = None
        self._taken = 0
        self._begin = 0.0

    def __enter__(self) -> StepProfile:
        if not self.done:
            wake_profiler(self.device)  # the first step may be captured
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Whatever is still going on ends; a run too short for the profile says so."""
        if self.done:
            return
        self._stop()
        if kind is None:
            needed = self.warm_up + self.steps + 2
            self.tell(f"no profile: it takes {needed} steps, the run had {self._taken}")

    def step(self) -> None:
        """A training step is over."""
        if self.done:
            return
        self._taken += 1
        try:
            self._next(self._taken - self.warm_up)
        except (OSError, RuntimeError, AssertionError) as error:
            self._stop()
            said = str(error).strip().splitlines() or [repr(error)]
            self.tell(f"no profile: {said[0]}")

    def _next(self, number: int) -> None:
        """`number`: 0 after the warm-up, 1 after the counted step, 2 after one in the profiler."""
        if number == 0 and self._counted:
            self._counts = OpCounts()
            self._counts.__enter__()
            self._counting = True
        elif number == 1:
            self._end_counting()
            profiler = self._new_profiler()
            profiler.start()
            self._profiler = profiler
        elif number == 2:
            synchronize(self.device)
            assert self._profiler is not None
            self._profiler.step()
            self._begin = time.perf_counter()
        elif number > 2 and self._profiler is not None:
            if number < 2 + self.steps:
                self._profiler.step()
                return
            synchronize(self.device)
            seconds = (time.perf_counter() - self._begin) / self.steps
            profiler = self._profiler
            self._stop()
            self._write(profiler, seconds)

    def _new_profiler(self) -> torch.profiler.profile:
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        return torch.profiler.profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=1, active=self.steps + 1),
            acc_events=True,
        )

    def _end_counting(self) -> None:
        if self._counting and self._counts is not None:
            self._counting = False
            self._counts.__exit__(None, None, None)

    def _stop(self) -> None:
        self.done = True
        self._end_counting()
        if self._profiler is not None:
            profiler, self._profiler = self._profiler, None
            with contextlib.suppress(RuntimeError, AssertionError):  # its results then fail, too
                profiler.stop()

    def _write(self, profiler: torch.profiler.profile, seconds: float) -> None:
        counts = {} if self._counts is None else dict(self._counts.found)
        made = self._table(profiler.events() or [], counts, seconds)
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".trace-", dir=self.folder) as room:
            plain, packed = Path(room) / "trace.json", Path(room) / TRACE
            profiler.export_chrome_trace(str(plain))
            with plain.open("rb") as source, gzip.open(packed, "wb") as target:
                shutil.copyfileobj(source, target)
            packed.replace(self.folder / TRACE)
        (self.folder / DATA).write_text(json.dumps(asdict(made), indent=1) + "\n", encoding="utf-8")
        (self.folder / TEXT).write_text(text(made) + "\n", encoding="utf-8")
        self.tell(f"profile of {self.steps} steps: {self.folder / TEXT}")

    def _table(self, events: Sequence[Any], counts: dict[str, Count], seconds: float) -> Table:
        peak, source = _peaks(self.device, self.dtype)
        rate = self.useful / seconds / 1e12
        on_gpu = self.device.type == "cuda"
        return Table(
            device=device_name(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            steps=self.steps,
            step_ms=1e3 * seconds,
            useful_gflop=self.useful / 1e9,
            mfu=None if peak is None else rate / peak.tflop_per_s,
            peak_tflop_per_s=None if peak is None else peak.tflop_per_s,
            peak_gb_per_s=None if peak is None else peak.gb_per_s,
            peaks=source,
            ops=op_rows(events, counts, self.steps, peak, on_gpu),
            kernels=kernel_rows(events, self.steps) if on_gpu else [],
        )


def op_rows(
    events: Sequence[Any],
    counts: dict[str, Count],
    steps: int,
    peak: flops.Peak | None,
    on_gpu: bool,
) -> list[Row]:
    """The ops that were counted, longest first; without counts all that the profiler names, each
    without what it calls."""
    times: dict[str, float] = defaultdict(float)  # microseconds
    calls: dict[str, int] = defaultdict(int)
    for event in events:
        if event.device_type != DeviceType.CPU or event.is_user_annotation:
            continue
        if counts and (event.name not in counts or _inside(event, counts)):
            continue
        whole = event.device_time_total if on_gpu else event.cpu_time_total
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        times[event.name] += whole if counts else own
        calls[event.name] += 1
    total = sum(times.values())
    rows = []
    for name in sorted(times, key=lambda n: -times[n]):
        count, ms = counts.get(name), times[name] / steps / 1e3
        row = Row(name, calls[name] / steps, ms, times[name] / total if total else 0.0)
        if count is not None:
            _add_rates(row, count, peak)
        rows.append(row)
    return rows


def _inside(event: Any, names: dict[str, Count]) -> bool:
    """Whether another op of `names` called this one."""
    above = event.cpu_parent
    while above is not None:
        if above.name in names:
            return True
        above = above.cpu_parent
    return False


def _add_rates(row: Row, count: Count, peak: flops.Peak | None) -> None:
    row.mb, row.gflop = count.bytes / 1e6, count.flops / 1e9
    if row.ms > 0:
        row.gb_per_s, row.tflop_per_s = row.mb / row.ms, row.gflop / row.ms
        if peak is not None:
            row.fraction_of_copy = row.gb_per_s / peak.gb_per_s
            if "scaled_mm" not in row.name:  # eight bits: another peak
                row.fraction_of_matmul = row.tflop_per_s / peak.tflop_per_s


def kernel_rows(events: Sequence[Any], steps: int) -> list[Row]:
    """What ran on the GPU, longest first; a replayed graph shows here only."""
    times: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in events:
        if _on_gpu(event):
            times[event.name] += event.device_time_total
            calls[event.name] += 1
    total = sum(times.values())
    return [
        Row(name, calls[name] / steps, times[name] / steps / 1e3, times[name] / total)
        for name in sorted(times, key=lambda n: -times[n])
        if total
    ]


def text(found: Table) -> str:
    """A report for a terminal, the longest rows first."""
    mfu = "unknown" if found.mfu is None else f"{found.mfu:.1%}"
    lines = [
        f"{found.steps} training steps on {found.device}, {found.dtype}: {found.step_ms:.2f} ms "
        f"a step with the profiler on, {found.useful_gflop:,.3f} useful GFLOP, MFU {mfu}",
    ]
    if found.peak_tflop_per_s is not None:
        lines.append(
            f"peaks ({found.peaks}): {found.peak_tflop_per_s:,.4g} TFLOP/s, "
            f"{found.peak_gb_per_s:,.4g} GB/s"
        )
    lines += ["", "per step: an op with all it calls; bytes: arguments once, results once"]
    lines += _rows(found.ops)
    if found.kernels:
        lines += ["", "kernels", *_rows(found.kernels)]
    return "\n".join(lines)


def _rows(rows: Sequence[Row]) -> list[str]:
    lines = [
        f"{'':<44}{'calls':>8}{'ms':>10}{'share':>7}{'MB':>10}{'GB/s':>8}{'of memory':>10}"
        f"{'GFLOP':>10}{'TFLOP/s':>9}{'of peak':>8}"
    ]
    for r in rows[:SHOWN]:
        line = f"{r.name[:43]:<44}{r.calls:>8,.6g}{r.ms:>10.3f}{r.share:>7.1%}"
        if r.mb is not None and r.gflop is not None:
            line += f"{r.mb:>10,.2f}{_cell(r.gb_per_s, '8.1f')}{_cell(r.fraction_of_copy, '10.0%')}"
            if r.gflop:
                line += f"{r.gflop:>10,.3f}{_cell(r.tflop_per_s, '9.3f')}"
                line += _cell(r.fraction_of_matmul, "8.0%")
        lines.append(line.rstrip())
    if len(rows) > SHOWN:
        rest = sum(r.share for r in rows[SHOWN:])
        lines.append(f"{len(rows) - SHOWN} more with {rest:.1%} of the time: {DATA}")
    return lines


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, f">{form}")
