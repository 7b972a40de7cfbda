"""Whole steps in the GPU suite: rates, utilization, the official code beside ours, and answers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from trm_fast.contenders import Contender, ParityError, prepare
from trm_fast.flops import step_flops
from trm_fast.suite import engine, steps
from trm_fast.suite.session import Session
from trm_fast.workloads import CASES, quick

CPU = torch.device("cpu")
RECIPE = replace(quick(CASES["recipe"]).model, halt_max_steps=2)


def tiny_session(tmp_path, official=None):
    return Session("B", "run", tmp_path / "out.jsonl", 0.0, CPU, tiny=True, official=official)


def test_kernels_and_utilization_of_a_gpu(monkeypatch):
    monkeypatch.setattr(steps, "launches", lambda run, device: 134)
    monkeypatch.setattr(steps, "device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    session = SimpleNamespace(device=torch.device("cuda"))
    entry = prepare(Contender("reference"), RECIPE, "solve", None, CPU)
    count, used = steps.inside(session, "x", entry, "solve", 1e-3)
    assert (count["name"], count["value"], count["unit"]) == ("x/launches", 134, "kernels")
    assert (used["name"], used["unit"]) == ("x/mfu", "%")
    assert used["value"] == pytest.approx(step_flops(RECIPE, "solve") / 1e-3 / 312e12 * 100)
    monkeypatch.setattr(steps, "device_name", lambda device: "some GPU")
    assert [row["name"] for row in steps.inside(session, "x", entry, "solve", 1.0)] == [
        "x/launches"
    ]


def test_a_solve_is_a_rate(tmp_path):
    entry = prepare(Contender("reference"), RECIPE, "solve", None, CPU)
    (row,) = steps.solve_rows(tiny_session(tmp_path), "inference/recipe/B2", entry)
    assert row["unit"] == "puzzles/s"
    assert row["value"] == pytest.approx(2 / min(entry.wall))
    assert row["note"].endswith(" ms for 2 steps")


def test_the_official_code_solves_beside_ours(tmp_path, official_path, monkeypatch):
    monkeypatch.setattr(
        steps, "fused_entry", lambda s, c, step, name: prepare(Contender(name), c, step, None, CPU)
    )
    rows = list(steps.throughput(tiny_session(tmp_path, official_path), "attention", 8))
    assert [row["name"] for row in rows] == [
        "inference/attention/B8",
        "official eager/attention/inference B8",
        "inference/attention/B8/gain",
    ]
    ours, theirs, gain = (row["value"] for row in rows)
    assert gain == pytest.approx(ours / theirs)


class Switch:
    """In place of the kernels' switch of dependent launches; `wrong` inside makes other answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, wrong: bool = False) -> None:
        self.wrong, self.on, self.seen = wrong, False, []
        monkeypatch.setattr(engine, "pdl_switch", lambda device: self.turn)
        monkeypatch.setattr(engine, "InferenceStep", self.step)

    @contextmanager
    def turn(self, on: bool) -> Iterator[None]:
        self.on = on
        yield
        self.on = False

    def step(self, model: object, size: int, captured: bool) -> SimpleNamespace:
        said = SimpleNamespace(preds=torch.zeros(size, 81))

        def start(boards: dict[str, torch.Tensor]) -> None:
            self.seen.append((captured, self.on))
            said.preds = torch.full((size, 81), float(self.on and self.wrong))

        return SimpleNamespace(start=start, run=lambda: said, captured=captured)


@pytest.mark.parametrize(("batch", "pdl"), [(1, ["graph, PDL"]), (8, [])])
def test_one_board_is_answered_with_dependent_launches_too(tmp_path, monkeypatch, batch, pdl):
    switch = Switch(monkeypatch)
    rows = list(engine.answers(tiny_session(tmp_path), "attention", batch))
    names = [row["name"].split("/")[-1] for row in rows]
    assert names == ["plain", "graph", *pdl]
    assert list(dict.fromkeys(switch.seen)) == [
        *((False, False), (True, False)),
        *[(True, True)] * len(pdl),
    ]


def test_answers_that_differ_with_dependent_launches_are_an_error(tmp_path, monkeypatch):
    Switch(monkeypatch, wrong=True)
    with pytest.raises(ParityError, match="/graph, PDL: the answers differ from those of plain"):
        list(engine.answers(tiny_session(tmp_path), "attention", 1))


def test_a_cpu_has_no_dependent_launches():
    assert engine.pdl_switch(CPU) is None
