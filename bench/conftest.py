"""Options, fixtures and the printed results of `pytest bench/ --benchmark-only`."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # OpenMP reads it when torch is loaded

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trm_fast import bench, op_bench, timing
from trm_fast.contenders import COMPILE
from trm_fast.official import Official, official_code
from trm_fast.op_cases import cases

RESULTS = pytest.StashKey[dict[str, list[Any]]]()
PEAKS = pytest.StashKey[bench.Peaks]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-quick", action="store_true", help="tiny sizes: does it run at all")
    parser.addoption("--bench-json", metavar="FILE", default=None, help="write the results there")
    parser.addoption("--bench-device", default="cpu", help="cpu, cuda or mps")
    parser.addoption("--compile", choices=COMPILE, default="auto", help="see trm-fast bench")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = {"steps": [], "memory": [], "micro": [], "ops": []}
    device = torch.device(config.getoption("--bench-device"))
    size = 64 if config.getoption("--bench-quick") else None
    config.stash[PEAKS] = bench.Peaks(("bfloat16", "float32"), device, size)


@pytest.fixture(scope="session")
def official(request: pytest.FixtureRequest) -> Iterator[Official | None]:
    """The official classes, or None without `--official`: its rows then say so."""
    given = request.config.getoption("--official")
    with official_code(Path(given).expanduser() if given else None) as found:
        yield found


@pytest.fixture
def results(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """The results of whole steps, for the summary."""
    return request.config.stash[RESULTS]["steps"]


@pytest.fixture
def memory_results(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What train steps needed in memory, for the summary."""
    return request.config.stash[RESULTS]["memory"]


@pytest.fixture
def micro_results(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What has been measured of the microkernels, for the summary."""
    return request.config.stash[RESULTS]["micro"]


@pytest.fixture
def peaks(request: pytest.FixtureRequest) -> Callable[[int | None], None]:
    """Measures `torch.mm` on this many threads, once."""
    found = request.config.stash[PEAKS]

    def measure(count: int | None) -> None:
        if str(count or torch.get_num_threads()) not in found.found:
            found.measure(count)

    return measure


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
        request.config.stash[RESULTS]["ops"].append(race)

    return race_them


def _report(config: pytest.Config) -> dict[str, Any]:
    found = config.stash[RESULTS]
    device = torch.device(config.getoption("--bench-device"))
    report = bench.report(device, config.stash[PEAKS], found["steps"])
    return report | {part: found[part] for part in ("memory", "micro") if found[part]}


def _write(config: pytest.Config, report: dict[str, Any]) -> None:
    if config.getoption("--bench-json"):
        text = json.dumps(report, indent=1) + "\n"
        Path(config.getoption("--bench-json")).write_text(text, encoding="utf-8")


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """A session that is ended early leaves what it has measured."""
    if any(item.config.stash[RESULTS].values()):
        _write(item.config, _report(item.config))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    config = terminalreporter.config
    found = config.stash[RESULTS]
    if not any(found.values()):
        return
    report = _report(config)
    terminalreporter.write_line("")
    if found["steps"] or found["memory"] or found["micro"]:
        terminalreporter.write_line(bench.text(report))
    if races := found["ops"]:
        quick, device = config.getoption("--bench-quick"), config.getoption("--bench-device")
        peaks = op_bench.measure_peaks(torch.device(device), races[0].case.dtype, quick)
        report |= {"op_peaks": peaks, "ops": [race.result(peaks) for race in races]}
        terminalreporter.write_line(op_bench.text(report))
    _write(config, report)
