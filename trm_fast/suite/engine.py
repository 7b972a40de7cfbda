"""What users run: the trainer's step and whole answers, captured into CUDA graphs.

Owns these items of stages A and B. A step here has everything: gathering, loss, backward, clipping,
optimizer, moving average. Imported by `stages.py`.

Dims legend: B batch, L puzzle tokens.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trm_fast.config import TrainConfig
from trm_fast.contenders import ParityError
from trm_fast.data.dataset import PuzzleDataset, PuzzleDatasetConfig, from_arrays
from trm_fast.data.feed import Feed
from trm_fast.inference_step import InferenceStep
from trm_fast.profiling import launches
from trm_fast.recursion import named
from trm_fast.suite.predictions import look_up
from trm_fast.suite.records import measurement
from trm_fast.suite.session import Rows, Session
from trm_fast.suite.steps import GIB, eval_model, utilization, wall_seconds
from trm_fast.suite.truth import fused_head
from trm_fast.timing import synchronize
from trm_fast.train_step import TrainStep

EXAMPLES = 10_000
COMPARED = 8  # steps: warm-up, capture and replays


class Steps:
    """A trainer's step on random boards that lie on the device."""

    def __init__(self, session: Session, mixer: str, captured: bool) -> None:
        config = replace(session.config(mixer, 768), policy="save")
        self.config, batch = config, config.batch_size
        rng = np.random.default_rng(5)
        count = batch * session.count(EXAMPLES // batch + 1)
        labels = rng.integers(2, config.vocab_size, (count, config.seq_len), dtype=np.uint8)
        inputs = np.where(rng.random(labels.shape) < 0.6, np.uint8(1), labels)
        data = from_arrays(inputs, labels, vocab_size=config.vocab_size)
        visiting = PuzzleDatasetConfig(0, ("random",), batch, test_set_mode=False)
        dataset = PuzzleDataset(visiting, data=data)
        head: Any = fused_head(session, config).train()
        settings = {"global_batch_size": batch, "steps": 10_000, "ema": True, "grad_clip": 1.0}
        self.step = TrainStep(
            TrainConfig().replace({**settings, "cuda_graph": captured}),
            head,
            Feed(dataset, session.device, resident=True),
            total_steps=10_000,
        )
        self.taken = 0
        self._batches = self._endless(dataset)

    @staticmethod
    def _endless(dataset: PuzzleDataset) -> Iterator[tuple[str, np.ndarray]]:
        while True:
            yield from dataset.choices()

    def run(self) -> None:
        self.taken += 1
        self.step.run(*next(self._batches), self.taken)

    def state(self) -> dict[str, Tensor]:
        """What the next step depends on, of this one's making."""
        step = self.step
        assert step.ema is not None and step.sums.totals is not None
        found = {name: p.detach() for name, p in step.model.named_parameters()}
        found |= {f"average of {name}": value for name, value in step.ema.shadow.items()}
        (carry,) = step.carries
        found |= {**named(carry.inner_carry), "steps": carry.steps}
        return found | {"halted": carry.halted, "metrics": step.sums.totals}


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """On CUDA, whatever makes the host wait for the device is an error."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def exact(session: Session, mixer: str) -> Rows:
    """The captured step against the same step call by call, bitwise; and that neither waits.

    Raises:
        ParityError: some state differs; RuntimeError: something waited for the device.
    """
    plain, captured = (Steps(session, mixer, captured) for captured in (False, True))
    for number in range(session.count(COMPARED)):
        for steps in (plain, captured):
            if number:  # libraries may wait in their first call
                with no_waiting(session.device):
                    steps.run()
            else:
                steps.run()
    found = captured.state()
    must_be_captured(session, f"the {mixer} step", captured.step.captured)
    for name, value in plain.state().items():
        if not torch.equal(value, found[name]):
            raise ParityError(f"the captured {mixer} step: {name} differs from plain calls")
    yield measurement(f"engine/{mixer}/exact", 1.0, "of 1", note=f"{plain.taken} steps, bitwise")


def must_be_captured(session: Session, what: str, captured: bool) -> None:
    """On a GPU a plain step must not be taken for a graph.

    Raises:
        ParityError: it is one.
    """
    if session.device.type == "cuda" and not captured:
        raise ParityError(f"{what} was not captured: the log says why")


def trainer_step(session: Session, mixer: str) -> Rows:
    """ms, memory, launches and utilization of the trainer's step, as a graph."""
    steps = Steps(session, mixer, captured=True)
    for _ in range(session.count(6)):
        steps.run()
    must_be_captured(session, f"the {mixer} step", steps.step.captured)
    if session.device.type == "cuda":  # what was reserved on the way there is given back
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(session.device)
    count = session.count(20)
    synchronize(session.device)
    begin = time.perf_counter()
    for _ in range(count):
        steps.run()
    enqueued = time.perf_counter() - begin
    synchronize(session.device)
    seconds = (time.perf_counter() - begin) / count
    name = f"engine/{mixer}"
    note = f"the host was done after {1e3 * enqueued / count:.2f} ms a step"
    ms = 1e3 * seconds
    yield measurement(f"{name}/step", ms, "ms", look_up(f"{name}/step"), note=note, runs=count)
    if session.device.type != "cuda":
        return
    peak = torch.cuda.max_memory_reserved(session.device) / GIB
    yield measurement(f"{name}/memory", peak, "GiB", look_up(f"{name}/memory"), note="reserved")
    kernels = launches(steps.run, session.device)
    yield measurement(f"{name}/launches", kernels, "kernels")
    yield from utilization(session, name, steps.config, "train", seconds)


def pdl_switch(device: torch.device) -> Callable[[bool], AbstractContextManager[None]] | None:
    """What turns the kernels' programmatic dependent launch on and off, where the GPU has it.

    (By name: only `backends` imports kernels otherwise.)
    """
    if device.type != "cuda":
        return None
    kernels: Any = importlib.import_module("trm_fast.kernels._runtime")
    return kernels.dependent_launches if kernels.has_dependent_launches(device) else None


def answers(session: Session, mixer: str, batch: int) -> Rows:
    """From boards on the device to answers on the host, all supervision steps: captured or not.

    Of one board also with programmatic dependent launch (PDL), on GPUs that have it: there the
    kernels are so short that their starts count.
    """
    config = session.config(mixer, batch)
    config = replace(config, halt_max_steps=session.count(config.halt_max_steps))
    model, boards = eval_model(session, config)
    name = f"answers/{mixer}/B{batch}"
    found: list[Tensor] = []
    ways = [("plain", False, False), ("graph", True, False)]
    switch = pdl_switch(session.device) if batch == 1 else None
    if switch:
        ways.append(("graph, PDL", True, True))
    for way, captured, pdl in ways:
        step = InferenceStep(model, config.batch_size, captured)

        def solve(step: InferenceStep = step) -> Tensor:
            step.start({key: boards[key] for key in ("inputs", "puzzle_identifiers")})
            for _ in range(config.halt_max_steps):
                out = step.run()
            return out.preds.cpu()

        with torch.inference_mode(), switch(pdl) if switch else nullcontext():
            found.append(solve())
            walls = [wall_seconds(solve, session.device) for _ in range(session.count(5))]
        if captured:
            must_be_captured(session, name, step.captured)
        ms = 1e3 * statistics.median(walls)
        rate = config.batch_size / statistics.median(walls)
        note = f"{config.halt_max_steps} steps, {rate:.0f} puzzles/s"
        yield measurement(f"{name}/{way}", ms, "ms", look_up(f"{name}/{way}"), note=note)
        if not torch.equal(found[0], found[-1]):
            raise ParityError(f"{name}/{way}: the answers differ from those of plain calls")
