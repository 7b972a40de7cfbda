"""deep_recursion: all H x L passes of the network as one operation, with its backward by hand.

Of the last cycle `save` keeps what the backward reads (but for the token mixer's gate and up, on
CUDA in all passes, on CPUs in the last one: the backward makes these again), `light` the same
without the products inside both SwiGLUs, `recompute` the state before each pass. The CPU's and the
CUDA library's are two implementations of one schema, which keep other things in other forms.
Source: Jolicoeur-Martineau 2025 (arXiv 2510.04871), Algorithm 3.

Dims legend: B batch, S tokens incl. prefix, D width, F and F_t inner widths of the two SwiGLUs,
H heads, K head dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trm_fast.extension import int8, recursion_driver, rope_attention
from trm_fast.extension._common import (
    EXTENSION,
    Shape,
    check,
    round_up,
    unsupported_dtype,
    unsupported_width,
)
from trm_fast.kernels.registration import register

__all__ = ["deep_recursion", "unsupported"]

WEIGHTS = 4  # of a block: two of the mixer, gate_up, down
_SETTINGS = "bool mlp_t, int H_cycles, int L_cycles, int heads, float eps, str policy"


def tape_bytes(
    x: Tensor, weights: Sequence[Tensor], mlp_t: bool, heads: int, policy: str, last: bool
) -> int:
    """Bytes that the CPU library keeps of one block in one pass, its input not counted.

    Of the `last` pass the backward makes the token mixer's gate and up again.
    """
    batch, tokens, width = x.shape
    count, size = batch * tokens, x.element_size()
    states = [count * width * size] * 2  # after the mixer, after the channel MLP
    scales = [count * 4]
    with_gu = policy == "save"
    gate_up = [2 * count * round_up(weights[3].shape[1]) * size] if with_gu else []
    if mlp_t:
        scales.append(batch * width * 4)
        gate_up += [batch * 2 * weights[1].shape[1] * width * size] if with_gu and not last else []
    else:
        states += [3 * count * width * size, count * width * size]  # q, k, v; attended
        scales += [count * heads * 4, count * 4]
    return sum(round_up(part, 64) for part in states + scales + gate_up)


def _cpu_saved(
    x: Tensor, weights: Sequence[Tensor], mlp_t: bool, L_cycles: int, heads: int, policy: str
) -> list[Tensor]:
    if policy == "none":
        return []
    states = [torch.empty_like(x) for _ in range(L_cycles + 1)]
    if policy == "recompute":
        return states
    tapes = [
        x.new_empty(tape_bytes(x, weights, mlp_t, heads, policy, i == L_cycles), dtype=torch.uint8)
        for i in range(L_cycles + 1)
        for _ in range(len(weights) // WEIGHTS)
    ]
    return states + tapes


def new_saved(x: Tensor, *rest: Any) -> list[Tensor]:
    """Empty tensors like those that the library of x's device keeps."""
    return (recursion_driver.new_saved if x.device.type == "cuda" else _cpu_saved)(x, *rest)


def operations(
    namespace: str, saved: Callable[..., list[Tensor]]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Register both directions; `saved` makes empty tensors like those that the forward keeps."""

    def fwd_fake(
        x: Tensor,
        y: Tensor,
        z: Tensor,
        weights: Sequence[Tensor],
        cos: Tensor | None,
        sin: Tensor | None,
        mlp_t: bool,
        H_cycles: int,
        L_cycles: int,
        heads: int,
        eps: float,
        policy: str,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        kept = saved(x, weights, mlp_t, L_cycles, heads, policy)
        return torch.empty_like(y), torch.empty_like(z), kept

    def backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Any, ...]:
        cos, sin, *rest = ctx.saved_tensors
        weights, kept = rest[: ctx.count], rest[ctx.count :]
        with _as_asked(grad.device):
            d_x, d_weights = bwd(grad.contiguous(), kept, weights, cos, sin, *ctx.settings)
        return d_x, None, None, d_weights, None, None, *(None for _ in ctx.settings)

    bwd = register(
        namespace,
        "deep_recursion_bwd(Tensor grad, Tensor[] saved, Tensor[] weights, Tensor? cos,"
        f" Tensor? sin, {_SETTINGS}) -> (Tensor, Tensor[])",
        _bwd_fake,
    )
    fwd = register(
        namespace,
        "deep_recursion(Tensor x, Tensor y, Tensor z, Tensor[] weights, Tensor? cos, Tensor? sin,"
        f" {_SETTINGS}) -> (Tensor, Tensor, Tensor[])",
        fwd_fake,
        save=_save,
        backward=backward,
    )
    return fwd, bwd


def _bwd_fake(
    grad: Tensor, saved: Sequence[Tensor], weights: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, list[Tensor]]:
    return torch.empty_like(grad), [torch.empty_like(w) for w in weights]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    weights, cos, sin, *settings = inputs[3:]
    _, new_z, kept = output
    ctx.save_for_backward(cos, sin, *weights, *kept)
    ctx.count, ctx.settings = len(weights), settings
    ctx.mark_non_differentiable(new_z, *kept)


_fwd, _bwd = operations(EXTENSION, new_saved)


def deep_recursion(
    ops: Any,
    x: Tensor,
    y: Tensor,
    z: Tensor,
    blocks: Sequence[Any],
    rotary: tuple[Tensor, Tensor] | None,
    r: Any,
) -> tuple[Tensor, Tensor]:
    """x, y, z [B,S,D], master weights, settings -> y, z [B,S,D]; see `trm_fast.ops`.

    The other operations of the table are not used: their kernels are called directly.

    Raises:
        ValueError: a dtype or width that the kernels do not serve, dropout, fp8, int8 on a GPU.
    """
    mlp_t = hasattr(blocks[0].mixer, "gate_up")
    in_int8 = r.quantize == "int8" and not torch.is_grad_enabled()
    check(
        "deep_recursion",
        _unsupported_products(r.quantize, x.device) if in_int8 or r.quantize == "fp8" else None,
        unsupported_dtype(x.dtype, x.device),
        "serves no dropout" if r.dropout else None,
        _unsupported_sizes(x.shape[-1], None if mlp_t else r.heads, x.device),
    )
    own = x.dtype if x.device.type == "cuda" else torch.float32  # read as they are
    weights = [
        (t if t.dtype == own else t.float()).contiguous()
        for block in blocks
        for t in (*block.mixer, block.gate_up, block.down)
    ]
    cos, sin = (t.contiguous() for t in rotary) if rotary and not mlp_t else (None, None)
    given = (
        x.contiguous(), y.detach().contiguous(), z.detach().contiguous(), weights, cos, sin, mlp_t,
        r.H_cycles, r.L_cycles, r.heads, r.eps,
    )  # fmt: skip
    if in_int8:
        check("deep_recursion", *(int8.unsupported_inner(t.shape[1]) for t in weights))
        return int8.deep_recursion_int8(*given)
    tracked = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights))
    with _as_asked(x.device):
        new_y, new_z, _ = _fwd(*given, r.policy if tracked else "none")
    return new_y, new_z.detach()


def _as_asked(device: torch.device) -> Any:
    """Without autocast: PyTorch's operations inside the CUDA driver would take other dtypes."""
    known = torch.amp.is_autocast_available(device.type)  # not of meta tensors, which get refused
    return torch.autocast(device.type, enabled=False) if known else contextlib.nullcontext()


def _unsupported_products(name: str, device: torch.device) -> str | None:
    """name: how they are quantised, as in `Recursion`."""
    if name == "fp8":
        return "has no products in fp8"
    return "has no products in int8 on GPUs" if name == "int8" and device.type == "cuda" else None


def _unsupported_sizes(width: int, heads: int | None, device: torch.device) -> str | None:
    """heads: of attention; None for token mixing."""
    if device.type == "cuda":
        return None if heads is None else recursion_driver.unsupported_heads(width, heads)
    return unsupported_width(width) or (
        None if heads is None else rope_attention.unsupported_heads(width, heads)
    )


def unsupported(dtype: torch.dtype, config: Shape | None, device: torch.device) -> str | None:
    """Why the op cannot serve, or None."""
    reason = unsupported_dtype(dtype, device)
    if config is None or reason:
        return reason
    if config.dropout:
        return "serves no dropout: the composition of the other operations does"
    if reason := _unsupported_products(config.quantize, device):
        return reason
    heads = None if config.mlp_t else config.num_heads
    return _unsupported_sizes(config.hidden_size, heads, device)
