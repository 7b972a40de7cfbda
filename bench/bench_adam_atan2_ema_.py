"""adam_atan2_ema_: one optimizer step of all weights, with average and copies.

Protocol: `trm_fast.op_bench`.
"""

import pytest


@pytest.mark.parametrize("case", ["mlp_t"])
def bench_adam_atan2_ema_(case, op_race):
    op_race("adam_atan2_ema_", case, "forward")
