"""deep_recursion: all cycles of one supervision step.

Protocol: `trm_fast.op_bench`.
"""

import pytest

from trm_fast.op_cases import DIRECTIONS


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", ["mlp_t", "attention"])
def bench_deep_recursion(case, direction, op_race):
    op_race("deep_recursion", case, direction)
