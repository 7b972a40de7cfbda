"""Compile csrc/ into two independent libraries, `cpu` and `cuda`, with plain compiler commands.

The sources use the libtorch stable ABI only: a build needs torch's headers and nothing else of its
build tools, and one binary serves every torch >= 2.11 and every Python. Owns what is compiled for
what and how, and the checksums; `cache.py` keeps the results, setup.py puts them into a wheel.
Imports the standard library only, so that setup.py can load it by its path, without torch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

KINDS = ("cpu", "cuda")
ABI_TARGET = "0x020b000000000000"  # torch 2.11, the oldest that is supported
SUFFIX = ".so"

_AVX512 = ("__AVX512F__", "__AVX512BW__", "__AVX512DQ__", "__AVX512VL__", "__AVX2__", "__FMA__")
_AVX512_FLAGS = (
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"),
    "-mprefer-vector-width=512",
)
# What one copy of the CPU kernels is compiled for, best first, and how the compiler is told.
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {
    "avx512_bf16": (*_AVX512_FLAGS, "-mavx512bf16", "-mavx512vnni"),
    "avx512": _AVX512_FLAGS,
    "avx2": ("-mavx2", "-mfma"),
    "generic": (),
}
# What the compiler defines under -march=native, and Linux lists of the CPU, where a set can run.
_MACROS = {
    "avx512_bf16": {*_AVX512, "__AVX512BF16__", "__AVX512VNNI__"},
    "avx512": {*_AVX512},
    "avx2": {"__AVX2__", "__FMA__"},
    "generic": set[str](),
}
# Never -ffast-math: a library linked with it by GCC < 13 turns denormals off in the whole process.
CXX_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pipe", "-Wall", "-Wextra"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    f"-DTORCH_TARGET_VERSION={ABI_TARGET}",
)
# Registers and spills of each kernel are in what nvcc prints.
NVCC_FLAGS = (
    *("-std=c++17", "-O3", "-lineinfo", "-Xptxas", "-v"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden"),
)
_SOURCES = (".cpp", ".cu")
_HEADERS = (".h", ".cuh")


class BuildError(RuntimeError):
    """The library cannot be built. `reason` is one line; the text has the compilers' output too."""

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(f"{reason}\n{output}".rstrip())
        self.reason = reason


class NothingToBuildWith(BuildError):
    """Nothing is wrong, there is just nothing to build for or with: no GPU, no CUDA toolkit."""


class BadMode(BuildError, ValueError):
    """TRM_FAST_EXT is none of the modes."""


# ---- what is there


def source_folder() -> Path:
    """csrc/, inside the installed package or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "cpu").is_dir():
            return folder
    raise BuildError("the sources in csrc/ are missing")


def torch_folder() -> Path:
    """Where torch is installed, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("torch is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def compiler() -> tuple[str, ...]:
    """The C++ compiler: $CXX, which may hold arguments, else c++."""
    try:
        given = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    except ValueError as error:
        raise BuildError(f"CXX cannot be read: {error}") from None
    found = shutil.which(given[0])
    if found is None:
        raise BuildError(f"no C++ compiler: {given[0]} is not on PATH")
    return (found, *given[1:])


def cuda_home() -> Path:
    """The CUDA toolkit: $CUDA_HOME, the usual place, or where nvcc is."""
    nvcc = shutil.which("nvcc")
    beside = Path(nvcc).resolve().parents[1] if nvcc else None
    for folder in (os.environ.get("CUDA_HOME"), "/usr/local/cuda", beside):
        if not folder:
            continue
        if all((Path(folder) / f).exists() for f in ("bin/nvcc", "include/cuda_runtime.h")):
            return Path(folder)
    raise NothingToBuildWith("there is no CUDA toolkit (CUDA_HOME says where one is)")


def cuda_architectures(default: Sequence[str] = ()) -> tuple[str, ...]:
    """What the CUDA library is compiled for: $TRM_FAST_CUDA_ARCH, "80;90a", else `default`."""
    given = os.environ.get("TRM_FAST_CUDA_ARCH", "").replace(",", ";")
    names = tuple(name.strip() for name in given.split(";") if name.strip()) or tuple(default)
    for name in names:
        if not re.fullmatch(r"\d{2,3}[af]?", name):
            raise ValueError(f"TRM_FAST_CUDA_ARCH is like 80;90a, not {given!r}")
    if not names:
        raise NothingToBuildWith(
            "there is no GPU here: TRM_FAST_CUDA_ARCH says what to compile for"
        )
    return names


def cuda_serves(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for `architecture` ("80", "90a") runs on a GPU of this compute capability."""
    number = architecture.rstrip("af")
    major, minor = int(number[:-1]), int(number[-1])
    if architecture.endswith("a"):
        return capability == (major, minor)
    return capability[0] == major and capability[1] >= minor


def run(command: Sequence[str]) -> str:
    """What the command prints; BuildError where it fails."""
    name = Path(command[0]).name
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "LC_ALL": "C"},  # errors are called so
        )
    except OSError as error:
        raise BuildError(f"{name} cannot be run: {error}") from error
    output = done.stdout.decode(errors="replace")
    if done.returncode < 0:
        raise BuildError(f"{name} was ended by signal {-done.returncode}", output)
    if done.returncode:
        raise BuildError(f"{name} exited {done.returncode}: {first_error(output)}", output)
    return output


def first_error(output: str) -> str:
    """The line of the output that says most: a compiler's, else the linker's, else the last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for pattern in (r"(?<!collect2: )\berror: |fatal", r"\bld: |undefined"):
        for line in lines:
            if re.search(pattern, line, re.IGNORECASE):
                return line
    return lines[-1] if lines else "no output"


@functools.cache
def _macros(command: tuple[str, ...]) -> dict[str, str]:
    """What the compiler defines by itself for this machine: its version and what the CPU has."""
    native = ["-march=native"] if _is_x86() else []
    text = run([*command, *native, "-dM", "-E", "-x", "c++", os.devnull])
    defined = (line.split(maxsplit=2)[1:] for line in text.splitlines() if line.startswith("#def"))
    return {words[0]: "".join(words[1:]) for words in defined if words}


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def cpu_flags() -> set[str] | None:
    """What Linux says that this CPU can do; None elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("flags"):
                return set(line.partition(":")[2].split())
    return None


def native_set() -> str:
    """The best instruction set of this machine, by both its compiler and its system."""
    if not _is_x86():
        return "generic"
    defined = _macros(compiler())
    return next(name for name in runnable_sets() if defined.keys() >= _MACROS[name])


def runnable_sets() -> list[str]:
    """What this CPU can run, by its system, best first; all, where that does not tell."""
    if not _is_x86():
        return ["generic"]
    flags = cpu_flags()
    listed = {
        name: {re.sub("avx512(bf|vnni)", r"avx512_\1", m.strip("_").lower()) for m in needs}
        for name, needs in _MACROS.items()
    }
    return [name for name, needs in listed.items() if flags is None or flags >= needs]


def portable_sets() -> tuple[str, ...]:
    """What a library for other machines of this kind holds."""
    return tuple(INSTRUCTION_SETS) if _is_x86() else ("generic",)


# ---- what a library is made of


def sources(kind: str) -> list[Path]:
    folder = source_folder() / kind
    return sorted(p for p in folder.glob("*") if p.suffix in _SOURCES)


def headers(kind: str) -> list[Path]:
    folder = source_folder()
    found = [*folder.glob("*"), *(folder / kind).glob("*")]
    return sorted(p for p in found if p.suffix in _HEADERS)


def digest(parts: object, files: Sequence[Path] = ()) -> str:
    total = hashlib.sha256(repr(parts).encode())
    for path in files:
        total.update(f"\n{path.name}\n".encode() + path.read_bytes())
    return total.hexdigest()[:16]


def source_key(kind: str) -> str:
    """Of the sources and flags: what a library must have been made of to be used."""
    recipe = (CXX_FLAGS, NVCC_FLAGS, INSTRUCTION_SETS)
    return digest(recipe, [*headers(kind), *sources(kind)])


def prebuilt_name(kind: str, targets: Sequence[str]) -> str:
    """The file name of a library in a wheel; the targets can be read from it."""
    return f"trm_fast_{kind}-{'+'.join(targets)}-{source_key(kind)}{SUFFIX}"


def key(kind: str, targets: Sequence[str], flags: Sequence[str] = ()) -> str:
    """Names a library in the cache: other sources, flags, compilers or CPUs never meet it."""
    made_by = _identity()
    if kind == "cuda":
        made_by = (*made_by, run([str(cuda_home() / "bin" / "nvcc"), "--version"]))
    own = digest((tuple(targets), tuple(flags), made_by))
    return f"trm_fast_{kind}-{'+'.join(targets)}-{_source_mark(kind, flags)}-{own}"


def _source_mark(kind: str, flags: Sequence[str] = ()) -> str:
    """The part of a library's name that says what it was made of."""
    return digest((source_key(kind), tuple(flags))) if flags else source_key(kind)


def any_compilers(kind: str, target: str) -> str:
    """Pattern of the names of libraries of these sources for one target, whoever compiled them."""
    return f"trm_fast_{kind}-{target}-{_source_mark(kind)}-*{SUFFIX}"


def _identity() -> tuple[str, ...]:
    """The compiler with its arguments, and what it compiles for."""
    command = compiler()
    macros = _macros(command)
    names = ("__VERSION__", "__clang_version__", "__GNUC__")
    system = (sys.platform, platform.machine(), platform.libc_ver()[0])
    return (*command[1:], *(macros.get(name, "") for name in names), *system)


def machine_key() -> str:
    """Of sources, compiler and CPU, without starting the compiler: where it is what it was, so is
    what it would make."""
    command = compiler()
    about = os.stat(command[0])
    made_by = (*command, about.st_size, about.st_mtime_ns)
    return digest((source_key("cpu"), made_by, sorted(cpu_flags() or ())))


@dataclass(frozen=True)
class Job:
    """One file to compile: the command without -o and its argument; `key` stands for the result."""

    source: Path
    command: tuple[str, ...]
    key: str


def _once(source: Path) -> bool:
    """Whether a file of the CPU library is compiled once, not once per instruction set."""
    return source.name.startswith("bind") or source.name == "dispatch.cpp"


def _variants(kind: str, source: Path, targets: Sequence[str]) -> list[tuple[str, ...]]:
    """The flags of each way in which a file is compiled."""
    if source.suffix == ".cu":
        generate = [("-gencode", f"arch=compute_{a},code=sm_{a}") for a in targets]
        return [tuple(word for pair in generate for word in pair)]
    if kind == "cuda":
        return [("-DUSE_CUDA", "-isystem", str(cuda_home() / "include"))]
    if source.name == "dispatch.cpp":
        return [tuple(f"-DTRM_HAS_{name}" for name in targets)]
    if _once(source):
        return [()]
    return [(f"-DTRM_ISA={name}", *INSTRUCTION_SETS[name]) for name in targets]


def jobs(kind: str, targets: Sequence[str], flags: Sequence[str] = ()) -> list[Job]:
    """Everything to compile, what takes longest first."""
    folder, shared = source_folder(), headers(kind)
    found = []
    for source in sources(kind):
        for variant in _variants(kind, source, targets):
            if source.suffix == ".cu":
                nvcc = str(cuda_home() / "bin" / "nvcc")
                command = (nvcc, *NVCC_FLAGS, *variant, "-I", str(folder))
            else:
                include = ("-isystem", str(torch_folder() / "include"))
                mapping = f"-ffile-prefix-map={folder}=csrc"
                command = (*compiler(), *CXX_FLAGS, mapping, *variant, *flags, *include)
            parts = (variant, tuple(flags), CXX_FLAGS, NVCC_FLAGS, _identity(), kind)
            command = (*command, "-c", str(source))
            found.append(Job(source, command, digest((source.name, parts), [*shared, source])))
    return sorted(found, key=lambda job: (_once(job.source), -job.source.stat().st_size))


def estimate(kind: str, targets: Sequence[str]) -> int:
    """About how many seconds a build takes where nothing of it is there."""
    each = [3 if _once(job.source) or kind == "cuda" else 6 for job in jobs(kind, targets)]
    return -(-sum(each) // processors())


def processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


# ---- building


def build(
    kind: str,
    out: Path,
    targets: Sequence[str],
    *,
    flags: Sequence[str] = (),
    compile_job: Callable[[Job, Path], str] | None = None,
) -> str:
    """Compile and link the library, then rename it into place. Returns what the compilers printed.

    Args:
        kind: "cpu" or "cuda".
        out: the library's path. Scratch folders `build-<kind>-*` appear beside it meanwhile.
        targets: instruction sets, of `INSTRUCTION_SETS`; or CUDA architectures, "80", "90a".
        flags: more of them, for the C++ compiler and the linker.
        compile_job: makes a job's object file at a path; a cache may have it already.

    Raises:
        BuildError: no compiler, no torch, or an error in compiling.
        OSError: the folder cannot be written to.
    """
    if sys.platform == "win32":
        raise NothingToBuildWith("the extension does not support Windows")
    make = compile_job or compile_object
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f"build-{kind}-", dir=out.parent, ignore_cleanup_errors=True
    ) as scratch:
        work = [(job, Path(scratch, f"{i}.o")) for i, job in enumerate(jobs(kind, targets, flags))]
        if not work:
            raise NothingToBuildWith(f"there are no sources for {kind} in this version")
        output = _all(make, work)
        library = Path(scratch, f"library{SUFFIX}")
        link = [*_link_flags(kind, Path(scratch)), *flags]
        objects = [str(path) for _, path in work]
        output += run([*compiler(), "-shared", *objects, *link, "-o", str(library)])
        os.replace(library, out)
    return output


def compile_object(job: Job, out: Path) -> str:
    return run([*job.command, "-o", str(out)])


def _all(make: Callable[[Job, Path], str], work: Sequence[tuple[Job, Path]]) -> str:
    """Everything at once on the processors there are; the first error ends it."""
    pool = ThreadPoolExecutor(processors())
    try:
        return "".join(pool.map(make, *zip(*work, strict=True)))
    finally:
        pool.shutdown(cancel_futures=True)


def _link_flags(kind: str, scratch: Path) -> list[str]:
    if sys.platform == "darwin":
        return ["-undefined", "dynamic_lookup"]
    link = ["-L", str(torch_folder() / "lib"), "-ltorch_cpu"]
    if kind == "cpu":
        return link
    # A CPU-only torch has no libtorch_cuda.so. An empty stand-in records that it is needed, so that
    # the library can be linked here and finds its symbols where torch has CUDA.
    stand_in, nothing = scratch / "libtorch_cuda.so", scratch / "nothing.cpp"
    nothing.touch()
    run([*compiler(), "-shared", f"-Wl,-soname,{stand_in.name}", str(nothing), "-o", str(stand_in)])
    home = cuda_home()
    places = [home / "lib64", home / "lib"]
    runtime = next((p for p in places if (p / "libcudart_static.a").exists()), places[0])
    return [
        *link,
        *("-Wl,--no-as-needed", str(stand_in), "-Wl,--as-needed"),
        *("-L", str(runtime), "-lcudart_static", "-ldl", "-lrt", "-lpthread"),
    ]


# ---- checksums


def checksum_of(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def seal(path: Path) -> None:
    """Write the checksum beside `path`, by which `intact` knows it."""
    part = checksum_of(path).with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(_sum(path) + "\n", encoding="ascii")
    os.replace(part, checksum_of(path))


def intact(path: Path) -> bool:
    """Whether `path` is there, as it was sealed."""
    try:
        return checksum_of(path).read_text(encoding="ascii").strip() == _sum(path)
    except (OSError, UnicodeDecodeError):
        return False


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
