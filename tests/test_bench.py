"""The benchmarks' arithmetic, their refusal to time what differs, and that they run at all.

No test looks at how long anything took.
"""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trm_fast import backends, bench
from trm_fast.backends import Choice
from trm_fast.contenders import (
    CASES,
    Case,
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
    quick,
)

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


def test_ratios_are_of_the_row_over_the_reference():
    rows = [
        timed_row("reference", 10.0, 8.0, 6.0, 4.0),
        timed_row("official", 25.0, 12.0, 9.0, 8.0),
        {"contender": "reference compiled", "available": False, "note": "failed"},
    ]
    want = {"official": {"speedup": 2.0, "wall_median": 2.5, "cpu_median": 1.5}}
    assert bench.ratios(rows, "cpu") == want
    assert bench.ratios(rows, "wall")["official"]["speedup"] == 1.5
    assert bench.ratios(rows[1:], "cpu") == {}


def test_useful_flops_of_the_official_steps():
    """342 and 205 GFLOP: 35 and 21 passes of two blocks of 610 MFLOP per board, 8 boards."""
    config = CASES["official"].model
    block = 2 * 97 * 512 * 3 * (1536 + 512)
    head = 2 * 97 * 512 * 11
    assert bench.useful_flops(config, "train") == 8 * (35 * 2 * block + 3 * head)
    assert bench.useful_flops(config, "inference") == 8 * (21 * 2 * block + head)


def test_useful_flops_of_attention():
    config = replace(CASES["attention"].model, H_cycles=1, L_cycles=1, L_layers=1, batch_size=1)
    block = 2 * (4 * 97 * 512**2 + 2 * 97 * 97 * 512 + 3 * 97 * 512 * 1536)
    assert bench.useful_flops(config, "inference") == 2 * block + 2 * 97 * 512 * 11


@pytest.mark.parametrize("name", ["official", "recipe"])
@pytest.mark.parametrize(("step", "products"), [("train", 3), ("inference", 1)])
def test_the_flops_are_those_that_run(name, step, products):
    """As PyTorch counts them; only the halting head is left out."""
    config = quick(CASES[name]).model
    entry = prepare(Contender("reference"), config, step, None, CPU)
    with FlopCounterMode(display=False) as counter:
        entry.run()
    q_head = 2 * config.batch_size * config.hidden_size * config.q_logits
    want = bench.useful_flops(config, step) + products * q_head
    assert counter.get_total_flops() == want


def test_the_own_width_contender_has_the_official_rounding():
    own = Contender("official, own width", official=True, own_width=True)
    assert own in contenders(CASES["recipe"], CPU, compiling="never")
    assert own not in contenders(CASES["official"], CPU, compiling="never")
    config = effective_config(CASES["recipe"], own)
    assert (config.channel_width, config.token_width) == (256, 256)
    config = effective_config(CASES["recipe"], Contender("official", official=True))
    assert (config.channel_width, config.token_width) == (96, 96)
    assert bench.useful_flops(effective_config(CASES["recipe"], own), "train") / bench.useful_flops(
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


def test_nothing_is_timed_after_failed_parity(monkeypatch, capsys):
    def broken(*_):
        raise ParityError("reference compiled, train step: loss differs; nothing was timed")

    monkeypatch.setattr(bench, "check_parity", broken)
    monkeypatch.setattr(bench, "contenders", lambda *_: [Contender("reference"), Contender("b")])
    monkeypatch.setattr(bench.Race, "run", lambda *_: pytest.fail("timed"))
    assert bench.main(["--quick", "--case", "recipe", "--step", "train"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("trm-fast bench: reference compiled, train step: loss differs")


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


def test_the_json_of_a_quick_run_without_the_official_code(capsys):
    arguments = ["--quick", "--compile=never", "--case", "recipe", "--batch", "3", "--rounds", "4"]
    assert bench.main([*arguments, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == 1
    for key in ("date", "version", "commit", "torch", "triton", "device", "threads", "wait_policy"):
        assert key in found
    assert found["clock"] == ("cpu" if torch.get_num_threads() == 1 else "wall")
    assert set(found["peak_gflop_per_s"]) == {"float32"}
    assert [(r["case"], r["step"]) for r in found["results"]] == [
        ("recipe", "train"),
        ("recipe", "inference"),
    ]
    result = found["results"][0]
    assert result["config"]["batch_size"] == 3
    assert result["ratios"] == {}
    reference, *absent = result["rows"]
    assert reference["contender"] == "reference"
    assert reference["runs"] == 4
    assert 0 < reference["wall_ms"]["min"] <= reference["wall_ms"]["median"]
    assert 0 <= reference["cpu_ms"]["min"] <= reference["cpu_ms"]["median"]
    assert reference["saved_mib"] > 0
    config = RECIPE.model
    flops = bench.useful_flops(replace(config, batch_size=3), "train")
    assert reference["useful_gflop"] == pytest.approx(flops / 1e9)
    assert reference["fraction_of_peak"] == pytest.approx(
        reference["gflop_per_s"] / found["peak_gflop_per_s"]["float32"]
    )
    assert absent == [
        {"contender": name, "available": False, "note": "no official code given: --official PATH"}
        for name in ("official", "official, own width")
    ]


def test_the_table_shows_ratios_and_reasons():
    rows = [timed_row("reference", 10, 8, 6, 4), timed_row("official", 25, 12, 9, 8)]
    for r in rows:
        r |= {"useful_gflop": 2.0, "gflop_per_s": 50.0, "fraction_of_peak": 0.5, "saved_mib": None}
    result = {
        "case": "recipe",
        "about": "a case",
        "step": "train",
        "config": RECIPE.model.to_dict(),
        "rows": [*rows, {"contender": "c", "available": False, "note": "failed: why"}],
        "ratios": bench.ratios(rows, "cpu"),
    }
    lines = bench.table(result).splitlines()
    assert lines[0] == "recipe, train step: a case, float32, B=2"
    assert [line.split()[0] for line in lines[3:]] == ["reference", "official", "c"]
    assert lines[3].split()[1:5] == ["10.0", "8.0", "6.0", "4.0"]
    assert lines[4].endswith("2.00x")
    assert lines[5].endswith("failed: why")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--official", "nowhere"], "nowhere: not a checkout of the official code"),
        (["--batch", "0"], "batch_size"),
        (["--dtype", "bfloat"], "forward_dtype"),
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


def test_saved_bytes_follow_the_policy():
    """What "recompute" keeps is less than what "save" keeps, and weights are not counted."""
    kept = {}
    for policy in ("save", "recompute"):
        config = replace(RECIPE.model, policy=policy)
        kept[policy] = bench.kept_for_backward(
            prepare(Contender("reference"), config, "train", None, CPU)
        )
    assert 0 < kept["recompute"] < kept["save"]


def test_the_clocks_are_cleared_of_warm_up():
    race = bench.set_up(RECIPE, "inference", None, CPU, compiling="never")
    assert race.entries[0].wall == []
    race.run(3)
    assert [len(e.wall) for e in race.entries] == [3]
    assert [len(e.cpu) for e in race.entries] == [3]


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
    assert names == [c.name for c in contenders(case, CPU, compiling="never")]
    result = race.result({case.model.forward_dtype: 100.0})
    assert set(result["ratios"]) == set(names[1:])


def test_pytest_benchmark_runs_without_the_official_code(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench/bench_model.py", "bench/bench_swiglu.py"]
        + ["--benchmark-only", "--bench-quick", "--compile=never", "-q", "-p", "no:cacheprovider"]
        + ["--bench-json", str(tmp_path / "out.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 passed" in done.stdout
    assert "recipe, train step" in done.stdout
    assert "no official code given: --official PATH" in done.stdout
    assert "swiglu (channel), both: float32, B=2" in done.stdout
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert len(found["results"]) == 6
    assert [(r["op"], r["direction"]) for r in found["ops"]] == [
        ("swiglu", "forward"),
        ("swiglu", "both"),
    ]


def test_the_reference_stays_the_reference_where_auto_takes_kernels():
    config = replace(RECIPE.model, backend="auto")
    assert prepare(Contender("reference"), config, "train", None, CPU).config.backend == "reference"
    kernels = Contender("triton", backend="auto")
    assert prepare(kernels, config, "train", None, CPU).config.backend == "auto"


def test_fused_operations_are_a_contender_named_after_their_backends(monkeypatch):
    assert fused(RECIPE.model, CPU) == ""
    choices = [Choice("inject", "triton", ""), Choice("swiglu", "reference", "")]
    monkeypatch.setattr(backends, "report", lambda *_: choices)
    assert fused(RECIPE.model, CPU) == "triton"
    found = contenders(RECIPE, CPU, compiling="never")
    assert found[:2] == [Contender("reference"), Contender("triton", backend="auto")]


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
