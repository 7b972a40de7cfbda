"""The evaluate command: numbers against the library, every option, error and exit status."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from answering import BLANK, CELLS, DEPTH, SOLVED, boards, save_run, tiny_model, write_data

from trm_fast import console
from trm_fast import evaluate as command
from trm_fast.data.dataset import from_arrays
from trm_fast.data.format import write_dataset
from trm_fast.inference import supervision_steps
from trm_fast.loading import load_model
from trm_fast.rules import sudoku_rules

CLUES = "12..34..21..43.."
TURNED = "4321214334121234"  # another solution grid


def steps_of(seed, inputs, depth=DEPTH, **changes):
    """(preds [M, N, L], q [M, N]) of the tiny model with that seed."""
    batch = {
        "inputs": torch.as_tensor(np.asarray(inputs), dtype=torch.int32),
        "puzzle_identifiers": torch.zeros(len(inputs), dtype=torch.int32),
    }
    outs = list(supervision_steps(tiny_model(seed, **changes), batch, depth))
    return np.stack([o.preds.numpy() for o in outs]), np.stack([o.q.numpy() for o in outs])


def tokens(*texts):
    return np.array([[0 if c in "0." else int(c) for c in text] for text in texts]) + 1


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """9 boards; of 4 the label is the EMA model's answer of step 2, so that some are exact."""
    inputs = boards(9)
    preds, _ = steps_of(107, inputs)
    labels = boards(9, seed=1)
    labels[::2] = preds[1, ::2]  # token 0 stands for an unlabelled cell
    labels[0, 5:] = 0
    return write_data(tmp_path_factory.mktemp("data") / "set", inputs, labels), inputs, labels


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    return save_run(tmp_path_factory.mktemp("runs") / "tiny", steps=(5, 7), data=data[0])


@pytest.fixture
def measure(run, capsys):
    """measure(*arguments, model=run) -> (status, stdout, stderr)."""

    def call(*arguments, model=run):
        status = command.main([str(model), *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def expected(seed, inputs, labels, depth=DEPTH, most=None):
    """What a set's report should say, by a plain loop."""
    inputs, labels = inputs[:most], labels[:most]
    preds, q = steps_of(seed, inputs, depth)
    told = {"accuracy": [], "exact_accuracy": [], "valid": [], "q_halt_accuracy": []}
    share = np.zeros(q.shape)
    kept = labels != 0
    for m in range(depth):
        share[m] = ((preds[m] == labels) & kept).sum(1) / kept.sum(1)
        exact = share[m] == 1
        told["accuracy"].append(share[m].mean())
        told["exact_accuracy"].append(exact.mean())
        told["q_halt_accuracy"].append(((q[m] >= 0) == exact).mean())
        told["valid"].append(sudoku_rules(inputs, preds[m]).mean())
    best = q.argmax(0), np.arange(len(labels))
    return told | {
        "puzzles": len(labels),
        "best_q_accuracy": share[best].mean(),
        "best_q_exact_accuracy": (share[best] == 1).mean(),
        "best_q_valid": sudoku_rules(inputs, preds[best]).mean(),
        "best_q_steps": (best[0] + 1).mean(),
    }


def check(document, want):
    (report,) = document["sets"].values()
    for key, value in want.items():
        assert report[key] == pytest.approx(value, rel=1e-6), key
    assert document["supervision_steps"] == len(report["accuracy"])


@pytest.mark.parametrize(
    ("arguments", "want", "about"),
    [
        ((), {"seed": 107}, {"weights": "ema", "step": 7, "max_puzzles": None}),
        ((), {"seed": 107}, {"quantize": "none"}),
        (("--weights", "ema"), {"seed": 107}, {"weights": "ema"}),
        (("--weights", "raw"), {"seed": 7}, {"weights": "raw"}),
        (("--steps", "5"), {"seed": 107, "depth": 5}, {"supervision_steps": 5}),
        (("--steps", "1"), {"seed": 107, "depth": 1}, {"supervision_steps": 1}),
        (("--max-puzzles", "3"), {"seed": 107, "most": 3}, {"max_puzzles": 3}),
        (("--max-puzzles", "99"), {"seed": 107}, {"max_puzzles": 99}),
        (("--max-puzzles", "5", "--batch-size", "2"), {"seed": 107, "most": 5}, {}),
        (("--batch-size", "4"), {"seed": 107}, {}),
        (("--device", "cpu"), {"seed": 107}, {}),
        (("--split", "test"), {"seed": 107}, {"split": "test"}),
    ],
)
def test_numbers_are_those_of_a_plain_loop(measure, data, run, arguments, want, about):
    root, inputs, labels = data
    status, out, err = measure("--json", *arguments)
    assert (status, err) == (0, "")
    document = json.loads(out)
    check(document, expected(inputs=inputs, labels=labels, **want))
    assert document["checkpoint"] == str(run / "step_7")
    assert document["data"] == [str(root)]
    assert about.items() <= document.items()


def test_the_case_tells_steps_and_weights_apart(data):
    told = expected(107, *data[1:])
    assert told["exact_accuracy"][1] == pytest.approx(5 / 9)
    assert len(set(told["accuracy"])) == DEPTH
    assert told["accuracy"] != expected(7, *data[1:])["accuracy"]
    assert 1 < told["best_q_steps"] < DEPTH


@pytest.mark.parametrize("way", ["int8", "fp8"])
def test_products_in_eight_bits(way, measure, run, tmp_path):
    """By the option, for a run trained without; a run's own setting can be put off."""
    given = ("--quantize", way)
    document = json.loads(measure("--json", *given)[1])
    assert document["quantize"] == way
    (found,), (usual,) = (d["sets"].values() for d in (document, json.loads(measure("--json")[1])))
    assert found["lm_loss"] == pytest.approx(usual["lm_loss"], rel=0.3)
    assert found["lm_loss"] != usual["lm_loss"]
    assert f"\nproducts    {way}\n" in measure(*given)[1]
    assert "products" not in measure()[1]
    own = save_run(tmp_path / "own", data=run.parent, changes={"quantize": way})
    assert load_model(own)[0].config.quantize == way
    assert load_model(own, quantize="none")[0].config.quantize == "none"
    assert measure("--quantize", "int4")[0] == 2
    with pytest.raises(ValueError, match="^quantize must be one of none, int8, fp8, got 'int4'"):
        load_model(own, quantize="int4")


def test_run_folders_and_pointers(measure, run):
    (run / "best").write_text("step_5\n")
    for path, step in ((run / "best", 5), (run / "last", 7), (run / "step_5", 5)):
        assert json.loads(measure("--json", model=path)[1])["step"] == step


def test_batch_size_does_not_change_the_document(measure):
    documents = [measure("--json", "--batch-size", size)[1] for size in (1, 3, 9, 300)]
    first = json.loads(documents[0])["sets"]["all"]
    for other in documents[1:]:
        report = json.loads(other)["sets"]["all"]
        assert all(report[key] == pytest.approx(value, rel=1e-6) for key, value in first.items())


def test_other_data_and_several_directories(measure, tmp_path):
    sets = [(boards(4, seed=s), boards(4, seed=s + 10)) for s in (3, 4)]
    roots = [write_data(tmp_path / str(i), *pair) for i, pair in enumerate(sets)]
    _, out, _ = measure("--json", "--data", roots[1])
    check(json.loads(out), expected(107, *sets[1]))
    _, out, _ = measure("--json", "--data", roots[0], "--data", roots[1], "--max-puzzles", "3")
    document = json.loads(out)
    assert document["data"] == list(map(str, roots))
    assert list(document["sets"]) == ["all", "all1"]
    for report, pair in zip(document["sets"].values(), sets, strict=True):
        assert report["accuracy"] == pytest.approx(expected(107, *pair, most=3)["accuracy"])
    _, out, _ = measure("--data", roots[0], "--data", roots[1])
    assert f"\nset all of {roots[0]}: 4 boards" in out and f"\nset all1 of {roots[1]}: 4 b" in out


def test_another_split(measure, tmp_path):
    inputs, labels = boards(2, seed=5), boards(2, seed=6)
    metadata, arrays = from_arrays(inputs, labels, vocab_size=6, ignore_label_id=0)
    write_dataset(tmp_path / "d", {"train": (metadata, {"all": arrays})})
    _, out, _ = measure("--json", "--data", tmp_path / "d", "--split", "train")
    check(json.loads(out), expected(107, inputs, labels))
    status, _, err = measure("--data", tmp_path / "d")
    assert status == 4
    assert err == f"trm-fast evaluate: {tmp_path / 'd'}: no split 'test'; it has train\n"


def test_the_test_data_of_the_run_goes_before_its_training_data(measure, tmp_path, data):
    other = write_data(tmp_path / "other", boards(2, seed=5), boards(2, seed=6))
    asked = {"data_paths_test": [str(other)]}
    for run in (
        save_run(tmp_path / "used", data=data[0], test_data=other),
        save_run(tmp_path / "asked", data=data[0], train=asked),
    ):
        assert json.loads(measure("--json", model=run)[1])["data"] == [str(other)]


def test_eval_steps_max_and_loss_type_of_the_run(measure, tmp_path, data):
    arch = {"loss_type": "softmax_cross_entropy"}
    run = save_run(tmp_path / "a", data=data[0], train={"eval_steps_max": 2, "arch": arch})
    plain = save_run(tmp_path / "b", data=data[0])
    ours = json.loads(measure("--json", model=run)[1])
    theirs = json.loads(measure("--json", "--steps", "2", model=plain)[1])
    assert ours["supervision_steps"] == 2
    assert ours["sets"]["all"]["accuracy"] == theirs["sets"]["all"]["accuracy"]
    assert ours["sets"]["all"]["lm_loss"] != pytest.approx(theirs["sets"]["all"]["lm_loss"])


def test_the_text_says_what_the_document_says(measure, data, run):
    want = expected(107, *data[1:])
    status, out, err = measure()
    assert (status, err) == (0, "")
    assert "\x1b" not in out
    lines = out.splitlines()
    assert lines[:3] == [
        f"checkpoint  {run / 'step_7'}",
        "weights     moving average (ema), optimizer step 7",
        f"data        {data[0]} (test split)",
    ]
    assert lines[4] == "set all: 9 boards, 3 supervision steps"
    rows = {line[:16].strip(): line[16:].split() for line in lines[5:11]}
    last = {key: f"{100 * want[key][-1]:.2f}" for key in ("accuracy", "exact_accuracy", "valid")}
    assert rows[""] == ["last", "step", "highest", "q"]
    assert rows["cell accuracy"] == [
        last["accuracy"], "%", f"{100 * want['best_q_accuracy']:.2f}", "%",
    ]  # fmt: skip
    assert rows["exact"] == [
        last["exact_accuracy"], "%", f"{100 * want['best_q_exact_accuracy']:.2f}", "%",
    ]  # fmt: skip
    assert rows["valid"] == [last["valid"], "%", f"{100 * want['best_q_valid']:.2f}", "%"]
    assert rows["q accuracy"] == [f"{100 * want['q_halt_accuracy'][-1]:.2f}", "%"]
    assert rows["step"][:2] == ["3", f"{want['best_q_steps']:.1f}"]
    table = [line.replace("%", "").split() for line in lines[12:]]
    assert table[0] == ["step", "cell", "exact", "valid", "q"]
    for m, row in enumerate(table[1:]):
        columns = ("accuracy", "exact_accuracy", "valid", "q_halt_accuracy")
        assert row == [str(m + 1), *(f"{100 * want[key][m]:.2f}" for key in columns)]
    assert len(table) == 1 + DEPTH


def test_no_valid_column_where_no_rules_are_known(measure, tmp_path):
    changes = {"seq_len": 10, "vocab_size": 9}
    inputs, labels = boards(3, cells=10, vocab=9), boards(3, seed=1, cells=10, vocab=9)
    root = write_data(tmp_path / "d", inputs, labels, vocab=9)
    run = save_run(tmp_path / "run", data=root, changes=changes)
    document = json.loads(measure("--json", model=run)[1])
    assert document["sets"]["all"]["valid"] == []
    assert document["sets"]["all"]["best_q_valid"] is None
    table = measure(model=run)[1].partition("set all")[2]
    assert "exact" in table
    assert "valid" not in table


CSV_FORMS = {
    "source,question,answer,rating": lambda q, a: f"x,{q},{a},0",
    "quizzes,solutions": lambda q, a: f"{q.replace('.', '0')},{a}",
}


@pytest.mark.parametrize("header", list(CSV_FORMS))
def test_csv_in_both_dialects(measure, tmp_path, header):
    pairs = [(CLUES, SOLVED), (BLANK, TURNED), ("." * 15 + "1", SOLVED)]
    file = tmp_path / "boards.csv"
    file.write_text("\n".join([header, *(CSV_FORMS[header](*pair) for pair in pairs)]) + "\n")
    status, out, err = measure("--json", "--csv", file)
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert document["data"] == [str(file)]
    assert document["split"] is None
    check(document, expected(107, tokens(*(q for q, _ in pairs)), tokens(*(a for _, a in pairs))))
    assert f"data        {file}\n" in measure("--csv", file)[1]


def test_bare_lines_get_their_labels_from_the_solver(measure, tmp_path):
    puzzles = [SOLVED[:7] + "....." + SOLVED[12:], "." + SOLVED[1:]]
    file = tmp_path / "boards.txt"
    file.write_text("\n".join(puzzles) + "\n")
    _, out, _ = measure("--json", "--csv", file)
    check(json.loads(out), expected(107, tokens(*puzzles), tokens(SOLVED, SOLVED)))


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--jsno",), 2, "unrecognized arguments: --jsno (did you mean '--json'?); see --help"),
        (("--max-puzzles", "0"), 2, "argument --max-puzzles: '0' is not a whole number from 1 to"),
        (("--steps", "-1"), 2, "argument --depth/--steps: '-1' is not a whole number from 1 to"),
        (("--batch-size", "x"), 2, "argument --batch-size: 'x' is not a whole number from 1 to"),
        (("--weights", "both"), 2, "argument --weights: invalid choice: 'both'"),
        (("--device", "tpu"), 2, "device must be auto, cpu, cuda, cuda:N or mps, got 'tpu'"),
        (("--data", "a", "--csv", "b"), 2, "argument --csv: not allowed with argument --data"),
        (("--csv", "b", "--split", "test"), 2, "--split is for data directories, --csv has no"),
        (("--data", "nowhere"), 2, "nowhere: no such data directory"),
        (("--csv", "nowhere"), 2, "nowhere: no such file"),
    ],
)
def test_errors_of_the_command_line(measure, arguments, status, said):
    got, out, err = measure(*arguments)
    assert (got, out) == (status, "")
    assert err.startswith(f"trm-fast evaluate: {said}")
    assert err.count("\n") == 1


def test_no_checkpoint_named(capsys):
    assert command.main([]) == 2
    err = capsys.readouterr().err
    assert err == (
        "trm-fast evaluate: the following arguments are required: CHECKPOINT; see --help\n"
    )


def test_the_data_of_the_run_is_gone(measure, tmp_path):
    run = save_run(tmp_path / "run", data=tmp_path / "gone")
    status, _, err = measure(model=run)
    assert status == 2
    assert err == (
        f"trm-fast evaluate: {tmp_path / 'gone'}: no such data directory "
        "(the run's own data; --data DIR or --csv FILE names other)\n"
    )


def test_a_run_without_data(measure, tmp_path):
    status, _, err = measure(model=save_run(tmp_path / "run"))
    assert status == 2
    assert err == "trm-fast evaluate: the run names no data: give --data DIR or --csv FILE\n"


def test_a_missing_checkpoint_is_status_3(measure, tmp_path):
    status, out, err = measure(model=tmp_path / "nowhere")
    assert (status, out) == (3, "")
    assert err == f"trm-fast evaluate: {tmp_path / 'nowhere'}: no such checkpoint\n"


def test_damaged_data_is_status_4(measure, tmp_path):
    root = write_data(tmp_path / "d", boards(3), boards(3, seed=1))
    (root / "test" / "all__labels.npy").write_bytes(b"nothing")
    status, out, err = measure("--data", root)
    assert (status, out) == (4, "")
    assert err.startswith(f"trm-fast evaluate: {root / 'test' / 'all__labels.npy'}: not a readable")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            f"question,answer\n{CLUES},{SOLVED}\n{BLANK},{SOLVED[:-1]}2\n",
            "row 3: the answer breaks the rules",
        ),
        (f"question,answer\nx{CLUES[1:]},{SOLVED}\n", "row 2: character 'x', expected a digit 1-4"),
        (f"question,answer\n11{BLANK[2:]},{SOLVED}\n", "row 2: clues clash"),
        (f"{SOLVED}\n{CLUES}\n", "row 2: several solutions"),
    ],
    ids=["answer", "character", "clash", "several-solutions"],
)
def test_faults_in_a_csv_are_status_4_and_name_the_row(measure, tmp_path, content, said):
    file = tmp_path / "boards.csv"
    file.write_text(content)
    status, out, err = measure("--csv", file)
    assert (status, out) == (4, "")
    assert err.startswith(f"trm-fast evaluate: {file} {said}")
    assert err.count("\n") == 1


def test_data_without_labels_is_status_4(measure, tmp_path):
    root = write_data(tmp_path / "d", boards(3), np.zeros((3, CELLS), np.uint8))
    status, _, err = measure("--data", root)
    assert status == 4
    assert err == f"trm-fast evaluate: {root}: no labelled boards in set all\n"


@pytest.mark.parametrize(
    ("cells", "vocab", "identifiers", "said"),
    [
        (36, 8, 1, "36 tokens per board, the model has 16"),
        (16, 7, 1, "7 token values, the model has 6"),
        (16, 6, 4, "4 puzzle identifiers, the model has 3"),
    ],
)
def test_data_unlike_the_model_is_status_5(measure, tmp_path, cells, vocab, identifiers, said):
    inputs = boards(2, cells=cells, vocab=6)
    ids = np.array([0, identifiers - 1])
    metadata, arrays = from_arrays(inputs, inputs, vocab_size=vocab, puzzle_identifiers=ids)
    write_dataset(tmp_path / "d", {"test": (metadata, {"all": arrays})})
    changes = {"puzzle_emb_ndim": 16, "puzzle_emb_len": 1, "num_puzzle_identifiers": 3}
    run = save_run(tmp_path / "run", changes=changes)
    status, out, err = measure("--data", tmp_path / "d", model=run)
    assert (status, out) == (5, "")
    assert err == f"trm-fast evaluate: {tmp_path / 'd'}: {said}\n"


def test_identifiers_do_not_matter_without_puzzle_rows(measure, tmp_path):
    inputs = boards(2)
    metadata, arrays = from_arrays(
        inputs, inputs, vocab_size=6, puzzle_identifiers=np.array([0, 8])
    )
    write_dataset(tmp_path / "d", {"test": (metadata, {"all": arrays})})
    assert measure("--data", tmp_path / "d")[0] == 0


def test_a_csv_of_another_size_is_status_5(measure, tmp_path):
    file = tmp_path / "boards.csv"
    six = "123456456123231564564231312645645312"
    file.write_text(f"question,answer\n{six},{six}\n")
    status, _, err = measure("--csv", file)
    assert status == 5
    assert err == f"trm-fast evaluate: {file}: 36 tokens per board, the model has 16\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_is_told_how_far_it_is(measure, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now.append(now[-1] + 1) or now[-1])
    for arguments, said in (
        (("--batch-size", "4"), "4 of at most 9 boards"),
        (("--batch-size", "4", "--max-puzzles", "6"), "4 of at most 6 boards"),
        (("--rollouts", "2", "--depth", "3", "--batch-size", "4"), "16 of at most 54 passes"),
    ):
        screen = Terminal()
        monkeypatch.setattr(sys, "stderr", screen)
        status, out, _ = measure(*arguments)
        text = screen.getvalue()
        assert status == 0 and f"\r\033[K{said}" in text and text.endswith("\r\033[K")
        assert "passes\r" not in out and "boards\r" not in out
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    measure("--batch-size", "4")
    assert sys.stderr.getvalue() == "", "what is no terminal is told nothing"


def test_a_data_set_is_no_checkpoint(measure, data):
    status, out, err = measure(model=data[0])
    said = f"trm-fast evaluate: {data[0]}: is a data set, not a checkpoint\n"
    assert (status, out, err) == (3, "", said)


def test_threads_are_those_asked_for(measure):
    before = torch.get_num_threads()
    try:
        assert measure("--threads", "1")[0] == 0 and torch.get_num_threads() == 1
        status, out, err = measure("--threads", "0")
        assert (status, out) == (2, "") and err.startswith("trm-fast evaluate: argument --threads")
    finally:
        torch.set_num_threads(before)
