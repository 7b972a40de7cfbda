"""swiglu_rmsnorm: the channel SwiGLU with residual and norm.

Protocol: `trm_fast.op_bench`.
"""

import pytest

from trm_fast.op_cases import DIRECTIONS


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", ["channel"])
def bench_swiglu_rmsnorm(case, direction, op_race):
    op_race("swiglu_rmsnorm", case, direction)
