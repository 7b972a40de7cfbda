"""Programmatic dependent launch (PDL): every kernel begins with the wait, and both go together.

What the compiler makes of the wait is in tests/test_kernels_report.py and in `make aot`.
"""

import ast
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launches import ROWS

from trm_fast.kernels import _runtime

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
SOURCES = {path.name: ast.parse(path.read_text("utf-8")) for path in sorted(KERNELS.glob("*.py"))}
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def is_jit(node: ast.AST) -> bool:
    if not isinstance(node, ast.FunctionDef):
        return False
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


FOUND = [
    pytest.param(node, id=f"{name.removesuffix('.py')}-{node.name.strip('_')}")
    for name, tree in SOURCES.items()
    for node in ast.walk(tree)
    if is_jit(node)
]


def test_there_are_kernels():
    assert len(FOUND) > 20


@pytest.mark.parametrize("kernel", FOUND)
def test_a_kernel_begins_with_the_wait(kernel):
    last = kernel.args.args[-1]
    assert ast.unparse(last) == "PDL: tl.constexpr"
    assert not kernel.args.defaults and not kernel.args.kwonlyargs, "`run` gives every argument"
    body = kernel.body[ast.get_docstring(kernel) is not None :]
    assert ast.unparse(body[0]) == "begin(PDL)"
    used = [node for node in ast.walk(kernel) if isinstance(node, ast.Name) and node.id == "PDL"]
    assert len(used) == 1


def test_a_kernel_is_launched_by_run_alone():
    places = {
        (name, getattr(function, "name", ""))
        for name, tree in SOURCES.items()
        for function in tree.body
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    }
    assert places == {("_runtime.py", "run")}


class Kernel:
    """Takes what it would be launched with."""

    def __getitem__(self, grid):
        return lambda **given: setattr(self, "given", given)


def launched(device: torch.device) -> tuple[bool, bool | None]:
    """Whether a kernel on `device` waits, and whether its launch says so."""
    kernel = Kernel()
    _runtime.run(kernel, (1,), ROWS[90, 16], SimpleNamespace(device=device), count=3)
    assert kernel.given["count"] == 3 and kernel.given["num_warps"] == 8
    return kernel.given["PDL"], kernel.given.get("launch_pdl")


@pytest.fixture
def gpu(monkeypatch):
    """As if device 0 were a GPU, of the family set by the function yielded."""
    monkeypatch.setattr(_runtime, "_pdl", False)  # whatever the environment says
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_runtime.triton.knobs.runtime, "interpret", False)
    return lambda family: monkeypatch.setattr(_runtime, "_family", lambda index: family)


@pytest.mark.parametrize(("family", "has"), [(80, False), (90, True), (100, True)])
def test_the_wait_comes_with_the_launch_where_the_gpu_has_both(gpu, family, has):
    gpu(family)
    assert launched(CUDA) == (False, None), "off unless it is asked for"
    with _runtime.dependent_launches():
        assert launched(CUDA) == ((True, True) if has else (False, None))
        with _runtime.dependent_launches(False):
            assert launched(CUDA) == (False, None)
        assert launched(CUDA)[0] is has
    assert launched(CUDA) == (False, None)
    assert _runtime.has_dependent_launches(CUDA) is has


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_the_interpreter_knows_neither(gpu, monkeypatch, device):
    gpu(90)
    monkeypatch.setattr(_runtime.triton.knobs.runtime, "interpret", True)
    with _runtime.dependent_launches():
        assert launched(device) == (False, None)


@pytest.mark.parametrize(
    ("word", "on"), [(None, False), ("", False), ("0", False), ("true", None), ("1", True)]
)
def test_the_environment_turns_it_on(monkeypatch, word, on):
    if word is None:
        monkeypatch.delenv("TRM_FAST_PDL", raising=False)
    else:
        monkeypatch.setenv("TRM_FAST_PDL", word)
    spec = importlib.util.spec_from_file_location("another_runtime", _runtime.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    if on is None:
        with pytest.raises(ValueError, match="TRM_FAST_PDL is 0 or 1, not 'true'"):
            spec.loader.exec_module(module)
        return
    spec.loader.exec_module(module)
    assert module._pdl is on
