"""Multiplications and additions: of a step, of our operations, and what devices can do of them.

Owns the one arithmetic of matrix products. `step_flops` applies it to a configuration, and
`register_formulas` hands it to PyTorch's FlopCounterMode, which then counts a model on any backend
as it counts plain PyTorch. That happens by itself where the counter is imported before a model is
built. Only matrix products count: what lies between them is bound by memory.
Imported by `backends.py`, by `profiling.py` and by the benchmarks.

Useful means that nothing counts twice. Formulas of our operations never count what a policy makes
again, while plain PyTorch under `light` or `recompute` really calls those products and has them
counted. One product is made again by every fused attention: the scores, in the backward.
PyTorch's counter has it (2.5 times the forward), and so have our formulas; `step_flops` leaves it
out (2 times) unless asked.

Dims legend: B batch, S tokens incl. prefix, D width, F and F_t inner widths of the two SwiGLUs,
E = H*K features of the heads, V vocabulary; a shape is a sequence of sizes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from trm_fast.config import ModelConfig

__all__ = [
    "Peak",
    "device_peak",
    "recursion_flops",
    "register_formulas",
    "register_if_counting",
    "step_flops",
    "weight_shapes",
]

STEPS = ("train", "inference", "solve")
Shape = Sequence[int]
WEIGHTS = 4  # of a block: two of the mixer, gate_up [2F,D], down [D,F]


class Products(NamedTuple):
    """Operations of one forward: with weights, and between activations (attention's core)."""

    weights: int
    core: int

    def backward(self, scores_again: bool) -> int:
        """Gradients of both operands of each; `scores_again`: half the core once more."""
        return 2 * self.weights + 2 * self.core + (self.core // 2 if scores_again else 0)


def gated(h: Shape, down: Shape) -> int:
    """SwiGLU of h [..., D] along an axis, down [D,F] or [S,F]: three products, forward."""
    return 6 * math.prod(h) * down[1]


def attention(batch: int, tokens: int, features: int) -> int:
    """Scores and the weighted sum, forward."""
    return 4 * batch * tokens * tokens * features


def network(x: Shape, weights: Sequence[Shape], mlp_t: bool) -> Products:
    """One pass of all blocks over x [B,S,D]; `weights` are four shapes of each block."""
    linear = core = 0
    for first in range(0, len(weights), WEIGHTS):
        mixer_in, mixer_out, _, down = weights[first : first + WEIGHTS]
        linear += gated(x, down)
        if mlp_t:  # [2F_t,S] and [S,F_t]
            linear += gated(x, mixer_out)
        else:  # [3E,D] and [D,E]
            linear += 2 * math.prod(x) * (mixer_in[0] + mixer_out[1])
            core += attention(x[0], x[1], mixer_out[1])
    return Products(linear, core)


def weight_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """Of one block: the mixer's two, then the channel SwiGLU's."""
    s, d, f = config.total_len, config.hidden_size, config.channel_width
    t = config.token_width
    e = config.attention_width
    mixer = [(2 * t, s), (s, t)] if config.mlp_t else [(3 * e, d), (d, e)]
    return [*mixer, (2 * f, d), (d, f)]


def recursion_flops(
    config: ModelConfig, batch: int | None = None, scores_again: bool = True
) -> tuple[int, int]:
    """All cycles forward; and with the backward of the last one.

    batch: boards; None is the configuration's batch_size.
    scores_again: as PyTorch counts, with attention's scores made again in the backward.
    """
    x = (batch or config.batch_size, config.total_len, config.hidden_size)
    block = network(x, weight_shapes(config), config.mlp_t)
    blocks, with_gradient, _ = config.passes
    forward = blocks * sum(block)
    return forward, forward + with_gradient * block.backward(scores_again)


def gated_flops(config: ModelConfig, batch: int | None = None) -> tuple[int, int]:
    """The same of `gated_mlp`, whose embedding and output stand among its products."""
    cells, width = config.seq_len, config.hidden_size
    channels, states = config.vocab_size - 1, config.seq_len if config.cell_attention else 1
    ends = cells * width * (2 * channels - 1)
    attention_weights = 4 * width * width * states if config.cell_attention else 0
    core = 2 * states * states * width if config.cell_attention else 0
    blocks, latent = config.passes[0], config.gated_passes[0] * config.L_layers
    channel = 2 * states * width * round(config.expansion * width)
    weights = ends + blocks * channel + latent * attention_weights
    made = Products(*(2 * (batch or config.batch_size) * n for n in (weights, latent * core)))
    return sum(made), sum(made) + made.backward(scores_again=False)


def step_flops(
    config: ModelConfig, step: str, batch: int | None = None, scores_again: bool = False
) -> int:
    """Useful operations of the matrix products of one step, without a Q-learning target.

    Args:
        step: "train" is forward and backward of one supervision step; "inference" the forward;
            "solve" halt_max_steps forwards.
        batch, scores_again: as of `recursion_flops`.

    Raises:
        ValueError: another step.
    """
    if step not in STEPS:
        raise ValueError(f"step must be one of {', '.join(STEPS)}, got {step!r}")
    if config.kind == "gated_mlp":
        forward, both = gated_flops(config, batch)
        return both if step == "train" else forward
    forward, both = recursion_flops(config, batch, scores_again)
    if step == "train" and config.latents > 1:
        # All latents go forward; of the winner the last cycle is made once more, with gradients.
        both = config.latents * forward + forward // config.H_cycles + both - forward
    tokens, width = config.total_len * config.vocab_size + config.q_logits, config.hidden_size
    heads = 2 * (batch or config.batch_size) * width * tokens
    if step == "train":
        if config.latents > 1:  # which answers are compared by the losses of their cells
            scale = 2 * (batch or config.batch_size) * width * config.total_len
            both += config.latents * scale * config.vocab_size
        return both + 3 * heads
    return (forward + heads) * (config.halt_max_steps if step == "solve" else 1)


# Formulas of registered operations: shapes in place of tensors, `out_shape` those of the results.


def _gated(h: Shape, gate_up: Shape, down: Shape, *rest: Any, **kwargs: Any) -> int:
    return gated(h, down)


def _gated_bwd(*args: Any, out_shape: Sequence[Shape], **kwargs: Any) -> int:
    d_h, _, d_down = out_shape
    return 2 * gated(d_h, d_down)


def _linear(a: Shape, w: Shape, *rest: Any, **kwargs: Any) -> int:
    return 2 * math.prod(a) * w[0]


def _linear_bwd(*args: Any, out_shape: Sequence[Shape], **kwargs: Any) -> int:
    d_a, d_w, _ = out_shape
    return 4 * math.prod(d_a) * d_w[0]


def _attention(qkv: Shape, *rest: Any, **kwargs: Any) -> int:
    return attention(qkv[0], qkv[1], qkv[2] // 3)


def _attention_bwd(grad: Shape, *rest: Any, **kwargs: Any) -> int:
    return Products(0, attention(*grad)).backward(scores_again=True)


def _recursion(
    x: Shape, y: Shape, z: Shape, weights: Sequence[Shape], cos: Any, sin: Any, mlp_t: bool,
    H_cycles: int, L_cycles: int, *rest: Any, **kwargs: Any,
) -> int:  # fmt: skip
    return H_cycles * (L_cycles + 1) * sum(network(x, weights, mlp_t))


def _recursion_bwd(
    grad: Shape, saved: Any, weights: Sequence[Shape], cos: Any, sin: Any, mlp_t: bool,
    H_cycles: int, L_cycles: int, *rest: Any, **kwargs: Any,
) -> int:  # fmt: skip
    return (L_cycles + 1) * network(grad, weights, mlp_t).backward(scores_again=True)


def _recursion_bwd_in_place(
    grad: Shape, saved: Any, d_weights: Any, *rest: Any, **kwargs: Any
) -> int:
    return _recursion_bwd(grad, saved, *rest)


def _sdpa(query: Shape, key: Shape, value: Shape, *rest: Any, **kwargs: Any) -> int:
    return attention(query[0] * query[1], query[2], query[3])


def _sdpa_bwd(
    grad: Shape, query: Shape, key: Shape, value: Shape, *rest: Any, **kwargs: Any
) -> int:
    return _attention_bwd((query[0] * query[1], query[2], query[3]))


NAMESPACES = ("trm_fast_ext", "trm_fast_triton")
FORMULAS: dict[str, Callable[..., int]] = {
    "token_mix": _gated,
    "token_mix_bwd": _gated_bwd,
    "swiglu_rmsnorm": _gated,
    "swiglu_rmsnorm_bwd": _gated_bwd,
    "linear_rmsnorm": _linear,
    "linear_rmsnorm_bwd": _linear_bwd,
    "rope_attention": _attention,
    "rope_attention_bwd": _attention_bwd,
    "deep_recursion": _recursion,
    "deep_recursion_bwd": _recursion_bwd,
    "deep_recursion_bwd_": _recursion_bwd_in_place,
    "deep_recursion_int8": _recursion,
    "int8_linear": _linear,
}
# PyTorch has formulas for the attention of GPUs only.
CPU_ATTENTION: dict[str, Callable[..., int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _sdpa,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _sdpa_bwd,
}


def register_formulas() -> None:
    """Tell PyTorch the formulas of all operations of ours that are loaded, and of its attention on
    CPUs; what it knows already stays. A FlopCounterMode made later uses them."""
    from torch.utils import flop_counter  # loads Triton

    for namespace, formulas in (*((n, FORMULAS) for n in NAMESPACES), ("aten", CPU_ATTENTION)):
        for name, formula in formulas.items():
            packet = getattr(getattr(torch.ops, namespace), name, None)
            if packet is not None and packet not in flop_counter.flop_registry:
                flop_counter.register_flop_formula(packet)(formula)


def register_if_counting() -> None:
    """The same where PyTorch's counter is loaded; nobody else needs it, nor Triton."""
    if "torch.utils.flop_counter" in sys.modules:
        register_formulas()


class Peak(NamedTuple):
    """What the maker says: TFLOP/s of dense bfloat16 products summed in float32, GB/s of memory."""

    tflop_per_s: float
    gb_per_s: float


# By the name that PyTorch gives, without "NVIDIA" and "GeForce". Data sheets often show twice the
# rate, for matrices with zeros in half of all places ("with sparsity").
PEAKS: dict[str, Peak] = {
    # NVIDIA H100 and H200 Tensor Core GPU data sheets: SXM 1,979 with sparsity, PCIe 1,513, NVL
    # 1,671.
    "H100 80GB HBM3": Peak(989.4, 3350),
    "H100 PCIe": Peak(756.5, 2000),
    "H100 NVL": Peak(835.5, 3900),
    "H200": Peak(989.4, 4800),
    "H200 NVL": Peak(835.5, 4800),
    # NVIDIA Grace Hopper Superchip data sheet, the one with 96 GB of HBM3.
    "GH200 480GB": Peak(989.4, 4000),
    # NVIDIA DGX B200 data sheet, an eighth of it: 36 PFLOP/s in bfloat16 with sparsity, 64 TB/s.
    "B200": Peak(2250.0, 8000),
    # NVIDIA A100 Tensor Core GPU data sheet.
    "A100-SXM4-40GB": Peak(312.0, 1555),
    "A100-SXM4-80GB": Peak(312.0, 2039),
    "A100-PCIE-40GB": Peak(312.0, 1555),
    "A100 80GB PCIe": Peak(312.0, 1935),
    # NVIDIA A30, A10, A40, L4, L40 and L40S data sheets.
    "A30": Peak(165.0, 933),
    "A10": Peak(125.0, 600),
    "A40": Peak(149.7, 696),
    "L4": Peak(121.0, 300),
    "L40": Peak(181.05, 864),
    "L40S": Peak(362.05, 864),
    # NVIDIA Ampere GA102 GPU architecture whitepaper: tensor rates with sums in float32.
    "RTX A6000": Peak(154.8, 768),
    "RTX 3090": Peak(71.0, 936),
    # NVIDIA Ada GPU architecture whitepaper; sums in float16 reach twice the rate.
    "RTX 4090": Peak(165.2, 1008),
    "RTX 4080": Peak(97.5, 717),
    # NVIDIA RTX Blackwell GPU architecture whitepaper.
    "RTX 5090": Peak(209.5, 1792),
}


def device_peak(name: str) -> Peak | None:
    """Of a GPU by its exact name, "NVIDIA H100 80GB HBM3"; None for one that is not known here."""
    words = [word for word in name.split() if word not in ("NVIDIA", "GeForce")]
    return PEAKS.get(" ".join(words))
