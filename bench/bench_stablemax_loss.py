"""stablemax_loss: loss, predictions and correctness of every cell.

Protocol: `trm_fast.op_bench`.
"""

import pytest

from trm_fast.op_cases import DIRECTIONS


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", ["sudoku"])
def bench_stablemax_loss(case, direction, op_race):
    op_race("stablemax_loss", case, direction)
