"""What was expected of each measurement before any of it had run, to be printed beside it.

Owns numbers only. All are for one H100 80GB HBM3, bfloat16, the official Sudoku networks with 768
boards, and were written down before any kernel had run on hardware: computed from operations and
bytes at planning rates, or estimated per kernel. A measurement off by more than a quarter wants an
explanation before the next change. Imported by the modules of `suite`; imports nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

MATMUL = 790.0  # TFLOP/s of a large bfloat16 product, seen on such a GPU
COPY = 3000.0  # GB/s of a large copy, read and written, seen on such a GPU
PLANNED_MATMUL = 580.0  # of products with 512 to 1536 terms, public figures
PLANNED_COPY = 2700.0
UNALIGNED = (120.0, 200.0, 300.0)  # TFLOP/s of products with rows of 97 numbers: low, guess, high


@dataclass(frozen=True)
class Prediction:
    """`value` in the measurement's unit, a range where one was given, and where it comes from."""

    value: float
    low: float | None = None
    high: float | None = None
    source: str = ""

    def ratio(self, measured: float) -> float:
        """Measured over predicted."""
        return measured / self.value


def planned_ms(flops: float, moved: float) -> float:
    """Milliseconds at the planning rates: the products or the bytes, whichever takes longer."""
    return max(flops / PLANNED_MATMUL / 1e9, moved / PLANNED_COPY / 1e6)


def product_ms(m: int, n: int, k: int, aligned: bool = True, width: int = 2) -> Prediction:
    """Of [m,k] x [k,n]; `width` bytes a number."""
    flops, moved = 2.0 * m * n * k, float(width * (m * k + k * n + m * n))
    if aligned:
        return Prediction(planned_ms(flops, moved), source="planning rates")
    slow, guess, fast = (flops / rate / 1e9 for rate in UNALIGNED)
    return Prediction(guess, fast, slow, "120-300 TFLOP/s for unaligned rows")


def _of(source: str, **values: float | tuple[float, float, float]) -> dict[str, Prediction]:
    made = {}
    for name, value in values.items():
        low, middle, high = value if isinstance(value, tuple) else (None, value, None)
        made[name] = Prediction(middle, low, high, source)
    return made


# Milliseconds of an operation. Kernels: K1 token mix 0.40; K2 gate_up 0.40, 0.46 where it keeps its
# products; K3 down 0.225; backward of the channel SwiGLU 1.53, of the token mix 1.2. An operation
# alone also finishes its norm, 0.057: the recursion defers that to the next kernel.
OPERATIONS = {
    "token_mix/mlp_t": _of("K1 and its backward", forward=0.40, both=1.60),
    "swiglu_rmsnorm/channel": _of("K2, K3, norm, channel backward", forward=0.68, both=2.27),
    "linear_rmsnorm/down": _of("K3 and norm", forward=0.28),
    "rope_attention/sudoku": _of("one CTA per head", forward=0.11, both=0.31),
    "adam_atan2_ema_/mlp_t": _of("190 MB in one pass", forward=0.065),
    "deep_recursion/mlp_t": _of(
        "42 layers of 1.03 ms; 82 of the step's 83", forward=43.3, both=82.0
    ),
    "deep_recursion/attention": _of("77 of the step's 78", both=77.0),
}


def operation_ms(op: str, case: str, direction: str, flops: float, moved: float) -> Prediction:
    """Of one of our fused operations; by the planning rates where no kernel was estimated."""
    found = OPERATIONS.get(f"{op}/{case}", {}).get(direction)
    return found or Prediction(planned_ms(flops, moved), source="planning rates")


_STEP = "step budget"
TABLE: dict[str, Prediction] = {
    "ceilings/matmul 8192": Prediction(MATMUL, source="seen on an H100"),
    "ceilings/copy": Prediction(COPY, source="seen on an H100"),
    "launches/eager": Prediction(4.5, source="5.6 ms for 1237 kernels"),
    # Whole training steps, ms.
    "official eager/mlp_t/step": Prediction(267.0, 245.0, 290.0, _STEP),
    "official eager/attention/step": Prediction(305.0, 290.0, 320.0, _STEP),
    "official compiled/mlp_t/step": Prediction(150.0, 133.0, 174.0, _STEP),
    "official compiled/attention/step": Prediction(106.0, 98.0, 115.0, _STEP),
    "official compiled, padded/mlp_t/step": Prediction(120.0, 110.0, 130.0, "20-40 ms less"),
    "ours/mlp_t/step": Prediction(83.0, 66.0, None, _STEP),
    "ours/attention/step": Prediction(78.0, 70.0, None, _STEP),
    # Peak memory of a training step, GiB.
    "official eager/mlp_t/memory": Prediction(48.0, source="42 GB saved"),
    "official compiled/mlp_t/memory": Prediction(36.0, source="31 GB saved"),
    "ours/mlp_t/memory": Prediction(16.0, source="9.6 GB saved and what passes through"),
    "ours, light/mlp_t/memory": Prediction(7.0, source="3.2 GB saved"),
    # Useful operations of a training step over 989 TFLOP/s, percent; its kernels.
    "official compiled/mlp_t/mfu": Prediction(22.0, source="150 ms"),
    "official compiled/attention/mfu": Prediction(34.9, source="106 ms"),
    "ours/mlp_t/mfu": Prediction(40.0, 40.0, 50.0, "83 ms"),
    "ours/attention/mfu": Prediction(47.4, 47.4, 53.0, "78 ms"),
    "official eager/mlp_t/launches": Prediction(2102, source="1314 forward, 788 backward"),
    "official eager/attention/launches": Prediction(2900, source="1846 forward, 1054 backward"),
    "official compiled/mlp_t/launches": Prediction(630, source="408 forward, 222 backward"),
    # 16 steps of inference.
    "inference/mlp_t/B1/gain": Prediction(8.0, source="90 ms eager"),
    "inference/mlp_t/B1": Prediction(118.0, 118.0, 167.0, "8.5 ms as a graph; 6 with PDL"),
    "inference/mlp_t/B1/launches": Prediction(16 * 134, source="134 launches a step"),
    "official eager/mlp_t/inference B1": Prediction(11.1, source="90 ms"),
    "official eager/mlp_t/inference B1/launches": Prediction(16 * 1237, source="1237 a step"),
    "inference/mlp_t/B768": Prediction(1100.0, 1100.0, 1400.0, "puzzles a second"),
    "inference/mlp_t/B1536": Prediction(1100.0, 1100.0, 1400.0, "puzzles a second"),
    # The trainer's step with everything, as a graph, ms; reserved memory, GiB.
    "engine/mlp_t/step": Prediction(84.0, 67.0, None, "1 ms for all but the recursion"),
    "engine/attention/step": Prediction(79.0, 71.0, None, "1 ms for all but the recursion"),
    "engine/mlp_t/memory": Prediction(16.5, source="states and carry copied in place"),
    "engine/mlp_t/mfu": Prediction(39.5, 39.5, 49.5, "84 ms"),
    "engine/attention/mfu": Prediction(46.9, 46.9, 52.2, "79 ms"),
    # 16 supervision steps from boards on the device to answers on the host, ms.
    "answers/mlp_t/B1/graph": Prediction(8.5, 6.0, None, "134 launches a step without gaps"),
    "answers/mlp_t/B1/graph, PDL": Prediction(6.0, source="0.38 ms a step of 134 launches"),
    "answers/mlp_t/B768/graph": Prediction(698.0, 549.0, None, "1100 to 1400 puzzles/s"),
    "official eager/mlp_t/latency B1": Prediction(5.6, source="1237 launches"),
}


def look_up(name: str) -> Prediction | None:
    """Of a measurement by its name; None where nothing was predicted."""
    return TABLE.get(name)
