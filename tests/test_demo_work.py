"""What the demo's page may ask for: models, puzzles in every form, frames; and every refusal."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from answering import SOLVED, save_run, tiny_model

from trm_fast import Model
from trm_fast.data.format import Metadata, PuzzleArrays, write_dataset
from trm_fast.demo import command
from trm_fast.demo.work import LIMITS, Demo, RequestError
from trm_fast.inference import predict
from trm_fast.loading import Loaded, load

CLUES = "12..34..21..43.."
MAZE = "S    \n#### \nG    \n#####\n#####"
ARC = {"seq_len": 900, "vocab_size": 12, "num_puzzle_identifiers": 3, "puzzle_emb_ndim": 16}


def loaded(model: Model, **config) -> Loaded:
    return Loaded(model, config, Path("checkpoints/Project/run/step_7"), 7, "ema")


@pytest.fixture(scope="module")
def demo():
    return Demo([loaded(tiny_model(3)), loaded(tiny_model(4, seq_len=25, vocab_size=6))])


def tokens(text: str) -> list[int]:
    return [1 if c == "." else int(c) + 1 for c in text]


def refused(demo, call, asked) -> str:
    with pytest.raises(RequestError) as caught:
        list(demo.frames(asked)) if call == "frames" else demo.puzzle(asked)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 400
    return str(caught.value)


def test_what_the_page_knows_beforehand(demo):
    told = json.loads(json.dumps(demo.models(), allow_nan=False))
    assert [one["kind"] for one in told["models"]] == ["sudoku", "maze"]
    first = told["models"][0]
    assert (first["side"], first["name"], first["depth"], first["weights"]) == (
        4,
        "run/step_7",
        3,
        "ema",
    )
    assert first["parameters"] == sum(p.numel() for p in tiny_model().parameters())
    assert list(told["missing"]) == ["arc"] and "trm-fast data arc" in told["missing"]["arc"]
    assert set(told["presets"]) == {"ptrm", "eqr", "vote", "restarts"}
    assert told["presets"]["restarts"]["sudoku"]["schedule"] == "sequential"
    assert "arc" not in told["presets"]["vote"]
    assert "budget" not in told["defaults"] and told["defaults"]["rollouts"] == 1
    assert told["limits"] == LIMITS


def test_other_models_are_refused():
    with pytest.raises(RequestError, match="answers neither Sudoku nor mazes nor ARC"):
        Demo([loaded(tiny_model(vocab_size=7))])


@pytest.mark.parametrize(
    "text",
    [
        CLUES,
        CLUES.replace(".", "0"),
        "12..\n34..\n21..\n43..",
        "1 2 | . .\n3 4 | . .\n----+----\n2 1 | * _\n4 3 | 0 .\n",
        "+---+---+\r\n|12 |.. |\r\n|34 |.. |\r\n+---+---+\r\n|21 |.. |\r\n|43 |.. |\r\n+---+---+",
        "┌──┬──┐\n│12│..│\n│34│..│\n├──┼──┤\n│21│..│\n│43│..│\n└──┴──┘",
        f"\ufeff# mine\n\n{CLUES}\n",
        f"question,answer\n{CLUES},{SOLVED}\n",
    ],
)
def test_sudoku_in_every_form(demo, text):
    shown = demo.puzzle({"model": 0, "text": text})
    assert shown["line"] == CLUES and shown["cells"] == tokens(CLUES)
    assert (shown["kind"], shown["side"], shown["box"], shown["window"]) == (
        "sudoku",
        4,
        [2, 2],
        [4, 4],
    )


@pytest.mark.parametrize(
    "text", [MAZE, MAZE.replace(" ", "."), f"\n{MAZE}\n\n", MAZE.replace("\n", "")]
)
def test_mazes_in_every_form(demo, text):
    shown = demo.puzzle({"model": 1, "text": text})
    assert shown["line"] == MAZE.replace("\n", "") and shown["window"] == [5, 5]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"model": 0, "text": "1x" + CLUES[2:]}, "character 2 is 'x', expected a digit"),
        ({"model": 0, "text": "11" + CLUES[2:]}, "clues clash, a digit stands twice in"),
        ({"model": 0, "text": "123"}, "3 characters: a board has 16"),
        ({"model": 0, "text": "." * 81}, "puzzle: 81 cells, the model answers boards of 16"),
        ({"model": 0, "text": f"{CLUES}\n123"}, "puzzle:2: 3 characters, expected 16, 36 or 81"),
        ({"model": 0, "text": f"{CLUES}\n{CLUES}"}, "puzzle: 2 puzzles, one is asked for"),
        ({"model": 0, "text": ""}, "puzzle: no puzzles, one is asked for"),
        ({"model": 0, "text": "\0\x1b[2J"}, "5 characters: a board has 16"),
        ({"model": 0, "text": "." * 20_001}, "text must be a puzzle of at most 20000 characters"),
        ({"model": 0, "text": 5}, "text must be a puzzle of at most 20000 characters"),
        ({"model": 1, "text": "S G"}, "puzzle: 1 lines, but the longest line has 3 characters"),
        ({"model": 1, "text": ""}, "puzzle: "),
        ({"model": 1, "text": "#" * 25}, "puzzle: "),
        ({"model": 1, "text": "\n".join(["S G###"] + ["######"] * 5)}, "puzzle: 36 cells, the mod"),
        ({"model": 2, "text": CLUES}, "model is 2; 0 to 1 are allowed"),
        ({"model": True, "text": CLUES}, "model is True; 0 to 1 are allowed"),
        ({"model": "0", "text": CLUES}, "model is '0'; 0 to 1 are allowed"),
        ({"text": CLUES}, "model is None; 0 to 1 are allowed"),
        ({"model": 0}, "one of text, seed and example is needed"),
        ({"model": 0, "text": CLUES, "seed": 1}, "one of text, seed and example is needed"),
        ({"model": 0, "example": 0}, "a sudoku model has no examples"),
        ({"model": 0, "seed": -1}, "seed is -1; 0 to 4294967295 are allowed"),
        ({"model": 0, "seed": 1, "level": "mad"}, "level is 'mad'; allowed: easy, medium, hard"),
        ({"model": 0, "seed": 1, "level": []}, "level is []; allowed: easy, medium, hard"),
        (
            {"model": 0, "txet": ""},
            "unknown key 'txet'; allowed: model, text, seed, level, example",
        ),
    ],
)
def test_puzzles_that_are_refused(demo, asked, said):
    assert refused(demo, "puzzle", asked).startswith(said)


@pytest.mark.parametrize("level", ["easy", "medium", "hard"])
def test_new_puzzles_by_seed(level):
    demo = Demo([loaded(tiny_model(seq_len=81, vocab_size=11))])
    clues = []
    for seed in (1, 1, 2):
        line = demo.puzzle({"model": 0, "seed": seed, "level": level})["line"]
        clues.append(line)
        low, high = {"easy": (36, 49), "medium": (28, 32), "hard": (23, 28)}[level]
        assert low <= 81 - line.count(".") <= high
    assert clues[0] == clues[1] != clues[2]


def test_new_mazes_by_seed(demo):
    lines = [demo.puzzle({"model": 1, "seed": seed})["line"] for seed in (1, 1, 2)]
    assert lines[0] == lines[1] != lines[2]
    assert len(lines[0]) == 25 and lines[0].count("S") == 1


def test_frames_are_those_of_watch_and_the_answer_that_of_predict(demo):
    settings = {"rollouts": 3, "depth": 4, "by": "symmetry", "seed": 7}
    first, *frames, last = demo.frames({"model": 0, "text": CLUES, "settings": settings})
    assert first == {"start": {"rollouts": 3, "depth": 4, "cells": 16}}
    assert [line["frame"]["number"] for line in frames] == [1, 2, 3, 4]
    json.dumps([first, *frames, last], allow_nan=False)
    inputs = torch.tensor([tokens(CLUES)])
    want = predict(tiny_model(3), inputs, rollouts=3, depth=4, by="symmetry", seed=7)
    answer = last["answer"]
    assert answer["cells"] == want.tokens[0].tolist()
    assert answer["line"] == "".join(str(t - 1) if t > 1 else "." for t in answer["cells"])
    assert (answer["rollout"], answer["step"], answer["passes"]) == (
        int(want.rollout),
        int(want.step),
        12,
    )
    assert answer["q"] == pytest.approx(float(want.q), rel=1e-5)
    at = frames[answer["step"] - 1]["frame"]["rollouts"][answer["rollout"]]
    assert (at["cells"], at["broken"], at["valid"]) == (
        answer["cells"],
        answer["broken"],
        answer["valid"],
    )
    assert at["q"] == pytest.approx(answer["q"]) and at["step"] == answer["step"]
    assert all(0 <= sure <= 100 for sure in at["sure"])
    assert [at["sure"][i] for i in (0, 1, 4, 5)] == [100] * 4  # given


def test_rollouts_that_did_not_move_are_left_out(demo):
    settings = {"rollouts": 3, "depth": 2, "schedule": "sequential", "select": "valid"}
    _, *frames, last = demo.frames({"model": 0, "text": CLUES, "settings": settings})
    moved = [[row is not None for row in line["frame"]["rollouts"]] for line in frames]
    assert all(sum(row) == 1 for row in moved)
    passes = last["answer"]["passes"]
    assert moved == [[k == step // 2 for k in range(3)] for step in range(passes)]


def test_the_depth_of_a_run_is_the_default():
    own = Demo([loaded(tiny_model(3), eval_steps_max=2)])
    lines = list(own.frames({"model": 0, "text": CLUES}))
    assert lines[0]["start"]["depth"] == 2 and len(lines) == 4


def test_a_maze_is_answered(demo):
    last = list(demo.frames({"model": 1, "text": MAZE, "settings": {"depth": 1}}))[-1]["answer"]
    assert last["line"].count("\n") == 4 and last["line"][0] == "S"
    assert last["line"].replace("o", " ") == MAZE


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rollouts": 129}, "rollouts is 129; at most 128 are allowed here"),
        ({"depth": 129}, "depth is 129; at most 128 are allowed here"),
        ({"rollouts": 0}, "rollouts must be a whole number from 1 to "),
        ({"rollouts": 10**30}, "rollouts must be a whole number from 1 to "),
        ({"depth": 1.5}, "depth must be "),
        ({"depth": "8"}, "depth must be "),
        ({"rollouts": True}, "rollouts must be "),
        ({"noise": -1}, "noise must be a number of at least 0, got -1"),
        ({"noise": "x"}, "noise must be "),
        ({"noise": 10**400}, "noise must be a number of at least 0, got 1000"),
        ({"noise": []}, "noise must be "),
        ({"noise": True}, "noise must be a number of at least 0, got True"),
        ({"select": "best"}, "select must be one of "),
        ({"select": {}}, "select must be one of "),
        ({"schedule": "sequential"}, "schedule='sequential' stops at the first good answer"),
        ({"rollouts": 100, "depth": 100}, "passes (rollouts times depth) is 10000; at most 8192"),
        ({"budget": 5}, "unknown key 'budget'; allowed: depth, rollouts, by, noise"),
        ([], "settings must be an object"),
        (None, "settings must be an object"),
    ],
)
def test_settings_that_are_refused(demo, settings, said):
    asked = {"model": 0, "text": CLUES, "settings": settings}
    assert refused(demo, "frames", asked).startswith(said)


def test_noise_beyond_all_bounds_is_answered(demo):
    settings = {"rollouts": 2, "depth": 2, "noise": 10**20}
    lines = list(demo.frames({"model": 0, "text": CLUES, "settings": settings}))
    json.dumps(lines, allow_nan=False)
    assert lines[-1]["answer"]["cells"][:2] == [2, 3]


def test_settings_that_are_not_for_the_model(demo):
    asked = {"model": 1, "text": MAZE, "settings": {"rollouts": 9}}
    assert refused(demo, "frames", asked).startswith("a maze has 8 symmetries")
    assert refused(demo, "frames", {"model": 0, "seed": 1}).startswith("unknown key 'seed'")


def arc_data(root: Path) -> Path:
    """Two tasks, the second with an image, one test pair each."""
    canvas = np.zeros((3, 30, 30), np.uint8)
    canvas[:, :2, :3], canvas[:, 2, :4], canvas[:, :3, 3] = 4, 1, 1
    inputs = canvas.reshape(3, 900)
    labels = inputs.copy()
    labels[:, :3] = 7
    metadata = Metadata(0, 0, 0, 12, 900, 3, 2, 1.5, 3, ("all",))
    index, groups = np.arange(4, dtype=np.int32), np.array([0, 1, 3], np.int32)
    identifiers = np.array([1, 2, 2], np.int32)
    arrays = PuzzleArrays(inputs, labels, identifiers, index, groups)
    names = ["<blank>", "first|||t1|||0123456789", "two"]
    write_dataset(root, {"test": (metadata, {"all": arrays})}, names)
    return root


def test_arc_examples_come_from_the_data_set_of_the_run(tmp_path):
    root = arc_data(tmp_path / "arc")
    model = tiny_model(5, **ARC, puzzle_emb_len=1)
    demo = Demo([loaded(model, data={"data_paths": [str(root)], "data_paths_test": []})])
    assert demo.models()["models"][0]["examples"] == ["two", "two"]  # no images
    shown = demo.puzzle({"model": 0, "example": 1})
    assert (shown["kind"], shown["window"], shown["name"]) == ("arc", [2, 3], "two")
    assert shown["solution"][:3] == [7, 7, 7] and shown["cells"][:3] == [4, 4, 4]
    lines = list(demo.frames({"model": 0, "example": 1, "settings": {"depth": 2}}))
    raw = predict(model, torch.tensor([shown["cells"]]), torch.tensor([2]), depth=2)
    grid = np.array(lines[-1]["answer"]["cells"])
    assert (grid[grid > 0] == raw.tokens[0].numpy()[grid > 0]).all()
    assert lines[-1]["answer"]["valid"] is False
    assert refused(demo, "puzzle", {"model": 0, "example": 2}) == (
        "example is 2; 0 to 1 are allowed"
    )
    assert refused(demo, "puzzle", {"model": 0, "text": "x"}).startswith("ARC puzzles are examples")


@pytest.mark.parametrize(
    ("data", "note"),
    [
        ({}, "The checkpoint names no data set to take examples from."),
        ({"data_paths": ["nowhere"]}, "No examples: nowhere: no such data directory"),
    ],
)
def test_arc_without_its_data_set_says_so(data, note):
    demo = Demo([loaded(tiny_model(5, **ARC), data=data)])
    assert demo.models()["models"][0]["note"] == note
    assert refused(demo, "puzzle", {"model": 0, "example": 0}) == note


def test_the_models_that_are_served(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    parser = command._parser()

    def served(*arguments):
        return [str(one.folder) for one in command._models(parser.parse_args(arguments))]

    (shipped,) = served()
    assert shipped == str(load("shipped", device="cpu").folder)
    run = save_run(tmp_path / "checkpoints" / "Project" / "run")
    assert served() == [str(Path("checkpoints/Project/run/step_7")), shipped]
    assert served("-m", str(run), "-m", "shipped") == [str(run / "step_7"), shipped]
    assert capsys.readouterr().err == ""
    (run / "step_7" / "model.safetensors").write_bytes(b"x")
    assert served() == [shipped]
    assert capsys.readouterr().err.startswith("note: left out: checkpoints/Project/run: no readab")
    other = save_run(tmp_path / "checkpoints" / "Project" / "other", changes={"vocab_size": 9})
    assert served() == [shipped]
    said = "note: left out: checkpoints/Project/other/step_7: answers neither Sudoku nor mazes nor"
    assert capsys.readouterr().err.startswith(said)
    assert other.is_dir()


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--port", "65536"), 2, "argument -p/--port: '65536' is not a port, a number from 0 to"),
        (("--port", "-1"), 2, "argument -p/--port: '-1' is not a port, a number from 0 to 65535"),
        (("--model", "nowhere"), 3, "nowhere: no such checkpoint"),
        (("--device", "tpu"), 2, "device must be auto, cpu, cuda, cuda:N or mps, got 'tpu'"),
        (("shipped",), 2, "unrecognized arguments: shipped; see --help"),
    ],
)
def test_errors_of_the_command_are_one_line(capsys, tmp_path, monkeypatch, arguments, status, said):
    monkeypatch.chdir(tmp_path)
    assert command.main(arguments) == status
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"trm-fast demo: {said}") and err.count("\n") == 1
