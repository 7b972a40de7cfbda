"""The benchmarks' arithmetic, their refusal to time what differs, and that they run at all.

No test looks at how long anything took.
"""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trm_fast import backends, bench, bench_report
from trm_fast.backends import Choice
from trm_fast.contenders import (
    PRODUCTS,
    Contender,
    Fields,
    ParityError,
    check_parity,
    compare,
    contenders,
    effective_config,
    fused,
    make_batch,
    make_carry,
    official_code,
    outcome,
    prepare,
)
from trm_fast.floor import matmuls
from trm_fast.flops import step_flops
from trm_fast.workloads import CASES, Case, plan, quick

ROOT = Path(__file__).resolve().parent.parent
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


def test_the_plan_is_what_the_issue_asks_for():
    found = [
        (c.name, c.config["forward_dtype"], c.config["batch_size"], step)
        for c, step in plan(CASES.values())
    ]
    for name in ("official", "attention"):
        for dtype in ("bfloat16", "float32"):
            assert {(name, dtype, 8, "train"), (name, dtype, 8, "inference")} < set(found)
            assert (name, dtype, 1, "inference") in found
            assert (name, dtype, 1, "train") not in found
            assert ("recipe", dtype, 64, "train") in found
    assert len(found) == len(set(found)) == 16


def test_a_plan_can_be_narrowed():
    official = [CASES["official"]]
    assert [(c.config["batch_size"], s) for c, s in plan(official, ["float16"], [1, 3])] == [
        (1, "train"),
        (1, "inference"),
        (3, "train"),
        (3, "inference"),
    ]
    ((case, step),) = plan(official, ["float32"], steps=["train"])
    assert (case.model.batch_size, case.model.forward_dtype, step) == (8, "float32", "train")
    assert case.rounds == CASES["official"].rounds
    assert CASES["official"].of("float32", 1).rounds == 3 * case.rounds


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("step", ["train", "inference", "solve"])
def test_the_matmuls_are_those_of_the_step(name, step):
    config = quick(CASES[name]).model
    run = matmuls(config, step, CPU)
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == step_flops(config, step)


def test_the_matmuls_are_a_row_without_parity(monkeypatch):
    kinds = [Contender("reference", policy="save"), Contender(PRODUCTS, products=True)]
    monkeypatch.setattr(bench, "contenders", lambda *_: kinds)
    monkeypatch.setattr(bench, "check_parity", lambda *_: pytest.fail("nothing to compare"))
    race = bench.set_up(RECIPE, "train", None, CPU)
    race.run(1)
    reference, products = race.result()["rows"]
    assert (products["saved_mib"], products["policy"], products["errors"]) == (None, None, {})
    assert reference["policy"] == "save"
    assert products["useful_gflop"] == reference["useful_gflop"]


def test_the_own_width_contender_has_the_official_rounding():
    own = Contender("official, own width", official=True, own_width=True)
    assert own in contenders(CASES["recipe"], CPU, compiling="never")
    assert own not in contenders(CASES["official"], CPU, compiling="never")
    config = effective_config(CASES["recipe"], own)
    assert (config.channel_width, config.token_width) == (256, 256)
    config = effective_config(CASES["recipe"], Contender("official", official=True))
    assert (config.channel_width, config.token_width) == (96, 96)
    assert step_flops(effective_config(CASES["recipe"], own), "train") / step_flops(
        config, "train"
    ) == pytest.approx(256 / 96, rel=0.05)


def test_every_contender_gets_the_same_carry_and_batch():
    config = RECIPE.model
    entries = [prepare(Contender(n), config, "train", None, CPU) for n in ("a", "b")]
    batch = make_batch(config, CPU)
    a, b = (make_carry(e.head, config, batch) for e in entries)
    assert torch.equal(a.inner_carry.z_H, b.inner_carry.z_H)
    assert torch.equal(a.inner_carry.z_L, b.inner_carry.z_L)
    assert not torch.equal(a.inner_carry.z_H, a.inner_carry.z_L)
    assert a.halted.tolist() == [True, False]
    assert not torch.equal(a.current_data["inputs"], batch["inputs"])
    first, second = (outcome(e) for e in entries)
    assert set(first) >= {"loss", "logits", "gradient of model.inner.lm_head.weight"}
    assert compare(first, second, 0.0, "b") == 0.0


def test_compare_names_what_differs():
    want = {"loss": torch.ones(1), "logits": torch.ones(4)}
    assert compare({n: 1.01 * t for n, t in want.items()}, want, 0.02, "x") == pytest.approx(0.01)
    with pytest.raises(ParityError, match="x: logits differs from the reference by 1.0e-01"):
        compare(want | {"logits": 1.1 * torch.ones(4)}, want, 0.02, "x")
    with pytest.raises(ParityError, match="loss is missing"):
        compare({"logits": torch.ones(4)}, want, 0.02, "x")
    with pytest.raises(ParityError, match="differs"):
        compare(want | {"loss": torch.tensor([float("nan")])}, want, 0.02, "x")


def test_one_changed_weight_is_refused():
    entry = prepare(Contender("changed"), RECIPE.model, "train", None, CPU)
    check_parity(entry, "train", None, CPU)
    assert entry.errors == {"one_cycle": 0.0, "loss": 0.0}
    with torch.no_grad():
        entry.head.model.inner.lm_head.weight.mul_(2)
    with pytest.raises(ParityError, match="changed, train step: loss differs.*nothing was timed"):
        check_parity(entry, "train", None, CPU)


def test_the_references_loss_is_found_once():
    losses = {}
    for name in ("a", "b"):
        check_parity(
            prepare(Contender(name, policy="light"), RECIPE.model, "train", None, CPU),
            *("train", None, CPU, losses),
        )
    assert len(losses) == 1


def test_nothing_is_timed_after_failed_parity(monkeypatch, capsys):
    def broken(*_):
        raise ParityError("reference compiled, train step: loss differs; nothing was timed")

    monkeypatch.setattr(bench, "check_parity", broken)
    monkeypatch.setattr(bench, "contenders", lambda *_: [Contender("reference"), Contender("b")])
    monkeypatch.setattr(bench.Race, "run", lambda *_: pytest.fail("timed"))
    assert bench.main(["--quick", "--case", "recipe", "--step", "train"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    said = captured.err.splitlines()[-1]
    assert said.startswith("trm-fast bench: reference compiled, train step: loss differs")


def test_a_contender_that_cannot_run_says_why(monkeypatch):
    def failing(contender, *rest):
        if contender.name == "b":
            raise RuntimeError("no C++ compiler\nlong story")
        return prepare(contender, *rest)

    monkeypatch.setattr(bench, "prepare", failing)
    monkeypatch.setattr(bench, "contenders", lambda *_: [Contender("reference"), Contender("b")])
    race = bench.set_up(RECIPE, "train", None, CPU)
    assert [e.contender.name for e in race.entries] == ["reference"]
    assert race.absent == {"b": "failed: no C++ compiler"}


def test_a_run_that_is_ended_leaves_the_races_that_it_has_run(tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure_memory", interrupt)
    arguments = ["--quick", "--compile=never", "--case", "recipe", "--dtype", "float32"]
    arguments += ["--batch", "3", "--rounds", "1", "--threads", "1", "--step", "inference"]
    with pytest.raises(KeyboardInterrupt):
        bench.main([*arguments, "--json", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [(r["step"], r["threads"]) for r in found["results"]] == [("inference", 1)]


def test_the_json_of_a_quick_run_without_the_official_code(capsys):
    before = torch.get_num_threads()
    arguments = ["--quick", "--compile=never", "--case", "recipe", "--dtype", "float32"]
    arguments += ["--batch", "3", "--rounds", "4", "--threads", "1,2", "--part", "steps"]
    assert bench.main([*arguments, "--policy", "save,recompute", "--json", "-"]) == 0
    assert torch.get_num_threads() == before
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == 2
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
    assert [r for r in rows.values() if not r["available"]] == [
        {"contender": name, "available": False, "note": "no official code given: --official PATH"}
        for name in ("official", "official, own width")
    ]
    inference = {r["contender"] for r in found["results"][2]["rows"]}
    assert recomputed not in inference


def test_turns_end_when_the_seconds_are_used_up():
    race = bench.set_up(RECIPE, "inference", None, CPU, compiling="never")
    race.start()
    race.run(50, seconds=0.0)
    assert {len(e.wall) for e in race.entries} == {bench.LEAST_TURNS}


def test_the_table_shows_ratios_and_reasons_within_120_columns():
    rows = [
        timed_row("reference", 12345, 10234, 6000, 4000),
        timed_row("official", 25, 12, 9, 8),
        timed_row("official, own width", 25000.0, 12000.0, 9000.0, 8000.0),
        timed_row("matmuls only", 25, 12, 9, 0.8),
    ]
    for r in rows:
        r |= {"useful_gflop": 2.0, "gflop_per_s": 50.0, "fraction_of_peak": 0.5, "saved_mib": None}
    result = {
        "case": "recipe",
        "about": "a case",
        "step": "train",
        "threads": 1,
        "cpus": [1],
        "clock": "cpu",
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
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--official", "nowhere"], "nowhere: not a checkout of the official code"),
        (["--batch", "0"], "batch_size"),
        (["--dtype", "bfloat"], "forward_dtype"),
        (["--quantize", "int4"], "cannot quantize to 'int4'; allowed: int8"),
        (["--policy", "safe"], "unknown policy 'safe'; allowed: save, light, recompute"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_2(arguments, said, capsys):
    assert bench.main(["--quick", "--compile=never", *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_an_unknown_case_exits_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--case", "recipy"])
    assert stopped.value.code == 2


def test_the_clocks_are_cleared_of_warm_up():
    race = bench.set_up(RECIPE, "inference", None, CPU, compiling="never")
    assert race.entries[0].wall == []
    race.run(3)
    assert {len(e.wall) for e in race.entries} == {3}
    race.start()
    assert {len(e.wall) + len(e.cpu) for e in race.entries} == {0}


def test_official_names_do_not_leak(official_path):
    before = set(sys.modules), list(sys.path)
    with official_code(official_path) as official:
        assert official is not None
        assert "models.layers" in sys.modules
    assert {n for n in set(sys.modules) - before[0] if n.split(".")[0] == "models"} == set()
    assert sys.path == before[1]


@pytest.mark.parametrize("case", [quick(c) for c in CASES.values()], ids=CASES)
@pytest.mark.parametrize("step", ["train", "inference"])
def test_the_official_code_agrees_and_is_timed(case: Case, step, official_path):
    with official_code(official_path) as official:
        race = bench.set_up(case, step, official, CPU, compiling="never")
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


def test_the_reference_stays_the_reference_where_auto_takes_kernels():
    config = replace(RECIPE.model, backend="auto")
    assert prepare(Contender("reference"), config, "train", None, CPU).config.backend == "reference"
    kernels = Contender("triton", backend="auto")
    assert prepare(kernels, config, "train", None, CPU).config.backend == "auto"


def test_fused_operations_are_a_contender_named_after_their_backends(monkeypatch):
    choices = [Choice("inject", "cpp", ""), Choice("swiglu", "reference", "")]
    monkeypatch.setattr(backends, "report", lambda *_: choices)
    assert fused(RECIPE.model, CPU) == "cpp"
    found = contenders(RECIPE, CPU, "never", ["save", "recompute"])
    assert found[:3] == [
        Contender("reference", policy="save"),
        Contender("cpp", backend="auto", policy="save"),
        Contender("cpp, recompute", backend="auto", policy="recompute"),
    ]
    assert found[-1] == Contender("matmuls only", products=True)


def test_eight_bits_are_a_contender_of_inference(extension):
    """Checked against the reference in eight bits, not against the one in floats."""
    race = bench.set_up(RECIPE, "inference", None, CPU, "never", quantized=["int8"])
    names = [entry.contender.name for entry in race.entries]
    assert names == ["reference", "cpp", "cpp, int8", "matmuls only"]
    entry = race.entries[2]
    assert (entry.config.quantize, entry.config.backend) == ("int8", "auto")
    assert set(entry.errors) == {"one_cycle", "loss"}
    logits = [outcome(race.entries[i])["logits"] for i in (1, 2)]
    assert not torch.equal(*logits)
    race = bench.set_up(RECIPE, "train", None, CPU, "never", quantized=["int8"])
    assert [entry.contender.quantize for entry in race.entries] == ["none"] * 3


def test_without_fused_operations_the_reference_has_the_other_policies(monkeypatch):
    monkeypatch.setattr(backends, "report", lambda *_: [Choice("inject", "reference", "")])
    found = contenders(RECIPE, CPU, "never", ["save", "light"])
    assert found[:2] == [
        Contender("reference", policy="save"),
        Contender("reference, light", policy="light"),
    ]
    assert found[2].official


def test_a_stand_in_for_pydantic_has_fields_and_defaults():
    class Base(Fields):
        batch_size: int
        eps: float = 1e-5

    class Derived(Base):
        name: str

    made = Derived(batch_size=3, name="x", unknown=1)
    assert (made.batch_size, made.eps, made.name) == (3, 1e-5, "x")
    assert Derived(batch_size=3, name="x", eps=0.5).eps == 0.5
    with pytest.raises(ValueError, match="Derived needs name"):
        Derived(batch_size=3)


def test_the_official_code_runs_without_pydantic(official_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pydantic" else real(name)
    )
    monkeypatch.delitem(sys.modules, "pydantic", raising=False)
    with official_code(official_path) as official:
        entry = prepare(Contender("official", official=True), RECIPE.model, "train", official, CPU)
        check_parity(entry, "train", official, CPU)
        assert entry.head.model.config.__class__.__mro__[1] is Fields
    assert "pydantic" not in sys.modules


def test_the_official_token_mlp_is_the_same_with_padded_rows(official_path):
    padded = Contender("padded", official=True, padded=16)
    with official_code(official_path) as official:
        entry = prepare(padded, RECIPE.model, "train", official, CPU)
        assert type(entry.head.model.inner.L_level.layers[0].mlp_t).__name__ == "PaddedSwiGLU"
        check_parity(entry, "train", official, CPU)
    assert 0 < entry.errors["one_cycle"] < 1e-5
