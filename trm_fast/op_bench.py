"""One operation's contenders: proof that they compute the same, then their times, in turns.

Owns the protocol of the per-operation benchmarks. Imported by bench/ and `suite`. Every contender
gets the same inputs and must pass the three-way check first: its largest error against the
reference in a wider dtype is at most twice that of the reference in its own dtype, plus a floor. A
contender that does not pass is an error, and nothing of the race is timed.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trm_fast import backends, reference
from trm_fast.config import ModelConfig
from trm_fast.contenders import ParityError
from trm_fast.op_cases import Draw, OpCase
from trm_fast.ops import OP_NAMES, Ops
from trm_fast.race import first_line, forget_compiled
from trm_fast.timing import (
    collector_off,
    copy_peak,
    in_a_row,
    launch_seconds,
    matmul_peak,
    summary,
)

Function = Callable[..., Any]

# Element-wise floors (absolute, relative) per dtype: those of tests/parity.py.
FLOORS = {
    torch.float32: (1e-5, 1.3e-6),
    torch.float16: (1e-3, 1e-3),
    torch.bfloat16: (1e-2, 1.6e-2),
}
INPUT_SETS = 4  # on a GPU; rotated, so that no cache holds the inputs of the next call
BLOCK = 10  # calls of one contender on a GPU before the next one's turn


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN: an output that nobody writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # operations without a deterministic form
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def fused_functions(
    op: str, config: ModelConfig, device: torch.device, interpreted: bool = False
) -> tuple[dict[str, Function], dict[str, str]]:
    """backend -> implementation for the compiled backends that serve, -> reason for the others.

    interpreted: take the Triton kernels on the CPU, in Triton's interpreter.
    """
    found: dict[str, Function] = {}
    absent: dict[str, str] = {}
    dtype = getattr(torch, config.forward_dtype)
    for row in backends.ROWS:
        if row.op != op or row.backend == "reference":
            continue
        try:
            reason = row.unsupported(device, dtype, config)
            if reason is None or (interpreted and row.backend == "triton"):
                found[row.backend] = row.load()
            else:
                absent[row.backend] = reason
        except (ImportError, AttributeError) as error:
            absent[row.backend] = f"cannot be loaded: {error}"
    return found, absent


def operations(config: ModelConfig, device: torch.device, interpreted: bool = False) -> Ops:
    """For each op the first compiled backend that serves and loads, else the reference."""
    chosen: dict[str, Function] = {}
    for op in OP_NAMES:
        found, _ = fused_functions(op, config, device, interpreted)
        chosen[op] = next(iter(found.values()), getattr(reference, op))
    return Ops(**chosen)


def plain_function(op: str) -> Function:
    """The reference, `deep_recursion` with the other ops of the reference."""
    if op != "deep_recursion":
        return getattr(reference, op)
    return with_ops(reference.deep_recursion, backends.table("reference"))


def functions(
    case: OpCase, device: torch.device, interpreted: bool = False
) -> tuple[dict[str, Function], dict[str, str]]:
    """contender -> implementation, the reference first, and -> reason for those that are absent."""
    found, absent = fused_functions(case.op, case.config, device, interpreted)
    plain = {"reference": plain_function(case.op)}
    if case.op != "deep_recursion":
        return plain | found, absent
    mixed = operations(case.config, device, interpreted)
    if not found and mixed.swiglu_rmsnorm is not reference.swiglu_rmsnorm:
        plain["reference of fused ops"] = with_ops(reference.deep_recursion, mixed)
    return plain | {name: with_ops(f, mixed) for name, f in found.items()}, absent


def with_ops(function: Function, ops: Ops) -> Function:
    """`deep_recursion` with its first argument given."""
    return lambda *rest: function(ops, *rest)


@dataclass
class Inputs:
    """One set of inputs; the gradient of the first result is drawn when it is first asked for.

    (Only the first result of an operation has one here: the states that `embed_reset` and
    `deep_recursion` return beside it are handed on without.)
    """

    case: OpCase
    tensors: list[Tensor]
    seed: int
    upstream: Tensor | None = None

    def gradient(self, of: Tensor) -> Tensor:
        """Normal, rounded to the case's dtype, in the dtype of `of`."""
        if self.upstream is None:
            draw = Draw(self.seed + 1000, self.case.dtype, of.device)
            self.upstream = draw(*of.shape)
        return self.upstream.to(of.dtype)

    def widened(self, dtype: torch.dtype) -> Inputs:
        """The same values, floating ones in `dtype`."""

        def wide(t: Tensor) -> Tensor:
            return t.detach().to(dtype) if t.is_floating_point() else t

        tensors = [wide(t).requires_grad_(t.requires_grad) for t in self.tensors]
        return Inputs(self.case, tensors, self.seed, self.upstream)


def make_inputs(case: OpCase, seed: int, device: torch.device) -> Inputs:
    """Drawn on the device."""
    tensors = case.draw(Draw(seed, case.dtype, device))
    for i in case.leaves:
        tensors[i].requires_grad_()
    return Inputs(case, tensors, seed)


def forward(function: Function, inputs: Inputs) -> list[Tensor]:
    """The results, without a graph; in-place operations give the tensors that they changed."""
    case = inputs.case
    with torch.no_grad():
        outcome = case.call(function, inputs.tensors)
    if case.changes is not None:
        return [inputs.tensors[i] for i in case.changes]
    return list(outcome) if isinstance(outcome, tuple) else [outcome]


def both(function: Function, inputs: Inputs) -> list[Tensor]:
    """The results, then the gradients of the leaves."""
    outcome = inputs.case.call(function, inputs.tensors)
    outcome = list(outcome) if isinstance(outcome, tuple) else [outcome]
    leaves = [inputs.tensors[i] for i in inputs.case.leaves]
    grads = torch.autograd.grad(outcome[:1], leaves, [inputs.gradient(outcome[0])])
    return [t.detach() for t in outcome] + list(grads)


RUN = {"forward": forward, "both": both}


@dataclass
class Expectation:
    """What is right for one set of inputs, and how far from it a result may be."""

    direction: str
    inputs: Inputs
    values: list[Tensor]
    allowed: list[float]

    def check(self, function: Function, who: str) -> float:
        """The largest error over what is allowed, of any result of `function`.

        Raises:
            ParityError: one is above 1, not finite, of another shape, or another integer.
        """
        case, worst = self.inputs.case, 0.0
        where = f"{who}, {case.op} ({case.name}), {self.direction}, seed {self.inputs.seed}"
        with poisoned_memory():
            got = RUN[self.direction](function, fresh(self.inputs))
        if len(got) != len(self.values):
            raise ParityError(f"{where}: {len(got)} results, expected {len(self.values)}")
        for i, (g, e, allowed) in enumerate(zip(got, self.values, self.allowed, strict=True)):
            if g.shape != e.shape:
                raise ParityError(f"{where}: result {i} is {list(g.shape)}, not {list(e.shape)}")
            error = distance(g, e)
            if not error <= allowed:
                raise ParityError(
                    f"{where}: result {i} is off by {error:.2e}, allowed {allowed:.2e}; "
                    "nothing was timed"
                )
            worst = max(worst, error / allowed if allowed else 0.0)
        return worst


def fresh(inputs: Inputs) -> Inputs:
    """Inputs that may be changed in place."""
    if inputs.case.changes is None:
        return inputs
    return Inputs(inputs.case, [t.clone() for t in inputs.tensors], inputs.seed)


def distance(got: Tensor, want: Tensor) -> float:
    """The largest difference; NaN where one is NaN, infinite for integers that differ."""
    if got.numel() == 0:
        return 0.0
    if not want.is_floating_point():
        return 0.0 if torch.equal(got, want) else float("inf")
    return float((got.detach().to(want.dtype) - want).abs().max())


def expect(
    case: OpCase, direction: str, seed: int, device: torch.device, oracle: torch.dtype
) -> Expectation:
    """The reference on inputs of `seed` in the `oracle` dtype, and its error in the case's own."""
    inputs = make_inputs(case, seed, device)
    run, function = RUN[direction], plain_function(case.op)
    baseline = run(function, fresh(inputs))
    values = run(function, fresh(inputs).widened(oracle))
    allowed = [tolerance(b, v) for b, v in zip(baseline, values, strict=True)]
    return Expectation(direction, inputs, values, allowed)


def tolerance(baseline: Tensor, exact: Tensor) -> float:
    """How far from `exact` a result may be whose reference, in its own dtype, is `baseline`."""
    if not exact.is_floating_point() or not exact.numel():
        return 0.0
    absolute, relative = FLOORS.get(baseline.dtype, FLOORS[torch.float32])
    return 2 * distance(baseline, exact) + absolute + relative * float(exact.abs().max())


@dataclass
class Entry:
    """A contender ready to run, and its times so far, in seconds."""

    name: str
    function: Function
    seconds: list[float] = field(default_factory=list)
    launch: float | None = None
    error: float = 0.0


@dataclass
class OpRace:
    """The contenders of one case and direction, checked; `absent` says why others are not."""

    case: OpCase
    direction: str
    device: torch.device
    entries: list[Entry]
    absent: dict[str, str]
    inputs: list[Inputs]

    def step(self, entry: Entry) -> Callable[[int], Any]:
        """run(i): one call on the i-th set of inputs."""
        run = RUN[self.direction]
        return lambda i: run(entry.function, self.inputs[i % len(self.inputs)])

    def run(self, rounds: int, seconds: float = float("inf")) -> None:
        """Warm up, then at least `rounds` timed calls of every contender, in turns.

        No new turn begins once all turns together have taken `seconds`.
        """
        cuda = self.device.type == "cuda"
        block = BLOCK if cuda else 1
        with collector_off():
            for entry in self.entries:
                for i in range(len(self.inputs)):
                    self.step(entry)(i)
                if cuda:
                    entry.launch = launch_seconds(self.step(entry), self.device)
            begin = time.perf_counter()
            for turn in range(-(-rounds // block)):
                if turn and time.perf_counter() - begin > seconds:
                    break
                for i in range(len(self.entries)):
                    entry = self.entries[(turn + i) % len(self.entries)]
                    entry.seconds += in_a_row(self.step(entry), self.device, turn * block, block)

    def result(self, peaks: dict[str, float]) -> dict[str, Any]:
        """The JSON object of this race. `peaks`: matmul_tflop_per_s and copy_gb_per_s."""
        flops, moved = self.case.cost(self.direction)
        rows = [row(e, flops, moved, peaks) for e in self.entries]
        rows += [
            {"contender": name, "available": False, "note": why}
            for name, why in self.absent.items()
        ]
        base = statistics.median(self.entries[0].seconds)
        return {
            "op": self.case.op,
            "case": self.case.name,
            "direction": self.direction,
            "dtype": self.case.config.forward_dtype,
            "batch": self.case.config.batch_size,
            "gflop": flops / 1e9,
            "mb": moved / 1e6,
            "rows": rows,
            "speedup": {e.name: base / statistics.median(e.seconds) for e in self.entries[1:]},
        }


def row(entry: Entry, flops: float, moved: float, peaks: dict[str, float]) -> dict[str, Any]:
    """One contender's line; rates by the median."""
    ms = summary(entry.seconds)
    tflops, gbs = flops / ms["median"] / 1e9, moved / ms["median"] / 1e6
    return {
        "contender": entry.name,
        "available": True,
        "note": "",
        "runs": len(entry.seconds),
        "ms": ms,
        "launch_ms": None if entry.launch is None else 1e3 * entry.launch,
        "tflop_per_s": tflops,
        "gb_per_s": gbs,
        "fraction_of_matmul": tflops / peaks["matmul_tflop_per_s"],
        "fraction_of_copy": gbs / peaks["copy_gb_per_s"],
        "error_over_allowed": entry.error,
    }


def oracle_dtype(case: OpCase) -> torch.dtype:
    """float32 where that is much finer than what the case works in: it takes half the memory."""
    wide = case.dtype == torch.float32 or case.changes is not None
    return torch.float64 if wide else torch.float32


def set_up(
    case: OpCase,
    direction: str,
    device: torch.device,
    compiler: str | None = None,
    interpreted: bool = False,
) -> OpRace:
    """Build and check all contenders; `compiler` is torch.compile's backend, None leaves it out.

    Raises:
        ParityError: one of them computes something else.
    """
    found, absent = functions(case, device, interpreted)
    if compiler is not None:
        forget_compiled()
        plain = found.pop("reference")
        compiled = torch.compile(plain, dynamic=False, backend=compiler)
        found = {"reference": plain, "reference compiled": compiled} | found
    expectation = expect(case.judged or case, direction, 0, device, oracle_dtype(case))
    entries: list[Entry] = []
    for name, function in found.items():
        try:
            error = expectation.check(function, name) if name != "reference" else 0.0
        except ParityError:
            raise
        except Exception as failure:  # no compiler, no memory, a kernel that does not compile
            absent[name] = f"failed: {first_line(failure)}"
            continue
        entries.append(Entry(name, function, error=error))
    inputs = [
        make_inputs(case, seed, device)
        for seed in range(INPUT_SETS if device.type == "cuda" else 1)
    ]
    return OpRace(case, direction, device, entries, absent, inputs)


def measure_peaks(
    device: torch.device, dtype: torch.dtype, quick: bool = False
) -> dict[str, float]:
    """What the rates are fractions of, measured here: matmul_tflop_per_s and copy_gb_per_s."""
    cuda = device.type == "cuda"
    size, copied = (8192, 2**31) if cuda else (1024, 2**27)
    if quick:
        size, copied = 64, 2**16
    return {
        "matmul_tflop_per_s": matmul_peak(dtype, device, size) / 1e3,
        "copy_gb_per_s": copy_peak(device, copied),
    }


def table(result: dict[str, Any]) -> str:
    """One race as text."""
    lines = [
        f"{result['op']} ({result['case']}), {result['direction']}: {result['dtype']}, "
        f"B={result['batch']}, {result['gflop']:.1f} GFLOP, {result['mb']:.0f} MB",
        f"  {'':<24}{'ms':>9}{'min':>9}{'launch':>9}{'TFLOP/s':>9}{'of mm':>7}{'GB/s':>8}"
        f"{'of copy':>9}{'speed-up':>10}",
    ]
    for r in result["rows"]:
        if not r["available"]:
            lines.append(f"  {r['contender']:<24}{r['note']}")
            continue
        ratio = result["speedup"].get(r["contender"])
        launch = "" if r["launch_ms"] is None else f"{r['launch_ms']:.3f}"
        lines.append(
            f"  {r['contender']:<24}{r['ms']['median']:>9.3f}{r['ms']['min']:>9.3f}"
            f"{launch:>9}{r['tflop_per_s']:>9.3g}{r['fraction_of_matmul']:>7.0%}"
            f"{r['gb_per_s']:>8.4g}{r['fraction_of_copy']:>9.0%}"
            + (f"{ratio:>9.2f}x" if ratio else "")
        )
    return "\n".join(lines)


def text(found: dict[str, Any]) -> str:
    """All races for a terminal; `found` has what `timing.environment` says, op_peaks and ops."""
    peaks = found["op_peaks"]
    head = (
        f"trm_fast {found['version']} ({found['commit'] or 'no commit'}), torch {found['torch']}, "
        f"triton {found['triton']}, {found['device']}\n"
        f"torch.mm {peaks['matmul_tflop_per_s']:.4g} TFLOP/s, copy {peaks['copy_gb_per_s']:.4g} "
        "GB/s in this run; medians; launch: what the host needs for one call"
    )
    return "\n\n".join([head, *(table(result) for result in found["ops"])])
