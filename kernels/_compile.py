"""What Triton's compiler makes of a recorded launch, without a GPU: resources and instructions.

Owns the way from a `Launch` to a `Variant` (what of a launch decides the machine code), from that
to a `Compiled` (what the code needs and consists of), the pool of processes that compiles and the
cache of results. Imported by `report` only.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from trm_fast.kernels import _runtime
from trm_fast.kernels._runtime import Launch

BATCH = 8  # kernels that one process compiles at a time
SCHEMA = 3  # of the cached results: raise it when `Compiled`, or how one is read, changes

# What `_common.begin` becomes with PDL, in this order; and what reads or writes global memory.
PDL = ("ACQBULK", "PREEXIT")
GLOBAL = r"(LD|ST|ATOM|RED)G?|LDGSTS|UTMA\w+|UBLK\w+"

# Instructions that tell how a kernel multiplies and how it reaches memory. Those for matrices:
# HMMA up to sm_8x, HGMMA (wgmma) of sm_90, UTC*MMA (tcgen05) of sm_100; QMMA, QGMMA and UTCQMMA of
# 8 bits. LDL and STL are spills.
MIX = (
    *("HGMMA", "HMMA", "UTCHMMA", "QGMMA", "QMMA", "UTCQMMA", "UTCIMMA", "UTCOMMA"),
    *("FFMA", "FFMA2", "MUFU"),
    *("UTMALDG", "UTMASTG", "LDGSTS", "LDG", "STG", "LDTM", "LDSM", "STSM", "LDL", "STL", "BAR"),
    *PDL,
)


@dataclass(frozen=True)
class Variant:
    """What of a launch decides the machine code; `key` stands for all of it and the compiler.

    Attributes:
        module, function: where the kernel is.
        arch: 80, 90 or 100; 89, the one of its family that has e4m3, in place of 80.
        signature: argument -> "*bf16", "tensordesc<bf16[128, 64]>", "i32", "fp32" or "constexpr".
        constants: position -> value, of arguments that are compiled in: also None, and 1.
        attrs: position -> what is known of the others: that they are multiples of 16.
        options: num_warps, num_stages, and launch_pdl with PDL.
    """

    module: str
    function: str
    arch: int
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    key: str


@dataclass(frozen=True)
class Compiled:
    """What a kernel needs and consists of.

    Attributes:
        registers: of a thread.  stack, spill_stores, spill_loads: bytes of a thread.
        serialized: whether the assembler gave up overlapping the wgmma instructions.
        shared: bytes of a block.  scratch: bytes of global memory that a launch would allocate.
        tensor_memory: columns of sm_100's tensor memory.
        warps: of a block, those included that warp specialization added.
        dot: whether the kernel multiplies matrices.
        waits: `waits_first` of the code.
        mix: instruction of MIX -> how often it stands in the code.
    """

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    serialized: bool
    shared: int
    scratch: int
    tensor_memory: int
    warps: int
    dot: bool
    waits: bool
    mix: dict[str, int]


@functools.cache
def _binder(kernel: Any, arch: int) -> tuple[Any, Any, str]:
    """What binds arguments at a launch on `arch`, Triton's backend for it, and what names both."""
    backend = make_backend(GPUTarget("cuda", arch, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    return binder, backend, f"{SCHEMA} {triton.__version__} {backend.hash()}"


def variant(launch: Launch, arch: int) -> Variant:
    """The variant that `launch` would compile, by the very functions that would type it."""
    kernel = launch.kernel
    tensors = (getattr(value, "base", value) for value in launch.args.values())
    if arch == 80 and any(getattr(t, "dtype", None) == torch.float8_e4m3fn for t in tensors):
        arch = 89
    binder, backend, compiler = _binder(kernel, arch)
    options = _runtime.options(launch.row, launch.args)
    given = {**launch.args, **options}
    bound, specialization, rest = binder(**given)
    parsed, signature, constants, attrs = kernel._pack_args(
        backend, given, bound, specialization, rest
    )
    source = ASTSource(kernel, signature, constants, attrs)
    key = hashlib.sha256(f"{compiler} {parsed.hash()} {source.hash()}".encode()).hexdigest()
    return Variant(
        module=kernel.fn.__module__,
        function=kernel.fn.__name__,
        arch=arch,
        signature=signature,
        constants=constants,
        attrs=attrs,
        options=options,
        key=key,
    )


def read_ptxas(log: str) -> dict[str, Any]:
    """Registers, stack and spills of a log of `ptxas -v`.

    Raises:
        ValueError: the log does not tell them.
    """
    used = re.search(r"Used (\d+) registers", log)
    memory = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    )
    if used is None or memory is None:
        raise ValueError(f"the assembler did not tell registers and spills: {log.strip()!r}")
    stack, stores, loads = map(int, memory.groups())
    return {
        "registers": int(used[1]),
        "stack": stack,
        "spill_stores": stores,
        "spill_loads": loads,
        "serialized": "wgmma.mma_async instructions are serialized" in log,
    }


def waits_first(code: Sequence[str]) -> bool:
    """Whether a kernel waits for the one in front of it, then lets the one behind start, and only
    then touches global memory."""
    touching = (i for i, name in enumerate(code) if re.fullmatch(GLOBAL, name))
    before = code[: next(touching, len(code))]
    return [name for name in before if name in PDL] == list(PDL)


def read_sass(text: str, sizes: Sequence[int]) -> list[tuple[dict[str, int], bool]]:
    """How often each instruction of MIX stands in each kernel of a disassembly of several, and
    whether the kernel waits first.

    Args:
        sizes: the kernels' bytes, in order; an instruction has 16.

    Raises:
        ValueError: there are more or fewer instructions than that.
    """
    line = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)"
    found = re.findall(line, text, re.M)
    if len(found) * 16 != sum(sizes):
        raise ValueError(f"nvdisasm shows {len(found)} instructions in {sum(sizes)} bytes")
    read, start = [], 0
    for size in sizes:
        code = found[start : start + size // 16]
        start += size // 16
        counts = Counter(code)
        read.append(({name: counts[name] for name in MIX if counts[name]}, waits_first(code)))
    return read


def instructions(cubin: bytes) -> bytes:
    """The machine code in a compiled kernel, an ELF file: its sections .text.<function>."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<I20xQQ", cubin, table + i * size) for i in range(count)]
    start = sections[names][1]
    return b"".join(
        cubin[offset : offset + length]
        for name, offset, length in sections
        if cubin.startswith(b".text.", start + name)
    )


def _read_codes(arch: int, codes: Sequence[bytes]) -> list[tuple[dict[str, int], bool]]:
    """The instructions of several kernels, by one run of the disassembler.

    It needs a quarter of a second to start, and a hundredth for a kernel.
    """
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "--binary", f"SM{arch}", file.name]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"nvdisasm: {done.stderr.strip()}")
    return read_sass(done.stdout, [len(code) for code in codes])


@contextlib.contextmanager
def _compiler_log() -> Iterator[io.StringIO]:
    """Inside, Triton compiles anew, and the assembler's log goes into what is yielded.

    Triton runs the assembler with -v in any case: so it need not be run a second time.
    """
    log = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        knobs.cache.scope(),
        knobs.nvidia.scope(),
        contextlib.redirect_stdout(log),
    ):
        knobs.cache.dir = folder
        knobs.nvidia.dump_ptxas_log = True
        yield log


def _compile(of: Variant) -> tuple[Compiled, bytes] | str:
    """What the compiler makes of it but for what is read of the code; the code; or why nothing."""
    try:
        kernel = getattr(importlib.import_module(of.module), of.function)
        source = ASTSource(kernel, of.signature, of.constants, of.attrs)
        with _compiler_log() as log:
            made = triton.compile(source, GPUTarget("cuda", of.arch, 32), of.options)
        result = Compiled(
            **read_ptxas(log.getvalue()),
            shared=made.metadata.shared,
            scratch=made.metadata.global_scratch_size or 0,
            tensor_memory=made.metadata.tmem_size or 0,
            warps=made.metadata.num_warps,
            dot="tt.dot" in made.asm["ttir"],
            waits=False,
            mix={},
        )
        return result, instructions(made.asm["cubin"])
    except Exception as error:  # the compiler's errors have no class in common
        return one_line(error)


def compile_batch(batch: Sequence[Variant]) -> list[Compiled | str]:
    """What the compiler makes of each, or one line that says why nothing. All are of one arch."""
    made = [_compile(of) for of in batch]
    codes = [result[1] for result in made if not isinstance(result, str)]
    read = iter(_read_codes(batch[0].arch, codes) if codes else [])
    results: list[Compiled | str] = []
    for result in made:
        if isinstance(result, str):
            results.append(result)
        else:
            mix, waits = next(read)
            results.append(replace(result[0], mix=mix, waits=waits))
    return results


def one_line(error: BaseException) -> str:
    """Class and message of the error at the bottom of it all; the last line of a message of many.

    The compiler chains an error per call from kernel to helper, each with the source above it.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"


def cache_folder() -> Path:
    """Where results are kept: $TRM_FAST_CACHE/aot, else ~/.cache/trm_fast/aot."""
    root = os.environ.get("TRM_FAST_CACHE") or os.path.join("~", ".cache", "trm_fast")
    return Path(os.path.expanduser(root)) / "aot"


def load(folder: Path, key: str) -> Compiled | None:
    """The result kept under `key`; None if there is none, or none that can be read."""
    try:
        kept = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(kept, dict) or set(kept) != {field.name for field in fields(Compiled)}:
        return None
    kinds = {"serialized": bool, "dot": bool, "waits": bool, "mix": dict}
    sound = all(type(value) is kinds.get(name, int) for name, value in kept.items())
    if not sound or not all(type(count) is int for count in kept["mix"].values()):
        return None
    return Compiled(**kept)


def store(folder: Path, key: str, result: Compiled) -> None:
    """Keep `result` under `key`, whole or not at all. A folder that cannot be written is none."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        handle, written = tempfile.mkstemp(dir=folder, suffix=".new")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                json.dump(asdict(result), file)
            os.replace(written, folder / f"{key}.json")
        except OSError:
            os.unlink(written)
            raise


def compile_all(
    variants: Iterable[Variant], jobs: int, folder: Path | None
) -> tuple[dict[str, Compiled | str], int]:
    """Results by key, and how many had to be compiled: those that `folder` does not have."""
    wanted = {of.key: of for of in variants}
    results: dict[str, Compiled | str] = {}
    for key in wanted:
        kept = load(folder, key) if folder else None
        if kept is not None:
            results[key] = kept
    missing = [of for key, of in wanted.items() if key not in results]
    for of, made in _in_processes(missing, jobs):
        results[of.key] = made
        if folder and isinstance(made, Compiled):
            store(folder, of.key, made)
    return results, len(missing)


def _in_processes(
    variants: Sequence[Variant], jobs: int, most: int = BATCH
) -> Iterator[tuple[Variant, Compiled | str]]:
    """Each variant with its result, in the order in which they get ready.

    The compiler can end its process. Then nobody knows which variant was to blame, so those
    without a result get a process of their own each.
    """
    batches = []
    for arch in sorted({of.arch for of in variants}):
        same = [of for of in variants if of.arch == arch]
        batches += [same[i : i + most] for i in range(0, len(same), most)]
    crashed: list[Variant] = []
    # Forked: a new process would need seconds to import torch and triton.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        waiting = {}
        for batch in batches:
            try:
                waiting[pool.submit(compile_batch, batch)] = batch
            except BrokenProcessPool:
                crashed += batch
        for future in as_completed(waiting):
            try:
                yield from zip(waiting[future], future.result(), strict=True)
            except BrokenProcessPool:
                crashed += waiting[future]
    for of in crashed:
        if most == 1:
            yield of, "the compiler crashed"
        else:
            yield from _in_processes([of], 1, most=1)
