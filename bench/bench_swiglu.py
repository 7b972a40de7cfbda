"""swiglu: silu(gate) * up.

Protocol: `trm_fast.op_bench`.
"""

import pytest

from trm_fast.op_cases import DIRECTIONS


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", ["channel"])
def bench_swiglu(case, direction, op_race):
    op_race("swiglu", case, direction)
