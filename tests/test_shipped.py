"""The model that comes with the package: what it says of itself, what it solves, who asks it."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from trm_fast import Model, evaluate, solve
from trm_fast.data.sudoku_generator import generate
from trm_fast.inference import predict
from trm_fast.loading import load
from trm_fast.pretrained import read_saved

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "trm_fast" / "shipped"
EASY = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
SOLVED = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A working folder without runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_is_small_and_says_how_it_was_made():
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(files) == {"README.md", "config.json", "model.safetensors", "q_threshold.json"}
    assert sum(files.values()) < 500_000
    made = json.loads((FOLDER / "config.json").read_text())["made_by"]
    assert set(made) == {"commands", "seed", "cpu_seconds", "machine", "trm_fast", "metrics"}
    card = (FOLDER / "README.md").read_text()
    for command in made["commands"]:
        assert command.startswith("trm-fast ") and command in card


def test_it_solves_what_it_says_it_solves(nowhere):
    model = Model.from_pretrained("shipped")
    assert model.config.forward_dtype == "float32"
    said = json.loads((FOLDER / "config.json").read_text())["made_by"]["metrics"]
    shares = []
    for clues, key in (((36, 50), "easy"), ((28, 32), "medium")):
        boards, grids = generate(100, clues=clues, seed=4711)
        answers = predict(model, torch.from_numpy(boards.astype(np.int32)) + 1, depth=16)
        shares.append(float((answers.tokens.numpy() == grids + 1).all(1).mean()))
        assert shares[-1] > said[f"{key}, best q of 16 steps"] - 0.15
    assert shares[0] > 0.9 and shares[1] > 0.6


def test_restarts_solve_what_one_run_leaves():
    """What docs/reasoning.md says, within what 100 boards can tell."""
    model = Model.from_pretrained("shipped")
    assert model.q_threshold == 2.75
    for clues, least, passes in (((36, 50), 97, 16 / 3), ((28, 32), 96, 23), ((23, 27), 84, 96)):
        boards, grids = generate(100, clues=clues, seed=4711)
        answers = predict(
            model, torch.from_numpy(boards.astype(np.int32)) + 1, reasoning="restarts"
        )
        assert (answers.tokens.numpy() == grids + 1).all(1).sum() >= least
        assert float(answers.passes.double().mean()) <= passes


def test_it_is_named_where_no_path_is_called_so(nowhere, capsys):
    assert read_saved("shipped").place == FOLDER
    assert load("shipped", device="cpu").config["eval_steps_max"] == 16
    (nowhere / "boards.csv").write_text(f"quizzes,solutions\n{EASY.replace('.', '0')},{SOLVED}\n")
    assert evaluate.main(["shipped", "--csv", "boards.csv"]) == 0
    said = capsys.readouterr().out
    assert "1 board, 16 supervision steps" in said
    assert "\nweights     moving average (ema), optimizer step 5500\n" in said
    (nowhere / "shipped").mkdir()
    with pytest.raises(ValueError, match="^shipped: no readable checkpoint"):
        read_saved("shipped")


def test_solve_asks_it_where_there_is_no_run(nowhere, capsys):
    assert solve.main([EASY]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{SOLVED}\n\n")
    assert err == "answered by the model that comes with trm_fast: no run in ./checkpoints\n"
    assert solve.main([EASY, "-m", "shipped"]) == 0
    assert capsys.readouterr() == (out, "")


def test_boards_of_another_size_need_another_model(nowhere, capsys):
    assert solve.main(["12..34..21..43.."]) == 5
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("trm-fast solve: argument 1: 16 characters, the model ")
    assert err[-1].endswith("shipped answers boards of 81; -m CHECKPOINT names another")


def examples_of(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.S)


class FromModel:
    """What the page's examples use of onnxruntime, answered by the model itself."""

    def __init__(self, path, providers=None):
        model = Model.from_pretrained("shipped")
        self._path, self._model = str(path), model

    def run(self, names, feed):
        inputs = torch.from_numpy(feed["inputs"])
        answers = predict(self._model, inputs, depth=16)
        assert feed["inputs"].dtype == np.int32
        return answers.tokens.int().numpy(), None, np.tile(answers.q.numpy()[:, None], (1, 16))


def test_the_example_of_the_page_solves_its_board(nowhere, capsys, monkeypatch):
    """With the model in place of the file: that the file says the same is export's own check."""
    fake = type(sys)("onnxruntime")
    fake.InferenceSession = FromModel
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    exec(compile(examples_of("export.md")[0], "export.md", "exec"), {})
    assert capsys.readouterr().out.startswith(f"{SOLVED}\nhalting confidence 0.9")
