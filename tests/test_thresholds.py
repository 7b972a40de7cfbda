"""The q threshold: the fit against a plain loop, its file, and its way with the model."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from answering import SOLVED, boards, save_run, tiny_model, write_data
from test_foreign import nano_document

from trm_fast import Model, convert, evaluate, evaluate_rollouts
from trm_fast.inference import supervision_steps
from trm_fast.loading import load
from trm_fast.pretrained import build, read_saved
from trm_fast.thresholds import (
    FILE,
    Candidate,
    Fit,
    beside,
    digest_of,
    fit_threshold,
    keep_threshold,
    kept_threshold,
    said_of,
)

MODEL = tiny_model()
GRID = [quarter * 0.25 for quarter in range(-32, 65)]


def restarts(q, right, threshold):
    """(answered, accuracy of those, exact, passes): each puzzle's rollouts one after another."""
    answered, hits, exact, passes = 0, 0, 0, 0
    for puzzle in range(len(q)):
        best, found, steps = (-math.inf, False), None, 0
        for rollout in range(len(q[puzzle])):
            for step in range(len(q[puzzle][rollout])):
                if found is not None:
                    continue
                steps += 1
                now = (float(q[puzzle][rollout][step]), bool(right[puzzle][rollout][step]))
                best = now if now[0] > best[0] else best
                found = now[1] if now[0] > threshold else None
        answered += found is not None
        hits += bool(found)
        exact += best[1] if found is None else found
        passes += steps
    n = len(q)
    return answered / n, hits / answered if answered else None, exact / n, passes / n


def recorded(puzzles=40, seed=0):
    """q that says something of being right, and much noise."""
    rng = np.random.default_rng(seed)
    right = rng.random((puzzles, 3, 4)) < 0.4
    q = np.where(right, 3.0, -1.0) + rng.normal(0, 2.0, right.shape)
    q[0] = -9.0  # below the grid
    return torch.from_numpy(q.astype(np.float32)), torch.from_numpy(right)


@pytest.mark.parametrize("target", [0.5, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_fit_is_a_plain_loop(seed, target):
    q, right = recorded(seed=seed)
    fit = fit_threshold(q, right, target)
    told = {t: restarts(q.tolist(), right.tolist(), t) for t in GRID}
    told = {t: found for t, found in told.items() if found[0]}
    assert [c.threshold for c in fit.candidates] == list(told)
    for c, want in zip(fit.candidates, told.values(), strict=True):
        assert (c.answered, c.accuracy, c.exact, c.passes) == pytest.approx(want)
    reach = [t for t, found in told.items() if found[1] >= target]
    most = max(found[1] for found in told.values())
    want = reach[0] if reach else min(t for t, found in told.items() if found[1] == most)
    assert (fit.chosen.threshold, fit.reached) == (want, bool(reach))
    assert fit.chosen in fit.candidates
    assert (fit.target, fit.puzzles) == (target, 40)


def test_the_case_tells_thresholds_apart():
    q, right = recorded()
    chosen = [fit_threshold(q, right, target).chosen.threshold for target in (0.5, 0.9, 1.0)]
    assert chosen[0] < chosen[1] < chosen[2]
    lowest = fit_threshold(q, right, 0.5).candidates[0]
    assert lowest.answered < 1 < lowest.passes


def test_where_none_reaches_the_target_the_most_accurate_is_taken():
    q = torch.tensor([[[0.1, 5.1]], [[0.1, 5.1]], [[0.1, 0.2]], [[-20.0, 5.1]]])
    right = torch.tensor([[[False, True]], [[True, False]], [[False, False]], [[False, True]]])
    fit = fit_threshold(q, right, 0.99)
    # Up to 0: two of four. From 0.25: of three answers two, whatever the threshold.
    assert not fit.reached
    assert (fit.chosen.threshold, fit.chosen.accuracy) == (0.25, pytest.approx(2 / 3))
    assert (fit.chosen.answered, fit.chosen.passes) == (0.75, 2.0)
    assert fit.candidates[-1].threshold == 5.0
    assert said_of(fit) == {
        "threshold": 0.25,
        "answered": 0.75,
        "accuracy": pytest.approx(2 / 3),
        "exact": 0.5,
        "passes": 2.0,
        "target": 0.99,
        "puzzles": 4,
    }


@pytest.mark.parametrize(
    ("q", "target", "said"),
    [
        (torch.zeros(0, 1, 1), 0.9, "there is nothing to fit a threshold to"),
        (torch.full((2, 1, 1), -8.0), 0.9, "no answer has a q above -8.0: there is nothing to be"),
        (torch.full((2, 1, 1), -torch.inf), 0.9, "no answer has a q above -8.0"),
        (torch.zeros(1, 1, 1), 0.0, r"accuracy to be reached must be in \(0, 1\], got 0.0"),
        (torch.zeros(1, 1, 1), 1.5, r"must be in \(0, 1\], got 1.5"),
        (torch.zeros(1, 1, 1), math.nan, r"must be in \(0, 1\], got nan"),
    ],
)
def test_what_cannot_be_fitted(q, target, said):
    with pytest.raises(ValueError, match=said) as caught:
        fit_threshold(q, torch.ones(q.shape, dtype=torch.bool), target)
    assert "\n" not in str(caught.value)


def test_what_is_kept_is_read_and_others_stay(tmp_path):
    path = tmp_path / "run" / FILE
    assert kept_threshold(path, 7, "ema", MODEL) == (None, None)
    keep_threshold(path, 7, "ema", MODEL, {"threshold": 2.5, "target": 0.99})
    keep_threshold(path, 7, "raw", MODEL, {"threshold": -3})
    keep_threshold(path, 9, "ema", MODEL, {"threshold": 1.25})
    keep_threshold(path, 9, "ema", MODEL, {"threshold": 0.0})
    assert kept_threshold(path, 7, "ema", MODEL) == (2.5, None)
    assert kept_threshold(path, 7, "raw", MODEL) == (-3.0, None)
    assert kept_threshold(path, 9, "ema", MODEL) == (0.0, None)
    assert (
        kept_threshold(path, 9, "raw", MODEL)
        == kept_threshold(path, 8, "ema", MODEL)
        == (None, None)
    )
    assert json.loads(path.read_text())["ema@7"] == {
        "threshold": 2.5,
        "target": 0.99,
        "digest": digest_of(MODEL),
    }
    assert [p.name for p in path.parent.iterdir()] == [FILE]


def test_a_threshold_of_other_weights_is_left_aside(tmp_path):
    """Of the same step in the same place: another run, or a file that was replaced."""
    path, other = tmp_path / FILE, tiny_model(1)
    keep_threshold(path, 7, "ema", other, {"threshold": 2.5})
    said = f"{path}: is left aside: ema@7 is of other weights; evaluate --calibrate fits it anew"
    assert kept_threshold(path, 7, "ema", MODEL) == (None, said)
    assert kept_threshold(path, 7, "ema", other) == kept_threshold(path, 7, "ema", tiny_model(1))
    assert kept_threshold(path, 7, "ema", other) == (2.5, None)
    path.write_text('{"ema@7": {"threshold": 2.5}}')  # as written before there were digests
    said = f"{path}: is left aside: ema@7 does not say its weights; evaluate --calibrate fits it"
    assert kept_threshold(path, 7, "ema", MODEL) == (None, f"{said} anew")


def test_products_of_8_bits_have_a_threshold_of_their_own(tmp_path):
    path = tmp_path / FILE
    coarse = tiny_model(quantize="int8")
    assert digest_of(coarse) == digest_of(MODEL)
    keep_threshold(path, 7, "ema", MODEL, {"threshold": 2.5})
    assert kept_threshold(path, 7, "ema", coarse) == (None, None)
    keep_threshold(path, 7, "ema", coarse, {"threshold": 3.5})
    assert kept_threshold(path, 7, "ema", coarse) == (3.5, None)
    assert kept_threshold(path, 7, "ema", MODEL) == (2.5, None)
    assert set(json.loads(path.read_text())) == {"ema@7", "ema@7 int8"}


@torch.no_grad()
def test_every_weight_counts_in_the_digest_but_no_puzzle_row():
    model = tiny_model(forward_dtype="bfloat16", latents=2)
    before = digest_of(model)
    assert before == digest_of(tiny_model(forward_dtype="bfloat16", latents=2))
    seen = {before}
    for name, value in model.state_dict().items():
        value.view(-1)[-1] += 1
        changed = digest_of(model)
        assert (changed in seen) is name.startswith("inner.puzzle_emb."), name
        seen.add(changed)
    assert len(seen) > 10


NOT_FILES = {
    "empty": "",
    "no-json": "threshold = 3",
    "cut": '{"ema@7": {"thresh',
    "list": '[{"threshold": 3}]',
    "number": "3",
    "deep": "[" * 100_000,
    "deep-inside": '{"ema@7": ' + "[" * 5000 + "]" * 5000 + "}",
    "long-digits": '{"ema@7": {"threshold": ' + "9" * 5000 + "}}",
    "no-utf-8": b"\xff\xfe{}",
}
NOT_THRESHOLDS = [
    "NaN",
    "Infinity",
    "-Infinity",
    '"3"',
    "null",
    "true",
    "[]",
    "{}",
    "1" + "0" * 400,
]


@pytest.mark.parametrize("content", NOT_FILES.values(), ids=NOT_FILES)
def test_a_hostile_file_is_left_aside_in_one_line(tmp_path, content):
    path = tmp_path / FILE
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    value, said = kept_threshold(path, 7, "ema", MODEL)
    assert value is None
    assert said.startswith(f"{path}: is left aside: ")
    assert "\n" not in said and len(said) < len(str(path)) + 250
    # A threshold that is fitted anew takes its place.
    keep_threshold(path, 7, "ema", MODEL, {"threshold": 1.5})
    assert kept_threshold(path, 7, "ema", MODEL) == (1.5, None)


@pytest.mark.parametrize("value", NOT_THRESHOLDS)
def test_what_is_no_threshold_is_none(tmp_path, value):
    path = tmp_path / FILE
    path.write_text('{"ema@7": {"threshold": ' + value + '}, "raw@7": [1], "raw@8": {}}')
    said = f"{path}: is left aside: no threshold in it"
    assert kept_threshold(path, 7, "ema", MODEL) == (None, said)
    assert (
        kept_threshold(path, 7, "raw", MODEL)
        == kept_threshold(path, 8, "raw", MODEL)
        == (None, said)
    )
    assert kept_threshold(path, 8, "ema", MODEL) == (None, None)


@pytest.mark.parametrize("depth", [300, 900, 980, 5000])
def test_what_somebody_nested_in_it_does_not_stop_a_new_one(tmp_path, depth):
    path = tmp_path / FILE
    path.write_text('{"x": ' + "[" * depth + "]" * depth + "}")
    keep_threshold(path, 7, "ema", MODEL, {"threshold": 1.5})
    assert kept_threshold(path, 7, "ema", MODEL) == (1.5, None)


def test_a_folder_in_its_place_is_one_line(tmp_path):
    (tmp_path / FILE).mkdir()
    value, said = kept_threshold(tmp_path / FILE, 7, "ema", MODEL)
    assert value is None and "Is a directory" in said and "\n" not in said
    with pytest.raises(ValueError, match="cannot be written: Is a directory"):
        keep_threshold(tmp_path / FILE, 7, "ema", MODEL, {"threshold": 1.0})
    model = tiny_model()
    with pytest.raises(ValueError, match=f"{FILE}: cannot be written: Is a directory"):
        model.save_pretrained(tmp_path)


# With the model


@pytest.fixture
def run(tmp_path):
    """A run whose boards are labelled by its own answers to every second one."""
    inputs = boards(8)
    labels = boards(8, seed=1)
    given = torch.from_numpy(inputs.astype(np.int64))
    answers = tiny_model(107).predict(given, select="last").tokens.numpy()
    labels[::2] = answers[::2]
    data = write_data(tmp_path / "data", inputs, labels)
    return save_run(tmp_path / "run", steps=(5, 7), data=data)


def fitted(run, capsys, *arguments):
    status = evaluate.main([str(run), "--calibrate", "0.05", "--rollouts", "2", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_fit_of_the_command_is_that_of_its_steps(run, tmp_path, capsys):
    status, out, err = fitted(run, capsys, "--depth", "3")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == (
        f"q threshold fitted on 8 boards of {tmp_path / 'data'}: 2 rollouts of 3 steps one after "
        "another"
    )
    assert f"  kept in {run / FILE}" in lines
    kept = json.loads((run / FILE).read_text())["ema@7"]
    assert {k: kept[k] for k in ("rollouts", "depth", "by", "target", "puzzles")} == {
        "rollouts": 2,
        "depth": 3,
        "by": "symmetry",
        "target": 0.05,
        "puzzles": 8,
    }
    assert kept["data"] == [str(tmp_path / "data")]
    (row,) = (line for line in lines if line.endswith("<- chosen"))
    assert row.split() == [
        f"{kept['threshold']:.2f}", f"{100 * kept['answered']:.2f}", "%",
        f"{100 * kept['accuracy']:.2f}", "%", f"{100 * kept['exact']:.2f}", "%",
        f"{kept['passes']:.1f}", "<-", "chosen",
    ]  # fmt: skip
    # q of every step of the first rollout, which sees the board as it is.
    inputs = torch.from_numpy(boards(8).astype(np.int32))
    batch = {"inputs": inputs, "puzzle_identifiers": torch.zeros(8, dtype=torch.int32)}
    labels = np.load(tmp_path / "data" / "test" / "all__labels.npy")
    q, right = [], []
    for out in supervision_steps(tiny_model(107), batch, 3):
        tokens = np.where(inputs.numpy() > 1, inputs.numpy(), out.preds.numpy())
        q.append(out.q.tolist())
        right.append((tokens == labels).all(-1).tolist())
    _, said, _ = fitted(run, capsys, "--rollouts", "1", "--json")
    one = json.loads((run / FILE).read_text())["ema@7"]
    by_board = [[[step[i] for step in q]] for i in range(8)]
    hits = [[[step[i] for step in right]] for i in range(8)]
    want = restarts(by_board, hits, one["threshold"])
    assert (one["answered"], one["accuracy"], one["exact"], one["passes"]) == pytest.approx(want)
    assert json.loads(said)["reasoning"]["threshold"] == one["threshold"]


def test_it_travels_with_the_model(run, tmp_path, capsys):
    assert load(run).model.q_threshold is None
    assert fitted(run, capsys)[0] == 0
    value = json.loads((run / FILE).read_text())["ema@7"]["threshold"]
    for source in (run, run / "last", run / "step_7"):
        assert load(source).model.q_threshold == value
        assert Model.from_pretrained(source).q_threshold == value
    assert Model.from_pretrained(run, weights="raw").q_threshold is None
    assert Model.from_pretrained(run / "step_5").q_threshold is None

    model = Model.from_pretrained(run)
    folder = model.save_pretrained(tmp_path / "mine", step=3)
    assert Model.from_pretrained(folder).q_threshold == value
    named = model.save_pretrained(tmp_path / "step_7")  # as step folders are called
    assert Model.from_pretrained(named).q_threshold == value
    for to in ("pretrained", "trm_fast"):
        target = tmp_path / to
        assert convert.main([str(run), str(target), "--to", to]) == 0
        assert Model.from_pretrained(target).q_threshold == value
    assert convert.main([str(run), str(tmp_path / "r"), "--ema"]) == 0
    assert Model.from_pretrained(tmp_path / "r").q_threshold == value
    assert convert.main([str(run), str(tmp_path / "w"), "--raw"]) == 0
    assert Model.from_pretrained(tmp_path / "w").q_threshold is None

    # Saved again without one, the file of the other weights goes.
    model.q_threshold = None
    model.save_pretrained(folder, step=3)
    assert not (folder / FILE).exists()
    assert Model.from_pretrained(folder).q_threshold is None


def test_a_run_trained_anew_in_its_folder_has_none(run, capsys):
    assert fitted(run, capsys)[0] == 0
    save_run(run, steps=(7,), seed=1)
    assert evaluate.main([str(run), "--data", str(run.parent / "data"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["q_threshold"] is None
    why = "ema@7 is of other weights; evaluate --calibrate fits it anew"
    assert err == f"note: {run / FILE}: is left aside: {why}\n"


def test_the_products_that_are_asked_for_choose_it(run, tmp_path):
    coarse = load(run, quantize="int8").model
    keep_threshold(run / FILE, 7, "ema", coarse, {"threshold": 3.5})
    assert load(run).model.q_threshold is None
    coarse = load(run, quantize="int8").model
    assert coarse.q_threshold == 3.5
    folder = coarse.save_pretrained(tmp_path / "mine")
    assert Model.from_pretrained(folder).q_threshold == 3.5
    assert load(folder, quantize="none").model.q_threshold is None


def test_it_is_what_predict_trusts(run, capsys):
    keep_threshold(run / FILE, 7, "ema", tiny_model(107), {"threshold": -50.0})
    model = Model.from_pretrained(run)
    inputs = torch.from_numpy(boards(4).astype(np.int64))
    settings = {"select": "first-q", "rollouts": 3}
    assert model.predict(inputs, **settings).step.tolist() == [1] * 4
    assert model.predict(inputs, threshold=50.0, **settings).passes.tolist() == [9] * 4
    keep_threshold(run / FILE, 7, "ema", tiny_model(107), {"threshold": 50.0})
    assert Model.from_pretrained(run).predict(inputs, **settings).passes.tolist() == [9] * 4


def test_a_damaged_file_beside_a_run_is_a_note(run, capsys):
    (run / FILE).write_text("{")
    saved = read_saved(run)
    assert build(saved)[0].q_threshold is None
    (note,) = saved.notes
    assert note.startswith(f"{run / FILE}: is left aside: ")
    assert evaluate.main([str(run), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == f"note: {note}\n" and json.loads(out)["step"] == 7


def test_none_reached_is_said(run, capsys):
    other = write_data(run.parent / "other", boards(4), boards(4, seed=9))
    status, out, err = fitted(run, capsys, "--data", str(other))
    assert status == 2 and "<- chosen" not in out
    assert err == (
        "trm-fast evaluate: no threshold makes 5.0% of the answers above it right, the best one "
        "0.0%: nothing is kept\n"
    )
    assert not (run / FILE).exists()


SURE = Candidate(1.5, 1.0, 1.0, 1.0, 2.0)


def test_too_few_answers_are_refused(run, capsys, monkeypatch):
    monkeypatch.setattr(evaluate_rollouts, "fit_threshold", lambda *_: Fit(SURE, True, 0.99, (), 8))
    status, _, err = fitted(run, capsys)
    assert status == 2
    assert err == (
        "trm-fast evaluate: 8 answers above the threshold are too few to tell 99.0% by, 100 are "
        "needed: nothing is kept\n"
    )
    assert not (run / FILE).exists()


def test_the_models_of_the_package_keep_theirs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate_rollouts, "fit_threshold", lambda *_: Fit(SURE, True, 0.05, (), 9))
    place = Path(evaluate_rollouts.__file__).with_name("shipped") / FILE
    before = place.read_text()
    line = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"
    (tmp_path / "b.csv").write_text(f"{line}\n")
    given = ("--csv", str(tmp_path / "b.csv"), "--depth", "1")
    status, _, err = fitted("shipped", capsys, *given)
    assert status == 0 and place.read_text() == before
    assert err == f"not kept: {place.parent} is the package's own; give --threshold 1.5\n"


def test_a_file_of_another_project_keeps_none(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate_rollouts, "fit_threshold", lambda *_: Fit(SURE, True, 0.05, (), 9))
    file = tmp_path / "last.ckpt"
    torch.save(nano_document(sudoku=True), file)
    (tmp_path / "b.csv").write_text(f"quizzes,solutions\n1{'0' * 15},{SOLVED}\n")
    before = sorted(p.name for p in tmp_path.iterdir())
    status, _, err = fitted(file, capsys, "--csv", str(tmp_path / "b.csv"), "--depth", "2")
    assert status == 0
    *_, last = err.splitlines()
    assert last == f"not kept: {file} is one file; give --threshold 1.5"
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert beside(file) is None


def test_where_it_cannot_be_written_is_one_line(run, capsys, monkeypatch):
    def refuse(path, text, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    status, _, err = fitted(run, capsys)
    assert (status, err) == (
        3,
        f"trm-fast evaluate: {run / FILE}: cannot be written: Permission denied\n",
    )
    assert not (run / FILE).exists()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("0", "--calibrate must be above 0, got 0"),
        ("2", "argument --calibrate: '2' is not a number from 0 to 1; see --help"),
        ("nan", "argument --calibrate: 'nan' is not a number from 0 to 1; see --help"),
        ("x", "argument --calibrate: 'x' is not a number from 0 to 1; see --help"),
    ],
)
def test_targets_that_are_none(run, capsys, monkeypatch, value, said):
    monkeypatch.setattr("trm_fast.evaluate_rollouts.traces", lambda *a: pytest.fail("worked"))
    status = evaluate.main([str(run), "--calibrate", value])
    assert (status, *capsys.readouterr()) == (2, "", f"trm-fast evaluate: {said}\n")
