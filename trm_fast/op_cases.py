"""Each operation's workloads: inputs, one call, and what the call costs at least.

Owns the sizes, the inputs and the counts of the per-operation benchmarks. Imported by `op_bench.py`
and `suite`.

FLOPs are those of the matrix products (`flops.py`), two per multiplication and addition; in the
backward of attention its scores, which have to be made again, count too. Bytes are the fewest that
must move: every input read once, every result written once, a saved tensor once in each direction
only where it is neither.

Dims legend: B batch, P prefix tokens, L puzzle tokens, S = P + L tokens, D width, H heads, K head
dim, E input width, F and F_t inner widths of the two SwiGLUs, V vocabulary, N = B*S rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trm_fast.config import ModelConfig
from trm_fast.flops import attention, gated, recursion_flops, weight_shapes
from trm_fast.ops import AttentionWeights, BlockWeights, Recursion, TokenMixWeights
from trm_fast.reference import FEATURES, TOKENS
from trm_fast.workloads import OFFICIAL

DIRECTIONS = ("forward", "both")  # "both": forward and backward
SIZES = ("real", "small", "tiny")

_SUDOKU = OFFICIAL | {"batch_size": 768}
_MIXERS: dict[str, dict[str, Any]] = {
    "mlp_t": {"mlp_t": True, "pos_encodings": "none"},
    "attention": {"mlp_t": False, "pos_encodings": "rope"},
}
_FEW_CYCLES = {"H_cycles": 1, "L_cycles": 1}
_TINY = _FEW_CYCLES | {"seq_len": 9, "hidden_size": 32, "num_heads": 2, "puzzle_emb_ndim": 32}
_TINY |= {"puzzle_emb_len": 2, "L_layers": 1}
_TINY |= {"intermediate_size": 48, "token_intermediate_size": 48}


def network(mixer: str, size: str = "real", batch: int | None = None) -> ModelConfig:
    """The official Sudoku network with `mixer` "mlp_t" or "attention".

    size: "real" has 768 boards; "small", for the CPU, 2 of them and few cycles; "tiny" is another
        network altogether, whose times mean nothing.
    batch: in place of the size's boards.
    """
    boards = {"real": 768, "small": 2, "tiny": 2}[size] if batch is None else batch
    values = _SUDOKU | _MIXERS[mixer] | {"real": {}, "small": _FEW_CYCLES, "tiny": _TINY}[size]
    return ModelConfig.from_dict(values | {"batch_size": boards})


class Draw:
    """Random inputs of one seed, on a device, floating ones in one dtype unless told."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal, of deviation `scale`."""
        drawn = torch.randn(shape, generator=self.generator, device=self.device)
        return drawn.mul_(scale).to(dtype or self.dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int32 in [low, high)."""
        drawn = torch.randint(low, high, shape, generator=self.generator, device=self.device)
        return drawn.to(torch.int32)


@dataclass(frozen=True)
class OpCase:
    """One operation at one size.

    Attributes:
        op, name: the operation, and which of its workloads.
        config: the network whose sizes these are; asked by `unsupported`.
        draw: makes the tensors of one set of inputs.
        call: (implementation, tensors) -> its results. Implementations have the signature of
            `Ops`; that of `deep_recursion` with its first argument already given.
        leaves: positions of the tensors that get a gradient.
        flops, bytes: of "forward" and of "both", see above.
        changes: the call works in place; its results are the tensors at these positions.
        judged: the case that parity is judged at, where it is not this one: a deep recursion
            amplifies rounding until nothing can be compared.
    """

    op: str
    name: str
    config: ModelConfig
    draw: Callable[[Draw], list[Tensor]]
    call: Callable[[Callable[..., Any], list[Tensor]], Any]
    leaves: tuple[int, ...]
    flops: tuple[float, float]
    bytes: tuple[float, float]
    changes: range | None = None
    judged: OpCase | None = None

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.config.forward_dtype)

    def cost(self, direction: str) -> tuple[float, float]:
        """(FLOPs, bytes) of a direction."""
        index = DIRECTIONS.index(direction)
        return self.flops[index], self.bytes[index]

    @property
    def directions(self) -> tuple[str, ...]:
        return DIRECTIONS if self.leaves else DIRECTIONS[:1]


def _sizes(c: ModelConfig) -> tuple[int, int, int, int, int]:
    """B, S, D, bytes of a state [B,S,D], bytes of one of its numbers."""
    width = getattr(torch, c.forward_dtype).itemsize
    b, s, d = c.batch_size, c.total_len, c.hidden_size
    return b, s, d, b * s * d * width, width


def embed_reset(c: ModelConfig) -> OpCase:
    b, s, d, state, width = _sizes(c)
    p, v = c.prefix_len, c.vocab_size
    rows, table = b * p * d * width, v * d * 4
    forward = 4 * b * c.seq_len + rows + table + 5 * state

    def draw(t: Draw) -> list[Tensor]:
        tokens = t.integers(0, v, b, c.seq_len)
        embedding = t(v, d, scale=d**-0.5, dtype=torch.float32)
        halted = t.integers(0, 2, b).bool()
        states = t(b, s, d), t(b, s, d), t(d), t(d)
        return [tokens, t(b, p, d, scale=d**-0.5), embedding, halted, *states]

    def call(f: Callable[..., Any], t: list[Tensor]) -> Any:
        return f(*t[:3], None, *t[3:], math.sqrt(d))

    moved = float(forward), float(forward + state + rows + table)
    return OpCase("embed_reset", "sudoku", c, draw, call, (1, 2), (0.0, 0.0), moved)


def inject(c: ModelConfig) -> OpCase:
    b, s, d, state, _ = _sizes(c)
    return OpCase(
        "inject",
        "sudoku",
        c,
        lambda t: [t(b, s, d) for _ in range(3)],
        lambda f, t: f(*t),
        (0, 1, 2),
        (0.0, 0.0),
        (4.0 * state, 4.0 * state),  # the gradient is handed on, three times the same
    )


def residual_rmsnorm(c: ModelConfig, name: str) -> OpCase:
    b, s, d, state, _ = _sizes(c)
    axis = {"features": FEATURES, "tokens": TOKENS}[name]
    return OpCase(
        "residual_rmsnorm",
        name,
        c,
        lambda t: [t(b, s, d), t(b, s, d)],
        lambda f, t: f(*t, axis, c.rms_norm_eps),
        (0, 1),
        (0.0, 0.0),
        (3.0 * state, 6.0 * state),
    )


def swiglu(c: ModelConfig) -> OpCase:
    b, s, _, _, width = _sizes(c)
    f_in = c.channel_width
    half = float(b * s * f_in * width)
    return OpCase(
        "swiglu",
        "channel",
        c,
        lambda t: [t(b, s, 2 * f_in)],
        lambda f, t: f(*t),
        (0,),
        (0.0, 0.0),
        (3 * half, 8 * half),
    )


def linear_rmsnorm(c: ModelConfig, name: str) -> OpCase:
    b, s, d, state, width = _sizes(c)
    e = {"o_proj": d, "down": c.channel_width}[name]
    inner, weight = b * s * e * width, d * e * width
    forward = inner + weight + 2 * state
    return OpCase(
        "linear_rmsnorm",
        name,
        c,
        lambda t: [t(b, s, e), t(d, e, scale=e**-0.5), t(b, s, d)],
        lambda f, t: f(*t, c.rms_norm_eps),
        (0, 1, 2),
        (2.0 * b * s * d * e, 6.0 * b * s * d * e),
        (float(forward), float(forward + 2 * inner + 2 * weight + 3 * state)),
    )


def swiglu_rmsnorm(c: ModelConfig) -> OpCase:
    b, s, d, state, width = _sizes(c)
    f_in = c.channel_width
    weight = 3 * d * f_in * width
    flops = float(gated((b, s, d), (d, f_in)))

    def draw(t: Draw) -> list[Tensor]:
        return [t(b, s, d), t(2 * f_in, d, scale=d**-0.5), t(d, f_in, scale=f_in**-0.5)]

    return OpCase(
        "swiglu_rmsnorm",
        "channel",
        c,
        draw,
        lambda f, t: f(*t, c.rms_norm_eps),
        (0, 1, 2),
        (flops, 3 * flops),
        (2.0 * state + weight, 6.0 * state + 3 * weight),
    )


def token_mix(c: ModelConfig) -> OpCase:
    b, s, d, state, width = _sizes(c)
    f_in = c.token_width
    weight = 3 * s * f_in * width
    flops = float(gated((b, s, d), (s, f_in)))

    def draw(t: Draw) -> list[Tensor]:
        return [t(b, s, d), t(2 * f_in, s, scale=s**-0.5), t(s, f_in, scale=f_in**-0.5)]

    return OpCase(
        "token_mix",
        "mlp_t",
        c,
        draw,
        lambda f, t: f(*t, c.rms_norm_eps),
        (0, 1, 2),
        (flops, 3 * flops),
        (2.0 * state + weight, 6.0 * state + 3 * weight),
    )


def rope_attention(c: ModelConfig, name: str) -> OpCase:
    b, s, d, state, _ = _sizes(c)
    core = float(attention(b, s, d))
    tables = _tables(c)

    def call(f: Callable[..., Any], t: list[Tensor]) -> Any:
        return f(t[0], (t[1], t[2]), c.num_heads)

    return OpCase(
        "rope_attention",
        name,
        c,
        lambda t: [t(b, s, 3 * d), *tables(t)],
        call,
        (0,),
        (core, 3.5 * core),
        (4.0 * state, 11.0 * state),
    )


def _tables(c: ModelConfig) -> Callable[[Draw], tuple[Tensor, Tensor]]:
    """cos and sin, each [S, K] float32."""

    def make(t: Draw) -> tuple[Tensor, Tensor]:
        half = torch.arange(0, c.head_dim, 2, dtype=torch.float32, device=t.device) / c.head_dim
        angles = torch.outer(
            torch.arange(c.total_len, dtype=torch.float32, device=t.device), c.rope_theta**-half
        ).repeat(1, 2)
        return angles.cos(), angles.sin()

    return make


def stablemax_loss(c: ModelConfig) -> OpCase:
    b, tokens, v = c.batch_size, c.seq_len, c.vocab_size
    logits = b * tokens * v * getattr(torch, c.forward_dtype).itemsize
    forward = logits + b * tokens * (4 + 4 + 8 + 1)

    def draw(t: Draw) -> list[Tensor]:
        drawn = t(b, tokens, v, scale=3.0)
        top = drawn.argmax(-1, keepdim=True)
        drawn.scatter_add_(-1, top, torch.ones_like(top, dtype=drawn.dtype))  # no ties
        return [drawn, t.integers(1, v, b, tokens)]

    return OpCase(
        "stablemax_loss",
        "sudoku",
        c,
        draw,
        lambda f, t: f(*t),
        (0,),
        (0.0, 0.0),
        (float(forward), float(forward + 2 * logits + 4 * b * tokens)),
    )


def parameter_shapes(c: ModelConfig) -> list[tuple[int, ...]]:
    """All that the optimizer of the weights updates."""
    d, v = c.hidden_size, c.vocab_size
    heads: list[tuple[int, ...]] = [(v, d), (v, d), (c.q_logits, d), (c.q_logits,)]
    return heads + [shape for _ in range(c.L_layers) for shape in weight_shapes(c)]


def deep_recursion(c: ModelConfig) -> OpCase:
    b, s, d, state, _ = _sizes(c)
    shapes = weight_shapes(c) * c.L_layers
    per_block = len(weight_shapes(c))
    weights = 4 * sum(math.prod(shape) for shape in shapes)
    kind = TokenMixWeights if c.mlp_t else AttentionWeights
    policy = "save" if c.policy == "auto" else c.policy
    r = Recursion(c.H_cycles, c.L_cycles, c.num_heads, c.rms_norm_eps, policy)
    tables = _tables(c)

    def draw(t: Draw) -> list[Tensor]:
        states = [t(b, s, d) for _ in range(3)]
        matrices = [t(*x, scale=x[1] ** -0.5, dtype=torch.float32) for x in shapes]
        return states + matrices + ([] if c.mlp_t else [*tables(t)])

    def call(f: Callable[..., Any], t: list[Tensor]) -> Any:
        blocks = [
            BlockWeights(kind(t[i], t[i + 1]), t[i + 2], t[i + 3])
            for i in range(3, 3 + len(shapes), per_block)
        ]
        rotary = None if c.mlp_t else (t[-2], t[-1])
        return f(*t[:3], blocks, rotary, r)

    flops = recursion_flops(c)
    judged = c.H_cycles * c.L_cycles > 1
    return OpCase(
        "deep_recursion",
        "mlp_t" if c.mlp_t else "attention",
        c,
        draw,
        call,
        (0, *range(3, 3 + len(shapes))),
        flops,
        (5.0 * state + weights, 7.0 * state + 2.0 * weights),
        judged=deep_recursion(replace(c, H_cycles=1, L_cycles=1)) if judged else None,
    )


def adam_atan2_ema_(c: ModelConfig) -> OpCase:
    shapes = parameter_shapes(c)
    count = len(shapes)
    settings = {"lr": 1e-2, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "step": 100}

    def draw(t: Draw) -> list[Tensor]:
        params, grads, averages, noise, distance = (
            [t(*x, dtype=torch.float32) for x in shapes] for _ in range(5)
        )
        squares = [n.square() for n in noise]
        emas = [p + d for p, d in zip(params, distance, strict=True)]
        copies = [p.to(t.dtype) for p in params]
        return [*params, *grads, *averages, *squares, *emas, *copies]

    def call(f: Callable[..., Any], t: list[Tensor]) -> Any:
        lists: Sequence[list[Tensor]] = [t[i * count :][:count] for i in range(6)]
        return f(*lists, **settings, ema_decay=0.999)

    # Read: gradient, weight, two moments, average; written: the last four and the copy.
    moved = float(
        sum(map(math.prod, shapes)) * (5 * 4 + 4 * 4 + getattr(torch, c.forward_dtype).itemsize)
    )
    return OpCase(
        "adam_atan2_ema_",
        "mlp_t" if c.mlp_t else "attention",
        c,
        draw,
        call,
        (),
        (0.0, 0.0),
        (moved, moved),
        changes=range(6 * count),
    )


def cases(op: str, size: str = "real", batch: int | None = None, dtype: str = "") -> list[OpCase]:
    """Every workload of an operation.

    size: of SIZES.  batch, dtype: in place of the size's and of bfloat16.
    """

    def of(mixer: str) -> ModelConfig:
        config = network(mixer, size, batch)
        return replace(config, forward_dtype=dtype) if dtype else config

    mlp_t, attention = of("mlp_t"), of("attention")
    made: dict[str, Callable[[], list[OpCase]]] = {
        "embed_reset": lambda: [embed_reset(mlp_t)],
        "inject": lambda: [inject(mlp_t)],
        "residual_rmsnorm": lambda: [residual_rmsnorm(mlp_t, x) for x in ("features", "tokens")],
        "swiglu": lambda: [swiglu(mlp_t)],
        "linear_rmsnorm": lambda: [
            linear_rmsnorm(attention, "o_proj"),
            linear_rmsnorm(mlp_t, "down"),
        ],
        "swiglu_rmsnorm": lambda: [swiglu_rmsnorm(mlp_t)],
        "token_mix": lambda: [token_mix(mlp_t)],
        "rope_attention": lambda: (
            [rope_attention(attention, "sudoku")]
            + ([rope_attention(_maze(attention), "maze")] if size == "real" else [])
        ),
        "stablemax_loss": lambda: [stablemax_loss(mlp_t)],
        "deep_recursion": lambda: [deep_recursion(mlp_t), deep_recursion(attention)],
        "adam_atan2_ema_": lambda: [adam_atan2_ema_(mlp_t)],
    }
    return made[op]()


def _maze(c: ModelConfig) -> ModelConfig:
    """30 x 30 mazes, a quarter of the boards: what one of four GPUs gets."""
    return replace(c, seq_len=900, L_cycles=4, batch_size=max(1, c.batch_size // 4))


def case(
    op: str, name: str, size: str = "real", batch: int | None = None, dtype: str = ""
) -> OpCase:
    """One of `cases`; ValueError for an unknown name."""
    found = {c.name: c for c in cases(op, size, batch, dtype)}
    if name not in found:
        raise ValueError(f"{op} has the cases {', '.join(found)}, not {name!r}")
    return found[name]
