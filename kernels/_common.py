"""What every kernel here uses: arithmetic that is right in the interpreter too, and host checks.

Owns `begin`, with which every kernel begins, the jit helpers `up`, `down`, `dot` and `tiles`, those
of e4m3 (8-bit floats), and the host functions that every op needs.
Imported by the modules of `trm_fast.kernels` only.

Triton's interpreter keeps bfloat16 as raw 16-bit integers: it adds, compares and multiplies those
bits, and truncates where the GPU rounds. So a kernel here does arithmetic on `up(...)` only, rounds
with `down(...)` once, at the store, and multiplies matrices with `dot(...)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from trm_fast.kernels.registration import refuse_forward_mode

E4M3 = torch.float8_e4m3fn
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_WIDTH = 1024  # features of a token: one row of them is a tile
ALIGNMENT = 16  # elements that sizes in memory are multiples of: tensor maps need 16 bytes
E4M3_TILE = 128  # products of e4m3 that the tensor cores of sm_89 and sm_90 may sum

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))


def inlined(function: Callable[..., Any]) -> Any:
    """Decorator of the functions that kernels call.

    Interpreted, they stay plain: the interpreter would patch the whole language anew on each call,
    which takes longer than most of what they compute.
    """
    return function if INTERPRET.value else triton.jit(function)


class Shape(Protocol):
    """What `unsupported` reads of a model's configuration."""

    hidden_size: int
    num_heads: int
    mlp_t: bool
    dropout: float
    quantize: str


@inlined
def begin(PDL: tl.constexpr):
    """The first statement of every kernel, of the constant that `_runtime.run` gives it.

    With PDL the launch did not wait for the kernel in front of it. So nothing in memory is touched
    before that one has ended and all it wrote can be seen; only then may the one behind start.
    """
    if PDL and not INTERPRET:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@inlined
def up(x):
    """x in float32: what every load is put through before arithmetic."""
    if INTERPRET and x.dtype == tl.float8e4nv:  # its own cast takes a NaN for 480
        nan = (x.to(tl.uint8, bitcast=True) & 0x7F) == 0x7F
        return tl.where(nan, float("nan"), x.to(tl.float32))
    else:
        return x.to(tl.float32)


@inlined
def down(x, dtype: tl.constexpr):
    """float32 x rounded to the nearest of `dtype`, ties to even."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x == x, rounded, 0x7FC0)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif dtype == tl.float8e4nv:
        return _e4m3(tl.where(tl.abs(x) < float("inf"), x, float("nan")))
    else:
        return x.to(dtype)


@inlined
def _e4m3(x):
    """float32 x rounded to the nearest e4m3, ties to even; what is beyond its 448 becomes 448."""
    if INTERPRET:
        size = tl.where(x == x, tl.minimum(tl.abs(x), 448.0), 0.0)
        # Eighths of the power of two below it, of the smallest normal number at least.
        power = tl.maximum(size.to(tl.uint32, bitcast=True) & 0x7F800000, 121 << 23)
        eighth = (power - (3 << 23)).to(tl.float32, bitcast=True)
        rounded = ((size / eighth + 8388608.0) - 8388608.0) * eighth
        normal = (rounded.to(tl.uint32, bitcast=True) >> 20) - (120 << 3)
        code = tl.where(rounded < 0.015625, (rounded * 512).to(tl.uint32), normal)  # 2^-6
        code |= (x.to(tl.uint32, bitcast=True) >> 31) << 7
        return tl.where(x == x, code, 0x7F).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        return x.to(tl.float8e4nv)


@inlined
def e4m3_step(x):
    """Powers of two, one a row of x [M, K], that bring its largest magnitude to 128 or more and
    below 256 by division; and their inverses. [M] float32 both."""
    most = tl.max(tl.abs(x), 1).to(tl.uint32, bitcast=True)
    power = tl.maximum(most & 0x7F800000, 27 << 23)  # 2^-100 at least
    step = (power - (7 << 23)).to(tl.float32, bitcast=True)
    return step, ((261 << 23) - power).to(tl.float32, bitcast=True)


@inlined
def dot(a, b, acc=None):
    """a @ b + acc in float32, of tiles as they were loaded or as `down` made them."""
    if INTERPRET:
        return tl.dot(up(a), up(b), acc)
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@inlined
def dot_e4m3(a, b, acc, ARCH: tl.constexpr):
    """The same of e4m3 with K = E4M3_TILE. Tensor cores of sm_89 and sm_90 keep 14 bits or so of a
    sum: there acc, in registers, takes one sum per tile."""
    if INTERPRET or ARCH >= 100:
        return dot(a, b, acc)
    elif ARCH >= 90:
        return tl.dot(a, b, acc, max_num_imprecise_acc=a.shape[1])
    else:  # there the limit does no more than to keep the compiler from adding up in acc
        return acc + tl.dot(a, b, max_num_imprecise_acc=a.shape[1])


@inlined
def tiles(source, shape, strides, block: tl.constexpr, TMA: tl.constexpr):
    """A descriptor whose loads give zeros outside `shape`, and whose stores write nothing there.

    With TMA (sm_90 and newer) `source` is the descriptor that `launch.descriptor` made on the host.
    Elsewhere it is a pointer, and the compiler turns the descriptor into masked pointer loads: with
    constant strides they are vectorised and copied asynchronously, those of a host one are not.
    """
    if TMA:
        return source
    else:
        return tl.make_tensor_descriptor(source, shape, strides, block)


@inlined
def row_scale(ssq_ptr, offs, count, TILES: tl.constexpr, WIDTH: tl.constexpr, eps):
    """1 / rms of the rows `offs` < count, from their partial sums of squares [TILES, count]."""
    total = tl.zeros(offs.shape, tl.float32)
    for i in tl.static_range(TILES):
        total += tl.load(ssq_ptr + i * count + offs, mask=offs < count, other=0.0)
    return tl.rsqrt(total / WIDTH + eps)


def e4m3_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [..., K] float32, row by row -> e4m3 of that shape and a step each, [...] float32.

    The step is the one that `e4m3_step` finds; what is not finite becomes NaN.
    """
    most = w.abs().amax(-1, keepdim=True).view(torch.int32)
    power = most.bitwise_and(0x7F800000).clamp_min(27 << 23)
    step = (power - (7 << 23)).view(torch.float32)
    not_finite = w - w  # is NaN, else 0
    return (w / step + not_finite).to(E4M3), step.squeeze(-1)


def round_up(size: int, multiple: int = ALIGNMENT) -> int:
    return -(-size // multiple) * multiple


def aligned(t: Tensor, axes: Sequence[int] = (-1,)) -> Tensor:
    """`t`, contiguous, with zeros added at the end of `axes` up to a multiple of ALIGNMENT."""
    for axis in axes:
        missing = -t.shape[axis] % ALIGNMENT
        if missing:
            behind = 2 * (t.dim() - 1 - axis % t.dim())
            t = F.pad(t, (0,) * behind + (0, missing))
    t = t.contiguous()
    # A view into a flat buffer may begin anywhere; tensor maps begin at whole 16 bytes.
    return t.clone() if t.storage_offset() * t.element_size() % 16 else t


def weight_grad(d: Tensor, x: Tensor, into: Tensor | None = None) -> Tensor:
    """d.T @ x in float32, of d [N, O] and x [N, I]; added to `into` [O, I] float32 if given."""
    if d.device.type == "cpu":  # no product of 16 bits in float32 there
        product = torch.mm(d.t().float(), x.float())
    else:
        product = torch.mm(d.t(), x, out_dtype=torch.float32)
    return product if into is None else into.add_(product)


def unsupported_dtype(dtype: torch.dtype) -> str | None:
    if dtype in DTYPES:
        return None
    return f"serves bfloat16, float16 and float32, not {str(dtype).removeprefix('torch.')}"


def unsupported_width(width: int, name: str = "hidden size") -> str | None:
    if width % ALIGNMENT == 0 and 0 < width <= MAX_WIDTH:
        return None
    return f"needs a {name} that is a multiple of {ALIGNMENT} up to {MAX_WIDTH}, not {width}"


def mismatch(name: str, t: Tensor, shape: Sequence[int], like: Tensor) -> str | None:
    """Why argument `name` is not of `shape` and the dtype and device of `like`, or None."""
    if t.device != like.device:
        return f"needs {name} on {like.device}, not on {t.device}"
    if t.shape == tuple(shape) and t.dtype == like.dtype:
        return None
    wanted, given = (str(d).removeprefix("torch.") for d in (like.dtype, t.dtype))
    return f"needs {name} of {list(shape)} {wanted}, not {list(t.shape)} {given}"


def unsupported(
    dtype: torch.dtype, config: Shape | None, device: torch.device | None = None
) -> str | None:
    """Why an op without further conditions cannot serve, or None."""
    return unsupported_dtype(dtype) or (unsupported_width(config.hidden_size) if config else None)


def check(op: str, *reasons: str | None) -> None:
    """ValueError with the first reason that is not None; refuses forward-mode derivatives."""
    refuse_forward_mode(op)
    for reason in reasons:
        if reason is not None:
            raise ValueError(f"{op} of the triton backend {reason}")
