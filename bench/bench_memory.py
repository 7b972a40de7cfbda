"""Memory of a train step by contender and policy, each in a process of its own.

Protocol: `trm_fast.memory_bench`. pytest-benchmark's figure is how long all of it took.
"""

from pathlib import Path

import pytest

from trm_fast import memory_bench
from trm_fast.workloads import CASES, quick


@pytest.mark.parametrize("dtype", CASES["official"].dtypes)
def bench_memory(dtype, benchmark, memory_results, request):
    option = request.config.getoption
    case, batch = CASES["official"], memory_bench.BATCH
    if option("--bench-quick"):
        case, batch = quick(case), 3
    case = case.of(dtype, case.config["batch_size"])
    given = option("--official")
    path = Path(given).expanduser() if given else None
    arguments = (case, case.policies, path, 1, batch)
    memory_results.append(benchmark.pedantic(memory_bench.measure, arguments, rounds=1))
