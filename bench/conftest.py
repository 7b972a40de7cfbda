"""Options and the printed ratios of `pytest bench/ --benchmark-only [--official PATH]`."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # OpenMP reads it when torch is loaded

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from trm_fast import bench
from trm_fast.contenders import COMPILE, Official, official_code

RACES = pytest.StashKey[list[bench.Race]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-quick", action="store_true", help="tiny sizes: does it run at all")
    parser.addoption("--bench-json", metavar="FILE", default=None, help="write the results there")
    parser.addoption("--bench-device", default="cpu", help="cpu, cuda or mps")
    parser.addoption("--compile", choices=COMPILE, default="auto", help="see trm-fast bench")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RACES] = []


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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    config = terminalreporter.config
    races = config.stash[RACES]
    if not races:
        return
    device = races[0].device
    size = 64 if config.getoption("--bench-quick") else None
    peaks = bench.measure_peaks([race.case for race in races], device, size)
    report = bench.report(device, peaks, races)
    terminalreporter.write_line("")
    terminalreporter.write_line(bench.text(report))
    if config.getoption("--bench-json"):
        text = json.dumps(report, indent=1) + "\n"
        Path(config.getoption("--bench-json")).write_text(text, encoding="utf-8")
