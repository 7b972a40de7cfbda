"""The GPU suite without a GPU: predictions, the search for settings, the command, the dry run.

No test looks at how long anything took.
"""

import importlib.util
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trm_fast import backends, reference
from trm_fast.contenders import ParityError
from trm_fast.extension import library
from trm_fast.op_cases import case
from trm_fast.ops import OP_NAMES, POLICIES
from trm_fast.suite import compiled, predictions, records, session, tuning, why
from trm_fast.suite.predictions import look_up, operation_ms, planned_ms, product_ms
from trm_fast.suite.session import Item, Session, Skip
from trm_fast.suite.stages import STAGES

ROOT = Path(__file__).resolve().parent.parent
SUITE = ROOT / "bench" / "gpu_suite.py"
CPU = torch.device("cpu")


@pytest.fixture
def dry(tmp_path):
    """A session of a dry run that has a minute left."""
    out = tmp_path / "results.jsonl"
    return Session("A", "A-1", out, time.time() + 60, CPU, tiny=True, program=SUITE)


# Predictions


@pytest.mark.parametrize(
    ("name", "value", "low", "high"),
    [
        ("ours/mlp_t/step", 83, 66, None),
        ("official compiled/mlp_t/step", 150, 133, 174),
        ("official compiled/attention/step", 106, 98, 115),
        ("ours/mlp_t/memory", 16, None, None),
        ("ceilings/matmul 8192", 790, None, None),
    ],
)
def test_what_was_predicted(name, value, low, high):
    found = look_up(name)
    assert (found.value, found.low, found.high) == (value, low, high)
    assert found.ratio(2 * value) == 2


def test_nothing_was_predicted_for_an_unknown_name():
    assert look_up("ceilings/matmul 64") is None


def test_planning_rates():
    """The products of the channel SwiGLU at 580 TFLOP/s, a pass over two states at 2.7 TB/s."""
    rows = 768 * 97
    assert product_ms(rows, 3072, 512).value == pytest.approx(0.404, abs=1e-3)
    assert product_ms(rows, 512, 1536).value == pytest.approx(0.202, abs=1e-3)
    assert planned_ms(0.0, 3 * rows * 512 * 2) == pytest.approx(0.085, abs=1e-3)
    unaligned = product_ms(768 * 512, 1024, 97, aligned=False)
    assert unaligned.low == pytest.approx(78.1 / 300, abs=1e-3)
    assert unaligned.high == pytest.approx(78.1 / 120, abs=1e-3)


def test_a_kernel_s_estimate_goes_before_the_rates():
    mix = case("token_mix", "mlp_t")
    assert operation_ms("token_mix", "mlp_t", "both", *mix.cost("both")).value == 1.60
    inject = case("inject", "sudoku")
    found = operation_ms("inject", "sudoku", "forward", *inject.cost("forward"))
    assert found.value == pytest.approx(305.1 / 2700, abs=1e-4)
    assert found.source == "planning rates"


def test_every_estimate_is_of_a_case():
    for name, directions in predictions.OPERATIONS.items():
        op, one = name.split("/")
        assert set(directions) <= set(case(op, one).directions)


# Launch settings


def linear_row(**changes):
    (row,) = [
        r for r in tuning.launch_table().ROWS if (r.kernel, r.arch, r.bits) == ("linear", 90, 16)
    ]
    tiles = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}
    return replace(row, tiles=tiles, num_warps=8, num_stages=3, **changes)


def test_candidates_are_neighbours():
    found = tuning.candidates(linear_row())
    assert [tuning.settings(row) for row in found] == [
        "linear 128x256x64 w8 s4",
        "linear 128x256x64 w8 s2",
        "linear 128x256x64 w4 s3",
        "linear 64x256x64 w8 s3",
        "linear 128x128x64 w8 s3",
        "linear 128x256x32 w8 s3",
        "linear 128x256x128 w8 s3",
    ]
    assert len(tuning.candidates(linear_row(), limit=2)) == 2
    narrow = replace(linear_row(), tiles={"BLOCK_M": 8, "COLUMNS": 512}, num_stages=1, num_warps=4)
    assert [tuning.settings(row) for row in tuning.candidates(narrow)] == [
        "linear 8x512 w8 s1",
        "linear 4x512 w4 s1",
        "linear 16x512 w4 s1",
    ]


def test_candidates_go_before_the_table_and_leave_it_as_it_was():
    table = tuning.launch_table()
    before, first = table.ROWS, linear_row(at_most={"M": 5})
    with pytest.raises(ZeroDivisionError), tuning.rows_first(first):
        assert list(table.ROWS) == [first, *before]
        like = torch.empty(1, dtype=torch.bfloat16)
        assert table.pick("linear", like, M=5, N=1) is first
        assert table.pick("linear", like, M=6, N=1) is not first
        _ = 1 / 0
    assert table.ROWS is before


def test_rows_that_a_kernel_uses_are_found(dry):
    given = case("swiglu", "channel", "tiny", dtype="float32")
    function = tuning.triton_function(dry, given)
    table = tuning.launch_table()
    before = table.ROWS
    found = tuning.kernel_rows(given, function, dry)
    assert table.ROWS is before
    assert {row.kernel for rows in found.values() for row in rows} == {"swiglu"}
    assert all(row in before for rows in found.values() for row in rows)


def test_a_setting_with_other_results_is_not_timed(dry, monkeypatch):
    """The function here goes by the table, which no kernel does."""
    given = case("swiglu", "channel", "tiny", dtype="float32")
    table = tuning.launch_table()
    good, wrong, broken = (linear_row(measured=m) for m in ("good", "wrong", "broken"))

    def function(gate_up):
        setting = table.ROWS[0].measured
        if setting == "broken":
            raise RuntimeError("out of resource: shared memory")
        return reference.swiglu(gate_up) * (1.5 if setting == "wrong" else 1)

    monkeypatch.setattr(tuning, "_median_ms", lambda *_: 2.0)
    base, *rows = tuning.try_rows(dry, given, "forward", function, [good, wrong, broken])
    assert (base["name"], base["value"]) == ("rows/swiglu/channel/forward/as in the table", 2.0)
    assert [(r["value"], r["unit"]) for r in rows[::2]] == [(2.0, "ms"), (None, "ms")]
    assert rows[0]["note"] == "x1.000 of the table"
    assert rows[0]["row"]["tiles"] == {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}
    assert rows[1]["value"] == pytest.approx(0.5)
    assert (rows[1]["unit"], rows[1]["note"]) == ("relative L2", "WRONG, not timed")
    assert rows[2]["note"] == "out of resource: shared memory"


def stage_b(out, *rows):
    records.append(out, {"run": "B-1", "stage": "B", "item": "x", "status": "ok", "rows": rows})


def test_the_second_round_starts_from_the_slowest_and_its_best(dry):
    with pytest.raises(Skip, match="no operations of stage B"):
        tuning.slowest(dry)

    def ratio(name, value):
        return {"name": name, "value": value, "unit": "ms", "ratio": value}

    def tried(kernel, value):
        tiles = {"kernel": kernel, "tiles": {"BLOCK": int(10 * value)}, "num_warps": 4}
        return {"name": f"rows/swiglu/channel/forward/{value}", "value": value, "row": tiles}

    stage_b(
        dry.out,
        ratio("op/swiglu/channel/both/triton", 3.0),
        ratio("op/inject/sudoku/forward/triton", 1.2),
        ratio("op/inject/sudoku/forward/cuda", 9.0),
        {"name": "op/token_mix/mlp_t/both/triton", "value": None, "unit": "ms"},
        {"name": "rows/swiglu/channel/forward/as in the table", "value": 2.0},
        tried("swiglu", 1.5),
        tried("swiglu", 1.0),
        tried("other", 2.5),
        {"name": "rows/swiglu/channel/forward/none", "value": None, "unit": "ms"},
    )
    assert tuning.slowest(dry) == ("swiglu", "channel", "both")
    best = tuning.best_rows(dry, "swiglu", "channel")
    assert {kernel: row["tiles"] for kernel, row in best.items()} == {"swiglu": {"BLOCK": 10}}


# Counters and memory checks

RAW_PAGE = (
    '==PROF== Connected\n"ID","Kernel Name","gpu__time_duration.sum",'
    '"sm__throughput.avg.pct_of_peak_sustained_elapsed","dram__bytes.sum",'
    '"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio"\n'
    '"","","us","%","Mbyte","inst"\n'
    '"0","_linear_kernel","225.5","81.25","1,305.0","2.5"\n'
    '"1","_gate_up_kernel","401.0","70","610","n/a"\n'
)


def test_counters_are_read_in_base_units():
    first, second = why.raw_page(RAW_PAGE)
    assert first == (
        "_linear_kernel",
        {"stalls": {"long_scoreboard": 2.5}, "ns": 225500, "SM %": 81.25, "DRAM bytes": 1.305e9},
    )
    assert second[1]["stalls"] == {}
    with pytest.raises(RuntimeError, match="no table"):
        why.raw_page("==ERROR== nothing")


@pytest.mark.parametrize(("errors", "wrong"), [(0, False), (3, True)])
def test_memory_errors_are_wrong(dry, monkeypatch, errors, wrong):
    said = (
        f"========= Invalid __global__ read of size 4\n========= ERROR SUMMARY: {errors} errors\n"
    )
    monkeypatch.setattr(why, "_tool", lambda session, name: name)
    monkeypatch.setattr(why, "_run", lambda *_, **__: (1, said))
    found = why.memory_check(dry, "swiglu/channel/both")
    assert next(found)["value"] == errors
    if wrong:
        with pytest.raises(ParityError, match="3 memory errors. Invalid __global__ read"):
            next(found)
    else:
        assert list(found) == []


def test_one_call_of_a_kernel_for_a_profiler(capsys):
    why.run_one("swiglu/channel/both", CPU, 1, tiny=True)
    with pytest.raises(Skip, match="cuda does not serve swiglu: serves NVIDIA GPUs only"):
        why.run_one("swiglu/channel/both/cuda", CPU, 1, tiny=True)
    with pytest.raises(ValueError, match="swiglu has the cases channel"):
        why.run_one("swiglu/chanel/both", CPU, 1, tiny=True)


# The compiled library


def only(monkeypatch, op):
    """As if the library had one operation."""
    monkeypatch.setattr(backends, "EXTENSION_OPS", {"cpp": (op,), "cuda": (op,)})


def test_every_operation_of_the_library_is_checked_in_every_dtype(dry, monkeypatch, extension):
    dry.tiny = False
    only(monkeypatch, "deep_recursion")
    assert compiled.dtypes(dry) == ("bfloat16", "float32")
    dry.device = torch.device("cuda")
    assert compiled.dtypes(dry) == ("bfloat16", "float16", "float32")
    found = [(case.name, policy) for case, policy in compiled.workloads(dry, "float32", "tiny")]
    assert found == [(m, f" {p}") for m in ("mlp_t", "attention") for p in POLICIES]


def test_a_wrong_operation_of_the_library_is_found(dry, monkeypatch, extension):
    only(monkeypatch, "swiglu")
    (row,) = compiled.correct(dry)
    assert row["name"] == "compiled/swiglu/channel/both fp32"
    assert 0 <= row["value"] <= 1
    wrong = {"cpp": lambda gate_up: reference.swiglu(gate_up) * 1.01}
    monkeypatch.setattr(compiled, "functions", lambda *_: (wrong, {}))
    with pytest.raises(ParityError, match="cpp, swiglu .channel., both, seed 0: result 0 is off"):
        list(compiled.correct(dry))


def test_what_the_library_registers_is_checked(dry, monkeypatch, extension):
    only(monkeypatch, "swiglu")
    names = ["trm_fast_ext::swiglu", "trm_fast_ext::swiglu_bwd"]
    assert [r["name"] for r in compiled.registered(dry)] == [
        f"registered/{n}/channel" for n in names
    ]
    checked = []
    monkeypatch.setattr(torch.library, "opcheck", lambda op, args: checked.append((op, len(args))))
    list(compiled.registered(dry))
    ops = torch.ops.trm_fast_ext
    assert checked == [(ops.swiglu.default, 1), (ops.swiglu_bwd.default, 2)]


def test_without_the_library(dry, monkeypatch):
    monkeypatch.setattr(library, "unavailable", lambda kind: f"no compiler for {kind}")
    for item in (compiled.ready, compiled.correct, compiled.registered):
        with pytest.raises(Skip, match="no compiled library: no compiler for cpu"):
            list(item(dry))


# The command


def suite(*arguments):
    return subprocess.Popen(
        [sys.executable, str(SUITE), *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--stage", "D"],
        ["--stage", "A", "--official", "no"],
        ["--stage", "A", "--only", "("],
        ["--stage", "A", "--tiny", "--only", "no such item"],
    ],
)
def test_a_wrong_argument_exits_2(arguments):
    process = suite(*arguments)
    said, _ = process.communicate()
    assert process.returncode == 2, said


@pytest.fixture
def command_module():
    spec = importlib.util.spec_from_file_location("gpu_suite", SUITE)
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path


def test_the_measuring_process_is_told_everything(command_module, monkeypatch, tmp_path, capsys):
    told = {}

    def supervise(command, out, stage, run):
        told.update(command=command, out=out, stage=stage)
        record = {"run": run, "stage": stage, "item": "x", "status": "wrong", "reason": "y"}
        records.append(out, record | {"seconds": 0.0, "rows": []})
        return 0

    monkeypatch.setattr(command_module.supervisor, "supervise", supervise)
    monkeypatch.setattr(command_module, "RESULTS", tmp_path)
    monkeypatch.setattr(command_module, "device_tag", lambda: "nvidia-h100")
    begin = time.time()
    arguments = ["--stage", "C", "--only", "rows", "--budget", "50", "--official", str(tmp_path)]
    arguments += ["--commit", "abc"]
    assert command_module.main(arguments) == 1  # an item was wrong
    given = dict(zip(told["command"][2::2], told["command"][3::2], strict=True))
    assert begin + 50 <= float(given.pop("--until")) <= time.time() + 50
    assert given.pop("--run").startswith("C-")
    assert given == {
        "--stage": "C",
        "--out": str(told["out"]),
        "--official": str(tmp_path),
        "--only": "rows",
        "--commit": "abc",
    }
    assert told["out"].parent == tmp_path
    assert re.fullmatch(r"nvidia-h100-\d{4}-\d\d-\d\d-suite.jsonl", told["out"].name)
    assert "C x: wrong: y\n1 wrong\n" in capsys.readouterr().out


@pytest.mark.parametrize(("only", "left"), [(None, 2), ("rows|curve", 1), ("none", 0)])
def test_some_items_of_a_stage(command_module, monkeypatch, tmp_path, capsys, only, left):
    ran = []
    monkeypatch.setattr(session, "run_stage", lambda s, items, after: ran.extend(items) or 0)
    monkeypatch.setitem(STAGES, "B", [Item("rows x", None, 1), Item("step y", None, 1)])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    arguments = ["--stage", "B", "--tiny", "--run", "r", "--until", "0"]
    arguments += ["--out", str(tmp_path / "out")] + (["--only", only] if only else [])
    threads = torch.get_num_threads()
    assert command_module.main(arguments) == (0 if left else 2)
    torch.set_num_threads(threads)
    assert len(ran) == left
    if not left:
        said = capsys.readouterr().err
        assert "no item of stage B matches 'none'" in said
        assert "there are: rows x, step y" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine could run the stage")
def test_real_sizes_need_a_gpu(tmp_path):
    process = suite("--stage", "C", "--out", str(tmp_path / "out.jsonl"))
    said, _ = process.communicate()
    assert process.returncode == 2
    assert "needs a CUDA GPU; --tiny is the dry run on the CPU" in said


def test_the_stages_name_each_item_once():
    for stage in STAGES.values():
        assert len({item.name for item in stage}) == len(stage)
    gates = [item.name for item in STAGES["A"] if item.gate]
    assert gates[: len(OP_NAMES)] == [f"correct {op}" for op in OP_NAMES]


SKIPPED = (
    "needs a CUDA GPU",
    "no official code given: --official PATH",
    "left out of the dry run",
    "the dry run has one dtype",
    "no compiled backend serves ",
    "no compiled library: ",
    "no Triton kernels for ",
)


def test_the_dry_run_of_every_stage(tmp_path):
    files = {stage: tmp_path / f"{stage}.jsonl" for stage in "AB"} | {"C": tmp_path / "B.jsonl"}
    running = {s: suite("--stage", s, "--tiny", "--out", str(files[s])) for s in "AB"}
    said = {stage: process.communicate()[0] for stage, process in running.items()}
    running["C"] = suite("--stage", "C", "--tiny", "--out", str(files["C"]))
    said["C"], _ = running["C"].communicate()
    for stage, expected in STAGES.items():
        found = records.latest(records.read(files[stage]), stage)
        assert [r["item"] for r in found] == [item.name for item in expected]
        for record in found:
            assert record["status"] in ("ok", "skipped"), record
            assert record["status"] == "ok" or record["reason"].startswith(SKIPPED), record
        assert f"{stage} {expected[-1].name}" in said[stage]
    assert {s: process.returncode for s, process in running.items()} == dict.fromkeys("ABC", 0)
    rows = {
        row["name"]: row
        for path in set(files.values())
        for record in records.read(path)
        for row in record.get("rows", ())
    }
    errors = [row["value"] for name, row in rows.items() if name.startswith("correct/")]
    errors += [row["value"] for name, row in rows.items() if name.startswith("compiled/deep_rec")]
    assert len(errors) > len(OP_NAMES)
    assert all(0 <= error <= 1 for error in errors)
    if library.unavailable("cpu") is None:
        assert rows["registered/trm_fast_ext::deep_recursion_bwd/attention save"]["value"] == 1
        assert rows["compiled library/attention/loss"]["value"] < 1e-5
    assert rows["ours/mlp_t/step"]["predicted"] == 83
    assert rows["ours/mlp_t/loss"]["value"] < 1e-5
    assert rows["ceilings/copy"]["predicted"] == 3000
    assert rows["op/swiglu/channel/both/triton"]["error_over_allowed"] <= 1
    assert any(name.startswith("rows/token_mix/mlp_t/forward/") for name in rows)
    assert not list(tmp_path.glob("*.now"))
    json.dumps(rows, allow_nan=False)
