"""Checkpoints: exact round trips, pointers, pruning, the official format.

Crashes, full disks and damaged files are in test_checkpoint_damage.py.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from trm_fast.checkpoint import (
    CheckpointError,
    list_steps,
    load_checkpoint,
    prune,
    read_pointer,
    resolve,
    save_checkpoint,
    verify,
    write_pointer,
)
from trm_fast.interop import read_weights, write_official


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """A killed process loses nothing that was written; fsync is for power loss."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


FILES = ["config.json", "ema.safetensors", "manifest.json", "model.safetensors", "train_state.pt"]


def contents(value):
    """A small training state, all of it derived from `value`."""
    weight = torch.full((3, 4), float(value))
    return {
        "model": {"inner.w": weight, "inner.H_init": torch.full((4,), value, dtype=torch.bfloat16)},
        "ema": {"inner.w": weight / 2, "inner.H_init": torch.zeros(4, dtype=torch.bfloat16)},
        "config": {"lr": 1e-4, "arch": {"L_cycles": 6, "name": None}, "data_paths": ["d"]},
        "train_state": {
            "rng": torch.get_rng_state(),
            "optimizers": [
                {"state": {0: {"step": value, "exp_avg": weight * 3}}, "betas": (0.9, 1)}
            ],
            "big": 2**70,
            "flag": True,
            "none": None,
        },
    }


def save(run, step, value=None):
    return save_checkpoint(run, step, **contents(step if value is None else value))


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def holds(loaded, value):
    expected = contents(value)
    del expected["train_state"]["rng"]
    state = {k: v for k, v in loaded.train_state.items() if k != "rng"}
    return equal(
        {**expected},
        {"model": loaded.model, "ema": loaded.ema, "config": loaded.config, "train_state": state},
    )


def names(run):
    return sorted(path.name for path in Path(run).iterdir())


def test_round_trip_is_exact(tmp_path):
    run = tmp_path / "project" / "run"
    folder = save(run, 40)
    assert folder == run / "step_40" and names(folder) == FILES
    assert names(run) == ["last", "step_40"] and (run / "last").read_text() == "step_40\n"
    loaded = load_checkpoint(folder)
    assert loaded.step == 40 and loaded.path == folder and holds(loaded, 40)
    assert torch.equal(loaded.train_state["rng"], torch.get_rng_state())
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert json.loads(file.metadata()["trm_fast"]) == contents(40)["config"]


def test_without_ema_there_is_no_ema_file(tmp_path):
    folder = save_checkpoint(tmp_path, 0, **{**contents(1), "ema": None})
    assert "ema.safetensors" not in names(folder)
    assert load_checkpoint(folder).ema is None


def test_views_shared_and_strange_tensors_are_stored_by_value(tmp_path):
    base = torch.arange(1000.0)
    model = {
        "row": base[10:13],
        "tied": base,
        "again": base,
        "turned": torch.arange(6.0).view(2, 3).T,
        "empty": torch.zeros(0, 3),
        "empty2": torch.zeros(0),
        "scalar": torch.tensor(3, dtype=torch.int8),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    state = {"row": base[:2], "parameter": torch.nn.Parameter(torch.ones(2))}
    folder = save_checkpoint(tmp_path, 1, model=model, ema=None, config={}, train_state=state)
    loaded = load_checkpoint(folder)
    assert equal(loaded.model, {k: v.detach().contiguous() for k, v in model.items()})
    assert equal(loaded.train_state["row"], base[:2])
    assert type(loaded.train_state["parameter"]) is torch.Tensor
    assert (folder / "train_state.pt").stat().st_size < 3000  # the view, not its base


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 5, 1)
    save(tmp_path, 5, 2)
    assert names(tmp_path) == ["last", "step_5"] and holds(load_checkpoint(tmp_path / "step_5"), 2)


class Strange:
    pass


@pytest.mark.parametrize(
    "state, said",
    [
        ({"rng": {"numpy": Strange()}}, r"train_state\['rng'\]\['numpy'\] is a Strange; tensors"),
        ({"list": [1, {2}]}, r"train_state\['list'\]\[1\] is a set"),
        ({("a", 1): 2}, r"train_state has the key \('a', 1\)"),
        ({"np": __import__("numpy").float64(1)}, "is a float64"),
    ],
)
def test_a_state_that_would_not_load_again_is_refused_when_saving(tmp_path, state, said):
    with pytest.raises(ValueError, match=said):
        save_checkpoint(tmp_path, 1, **{**contents(1), "train_state": state})
    assert names(tmp_path) == []


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="step is -1"):
        save(tmp_path, -1)
    with pytest.raises(ValueError, match="step is 1.0"):
        save(tmp_path, 1.0, 1)
    with pytest.raises(ValueError, match="config cannot be stored as JSON"):
        save_checkpoint(tmp_path, 1, **{**contents(1), "config": {"x": Strange()}})
    with pytest.raises(ValueError, match="pointer is 'newest'"):
        read_pointer(tmp_path, "newest")
    with pytest.raises(ValueError, match="last cannot point at '../x'"):
        write_pointer(tmp_path, "last", "../x")
    with pytest.raises(ValueError, match="keep is 0"):
        prune(tmp_path, 0)


def test_pointers(tmp_path):
    assert read_pointer(tmp_path, "best") is None
    save(tmp_path, 1)
    save(tmp_path, 2)
    write_pointer(tmp_path, "best", "step_1")
    assert (read_pointer(tmp_path, "last"), read_pointer(tmp_path, "best")) == ("step_2", "step_1")
    assert resolve(tmp_path) == tmp_path / "step_2"
    assert resolve(tmp_path, "best") == tmp_path / "step_1"
    assert resolve(tmp_path / "step_1") == tmp_path / "step_1"
    (tmp_path / "best").write_text("step_1/../..\n")
    with pytest.raises(CheckpointError, match="best: holds 'step_1/../..'"):
        read_pointer(tmp_path, "best")
    assert resolve(tmp_path, "best") == tmp_path / "step_2"
    with pytest.raises(CheckpointError, match="last: cannot be written"):
        write_pointer(tmp_path / "nowhere", "last", "step_1")


def test_the_pointer_goes_before_the_newest(tmp_path):
    save(tmp_path, 20)
    save(tmp_path, 9)  # gone back and trained again
    assert resolve(tmp_path).name == "step_9"
    (tmp_path / "last").unlink()
    assert resolve(tmp_path).name == "step_20"


def test_a_damaged_last_falls_back_to_the_newest_intact_step(tmp_path):
    for step in (1, 2, 10, 11):
        save(tmp_path, step)
    (tmp_path / "step_11" / "train_state.pt").unlink()
    path = tmp_path / "step_10" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert resolve(tmp_path) == tmp_path / "step_2"
    with pytest.raises(CheckpointError, match=r"step_11.train_state.pt: No such file"):
        resolve(tmp_path / "step_11")
    for step in (1, 2):
        (tmp_path / f"step_{step}" / "manifest.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"no readable checkpoint: .*step_11.*; nor any of the 3"
    ):
        resolve(tmp_path)
    with pytest.raises(CheckpointError, match=r"no readable checkpoint \(no step_N folder\)"):
        resolve(tmp_path / "missing")


def test_prune_keeps_last_best_and_the_newest(tmp_path):
    for step in (1, 2, 3, 4, 5, 6):
        save(tmp_path, step)
    write_pointer(tmp_path, "best", "step_2")
    write_pointer(tmp_path, "last", "step_3")
    assert prune(tmp_path, None) == []
    assert prune(tmp_path, 2) == ["step_1", "step_4"]
    assert [step for step, _ in list_steps(tmp_path)] == [2, 3, 5, 6]
    assert names(tmp_path) == ["best", "last", "step_2", "step_3", "step_5", "step_6"]


# The official format


@pytest.mark.parametrize("given", ["", "inner.", "model.inner.", "_orig_mod.model.inner."])
def test_official_files_have_the_official_names_and_come_back(tmp_path, given):
    weights = {
        "H_init": torch.ones(4, dtype=torch.bfloat16),
        "L_level.layers.0.w": torch.randn(2, 3),
    }
    path = tmp_path / "official" / "step_65100"
    write_official(path, {given + name: value for name, value in weights.items()})
    stored = torch.load(path, weights_only=True)
    assert equal(stored, {"_orig_mod.model.inner." + name: v for name, v in weights.items()})
    assert equal(read_weights(path), {"inner." + name: value for name, value in weights.items()})
    assert names(path.parent) == ["step_65100"]
    write_official(path, weights, prefix="model.inner.")
    assert "model.inner.H_init" in torch.load(path, weights_only=True)


def test_weights_are_read_from_safetensors_and_odd_files_refused(tmp_path):
    folder = save(tmp_path, 3)
    assert equal(read_weights(folder / "model.safetensors"), contents(3)["model"])
    with pytest.raises(CheckpointError, match="'optimizers' is not a tensor; a state_dict"):
        torch.save({"optimizers": []}, tmp_path / "file")
        read_weights(tmp_path / "file")
    with pytest.raises(CheckpointError, match="holds a Tensor; a dict was expected"):
        torch.save(torch.ones(1), tmp_path / "file")
        read_weights(tmp_path / "file")
    with pytest.raises(CheckpointError, match="missing: No such file"):
        read_weights(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="step_3: cannot be written: Is a directory"):
        write_official(folder, contents(3)["model"])
    assert verify(folder) == 3 and ".step_3.tmp" not in names(tmp_path)


def test_whoever_may_read_one_file_may_read_all(tmp_path):
    save(tmp_path, 1)
    modes = {path.stat().st_mode for path in (tmp_path / "step_1").iterdir()}
    assert len(modes) == 1
