"""linear_rmsnorm: rms_norm(h + a @ w.T), as attention and as the channel SwiGLU end.

Protocol: `trm_fast.op_bench`.
"""

import pytest

from trm_fast.op_cases import DIRECTIONS


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", ["o_proj", "down"])
def bench_linear_rmsnorm(case, direction, op_race):
    op_race("linear_rmsnorm", case, direction)
