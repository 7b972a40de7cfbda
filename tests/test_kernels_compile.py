"""What decides a kernel's machine code, what is read of the compiler's output, cache and processes.

Nothing is compiled here; tests/test_kernels_report.py does that, through the command.
"""

import json
import os
import struct
from dataclasses import replace
from typing import Any

import pytest
import torch
from launches import CLEAN, KERNEL, OTHER, ROWS, arguments, compiled, meta

from trm_fast.kernels import _compile
from trm_fast.kernels._compile import Compiled, Variant
from trm_fast.kernels._runtime import Launch, descriptor

__all__ = ["compiled"]  # a fixture

SETTINGS = ("num_warps", "num_stages")


def variant(arch: int = 90, **changes: Any) -> Variant:
    return _compile.variant(Launch(KERNEL, ROWS[arch, 16], arguments(**changes)), arch)


# --- what of a launch decides the machine code ---


def test_arguments_are_typed_as_a_launch_types_them():
    blocks = descriptor(meta(97, 512), [64, 32], ROWS[90, 16])
    of = variant(a_source=blocks, b_ptr=None)
    assert list(of.signature.values()) == [
        *("tensordesc<bf16[64, 32]>", "constexpr", "*bf16", "i32", "i32", "fp32", "constexpr"),
        *("constexpr", "constexpr", "constexpr", "constexpr"),
    ]
    # None, and integers that are 1, are compiled in as well.
    assert of.constants == {(1,): None, (6,): 1, (7,): 512, (8,): False, (9,): 64, (10,): False}
    known = {position[0] for position, attr in of.attrs.items() if attr}
    assert known == {2, 3}  # pointers, and integers that are multiples of 16
    assert of.attrs[3,] == [["tt.divisibility", 16]]
    assert of.options == {"num_warps": 8, "num_stages": 2}
    assert (of.module, of.function, of.arch) == ("launches", "_sum_kernel", 90)


def test_the_wait_and_the_launch_that_needs_it_are_compiled_together():
    of = variant(PDL=True)
    assert of.constants[10,] is True
    assert of.options == {"num_warps": 8, "num_stages": 2, "launch_pdl": True}
    assert of.key != variant().key


@pytest.mark.parametrize("arch, compiled_for", [(80, 89), (90, 90), (100, 100)])
def test_e4m3_is_compiled_for_the_one_of_sm_8x_that_has_it(arch, compiled_for):
    narrow = meta(97, 512, dtype=torch.float8_e4m3fn)
    for given in (narrow, descriptor(narrow, [64, 32], ROWS[90, 16])):
        of = variant(arch, a_source=given)
        assert of.arch == compiled_for
        assert "fp8e4nv" in of.signature["a_source"]
    assert variant(arch).arch == arch


def test_a_large_integer_needs_64_bits():
    assert variant(count=2**31).signature["count"] == "i64"


@pytest.mark.parametrize(
    "changes",
    [
        {"b_ptr": None},
        {"b_ptr": meta(97, 512)},
        {"count": 97},
        {"count": 1},
        {"WIDTH": 256},
        {"FAST": True},
        {"a_source": descriptor(meta(97, 512), [64, 32], ROWS[90, 16])},
    ],
)
def test_what_changes_the_code_changes_the_key(changes):
    assert variant(**changes).key != variant().key


def test_the_key_tells_architectures_warps_and_kernels_apart():
    row = ROWS[90, 16]
    launches = [
        *(Launch(KERNEL, row, arguments()), Launch(OTHER, row, arguments())),
        *(Launch(KERNEL, replace(row, **{name: 4}), arguments()) for name in SETTINGS),
    ]
    keys = {_compile.variant(launch, arch).key for launch in launches for arch in (80, 90, 100)}
    assert len(keys) == 12


@pytest.mark.parametrize(
    ("place", "name"), [(_compile, "SCHEMA"), (_compile.triton, "__version__")]
)
def test_another_compiler_or_schema_makes_another_key(monkeypatch, place, name):
    before = variant().key
    monkeypatch.setattr(place, name, "other")
    _compile._binder.cache_clear()
    assert variant().key != before
    _compile._binder.cache_clear()


def test_what_a_compiler_does_not_see_leaves_the_key():
    assert variant(half=99, out_ptr=meta(5, 512), eps=0.5).key == variant().key


# --- what the compiler's tools print ---

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_linear_kernel' for 'sm_90a'
ptxas info    : Function properties for _linear_kernel
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers
ptxas info    : Compile time = 137.739 ms
"""


def test_registers_and_spills_are_read():
    log = PTXAS.format(stack=16, stores=24, loads=32, registers=159)
    assert _compile.read_ptxas(log) == {
        "registers": 159,
        "stack": 16,
        "spill_stores": 24,
        "spill_loads": 32,
        "serialized": False,
    }
    newer = log.replace("ptxas info", "ptxas-blackwell info")
    assert _compile.read_ptxas(newer) == _compile.read_ptxas(log)


def test_serialized_instructions_are_noticed():
    log = PTXAS.format(stack=0, stores=0, loads=0, registers=90) + (
        "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to non wgmma instructions defining accumulator registers\n"
    )
    assert _compile.read_ptxas(log)["serialized"] is True


def test_a_log_that_does_not_tell_is_an_error():
    with pytest.raises(ValueError, match="did not tell registers and spills: 'nothing'"):
        _compile.read_ptxas("nothing\n")


SASS = """\t.headerflags\t@"EF_CUDA_64BIT_ADDRESS EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/               @P4 BRA 0x320 ;
        /*0020*/                   UTMALDG.2D [UR16], [UR4], desc[UR18] ;
        /*0030*/              @!P0 LDG.E.128 R4, desc[UR6][R4.64] ;
        /*0040*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR12], R24 ;
        /*0050*/              @UP1 UTCHMMA gdesc[UR14], gdesc[UR16], tmem[UR10] ;
        /*0060*/                   LDGSTS.E.BYPASS.128 [R7], desc[UR6][R8.64] ;
        /*12350*/                  NOP;
"""


def test_instructions_are_counted_for_each_kernel():
    first, second = _compile.read_sass(SASS, [64, 64])
    assert first == ({"UTMALDG": 1, "LDG": 1}, False)
    assert second == ({"HGMMA": 1, "UTCHMMA": 1, "LDGSTS": 1}, False)


@pytest.mark.parametrize(
    ("code", "waits"),
    [
        ("LDC ACQBULK PREEXIT LDG", True),
        ("LDC ACQBULK IMAD PREEXIT LDS BAR UTMALDG STG", True),
        ("ACQBULK PREEXIT", True),
        ("LDC LDG", False),
        ("LDC ACQBULK LDG", False),
        ("PREEXIT ACQBULK LDG", False),  # the order is the kernels' rule
        *((f"{name} ACQBULK PREEXIT", False) for name in ("LDG", "ST", "UTMALDG", "LDGSTS")),
        *((f"ACQBULK {name} PREEXIT", False) for name in ("LD", "STG", "ATOMG", "REDG", "UBLKCP")),
    ],
)
def test_a_kernel_that_waits_touches_no_global_memory_before(code, waits):
    assert _compile.waits_first(code.split()) is waits


def test_a_disassembly_of_other_length_is_an_error():
    with pytest.raises(ValueError, match="8 instructions in 144 bytes"):
        _compile.read_sass(SASS, [64, 80])


def elf(sections: dict[str, bytes]) -> bytes:
    """An ELF file of these sections, as far as `instructions` reads one."""
    names = b"".join(name.encode() + b"\0" for name in [*sections, ".shstrtab"])
    bodies = [*sections.values(), names]
    file, headers, name_at = bytearray(64), b"", 0
    for name, body in zip([*sections, ".shstrtab"], bodies, strict=True):
        headers += struct.pack("<IIQQQQIIQQ", name_at, 1, 0, 0, len(file), len(body), 0, 0, 1, 0)
        file += body
        name_at += len(name) + 1
    struct.pack_into("<Q", file, 0x28, len(file))
    struct.pack_into("<HHH", file, 0x3A, 64, len(bodies), len(bodies) - 1)
    return bytes(file) + headers


def test_instructions_are_those_of_every_function():
    file = elf({".nv.info": b"abc", ".text._a": b"1234", ".data": b"x", ".text._b": b"56"})
    assert _compile.instructions(file) == b"123456"


def test_an_error_shows_its_cause_and_its_last_line():
    try:
        try:
            raise ValueError("at 3:4:\n  tl.store(x)\n  ^\nwidths differ\n   ^")
        except ValueError as inner:
            raise RuntimeError("at 9:9:\n ^") from inner
    except RuntimeError as error:
        assert _compile.one_line(error) == "ValueError: widths differ"
    assert _compile.one_line(KeyError()) == "KeyError: no message"


# --- the cache, and the processes ---


def test_results_are_kept_and_found_again(compiled, tmp_path):
    some = [variant(), variant(count=97), variant()]
    first, fresh = _compile.compile_all(some, 2, tmp_path / "a" / "b")
    assert (len(compiled), fresh) == (2, 2)
    again, fresh = _compile.compile_all(some[:1], 2, tmp_path / "a" / "b")
    assert (len(compiled), fresh) == (2, 0)
    assert again == {some[0].key: first[some[0].key]}
    assert again[some[0].key] == replace(CLEAN, registers=1)
    assert [p.suffix for p in (tmp_path / "a" / "b").iterdir()] == [".json", ".json"]


def test_without_a_folder_nothing_is_kept(compiled):
    for _ in range(2):
        _compile.compile_all([variant()], 1, None)
    assert len(compiled) == 2


def test_a_kernel_that_does_not_compile_is_tried_again(compiled, tmp_path):
    of = variant(count=2**40)
    for _ in range(2):
        assert _compile.compile_all([of], 1, tmp_path) == ({of.key: "no"}, 1)
    assert list(tmp_path.iterdir()) == []


def damaged(whole: str) -> list[str]:
    kept = json.loads(whole)
    return [
        *("", whole[: len(whole) // 2], "[1, 2]", "null", "\x00\xff"),
        json.dumps({**kept, "registers": "many"}),
        json.dumps({**kept, "dot": 1}),
        json.dumps({**kept, "waits": None}),
        json.dumps({**kept, "mix": {"STG": None}}),
        json.dumps({name: value for name, value in kept.items() if name != "shared"}),
        json.dumps({**kept, "new": 1}),
    ]


def test_a_damaged_result_is_made_anew(compiled, tmp_path):
    of = variant()
    _compile.compile_all([of], 1, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_text(encoding="utf-8")
    for count, text in enumerate(damaged(whole), start=2):
        path.write_text(text, encoding="utf-8")
        results, fresh = _compile.compile_all([of], 1, tmp_path)
        assert (fresh, len(compiled)) == (1, count), text
        assert _compile.load(tmp_path, of.key) == results[of.key], text


def test_a_folder_that_cannot_be_written_is_no_error(compiled, tmp_path):
    (tmp_path / "file").write_text("")
    of = variant()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        results, _ = _compile.compile_all([of], 1, folder)
        assert isinstance(results[of.key], Compiled)


def test_the_cache_folder_follows_the_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("TRM_FAST_CACHE", str(tmp_path))
    assert _compile.cache_folder() == tmp_path / "aot"
    monkeypatch.delenv("TRM_FAST_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert _compile.cache_folder() == tmp_path / "home" / ".cache" / "trm_fast" / "aot"


def crashing_batch(batch: list[Variant]) -> list[Compiled | str]:
    if any(of.signature["count"] == "i64" for of in batch):
        os._exit(13)
    return [CLEAN for _ in batch]


def test_a_crash_of_the_compiler_costs_its_kernel_only(monkeypatch):
    monkeypatch.setattr(_compile, "compile_batch", crashing_batch)
    good = [variant(arch, count=count) for arch in (80, 90) for count in (16, 17)]
    bad = variant(count=2**40)
    results, _ = _compile.compile_all([*good, bad], 2, None)
    assert results.pop(bad.key) == "the compiler crashed"
    assert results == {of.key: CLEAN for of in good}
