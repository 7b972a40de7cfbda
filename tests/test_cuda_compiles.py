"""The CUDA library without a GPU: compiled for every architecture we name, with nothing spilled and
memory accessed 16 bytes at a time; it links against any PyTorch and loads where CUDA is.

What nvcc made and said is kept between runs, under the key of sources and flags.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trm_fast.extension import build
from trm_fast.extension._common import unsupported_dtype

ARCHITECTURES = ("80", "90a", "100")
CUDA_OPERATIONS = [
    *("inject", "swiglu", "swiglu_bwd", "residual_rmsnorm", "residual_rmsnorm_bwd", "embed_reset"),
    *("embed_reset_bwd", "embed_reset_positions_bwd", "rotate_qkv", "rotate_qkv_bwd"),
    *("deep_recursion", "deep_recursion_bwd"),
]
# An access of a kernel's template: 8 elements of 16 bits or 4 of 32.
WIDE = re.compile(r"I(?:6__half|13__nv_bfloat16)Li8E|IfLi4E")


class Made:
    def __init__(self, library: Path, logs: dict[str, str], objects: dict[str, Path]) -> None:
        self.library, self.logs, self.objects = library, logs, objects


@pytest.fixture(scope="module")
def made(request, tmp_path_factory):
    """The library for all architectures, what nvcc said, and the object files, by source."""
    try:
        build.cuda_home()
    except build.BuildError as error:
        pytest.skip(error.reason)
    kept = Path(request.config.cache.mkdir("cuda-objects"))
    logs, objects = {}, {}

    def compile_job(job, out):
        compiled, said = kept / f"{job.key}.o", kept / f"{job.key}.txt"
        if not (compiled.exists() and said.exists()):
            text = build.compile_object(job, out)
            shutil.copyfile(out, compiled)
            said.write_text(text)
        shutil.copyfile(compiled, out)
        logs[job.source.name], objects[job.source.name] = said.read_text(), compiled
        return logs[job.source.name]

    library = tmp_path_factory.mktemp("cuda") / "library.so"
    build.build("cuda", library, ARCHITECTURES, compile_job=compile_job)
    return Made(library, logs, objects)


def resources(log):
    """(kernel, architecture, stack bytes, spilled bytes, registers) of each, by ptxas."""
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame,"
        r" (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    for name, arch, stack, stores, loads, registers in pattern.findall(log):
        yield name, arch, int(stack), int(stores) + int(loads), int(registers)


def test_every_kernel_fits_in_registers_on_every_architecture(made):
    sources = {p.name for p in build.sources("cuda") if p.suffix == ".cu"}
    assert sources == {name for name in made.logs if name.endswith(".cu")}
    for source in sources:
        found = list(resources(made.logs[source]))
        assert {arch for _, arch, *_ in found} == set(ARCHITECTURES), source
        assert len(found) == made.logs[source].count("Compiling entry function")
        for name, arch, stack, spilled, registers in found:
            assert (stack, spilled) == (0, 0), f"{source}: {name} on sm_{arch}"
            assert registers <= 128, f"{source}: {name} on sm_{arch}"


def test_a_spill_would_be_seen():
    said = """ptxas info    : Compiling entry function '_Z1kv' for 'sm_90a'
ptxas info    : Function properties for _Z1kv
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 64 registers, used 0 barriers, 8 bytes cumulative stack size
"""
    assert list(resources(said)) == [("_Z1kv", "90a", 8, 16, 64)]


def sass(path):
    """Instructions of each kernel of an object file, for sm_90a, by cuobjdump of Triton's wheel."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton has no cuobjdump")
    done = subprocess.run(
        [tool, "-sass", "-arch", "sm_90a", path], capture_output=True, text=True, check=True
    )
    found = {}
    for part in done.stdout.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        found[name] = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9.]+)", body)
    return found


@pytest.mark.parametrize(
    "source", ["inject", "swiglu", "residual_rmsnorm", "embed_reset", "rotate_qkv"]
)
def test_wide_kernels_access_16_bytes_at_a_time(made, source):
    kernels = sass(made.objects[f"{source}.cu"])
    assert any(WIDE.search(name) for name in kernels)
    for name, instructions in kernels.items():
        assert not any(i.startswith(("LDL", "STL", "RED", "ATOM")) for i in instructions), name
        if not WIDE.search(name):
            continue
        assert any(i.startswith("LDG.E.128") for i in instructions), name
        # Sums are floats behind each other, written once: one at a time.
        if not ("embedding_bwd" in name or "sum_rows" in name):
            assert any(i.startswith("STG.E.128") for i in instructions), name


def test_float16_is_for_gpus_only():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert unsupported_dtype(torch.float16, gpu) is None
    assert unsupported_dtype(torch.float16, cpu) == "serves float32 and bfloat16, not float16"
    said = unsupported_dtype(torch.float64, gpu)
    assert said == "serves float32, bfloat16 and float16, not float64"


def undefined(library):
    said = build.run(["nm", "-D", "--undefined-only", str(library)])
    return {line.split()[-1].partition("@")[0] for line in said.splitlines() if " U " in line}


def defined(library):
    said = build.run(["nm", "-D", "--defined-only", str(library)])
    return {line.split()[-1].partition("@")[0] for line in said.splitlines() if line.strip()}


def missing(library):
    """Symbols of the library that PyTorch for CPUs and the system do not have."""
    has = defined(build.torch_folder() / "lib" / "libtorch_cpu.so")
    names = undefined(library) - has
    loaded = {
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if re.search(r"/(libc|libm|libdl|librt|libpthread|libstdc\+\+|libgcc_s|ld-linux)[.-]", line)
    }
    for path in loaded:
        names -= defined(path)
    return names


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF files")
def test_it_needs_nothing_but_pytorch(made):
    names = missing(made.library)
    own = re.compile(r"torch_c10_cuda_\w+|aoti_torch_cuda_\w+|aoti_torch_get_current_cuda_stream")
    assert names
    assert {name for name in names if not own.fullmatch(name)} == set()
    said = build.run(["readelf", "-d", str(made.library)])
    needed = re.findall(r"NEEDED.*\[(.*)\]", said)
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= set(needed)
    system = re.compile(
        r"lib(torch_cpu|torch_cuda|c|m|dl|rt|pthread|stdc\+\+|gcc_s)\.so[.0-9]*|ld-.*"
    )
    assert all(system.fullmatch(name) for name in needed), needed


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or torch.version.cuda is not None,
    reason="stands in for PyTorch's CUDA library on Linux without one",
)
def test_it_loads_and_registers_every_operation(made, tmp_path):
    source, stand_in = tmp_path / "stand_in.c", tmp_path / "libtorch_cuda.so"
    source.write_text("".join(f"void {n}(void) {{}}\n" for n in sorted(missing(made.library))))
    link = ["-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "-x", "c"]
    build.run([*build.compiler(), *link, str(source), "-o", str(stand_in)])
    script = f"""
import ctypes, torch
ctypes.CDLL({str(stand_in)!r}, ctypes.RTLD_GLOBAL)
torch.ops.load_library({str(made.library)!r})
for name in {CUDA_OPERATIONS}:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("trm_fast_ext::" + name, "CUDA"), name
print("loaded")
"""
    assert build.run([sys.executable, "-c", script]).strip() == "loaded"
