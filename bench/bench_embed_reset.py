"""embed_reset: tokens become the question states, states of halted items start anew.

Protocol: `trm_fast.op_bench`.
"""

import pytest

from trm_fast.op_cases import DIRECTIONS


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", ["sudoku"])
def bench_embed_reset(case, direction, op_race):
    op_race("embed_reset", case, direction)
