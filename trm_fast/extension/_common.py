"""What every op of the extension checks, and where it registers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from trm_fast.kernels.registration import refuse_forward_mode, register

EXTENSION = "trm_fast_ext"
DTYPES = (torch.float32, torch.bfloat16)
ALIGNMENT = 16  # widths are whole vectors


class Shape(Protocol):
    """What `unsupported` reads of a model's configuration."""

    hidden_size: int
    num_heads: int
    mlp_t: bool
    dropout: float
    quantize: str


def round_up(size: int, multiple: int = ALIGNMENT) -> int:
    return -(-size // multiple) * multiple


def unsupported_dtype(dtype: torch.dtype, device: torch.device | None = None) -> str | None:
    """Why tensors of `dtype` are not served, or None; float16 is, where `device` is a GPU."""
    on_gpu = device is not None and device.type == "cuda"
    if dtype in DTYPES or (on_gpu and dtype == torch.float16):
        return None
    served = "float32, bfloat16 and float16" if on_gpu else "float32 and bfloat16"
    return f"serves {served}, not {str(dtype).removeprefix('torch.')}"


def unsupported_width(width: int, name: str = "hidden size") -> str | None:
    if width % ALIGNMENT == 0 and width > 0:
        return None
    return f"needs a {name} that is a multiple of {ALIGNMENT}, not {width}"


def mismatch(name: str, t: Tensor, shape: Sequence[int], like: Tensor) -> str | None:
    """Why argument `name` is not of `shape` and the dtype and device of `like`, or None."""
    if t.device != like.device:
        return f"needs {name} on {like.device}, not on {t.device}"
    if t.shape == tuple(shape) and t.dtype == like.dtype:
        return None
    wanted, given = (str(d).removeprefix("torch.") for d in (like.dtype, t.dtype))
    return f"needs {name} of {list(shape)} {wanted}, not {list(t.shape)} {given}"


def batch_major(*states: Tensor) -> tuple[bool, list[Tensor]]:
    """The states, contiguous; with the first two axes exchanged, and True, where the first one lies
    token-major in memory, so that it need not be copied."""
    first = states[0]
    swap = first.dim() == 3 and not first.is_contiguous() and first.transpose(0, 1).is_contiguous()
    return swap, [(t.transpose(0, 1) if swap else t).contiguous() for t in states]


def unsupported(dtype: torch.dtype, config: Shape | None, device: torch.device) -> str | None:
    """Why an op without further conditions cannot serve, or None; on a GPU any width is served."""
    reason = unsupported_dtype(dtype, device)
    if reason or config is None or device.type == "cuda":
        return reason
    return unsupported_width(config.hidden_size)


def register_gated(
    op: str, forward_fake: Callable[..., tuple[Tensor, Tensor, Tensor]]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Both directions of rms_norm(h + W_down(silu(g) * u)), along the features or the tokens.

    The forward returns the result, 1 / rms, and gate and up (empty unless `keep`).
    """

    def backward_fake(
        grad: Tensor,
        h: Tensor,
        gate_up: Tensor,
        down: Tensor,
        out: Tensor,
        rstd: Tensor,
        gu: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(h), torch.empty_like(gate_up), torch.empty_like(down)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:3], *output)
        ctx.mark_non_differentiable(*output[1:])

    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        return *bwd(grad.contiguous(), *ctx.saved_tensors), None, None

    bwd = register(
        EXTENSION,
        f"{op}_bwd(Tensor grad, Tensor h, Tensor gate_up, Tensor down, Tensor out, Tensor rstd,"
        " Tensor gu) -> (Tensor, Tensor, Tensor)",
        backward_fake,
    )
    fwd = register(
        EXTENSION,
        f"{op}(Tensor h, Tensor gate_up, Tensor down, float eps, bool keep)"
        " -> (Tensor, Tensor, Tensor)",
        forward_fake,
        save=save,
        backward=backward,
    )
    return fwd, bwd


def check(op: str, *reasons: str | None) -> None:
    """ValueError with the first reason that is not None; refuses forward-mode derivatives."""
    refuse_forward_mode(op)
    for reason in reasons:
        if reason is not None:
            raise ValueError(f"{op} of the compiled extension {reason}")
