"""Compile csrc/ into two independent libraries, `cpu` and `cuda`, with plain compiler commands.

The sources use the libtorch stable ABI only: a build needs torch's headers and nothing else of its
build tools, and one binary serves every torch >= 2.11 and every Python. Used by `library.py` (built
once, into a cache), by setup.py (prebuilt into a wheel) and by CI. Imports the standard library
only, so that setup.py can load it by its path, without torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

KINDS = ("cpu", "cuda")
ABI_TARGET = "0x020b000000000000"  # torch 2.11, the oldest that is supported
SUFFIX = ".so"

# What one copy of the CPU kernels is compiled for, best first, and how the compiler is told.
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {
    "avx512_bf16": (
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16"),
        *("-mavx2", "-mfma", "-mprefer-vector-width=512"),
    ),
    "avx512": (
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        *("-mavx2", "-mfma", "-mprefer-vector-width=512"),
    ),
    "avx2": ("-mavx2", "-mfma"),
    "generic": (),
}
# What the compiler defines under -march=native where a set can run.
_NEEDS = {
    "avx512_bf16": (
        "__AVX512F__",
        "__AVX512BW__",
        "__AVX512DQ__",
        "__AVX512VL__",
        "__AVX512BF16__",
    ),
    "avx512": ("__AVX512F__", "__AVX512BW__", "__AVX512DQ__", "__AVX512VL__"),
    "avx2": ("__AVX2__", "__FMA__"),
    "generic": (),
}
# Never -ffast-math: a library linked with it by GCC < 13 turns denormals off in the whole process.
CXX_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    f"-DTORCH_TARGET_VERSION={ABI_TARGET}",
)


class BuildError(RuntimeError):
    """The library cannot be built; the text is the reason, compilers' output included."""


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


def compiler() -> str:
    """The C++ compiler: $CXX, else c++."""
    found = shutil.which(os.environ.get("CXX", "c++"))
    if found is None:
        raise BuildError(f"no C++ compiler: {os.environ.get('CXX', 'c++')} is not on PATH")
    return found


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    output = done.stdout + done.stderr
    if done.returncode:
        raise BuildError(f"{Path(command[0]).name} exited {done.returncode}:\n{output}")
    return output


def native_set() -> str:
    """The best instruction set of this machine."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "generic"
    text = _run([compiler(), "-march=native", "-dM", "-E", "-x", "c++", os.devnull])
    defined = {line.split()[1] for line in text.splitlines()}
    return next(name for name, needs in _NEEDS.items() if defined.issuperset(needs))


def sources(kind: str) -> list[Path]:
    return sorted(p for p in (source_folder() / kind).iterdir() if p.suffix in (".cpp", ".cu"))


def _once(source: Path) -> bool:
    """Whether a file is compiled once, not once per instruction set."""
    return source.name.startswith("bind") or source.name == "dispatch.cpp"


def key(kind: str, sets: Sequence[str]) -> str:
    """Names a library: edited sources, other flags or other CPUs never meet an old binary."""
    flags = [CXX_FLAGS, [(name, INSTRUCTION_SETS[name]) for name in sets], Path(compiler()).name]
    digest = hashlib.sha256(repr(flags).encode())
    folder = source_folder()
    for path in [folder / "common.h", *sorted((folder / kind).rglob("*"))]:
        if path.suffix in (".cpp", ".cu", ".cuh", ".h"):
            digest.update(path.name.encode() + path.read_bytes())
    return f"trm_fast_{kind}_{platform.machine()}_{digest.hexdigest()[:12]}"


def build(kind: str, out: Path, sets: Sequence[str]) -> None:
    """Compile and link the library, then rename it into place.

    Raises:
        BuildError: no compiler, no torch, or an error in compiling.
    """
    torch = torch_folder()
    has = [f"-DTRM_HAS_{name}" for name in sets]
    include = ["-isystem", str(torch / "include")]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix="build-", dir=out.parent, ignore_cleanup_errors=True
    ) as scratch:
        commands, objects = [], []
        mapping = f"-ffile-prefix-map={source_folder()}=csrc"
        for source in sources(kind):
            for name in ("once",) if _once(source) else sets:
                special = has if name == "once" else [f"-DTRM_ISA={name}", *INSTRUCTION_SETS[name]]
                target = f"{scratch}/{source.stem}-{name}.o"
                objects.append(target)
                commands.append(
                    [compiler(), *CXX_FLAGS, mapping, *special, *include]
                    + ["-c", str(source), "-o", target]
                )
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        library = f"{scratch}/library{SUFFIX}"
        link = ["-L", str(torch / "lib"), "-ltorch_cpu"]
        if sys.platform == "darwin":
            link = ["-undefined", "dynamic_lookup"]
        _run([compiler(), "-shared", *objects, *link, "-o", library])
        os.replace(library, out)
