"""Options, fixtures and the printed results of `pytest bench/ --benchmark-only`."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # OpenMP reads it when torch is loaded

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trm_fast import bench, micro_bench, op_bench, timing
from trm_fast.contenders import COMPILE, Official, official_code
from trm_fast.op_cases import cases

RACES = pytest.StashKey[list[bench.Race]]()
OP_RACES = pytest.StashKey[list[op_bench.OpRace]]()
MICRO = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-quick", action="store_true", help="tiny sizes: does it run at all")
    parser.addoption("--bench-json", metavar="FILE", default=None, help="write the results there")
    parser.addoption("--bench-device", default="cpu", help="cpu, cuda or mps")
    parser.addoption("--compile", choices=COMPILE, default="auto", help="see trm-fast bench")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RACES] = []
    config.stash[OP_RACES] = []
    config.stash[MICRO] = []


@pytest.fixture(scope="session")
def official(request: pytest.FixtureRequest) -> Iterator[Official | None]:
    """The official classes, or None without `--official`: its rows then say so."""
    given = request.config.getoption("--official")
    with official_code(Path(given).expanduser() if given else None) as found:
        yield found


@pytest.fixture
def races(request: pytest.FixtureRequest) -> list[bench.Race]:
    """What has been run, for the summary."""
    return request.config.stash[RACES]


@pytest.fixture
def micro_results(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What has been measured of the microkernels, for the summary."""
    return request.config.stash[MICRO]


@pytest.fixture
def op_race(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[str, str, str], None]:
    """(op, case, direction) -> checks and times every contender, and keeps the race.

    pytest-benchmark's own figure, for its comparisons of versions, is the last contender's: the
    compiled backend that serves, else the reference. The printed ones are those of the race.
    """
    option = request.config.getoption
    device = torch.device(option("--bench-device"))
    cuda = device.type == "cuda"
    size = "tiny" if option("--bench-quick") else "real" if cuda else "small"

    def race_them(op: str, name: str, direction: str) -> None:
        dtype = "bfloat16" if cuda else "float32"
        found = {case.name: case for case in cases(op, size, dtype=dtype)}
        if name not in found:
            pytest.skip(f"{op} has no case {name} at {size} sizes")
        compiler = None if option("--compile") == "never" else "inductor"
        race = op_bench.set_up(found[name], direction, device, compiler)
        race.run(30 if cuda else 5)
        step = race.step(race.entries[-1])
        benchmark.pedantic(lambda: timing.timed(lambda: step(0), device), rounds=5)
        benchmark.extra_info["contender"] = race.entries[-1].name
        race.inputs.clear()
        request.config.stash[OP_RACES].append(race)

    return race_them


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    config = terminalreporter.config
    races, op_races = config.stash[RACES], config.stash[OP_RACES]
    for found in config.stash[MICRO]:
        terminalreporter.write_line(micro_bench.text(found))
    if not races and not op_races:
        return
    device = (races or op_races)[0].device
    quick = config.getoption("--bench-quick")
    peaks = bench.measure_peaks([race.case for race in races], device, 64 if quick else None)
    report = bench.report(device, peaks, races)
    terminalreporter.write_line("")
    if races:
        terminalreporter.write_line(bench.text(report))
    if op_races:
        dtype = op_races[0].case.dtype
        report["op_peaks"] = op_bench.measure_peaks(device, dtype, quick)
        report["ops"] = [race.result(report["op_peaks"]) for race in op_races]
        terminalreporter.write_line(op_bench.text(report))
    if config.getoption("--bench-json"):
        text = json.dumps(report, indent=1) + "\n"
        Path(config.getoption("--bench-json")).write_text(text, encoding="utf-8")
