"""The benchmarks' arithmetic, their refusal to time what differs, and that they run at all.

No test looks at how long anything took.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trm_fast import bench
from trm_fast import race as racing
from trm_fast.contenders import (
    PRODUCTS,
    Contender,
    ParityError,
    contenders,
    fused,
    outcome,
)
from trm_fast.flops import step_flops
from trm_fast.official import official_code
from trm_fast.race import LEAST_TURNS, set_up
from trm_fast.workloads import CASES, Case, quick

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
RECIPE = quick(CASES["recipe"])


SHORT = ["--quick", "--compile=never", "--case", "recipe", "--dtype", "float32"]
SHORT += ["--batch", "3", "--rounds", "1", "--threads", "1", "--step", "inference"]


@pytest.mark.parametrize("file", ["out.json", "-"])
def test_a_run_that_is_ended_reports_the_races_that_it_has_run(file, tmp_path, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure_memory", interrupt)
    path = file if file == "-" else str(tmp_path / file)
    assert bench.main([*SHORT, "--json", path]) == 130
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == "trm-fast bench: interrupted"
    if file == "-":
        found = json.loads(said.out)
    else:
        found = json.loads((tmp_path / file).read_text(encoding="utf-8"))
        assert "recipe, inference step" in said.out
    assert [(r["step"], r["threads"]) for r in found["results"]] == [("inference", 1)]


def test_a_run_that_is_ended_at_once_says_so(monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "set_up", interrupt)
    assert bench.main(SHORT) == 130
    assert capsys.readouterr().out == ""


def test_what_computes_something_else_is_said_and_the_others_are_timed(monkeypatch, capsys):
    def broken(*_):
        raise ParityError("b, inference step: loss differs; it was not timed")

    monkeypatch.setattr(racing, "check_parity", broken)
    monkeypatch.setattr(racing, "contenders", lambda *_: [Contender("reference"), Contender("b")])
    assert bench.main([*SHORT, "--part", "steps", "--json", "-"]) == 1
    said = capsys.readouterr()
    (result,) = json.loads(said.out)["results"]
    assert [(r["contender"], r["available"]) for r in result["rows"]] == [
        ("reference", True),
        ("b", False),
    ]
    line = "wrong: b, inference step: loss differs; it was not timed"
    assert result["rows"][1]["note"] == line
    assert said.err.splitlines()[-1] == f"trm-fast bench: {line}"


def test_the_json_of_a_quick_run_without_the_official_code(capsys):
    before = torch.get_num_threads()
    arguments = ["--quick", "--compile=never", "--case", "recipe", "--dtype", "float32"]
    arguments += ["--batch", "3", "--rounds", "4", "--threads", "1,2", "--part", "steps"]
    assert bench.main([*arguments, "--policy", "save,recompute", "--json", "-"]) == 0
    assert torch.get_num_threads() == before
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == 3
    for key in ("date", "version", "commit", "torch", "triton", "device", "wait_policy"):
        assert key in found
    assert {"instruction_set", "total_seconds"} < set(found)
    assert found["threads"] == [1, 2]
    assert {n: set(of) for n, of in found["peak_gflop_per_s"].items()} == {
        "1": {"float32"},
        "2": {"float32"},
    }
    assert [(r["step"], r["threads"], r["clock"]) for r in found["results"]] == [
        ("train", 1, "cpu"),
        ("train", 2, "wall"),
        ("inference", 1, "cpu"),
        ("inference", 2, "wall"),
        ("solve", 1, "cpu"),
        ("solve", 2, "wall"),
    ]
    result = found["results"][0]
    assert result["case"] == "recipe"
    assert result["config"]["batch_size"] == 3
    assert result["seconds"] > 0
    if hasattr(os, "sched_getaffinity"):
        assert len(result["cpus"]) == 1
    rows = {r["contender"]: r for r in result["rows"]}
    kernels = fused(RECIPE.model, CPU)
    recomputed = f"{kernels or 'reference'}, recompute"
    assert rows[recomputed]["policy"] == "recompute"
    assert rows[recomputed]["saved_mib"] < rows["reference"]["saved_mib"]
    assert set(result["ratios"][recomputed]) == {"reference", PRODUCTS}
    reference = rows["reference"]
    assert reference["runs"] == 4
    assert 0 < reference["wall_ms"]["min"] <= reference["wall_ms"]["median"]
    assert 0 <= reference["cpu_ms"]["min"] <= reference["cpu_ms"]["median"]
    flops = step_flops(replace(RECIPE.model, batch_size=3), "train")
    assert reference["useful_gflop"] == pytest.approx(flops / 1e9)
    assert reference["fraction_of_peak"] == pytest.approx(
        reference["gflop_per_s"] / found["peak_gflop_per_s"]["1"]["float32"]
    )
    assert reference["boards_per_s"] == pytest.approx(3e3 / reference["cpu_ms"]["min"])
    assert (reference["mfu"], reference["peak_mib"], result["launched"]) == (
        *(None, None, "operations"),
    )
    solved = {r["contender"]: r for r in found["results"][4]["rows"]}["reference"]
    assert solved["useful_gflop"] > 2 * step_flops(RECIPE.model, "inference", 3) / 1e9
    stepped = {r["contender"]: r for r in found["results"][2]["rows"]}["reference"]
    assert solved["launches"] > stepped["launches"] > 50
    assert [r for r in rows.values() if not r["available"]] == [
        {"contender": name, "available": False, "note": "no official code given: --official PATH"}
        for name in ("official", "official, own width")
    ]
    inference = {r["contender"] for r in found["results"][2]["rows"]}
    assert recomputed not in inference


def test_turns_end_when_the_seconds_are_used_up():
    race = set_up(RECIPE, "inference", None, CPU, compiling="never")
    race.start()
    race.run(50, seconds=0.0)
    assert {len(e.wall) for e in race.entries} == {LEAST_TURNS}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--official", "nowhere"], "nowhere: not a checkout of the official code"),
        (["--json", "nowhere/x.json"], "--json nowhere/x.json: there is no folder nowhere"),
        (["--device", "gpu"], "gpu"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_2(arguments, said, capsys):
    assert bench.main(["--quick", "--compile=never", *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--case", "recipy"], "invalid choice: 'recipy'"),
        (["--seconds", "-1"], "'-1' is not a number >= 0"),
        (["--seconds", "nan"], "'nan' is not a number >= 0"),
        (["--threads", "1,x"], "'x' is not a whole number from 1 to"),
        (["--batch", "0"], "'0' is not a whole number from 1 to"),
        (["--rounds", "0"], "'0' is not a whole number from 1 to"),
        (["--dtype", "bfloat"], "'bfloat' is not one of bfloat16, float32"),
        (["--quantize", "int4"], "'int4' is not one of int8, fp8"),
        (["--policy", "safe"], "'safe' is not one of save, light, recompute"),
    ],
)
def test_an_argument_that_cannot_be_exits_2(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"trm-fast bench: argument {arguments[0]}: {said}")
    assert err.count("\n") == 1


def test_a_report_without_races_explains_no_table():
    found = bench.report(CPU, bench.Peaks([], CPU), [])
    shown = bench.text(found)
    assert shown.startswith("trm_fast ") and "wait policy" in shown
    assert "torch.mm" not in shown and "MFU" not in shown


def test_the_memory_part_is_the_cpus_where_the_steps_are_a_gpus(monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "pick_device", lambda given: torch.device("cuda"))
    monkeypatch.setattr(bench, "wake_profiler", lambda device: None)
    monkeypatch.setattr(bench, "run_cases", lambda *_: {"results": []})
    monkeypatch.setattr(bench, "measure_memory", lambda chosen, *_: asked.extend(chosen) or [])
    given = bench.parser().parse_args(["--part", "memory", "--case", "official"])
    bench.measure(given, {})
    trained = [case.config for case, step in asked if step == "train"]
    assert {(c["batch_size"], c["forward_dtype"]) for c in trained} == {
        (8, "bfloat16"),
        (8, "float32"),
    }


def test_the_clocks_are_cleared_of_warm_up():
    race = set_up(RECIPE, "inference", None, CPU, compiling="never")
    assert race.entries[0].wall == []
    race.run(3)
    assert {len(e.wall) for e in race.entries} == {3}
    race.start()
    assert {len(e.wall) + len(e.cpu) for e in race.entries} == {0}


@pytest.mark.parametrize("case", [quick(c) for c in CASES.values()], ids=CASES)
@pytest.mark.parametrize("step", ["train", "inference", "solve"])
def test_the_official_code_agrees_and_is_timed(case: Case, step, official_path):
    with official_code(official_path) as official:
        race = set_up(case, step, official, CPU, compiling="never")
        race.run(1)
    assert race.absent == {}
    names = [e.contender.name for e in race.entries]
    policies = case.policies if step == "train" else ["save"]
    assert names == [c.name for c in contenders(case, CPU, "never", policies)]
    result = race.result()
    assert set(result["ratios"]) == set(names)
    assert all("official" in of or n == "official" for n, of in result["ratios"].items())


def test_pytest_benchmark_runs_without_the_official_code(tmp_path):
    files = [f"bench/bench_{name}.py" for name in ("model", "swiglu", "micro")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *files, "-k", "recipe-float32 or swiglu or micro"]
        + ["--benchmark-only", "--bench-quick", "--compile=never", "-q", "-p", "no:cacheprovider"]
        + ["--bench-json", str(tmp_path / "out.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "recipe, train step" in done.stdout
    assert "no official code given: --official PATH" in done.stdout
    assert "swiglu (channel), both: float32, B=2" in done.stdout
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    counts = {(r["case"], r["step"], r["threads"]) for r in found["results"]}
    assert {("recipe", "train", 1), ("recipe", "inference", 1)} <= counts
    assert [(r["op"], r["direction"]) for r in found["ops"]] == [
        ("swiglu", "forward"),
        ("swiglu", "both"),
    ]


def test_the_benchmark_is_a_script_too():
    done = subprocess.run(
        [sys.executable, "bench/bench_model.py", "--quick", "--part", "memory", "--policy", "save"]
        + ["--case", "official", "--dtype", "float32", "--json", "-"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["results"] == []
    (memory,) = found["memory"]
    assert (memory["dtype"], memory["batch"], memory["saved_batch"]) == ("float32", 3, 2)
    assert [r["contender"] for r in memory["rows"]][0] == "reference"
    assert memory["rows"][-1]["note"].startswith("no official code given")


@pytest.mark.parametrize("way", ["int8", "fp8"])
def test_eight_bits_are_a_contender(way, extension):
    """Checked against the reference in eight bits; of training, which does not notice int8, none
    then."""
    name = "cpp, int8" if way == "int8" else "cpp, fp8, plain recursion"
    for step, there in (("train", way == "fp8"), ("inference", True)):
        race = set_up(RECIPE, step, None, CPU, "never", quantized=[way])
        names = [entry.contender.name for entry in race.entries]
        assert names == ["reference", "cpp", *[name] * there, "matmuls only"]
    entry = race.entries[2]
    assert (entry.config.quantize, entry.config.backend) == (way, "auto")
    assert set(entry.errors) == {"one_cycle", "loss"}
    assert not torch.equal(*(outcome(race.entries[i])["logits"] for i in (1, 2)))
