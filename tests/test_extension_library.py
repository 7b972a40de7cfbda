"""Loading the extension, or going on without it; and that it leaves the process as it was."""

import logging
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import sanitize
import torch
from extension_builds import BUILDING, ROOT, tiny

from trm_fast import memory
from trm_fast.console import show_builds
from trm_fast.extension import build, library
from trm_fast.extension.swiglu_rmsnorm import swiglu_rmsnorm

__all__ = ["tiny"]

BROKEN = "int f() { return nowhere; }\nint g() { return nothing; }\n"


def test_built_and_loaded_without_a_word(tiny, capfd, recwarn, caplog):
    caplog.set_level(logging.INFO, "trm_fast")
    assert library.instruction_set() is None
    assert library.unavailable("cpu") is None
    assert library.state("cpu") == "built"
    assert library.instruction_set() == "generic"
    assert capfd.readouterr() == ("", "") and not recwarn.list
    before, after = [record.getMessage() for record in caplog.records]
    assert before.startswith("building the CPU extension for generic, once: about ")
    assert after.startswith("built the CPU extension in ")


@pytest.fixture
def command():
    """As in a process of a command."""
    show_builds()
    show_builds()  # as `main` does, called again


def test_commands_say_what_is_built(tiny, capfd, command):
    assert library.unavailable("cpu") is None
    out, err = capfd.readouterr()
    before, after = err.splitlines()
    assert before.startswith("building the CPU extension for generic, once: about ")
    assert after.startswith("built the CPU extension in ") and out == ""


def test_commands_say_why_nothing_is_built(tiny, monkeypatch, capfd, command):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    reason = library.unavailable("cpu")
    assert reason == "no C++ compiler: /nowhere/c++ is not on PATH"
    why = f"trm_fast goes on without its compiled cpu extension: {reason}\n"
    assert capfd.readouterr() == ("", why)


def warnings_of(caplog):
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    return [text for text in warned if not text.startswith("building the CPU extension")]


def test_auto_warns_once_and_goes_on(tiny, capfd, caplog):
    tiny.write("cpu/kernel.cpp", BROKEN)
    reason = library.unavailable("cpu")
    assert library.unavailable("cpu") == library.state("cpu") == reason
    (text,) = warnings_of(caplog)
    assert text == f"trm_fast goes on without its compiled cpu extension: {reason}"
    assert "error: " in text and "nowhere" in text and "\n" not in text and "nothing" not in text
    assert library.instruction_set() is None
    assert capfd.readouterr() == ("", "")


def test_off_is_silent_and_touches_nothing(tiny, monkeypatch, recwarn):
    monkeypatch.setenv("TRM_FAST_EXT", "off")
    assert library.unavailable("cpu") == library.state("cpu") == "TRM_FAST_EXT=off"
    assert not recwarn.list and not tiny.cache.exists() and tiny.compiled() == []


def test_require_raises_with_everything_the_compiler_said(tiny, monkeypatch, recwarn):
    monkeypatch.setenv("TRM_FAST_EXT", "require")
    tiny.write("cpu/kernel.cpp", BROKEN)
    with pytest.raises(build.BuildError, match="(?s)nowhere.*nothing"):
        library.unavailable("cpu")
    tiny.compiled()
    with pytest.raises(build.BuildError, match="(?s)nowhere.*nothing"):
        library.unavailable("cpu")
    assert tiny.compiled() == [], "it was built again"
    assert not recwarn.list


def test_other_values_are_refused(tiny, monkeypatch):
    monkeypatch.setenv("TRM_FAST_EXT", "on")
    with pytest.raises(ValueError, match="TRM_FAST_EXT is one of auto, off, require, not 'on'"):
        library.unavailable("cpu")
    with pytest.raises(ValueError, match="kind is one of cpu, cuda, not 'gpu'"):
        library.state("gpu")


def test_what_does_not_load_is_built_again_once(tiny):
    path = tiny.cache / (build.key("cpu", ["generic"]) + build.SUFFIX)
    tiny.cache.mkdir()
    path.write_bytes(b"of another world")
    build.seal(path)
    assert library.state("cpu") == "built"
    assert tiny.compiled() == ["dispatch.cpp", "kernel.cpp"]


def test_what_never_loads_is_a_reason(tiny, caplog):
    tiny.write("cpu/kernel.cpp", "extern int nowhere(); int x = nowhere();\n")
    assert library.unavailable("cpu") is not None
    (text,) = warnings_of(caplog)
    assert re.search("does not load: .*undefined symbol: .*nowhere", text)
    assert tiny.compiled() == ["dispatch.cpp"] * 2 + ["kernel.cpp"] * 2


def test_kernels_for_another_cpu_are_a_reason(tiny, caplog):
    tiny.write(
        "cpu/dispatch.cpp",
        'extern "C" __attribute__((visibility("default")))'
        ' const char* trm_fast_instruction_set() { return ""; }',
    )
    assert library.unavailable("cpu") is not None
    (text,) = warnings_of(caplog)
    assert "this CPU cannot run what trm_fast_cpu-generic-" in text


def test_a_prebuilt_library_needs_no_compiler(tiny, monkeypatch):
    prebuilt = library.PREBUILT / build.prebuilt_name("cpu", ["avx2", "generic"])
    build.build("cpu", prebuilt, ["avx2", "generic"])
    build.seal(prebuilt)
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert library.state("cpu") == "prebuilt"
    assert library.unavailable("cpu") is None
    assert library.instruction_set() == "generic"
    assert not tiny.cache.exists()


@pytest.mark.parametrize("how", ["damaged", "of other sources"])
def test_a_prebuilt_library_that_is_not_right_is_passed_over(tiny, how):
    prebuilt = library.PREBUILT / build.prebuilt_name("cpu", ["generic"])
    build.build("cpu", prebuilt, ["generic"])
    build.seal(prebuilt)
    if how == "damaged":
        prebuilt.write_bytes(prebuilt.read_bytes()[:4096])
    else:
        tiny.write("common.h", "#define ANSWER 1\n")
    assert library.state("cpu") == "built"


def test_never_inside_a_compiled_forward(tiny, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match="must be loaded before it is traced"):
        library.unavailable("cpu")
    assert tiny.compiled() == []


def test_no_gpu_is_no_reason_to_warn(tiny, recwarn, monkeypatch):
    monkeypatch.setattr(library, "_has_gpu", lambda kind: False)
    monkeypatch.delenv("TRM_FAST_CUDA_ARCH", raising=False)
    assert "CUDA" in library.unavailable("cuda")
    assert not recwarn.list


def test_tests_may_load_another_set(tiny):
    assert library.load_for_tests(["avx2"], ["-DMORE"]) == "another"
    assert library.unavailable("cpu") is None
    assert "-DMORE" in tiny.calls_file.read_text()
    with pytest.raises(RuntimeError, match="loaded already"):
        library.load_for_tests(["generic"])


# ---- the library itself, in processes of its own

COMPARE = """
import sys, warnings
warnings.simplefilter("error")
import torch
from trm_fast.extension import library
from trm_fast.extension.linear_rmsnorm import linear_rmsnorm
from trm_fast.reference import linear_rmsnorm as reference
name = sys.argv[1]
# Not optimised, it compiles in a sixth of the time.
assert library.load_for_tests([name], ["-O0"]) == library.instruction_set() == name
torch.manual_seed(0)
for dtype, limit in ((torch.float32, 2e-5), (torch.bfloat16, 4e-2)):
    for B, S, D, E in ((2, 97, 48, 96), (1, 3, 16, 16), (0, 5, 32, 16)):
        given = [torch.randn(B, S, E), torch.randn(D, E) / E**0.5, torch.randn(B, S, D)]
        given = [t.to(dtype).requires_grad_() for t in given]
        wide = [t.detach().double().requires_grad_() for t in given]
        out, exact = linear_rmsnorm(*given, 1e-5), reference(*wide, 1e-5)
        grad = torch.randn(B, S, D).to(dtype)
        got = [out, *torch.autograd.grad(out, given, grad)]
        right = [exact, *torch.autograd.grad(exact, wide, grad.double())]
        for g, r in zip(got, right):
            error = (g.double() - r).abs().max() if r.numel() else 0
            size = r.abs().max() if r.numel() else 1
            assert error <= limit * size, (name, dtype, float(error), float(size))
"""


@pytest.mark.parametrize("name", ["avx512", "avx2", "generic"])
def test_every_instruction_set_computes_the_same(name):
    sets = list(build.INSTRUCTION_SETS)
    try:
        if sets.index(name) < sets.index(build.native_set()):
            pytest.skip(f"this CPU has no {name}")
    except build.BuildError as error:
        pytest.skip(error.reason)
    command = [sys.executable, "-c", COMPARE, name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = BUILDING.sub("", done.stderr)
    assert (done.returncode, done.stdout, said) == (0, "", "")


def test_memory_checks_run_on_every_operation_unless_told_which():
    for given, tests in (
        ([], ["tests/ops"]),
        (["-x", "--durations=5"], ["-x", "--durations=5", "tests/ops"]),
        (["-x", "tests/ops/test_swiglu.py::test_empty"], None),
    ):
        command = sanitize.command("avx2", given)
        options = ["--instruction-set", "avx2", "--extension-flags", " ".join(sanitize.FLAGS)]
        assert command[: len(sanitize.TESTS) + 5] == [sys.executable, *sanitize.TESTS, *options]
        assert command[len(sanitize.TESTS) + 5 :] == (tests or given)


UNTOUCHED = """
import ctypes, torch
from trm_fast.extension import library
from trm_fast.extension.linear_rmsnorm import linear_rmsnorm
assert library.unavailable("cpu") is None
place = ctypes.CDLL(None).__errno_location
place.restype = ctypes.POINTER(ctypes.c_int)
def tiny_numbers():
    return float((torch.full((200_000,), 1e-40) * 0.5).count_nonzero())
assert tiny_numbers() == 200_000
given = [torch.randn(4, 97, 64), torch.randn(64, 64), torch.randn(4, 97, 64)]
given = [t.requires_grad_() for t in given]
linear_rmsnorm(*given, 1e-5).sum().backward()
for threads in (1, 2):
    torch.set_num_threads(threads)
    with torch.no_grad():
        place()[0] = 77
        linear_rmsnorm(*given, 1e-5)
        assert place()[0] == 77, place()[0]
    assert tiny_numbers() == 200_000
"""


def test_denormals_and_errno_are_left_alone(extension):
    command = [sys.executable, "-W", "error", "-c", UNTOUCHED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_prebuilt_wheel_loads_without_a_compiler(tmp_path, tiny):
    """The whole way: setup.py, the archive's name, a folder that it is unpacked in, loading."""
    pytest.importorskip("setuptools", reason="the build backend; pip brings its own")
    work = tmp_path / "work"
    shutil.copytree(ROOT / "trm_fast", work / "trm_fast")
    shutil.copytree(ROOT / "kernels", work / "kernels")
    shutil.copytree(tiny.source, work / "csrc")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, work)
    make = [sys.executable, "-c", "import setuptools.build_meta as b; print(b.build_wheel('.'))"]
    environment = tiny.environment(TRM_FAST_PREBUILD="cpu")
    done = subprocess.run(make, cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheel = done.stdout.split()[-1]
    assert re.fullmatch(r"trm_fast-[0-9.]+-py3-none-(linux|macosx)_\w+\.whl", wheel)
    place = tmp_path / "installed"
    zipfile.ZipFile(work / wheel).extractall(place)
    code = (
        "from trm_fast.extension import library; import sys; "
        "print(library.__file__, library.state('cpu'), library.instruction_set())"
    )
    environment = tiny.environment(CXX="nowhere-c++", PATH="/nowhere", PYTHONPATH=str(place))
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    file = place / "trm_fast/extension/library.py"
    assert (done.stdout, done.stderr) == (f"{file} prebuilt generic\n", "")
    assert not tiny.cache.exists()


def test_what_is_to_be_prebuilt_is_checked():
    command = [sys.executable, "setup.py", "--version"]
    environment = {**os.environ, "TRM_FAST_PREBUILD": "cpu,gpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stderr == "TRM_FAST_PREBUILD is cpu, cuda or cpu,cuda, not 'cpu,gpu'\n"
    assert done.returncode == 1


def test_memory_is_kept_for_the_next_step_and_given_back(extension):
    library.release_memory()
    assert library.kept_memory() == 0
    gate_up, down = torch.randn(64, 32), torch.randn(32, 32)
    swiglu_rmsnorm(torch.randn(2, 3, 32), gate_up, down, 1e-5)
    kept = library.kept_memory()
    assert kept > 0
    swiglu_rmsnorm(torch.randn(2, 3, 32), gate_up, down, 1e-5)
    assert library.kept_memory() == kept
    before = memory.free_bytes(torch.device("cpu"))
    library.release_memory()
    assert library.kept_memory() == 0
    assert abs(memory.free_bytes(torch.device("cpu")) - before) < 2**30
