"""Every kernel compiled ahead of time, without a GPU: resources, instructions, and a gate.

    python -m trm_fast.kernels.report [--op OP ...] [--arch 80 90 100] [--bits 16 32] [--check]

Owns the list of op modules, the table and the gate. Each op module's `examples` calls its host
functions at real sizes on tensors without memory; what they would launch is compiled for each
family of GPUs. `--check` ends with status 1 where a kernel breaks a rule of `problems` or where a
row of `launch.ROWS` or an op is left out. Imported by nothing.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from trm_fast.kernels import _compile
from trm_fast.kernels._compile import Compiled, Variant
from trm_fast.kernels._runtime import ARCHITECTURES, Launch, dependent_launches, recording
from trm_fast.kernels.launch import ROWS, Row

# In the order in which they build on each other; each has a module of its name here.
OPS = (
    *("embed_reset", "inject", "residual_rmsnorm", "swiglu", "linear_rmsnorm", "swiglu_rmsnorm"),
    *("token_mix", "rope_attention", "stablemax_loss", "deep_recursion", "adam_atan2_ema_"),
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BITS = {16: "bf16", 32: "fp32"}

REGISTERS = 65536  # of a multiprocessor; a thread has 255 at most
TENSOR_MEMORY = 512  # columns
# Shared memory in KiB: of a block at most, of a multiprocessor. 80 stands for the consumer cards
# of its family too, which have the least.
SHARED = {80: (99, 100), 90: (227, 228), 100: (227, 228)}
WARPS = {80: 48, 90: 64, 100: 64}  # of a multiprocessor

# What multiplies matrices of 16 and of 8 bits on each, and must be in the code of a kernel that
# does so.
TENSOR_CORES = {
    16: {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"},
    8: {80: "QMMA", 90: "QGMMA", 100: "UTCQMMA"},
}


@dataclass(frozen=True)
class Line:
    """One line of the table: a launch that some ops make, and what became of it.

    Attributes:
        ops: modules whose examples made it.
        flags: argument -> how it shows, of those that tell this launch from others of its kernel.
        pdl: whether it is launched so.
    """

    ops: tuple[str, ...]
    kernel: str
    row: Row
    dtype: str
    flags: Mapping[str, str]
    result: Compiled | str
    pdl: bool = False

    def name(self) -> str:
        flags = ", ".join(self.flags.values())
        shown = f"{self.kernel}, row {self.row.kernel}, sm_{self.row.arch}, {self.dtype}"
        return f"{shown} ({flags})" if flags else shown


def import_ops(ops: Iterable[str]) -> tuple[dict[str, Any], list[str], list[str]]:
    """The modules of those ops that have one, the others, and what failed to be imported."""
    modules, absent, wrong = {}, [], []
    for op in ops:
        name = f"trm_fast.kernels.{op}"
        if importlib.util.find_spec(name) is None:
            absent.append(op)
            continue
        try:
            modules[op] = importlib.import_module(name)
        except Exception as error:  # one op's mistake leaves the others' report whole
            wrong.append(f"{op}: cannot be imported: {_compile.one_line(error)}")
    return modules, absent, wrong


def _maker(dtype: torch.dtype) -> Callable[..., Tensor]:
    def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return make


def record(
    module: Any, arch: int, dtype: str, pdl: bool = False
) -> tuple[list[Launch], str | None]:
    """The launches of a module's examples, and why there are not more if they failed."""
    with recording(arch) as launches, dependent_launches(pdl), torch.no_grad():
        try:
            for _ in module.examples(_maker(DTYPES[dtype])):
                pass
        except Exception as error:  # one op's mistake leaves the others' report whole
            where = error.__traceback__
            while where is not None and where.tb_next is not None:
                where = where.tb_next
            place = where and f"{Path(where.tb_frame.f_code.co_filename).name}:{where.tb_lineno}"
            return launches, f"{_compile.one_line(error)} ({place})"
    return launches, None


def _absent(launch: Launch) -> int:
    return sum(value is None for value in launch.args.values())


def _traits(launch: Launch, of: Variant) -> dict[str, str]:
    """How each argument shows in the table, empty where it is what one expects."""
    traits = {}
    for position, name in enumerate(of.signature):
        short = name.removesuffix("_ptr").removesuffix("_source")
        kind = of.signature[name]
        if name in launch.row.tiles:
            continue
        if (position,) in of.constants:
            value = of.constants[(position,)]
            if value is None:
                traits[name] = f"no {short}"
            elif isinstance(value, bool):
                traits[name] = short if value else ""
            else:
                traits[name] = f"{short}={value}"
        elif kind.startswith("i"):
            traits[name] = "" if of.attrs.get((position,)) else f"{short}%16"
        elif kind[0] in "*t":
            traits[name] = f"{short}:{kind.removeprefix('tensordesc<').split('[')[0].lstrip('*')}"
    return traits


def collect(
    modules: Mapping[str, Any], archs: Sequence[int], bits: Sequence[int]
) -> tuple[list[tuple[Line, Variant]], list[str]]:
    """Every different launch of the modules' examples, not compiled yet, and what went wrong.

    bfloat16, which models run in, stands for 16 bits. In float32, and on sm_90 in float16 and with
    PDL, each kernel and row is compiled once, with the most arguments that an example gives it.
    A launch that took a row of 32 bits counts as float32 whatever the examples' dtype was; e4m3
    belongs to the states that it comes from.
    """
    found: dict[tuple[int, str, str], tuple[Launch, Variant, list[str]]] = {}
    wrong: list[str] = []
    once: dict[tuple[int, str, str, bool], tuple[int, str, str]] = {}
    passes = [(arch, BITS[b], False) for arch in archs for b in bits]
    if 90 in archs and 16 in bits:
        passes += [(90, "fp16", False), (90, "bf16", True)]
    for op, module in modules.items():
        if not hasattr(module, "examples"):
            wrong.append(f"{op}: the module has no function `examples`")
            continue
        for arch, dtype, pdl in passes:
            launches, failure = record(module, arch, dtype, pdl)
            whole = dtype == "bf16" and not pdl
            if failure and not pdl:  # without PDL it is the same
                wrong.append(f"{op}, sm_{arch}, {dtype}: the examples failed: {failure}")
            if not whole:
                launches.sort(key=_absent)
            for launch in launches:
                of = _compile.variant(launch, arch)
                shown = {8: f"e4m3+{dtype}", 16: dtype}.get(launch.row.bits, "fp32")
                key = (id(launch.row), of.key, shown)
                if not whole:
                    key = once.setdefault((id(launch.row), of.function, dtype, pdl), key)
                ops = found.setdefault(key, (launch, of, []))[2]
                ops.extend({op}.difference(ops))
    return _lines(found), wrong


def _lines(
    found: Mapping[tuple[int, str, str], tuple[Launch, Variant, list[str]]],
) -> list[tuple[Line, Variant]]:
    """Lines in the order of the table, with those traits that differ within a kernel's lines."""
    traits = {key: _traits(launch, of) for key, (launch, of, _) in found.items()}
    seen: dict[tuple[int, str, str], dict[str, set[str]]] = {}
    for key, (_, of, _) in found.items():
        shown = seen.setdefault((key[0], of.function, key[2]), {})
        for name, text in traits[key].items():
            shown.setdefault(name, set()).add(text)
    lines = []
    for key, (launch, of, ops) in found.items():
        differing = seen[key[0], of.function, key[2]]
        flags = {n: t for n, t in traits[key].items() if t and _tells(t, differing[n])}
        kernel = of.function.removeprefix("_").removesuffix("_kernel")
        pdl = launch.args["PDL"]
        lines.append((Line(tuple(ops), kernel, launch.row, key[2], flags, "", pdl), of))
    lines.sort(key=lambda pair: (OPS.index(pair[0].ops[0]), pair[1].function, pair[1].arch))
    return lines


def _tells(text: str, among: set[str]) -> bool:
    """Whether a trait tells a launch from others: of pointers, their absence or another dtype."""
    if ":" in text:
        among = {other for other in among if ":" in other}
    return len(among) > 1


def blocks(result: Compiled, arch: int) -> tuple[int, int]:
    """How many blocks a multiprocessor holds by registers and by shared memory."""
    most = WARPS[arch] // result.warps
    per_warp = -(-result.registers // 8) * 8 * 32  # they are given out in eights
    by_registers = REGISTERS // (per_warp * result.warps)
    by_shared = SHARED[arch][1] * 1024 // (result.shared + 1024)  # 1 KiB is the system's
    return min(most, by_registers), min(most, by_shared)


def problems(result: Compiled | str, arch: int, bits: int, pdl: bool = False) -> Iterator[str]:
    """What is wrong with one kernel, a line each: the rules of the gate."""
    if isinstance(result, str):
        yield f"does not compile: {result}"
        return
    if result.spill_stores or result.spill_loads:
        yield f"spills {result.spill_stores} + {result.spill_loads} bytes of registers per thread"
    local = sum(result.mix.get(name, 0) for name in ("LDL", "STL"))
    if result.stack or local:
        yield f"uses local memory: {result.stack} bytes of stack, {local} instructions"
    threads = 32 * result.warps
    if result.registers > 255 or result.registers * threads > REGISTERS:
        yield f"needs {result.registers} registers x {threads} threads, of {REGISTERS}"
    if result.shared > SHARED[arch][0] * 1024:
        yield f"needs {result.shared / 1024:.1f} KiB of shared memory, of {SHARED[arch][0]}"
    if result.tensor_memory > TENSOR_MEMORY:
        yield f"needs {result.tensor_memory} columns of tensor memory, of {TENSOR_MEMORY}"
    if result.scratch:
        yield f"wants {result.scratch} bytes of global scratch memory at each launch"
    if result.serialized:
        yield "wgmma instructions are serialized"
    if pdl and not result.waits:
        yield f"touches memory before {' and '.join(_compile.PDL)}, or has no such instructions"
    if not pdl and (extra := [name for name in _compile.PDL if name in result.mix]):
        yield f"has {' and '.join(extra)} without PDL"
    if result.dot:
        yield from _dot_problems(result.mix, arch, bits)


def _dot_problems(mix: Mapping[str, int], arch: int, bits: int) -> Iterator[str]:
    tensor = [name for name in mix if name.endswith("MMA")]
    if bits == 32:
        if tensor:
            yield f"multiplies float32 matrices in less: {' '.join(tensor)}"
        return
    wanted = TENSOR_CORES[bits][arch]
    if wanted not in mix:
        yield f"multiplies matrices without {wanted}"
    if arch == 90 or bits == 8:
        for name in tensor:
            if name != wanted:
                yield f"multiplies matrices with {mix[name]} {name} instead of {wanted}"


def gate(
    lines: Iterable[Line],
    ops: Sequence[str],
    rows: Sequence[Row],
    archs: Sequence[int],
    bits: Sequence[int],
) -> list[str]:
    """Everything that is wrong, a line each.

    Args:
        ops: each must have a launch without problems on each of `archs` with each of `bits`.
        rows: each of them, of these archs and bits, must be reached by some launch.
    """
    wrong, clean, reached = [], set(), set()
    for line in lines:
        reached.add(id(line.row))
        found = list(problems(line.result, line.row.arch, line.row.bits, line.pdl))
        wrong += [f"{line.name()}: {problem}" for problem in found]
        if not found:
            clean |= {(op, line.row.arch, line.row.bits) for op in line.ops}
    for row in rows:
        # Models in 16 bits are the first that e4m3 is for.
        if row.arch in archs and max(row.bits, 16) in bits and id(row) not in reached:
            shown = f"{row.kernel}, sm_{row.arch}, {row.bits} bits, {tiles(row)}"
            wrong.append(f"row {shown}: no example reaches it")
    for op in ops:
        for arch in archs:
            wrong += [
                f"{op}: no launch without problems on sm_{arch} with {b} bits"
                for b in bits
                if (op, arch, b) not in clean
            ]
    return wrong


def tiles(row: Row) -> str:
    return " ".join(f"{name.removeprefix('BLOCK_')}{size}" for name, size in row.tiles.items())


def table(lines: Iterable[Line]) -> str:
    """One aligned text row per line. "blocks": per multiprocessor, by registers / by memory."""
    head = ("kernel", "row", "sm", "type", "tiles", "warps", "stages", "regs", "smem KiB")
    text = [(*head, "spill", "blocks", "flags", "instructions")]
    for line in lines:
        row, made = line.row, line.result
        left = (line.kernel, row.kernel, str(row.arch), line.dtype, tiles(row))
        flags = ", ".join(line.flags.values())
        if isinstance(made, str):
            launch = (str(row.num_warps), str(row.num_stages))
            text.append((*left, *launch, "-", "-", "-", "-", flags, "does not compile"))
            continue
        grown = f"{row.num_warps}" if made.warps == row.num_warps else f"{row.num_warps}+"
        text.append(
            (
                *(*left, grown, str(row.num_stages), str(made.registers)),
                *(f"{made.shared / 1024:.1f}", str(made.spill_stores + made.spill_loads)),
                *("/".join(map(str, blocks(made, row.arch))), flags),
                " ".join(f"{name} {count}" for name, count in made.mix.items()),
            )
        )
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in text
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trm_fast.kernels.report",
        description="Compile every Triton kernel ahead of time and show what it needs.",
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    add = parser.add_argument
    add("--op", nargs="+", choices=OPS, metavar="OP", help=f"only these: {', '.join(OPS)}")
    add("--arch", nargs="+", type=int, choices=ARCHITECTURES, default=list(ARCHITECTURES))
    add("--bits", nargs="+", type=int, choices=tuple(BITS), default=list(BITS))
    add("--check", action="store_true", help="status 1 if anything is wrong")
    add("--json", metavar="FILE", type=Path, help="write everything there too")
    add("--jobs", type=int, default=cores, metavar="N", help="processes that compile")
    add("--no-cache", action="store_true", help="neither read nor keep results")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.child and triton.knobs.runtime.interpret:
        # Something sets the variable anew: one child is enough, or there is no end of them.
        parser.error("Triton's interpreter is on here although TRITON_INTERPRET was taken away")
    if given.jobs < 1:
        parser.error(f"argument --jobs: {given.jobs} is not a number of processes")
    return given


def _without_interpreter(argv: Sequence[str] | None) -> int:
    """The report in a process of its own: this one's kernels were made for the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    command = [sys.executable, "-m", "trm_fast.kernels.report", "--child"]
    command += sys.argv[1:] if argv is None else argv
    return subprocess.run(command, env=environment).returncode


def _report(given: argparse.Namespace) -> int:
    started = time.perf_counter()
    modules, absent, wrong = import_ops(given.op or OPS)
    uncompiled, failed = collect(modules, given.arch, given.bits)
    folder = None if given.no_cache else _compile.cache_folder()
    variants = [of for _, of in uncompiled]
    results, fresh = _compile.compile_all(variants, given.jobs, folder)
    lines = [replace(line, result=results[of.key]) for line, of in uncompiled]
    rows = () if given.op else ROWS
    wrong += failed + gate(lines, list(modules), rows, given.arch, given.bits)
    seconds = time.perf_counter() - started

    summary = f"Triton {triton.__version__}: {len(lines)} launches, {fresh} compiled anew, "
    summary += f"{seconds:.0f} s, {len(wrong) or 'no'} violation{'s' * (len(wrong) != 1)}"
    text = [table(lines), "", *wrong, summary]
    if absent:
        text.append(f"no kernel for {', '.join(absent)}")
    sys.stdout.write("\n".join(text) + "\n")
    if given.json:
        whole = {"triton": triton.__version__, "torch": torch.__version__, "violations": wrong}
        launches = [{**asdict(line), "name": line.name()} for line in lines]
        given.json.write_text(json.dumps({**whole, "launches": launches}, indent=1) + "\n")
    return 1 if given.check and wrong else 0


def main(argv: Sequence[str] | None = None) -> int:
    given = _arguments(argv)
    if triton.knobs.runtime.interpret:
        return _without_interpreter(argv)
    return _report(given)


if __name__ == "__main__":
    sys.exit(main())
