"""residual_rmsnorm: rms_norm(h + u) along the features or the tokens.

Protocol: `trm_fast.op_bench`.
"""

import pytest

from trm_fast.op_cases import DIRECTIONS


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", ["features", "tokens"])
def bench_residual_rmsnorm(case, direction, op_race):
    op_race("residual_rmsnorm", case, direction)
