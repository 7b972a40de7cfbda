"""Builds of the extension and the folder that keeps them: once, checked, whatever goes wrong."""

import ctypes
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from extension_builds import BUILDING, Tiny, tiny

from trm_fast.extension import build, cache

__all__ = ["tiny"]

SETS = ["generic"]
PROVIDE = "print(cache.provide('cpu', ['generic']))"


def answer(path: Path) -> int:
    return ctypes.CDLL(str(path)).answer()


def test_built_once_then_found(tiny):
    path = cache.provide("cpu", SETS)
    assert answer(path) == 42
    assert tiny.compiled() == ["dispatch.cpp", "kernel.cpp"]
    assert cache.provide("cpu", SETS) == path
    assert tiny.compiled() == []
    assert not list(tiny.cache.glob("build-*"))


def test_an_edit_compiles_what_it_must_only(tiny):
    first = cache.provide("cpu", SETS)
    tiny.compiled()
    tiny.write("cpu/kernel.cpp", (tiny.source / "cpu/kernel.cpp").read_text() + "// edited\n")
    second = cache.provide("cpu", SETS)
    assert tiny.compiled() == ["kernel.cpp"]
    tiny.write("common.h", "#define ANSWER 43\n")
    third = cache.provide("cpu", SETS)
    assert tiny.compiled() == ["dispatch.cpp", "kernel.cpp"]
    assert len({first, second, third}) == 3
    assert (answer(first), answer(third)) == (42, 43)


def test_the_key_stands_for_everything(tiny, monkeypatch):
    keys = {build.key("cpu", SETS), build.key("cpu", ["avx2"]), build.key("cpu", SETS, ["-g"])}
    objects = {job.key for job in build.jobs("cpu", SETS)}
    monkeypatch.setenv("CXX", f"{tiny.compiler} -DMORE")
    keys.add(build.key("cpu", SETS))
    assert not objects & {job.key for job in build.jobs("cpu", SETS)}
    monkeypatch.setattr(build, "_macros", lambda command: {"__VERSION__": "99"})
    keys.add(build.key("cpu", SETS))
    monkeypatch.setattr(build, "CXX_FLAGS", (*build.CXX_FLAGS, "-O2"))
    keys.add(build.key("cpu", SETS))
    tiny.write("cpu/more.h", "")
    keys.add(build.key("cpu", SETS))
    assert len(keys) == 7


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def unseal(path: Path) -> None:
    build.checksum_of(path).unlink()


@pytest.mark.parametrize("damage", [cut, edit, unseal, os.remove])
def test_a_damaged_library_is_built_again(tiny, damage):
    path = cache.provide("cpu", SETS)
    good = path.read_bytes()
    damage(path)
    # In a process of its own: to load what was cut would be its end.
    done = tiny.run(
        PROVIDE + "\nimport ctypes; print(ctypes.CDLL(str(cache.provide('cpu', "
        "['generic']))).answer())"
    )
    assert done.returncode == 0
    assert BUILDING.fullmatch(done.stderr)
    assert done.stdout.split() == [str(path), "42"]
    assert path.read_bytes() == good and build.intact(path)


def test_a_damaged_object_is_compiled_again(tiny):
    path = cache.provide("cpu", SETS)
    for kept in (tiny.cache / "objects").glob("*.o"):
        cut(kept)
    path.unlink()
    tiny.compiled()
    assert answer(cache.provide("cpu", SETS)) == 42
    assert tiny.compiled() == ["dispatch.cpp", "kernel.cpp"]


def test_a_compile_error_is_told_by_its_first_line(tiny):
    tiny.write("cpu/kernel.cpp", "int f() { return nowhere; }\nint g() { return nothing; }\n")
    with pytest.raises(build.BuildError) as e:
        cache.provide("cpu", SETS)
    reason = e.value.reason
    assert re.search(r"cxx exited 1: .*kernel.cpp:1:18: error: .*nowhere", reason)
    assert "\n" not in reason
    assert "nothing" in str(e.value) and "nothing" not in reason
    assert not list(tiny.cache.glob("*.so")) and not list(tiny.cache.glob("build-*"))


def test_no_compiler(tiny, monkeypatch):
    monkeypatch.setenv("CXX", "nowhere-c++ -pipe")
    with pytest.raises(build.BuildError, match="^no C.. compiler: nowhere-c.. is not on PATH$"):
        cache.provide("cpu", SETS)


def test_the_compiler_may_have_arguments(tiny, monkeypatch):
    monkeypatch.setenv("CXX", f"{tiny.compiler} -DANSWER_WANTED")
    cache.provide("cpu", SETS)
    assert "-DANSWER_WANTED" in tiny.calls_file.read_text()


def test_a_compiler_that_is_no_program(tiny, monkeypatch):
    monkeypatch.setenv("CXX", str(tiny.program("broken", "").absolute()))
    Path(tiny.bin / "broken").write_bytes(b"\x7fELF nonsense")
    with pytest.raises(build.BuildError, match="broken cannot be run: .*Exec format"):
        cache.provide("cpu", SETS)


@pytest.mark.parametrize("given", ["'c++", '"'])
def test_a_compiler_that_cannot_be_read(given, tiny, monkeypatch):
    monkeypatch.setenv("CXX", given)
    with pytest.raises(build.BuildError, match="CXX cannot be read: No closing quotation"):
        cache.for_this_machine()


def test_a_compiler_that_says_nonsense(tiny, monkeypatch):
    monkeypatch.setenv("CXX", str(tiny.program("odd", 'echo "#define"; echo "#defi"')))
    assert build.key("cpu", SETS).startswith("trm_fast_cpu-generic-")


def test_a_user_without_a_home(tiny, monkeypatch):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("TRM_FAST_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(build.BuildError, match="TRM_FAST_CACHE can name one: Could not determine"):
        cache.for_this_machine()


def test_later_processes_start_no_compiler(tiny, monkeypatch):
    path = cache.for_this_machine()
    build._macros.cache_clear()
    tiny.calls_file.unlink()
    assert cache.for_this_machine() == path
    assert not tiny.calls_file.exists(), "the compiler was started"
    os.utime(tiny.compiler, (1, 1))
    assert cache.for_this_machine() == path and tiny.calls_file.exists(), "it is another compiler"
    tiny.write("cpu/more.h", "")
    assert cache.for_this_machine() != path


def test_a_damaged_library_is_not_taken_from_memory_of_it(tiny):
    path = cache.for_this_machine()
    cut(path)
    assert cache.for_this_machine() == path and answer(path) == 42


def test_without_a_compiler_what_is_there_serves(tiny, monkeypatch):
    path = cache.for_this_machine()
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert cache.for_this_machine() == path
    monkeypatch.setattr(build, "runnable_sets", lambda: ["avx2"])
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        cache.for_this_machine()
    monkeypatch.setattr(build, "runnable_sets", lambda: ["avx2", "generic"])
    tiny.write("common.h", "#define ANSWER 1\n")
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        cache.for_this_machine()


def test_a_library_with_flags_of_its_own_is_no_other_s(tiny, monkeypatch):
    cache.provide("cpu", SETS, ["-DMORE"])
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        cache.for_this_machine()


def test_only_the_user_can_write_to_the_cache(tiny, monkeypatch):
    before = os.umask(0)
    try:
        path = cache.for_this_machine()
    finally:
        os.umask(before)
    assert path.parent.stat().st_mode & 0o777 == 0o700 and path.stat().st_mode & 0o022 == 0
    path.parent.chmod(0o777)
    with pytest.raises(build.BuildError, match="not to be trusted: everybody can write to it"):
        cache.for_this_machine()
    path.parent.chmod(0o700)
    monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
    if path.stat().st_uid != 0:
        with pytest.raises(build.BuildError, match="not to be trusted: another user's"):
            cache.for_this_machine()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_a_library_of_another_user_is_refused(tiny):
    path = cache.for_this_machine()
    os.chown(path, 54321, 54321)
    with pytest.raises(build.BuildError, match="not to be trusted: another user's"):
        cache.for_this_machine()


def test_a_cache_that_cannot_be_written_to(tiny, monkeypatch):
    file = tiny.source / "common.h"
    monkeypatch.setenv("TRM_FAST_CACHE", str(file / "cache"))
    with pytest.raises(
        build.BuildError, match="cache .*common.h/cache cannot be written to: .*Not"
    ):
        cache.provide("cpu", SETS)


@pytest.mark.parametrize("limit", [0, 2000, 6000])
def test_a_full_disk(tiny, limit):
    # A limit on file sizes, ours and the compiler's: it meets the object, the library or its copy.
    done = tiny.run(
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "try: cache.provide('cpu', ['generic'])\n"
        "except build.BuildError as error: print(error.reason)"
    )
    assert done.returncode == 0 and (limit == 0 or BUILDING.fullmatch(done.stderr))
    assert len(done.stdout.splitlines()) == 1
    assert any(text in done.stdout for text in ("File too large", "size limit", "signal 25"))
    assert answer(cache.provide("cpu", SETS)) == 42


def test_processes_that_start_together_build_once(tiny):
    started = [tiny.start(PROVIDE) for _ in range(3)]
    results = [process.communicate() for process in started]
    assert len({out for out, _ in results}) == 1
    assert BUILDING.fullmatch("".join(err for _, err in results))
    assert tiny.compiled() == ["dispatch.cpp", "kernel.cpp"]


def test_a_killed_build_does_no_harm(tiny):
    killer = tiny.program(
        "killer", 'case "$*" in *" -c "*) kill -9 $PPID;; *) exec c++ "$@";; esac'
    )
    done = tiny.run(PROVIDE, CXX=str(killer))
    assert done.returncode == -signal.SIGKILL
    assert list(tiny.cache.glob("build-cpu-*")), "it was not killed in the middle"
    another = tiny.cache / "build-cuda-other"
    another.mkdir()
    assert answer(cache.provide("cpu", SETS)) == 42
    assert list(tiny.cache.glob("build-*")) == [another]  # it may be under way


def test_libraries_that_were_not_used_for_long_are_swept(tiny):
    tiny.cache.mkdir()
    for age in range(20):
        old = tiny.cache / f"trm_fast_cpu-generic-{age:02}.so"
        old.write_text("")
        build.seal(old)
        os.utime(old, (1e9 - age, 1e9 - age))
    path = cache.provide("cpu", SETS)
    left = {p.stem[-2:] for p in tiny.cache.glob("*.so") if p != path}
    assert left == {f"{age:02}" for age in range(cache.MOST_LIBRARIES)}
    assert len(list(tiny.cache.glob("*.sha256"))) == cache.MOST_LIBRARIES + 1


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("TRM_FAST_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.folder() == Path("/home/someone/.cache/trm_fast")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache.folder() == Path("/cache/trm_fast")
    monkeypatch.setenv("TRM_FAST_CACHE", "~/here")
    assert cache.folder() == Path("/home/someone/here")


def test_the_instruction_set_is_what_compiler_and_system_both_have(monkeypatch):
    macros = ["__AVX512F__", "__AVX512BW__", "__AVX512DQ__", "__AVX512VL__", "__AVX2__", "__FMA__"]
    flags = ["avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "sse2"]
    monkeypatch.setattr(build, "_is_x86", lambda: True)
    monkeypatch.setattr(build, "compiler", lambda: ("c++",))

    def chosen(defined, listed):
        monkeypatch.setattr(build, "_macros", lambda command: dict.fromkeys(defined, "1"))
        monkeypatch.setattr(build, "cpu_flags", lambda: None if listed is None else set(listed))
        return build.native_set()

    best = [*macros, "__AVX512BF16__", "__AVX512VNNI__"]
    assert chosen(best, [*flags, "avx512_bf16", "avx512_vnni"]) == "avx512_bf16"
    assert chosen(best, None) == "avx512_bf16"
    assert chosen(best, flags) == chosen(best, [*flags, "avx512_bf16"]) == "avx512"
    assert chosen(best[:-1], [*flags, "avx512_bf16", "avx512_vnni"]) == "avx512"
    assert chosen(macros, [*flags, "avx512_bf16", "avx512_vnni"]) == "avx512"
    assert chosen(macros, ["avx2", "fma"]) == "avx2"
    assert chosen(["__AVX2__"], flags) == "generic"
    monkeypatch.setattr(build, "_is_x86", lambda: False)
    assert build.native_set() == "generic" and build.portable_sets() == ("generic",)


def test_cuda_architectures(monkeypatch):
    monkeypatch.delenv("TRM_FAST_CUDA_ARCH", raising=False)
    assert build.cuda_architectures(["90a"]) == ("90a",)
    with pytest.raises(build.NothingToBuildWith, match="TRM_FAST_CUDA_ARCH"):
        build.cuda_architectures()
    monkeypatch.setenv("TRM_FAST_CUDA_ARCH", "80; 90a,100f")
    assert build.cuda_architectures(["75"]) == ("80", "90a", "100f")
    monkeypatch.setenv("TRM_FAST_CUDA_ARCH", "sm_80")
    with pytest.raises(ValueError, match="like 80;90a, not 'sm_80'"):
        build.cuda_architectures()


@pytest.mark.parametrize(
    "architecture, capability, serves",
    [
        ("80", (8, 0), True),
        ("80", (8, 6), True),
        ("86", (8, 0), False),
        ("80", (9, 0), False),
        ("90a", (9, 0), True),
        ("100a", (10, 0), True),
        ("100a", (10, 3), False),
        ("100f", (10, 3), True),
    ],
)
def test_which_gpu_runs_which_code(architecture, capability, serves):
    assert build.cuda_serves(architecture, capability) is serves


def test_where_the_cuda_toolkit_is(monkeypatch, tmp_path):
    toolkit = tmp_path / "toolkit"
    for name in ("bin/nvcc", "include/cuda_runtime.h"):
        (toolkit / name).parent.mkdir(parents=True)
        (toolkit / name).touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    assert build.cuda_home() == toolkit
    (toolkit / "include/cuda_runtime.h").unlink()
    monkeypatch.setenv("PATH", str(toolkit / "bin"))
    if not Path("/usr/local/cuda/bin/nvcc").exists():
        with pytest.raises(build.NothingToBuildWith, match="CUDA_HOME"):
            build.cuda_home()


CUDA_KERNEL = """
#include "../common.h"
#include <cuda_runtime.h>
__global__ void fill(float* x, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] = ANSWER;
}
cudaError_t fill_with_answer(float* x, int n) {
  fill<<<(n + 255) / 256, 256>>>(x, n);
  return cudaGetLastError();
}
"""
CUDA_BINDING = """
#include <cuda_runtime_api.h>
#ifndef USE_CUDA
#error the binding needs USE_CUDA
#endif
cudaError_t fill_with_answer(float* x, int n);
extern "C" __attribute__((visibility("default"))) int answer() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count < 0 ? fill_with_answer(0, 1) : 42;
}
"""


def test_the_cuda_library_links_without_a_cuda_torch(tiny, monkeypatch):
    try:
        build.cuda_home()
    except build.BuildError as error:
        pytest.skip(error.reason)
    tiny.write("cuda/fill.cu", CUDA_KERNEL)
    tiny.write("cuda/binding.cpp", CUDA_BINDING)
    out = tiny.cache / "cuda.so"
    output = build.build("cuda", out, ["80", "90a"])
    assert output.count("ptxas info") >= 2 and "0 bytes spill stores" in output
    content = out.read_bytes()
    assert b"libtorch_cuda.so\0" in content, "it would miss its symbols where torch has CUDA"
    assert b"libcudart.so" not in content, "the runtime is linked statically"
    assert b"sm_80" in content and b"sm_90a" in content
    # The stand-in again, so that it loads here: by its name the system takes what is loaded.
    stand_in = tiny.bin / "libtorch_cuda.so"
    empty = tiny.write("empty.cpp", "")
    link = ["c++", "-shared", "-Wl,-soname,libtorch_cuda.so", str(empty), "-o", str(stand_in)]
    subprocess.run(link, check=True)
    done = tiny.run(
        f"import torch, ctypes; ctypes.CDLL({str(stand_in)!r}); "
        f"print(ctypes.CDLL({str(out)!r}).answer())"
    )
    assert (done.stdout, done.returncode) == ("42\n", 0), done.stderr


def test_the_key_of_the_cuda_library_has_its_compiler(tiny, monkeypatch):
    toolkit = tiny.bin
    monkeypatch.setattr(build, "cuda_home", lambda: toolkit.parent)
    tiny.write("cuda/fill.cu", CUDA_KERNEL)
    tiny.program("nvcc", "echo release 12.0")
    first = build.key("cuda", ["80"])
    tiny.program("nvcc", "echo release 13.0")
    assert build.key("cuda", ["80"]) != first
    assert build.key("cuda", ["80"]).startswith("trm_fast_cuda-80-")


def test_a_tiny_source_folder_is_what_these_tests_use(tiny: Tiny):
    assert {p.name for p in build.sources("cpu")} == {"dispatch.cpp", "kernel.cpp"}
    assert [p.name for p in build.headers("cpu")] == ["common.h"]
