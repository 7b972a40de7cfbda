"""The train command: exit statuses, files, signals, kill -9 and going on, several seeds."""

import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trm_fast import checkpoint, train
from trm_fast.config import TrainConfig
from trm_fast.data import maze_generator, sudoku_generator
from trm_fast.data.building import one_kind
from trm_fast.data.format import one_puzzle_per_group, write_dataset
from trm_fast.data.sudoku_generator import generate
from trm_fast.extension import library
from trm_fast.extension.build import BuildError
from trm_fast.optim import GuardState
from trm_fast.progress import StatusLine, read_metrics
from trm_fast.runner import Console, Signals
from trm_fast.runs import Place, RunLock
from trm_fast.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "global_batch_size=8", "steps=12", "eval_steps=6", "log_interval=3", "lr_warmup_steps=2",
    "arch.hidden_size=8", "arch.intermediate_size=8", "arch.token_intermediate_size=8",
    "arch.halt_max_steps=2", "device=cpu",
]  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder with 4x4 boards under `boards`."""
    monkeypatch.chdir(tmp_path)
    splits = {}
    for number, (split, count) in enumerate((("train", 40), ("test", 10))):
        boards, grids = generate(count, clues=(8, 12), size=4, seed=number)
        arrays = one_puzzle_per_group(boards + 1, grids + 1)
        splits[split] = (one_kind(6, 16, count), {"all": arrays})
    write_dataset(tmp_path / "boards", splits)
    return tmp_path


def run(*words):
    return train.main(["data_paths=[boards]", *TINY, *words])


def run_folder(here):
    (folder,) = (here / "checkpoints").glob("*/*")
    return folder


def test_a_run_from_start_to_end(here, capfd):
    assert run("+run_name=r") == 0
    folder = run_folder(here)
    assert folder.name == "r"
    assert checkpoint.read_pointer(folder, "last") == "step_12"
    assert {"step_6", "step_12"} <= {path.name for path in folder.iterdir()}
    rows = read_metrics(folder)
    assert [row["step"] for row in rows if "train/lm_loss" in row] == [3, 6, 9, 12]
    assert [row["step"] for row in rows if "all/exact_accuracy" in row] == [6, 12]
    assert (folder / "metrics.csv").read_text().startswith("step,")
    assert (folder / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    said = capfd.readouterr().out
    for words in ("12 steps", "10 held-out boards", "before training", "after training",
                  f"python -m trm_fast.evaluate {folder.relative_to(here)}"):  # fmt: skip
        assert words in said


def test_lines_count_the_steps_since_the_line_before(here, capfd, monkeypatch):
    """Also after a resume, and at an end that is no multiple of log_interval."""
    told = []
    monkeypatch.setattr(StatusLine, "update", lambda self, *values: told.append(values))
    assert run("+run_name=r", "log_interval=5") == 0
    assert [(values[0], values[3]) for values in told] == [(5, 40), (10, 40), (12, 16)]
    folder = run_folder(here)
    (folder / "step_12" / "model.safetensors").write_bytes(b"damaged")
    told.clear()
    capfd.readouterr()
    assert run("+run_name=r", "log_interval=5") == 0
    assert [(values[0], values[3]) for values in told] == [(10, 32), (12, 16)]
    said = capfd.readouterr().out
    assert "damaged (7 bytes, not " in said and "; taking step_6\n" in said
    assert "finished    12 steps, 6 of them now, " in said
    (folder / "step_12" / "model.safetensors").write_bytes(b"damaged")
    assert run(f"resume={folder}", "log_interval=5") == 0
    assert "; taking step_6\n" in capfd.readouterr().out


def test_the_last_line_of_a_run_by_epochs(here):
    by_epochs = ["steps=null", "epochs=4", "eval_steps=null", "eval_interval=2"]
    assert run("+run_name=r", *by_epochs, "log_interval=100") == 0
    rows = read_metrics(run_folder(here))
    assert ["train/lm_loss" in row for row in rows] == [False, True, False]
    assert rows[1]["step"] == rows[2]["step"] == 20


@pytest.mark.parametrize(("stopped_at", "where"), [(0, "by step 10"), (2, "step 2")])
def test_a_step_left_out_is_not_said_to_be_another(here, capfd, stopped_at, where):
    config = TrainConfig(data_paths=("boards",), checkpoint_path=str(here / "r"))
    console = Console(Place(config, here / "r", None), 20, Signals())
    console.on_skip(SimpleNamespace(step=10), GuardState(1, 1, stopped_at, 0.5, math.nan))
    assert capfd.readouterr().out.startswith(f"{where}  the norm of a gradient was nan")


def test_a_finished_named_run_is_shown_again(here, capfd):
    assert run("+run_name=r") == 0
    rows = read_metrics(run_folder(here))
    assert run("+run_name=r") == 0
    assert "going on    from step 12" in capfd.readouterr().out
    assert read_metrics(run_folder(here)) == rows


def test_official_files(here):
    assert run("+run_name=r", "official=true") == 0
    folder = run_folder(here)
    weights = torch.load(folder / "official" / "step_12", weights_only=True)
    assert all(key.startswith("_orig_mod.model.inner.") for key in weights)
    saved = checkpoint.load_checkpoint(folder / "step_12")
    assert torch.equal(
        weights["_orig_mod.model.inner.lm_head.weight"], saved.ema["inner.lm_head.weight"]
    )
    assert "hidden_size: 8" in (folder / "official" / "all_config.yaml").read_text()


def test_several_seeds(here, capfd):
    assert run("+run_name=r", "seeds=2", "seed=5") == 0
    names = sorted(p.name for p in (here / "checkpoints").glob("*/*"))
    assert names == ["r-seed5", "r-seed6"]
    said = capfd.readouterr().out
    assert "all exact, last step: mean" in said
    assert "deviation" in said


def test_a_seed_of_several_is_continued_as_a_run_of_its_own(here):
    assert run("seeds=2", "checkpoint_path=mine/r") == 0
    assert sorted(path.name for path in (here / "mine").iterdir()) == ["r-seed0", "r-seed1"]
    assert train.main(["resume=mine/r-seed1"]) == 0
    assert sorted(path.name for path in (here / "mine").iterdir()) == ["r-seed0", "r-seed1"]


def test_a_signal_during_the_last_evaluation_ends_the_job(here, monkeypatch):
    """The first seed's run is complete; the second does not begin."""

    def signalled(trainer, seconds, before):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("trm_fast.runner.summarize", signalled)
    assert run("+run_name=r", "seeds=2") == 143
    assert run_folder(here).name == "r-seed0"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], None),
        (["arch.quantize=int8"], "int8 in evaluations and answers"),
        (["arch.quantize=fp8"], "fp8 in evaluations and answers only: with arch.H_cycles=1 no"),
        (["arch.quantize=fp8", "arch.dropout=0.1"], "fp8 in evaluations and answers only: train"),
        (["arch.quantize=fp8", "arch.H_cycles=2"], "fp8 in evaluations and answers, and in train"),
    ],
    ids=["none", "int8", "fp8", "dropout", "cycles"],
)
def test_the_first_lines_say_what_is_quantised(here, capfd, words, line):
    assert run("steps=1", *words) == 0
    said = capfd.readouterr().out
    assert (f"\nproducts    {line}" in said) if line else ("\nproducts " not in said)


def test_with_dropout_the_engine_is_that_of_the_other_operations(here, capfd, extension):
    width = ["arch.hidden_size=16", "arch.num_heads=2", "arch.intermediate_size=16"]
    assert run("steps=1", "arch.dropout=0.1", "arch.token_intermediate_size=16", *width) == 0
    assert "on cpu (cpp)" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "engine", "line"),
    [
        ([], "cpp", None),
        (["arch.noise=0.1"], "cpp, the recursion composed in training", "arch.noise=0.1"),
        (
            ["arch.damping=0.9", "arch.noise=0.1", "arch.random_init=true"],
            "cpp, the recursion composed",
            "arch.random_init=true arch.noise=0.1 arch.damping=0.9",
        ),
        (["arch.damping=0.9", "arch.backend=reference"], "reference", "arch.damping=0.9"),
        (
            ["depth_stages=[0.3:1x1]", "step_loss_decay=0.7", "arch.act_enabled=false"],
            "cpp",
            "depth_stages=[0.3:1x1] step_loss_decay=0.7 arch.act_enabled=false",
        ),
        (["arch.latents=2", "depth_stages=[0.3:1x1, 0.6:1x2]"], "cpp", "depth_stages=[0.3:1x1, "
         "0.6:1x2] arch.latents=2"),
    ],
    ids=["none", "noise", "eqr", "reference", "stage", "latents"],
)  # fmt: skip
def test_the_first_lines_say_what_trains_and_how_deep(here, capfd, extension, words, engine, line):
    width = ["arch.hidden_size=16", "arch.num_heads=2", "arch.intermediate_size=16"]
    assert run("steps=1", "arch.token_intermediate_size=16", *width, *words) == 0
    said = capfd.readouterr().out
    assert f"on cpu ({engine})\n" in said
    assert (f"\noptions     {line}\n" in said) if line else ("\noptions " not in said)


def test_a_run_without_test_data_ends_well(here, capfd):
    shutil.rmtree(here / "boards" / "test")
    assert run("+run_name=r") == 0
    said = capfd.readouterr().out
    assert "evaluation  none" in said
    assert f"trm_fast.evaluate {run_folder(here).relative_to(here)} --data DIR" in said


def test_a_run_killed_before_its_first_pointer_is_resumed(here, capfd):
    assert run("+run_name=r") == 0
    folder = run_folder(here)
    (folder / "last").unlink()
    assert train.main([f"resume={folder}"]) == 0
    assert "going on    from step 12" in capfd.readouterr().out


def test_weights_to_start_from_are_not_needed_to_go_on(here):
    assert run("+run_name=first") == 0
    first = run_folder(here)
    assert run("+run_name=second", f"load_checkpoint={first}", "steps=6") == 0
    shutil.rmtree(first)
    assert run("+run_name=second", f"load_checkpoint={first}", "steps=6") == 0


def test_absurd_numbers_are_one_line_and_exit_2(here, capfd):
    assert train.main(["generate=999999999999"]) == 2
    assert capfd.readouterr().err == "trm-fast train: not enough memory for so many boards\n"


def test_a_run_whose_folder_was_deleted_makes_way_for_the_next(here, capfd, monkeypatch):
    assert run("+run_name=straight") == 0
    folder = run_folder(here).with_name("r")
    steps = {4: lambda: None, 9: lambda: locks.append(RunLock(folder))}
    locks = []

    def step(trainer, name, examples, real=Trainer.advance):
        if trainer.step in chosen:
            shutil.rmtree(folder)
            steps[trainer.step]()
        real(trainer, name, examples)

    monkeypatch.setattr(Trainer, "advance", step)
    chosen = {4}
    assert run("+run_name=r") == 0
    assert_equal(final_state(folder.with_name("straight")), final_state(folder))
    shutil.rmtree(folder)
    chosen = {9}
    assert run("+run_name=r") == 2
    said = capfd.readouterr().err
    assert said.endswith(
        "was deleted, and another process has begun there: this one writes nothing more\n"
    )
    assert [path.name for path in folder.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has"),
        RuntimeError("alloc_cpu.cpp: DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
    ],
    ids=["cuda", "cpu", "cublas"],
)
def test_memory_that_runs_out_in_a_step_is_one_line(here, capfd, monkeypatch, error):
    def step(trainer, name, examples, real=Trainer.advance):
        if trainer.step == 7:
            raise error
        real(trainer, name, examples)

    monkeypatch.setattr(Trainer, "advance", step)
    assert run("+run_name=r") == 1
    first = str(error).splitlines()[0]
    said = capfd.readouterr().err
    assert said.startswith(f"trm-fast train: out of memory: {first}; arch.policy=")
    assert said.endswith("; what came after the last checkpoint is not saved\n")
    assert checkpoint.load_checkpoint(checkpoint.resolve(run_folder(here))).step == 6
    monkeypatch.setattr(Trainer, "advance", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("+run_name=other")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lrr=1"], "did you mean"),
        (["lr=fast"], "lr must be a number"),
        (["data_paths=[nowhere]"], "nowhere"),
        (["device=cuda:99"], "cuda:99"),
        (["resume=nowhere"], "resume must be"),
        (["checkpoint_path=/dev/null/x"], "checkpoint_path: nothing can be written in /dev/null/x"),
        (["run_name=../r"], "run_name must be a folder name, got '../r'"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(here, capfd, words, message):
    assert run(*words) == 2
    said = capfd.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_launcher_s_environment_that_is_not_whole(here, capfd, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    assert run() == 2
    said = capfd.readouterr().err
    assert said == "trm-fast train: RANK must be a whole number beside WORLD_SIZE, got None\n"


def test_help_needs_no_torch():
    code = (
        "import sys; from trm_fast import train; status = train.main(['--help']);"
        "assert status == 0 and 'torch' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "global_batch_size" in done.stdout


def test_the_default_job_makes_its_data(here, capfd, monkeypatch):
    made = []

    def small(root, *, seed, train_boards):
        made.append((str(root), seed, train_boards))
        (here / "boards").rename(root)

    monkeypatch.setattr("trm_fast.runner.default_job_data", small)
    (here / "data").mkdir()
    assert train.main(["generate=30", *TINY]) == 0
    assert made == [("data/sudoku-mini-30", 0, 30)]
    assert capfd.readouterr().out.startswith("data        generating 30 boards\n")
    assert run_folder(here).parent.name == "Sudoku-mini"
    assert callable(sudoku_generator.default_job_data)


def test_a_maze_job_makes_its_data_and_shows_both_metrics(here, capfd, monkeypatch):
    small = functools.partial(maze_generator.maze_job_data, test_boards=9)
    monkeypatch.setattr("trm_fast.runner.maze_job_data", small)
    assert train.main(["preset=maze-mini", "generate=40", *TINY]) == 0
    out = capfd.readouterr().out
    assert re.search(r"perfect: exact [0-9.]+% \(best-q [0-9.]+%\), valid [0-9.]+%, cells", out)
    assert re.search(r"loops +9 held-out boards: .* halting score; [0-9.]+% keep the rules", out)
    (shown,) = re.findall(r"a test board +before training: .*\n((?:.*\n){10})", out)
    inputs = np.load(here / "data/maze-mini-40/test/perfect__inputs.npy")[0]
    rows = [line[:10].ljust(10) for line in shown.split("\n")[:-1]]
    assert "".join(rows) == "".join("?# SGo"[token] for token in inputs)
    folder = run_folder(here)
    assert folder.parent.name == "Maze-mini" and folder.name.startswith("maze-mini-")
    rows = [row for row in read_metrics(folder) if "loops/valid" in row]
    assert [row["step"] for row in rows] == [6, 12]
    assert all(row["loops/valid"] >= row["loops/exact_accuracy"] for row in rows)


def test_an_interrupt_while_data_is_made(here, capfd, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("trm_fast.runner.default_job_data", interrupted)
    assert train.main(["generate=30", *TINY]) == 130
    assert capfd.readouterr().err == "interrupted; nothing was trained\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["device=cuda:99"], "device 'cuda:99' is not there"),
        (["device=cpu", "arch.backend=triton"], "'triton' cannot serve residual_rmsnorm on cpu"),
        (["device=cpu"], "TRM_FAST_CUDA_GRAPH is 0 or 1, not 'off'"),
    ],
    ids=["device", "backend", "variable"],
)
def test_what_the_machine_cannot_do_is_said_before_data_is_made(
    here, capfd, monkeypatch, words, message
):
    if "TRM" in message:
        monkeypatch.setenv("TRM_FAST_CUDA_GRAPH", "off")
    assert train.main(["generate=30", *words]) == 2
    said = capfd.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and said.out == ""
    assert [path.name for path in here.iterdir()] == ["boards"]


def start(here, *words):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "trm_fast.train", "data_paths=[boards]", *TINY, *words]
    return subprocess.Popen(
        command, cwd=here, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for(process, condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stdout.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def final_state(folder):
    name = checkpoint.read_pointer(folder, "last")
    saved = checkpoint.load_checkpoint(folder / name)
    return saved.step, saved.model, saved.ema, saved.train_state


def assert_equal(one, other, where=""):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{where}.{index}")
    else:
        assert one == other, where


LONG = ["steps=400", "eval_steps=400", "save_interval=5", "keep=3"]


def test_kill_9_loses_at_most_the_steps_since_the_last_checkpoint(here):
    assert run("+run_name=straight", *LONG) == 0
    folder = here / "checkpoints" / "Boards-ACT-torch" / "killed"
    for at in (20, 120):
        process = start(here, "+run_name=killed", *LONG)
        wait_for(process, lambda at=at: (checkpoint.list_steps(folder) or [(0, None)])[-1][0] >= at)
        process.send_signal(signal.SIGKILL)
        process.wait()
        # Whatever moment it was: the newest checkpoint is whole, and `last` names it or, killed
        # before that was written, the one before.
        assert checkpoint.load_checkpoint(checkpoint.resolve(folder)).step >= at - 5
    assert run("+run_name=killed", *LONG) == 0
    assert_equal(final_state(folder.parent / "straight"), final_state(folder))
    steps = [row["step"] for row in read_metrics(folder) if "train/lr" in row]
    assert steps == [*range(3, 400, 3), 400]


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"]
)
def test_signals_save_and_exit(here, number, status):
    process = start(here, "+run_name=r", "steps=100000", "save_interval=5", "keep=2")
    folder = here / "checkpoints" / "Boards-ACT-torch" / "r"
    wait_for(process, lambda: bool(checkpoint.list_steps(folder)))
    process.send_signal(number)
    said = process.communicate(timeout=60)[0].decode()
    assert process.returncode == status
    step = checkpoint.load_checkpoint(checkpoint.resolve(folder)).step
    assert f"stopped at step {step}" in said
    assert f"resume={folder.relative_to(here)}" in said
    config = json.loads((folder / f"step_{step}" / "config.json").read_text())
    assert config["steps"] == 100000


def test_resume_by_path_takes_the_settings_of_the_run(here, capfd):
    assert run("+run_name=r", "arch.halt_max_steps=3") == 0
    folder = run_folder(here)
    assert train.main([f"resume={folder}"]) == 0
    assert "going on    from step 12" in capfd.readouterr().out


def test_the_configuration_of_a_run_serves_for_another(here):
    """Its name and folder are its own, the rest is taken over."""
    assert run("+run_name=r") == 0
    (folder,) = (here / "checkpoints").glob("*/r")
    config = folder / "step_12" / "config.json"
    assert train.main(["--config", str(config), "seed=1", "+run_name=other"]) == 0
    saved = json.loads((folder.parent / "other" / "step_12" / "config.json").read_text())
    assert (saved["seed"], saved["steps"], saved["arch"]["hidden_size"]) == (1, 12, 8)


def test_weights_that_are_not_there_name_the_setting(here, capfd):
    assert run("load_checkpoint=nowhere") == 2
    assert "load_checkpoint: nowhere" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("raised", "status", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted; nothing was trained\n"),
        (BuildError("no C++ compiler"), 2, "trm-fast train: no C++ compiler\n"),
    ],
    ids=["interrupt", "no extension"],
)
def test_the_extension_comes_before_everything_else(
    raised, status, text, tmp_path, monkeypatch, capsys
):
    def unavailable(kind):
        raise raised

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(library, "unavailable", unavailable)
    assert train.main(["steps=1", "device=cpu"]) == status
    assert capsys.readouterr() == ("", text)
    assert list(tmp_path.iterdir()) == []
