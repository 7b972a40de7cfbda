"""The compile report: from an op's examples to lines, the gate, the table and the command.

Nothing is compiled here except by the last test, which starts the command as a user would, with
the interpreter's variable set.
"""

import json
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launches import CLEAN, KERNEL, ROWS, arguments, compiled

from trm_fast import ops
from trm_fast.kernels import _compile, _runtime, report
from trm_fast.kernels._compile import Compiled
from trm_fast.kernels._runtime import architecture, run

__all__ = ["compiled"]  # a fixture

TENSOR_MIX = {80: {"HMMA": 4}, 90: {"HGMMA": 4}, 100: {"UTCHMMA": 4}}


# --- from examples to lines ---


def examples(make: Callable[..., torch.Tensor]) -> Iterator[None]:
    like = make(97, 512)
    row = ROWS[architecture(like.device), like.element_size() * 8]
    for changes in ({}, {"half": 99}, {"b_ptr": None}, {"FAST": True, "count": 97}):
        args = arguments(a_source=like, out_ptr=make(97, 512), **changes)
        args.pop("BLOCK_M")
        run(KERNEL, (1,), row, like, **args)
        yield


def failing(make: Callable[..., torch.Tensor]) -> Iterator[None]:
    yield from examples(make)
    raise RuntimeError("too wide")


def lines_of(module: Any, archs: list[int], bits: list[int]) -> tuple[list[report.Line], list[str]]:
    pairs, wrong = report.collect({"inject": module}, archs, bits)
    return [line for line, _ in pairs], wrong


def test_different_launches_are_listed_once_with_what_tells_them_apart():
    lines, wrong = lines_of(SimpleNamespace(examples=examples), [80], [16])
    assert wrong == []
    assert [tuple(line.flags.values()) for line in lines] == [
        (),
        ("no b",),
        ("count%16", "FAST"),
    ]
    assert {(line.ops, line.kernel, line.dtype) for line in lines} == {(("inject",), "sum", "bf16")}
    assert lines[1].name() == "sum, row sum, sm_80, bf16 (no b)"


def test_all_but_bfloat16_is_compiled_once_for_a_kernel_and_row():
    lines, _ = lines_of(SimpleNamespace(examples=examples), [80, 90, 100], [16, 32])
    counts: dict[tuple[int, str], int] = {}
    for line in lines:
        key = (line.row.arch, line.dtype)
        counts[key] = counts.get(key, 0) + 1
    archs = (80, 90, 100)
    assert counts == {
        **{(80, "bf16"): 3, (90, "bf16"): 4, (100, "bf16"): 3},  # one of sm_90 with PDL
        **{(arch, "fp32"): 1 for arch in archs},
        (90, "fp16"): 1,
    }


def test_one_launch_of_each_kernel_and_row_is_compiled_with_pdl_on_sm_90(monkeypatch):
    lines, _ = lines_of(SimpleNamespace(examples=examples), [80, 90, 100], [16, 32])
    (pdl,) = (one for one in lines if one.pdl)
    assert (pdl.row.arch, pdl.dtype, tuple(pdl.flags.values())) == (90, "bf16", ("PDL",))
    monkeypatch.setattr(_runtime, "_pdl", True)  # as TRM_FAST_PDL=1 would
    assert lines_of(SimpleNamespace(examples=examples), [80, 90, 100], [16, 32])[0] == lines


def test_two_ops_that_launch_the_same_share_a_line():
    module = SimpleNamespace(examples=examples)
    pairs, _ = report.collect({"inject": module, "swiglu": module}, [80], [32])
    assert {line.ops for line, _ in pairs} == {("inject", "swiglu")}
    assert len(pairs) == 1


def test_examples_that_fail_are_named_with_their_place():
    lines, (wrong,) = lines_of(SimpleNamespace(examples=failing), [80], [16])
    assert len(lines) == 3
    shown = r"inject, sm_80, bf16: the examples failed: RuntimeError: too wide "
    assert re.fullmatch(shown + r"\(test_kernels_report\.py:\d+\)", wrong)


def test_a_module_without_examples_is_named():
    assert lines_of(SimpleNamespace(), [80], [16]) == (
        [],
        ["inject: the module has no function `examples`"],
    )


# --- the gate ---


def clean(arch: int, bits: int) -> Compiled:
    return replace(CLEAN, mix=TENSOR_MIX[arch] if bits == 16 else {"FFMA": 64})


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_a_clean_kernel_has_no_problem(arch, bits):
    assert list(report.problems(clean(arch, bits), arch, bits)) == []


def mixed(**mix: int) -> dict[str, Any]:
    return {"mix": mix}


@pytest.mark.parametrize(
    ("arch", "bits", "changes", "problem"),
    [
        (90, 16, {"spill_stores": 8}, "spills 8 + 0 bytes of registers per thread"),
        (90, 16, {"spill_loads": 4}, "spills 0 + 4 bytes of registers per thread"),
        (90, 16, {"stack": 16}, "uses local memory: 16 bytes of stack, 0 instructions"),
        (80, 32, mixed(LDL=1, FFMA=1), "uses local memory: 0 bytes of stack, 1 instructions"),
        (80, 32, mixed(STL=2, FFMA=1), "uses local memory: 0 bytes of stack, 2 instructions"),
        (90, 16, {"registers": 256, "warps": 4}, "needs 256 registers x 128 threads, of 65536"),
        (90, 16, {"registers": 168, "warps": 16}, "needs 168 registers x 512 threads, of 65536"),
        (80, 16, {"shared": 101377}, "needs 99.0 KiB of shared memory, of 99"),
        (90, 16, {"shared": 232449}, "needs 227.0 KiB of shared memory, of 227"),
        (100, 16, {"shared": 232449}, "needs 227.0 KiB of shared memory, of 227"),
        (100, 16, {"tensor_memory": 1024}, "needs 1024 columns of tensor memory, of 512"),
        (90, 16, {"scratch": 384}, "wants 384 bytes of global scratch memory at each launch"),
        (90, 16, {"serialized": True}, "wgmma instructions are serialized"),
        (90, 16, mixed(ACQBULK=1, HGMMA=4), "has ACQBULK without PDL"),
        (90, 16, mixed(ACQBULK=1, PREEXIT=1, HGMMA=4), "has ACQBULK and PREEXIT without PDL"),
        (80, 16, mixed(FFMA=9), "multiplies matrices without HMMA"),
        (90, 16, mixed(FFMA=9), "multiplies matrices without HGMMA"),
        (90, 16, mixed(HGMMA=4, HMMA=2), "multiplies matrices with 2 HMMA instead of HGMMA"),
        (100, 16, mixed(HMMA=9), "multiplies matrices without UTCHMMA"),
        (80, 8, mixed(FFMA=9), "multiplies matrices without QMMA"),
        (90, 8, mixed(FFMA=9), "multiplies matrices without QGMMA"),
        (90, 8, mixed(QGMMA=4, HGMMA=2), "multiplies matrices with 2 HGMMA instead of QGMMA"),
        (100, 8, mixed(UTCQMMA=4, HMMA=2), "multiplies matrices with 2 HMMA instead of UTCQMMA"),
        (80, 32, mixed(HMMA=9), "multiplies float32 matrices in less: HMMA"),
        (90, 32, mixed(HGMMA=9, FFMA=1), "multiplies float32 matrices in less: HGMMA"),
        (100, 32, mixed(UTCHMMA=9), "multiplies float32 matrices in less: UTCHMMA"),
    ],
)
def test_each_rule_is_broken_once(arch, bits, changes, problem):
    assert list(report.problems(replace(clean(arch, bits), **changes), arch, bits)) == [problem]


def test_with_pdl_a_kernel_has_to_wait_first():
    late = "touches memory before ACQBULK and PREEXIT, or has no such instructions"
    pdl = replace(line(90, 16), pdl=True, flags={"PDL": "PDL"})
    (wrong,) = report.gate([*ALL, pdl], ["inject"], (), *WHOLE)
    assert wrong == f"sum, row sum, sm_90, bf16 (PDL): {late}"
    waiting = replace(clean(90, 16), waits=True, mix={"HGMMA": 4, "ACQBULK": 1, "PREEXIT": 1})
    assert report.gate([*ALL, replace(pdl, result=waiting)], ["inject"], (), *WHOLE) == []


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        (80, {"shared": 101376}),
        (90, {"shared": 232448}),
        (90, {"registers": 255, "warps": 8}),
        (90, {"registers": 168, "warps": 12}),
        (90, {"dot": False, "mix": {"HMMA": 1}}),
    ],
)
def test_what_is_just_allowed(arch, changes):
    assert list(report.problems(replace(clean(arch, 16), **changes), arch, 16)) == []


def test_a_kernel_that_does_not_compile_has_that_problem_alone():
    assert list(report.problems("ValueError: no", 90, 16)) == ["does not compile: ValueError: no"]


def line(arch: int, bits: int, result: Compiled | str | None = None) -> report.Line:
    made = clean(arch, bits) if result is None else result
    return report.Line(("inject",), "sum", ROWS[arch, bits], report.BITS[bits], {}, made)


ALL = [line(arch, bits) for arch, bits in ROWS]
WHOLE = ([80, 90, 100], [16, 32])


def test_the_gate_passes_when_all_rows_are_clean():
    assert report.gate(ALL, ["inject"], list(ROWS.values()), *WHOLE) == []


def test_a_row_that_no_example_reaches_is_named():
    unused = replace(ROWS[90, 16], kernel="other")
    rows = [*ROWS.values(), unused]
    assert report.gate(ALL, ["inject"], rows, *WHOLE) == [
        "row other, sm_90, 16 bits, M64: no example reaches it"
    ]
    assert report.gate(ALL, ["inject"], rows, [80], [16]) == []
    rows[-1] = replace(unused, bits=8)  # what models in 16 bits launch
    (found,) = report.gate(ALL, ["inject"], rows, *WHOLE)
    assert found == "row other, sm_90, 8 bits, M64: no example reaches it"
    assert report.gate(ALL, ["inject"], rows, [90], [32]) == []


def test_e4m3_is_listed_with_the_states_it_comes_from():
    row = replace(ROWS[90, 16], bits=8)

    def narrow(make: Callable[..., torch.Tensor]) -> Iterator[None]:
        like = make(97, 512)
        args = arguments(a_source=like.to(torch.float8_e4m3fn), out_ptr=like)
        args.pop("BLOCK_M")
        run(KERNEL, (1,), row, like, **args)
        yield

    lines, wrong = lines_of(SimpleNamespace(examples=narrow), [90], [16, 32])
    assert wrong == []
    types = [(line.dtype, line.pdl) for line in lines]
    plain = [(f"e4m3+{dtype}", False) for dtype in ("bf16", "fp32", "fp16")]
    assert types == [*plain, ("e4m3+bf16", True)]
    assert lines[0].name() == "sum, row sum, sm_90, e4m3+bf16"


def test_an_op_needs_a_clean_launch_everywhere():
    missing = "inject: no launch without problems on sm_90 with 32 bits"
    without = [one for one in ALL if (one.row.arch, one.row.bits) != (90, 32)]
    assert report.gate(without, ["inject"], (), *WHOLE) == [missing]
    dirty = line(90, 32, replace(clean(90, 32), stack=8))
    spoilt = report.gate([*without, dirty], ["inject"], (), *WHOLE)
    assert spoilt == [
        "sum, row sum, sm_90, fp32: uses local memory: 8 bytes of stack, 0 instructions",
        missing,
    ]


# --- the table ---


def test_blocks_of_a_multiprocessor():
    assert report.blocks(replace(CLEAN, registers=97, warps=8, shared=99 * 1024), 80) == (2, 1)
    assert report.blocks(replace(CLEAN, registers=168, warps=12, shared=0), 90) == (1, 5)
    assert report.blocks(replace(CLEAN, registers=32, warps=4, shared=0), 90) == (16, 16)


def test_the_table_is_aligned():
    grown = replace(CLEAN, warps=12, spill_loads=4)
    flagged = replace(line(90, 16, grown), flags={"h": "no h", "K": "K=512"})
    text = report.table([flagged, line(80, 32, "ValueError: no")])
    head, first, second = text.split("\n")
    cells = [re.split(r" {2,}", row) for row in (head, first, second)]
    assert cells[0] == [
        *("kernel", "row", "sm", "type", "tiles", "warps", "stages", "regs", "smem KiB"),
        *("spill", "blocks", "flags", "instructions"),
    ]
    assert cells[1] == [
        *("sum", "sum", "90", "bf16", "M64", "8+", "2", "128", "64.0"),
        *("4", "1/3", "no h, K=512", "HGMMA 4 STG 8"),
    ]
    assert cells[2] == ["sum", "sum", "80", "fp32", "M64", "8", "2", *"----", "does not compile"]
    at = {name: head.index(name) for name in ("tiles", "regs", "instructions")}
    assert first[at["instructions"] :] == "HGMMA 4 STG 8"
    assert second[at["instructions"] :] == "does not compile"
    assert second[at["tiles"] :].startswith("M64") and second[at["regs"] :].startswith("-")


# --- the command ---


def test_the_ops_are_those_of_the_engine():
    assert set(report.OPS) == set(ops.OP_NAMES)


def test_an_op_without_a_module_and_one_that_breaks_are_told_apart(monkeypatch):
    def find(name: str) -> object | None:
        return None if name.endswith("swiglu") else object()

    def load(name: str) -> object:
        if name.endswith("inject"):
            raise ImportError("no such helper")
        return name

    fake = SimpleNamespace(util=SimpleNamespace(find_spec=find), import_module=load)
    monkeypatch.setattr(report, "importlib", fake)
    modules, absent, wrong = report.import_ops(["inject", "swiglu", "token_mix"])
    assert modules == {"token_mix": "trm_fast.kernels.token_mix"}
    assert absent == ["swiglu"]
    assert wrong == ["inject: cannot be imported: ImportError: no such helper"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--op", "tokenmix"], "argument --op: invalid choice: 'tokenmix' (choose from "),
        (["--arch", "70"], "argument --arch: invalid choice: 70 (choose from 80, 90, 100)"),
        (["--bits", "8"], "argument --bits: invalid choice: 8 (choose from 16, 32)"),
        (["--jobs", "0"], "argument --jobs: 0 is not a number of processes"),
    ],
)
def test_unknown_words_are_refused(capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        report.main(words)
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().split("\n")[-1]
    assert message in last
    if words[0] == "--op":
        assert all(op in last for op in report.OPS)


def test_a_child_that_interprets_all_the_same_stops(monkeypatch, capsys):
    monkeypatch.setattr(report.triton.knobs.runtime, "interpret", True)
    monkeypatch.setattr(report, "_without_interpreter", lambda argv: 0)
    with pytest.raises(SystemExit):
        report.main(["--child"])
    assert "interpreter is on here although" in capsys.readouterr().err


@pytest.mark.parametrize(("check", "status"), [(True, 1), (False, 0)])
def test_only_a_check_fails(monkeypatch, capsys, tmp_path, compiled, check, status):
    found = {"inject": SimpleNamespace(examples=examples), "token_mix": SimpleNamespace()}
    broken = ["rope_attention: cannot be imported"]
    monkeypatch.setattr(report, "import_ops", lambda names: (found, ["swiglu"], [*broken]))
    monkeypatch.setattr(report, "ROWS", tuple(ROWS.values()))
    given = Namespace(
        op=None, arch=[80, 90], bits=[16, 32], check=check, jobs=1, no_cache=True,
        json=tmp_path / "report.json",
    )  # fmt: skip
    # Every made-up result has HGMMA: right on sm_90 with 16 bits and nowhere else.
    assert report._report(given) == status
    shown = capsys.readouterr().out.strip().split("\n")
    wrong = shown[shown.index("") + 1 : -2]
    assert wrong[:2] == [*broken, "token_mix: the module has no function `examples`"]
    assert "sum, row sum, sm_80, bf16: multiplies matrices without HMMA" in wrong
    ours = [text for text in wrong if "sm_90, bf16" in text or "sm_90, fp16" in text]
    assert len(ours) == 1 and "(PDL): touches memory before" in ours[0]
    assert re.fullmatch(
        rf"Triton \S+: 10 launches, 10 compiled anew, \d+ s, {len(wrong)} violations", shown[-2]
    )
    assert shown[-1] == "no kernel for swiglu"
    written = json.loads(given.json.read_text(encoding="utf-8"))
    assert written["violations"] == wrong
    assert {one["result"]["shared"] for one in written["launches"]} == {65536}


def test_the_command_compiles_although_the_session_interprets(monkeypatch, capfd, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRM_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(report.triton.knobs.runtime, "interpret", True)
    words = ["--op", "embed_reset", "--arch", "90", "--bits", "16", "--check"]
    status = report.main([*words, "--json", str(tmp_path / "out.json")])
    text = capfd.readouterr().out
    assert status == 0, text
    assert f"Triton {report.triton.__version__}: " in text and "no violations" in text
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    pdl = {one["kernel"]: one["result"] for one in written["launches"] if one["pdl"]}
    made = {one["kernel"]: one["result"] for one in written["launches"] if not one["pdl"]}
    assert set(pdl) == set(made)
    assert all(one["waits"] and one["mix"]["ACQBULK"] == 1 for one in pdl.values())
    assert set(made) == {"embed_reset_fwd", "embedding_bwd"}
    assert made["embed_reset_fwd"]["mix"].keys() >= {"LDG", "STG"}
    assert not made["embed_reset_fwd"]["dot"]
    assert made["embedding_bwd"]["dot"] and made["embedding_bwd"]["mix"]["HGMMA"]
    assert all(0 < one["registers"] <= 255 and one["warps"] in (4, 8) for one in made.values())
    kept = list((tmp_path / "aot").iterdir())
    assert len(kept) == len(written["launches"]) >= 4
    assert all(_compile.load(path.parent, path.stem) is not None for path in kept)
