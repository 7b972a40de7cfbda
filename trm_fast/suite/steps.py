"""Whole steps: the official code's, ours, inference, and a training curve of both.

Owns these items of stages A and B. A train step is forward, loss and backward, without the
optimizer; the curve has everything. Imported by `stages.py`.

Dims legend: B batch, L puzzle tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trm_fast import contenders, flops, optim
from trm_fast.config import ModelConfig, TrainConfig
from trm_fast.contenders import Contender, Entry
from trm_fast.data.sudoku_generator import generate
from trm_fast.official import Official, official_code
from trm_fast.profiling import launches
from trm_fast.race import lap
from trm_fast.suite.predictions import look_up
from trm_fast.suite.records import measurement
from trm_fast.suite.session import Rows, Session
from trm_fast.suite.truth import fused_head
from trm_fast.timing import device_name, synchronize

GIB = 2**30
KERNELS_SHOWN = 30


def official_steps(session: Session, mixer: str, contender: Contender, count: int) -> Rows:
    """Train steps of the official code: time, peak memory, and how many items halted."""
    path = session.need_official()
    config = session.config(mixer, 768)
    contender = replace(contender, compiler=session.compiler)
    with official_code(path) as official:
        assert official is not None
        if not contender.compiled and session.device.type == "cuda":
            yield from official_latency(session, mixer, contender, official)
        begin = time.perf_counter()
        entry = contenders.prepare(contender, config, "train", official, session.device)
        yield from step_rows(session, f"{contender.name}/{mixer}", entry, session.count(count))
        yield measurement(
            f"{contender.name}/{mixer}/loss", check_loss(session, entry), "off the reference"
        )
        total = time.perf_counter() - begin
        yield measurement(
            f"{contender.name}/{mixer}/all", total, "s", note="building and compiling"
        )


def official_latency(
    session: Session, mixer: str, contender: Contender, official: Official
) -> Rows:
    """One board, one supervision step, eagerly: what a user of the code waits for."""
    config = session.config(mixer, 1)
    entry = contenders.prepare(contender, config, "inference", official, session.device)
    for _ in range(3):
        entry.run()
    walls = [wall_seconds(entry.run, session.device) for _ in range(10)]
    name = f"{contender.name}/{mixer}/latency B1"
    yield measurement(name, 1e3 * statistics.median(walls), "ms", look_up(name))


def wall_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """From the call to the end of its work on the device, the host's part included."""
    synchronize(device)
    begin = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - begin


def check_loss(session: Session, entry: Entry) -> float:
    """The relative error of the loss against the reference; ParityError beyond the limit."""
    reference = Contender("reference")
    config = replace(entry.config, policy="light")
    plain = contenders.prepare(reference, config, "train", None, session.device)
    limit = contenders.LOSS_LIMITS[getattr(torch, config.forward_dtype)]
    got, want = ({"loss": contenders.outcome(e)["loss"]} for e in (entry, plain))
    return contenders.compare(got, want, limit, entry.contender.name)


def step_rows(session: Session, name: str, entry: Entry, count: int) -> Rows:
    """ms and peak memory of the entry's steps, after two that are not timed."""
    for _ in range(0 if session.tiny else 2):
        lap(entry, session.device, keep=False)
    if session.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(session.device)
    for _ in range(count):
        lap(entry, session.device)
    ms = 1e3 * statistics.median(entry.wall)
    least = 1e3 * min(entry.wall)
    config = replace(entry.config, batch_size=1)
    boards = entry.config.batch_size
    yield measurement(
        f"{name}/step", ms, "ms", look_up(f"{name}/step"), min=least, runs=len(entry.wall),
        boards=boards, config=config.to_dict(),
    )  # fmt: skip
    if session.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(session.device) / GIB
        yield measurement(f"{name}/memory", peak, "GiB", look_up(f"{name}/memory"))
    yield from inside(session, name, entry, "train", ms / 1e3)


def fused_entry(session: Session, config: ModelConfig, step: str, name: str) -> Entry:
    """Our step on the compiled backends, as `contenders.prepare` makes one."""
    made = contenders.prepare(Contender(name, backend="auto"), config, step, None, session.device)
    ops = fused_head(session, config).model.inner.ops  # type: ignore[union-attr]
    made.head.model.inner.ops = ops  # type: ignore[union-attr]
    return made


def our_steps(session: Session, mixer: str, policy: str = "save", fused: bool = True) -> Rows:
    """Our train step, launched eagerly, and what its kernels took."""
    config = replace(session.config(mixer, 768), policy=policy)
    name = "ours" if policy == "save" else f"ours, {policy}"
    if fused:
        entry = fused_entry(session, config, "train", name)
    else:
        name = "reference"
        entry = contenders.prepare(Contender(name), config, "train", None, session.device)
    yield from step_rows(session, f"{name}/{mixer}", entry, session.count(15))
    if fused and (policy == "save" or not session.tiny):
        error = check_loss(session, entry)
        yield measurement(f"{name}/{mixer}/loss", error, "off the reference")
    if policy == "save":
        yield from breakdown(session, f"{name}/{mixer}/kernels", entry.run)


def breakdown(session: Session, name: str, run: Callable[[], Any]) -> Rows:
    """Where the time of one call went, by kernel (by operation where there is no GPU)."""
    cuda = session.device.type == "cuda"
    activity, kind = torch.profiler.ProfilerActivity.CPU, torch.autograd.DeviceType.CPU
    if cuda:
        activity, kind = torch.profiler.ProfilerActivity.CUDA, torch.autograd.DeviceType.CUDA
    with torch.profiler.profile(activities=[activity]) as profile:
        run()
        synchronize(session.device)
    found = [
        {
            "kernel": event.key,
            "calls": event.count,
            "ms": (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3,
        }
        for event in profile.key_averages()
        if event.device_type == kind
    ]
    found.sort(key=lambda one: -one["ms"])
    total = sum(one["ms"] for one in found)
    calls = sum(one["calls"] for one in found)
    shown = found[:KERNELS_SHOWN]
    yield measurement(name, total, "ms", note=f"{calls} launches", kernels=shown)
    for one in shown[: session.count(12)]:
        label = f"{name}/{one['kernel'][:60]}"
        yield measurement(label, one["ms"], "ms", note=f"{one['calls']} x, {one['ms'] / total:.0%}")


def eval_model(session: Session, config: ModelConfig) -> tuple[Any, dict[str, Tensor]]:
    """A model in evaluation mode on the compiled backends, and boards for it."""
    head = fused_head(session, config).eval()
    return head.model, contenders.make_batch(config, session.device)


def throughput(session: Session, mixer: str, batch: int) -> Rows:
    """Puzzles a second at 16 supervision steps: ours, and the official code's where it is given."""
    config = session.config(mixer, batch)
    config = replace(config, halt_max_steps=session.count(config.halt_max_steps))
    name = f"inference/{mixer}/B{batch}"
    ours = fused_entry(session, config, "solve", "ours")
    yield from solve_rows(session, name, ours)
    if session.official is None:
        return
    with official_code(session.official) as official:
        eager = Contender("official eager", official=True)
        theirs = contenders.prepare(eager, config, "solve", official, session.device)
        yield from solve_rows(session, f"{eager.name}/{mixer}/inference B{batch}", theirs)
    gain = min(theirs.wall) / min(ours.wall)
    yield measurement(f"{name}/gain", gain, "x", look_up(f"{name}/gain"), note="official eager")


def solve_rows(session: Session, name: str, entry: Entry) -> Rows:
    """Puzzles a second of a whole solve, its kernels and utilization."""
    if not session.tiny:
        lap(entry, session.device, keep=False)
    for _ in range(session.count(3)):
        lap(entry, session.device)
    seconds = min(entry.wall)
    rate = entry.config.batch_size / seconds
    note = f"{1e3 * seconds:.1f} ms for {entry.config.halt_max_steps} steps"
    yield measurement(name, rate, "puzzles/s", look_up(name), note=note)
    yield from inside(session, name, entry, "solve", seconds)


def inside(session: Session, name: str, entry: Entry, step: str, seconds: float) -> Rows:
    """On a GPU: kernels of a step, and its useful operations over the maker's peak."""
    if session.device.type != "cuda":
        return
    count = launches(entry.run, session.device)
    yield measurement(f"{name}/launches", count, "kernels", look_up(f"{name}/launches"))
    yield from utilization(session, name, entry.config, step, seconds)


def utilization(
    session: Session, name: str, config: ModelConfig, step: str, seconds: float
) -> Rows:
    """Useful operations over the maker's peak, where that is known."""
    peak = flops.device_peak(device_name(session.device))
    if peak is not None:
        rate = flops.step_flops(config, step) / seconds / 1e12
        note = f"{rate:.1f} useful TFLOP/s"
        percent = 100 * rate / peak.tflop_per_s
        yield measurement(f"{name}/mfu", percent, "%", look_up(f"{name}/mfu"), note=note)


def sudoku_batches(config: ModelConfig, boards: int) -> Iterator[dict[str, Tensor]]:
    """Endless batches of generated puzzles, the same for every call."""
    puzzles, grids = generate(boards, clues=(32, 50), seed=3)
    drawn = np.random.Generator(np.random.Philox(key=[3, 3]))
    while True:
        chosen = drawn.integers(0, boards, config.batch_size)
        inputs, labels = (
            torch.from_numpy(t[chosen].astype(np.int32)) + 1 for t in (puzzles, grids)
        )
        zeros = torch.zeros(config.batch_size, dtype=torch.int32)
        yield {"inputs": inputs, "labels": labels, "puzzle_identifiers": zeros}


def train(
    session: Session, head: nn.Module, call: Callable[..., Any], config: ModelConfig, steps: int
) -> tuple[list[float], float]:
    """Losses per board of `steps` optimizer steps, and the median seconds of one."""
    settings = TrainConfig().replace({"lr_warmup_steps": 100, "steps": max(1, steps)})
    optimizers = optim.build_optimizers(head, settings)
    batches = sudoku_batches(config, 64 if session.tiny else 4096)
    torch.manual_seed(11)
    carry: Any = None
    losses: list[Tensor] = []
    seconds: list[float] = []
    for step in range(1, steps + 1):
        batch = {n: t.to(session.device) for n, t in next(batches).items()}
        synchronize(session.device)
        begin = time.perf_counter()
        if carry is None:
            with torch.device(session.device):
                carry = head.initial_carry(batch)  # type: ignore[operator]
        carry, loss, _, _, _ = call(return_keys=(), carry=carry, batch=batch)
        (loss / config.batch_size).backward()
        count = torch.tensor(step, device=session.device)
        optim.set_learning_rates(optimizers, count, settings.lr_warmup_steps, steps, 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach() / config.batch_size)
        synchronize(session.device)
        seconds.append(time.perf_counter() - begin)
    return [float(loss) for loss in losses], statistics.median(seconds[len(seconds) // 4 :])


def curve(session: Session, mixer: str, steps: int) -> Rows:
    """The same seeds and boards for our step and the official one under torch.compile."""
    path = session.need_official()
    # The boards are those of the generator: nine by nine, also in the dry run.
    config = replace(session.config(mixer, 768), seq_len=81, policy="save")
    found: dict[str, list[float]] = {}
    with official_code(path) as official:
        for name in ("ours", "official compiled"):
            contender = Contender(name, official=name != "ours")
            head: nn.Module
            if name == "ours":
                head = fused_head(session, config)
            else:
                head = contenders.build(contender, config, official, session.device)
            head.train()
            call: Callable[..., Any] = head
            if name != "ours":
                call = torch.compile(head, dynamic=False, backend=session.compiler)
            losses, seconds = train(session, head, call, config, session.count(steps))
            found[name] = losses
            yield measurement(
                f"curve/{name}/step", 1e3 * seconds, "ms", note="with optimizer", losses=losses
            )
    last = max(1, steps // 6)
    ours, theirs = (statistics.mean(x[-last:]) for x in found.values())
    yield measurement("curve/ours over official", ours / theirs, "loss", note=f"last {last} steps")
