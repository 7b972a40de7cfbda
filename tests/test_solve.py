"""The solve command: puzzles in every form, the printed answer, each option, error and status."""

import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from answering import BLANK, DEPTH, SOLVED, save_run, tiny_model

from trm_fast import puzzles as text
from trm_fast import solve
from trm_fast.inference import supervision_steps
from trm_fast.loading import load_model

ROOT = Path(__file__).resolve().parent.parent
CLUES = "12..34..21..43.."
NINE = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
SIX = "123456456123231564564231312645645312"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "tiny", steps=(5, 7))


@pytest.fixture
def ask(run, capsys, monkeypatch):
    """ask(*arguments, model=run, stdin=None) -> (status, stdout, stderr); no stdin: a terminal."""

    def call(*arguments, model=run, stdin=None):
        monkeypatch.setattr(sys, "stdin", Terminal() if stdin is None else io.StringIO(stdin))
        chosen = [] if model is None else ["-m", str(model)]
        status = solve.main([*map(str, arguments), *chosen])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def expected(puzzle, *, seed, depth=DEPTH, best=True):
    """(answer, confidence, step) of the tiny model with that seed, by hand."""
    digits = [0 if char in "0._*" else int(char) for char in puzzle]
    batch = {
        "inputs": torch.tensor([digits], dtype=torch.int32) + 1,
        "puzzle_identifiers": torch.zeros(1, dtype=torch.int32),
    }
    steps = list(supervision_steps(tiny_model(seed), batch, depth))
    q = torch.stack([step.q[0] for step in steps])
    index = int(q.argmax()) if best else depth - 1
    tokens = steps[index].preds[0].tolist()
    cells = [
        str(given) if given else (str(token - 1) if token >= 2 else ".")
        for given, token in zip(digits, tokens, strict=True)
    ]
    return "".join(cells), float(torch.sigmoid(q[index])), index + 1


def test_output_is_line_rows_and_verdict(ask):
    status, out, err = ask(CLUES)
    answer, confidence, step = expected(CLUES, seed=107)
    rows = "\n".join(answer[i : i + 4] for i in range(0, 16, 4))
    head = f"{answer}\n\n{rows}\n\nbreaks the rules in "
    assert out.startswith(head)
    assert out.endswith(f"; halting confidence {confidence:.3f} at step {step}\n")
    cells = np.array([0 if char == "." else int(char) for char in answer])
    assert f"breaks the rules in {text.breaches(cells)}; halting" in out
    assert (status, err) == (1, "")
    assert "\x1b" not in out


def test_a_full_board_is_valid_and_status_0(ask):
    status, out, _ = ask(SOLVED)
    assert status == 0
    assert out.startswith(f"{SOLVED}\n\n1234\n3412\n2143\n4321\n\nvalid; halting confidence ")


def test_one_broken_answer_of_several_is_status_1(ask):
    status, out, _ = ask(SOLVED, CLUES, SOLVED)
    assert status == 1
    assert out.count("valid; ") == 2
    assert out.count("breaks the rules in ") == 1


def test_products_in_eight_bits(ask):
    told = [json.loads(ask(CLUES, "--json", *more)[1]) for more in ((), ("--quantize", "int8"))]
    assert [t["quantize"] for t in told] == ["none", "int8"]
    usual, given = (t["answers"][0]["confidence"] for t in told)
    assert given != usual
    assert given == pytest.approx(usual, abs=0.2)


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        ((), {"seed": 107}),
        (("--weights", "ema"), {"seed": 107}),
        (("--weights", "raw"), {"seed": 7}),
        (("--select", "last"), {"seed": 107, "best": False}),
        (("--steps", "5", "--select", "last"), {"seed": 107, "depth": 5, "best": False}),
        (("--steps", "9"), {"seed": 107, "depth": 9}),
        (("--device", "cpu"), {"seed": 107}),
    ],
)
def test_options_as_json(ask, run, arguments, want):
    puzzles = [CLUES, BLANK, "1" + BLANK[1:]]
    status, out, err = ask(*puzzles, "--json", *arguments)
    told = json.loads(out)
    assert (status, err) == (1, "")
    assert told["checkpoint"] == str(run / "step_7")
    assert told["optimizer_step"] == 7
    assert told["weights"] == ("raw" if want["seed"] == 7 else "ema")
    assert told["reasoning"]["select"] == ("q" if want.get("best", True) else "last")
    assert told["supervision_steps"] == want.get("depth", DEPTH)
    for number, (puzzle, shown) in enumerate(zip(puzzles, told["answers"], strict=True), 1):
        answer, confidence, step = expected(puzzle, **want)
        assert shown["place"] == f"argument {number}"
        assert shown["puzzle"] == puzzle.replace(".", "0")
        assert shown["answer"] == answer
        assert shown["confidence"] == pytest.approx(confidence, rel=1e-5)
        assert shown["step"] == step
        cells = np.array([0 if char == "." else int(char) for char in answer])
        breach = text.breaches(cells)
        assert shown["valid"] is not bool(breach)
        assert shown["broken"] == {
            "rows": list(breach.rows),
            "columns": list(breach.columns),
            "boxes": list(breach.boxes),
        }


def test_the_options_change_something():
    answers = {expected(CLUES, seed=seed)[:2] for seed in (105, 107, 7)}
    steps = {expected(puzzle, seed=107)[2] for puzzle in (CLUES, BLANK, "1" + BLANK[1:])}
    assert len(answers) == 3
    assert steps != {DEPTH}


def test_batch_size_does_not_change_answers(ask):
    puzzles = [CLUES, BLANK, SOLVED, "1" + BLANK[1:], "." + "2" + BLANK[2:]]
    told = []
    for size in (1, 2, 256):
        answers = json.loads(ask(*puzzles, "--json", "--batch-size", size)[1])["answers"]
        told.append([(a["answer"], a["step"]) for a in answers])
    assert told[0] == told[1] == told[2]


def test_eval_steps_max_of_the_run_is_the_default_depth(ask, tmp_path):
    run = save_run(tmp_path / "run", train={"eval_steps_max": 6})
    assert json.loads(ask(CLUES, "--json", model=run)[1])["supervision_steps"] == 6


@pytest.mark.parametrize("which", ["run", "run/last", "run/best", "run/step_5"])
def test_checkpoints_by_every_name(ask, tmp_path, which):
    save_run(tmp_path / "run", steps=(5, 7))
    (tmp_path / "run" / "best").write_text("step_5\n")
    told = json.loads(ask(SOLVED, "--json", model=tmp_path / which)[1])
    assert told["optimizer_step"] == (7 if which in ("run", "run/last") else 5)


def test_without_an_average_the_raw_weights_answer(ask, tmp_path):
    run = save_run(tmp_path / "run", ema=False)
    told = json.loads(ask(CLUES, "--json", model=run)[1])
    assert told["weights"] == "raw"
    assert told["answers"][0]["answer"] == expected(CLUES, seed=7)[0]


def test_input_file_stdin_and_arguments_together(ask, tmp_path):
    file = tmp_path / "boards.csv"
    file.write_text(f"question,answer\n{BLANK},{SOLVED}\n")
    told = json.loads(ask(SOLVED, "-i", file, "--json")[1])["answers"]
    assert [a["place"] for a in told] == ["argument 1", f"{file}:2"]
    for arguments in (("-i", "-"), ()):
        told = json.loads(ask(*arguments, "--json", stdin=f"\n{CLUES}\n")[1])["answers"]
        assert [(a["place"], a["puzzle"]) for a in told] == [("stdin:2", CLUES.replace(".", "0"))]


def test_output_file(ask, tmp_path):
    shown = ask(CLUES, SOLVED)[1]
    status, out, err = ask(CLUES, SOLVED, "-o", tmp_path / "answers.txt")
    assert (status, out, err) == (1, "", "")
    assert (tmp_path / "answers.txt").read_text() == shown


def test_the_newest_run_is_the_default(ask, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, age in (("old", 20), ("new", 10), ("older", 30)):
        run = save_run(tmp_path / "checkpoints" / "Project" / name)
        moment = 1_700_000_000 - age
        os.utime(run / "last", (moment, moment))
    _, out, err = ask(SOLVED, "--json", model=None)
    chosen = Path("checkpoints/Project/new/step_7")
    assert json.loads(out)["checkpoint"] == str(chosen)
    assert err == f"answered by {chosen} (ema weights)\n"


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ((), 2, "no puzzle given: 81 characters as argument, -i FILE, or stdin"),
        (
            (SOLVED, "--stesp", "1"),
            2,
            "unrecognized arguments: --stesp 1 (did you mean '--steps'?)",
        ),
        (
            (SOLVED, "--step", "1"),
            2,
            "unrecognized arguments: --step 1 (did you mean '--steps'?)",
        ),
        (
            (SOLVED, "--steps", "0"),
            2,
            "argument --depth/--steps: '0' is not a whole number from 1 to 999999999; see --help",
        ),
        (
            (SOLVED, "--batch-size", "1e3"),
            2,
            "argument --batch-size: '1e3' is not a whole number from 1 to 999999999; see --help",
        ),
        (
            (SOLVED, "--device", "tpu"),
            2,
            "device must be auto, cpu, cuda, cuda:N or mps, got 'tpu'",
        ),
        (
            (SOLVED, "--device", "xpu"),
            2,
            "device must be auto, cpu, cuda, cuda:N or mps, got 'xpu'",
        ),
        ((SOLVED, "--device", "cuda:99"), 2, "device 'cuda:99' is not there; trm-fast info lists"),
        (("-i", "nowhere.txt"), 2, "nowhere.txt: no such file"),
        (("-i", "."), 4, ".: Is a directory"),
        ((SOLVED, "-o", "no/such/folder"), 2, "no/such/folder: cannot be written (No such file"),
        ((SOLVED, "1x" + BLANK[2:]), 2, "argument 2: character 2 is 'x'"),
        (("11" + BLANK[2:],), 2, "argument 1: clues clash, a digit stands twice in row 1; box 1"),
        ((SOLVED, SOLVED + "1"), 5, "argument 2: 17 characters, expected 16, 36 or 81"),
        ((NINE,), 5, "argument 1: 81 characters, the model "),
    ],
)
def test_errors_are_one_line_with_a_status(ask, arguments, status, said):
    got, out, err = ask(*arguments)
    assert (got, out) == (status, "")
    assert err.startswith(f"trm-fast solve: {said}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("option", ["--select", "--weights"])
def test_a_choice_there_is_not(ask, option):
    status, out, err = ask(SOLVED, option, "frist")
    assert (status, out) == (2, "")
    assert err.startswith(f"trm-fast solve: argument {option}: invalid choice: 'frist'")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [
        (f"{SOLVED}\n1x{BLANK[2:]}\n", 4, "stdin:2: character 2 is 'x'"),
        (f"question\n11{BLANK[2:]}\n", 4, "stdin:2: clues clash"),
        ("1,2\n", 4, "stdin:1: a CSV file needs a column"),
        (f"{SOLVED}\n123\n", 5, "stdin:2: 3 characters"),
        (f"{NINE}\n", 5, "stdin:1: 81 characters, the model"),
        ("\n", 2, "no puzzle given"),
    ],
)
def test_faults_in_what_is_read(ask, content, status, said):
    got, out, err = ask(stdin=content)
    assert (got, out) == (status, "")
    assert err.startswith(f"trm-fast solve: {said}")
    assert err.count("\n") == 1


def test_a_file_that_is_no_text(ask, tmp_path):
    (tmp_path / "x").write_bytes(b"\xff\xfe\x00")
    status, _, err = ask("-i", tmp_path / "x")
    assert (status, err) == (4, f"trm-fast solve: {tmp_path / 'x'}: not UTF-8 text\n")


def damaged(tmp_path):
    run = save_run(tmp_path / "run")
    weights = run / "step_7" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    return run, f"{run}: no readable checkpoint: {weights}: damaged"


def best_damaged(tmp_path):
    run = save_run(tmp_path / "run", steps=(5, 7))
    (run / "best").write_text("step_5\n")
    (run / "step_5" / "config.json").write_text("{}")
    return run / "best", f"{run / 'step_5' / 'config.json'}: damaged"


def test_an_older_checkpoint_is_not_taken_without_a_word(ask, tmp_path):
    run = save_run(tmp_path / "run", steps=(5, 7))
    weights = run / "step_7" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    for which in (run, run / "last"):
        status, out, err = ask(CLUES, model=which)
        assert status in (0, 1) and out
        assert err.startswith(f"note: {weights}: damaged (") and err.endswith("; taking step_5\n")
        assert err.count("\n") == 1
    assert ask(CLUES, model=run / "step_5")[2] == ""


def no_average(tmp_path):
    run = save_run(tmp_path / "run", ema=False)
    return run, f"{run / 'step_7'}: the run kept no moving average; take weights raw"


def rewritten(tmp_path, change):
    """A complete checkpoint whose configuration or weights were changed before it was saved."""
    from trm_fast.checkpoint import load_checkpoint, save_checkpoint

    run = save_run(tmp_path / "run")
    saved = load_checkpoint(run / "step_7")
    change(saved)
    save_checkpoint(run, 7, model=saved.model, ema=saved.ema, config=saved.config, train_state={})
    return run


def no_model(tmp_path):
    run = rewritten(tmp_path, lambda saved: saved.config.pop("model"))
    return run, f"{run / 'step_7' / 'config.json'}: the model's configuration is missing"


def unknown_key(tmp_path):
    run = rewritten(tmp_path, lambda saved: saved.config["model"].update(hiden_size=1))
    return run, f"{run / 'step_7' / 'config.json'}: unknown model key 'hiden_size'"


def other_width(tmp_path):
    run = rewritten(tmp_path, lambda saved: saved.config["model"].update(hidden_size=32))
    return run, f"{run / 'step_7'}: weights do not fit config.json (inner."


def not_finite(tmp_path):
    run = rewritten(tmp_path, lambda saved: saved.ema["inner.lm_head.weight"].fill_(float("nan")))
    return run, f"{run / 'step_7'}: ema weights are not finite in inner.lm_head.weight"


def nowhere(tmp_path):
    return tmp_path / "nowhere", f"{tmp_path / 'nowhere'}: no such checkpoint"


def nowhere_best(tmp_path):
    run = save_run(tmp_path / "run")
    return run / "best", f"{run / 'best'}: no such checkpoint"


def empty(tmp_path):
    return tmp_path, f"{tmp_path}: no readable checkpoint"


@pytest.mark.parametrize(
    "make",
    [
        damaged,
        best_damaged,
        no_average,
        no_model,
        unknown_key,
        other_width,
        not_finite,
        nowhere,
        nowhere_best,
        empty,
    ],
)
def test_a_checkpoint_that_cannot_answer_is_status_3(ask, tmp_path, make):
    path, said = make(tmp_path)
    status, out, err = ask(SOLVED, "--weights", "ema", model=path)
    assert (status, out) == (3, "")
    assert err.startswith(f"trm-fast solve: {said}")
    assert err.count("\n") == 1


def test_a_model_of_other_puzzles_is_status_5(ask, tmp_path):
    run = save_run(tmp_path / "run", changes={"vocab_size": 9})
    status, _, err = ask(SOLVED, model=run)
    assert status == 5
    assert err.endswith("step_7: not a Sudoku model (16 tokens of 9 values)\n")


def test_puzzle_rows_answer_under_the_blank_identifier(ask, tmp_path):
    changes = {"puzzle_emb_ndim": 16, "puzzle_emb_len": 1, "num_puzzle_identifiers": 3}
    run = save_run(tmp_path / "run", changes=changes)
    status, out, _ = ask(SOLVED, model=run)
    assert status == 0
    assert out.startswith(SOLVED)


def test_load_model_gives_model_and_configuration(run):
    model, config = load_model(run, weights="raw", device="cpu")
    assert not model.training
    assert config["model"]["hidden_size"] == 16
    for name, value in tiny_model(7).state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    with pytest.raises(ValueError, match="weights must be 'ema' or 'raw', got 'EMA'"):
        load_model(run, weights="EMA")


@pytest.mark.parametrize("command", ["solve", "evaluate"])
def test_the_page_explains_every_option(command):
    parser = importlib.import_module(f"trm_fast.{command}")._parser()
    page = (ROOT / "docs" / "answers.md").read_text(encoding="utf-8")
    for action in parser._actions[1:]:
        assert any(f"`{name}" in page or f" {name} " in page for name in action.option_strings) or (
            action.metavar in page
        ), action


def test_as_a_module(run):
    done = subprocess.run(
        [sys.executable, "-m", "trm_fast.solve", "-m", str(run)],
        cwd=ROOT,
        input=f"{SOLVED}\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{SOLVED}\n\n1234\n")


def test_help_names_every_option_and_the_statuses(capsys):
    with pytest.raises(SystemExit) as caught:
        solve.main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for part in ("--input", "--output", "--model", "--select", "--weights", "exit status: 0"):
        assert part in out
