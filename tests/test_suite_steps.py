"""Whole steps in the GPU suite: rates, utilization, and the official code beside ours."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from trm_fast.contenders import Contender, prepare
from trm_fast.flops import step_flops
from trm_fast.suite import steps
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
