"""`profile=true`: what is counted, which files there are, and that no failure ends a training."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from tiny import MIXERS, tiny_batch, tiny_model

from trm_fast import profiling
from trm_fast.flops import step_flops
from trm_fast.losses import ACTLossHead
from trm_fast.profiling import FOLDER, OpCounts, StepProfile

CPU = torch.device("cpu")
SIZES = {"hidden_size": 32, "L_cycles": 1}


@pytest.fixture(autouse=True)
def known_peak(monkeypatch):
    """1 TFLOP/s and 10 GB/s, instead of measuring them."""
    monkeypatch.setattr(profiling, "matmul_peak", lambda dtype, device, size: 1000.0)
    monkeypatch.setattr(profiling, "copy_peak", lambda device, size: 10.0)


def training(**changes):
    """A function that does one training step, and its useful operations as PyTorch counts them."""
    model = tiny_model(**SIZES, **changes)
    head, batch = ACTLossHead(model, "stablemax_cross_entropy"), tiny_batch()
    carry = head.initial_carry(batch)

    def step():
        head.zero_grad()
        head(return_keys=[], carry=carry, batch=batch)[1].backward()

    return step, step_flops(model.config, "train", 4, scores_again=True)


def profiled(folder, count, **changes):
    said = []
    step, useful = training(**changes)
    with StepProfile(folder, CPU, torch.float32, useful, 1, 2, tell=said.append) as profile:
        for _ in range(count):
            step()
            profile.step()
    return profile, said, useful


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_the_table_of_a_small_model(mixer, backend, tmp_path, extension):
    profile, said, useful = profiled(tmp_path, 6, **MIXERS[mixer], backend=backend)
    assert profile.done
    assert said == [f"profile of 2 steps: {tmp_path / FOLDER / 'ops.txt'}"]
    assert sorted(p.name for p in (tmp_path / FOLDER).iterdir()) == [
        *("ops.json", "ops.txt", "trace.json.gz")
    ]
    found = json.loads((tmp_path / FOLDER / "ops.json").read_text(encoding="utf-8"))
    ops = {row["name"]: row for row in found["ops"]}
    assert sum(row["gflop"] for row in ops.values()) * 1e9 == pytest.approx(useful)
    assert sum(row["share"] for row in ops.values()) == pytest.approx(1)
    assert [row["ms"] for row in found["ops"]] == sorted(
        (r["ms"] for r in ops.values()), reverse=True
    )
    name = "trm_fast_ext::deep_recursion" if backend == "cpp" else "aten::mm"
    row = ops[name]
    assert row["calls"] == (1 if backend == "cpp" else int(row["calls"]))
    assert row["tflop_per_s"] == pytest.approx(row["gflop"] / row["ms"])
    assert row["fraction_of_matmul"] == pytest.approx(row["tflop_per_s"])
    assert row["fraction_of_copy"] == pytest.approx(row["mb"] / row["ms"] / 10)
    assert (found["steps"], found["dtype"], found["peaks"]) == (
        *(2, "float32", "measured, torch.mm and a copy"),
    )
    assert found["mfu"] == pytest.approx(useful / found["step_ms"] / 1e9)
    assert found["kernels"] == []


def test_the_trace_and_the_text_can_be_read(tmp_path):
    profiled(tmp_path, 6, backend="reference")
    with gzip.open(tmp_path / FOLDER / "trace.json.gz", "rt", encoding="utf-8") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "aten::mm" in names
    assert sum(str(name).startswith("ProfilerStep") for name in names) == 2
    lines = (tmp_path / FOLDER / "ops.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("2 training steps on ")
    assert "useful GFLOP, MFU" in lines[0]
    assert lines[1] == "peaks (measured, torch.mm and a copy): 1 TFLOP/s, 10 GB/s"
    assert lines[4].split()[:3] == ["calls", "ms", "share"]
    assert max(map(len, lines)) <= 130


def test_bytes_are_arguments_and_results_once():
    a, b = torch.ones(4, 8), torch.ones(8, 2)
    with OpCounts() as counts:
        c = a @ b
        c.t()
        c.add_(1.0)
        torch.ones(3).expand(5, 3).sum()
    found = {name: (c.calls, c.bytes, c.flops) for name, c in counts.found.items()}
    assert found["aten::mm"] == (1, 4 * (32 + 16 + 8), 2 * 4 * 8 * 2)
    assert found["aten::t"] == (1, 0, 0)
    assert found["aten::add_"] == (1, 4 * 2 * 8, 0)
    assert found["aten::expand"] == (1, 0, 0)
    assert found["aten::sum"] == (1, 4 * (3 + 1), 0)


def test_an_op_whose_formula_fails_counts_without_it(monkeypatch):
    def broken(*args, **kwargs):
        raise AssertionError("shapes")

    with OpCounts() as counts:
        counts.formulas = {torch.ops.aten.mm: broken}
        torch.ones(2, 2) @ torch.ones(2, 2)
    assert (counts.found["aten::mm"].calls, counts.found["aten::mm"].flops) == (1, 0)


def test_without_counts_there_are_times_of_everything(tmp_path):
    step, useful = training(backend="reference")
    with StepProfile(tmp_path, CPU, torch.float32, useful, 0, 1, counted=False) as profile:
        for _ in range(4):
            step()
            profile.step()
    found = json.loads((tmp_path / FOLDER / "ops.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in found["ops"]}
    assert rows["aten::mm"]["gflop"] is None
    assert "aten::matmul" in rows  # calls others, and has what is left
    assert not [name for name in rows if name.startswith("ProfilerStep")]
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), OSError(28, "No space left")])
def test_a_folder_that_cannot_be_written_is_one_line(error, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(profiling.Path, "mkdir", refuse)
    profile, said, _ = profiled(tmp_path, 8, backend="reference")
    assert profile.done
    assert said == [f"no profile: {error}"]


def test_a_disk_that_fills_up_leaves_no_half_of_a_trace(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(profiling.shutil, "copyfileobj", full)
    _, said, _ = profiled(tmp_path, 8, backend="reference")
    assert said == ["no profile: [Errno 28] No space left on device"]
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_a_profiler_that_cannot_start_is_one_line(tmp_path, monkeypatch):
    def refuse(self):
        raise RuntimeError("another profiler is running\nand more")

    monkeypatch.setattr(torch.profiler.profile, "start", refuse)
    _, said, _ = profiled(tmp_path, 8, backend="reference")
    assert said == ["no profile: another profiler is running"]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4])
def test_a_short_run_says_how_many_steps_it_takes(count, tmp_path):
    profile, said, _ = profiled(tmp_path, count, backend="reference")
    assert said == [f"no profile: it takes 5 steps, the run had {count}"]
    assert profile.done
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert profiled(tmp_path, 5, backend="reference")[1] != said


def test_what_counts_is_loaded_when_it_is_needed(tmp_path, monkeypatch):
    """A trainer has one of these whether it profiles or not, and Triton takes its time to load."""
    monkeypatch.setattr(profiling, "OpCounts", lambda: pytest.fail("loaded"))
    with StepProfile(tmp_path, CPU, torch.float32, 1.0) as profile:
        profile.step()
        profile.done = True
        for _ in range(20):
            profile.step()


def test_an_error_of_the_training_passes(tmp_path):
    said = []
    with (
        pytest.raises(ZeroDivisionError),
        StepProfile(tmp_path, CPU, torch.float32, 1.0, 0, 2, tell=said.append) as profile,
    ):
        profile.step()
        profile.step()
        raise ZeroDivisionError
    assert said == []
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def event(name, device, us, parent=None):
    class Event:
        device_type, cpu_parent = device, parent
        is_user_annotation = "#" in name
        device_time_total = self_device_time_total = cpu_time_total = self_cpu_time_total = us

    Event.name = name
    return Event


def test_kernels_of_a_gpu_and_ops_with_what_they_call():
    from torch.autograd import DeviceType

    outer = event("trm_fast_ext::deep_recursion", DeviceType.CPU, 900)
    events = [
        outer,
        event("aten::mm", DeviceType.CPU, 700, outer),
        event("aten::mm", DeviceType.CPU, 100),
        event("gemm", DeviceType.CUDA, 700),
        event("gemm", DeviceType.CUDA, 100),
        event("norm", DeviceType.CUDA, 200),
        event("ProfilerStep#1", DeviceType.CUDA, 5000),
        event("Optimizer.step#AdamATan2.step", DeviceType.CUDA, 500),
    ]
    counts = {
        n: profiling.Count(1, 1, 10**6, 10**9) for n in ("trm_fast_ext::deep_recursion", "aten::mm")
    }
    rows = profiling.op_rows(events, counts, 2, None, on_gpu=True)
    assert [(r.name, r.calls, r.ms, r.share) for r in rows] == [
        ("trm_fast_ext::deep_recursion", 0.5, 0.45, 0.9),
        ("aten::mm", 0.5, 0.05, 0.1),
    ]
    kernels = profiling.kernel_rows(events, 2)
    assert [(r.name, r.calls, r.ms, r.share) for r in kernels] == [
        ("gemm", 1.0, 0.4, 0.8),
        ("norm", 0.5, 0.1, 0.2),
    ]


def test_an_ops_time_is_the_devices_on_a_gpu_and_with_counts_the_whole():
    from torch.autograd import DeviceType

    one = event("aten::mm", DeviceType.CPU, 0)
    one.device_time_total, one.self_device_time_total = 800, 600
    one.cpu_time_total, one.self_cpu_time_total = 400, 200
    counts = {"aten::mm": profiling.Count(1, 1, 10**6, 10**9)}
    for counted, on_gpu, ms in (
        *((counts, True, 0.8), ({}, True, 0.6), (counts, False, 0.4), ({}, False, 0.2)),
    ):
        (row,) = profiling.op_rows([one], counted, 1, None, on_gpu)
        assert row.ms == pytest.approx(ms), (counted, on_gpu)


def test_products_in_eight_bits_have_another_peak():
    from torch.autograd import DeviceType

    names = ("aten::mm", "aten::_scaled_mm")
    counts = {n: profiling.Count(1, 1, 10**6, 10**9) for n in names}
    events = [event(n, DeviceType.CPU, 1000) for n in names]
    rows = profiling.op_rows(events, counts, 1, profiling.flops.Peak(2.0, 10.0), True)
    assert {r.name: r.fraction_of_matmul for r in rows} == {names[0]: 0.5, names[1]: None}
    assert {r.fraction_of_copy for r in rows} == {0.1}


def test_the_profiler_of_a_gpu_is_woken_by_an_empty_profile(monkeypatch):
    made = []

    class Profile:
        def __init__(self, activities):
            made.append(activities)

        def __enter__(self):
            made.append("begun")

        def __exit__(self, *error):
            made.append("over")

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    profiling.wake_profiler(CPU)
    assert made == []
    profiling.wake_profiler(torch.device("cuda"))
    assert made == [[torch.profiler.ProfilerActivity.CUDA], "begun", "over"]
    with StepProfile(Path("nowhere"), torch.device("cuda"), torch.float32, 1.0) as profile:
        assert made[3:] == made[:3]  # before the first step
        profile.done = True
    with profile:
        assert len(made) == 6

    def refuse(**_):
        raise RuntimeError("another profiler is running")

    monkeypatch.setattr(torch.profiler, "profile", refuse)
    profiling.wake_profiler(torch.device("cuda"))


def test_launches_are_operations_that_move_data():
    a, b = torch.ones(4, 8), torch.ones(8, 2)

    def run():
        (a @ b).t().add(1.0).expand(3, 2, 4)

    assert profiling.launches(run, CPU) == 2


def test_launches_of_a_gpu_are_kernels(monkeypatch):
    from torch.autograd import DeviceType

    class Profile:
        def __init__(self, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def events(self):
            kinds = [("gemm", "CUDA"), ("step#1", "CUDA"), ("aten::mm", "CPU"), ("Memset", "CUDA")]
            return [event(name, getattr(DeviceType, kind), 1) for name, kind in kinds]

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(profiling, "synchronize", lambda device: None)
    assert profiling.launches(lambda: None, torch.device("cuda")) == 2
