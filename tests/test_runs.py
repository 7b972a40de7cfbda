"""Which folder a job writes to, and with which checkpoint it goes on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trm_fast.checkpoint import save_checkpoint
from trm_fast.config import TrainConfig, from_preset
from trm_fast.overrides import option_rows
from trm_fast.runs import FREE, RunLock, latest, place

ROOT = Path(__file__).resolve().parent.parent
TOTAL = 100


def job(**changes):
    return from_preset().replace({"data_paths": ["d"], "project_name": "p", **changes})


def save(config, step, folder, finished=False):
    record = {**config.to_dict(), "finished": finished, "model": {}, "data": {}}
    state = {"w": torch.zeros(1)}
    return save_checkpoint(folder, step, model=state, ema=None, config=record, train_state={})


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def saved_run(step, **changes):
    config = job(**changes).with_names()
    save(config, step, config.checkpoint_path)
    return config


def test_a_first_run_gets_a_new_folder():
    spot = place(job(), TOTAL)
    assert spot.resume_from is None
    assert str(spot.run_dir) == spot.config.checkpoint_path
    assert spot.run_dir.parts[:2] == ("checkpoints", "p")


def test_a_named_run_goes_on():
    saved = saved_run(40, run_name="r")
    spot = place(job(run_name="r"), TOTAL)
    assert spot.run_dir.name == "r"
    assert spot.resume_from == spot.run_dir / "step_40"
    assert spot.config.checkpoint_path == saved.checkpoint_path


def test_a_named_run_is_not_overwritten():
    saved_run(40, run_name="r")
    with pytest.raises(ValueError, match="holds a run already: resume=auto"):
        place(job(run_name="r", resume="never"), TOTAL)


def test_a_run_with_other_settings_is_not_continued():
    saved_run(40, run_name="r")
    with pytest.raises(ValueError, match=r"other settings: lr=0.5 \(was 0.02\)"):
        place(job(run_name="r", lr=0.5), TOTAL)


def test_settings_that_change_nothing_learned_may_change():
    saved_run(40, run_name="r")
    spot = place(job(run_name="r", eval_steps=7, log_interval=1, threads=1), TOTAL)
    assert spot.resume_from is not None
    assert spot.config.eval_steps == 7


def test_the_machine_is_not_what_is_learned():
    machine = {key for section, key, _, _ in option_rows() if section == "Machine"}
    assert {"device", "cuda_graph", "profile"} <= machine <= FREE


def test_an_unnamed_job_goes_on_with_its_unfinished_run():
    saved = saved_run(40)
    spot = place(job(), TOTAL)
    assert spot.config.run_name == saved.run_name
    assert spot.resume_from == spot.run_dir / "step_40"


@pytest.mark.parametrize(
    ("step", "changes", "now"),
    [(TOTAL, {}, {}), (40, {"lr": 0.1}, {}), (40, {}, {"resume": "never"})],
    ids=["finished", "other-settings", "resume-never"],
)
def test_an_unnamed_job_starts_anew(step, changes, now):
    saved = saved_run(step, **changes)
    spot = place(job(**now), TOTAL)
    assert spot.resume_from is None
    assert spot.config.run_name != saved.run_name


def test_a_run_that_ended_short_of_the_estimate_is_finished():
    """By epochs a run has fewer steps than `total_steps` (65,100 of 65,104 for Sudoku-Extreme)."""
    saved = saved_run(TOTAL - 4)
    save(job().replace({"run_name": saved.run_name}), TOTAL - 3, saved.checkpoint_path, True)
    spot = place(job(), TOTAL)
    assert spot.resume_from is None
    assert spot.config.run_name != saved.run_name


def test_a_run_that_another_process_works_on_is_left_alone():
    saved = saved_run(40)
    code = (
        "import sys, pathlib; from trm_fast.runs import RunLock;"
        "lock = RunLock(pathlib.Path(sys.argv[1])); print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", code, saved.checkpoint_path]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        spot = place(job(), TOTAL)
        assert spot.resume_from is None
        with pytest.raises(ValueError, match="in use by another process"):
            RunLock(place(job(run_name=saved.run_name), TOTAL).run_dir)
        other.communicate("\n")
    RunLock(place(job(), TOTAL).run_dir).release()


def test_a_deleted_folder_is_this_process_s_until_another_begins_there(tmp_path):
    lock = RunLock(tmp_path / "r")
    lock.check()
    shutil.rmtree(tmp_path / "r")
    lock.check()
    with pytest.raises(ValueError, match="in use by another process"):
        RunLock(tmp_path / "r")
    shutil.rmtree(tmp_path / "r")
    other = RunLock(tmp_path / "r")
    for _ in range(2):
        with pytest.raises(ValueError, match="r was deleted, and another process has begun there"):
            lock.check()
        other.release()  # though it may have ended: the folder is that of its run
    lock.release()


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before():
    config = saved_run(20, run_name="r")
    newest = save(config, 40, config.checkpoint_path)
    (newest / "model.safetensors").write_bytes(b"damaged")
    assert place(job(run_name="r"), TOTAL).resume_from.name == "step_20"


@pytest.mark.parametrize(("now", "step"), [({}, 60), ({"resume": "step_40"}, 40)])
def test_what_was_written_before_the_lock_was_had_is_gone_on_with(now, step):
    """But a checkpoint that was asked for by its path stays the one."""
    saved = saved_run(40, run_name="r")
    resume = {"resume": f"{saved.checkpoint_path}/step_40"} if now else {}
    spot = place(job(run_name="r", **resume), TOTAL)
    save(saved, 60, saved.checkpoint_path)
    assert latest(spot).resume_step == step


def test_resume_by_path(tmp_path):
    saved = saved_run(40, run_name="r")
    moved = tmp_path / "elsewhere"
    (tmp_path / saved.checkpoint_path).rename(moved)
    for path in (moved, moved / "step_40"):
        spot = place(job(resume=str(path)), TOTAL)
        assert spot.run_dir == moved
        assert spot.resume_from == moved / "step_40"


def test_resume_by_a_path_without_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="no readable checkpoint"):
        place(job(resume=str(tmp_path)), TOTAL)


def test_official_defaults_are_named_too():
    config = TrainConfig(data_paths=("data/arc-aug-1000",), run_name="x")
    assert place(config, TOTAL).run_dir.parts == ("checkpoints", "Arc-aug-1000-ACT-torch", "x")
