"""What becomes of a contender that cannot run, has no memory, or is wrong; what is looked into."""

import weakref

import pytest
import torch

from trm_fast import race
from trm_fast.contenders import PRODUCTS, Contender, Entry, ParityError, prepare
from trm_fast.race import Race, set_up
from trm_fast.workloads import CASES, quick

CPU = torch.device("cpu")
RECIPE = quick(CASES["recipe"])
PAIR = [Contender("reference", policy="save"), Contender("b")]


@pytest.fixture
def pair(monkeypatch):
    """Two contenders, "reference" and "b", of which none is compared."""
    monkeypatch.setattr(race, "contenders", lambda *_: PAIR)
    monkeypatch.setattr(race, "check_parity", lambda *_: None)


def test_the_matmuls_are_a_row_without_parity(monkeypatch):
    kinds = [Contender("reference", policy="save"), Contender(PRODUCTS, products=True)]
    monkeypatch.setattr(race, "contenders", lambda *_: kinds)
    monkeypatch.setattr(race, "check_parity", lambda *_: pytest.fail("nothing to compare"))
    held = set_up(RECIPE, "train", None, CPU)
    held.run(1)
    reference, products = held.result()["rows"]
    assert (products["saved_mib"], products["policy"], products["errors"]) == (None, None, {})
    assert reference["policy"] == "save"
    assert products["useful_gflop"] == reference["useful_gflop"]


def test_one_that_computes_something_else_is_absent(pair, monkeypatch):
    def broken(*_):
        raise ParityError("b, train step: loss differs")

    monkeypatch.setattr(race, "check_parity", broken)
    held = set_up(RECIPE, "train", None, CPU)
    assert [e.contender.name for e in held.entries] == ["reference"]
    assert held.absent == {"b": "wrong: b, train step: loss differs"}


def test_a_contender_that_cannot_run_says_why(pair, monkeypatch):
    def failing(contender, *rest):
        if contender.name == "b":
            raise RuntimeError("no C++ compiler\nlong story")
        return prepare(contender, *rest)

    monkeypatch.setattr(race, "prepare", failing)
    held = set_up(RECIPE, "train", None, CPU)
    assert [e.contender.name for e in held.entries] == ["reference"]
    assert held.absent == {"b": "failed: no C++ compiler"}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nTried"), None])
@pytest.mark.parametrize("after", [0, 2])
def test_one_that_runs_out_of_memory_leaves_the_race(after, error, monkeypatch):
    """In the untimed turn or in a later one; the others have all their turns, and its memory."""
    made, freed = [], []
    release = race.release
    monkeypatch.setattr(race, "release", lambda d: (release(d), freed.append(held_by_b())))

    def entry(name, fails):
        def run():
            made.append(name)
            if fails and made.count(name) > after:
                raise error or MemoryError

        contender = Contender(name)
        return Entry(contender, RECIPE.model, torch.nn.Linear(1, 1), run)

    held = Race(RECIPE, "train", CPU, [entry("a", False), entry("b", True), entry("c", False)], {})
    held_by_b = weakref.ref(held.entries[1].head)
    held.start()
    held.run(4)
    assert [(e.contender.name, len(e.wall)) for e in held.entries] == [("a", 4), ("c", 4)]
    assert made.count("b") == after + 1
    assert held.absent == {"b": "failed: CUDA out of memory." if error else "failed: MemoryError()"}
    assert freed == [None]
    rows = held.result()["rows"]
    assert [(r["contender"], r["available"]) for r in rows][2:] == [("b", False)]


def test_nobody_left_is_a_result_too():
    held = Race(RECIPE, "train", CPU, [], {"reference": "failed: CUDA out of memory."})
    held.start()
    held.run(2)
    assert held.result()["ratios"] == {}


def test_compiled_contenders_are_graphs_in_every_race(monkeypatch):
    """One function is compiled for a few versions only: the races before must not use them up."""
    kinds = [Contender("reference", compiled=True, compiler="eager", policy="save")]
    monkeypatch.setattr(race, "contenders", lambda *_: kinds)
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(3):
            assert set_up(RECIPE, "inference", None, CPU).absent == {}


def test_what_is_not_compiled_is_no_compiled_contender(monkeypatch):
    kinds = [Contender("reference", compiled=True, compiler="eager", policy="save")]
    monkeypatch.setattr(race, "contenders", lambda *_: kinds)
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    held = set_up(RECIPE, "inference", None, CPU)
    assert held.absent == {"reference": "failed: torch.compile made no graph of it"}


def test_of_a_gpu_memory_and_kernels_are_the_contenders_own(monkeypatch):
    entry = Entry(PAIR[0], RECIPE.model, torch.nn.Module(), lambda: None)
    for name, value in {"_allocated": 1000, "_peak": 5000, "launches": 7}.items():
        monkeypatch.setattr(race, name, lambda *_, value=value: value)
    for name in ("prepare", "kept_for_backward"):
        monkeypatch.setattr(race, name, lambda *_, name=name: entry if name == "prepare" else 9)
    monkeypatch.setattr(race, "contenders", lambda *_: PAIR[:1])
    monkeypatch.setattr(race, "lap", lambda *_, **__: None)
    (found,) = set_up(RECIPE, "train", None, torch.device("cuda")).entries
    assert (found.peak_bytes, found.saved_bytes, found.launches) == (4000, 9, 7)


def test_memory_on_a_gpu_is_that_of_a_step_call_by_call(monkeypatch):
    """The replay of a graph allocates nothing."""
    held, told = [1000], []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda d: told.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda d: held[0])

    def plain():
        told.append("plain")
        held[0] = 5000

    entry = Entry(PAIR[1], RECIPE.model, torch.nn.Module(), lambda: told.append("replay"))
    assert race._peak(entry, torch.device("cuda")) == 1000
    entry.plain = plain
    told.clear()
    assert race._peak(entry, torch.device("cuda")) == 5000
    assert told == ["plain", "reset", "plain"]
