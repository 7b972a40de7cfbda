"""Train step and inference step of whole models, against every baseline of `trm_fast.contenders`.

As a script (`python bench/bench_model.py --official PATH`) this is `trm-fast bench`: everything in
one run, with all of its options. Under pytest pytest-benchmark times the reference; before each of
its rounds every other contender takes its turn, so that all of them ran in the same minutes. The
ratios are printed at the end of the run.
"""

import pytest
import torch

from trm_fast import bench
from trm_fast.race import lap, set_up
from trm_fast.timing import collector_off
from trm_fast.workloads import default_cases, plan, quick

PLAN = plan(default_cases())


def _name(case, step):
    return f"{case.name}-{case.config['forward_dtype']}-{case.config['batch_size']}-{step}"


@pytest.fixture(scope="module", params=PLAN, ids=[_name(*one) for one in PLAN])
def race(request, official):
    """One set of contenders, for all numbers of threads."""
    option = request.config.getoption
    case, step = request.param
    if option("--bench-quick"):
        single = case.config["batch_size"] == 1
        case = quick(case).of(case.config["forward_dtype"], 1 if single else 2)
    device = torch.device(option("--bench-device"))
    return set_up(case, step, official, device, option("--compile"))


@pytest.mark.parametrize("threads", [1, 2])
def bench_model(race, threads, benchmark, results, peaks):
    count = threads if race.device.type == "cpu" else None
    if threads > 1 and count not in (bench.default_threads(race.device) or []):
        pytest.skip("needs a CPU of two cores")
    with bench.given_threads(count) as cpus, collector_off():
        race.start()
        reference, *others = race.entries

        def turns_of_the_others():
            for entry in others:
                lap(entry, race.device)

        benchmark.pedantic(
            lap, (reference, race.device), setup=turns_of_the_others, rounds=race.case.rounds
        )
        results.append(race.result(cpus))
    peaks(count)


if __name__ == "__main__":
    raise SystemExit(bench.main())
