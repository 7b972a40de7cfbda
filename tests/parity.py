"""What equal means here: errors, limits, and inputs for comparisons.

Owns: relative L2, the three-way check of an implementation against an oracle, the table of floors,
seeded O(1) inputs, and the machine-independent numbers that recorded cases fill their weights with.
Imported by every parity test (`from parity import assert_parity`) and by tests/golden; imports
torch and numpy only.
Source: the three-way check of flash-attention's tests; splitmix64 (Steele, Lea, Flood 2014).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np
import torch

# Element-wise floors (absolute, relative) per dtype: what an error may be even where the baseline
# of the same dtype has none.
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-5, 1.3e-6),
    torch.float16: (1e-3, 1e-3),
    torch.bfloat16: (1e-2, 1.6e-2),
}
# Relative L2 of a whole tensor: the limit of the reference path where recursion does not amplify
# rounding, and the floor added to twice the official error where it does.
L2_LIMIT = 1e-5
L2_FLOORS: dict[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 5e-4,
    torch.bfloat16: 4e-3,
}


def relative_l2(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want| in float64; 0 for two zeros, inf for a wrong shape or a NaN."""
    if got.shape != want.shape:
        return math.inf
    a, b = got.detach().double().cpu(), want.detach().double().cpu()
    difference = float((a - b).norm())
    if difference == 0.0:
        return 0.0
    norm = float(b.norm())
    ratio = difference / norm if norm > 0.0 else math.inf
    return ratio if math.isfinite(ratio) else math.inf


def assert_l2(
    got: torch.Tensor, want: torch.Tensor, limit: float = L2_LIMIT, name: str = "tensor"
) -> float:
    """relative_l2(got, want) <= limit; returns the error."""
    error = relative_l2(got, want)
    assert error <= limit, (
        f"{name}: relative L2 {error:.3e} > {limit:.1e}, {got.shape} {want.shape}"
    )
    return error


def assert_parity(
    got: torch.Tensor,
    oracle: torch.Tensor,
    baseline: torch.Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    name: str = "tensor",
) -> float:
    """max|got - oracle| <= 2 * max|baseline - oracle| + floor(dtype); returns the error.

    got: the implementation under test, any dtype. oracle: the same formula on fp32 or fp64 inputs.
    baseline: plain PyTorch in got's dtype (none: its error counts as 0). dtype picks the row of
    TOLERANCES; got's own when left out.
    """
    assert got.shape == oracle.shape, f"{name}: shapes {got.shape}, {oracle.shape}"
    if baseline is not None:
        assert baseline.shape == oracle.shape, f"{name}: shapes {baseline.shape}, {oracle.shape}"
    if oracle.numel() == 0:
        return 0.0
    exact = oracle.detach().double().cpu()
    value = got.detach().double().cpu()
    broken = int((~torch.isfinite(value)).sum())
    assert broken == 0, f"{name}: {broken} of {value.numel()} elements are not finite"
    absolute, relative = TOLERANCES[dtype or got.dtype]
    allowed = absolute + relative * float(exact.abs().max())
    if baseline is not None:
        allowed += 2.0 * float((baseline.detach().double().cpu() - exact).abs().max())
    error = float((value - exact).abs().max())
    assert error <= allowed, f"{name}: max error {error:.3e} > {allowed:.3e} allowed"
    return error


def splitmix(count: int, seed: int, name: str = "") -> np.ndarray:
    """`count` uint64 hashes of (seed, name, index): the same bits everywhere and always."""
    start = np.uint64(((seed << 32) ^ zlib.crc32(name.encode())) & 0xFFFFFFFFFFFFFFFF)
    with np.errstate(over="ignore"):
        z = start + (np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def portable_uniform(shape: Sequence[int], std: float, seed: int, name: str = "") -> torch.Tensor:
    """float64, uniform with mean 0 and deviation `std`, on a grid of 2^16: exact, so portable."""
    count = math.prod(shape)
    steps = (splitmix(count, seed, name) >> np.uint64(48)).astype(np.float64)
    values = (steps - 32767.5) * (math.sqrt(3.0) * std / 32768.0)
    return torch.from_numpy(values.reshape(tuple(shape)))


def portable_integers(
    shape: Sequence[int], low: int, high: int, seed: int, name: str = ""
) -> torch.Tensor:
    """int32 tensor of values in [low, high)."""
    bits = (splitmix(math.prod(shape), seed, name) >> np.uint64(33)).astype(np.int64)
    return torch.from_numpy((low + bits % (high - low)).astype(np.int32).reshape(tuple(shape)))


def make_inputs(
    *shapes: Sequence[int],
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    scale: float | Sequence[float] = 1.0,
    requires_grad: bool = False,
    device: str | torch.device = "cpu",
) -> list[torch.Tensor]:
    """One seeded normal tensor per shape, of deviation `scale` (one for all, or one each).

    Rounded to dtype before any use. Drawn from an own generator on the CPU: the global random state
    is left alone, and every device gets the same numbers.
    """
    scales = [float(scale)] * len(shapes) if isinstance(scale, int | float) else list(scale)
    if len(scales) != len(shapes):
        raise ValueError(f"{len(scales)} scales for {len(shapes)} shapes")
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape, factor in zip(shapes, scales, strict=True):
        drawn = torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * factor
        made.append(drawn.to(dtype).to(device).requires_grad_(requires_grad))
    return made
