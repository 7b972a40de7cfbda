"""What every test of the compiled extension needs; the fixture `extension` is in tests/conftest.py.

Imported by tests/ops/test_<op>.py.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from op_checks import cases


def extension_cases(names: str, shapes: Sequence[Sequence[int]]) -> list:
    """`op_checks.cases` in the dtypes that the extension serves."""
    return [case for case in cases(names, shapes) if case.values[1] != torch.float16]


def check_same_bits(function: Callable[[], Sequence[torch.Tensor]]) -> None:
    """`function` returns the same bits on one, two and three threads, and when run again."""
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append([t.detach().clone() for t in function()])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def check_extension_refusals(
    function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor]
) -> None:
    """float16 and float64 are one-line ValueErrors; a second derivative is an error."""
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(ValueError, match="serves float32 and bfloat16, not float") as e:
            function(*(t.to(dtype) if t.is_floating_point() else t for t in inputs))
        assert "\n" not in str(e.value)
    given = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(function(*given).square().sum(), given[:1], create_graph=True)
