"""From times to ratios, tables and the summary: arithmetic on made-up rows."""

from dataclasses import replace

import pytest
import torch

from trm_fast import bench_report
from trm_fast.contenders import (
    Contender,
    prepare,
)
from trm_fast.workloads import CASES, quick

CPU = torch.device("cpu")
RECIPE = quick(CASES["recipe"])


def timed_row(name, wall_median, wall_min, cpu_median, cpu_min):
    return {
        "contender": name,
        "available": True,
        "wall_ms": {"median": wall_median, "min": wall_min},
        "cpu_ms": {"median": cpu_median, "min": cpu_min},
    }


def test_a_ratio_is_the_bases_time_over_the_rows():
    rows = [
        timed_row("reference", 10.0, 8.0, 6.0, 4.0),
        timed_row("cpp", 5.0, 2.0, 3.0, 1.0),
        timed_row("official", 25.0, 12.0, 9.0, 8.0),
        {"contender": "reference compiled", "available": False, "note": "failed"},
    ]
    found = bench_report.ratios(rows, "cpu")
    assert set(found) == {"reference", "cpp", "official"}
    assert found["cpp"] == {
        "reference": {"min": 4.0, "median": 2.0},
        "official": {"min": 8.0, "median": 3.0},
    }
    assert found["reference"] == {"official": {"min": 2.0, "median": 1.5}}
    assert bench_report.ratios(rows, "wall")["cpp"]["official"] == {"min": 6.0, "median": 5.0}


FIGURES = {
    "useful_gflop": 2.0,
    "gflop_per_s": 50.0,
    "fraction_of_peak": 0.5,
    "mfu": None,
    "boards_per_s": 250.0,
    "saved_mib": None,
    "peak_mib": None,
    "launches": 1314,
    "quantize": "none",
}


def test_the_table_shows_ratios_and_reasons_within_136_columns():
    rows = [
        timed_row("reference", 12345, 10234, 6000, 4000),
        timed_row("official", 25, 12, 9, 8),
        timed_row("official, own width", 25000.0, 12000.0, 9000.0, 8000.0),
        timed_row("matmuls only", 25, 12, 9, 0.8),
    ]
    for r in rows:
        r |= FIGURES
    result = {
        "case": "recipe",
        "about": "a case",
        "step": "train",
        "threads": 1,
        "cpus": [1],
        "clock": "cpu",
        "launched": "operations",
        "config": RECIPE.model.to_dict(),
        "rows": [*rows, {"contender": "c", "available": False, "note": "failed: why"}],
        "ratios": bench_report.ratios(rows, "cpu"),
    }
    lines = bench_report.table(result).splitlines()
    assert lines[0] == "recipe, train step, float32, B=2, 1 thread (pinned), ratios by CPU time"
    assert [line.split()[0] for line in lines[3:]] == [
        *("reference", "official", "official,", "matmuls", "c")
    ]
    assert lines[3].split()[1:5] == ["12345", "10234", "6000", "4000"]
    assert "500|667" in lines[4]
    assert lines[-1].endswith("failed: why")
    assert max(map(len, lines)) <= 136


def test_what_is_gained_is_said_first():
    rows = [
        timed_row("reference", 40.0, 30.0, 40.0, 20.0) | FIGURES,
        timed_row("triton", 10.0, 8.0, 6.0, 5.0) | FIGURES | {"mfu": 0.42, "peak_mib": 16000.0},
        timed_row("triton, recompute", 20.0, 16.0, 20.0, 16.0) | FIGURES,
        timed_row("triton, fp8", 2.0, 2.0, 2.0, 2.0) | FIGURES | {"quantize": "fp8"},
        timed_row("official", 25.0, 20.0, 25.0, 20.0) | FIGURES | {"peak_mib": 48000.0},
        timed_row("official compiled", 12.0, 12.0, 12.0, 12.0) | FIGURES,
        timed_row("matmuls only", 1.0, 1.0, 1.0, 1.0) | FIGURES,
    ]
    result = {"case": "official", "step": "solve", "threads": 2, "clock": "wall", "rows": rows}
    result |= {"config": CASES["official"].config, "launched": "kernels"}
    found = {"device": "some GPU", "results": [result]}
    lines = bench_report.gains(found).splitlines()
    assert lines[0] == "what you gain with trm_fast on some GPU"
    assert lines[2].split("  ")[1] == "official bfloat16, B=8, 16-step solve"
    assert lines[2].split()[5:9] == ["8.00", "250.0", "42%", "16000.0"]
    assert lines[2].endswith("triton: 2.50x official (33%), 1.50x official compiled")
    result["rows"] = [r for r in rows if not r["contender"].startswith("official")]
    assert bench_report.gains(found).endswith("triton: 3.75x reference")
    assert bench_report.gains(found | {"results": []}) == ""


def test_utilization_on_a_gpu_is_of_the_makers_peak(monkeypatch):
    entry = prepare(Contender("reference"), RECIPE.model, "inference", None, CPU)
    entry.config = replace(entry.config, forward_dtype="bfloat16")
    entry.wall, entry.cpu = [0.5], [0.5]
    monkeypatch.setattr(bench_report, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    found = bench_report.row(entry, "inference", torch.device("cuda"))
    assert found["mfu"] == pytest.approx(found["useful_gflop"] / 0.5 / 989.4e3)
    monkeypatch.setattr(bench_report, "device_name", lambda device: "some GPU")
    assert bench_report.row(entry, "inference", torch.device("cuda"))["mfu"] is None
    monkeypatch.setattr(bench_report, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    entry.config = replace(entry.config, forward_dtype="float32")  # other products, another peak
    assert bench_report.row(entry, "inference", torch.device("cuda"))["mfu"] is None
