"""What every Triton kernel's test needs: where it runs, as which architecture, and op checks.

Kernels run on a GPU where there is one, else in Triton's interpreter. Imported by
tests/ops/test_<op>.py.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch._inductor.config

from trm_fast.kernels._runtime import forced_architecture

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The two ways a kernel reads memory: through pointers, and through descriptors made on the host.
# sm_100 runs the code of sm_90 with tiles of its own; the report compiles all three.
ARCHITECTURES = [80, 90]


@pytest.fixture(params=ARCHITECTURES, ids=[f"sm{a}" for a in ARCHITECTURES])
def architecture(request: pytest.FixtureRequest) -> Iterator[int]:
    """Interpreted, the test runs with the rows of each; a GPU takes its own."""
    if DEVICE.type == "cuda":
        if request.param != ARCHITECTURES[-1]:
            pytest.skip("a GPU runs the rows of its own architecture only")
        yield request.param
        return
    with forced_architecture(request.param):
        yield request.param


OPCHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def check_registered(
    op: Callable[..., Any], args: Sequence[Any], checks: Sequence[str] = OPCHECKS
) -> None:
    """`op`, a registered operation, passes every check that PyTorch has for one."""
    results = torch.library.opcheck(op, tuple(args), test_utils=checks)
    assert set(results.values()) == {"SUCCESS"}, results


def check_refusals(function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor]) -> None:
    """float64 is a one-line ValueError; a second derivative is an error."""
    with pytest.raises(ValueError, match="serves bfloat16, float16 and float32, not float64") as e:
        function(*(t.double() if t.is_floating_point() else t for t in inputs))
    assert "\n" not in str(e.value)
    given = [t.detach().to(DEVICE).requires_grad_(t.is_floating_point()) for t in inputs]
    first = function(*given).square().sum()
    (grad,) = torch.autograd.grad(first, given[:1], create_graph=False)
    assert not grad.requires_grad
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(function(*given).square().sum(), given[:1], create_graph=True)


def check_fullgraph(
    function: Callable[..., torch.Tensor], inputs: Sequence[Any], backend: str = "aot_eager"
) -> None:
    """Compiled as one graph, `function` gives what it gives eagerly, and the same gradients.

    What becomes of an operation of ours is decided before the compiler's backend: "aot_eager"
    traces and differentiates the graph as "inductor" does, and runs it as it is. The tests of
    linear_rmsnorm take "inductor", which spends seconds on each graph.
    """

    def values(f: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        given = [
            t.detach().clone().to(DEVICE).requires_grad_(t.is_floating_point())
            if isinstance(t, torch.Tensor)
            else t
            for t in inputs
        ]
        out = f(*given)
        wanted = [t for t in given if isinstance(t, torch.Tensor) and t.requires_grad]
        return [out.detach(), *torch.autograd.grad(out.square().sum(), wanted)]

    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
    # The cache on disk does not know of a changed operation of ours.
    with torch._inductor.config.patch(force_disable_caches=True):
        found = values(compiled)
    for got, want in zip(found, values(function), strict=True):
        torch.testing.assert_close(got, want)
