"""Rows for puzzles that a model was not trained on: carried over by name, and trained alone."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training import make_config, make_trainer

from trm_fast import evaluate, train
from trm_fast.checkpoint import load_checkpoint
from trm_fast.data.dataset import from_arrays
from trm_fast.data.format import DataError, write_dataset
from trm_fast.interop import load_weights, write_official
from trm_fast.puzzle_rows import carried_rows, mean_rows, read_identifiers

WIDTH, VALUES = 6, 5
# A puzzle adds its number to every value of the input: only its row says which.
OLD = {"zero": 0, "one": 1, "two": 2, "three": 3}
NEW = {"two": 2, "another": 1, "other": 3}


def test_rows_are_carried_by_name():
    rows = torch.arange(8.0).view(4, 2)
    carried, kept = carried_rows(rows, ["<blank>", "a", "b", "c"], ["<blank>", "c", "x", "a", "y"])
    mean = [3.0, 4.0]
    assert carried.tolist() == [[0.0, 1.0], [6.0, 7.0], mean, [2.0, 3.0], mean]
    assert kept == 3
    assert mean_rows(rows, 2).tolist() == [mean, mean]
    assert carried_rows(rows, ["a", "b", "c", "d"], ["x"])[0].tolist() == [mean]
    with pytest.raises(ValueError, match="3 identifiers name 4 puzzle rows"):
        carried_rows(rows, ["a", "b", "c"], ["a"])


@pytest.mark.parametrize("text", ["{}", "[1]", "[[]]", "nothing", ""])
def test_identifiers_that_are_none(tmp_path, text):
    (tmp_path / "identifiers.json").write_text(text)
    for path in (tmp_path, tmp_path / "identifiers.json"):
        with pytest.raises(DataError, match=r"identifiers\.json: "):
            read_identifiers(path)


def make_puzzles(folder, tasks):
    """40 examples to train on and 20 to test on of each task, under identifiers 1, 2, ..."""
    rng = np.random.default_rng(3)
    splits = {}
    for split, count in (("train", 40), ("test", 20)):
        inputs = rng.integers(0, VALUES, (count * len(tasks), WIDTH))
        added = np.repeat(list(tasks.values()), count)[:, None]
        ids = np.repeat(np.arange(len(tasks)) + 1, count)
        labels = (inputs + added) % VALUES
        splits[split] = from_arrays(
            inputs + 1, labels + 1, vocab_size=VALUES + 1, puzzle_identifiers=ids
        )
    write_dataset(
        folder,
        {name: (metadata, {"all": arrays}) for name, (metadata, arrays) in splits.items()},
        ["<blank>", *tasks],
    )
    return str(folder)


def settings(data, **changes):
    values = {
        "global_batch_size": 32, "optimizer": "adamw", "ema": False, "threads": 1,
        "eval_steps": None,
        "arch__puzzle_emb_len": 1, "arch__halt_max_steps": 2, "arch__halt_exploration_prob": 0.1,
        "arch__hidden_size": 32, "arch__H_cycles": 1, "puzzle_emb_weight_decay": 0.0,
    }  # fmt: skip
    return make_config(data, **{**values, **changes})


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A run that has learned the old tasks: its folder, its data."""
    folder = tmp_path_factory.mktemp("old")
    data = make_puzzles(folder / "data", OLD)
    trainer = make_trainer(settings(data, steps=250), folder / "run")
    assert trainer.run()
    assert trainer.validation.reports["all"].accuracy[-1] > 0.9
    return folder / "run", data


@pytest.fixture(scope="module")
def new_data(tmp_path_factory):
    return make_puzzles(tmp_path_factory.mktemp("new") / "data", NEW)


def test_a_run_on_new_puzzles_keeps_the_rows_that_it_knows(old, new_data, tmp_path):
    run, data = old
    was = load_checkpoint(run / "step_250").model["inner.puzzle_emb.weights"]
    for given in ("auto", data, f"{data}/identifiers.json"):
        config = settings(new_data, steps=1, load_checkpoint=str(run), load_identifiers=given)
        trainer = make_trainer(config, tmp_path / "run")
        rows = trainer.model.puzzle_emb.weights
        assert trainer.kept_rows == 2
        assert torch.equal(rows[:2], was[[0, 3]])
        assert torch.equal(rows[2:], was.mean(0).expand(2, -1))
    official = settings(new_data, steps=1, load_checkpoint=str(run))
    rows = make_trainer(official, tmp_path / "run").model.puzzle_emb.weights
    assert torch.equal(rows, was.mean(0).expand(4, -1))


def test_training_the_rows_alone_learns_new_puzzles(old, new_data, tmp_path):
    config = settings(
        new_data, steps=120, load_checkpoint=str(old[0]), load_identifiers="auto",
        freeze_weights=True, puzzle_emb_lr=3e-2,
    )  # fmt: skip
    trainer = make_trainer(config, tmp_path / "run")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    first = trainer.evaluate()["all"]
    assert trainer.run()
    moved = [n for n, v in trainer.model.state_dict().items() if not torch.equal(v, before[n])]
    assert moved == ["inner.puzzle_emb.weights"]
    assert first.exact_accuracy[-1] < 0.5
    assert trainer.validation.reports["all"].exact_accuracy[-1] > first.exact_accuracy[-1] + 0.3
    assert trainer.validation.reports["all"].accuracy[-1] > 0.85


def test_the_command_says_what_it_kept(old, new_data, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    config = old[0] / "step_250" / "config.json"
    arguments = [f"load_checkpoint={old[0]}", "steps=2", "freeze_weights=true", "resume=never"]
    names = ["run_name=new", "project_name=p", "checkpoint_path=null", f"data_paths=[{new_data}]"]
    shared = ["--config", str(config), *arguments, *names]
    assert train.main([*shared, "load_identifiers=auto"]) == 0
    assert "puzzle rows 2 of 4 as trained, the others their mean row" in capfd.readouterr().out


def test_evaluate_says_where_the_rows_are_of_other_puzzles(old, tmp_path, capsys):
    run, data = old
    other = make_puzzles(tmp_path / "data", {"a": 1, "b": 2, "c": 3, "d": 0})
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "test").symlink_to(f"{data}/test")
    for folder, said in ((data, False), (other, True), (str(unknown), None)):
        assert evaluate.main([str(run), "--data", folder]) == 0
        assert ("puzzles     not those trained on" in capsys.readouterr().out) is bool(said)
        assert evaluate.main([str(run), "--data", folder, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["other_puzzles"] is said


@pytest.mark.parametrize(
    ("identifiers", "width", "said"), [(1, 8, False), (5, 8, None), (5, 0, False)]
)
def test_boards_of_a_file_have_the_blank_identifier(identifiers, width, said):
    """Whose row was learned for them only where there is no other."""
    config = SimpleNamespace(num_puzzle_identifiers=identifiers, puzzle_emb_ndim=width)
    loaded = SimpleNamespace(
        model=SimpleNamespace(config=config), config={"data": {"puzzles": "0" * 64}}
    )
    source = evaluate.Source(None, ("boards.csv",), None)
    assert evaluate._other_puzzles(loaded, source) is said


def test_names_that_are_others_by_now_are_not_used(tmp_path, new_data):
    data = make_puzzles(tmp_path / "data", OLD)
    trainer = make_trainer(settings(data, steps=1), tmp_path / "run")
    assert trainer.run()
    names = ["<blank>", *reversed(OLD)]
    (tmp_path / "data" / "identifiers.json").write_text(json.dumps(names))
    asked = {"steps": 1, "load_checkpoint": str(tmp_path / "run")}
    with pytest.raises(ValueError, match=r"identifiers.json is not the one that .*run was trained"):
        make_trainer(settings(new_data, **asked, load_identifiers="auto"), tmp_path / "new")
    given = settings(new_data, **asked, load_identifiers=data)
    assert make_trainer(given, tmp_path / "new").kept_rows == 2


def test_names_that_are_not_there_are_said_so(old, new_data, tmp_path):
    run, data = old
    write_official(tmp_path / "step_9", load_checkpoint(run / "step_250").model)

    def refused(message, **changes):
        values = {"steps": 1, "load_checkpoint": str(run), "load_identifiers": "auto", **changes}
        with pytest.raises(ValueError, match=message):
            make_trainer(settings(new_data, **values), tmp_path / "run")

    refused("load_checkpoint: .*step_9 does not say .*: give", load_checkpoint=f"{tmp_path}/step_9")
    refused("4 identifiers name 5 puzzle rows", load_identifiers=new_data)
    refused("identifiers.json: No such file", load_identifiers=str(tmp_path))
    refused("is for runs on one data directory", data_paths=[new_data, new_data])
    short = tmp_path / "short"
    short.mkdir()
    for split in ("train", "test"):
        (short / split).symlink_to(f"{new_data}/{split}")
    (short / "identifiers.json").write_text(json.dumps(["<blank>"]))
    refused("1 identifiers in .*short: the rows are more", data_paths=[str(short)])


def test_load_weights_says_nothing_of_a_model_without_rows(old, tmp_path):
    data = make_puzzles(tmp_path / "data", OLD)
    bare = settings(data, steps=1, arch__puzzle_emb_ndim=0, arch__puzzle_emb_len=0)
    model = make_trainer(bare, tmp_path / "run").model
    write_official(tmp_path / "step_1", model.state_dict())
    assert load_weights(model, tmp_path / "step_1", (["a"], ["b"])) is None
