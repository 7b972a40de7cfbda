"""Train step and inference step of whole models, against every baseline of `trm_fast.contenders`.

pytest-benchmark times the reference; before each of its rounds every other contender takes its
turn, so that all of them ran in the same minutes. The ratios are printed at the end of the run.
"""

import pytest
import torch

from trm_fast import bench
from trm_fast.contenders import CASES, STEPS, quick


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", CASES)
def bench_model(name, step, benchmark, official, races, request):
    option = request.config.getoption
    case = quick(CASES[name]) if option("--bench-quick") else CASES[name]
    device = torch.device(option("--bench-device"))
    race = bench.set_up(case, step, official, device, option("--compile"))
    reference, *others = race.entries

    def turns_of_the_others():
        for entry in others:
            bench.lap(entry, device)

    with bench.collector_off():
        benchmark.pedantic(
            bench.lap, (reference, device), setup=turns_of_the_others, rounds=case.rounds
        )
    races.append(race)
    benchmark.extra_info["official"] = "yes" if official else race.absent["official"]
