"""The compiled microkernels reach 90 % of the machine's measured peak: compilers that spill do not.

Protocol: `trm_fast.micro_bench`. The only assertion about speed in this project; on a machine where
it fails, look for stores to the stack in the inner loops of csrc/cpu/micro.h first.
"""

import pytest

from trm_fast import micro_bench


@pytest.mark.parametrize("dtype", micro_bench.DTYPES)
def bench_micro(dtype, benchmark, micro_results, request):
    quick = request.config.getoption("--bench-quick")
    cases = micro_bench.QUICK if quick else micro_bench.CASES
    turns, seconds = (1, 1e-5) if quick else (10, micro_bench.SAMPLE_SECONDS)
    found = benchmark.pedantic(micro_bench.measure, (cases, [dtype], turns, seconds), rounds=1)
    if found["unavailable"]:
        pytest.skip(f"no compiled extension: {found['unavailable']}")
    micro_results.append(found)
    below = [r for r in found["rows"] if r["holds"] is False]
    assert quick or not below, micro_bench.text(found)
