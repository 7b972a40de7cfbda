"""rope_attention: rotary embedding and attention; mazes at real sizes only.

Protocol: `trm_fast.op_bench`.
"""

import pytest

from trm_fast.op_cases import DIRECTIONS


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", ["sudoku", "maze"])
def bench_rope_attention(case, direction, op_race):
    op_race("rope_attention", case, direction)
