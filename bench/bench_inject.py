"""inject: z + (y + x).

Protocol: `trm_fast.op_bench`.
"""

import pytest

from trm_fast.op_cases import DIRECTIONS


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", ["sudoku"])
def bench_inject(case, direction, op_race):
    op_race("inject", case, direction)
