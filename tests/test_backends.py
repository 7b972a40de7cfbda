"""The only chooser of implementations: what it takes, what it says, what it refuses."""

import pickle
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from tiny import tiny_config

from trm_fast import backends, memory, reference
from trm_fast.backends import BACKENDS, ROWS, Row
from trm_fast.config import ModelConfig
from trm_fast.ops import OP_NAMES

CPU = torch.device("cpu")


def fast_inject(z, y, x):
    return z + (y + x)


@pytest.fixture
def with_row(monkeypatch):
    """Adds a row for `inject` to those of the reference; `reason` says why it does not serve."""
    references = tuple(row for row in ROWS if row.backend == "reference")
    monkeypatch.setattr(backends, "ROWS", references)

    def add(backend, reason=None):
        asked = []

        def unsupported(*question):
            asked.append(question)
            return reason

        row = Row("inject", backend, lambda: fast_inject, unsupported)
        monkeypatch.setattr(backends, "ROWS", (*backends.ROWS, row))
        return asked

    return add


def chosen(name):
    """(implementation, reason) that `report` gives for inject."""
    (choice,) = [c for c in backends.report(name, CPU, torch.float32) if c.op == "inject"]
    return choice.implementation, choice.reason


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_reference_serves_everything(name, dtype):
    devices = ["meta", "mps"]
    if name == "reference" or dtype in (torch.float16, torch.float64):
        devices.append("cpu")
    if name == "reference" or not torch.cuda.is_available():
        devices.append("cuda")
    for device in devices:
        ops = backends.select(name, torch.device(device), dtype)
        assert all(getattr(ops, op) is getattr(reference, op) for op in OP_NAMES)


def test_unknown_name():
    for function in (backends.select, backends.report):
        with pytest.raises(ValueError) as error:
            function("refrence", CPU, torch.float32)
        assert "unknown backend 'refrence'" in str(error.value)
        assert "did you mean 'reference'" in str(error.value)
        assert "allowed: auto, triton, cuda, cpp, reference" in str(error.value)
        with pytest.raises(ValueError, match="unknown backend 'zzz'; allowed"):
            function("zzz", CPU, torch.float32)


@pytest.mark.parametrize("name", [b for b in BACKENDS if b != "reference"])
def test_named_backend_without_an_operation(name, with_row):
    """The reference serves what a backend does not have, and the report says so."""
    with_row(name)
    ops = backends.select(name, CPU, torch.bfloat16)
    assert ops.inject is fast_inject
    assert all(getattr(ops, op) is getattr(reference, op) for op in OP_NAMES if op != "inject")
    said = {c.op: (c.implementation, c.reason) for c in backends.report(name, CPU, torch.bfloat16)}
    assert said.pop("inject") == (name, "named by the user")
    assert set(said.values()) == {("reference", f"{name}: has no such operation")}


@pytest.mark.parametrize("name", [b for b in BACKENDS if b != "reference"])
def test_named_backend_that_cannot_serve_raises_with_its_reason(name, with_row):
    with_row(name, "no such device")
    for function in (backends.select, backends.report):
        with pytest.raises(ValueError) as error:
            function(name, CPU, torch.bfloat16)
        text = str(error.value)
        assert "\n" not in text
        assert text == (
            f"backend '{name}' cannot serve inject on cpu in torch.bfloat16 ({name}: no such "
            "device); backend='auto' takes what is there"
        )


def test_auto_takes_the_first_that_serves(with_row):
    with_row("cpp")
    assert chosen("auto")[0] == "cpp"
    assert backends.select("auto", CPU, torch.float32).inject is fast_inject
    with_row("cuda")
    assert chosen("auto")[0] == "cuda"


def test_auto_says_why_nothing_faster_was_taken(with_row):
    with_row("triton", "needs an NVIDIA GPU")
    implementation, reason = chosen("auto")
    assert implementation == "reference"
    assert reason == (
        "triton: needs an NVIDIA GPU; cuda: has no such operation; cpp: has no such operation"
    )
    assert backends.select("auto", CPU, torch.float32).inject is reference.inject


def test_named_is_said(with_row):
    with_row("cpp")
    assert chosen("reference") == ("reference", "named by the user")


def test_rows_are_asked_about_device_dtype_and_shapes(with_row):
    asked = with_row("cpp")
    config = ModelConfig.from_dict(tiny_config())
    backends.select("auto", CPU, torch.bfloat16, config)
    backends.select("auto", CPU, torch.float32)
    assert asked == [(CPU, torch.bfloat16, config), (CPU, torch.float32, None)]


def test_report_has_every_op_in_order():
    assert tuple(c.op for c in backends.report("auto", CPU, torch.float32)) == OP_NAMES


def test_ops_are_frozen_and_pickle():
    ops = backends.select("auto", CPU, torch.float32)
    with pytest.raises(FrozenInstanceError):
        ops.inject = fast_inject
    assert pickle.loads(pickle.dumps(ops)) == ops


def gpu(monkeypatch, capability=(9, 0), hip=None, triton=True):
    """Answers of a machine with a GPU; nothing is run on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(backends.library, "unavailable", lambda kind: "none in this test")
    if not triton:
        monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)


CUDA = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mixer", [{"mlp_t": True}, {"num_heads": 1}], ids=["mlp_t", "attention"])
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0)])
def test_auto_takes_triton_on_a_gpu(monkeypatch, mixer, dtype, capability):
    gpu(monkeypatch, capability)
    config = ModelConfig.from_dict(tiny_config(**mixer))
    for name in ("auto", "triton"):
        ops = backends.select(name, CUDA, dtype, config)
        for choice in backends.report(name, CUDA, dtype, config):
            assert choice.implementation == "triton", choice
            function = getattr(ops, choice.op)
            assert function.__module__ == f"trm_fast.kernels.{choice.op}"
            assert function.__name__ == choice.op
    assert pickle.loads(pickle.dumps(ops)) == ops


def reasons(device, dtype=torch.bfloat16, config=None):
    return {c.op: c.reason for c in backends.report("auto", device, dtype, config)}


@pytest.mark.parametrize(
    ("machine", "device", "reason"),
    [
        ({}, CPU, "serves NVIDIA GPUs only"),
        ({}, torch.device("mps"), "serves NVIDIA GPUs only"),
        ({"hip": "6.2"}, CUDA, "serves NVIDIA GPUs only"),
        ({"capability": (7, 5)}, CUDA, "serves compute capabilities 8.0 to 10.3, this GPU has 7.5"),
        ({"triton": False}, CUDA, "Triton is not installed"),
    ],
)
def test_where_triton_does_not_serve(monkeypatch, machine, device, reason):
    gpu(monkeypatch, **machine)
    said = reasons(device)
    assert set(said) == set(OP_NAMES)
    assert all(f"triton: {reason}" in text for text in said.values())
    found = backends.select("auto", device, torch.bfloat16).inject
    assert not found.__module__.startswith("trm_fast.kernels")
    with pytest.raises(ValueError, match="'triton' cannot serve embed_reset"):
        backends.select("triton", device, torch.bfloat16)


def test_without_any_gpu():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "triton: there is no NVIDIA GPU here" in reasons(CUDA)["inject"]


def test_shapes_that_triton_does_not_serve(monkeypatch):
    gpu(monkeypatch)
    wide = ModelConfig.from_dict(tiny_config(hidden_size=1040, num_heads=65))
    assert "up to 1024, not 1040" in reasons(CUDA, config=wide)["linear_rmsnorm"]
    odd = ModelConfig.from_dict(tiny_config(hidden_size=40, num_heads=4))
    assert "multiple of 16 up to 1024, not 40" in reasons(CUDA, config=odd)["swiglu_rmsnorm"]
    heads = ModelConfig.from_dict(tiny_config(hidden_size=512, num_heads=2, mlp_t=False))
    assert "head" in reasons(CUDA, config=heads)["rope_attention"]
    assert "head" in reasons(CUDA, config=heads)["deep_recursion"]
    dropping = ModelConfig.from_dict(tiny_config(hidden_size=32, dropout=0.1))
    said = reasons(CUDA, config=dropping)
    assert "triton: serves no dropout" in said["deep_recursion"]
    assert said["token_mix"] == "the first choice"
    assert "not float64" in reasons(CUDA, torch.float64)["stablemax_loss"]


CUDA_OPS = ("embed_reset", "inject", "residual_rmsnorm", "swiglu", "deep_recursion")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mixer", [{"mlp_t": True}, {"num_heads": 2}], ids=["mlp_t", "attention"])
def test_the_cuda_library_serves_where_triton_does_not(monkeypatch, mixer, dtype):
    """Widths of any size; what it does not have comes from the reference."""
    gpu(monkeypatch, (12, 0))
    monkeypatch.setattr(backends.library, "unavailable", lambda kind: None)
    config = ModelConfig.from_dict(tiny_config(hidden_size=48, **mixer))
    for name in ("auto", "cuda"):
        ops = backends.select(name, CUDA, dtype, config)
        said = {c.op: c for c in backends.report(name, CUDA, dtype, config)}
        for op in OP_NAMES:
            place = f"trm_fast.extension.{op}" if op in CUDA_OPS else "trm_fast.reference"
            assert getattr(ops, op).__module__ == place
            assert said[op].implementation == ("cuda" if op in CUDA_OPS else "reference")
        assert "cuda: has no such operation" in said["token_mix"].reason
        named = replace(config, backend=name)
        assert backends.recursion_engine(CUDA, dtype, named) == "cuda"
    assert memory.step_bytes(config, 8, "save", "cuda") > memory.step_bytes(
        config, 8, "recompute", "cuda"
    )


@pytest.mark.parametrize(
    ("machine", "device", "changes", "reason"),
    [
        ({}, CPU, {}, "serves NVIDIA GPUs only"),
        ({"hip": "6.2"}, CUDA, {}, "serves NVIDIA GPUs only"),
        ({"capability": (7, 5)}, CUDA, {}, "compute capabilities from 8.0 on, this GPU has 7.5"),
        ({}, CUDA, {"dropout": 0.1}, "serves no dropout"),
        ({}, CUDA, {"hidden_size": 48, "num_heads": 4}, "multiple of 8 up to 192, not 48 features"),
    ],
)
def test_where_the_cuda_library_does_not_serve(monkeypatch, machine, device, changes, reason):
    gpu(monkeypatch, **machine)
    monkeypatch.setattr(backends.library, "unavailable", lambda kind: None)
    config = ModelConfig.from_dict(tiny_config(**changes))
    for function in (backends.select, backends.report):
        with pytest.raises(ValueError, match=f"backend 'cuda' cannot serve .*{reason}"):
            function("cuda", device, torch.bfloat16, config)


def test_without_a_compiled_cuda_library(monkeypatch):
    gpu(monkeypatch, triton=False)
    said = reasons(CUDA)
    text = "cuda: there is no compiled library (none in this test)"
    assert all((text in said[op]) == (op in CUDA_OPS) for op in OP_NAMES)
    with pytest.raises(ValueError, match="'cuda' cannot serve embed_reset .*none in this test"):
        backends.select("cuda", CUDA, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="cuda: there is no NVIDIA GPU here"):
        backends.select("cuda", CUDA, torch.bfloat16)


def test_table_has_every_op_of_a_backend():
    assert backends.table("reference") == backends.select("reference", CPU, torch.float32)
    table = backends.table("triton")
    assert table.inject.__module__ == "trm_fast.kernels.inject"


CPP_SHAPES = {
    "mlp_t": {"mlp_t": True, "pos_encodings": "none", "hidden_size": 48},
    "attention": {"hidden_size": 64, "num_heads": 2},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", CPP_SHAPES)
def test_auto_takes_the_compiled_extension_on_a_cpu(shape, dtype, extension):
    config = ModelConfig.from_dict(tiny_config(**CPP_SHAPES[shape]))
    for name in ("auto", "cpp"):
        ops = backends.select(name, CPU, dtype, config)
        for op in OP_NAMES:
            assert getattr(ops, op).__module__ == f"trm_fast.extension.{op}"
        assert backends.recursion_engine(CPU, dtype, replace(config, backend=name)) == "cpp"
    assert pickle.loads(pickle.dumps(ops)) == ops


def test_shapes_that_the_extension_does_not_serve(extension):
    odd = ModelConfig.from_dict(tiny_config(hidden_size=40, num_heads=4))
    assert (
        "cpp: needs a hidden size that is a multiple of 16, not 40"
        in reasons(CPU, torch.float32, odd)["token_mix"]
    )
    heads = ModelConfig.from_dict(tiny_config(hidden_size=48, num_heads=2, mlp_t=False))
    said = reasons(CPU, torch.float32, heads)
    assert "head" in said["rope_attention"] and "head" in said["deep_recursion"]
    dropping = ModelConfig.from_dict(tiny_config(hidden_size=32, num_heads=2, dropout=0.1))
    assert "cpp: serves no dropout" in reasons(CPU, torch.float32, dropping)["deep_recursion"]
    for dtype in (torch.float16, torch.float64):
        assert "cpp: serves float32 and bfloat16" in reasons(CPU, dtype)["inject"]
        with pytest.raises(ValueError, match="'cpp' cannot serve embed_reset"):
            backends.select("cpp", CPU, dtype)


def test_without_a_compiled_library(monkeypatch):
    monkeypatch.setattr(backends.library, "unavailable", lambda kind: "no C++ compiler")
    said = reasons(CPU, torch.float32)
    assert all("cpp: there is no compiled library (no C++ compiler)" in t for t in said.values())
    assert backends.select("auto", CPU, torch.float32).inject is reference.inject
    with pytest.raises(ValueError, match=r"'cpp' cannot serve .*no C\+\+ compiler"):
        backends.select("cpp", CPU, torch.float32)
