"""token_mix: the SwiGLU along the tokens with residual and norm.

Protocol: `trm_fast.op_bench`.
"""

import pytest

from trm_fast.op_cases import DIRECTIONS


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", ["mlp_t"])
def bench_token_mix(case, direction, op_race):
    op_race("token_mix", case, direction)
