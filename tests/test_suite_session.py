"""How the GPU suite survives: records, deadlines, gates, signals, lost and hung processes.

No test looks at how long anything took.
"""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from trm_fast import backends
from trm_fast.backends import Row
from trm_fast.contenders import ParityError
from trm_fast.suite import records, session, supervisor
from trm_fast.suite.predictions import look_up
from trm_fast.suite.records import measurement
from trm_fast.suite.session import Item, Session, Skip, run_stage
from trm_fast.suite.stages import STAGES
from trm_fast.suite.supervisor import CONTEXT_LOST, Stopped, get_now, set_now, supervise

ROOT = Path(__file__).resolve().parent.parent
FACTS = {"device": "x", "torch": "2", "triton": "3"}


@pytest.fixture
def dry(tmp_path):
    """A session of a dry run that has a minute left."""
    out = tmp_path / "results.jsonl"
    return Session("A", "A-1", out, time.time() + 60, torch.device("cpu"), tiny=True)


def items(session):
    return [r for r in records.read(session.out) if "item" in r]


# Records


def test_a_record_shows_prediction_and_ratio():
    row = measurement("ours/mlp_t/step", 90.0, "ms", look_up("ours/mlp_t/step"), note="eager")
    assert row["ratio"] == pytest.approx(90 / 83)
    assert row["range"] == [66, None]
    shown = records.line(row)
    assert shown.split() == ["ours/mlp_t/step", "90", "ms", "predicted", "83", "x1.08", "eager"]
    absent = records.line(measurement("x", None, "ms", look_up("ours/mlp_t/step"), note="why"))
    assert absent.split() == ["x", "-", "ms", "why"]


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "deep" / "out.jsonl"
    records.append(path, {"run": "A-1", "stage": "A"})
    records.append(path, {"run": "A-1", "stage": "A", "item": "x", "status": "ok", "rows": []})
    records.append(path, {"run": "A-2", "stage": "A", "item": "y", "status": "ok", "rows": []})
    with path.open("a") as file:
        file.write('{"run": "A-2", "it')
    assert [r["run"] for r in records.read(path)] == ["A-1", "A-1", "A-2"]
    assert len(records.read(path, "A-1")) == 2
    assert [r["item"] for r in records.latest(records.read(path), "A")] == ["y"]
    assert records.latest(records.read(path), "B") == []
    assert records.read(tmp_path / "none") == []


# The loop


def measured(name, value=1.0):
    return measurement(name, value, "ms")


def test_rows_before_a_failure_are_kept_and_the_next_item_runs(dry):
    def breaks(s):
        yield measured("first")
        raise RuntimeError("CUDA out of memory\nlong story")

    def skips(s):
        yield from ()
        raise Skip("not here")

    status = run_stage(
        dry,
        [Item("a", breaks, 9), Item("b", skips, 9), Item("c", lambda s: iter([measured("x")]), 9)],
    )
    assert status == 1
    a, b, c = items(dry)
    assert (a["status"], a["reason"], a["rows"][0]["name"]) == (
        "failed",
        "CUDA out of memory",
        "first",
    )
    assert a["where"][-1].startswith("test_suite_session.py:")
    assert (b["status"], b["reason"]) == ("skipped", "not here")
    assert (c["status"], len(c["rows"])) == ("ok", 1)
    (begin,) = [r for r in records.read(dry.out) if "item" not in r]
    assert begin["size"] == "tiny"
    assert {"device", "torch", "commit", "date"} <= set(begin)
    assert get_now(dry.out) is None


@pytest.mark.parametrize(("found", "recorded"), [(None, "abc"), ("def", "def")])
def test_the_commit_is_git_s_or_the_one_given(dry, monkeypatch, found, recorded):
    monkeypatch.setattr(session, "environment", lambda _: {**FACTS, "commit": found})
    dry.commit = "abc"
    run_stage(dry, [])
    assert records.read(dry.out)[0]["commit"] == recorded


def test_what_would_start_after_the_budget_is_skipped(dry):
    dry.until = time.time() - 1
    assert run_stage(dry, [Item("a", lambda s: pytest.fail("ran"), 9)]) == 0
    (record,) = items(dry)
    assert (record["status"], record["reason"]) == ("skipped", "the stage's budget was used up")


def test_an_item_is_ended_at_its_deadline(dry):
    """Also one that catches every Exception, and what it had measured is kept."""
    dry.tiny = False

    def stubborn(s):
        yield measured("before")
        while True:
            with contextlib.suppress(Exception):
                time.sleep(30)

    assert run_stage(dry, [Item("a", stubborn, 0.2), Item("b", lambda s: iter(()), 9)]) == 1
    a, b = items(dry)
    assert (a["status"], a["reason"]) == ("overtime", "it was given 0 s")
    assert [row["name"] for row in a["rows"]] == ["before"]
    assert b["status"] == "ok"
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_items_left_out_of_the_dry_run_say_so(dry):
    run_stage(dry, [Item("a", lambda s: pytest.fail("ran"), 9, dry=False)])
    assert items(dry)[0]["reason"] == "left out of the dry run"


def test_a_wrong_gate_stops_the_stage_behind_the_gates(dry):
    def wrong(s):
        yield measured("error", 3.0)
        raise ParityError("token_mix is off")

    stage = [
        Item("correct token_mix", wrong, 9, gate=True),
        Item("correct swiglu", lambda s: iter(()), 9, gate=True),
        Item("timing", lambda s: pytest.fail("timed"), 9),
    ]
    assert run_stage(dry, stage) == 1
    first, second, third = items(dry)
    assert (first["status"], first["reason"]) == ("wrong", "token_mix is off")
    assert second["status"] == "ok"
    assert third["reason"] == "stopped: correct token_mix went wrong"


def test_a_wrong_kernel_stops_stage_a(dry, monkeypatch):
    def sigmoid_only(gate_up):
        gate, up = gate_up.chunk(2, -1)
        return torch.sigmoid(gate) * up

    row = Row("swiglu", "triton", lambda: sigmoid_only, lambda *_: None)
    monkeypatch.setattr(backends, "ROWS", (row, *(r for r in backends.ROWS if r.op != "swiglu")))
    wanted = ("correct swiglu", "official eager mlp_t")
    assert run_stage(dry, [i for i in STAGES["A"] if i.name in wanted]) == 1
    gate, timing = items(dry)
    assert gate["status"] == "wrong"
    assert gate["reason"].startswith("triton, swiglu (channel), both, seed 0: result 0 is off by")
    assert timing["reason"] == "stopped: correct swiglu went wrong"


def test_a_signal_keeps_what_was_measured(dry):
    def interrupted(s):
        yield measured("before")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    with pytest.raises(Stopped) as stopped, supervisor.stop_signals():
        run_stage(dry, [Item("a", interrupted, 60), Item("b", lambda s: pytest.fail("ran"), 9)])
    assert stopped.value.args == (signal.SIGTERM,)
    (record,) = items(dry)
    assert (record["status"], record["reason"]) == ("stopped", f"signal {signal.SIGTERM}")
    assert [row["name"] for row in record["rows"]] == ["before"]


def test_a_lost_context_ends_the_process_and_the_next_one_goes_on(dry, monkeypatch):
    stage = [Item(n, lambda s: iter(()), 9) for n in "abc"]
    monkeypatch.setattr(session, "clean_up", lambda device: False)
    assert run_stage(dry, stage) == CONTEXT_LOST
    assert get_now(dry.out)["item"] == "a"
    monkeypatch.setattr(session, "clean_up", lambda device: True)
    assert run_stage(dry, stage, after="a") == 0
    assert [r["item"] for r in items(dry)] == ["a", "b", "c"]
    assert sum("item" not in r for r in records.read(dry.out)) == 1


def test_a_gate_that_was_lost_stops_the_next_process(dry):
    lost = {"run": "A-1", "stage": "A", "item": "gate", "status": "killed", "rows": []}
    records.append(dry.out, lost | {"reason": "hung", "seconds": 1.0})
    stage = [Item("gate", lambda s: iter(()), 9, gate=True), Item("x", lambda s: iter(()), 9)]
    assert run_stage(dry, stage, after="gate") == 1
    assert items(dry)[-1]["reason"] == "stopped: gate went wrong"


# The process that watches

WORKER = """
import os, signal, sys, time
from pathlib import Path
from trm_fast.suite.supervisor import set_now
out, todo = Path(sys.argv[1]), sys.argv[2].split(",")
after = sys.argv[4] if len(sys.argv) > 3 else None
names = [t.split("=")[0] for t in todo]
for name, how in [t.split("=") for t in todo[names.index(after) + 1 if after else 0:]]:
    set_now(out, name, time.time() + (-100 if how == "hang" else 100))
    if how == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "lose":
        sys.exit(75)
    with out.open("a") as file:
        file.write('{"run": "r", "item": "%s", "status": "ok"}\\n' % name)
set_now(out, None)
"""


def test_the_watcher_records_losses_and_goes_on_behind_them(tmp_path):
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-c", WORKER, str(out), "a=ok,b=die,c=hang,d=lose,e=ok"]
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)
    try:
        assert supervise(command, out, "A", "r", grace=1.0) == 0
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    found = {r["item"]: r for r in records.read(out, "r")}
    assert {name: r["status"] for name, r in found.items()} == {
        "a": "ok",
        "b": "failed",
        "c": "killed",
        "e": "ok",
    }  # d wrote its own record, here none
    assert found["b"]["reason"] == "the process ended with status -9"
    assert get_now(out) is None


def test_what_is_being_measured_is_said_beside_the_results(tmp_path):
    out = tmp_path / "out.jsonl"
    set_now(out, "item", 12.5)
    assert get_now(out) == {"item": "item", "until": 12.5}
    set_now(out, None)
    assert get_now(out) is None
    assert list(tmp_path.iterdir()) == []
