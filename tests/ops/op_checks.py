"""One comparison for every operation: values, gradients, dtypes and untouched inputs.

Owns the cases (shapes with readable ids) and `check_op`, which holds an implementation to a formula
that the test writes out itself: the formula in float64 is the oracle, the same formula in the
implementation's dtype the baseline. Imported by tests/ops/test_<op>.py.

Dims legend: B batch, P prefix tokens, L puzzle tokens, S tokens incl. prefix, D width, H heads,
K head dim, F feed-forward width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from parity import assert_parity
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

EPS = 1e-5
CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# A power of two, the odd real one (81 cells + 16 prefix tokens), one board, no board at all.
BSD = [(4, 64, 32), (2, 97, 512), (1, 97, 64), (0, 97, 64)]


def case_ids(names: str, shapes: Sequence[Sequence[int]]) -> list[str]:
    """B2-S97-D64 for the names "B S D" and the shape (2, 97, 64)."""
    letters = names.split()
    return ["-".join(f"{n}{s}" for n, s in zip(letters, shape, strict=True)) for shape in shapes]


def cases(names: str, shapes: Sequence[Sequence[int]]) -> list[Any]:
    """Every shape in every dtype as `pytest.param(shape, dtype)`, ids like B2-S97-D64-bf16."""
    return [
        pytest.param(tuple(shape), dtype, id=f"{name}-{tag}")
        for shape, name in zip(shapes, case_ids(names, shapes), strict=True)
        for tag, dtype in DTYPES.items()
    ]


def run(
    function: Callable[..., Any],
    inputs: Sequence[Any],
    dtype: torch.dtype,
    device: torch.device = CPU,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs of function(*inputs) with floating tensors in `dtype`, and the inputs' gradients.

    The gradient of a floating output is a fixed normal tensor of its shape, rounded to bfloat16 so
    that every dtype is given the same one.
    """
    given = [
        t.detach().to(device, dtype, copy=True).requires_grad_()
        if _is_float(t)
        else t.to(device)
        if isinstance(t, Tensor)
        else t
        for t in inputs
    ]
    before = [t.detach().clone() if isinstance(t, Tensor) else t for t in given]
    outputs = function(*given)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    wanted = [t for t in outputs if t.requires_grad]
    leaves = [t for t in given if _is_float(t)]
    generator = torch.Generator().manual_seed(99)
    upstream = [
        torch.randn(t.shape, generator=generator, dtype=torch.float64)
        .bfloat16()
        .to(device, t.dtype)
        for t in wanted
    ]
    grads = torch.autograd.grad(wanted, leaves, upstream, allow_unused=True)
    for old, new in zip(before, given, strict=True):
        if isinstance(old, Tensor):
            assert torch.equal(old, new.detach()), "an input was changed"
    return [t.detach() for t in outputs], list(grads)


def check_op(
    function: Callable[..., Any],
    formula: Callable[..., Any],
    inputs: Sequence[Any],
    dtype: torch.dtype,
    device: torch.device = CPU,
) -> None:
    """Outputs and all gradients of `function` in `dtype` against `formula` in float64.

    `function` runs on `device`, `formula` on the CPU.
    """
    got, got_grads = run(function, inputs, dtype, device)
    exact, exact_grads = run(formula, inputs, torch.float64)
    plain, plain_grads = run(formula, inputs, dtype)
    for i, (g, e, p) in enumerate(zip(got, exact, plain, strict=True)):
        if g.is_floating_point():
            assert g.dtype == dtype
            assert_parity(g, e, p, name=f"output {i}")
        else:
            assert torch.equal(g.cpu(), e)
    for i, (g, e, p) in enumerate(zip(got_grads, exact_grads, plain_grads, strict=True)):
        assert (g is None) == (e is None), f"gradient {i} is there in one only"
        if g is not None and e is not None:
            assert g.dtype == dtype
            assert_parity(g, e, p, name=f"gradient {i}")


def rms_norm(h: Tensor, axis: int, eps: float = EPS) -> Tensor:
    """h / sqrt(mean(h^2) + eps) along `axis`, in float32 at least."""
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    return (wide / torch.sqrt((wide * wide).mean(axis, keepdim=True) + eps)).to(h.dtype)


def silu(t: Tensor) -> Tensor:
    """t / (1 + exp(-t))."""
    return t * torch.sigmoid(t)


def token_major(t: Tensor) -> Tensor:
    """The same values [B, S, ...], laid out [S, B, ...] in memory."""
    return t.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(t.requires_grad)


@contextmanager
def counted_ops() -> Iterator[list[str]]:
    """Names of the aten operations that run inside, in order."""

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            names.append(func._schema.name.removeprefix("aten::"))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    with Recorder():
        yield names


def _is_float(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()
