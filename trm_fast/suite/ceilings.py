"""What the machine can do: versions and clocks, products, copies, launches.

Owns these items of stage A. Reads the GPU's state and never changes it. Imported by `stages.py`.

Dims legend: B batch, S tokens incl. prefix, D width, N = B*S rows, R = B*D rows of a token product.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from trm_fast.suite.predictions import Prediction, look_up, planned_ms, product_ms
from trm_fast.suite.records import measurement
from trm_fast.suite.session import Rows, Session, Skip
from trm_fast.timing import copy_peak, in_a_row, matmul_peak

QUERY = (
    "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,"
    "temperature.gpu,memory.used,memory.total"
)
ROUNDS = 15
ALIGNED_TOKENS = (104, 112, 128)  # what 97 tokens can be padded to
GRAD_PASSES = 7  # the passes with a gradient, whose weight gradients can be one product


def gpu_state(session: Session) -> Rows:
    """nvidia-smi's view of the GPU: at rest, and straight after a second of work."""
    session.need_cuda()
    if shutil.which("nvidia-smi") is None:
        raise Skip("nvidia-smi is not on PATH")
    for moment in ("at rest", "under load"):
        if moment == "under load":
            a = torch.randn(8192, 8192, device=session.device, dtype=torch.bfloat16)
            end = time.perf_counter() + 1.0
            while time.perf_counter() < end:
                a @ a
                torch.cuda.synchronize()
        asked = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
        said = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20)
        values = dict(zip(QUERY.split(","), said.stdout.splitlines()[0].split(", "), strict=True))
        clock = float(values["clocks.sm"])
        note = f"{values['power.draw']} of {values['power.limit']} W, {values['temperature.gpu']} C"
        yield measurement(f"clocks/SM {moment}", clock, "MHz", note=note, state=values)


def peaks(session: Session) -> Rows:
    """The two ceilings, and a copy that stays in the L2 cache."""
    dtype = getattr(torch, session.dtype)
    size, copied, cached = (64, 2**16, 2**12) if session.tiny else (8192, 2**32, 2**24)
    rate = matmul_peak(dtype, session.device, size) / 1e3
    yield measurement(
        f"ceilings/matmul {size}", rate, "TFLOP/s", look_up(f"ceilings/matmul {size}")
    )
    rate = copy_peak(session.device, copied)
    yield measurement("ceilings/copy", rate, "GB/s", look_up("ceilings/copy"))
    rate = copy_peak(session.device, cached, runs=50)
    yield measurement(f"ceilings/copy of {cached >> 10} KiB", rate, "GB/s")


def _time(session: Session, run: Callable[[int], object]) -> float:
    """Median seconds of a call, everything queued."""
    for i in range(2):
        run(i)
    return statistics.median(in_a_row(run, session.device, 0, session.count(ROUNDS)))


def _row(
    session: Session, name: str, sizes: tuple[int, int, int], run: Callable[[int], object],
    predicted: Prediction,
) -> dict:  # fmt: skip
    m, n, k = sizes
    seconds = _time(session, run)
    rate = 2.0 * m * n * k / seconds / 1e12
    return measurement(name, 1e3 * seconds, "ms", predicted, tflop_per_s=rate, sizes=sizes,
                       note=f"{rate:.0f} TFLOP/s")  # fmt: skip


def weight_product(d: Tensor, x: Tensor) -> Tensor:
    """d.T @ x in float32: a weight's gradient."""
    if d.is_cuda and d.dtype != torch.float32:
        return torch.mm(d.t(), x, out_dtype=torch.float32)
    return d.t().float() @ x.float()


def _random(session: Session, *shape: int) -> Tensor:
    return torch.randn(shape, device=session.device).to(getattr(torch, session.dtype))


def products(session: Session) -> Rows:
    """The network's matrix products as cuBLAS does them: forward, to the inputs, to the weights."""
    c = session.config("attention", 768)
    rows, d, f = c.batch_size * c.total_len, c.hidden_size, c.channel_width
    forward = {"gate_up": (2 * f, d), "down": (d, f), "qkv": (3 * d, d), "o_proj": (d, d)}
    for name, (n, k) in forward.items():
        a, w = _random(session, rows, k), _random(session, n, k)
        predicted = product_ms(rows, n, k)
        run = partial(lambda a, w, i: a @ w.t(), a, w)
        yield _row(session, f"products/{name}", (rows, n, k), run, predicted)
        grad = _random(session, rows, n)
        run = partial(lambda grad, w, i: grad @ w, grad, w)
        yield _row(session, f"products/{name} to input", (rows, k, n), run, product_ms(rows, k, n))
        run = partial(lambda grad, a, i: weight_product(grad, a), grad, a)
        yield _row(session, f"products/{name} to weight", (n, k, rows), run, predicted)


def all_passes(session: Session) -> Rows:
    """The weight gradients of all passes with a gradient in one product."""
    c = session.config("mlp_t", 768)
    rows, d, f = GRAD_PASSES * c.batch_size * c.total_len, c.hidden_size, c.channel_width
    for name, n, k in (("gate_up", 2 * f, d), ("down", d, f)):
        grad, x = _random(session, rows, n), _random(session, rows, k)
        run = partial(lambda grad, x, i: weight_product(grad, x), grad, x)
        name = f"products/{name} to weight, {GRAD_PASSES} passes"
        yield _row(session, name, (n, k, rows), run, product_ms(n, k, rows))


def token_products(session: Session) -> Rows:
    """The token MLP's products over 97 tokens, unaligned, and over what they can be padded to."""
    c = session.config("mlp_t", 768)
    rows, f = c.batch_size * c.hidden_size, c.token_width
    own = c.total_len
    for tokens in (own, *ALIGNED_TOKENS):
        aligned = tokens != own

        def row(
            name: str, sizes: tuple[int, int, int], run: Callable[[int], object],
            tokens: int = tokens, aligned: bool = aligned,
        ) -> dict:  # fmt: skip
            predicted = product_ms(*sizes, aligned=aligned)
            return _row(session, f"token products/{name}, {tokens} tokens", sizes, run, predicted)

        s, w = _random(session, rows, tokens), _random(session, 2 * f, tokens)
        yield row("gate_up", (rows, 2 * f, tokens), partial(lambda s, w, i: s @ w.t(), s, w))
        by_token = s.t().contiguous()
        run = partial(lambda w, by_token, i: w @ by_token, w, by_token)
        yield row("gate_up by token", (2 * f, rows, tokens), run)
        grad = _random(session, rows, 2 * f)
        run = partial(lambda grad, s, i: weight_product(grad, s), grad, s)
        yield row("gate_up to weight", (2 * f, tokens, rows), run)
        a, w = _random(session, rows, f), _random(session, tokens, f)
        yield row("down", (rows, tokens, f), partial(lambda a, w, i: a @ w.t(), a, w))


def launches(session: Session) -> Rows:
    """Microseconds from one tiny kernel to the next: eager, and as nodes of a CUDA graph."""
    session.need_cuda()
    count = 1000
    t = torch.zeros(256, device=session.device)

    def chain() -> None:
        for _ in range(count):
            t.add_(1.0)

    chain()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    chain()
    torch.cuda.synchronize()
    each = (time.perf_counter() - begin) / count
    yield measurement("launches/eager", 1e6 * each, "us", look_up("launches/eager"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    each = _time(session, lambda i: graph.replay()) / count
    yield measurement("launches/graph", 1e6 * each, "us", look_up("launches/graph"))


def elementwise(session: Session) -> Rows:
    """One pass over a state as PyTorch does it: what a fused epilogue saves."""
    c = session.config("mlp_t", 768)
    shape = (c.batch_size, c.total_len, c.hidden_size)
    a, b = _random(session, *shape), _random(session, *shape)
    moved = 3.0 * a.numel() * a.element_size()
    seconds = _time(session, lambda i: a + b)
    predicted = Prediction(planned_ms(0.0, moved), source="planning rates")
    rate = moved / seconds / 1e9
    yield measurement(
        "elementwise/sum of two states", 1e3 * seconds, "ms", predicted, note=f"{rate:.0f} GB/s"
    )
