"""adam_atan2_ema_: one optimizer step, the moving average and the low-precision copies, in place.

Owns the op: per tensor one pass that reads parameter, gradient and averages once and writes each
once. Formula, bc_i = 1 - beta_i^step: m, v <- their moving averages, p <- p (1 - lr wd) -
lr / bc1 atan2(m, sqrt(v / bc2)). Source: https://arxiv.org/abs/2407.05872, section 5.
What changes from step to step is read from memory, so that a CUDA graph can be replayed.
Imported by `trm_fast.backends` only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trm_fast.kernels._common import begin, check, down, inlined, unsupported, unsupported_dtype, up
from trm_fast.kernels._runtime import run
from trm_fast.kernels.coefficients import step_coefficients
from trm_fast.kernels.launch import pick
from trm_fast.kernels.registration import TRITON, register

__all__ = ["adam_atan2_ema_", "unsupported"]

SCALE, DECAY, RATE, CORRECTION, EMA_WEIGHT, SKIPPED = map(tl.constexpr, range(6))
HALF_PI = tl.constexpr(1.5707963267948966)
HALF_PI_REST = tl.constexpr(-4.371139000186241e-08)  # what float32 lacks of it


@inlined
def _atan2(m, s):
    """atan2(m, s) of float32 m and s >= 0, within 2 units in the last place; 0 for two zeros."""
    height = tl.abs(m)
    steep = height > s
    # Comparisons, not minimum and maximum: those would drop a NaN.
    small = tl.where(steep, s, height)
    large = tl.where(steep, height, s)
    # Two infinities lie on the diagonal, two zeros on the axis.
    t = tl.where(small == large, tl.where(small == 0.0, 0.0, 1.0), tl.div_rn(small, large))
    # atan(t) = t + t u q(u) on [0, 1], u = t^2; q minimises the largest relative error, 1.7e-8.
    u = t * t
    q = 0.0029206923208 * u - 0.0163679290563
    q = q * u + 0.0432118624449
    q = q * u - 0.0755221471190
    q = q * u + 0.1066600456834
    q = q * u - 0.1421105563641
    q = q * u + 0.1999377310276
    q = q * u - 0.3333315253258
    angle = t + t * (u * q)
    angle = tl.where(steep, HALF_PI - (angle - HALF_PI_REST), angle)
    return tl.where(m < 0.0, -angle, angle)


@inlined
def _lerp(a, b, weight):
    """a + weight (b - a) computed from the nearer end, as torch.lerp does: exact at both."""
    return tl.where(weight < 0.5, a + weight * (b - a), b - (b - a) * (1.0 - weight))


@triton.jit
def _step_kernel(
    p_ptr, grad_ptr, m_ptr, v_ptr, ema_ptr, copy_ptr, coefficients_ptr, count,
    weight1, weight2, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    if tl.load(coefficients_ptr + SKIPPED) != 0.0:
        return
    scale, decay = tl.load(coefficients_ptr + SCALE), tl.load(coefficients_ptr + DECAY)
    rate, correction2 = tl.load(coefficients_ptr + RATE), tl.load(coefficients_ptr + CORRECTION)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    # What each result was rounded to is what the next is computed from.
    grad = up(down(up(tl.load(grad_ptr + offs, mask=mask, other=0.0)), m_ptr.dtype.element_ty))
    grad *= scale
    m = _lerp(up(tl.load(m_ptr + offs, mask=mask, other=0.0)), grad, weight1)
    v = _lerp(up(tl.load(v_ptr + offs, mask=mask, other=0.0)), grad * grad, weight2)
    m, v = down(m, m_ptr.dtype.element_ty), down(v, v_ptr.dtype.element_ty)
    tl.store(m_ptr + offs, m, mask=mask)
    tl.store(v_ptr + offs, v, mask=mask)
    p = up(tl.load(p_ptr + offs, mask=mask, other=0.0)) * decay
    p -= rate * _atan2(up(m), tl.sqrt_rn(up(v) / correction2))
    p = down(p, p_ptr.dtype.element_ty)
    tl.store(p_ptr + offs, p, mask=mask)
    if ema_ptr is not None:
        ema_weight = tl.load(coefficients_ptr + EMA_WEIGHT)
        ema = _lerp(up(tl.load(ema_ptr + offs, mask=mask, other=0.0)), up(p), ema_weight)
        tl.store(ema_ptr + offs, down(ema, ema_ptr.dtype.element_ty), mask=mask)
    if copy_ptr is not None:
        tl.store(copy_ptr + offs, down(up(p), copy_ptr.dtype.element_ty), mask=mask)


def adam_atan2_ema_fwd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor],
    copies: Sequence[Tensor],
    coefficients: Tensor,
    beta1: float,
    beta2: float,
) -> None:
    """The step of `trm_fast.ops`, in place; a list of averages or copies may end early.

    `coefficients`: [6] float32, of `step_coefficients`.
    """
    for i, p in enumerate(params):
        written = [p, exp_avgs[i], exp_avg_sqs[i]]
        written += [*emas[i : i + 1], *copies[i : i + 1]]
        dense = [t.contiguous() for t in written]
        ema = dense[3] if i < len(emas) else None
        copy = dense[-1] if i < len(copies) else None
        if p.numel():
            row = pick("adam_atan2_ema_", p)
            run(
                _step_kernel, (triton.cdiv(p.numel(), row.tiles["BLOCK"]),), row, p,
                p_ptr=dense[0], grad_ptr=grads[i].contiguous(), m_ptr=dense[1], v_ptr=dense[2],
                ema_ptr=ema, copy_ptr=copy, coefficients_ptr=coefficients, count=p.numel(),
                weight1=1 - beta1, weight2=1 - beta2,
            )  # fmt: skip
        for t, computed in zip(written, dense, strict=True):
            if computed is not t:
                t.copy_(computed)


def _fwd_fake(*args: Any) -> None:
    """Nothing is returned."""


_fwd = register(
    TRITON,
    "adam_atan2_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs,"
    " Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] emas, Tensor(e!)[] copies, Tensor coefficients,"
    " float beta1, float beta2) -> ()",
    _fwd_fake,
    adam_atan2_ema_fwd,
    mutates=(0, 2, 3, 4, 5),
)


def adam_atan2_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor],
    copies: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    beta1: float,
    beta2: float,
    step: int | Tensor,
    ema_decay: float | Tensor,
    grad_scale: float | Tensor = 1.0,
    found_inf: float | Tensor = 0.0,
) -> None:
    """One optimizer step over lists of tensors, in place; see `trm_fast.ops`.

    Every dtype is served for every list; what is computed is float32.

    Raises:
        ValueError: a dtype that the kernel does not serve, lists of unequal length.
    """
    lists = (params, grads, exp_avgs, exp_avg_sqs)
    lengths = [len(tensors) for tensors in lists]
    dtypes = {t.dtype for tensors in (*lists, emas, copies) for t in tensors}
    check(
        "adam_atan2_ema_",
        *map(unsupported_dtype, sorted(dtypes, key=str)),
        None
        if len(set(lengths)) == 1
        else f"needs as many gradients and averages as parameters, not {lengths}",
    )
    if not params:
        return
    coefficients = step_coefficients(
        params[0].device, lr, weight_decay, beta1, beta2, step, ema_decay, grad_scale, found_inf
    )
    tensors = [list(given) for given in (*lists, emas, copies)]
    _fwd(*tensors, coefficients.float(), beta1, beta2)


def examples(make: Callable[..., Tensor]) -> Iterator[None]:
    """Every launch of this file for the largest tensor of the official model, for the report: as
    the optimizer calls it, and with everything on a master weight."""
    shape = (3072, 512)
    p, grad = make(*shape), make(*shape)
    m, v, ema = (make(*shape, dtype=torch.float32) for _ in range(3))
    settings = (make(6, dtype=torch.float32), 0.9, 0.95)
    adam_atan2_ema_fwd([p], [grad], [m], [v], [], [], *settings)
    yield
    adam_atan2_ema_fwd([ema], [m], [m], [v], [ema], [p], *settings)
    yield
