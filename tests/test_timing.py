"""The clocks' bookkeeping, the peaks, and the facts recorded beside results.

No test looks at how long anything took.
"""

import gc
import os

import pytest
import torch

from trm_fast import timing

CPU = torch.device("cpu")


def test_summary_is_median_and_minimum_in_milliseconds():
    assert timing.summary([0.004, 0.001, 0.002]) == pytest.approx({"median": 2.0, "min": 1.0})


def test_calls_in_a_row_are_each_timed_and_numbered_on():
    calls = []
    seconds = timing.in_a_row(calls.append, CPU, first=7, count=3)
    assert calls == [7, 8, 9]
    assert len(seconds) == 3


def test_best_leaves_the_first_call_out(monkeypatch):
    found = iter([(9.0, 9.0), (3.0, 1.5), (2.0, 2.5)])
    monkeypatch.setattr(timing, "timed", lambda run, device: next(found))
    monkeypatch.setattr(timing, "basis", lambda device: "wall")
    assert timing.best(lambda: None, CPU, runs=2) == 2.0


@pytest.mark.parametrize(("clock", "want"), [("wall", 2.0), ("cpu", 1.5)])
def test_the_clock_is_that_of_the_basis(monkeypatch, clock, want):
    monkeypatch.setattr(timing, "timed", lambda run, device: (2.0, 1.5))
    monkeypatch.setattr(timing, "basis", lambda device: clock)
    assert timing.best(lambda: None, CPU, runs=1) == want
    assert timing.in_a_row(lambda i: None, CPU, 0, 2) == [want, want]


def test_peaks_count_two_operations_and_both_directions_of_a_copy(monkeypatch):
    monkeypatch.setattr(timing, "best", lambda run, device, runs: 1e-3)
    assert timing.matmul_peak(torch.float32, CPU, 100) == pytest.approx(2 * 100**3 / 1e-3 / 1e9)
    assert timing.copy_peak(CPU, 1000) == pytest.approx(2 * 1000 / 1e-3 / 1e9)


def test_the_collector_is_off_inside_only():
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), timing.collector_off():
        assert not gc.isenabled()
        _ = 1 / 0
    assert gc.isenabled()


def test_commit_of_a_folder_without_git(tmp_path):
    assert timing.commit(tmp_path) is None


def test_one_cpu_of_each_core_and_the_last_core_first(monkeypatch):
    siblings = {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}

    def read_text(path, encoding):
        number = int(path.parent.parent.name.removeprefix("cpu"))
        if number not in siblings:
            raise OSError
        return siblings[number] + "\n"

    monkeypatch.setattr(timing.Path, "read_text", read_text)
    assert timing.one_cpu_per_core({0, 1, 2, 3}) == [1, 0]
    assert timing.one_cpu_per_core({2, 3, 9}) == [9, 3, 2]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system cannot pin")
def test_threads_and_cpus_are_as_before_afterwards():
    threads, allowed = torch.get_num_threads(), os.sched_getaffinity(0)
    with pytest.raises(ZeroDivisionError), timing.on_threads(1) as cpus:
        assert torch.get_num_threads() == 1
        assert os.sched_getaffinity(0) == set(cpus)
        assert len(cpus) == 1
        _ = 1 / 0
    assert torch.get_num_threads() == threads
    assert os.sched_getaffinity(0) == allowed
    for task in timing._tasks():
        assert os.sched_getaffinity(task) == allowed


def test_more_threads_than_cores_are_not_pinned():
    with timing.on_threads(10_000) as cpus:
        assert cpus is None
