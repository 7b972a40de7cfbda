"""evaluate with rollouts: the report as text and JSON, pictures, refusals. What is expected is
counted by hand over what `predict` answers."""

import json
import struct
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from answering import CELLS, SOLVED, boards, save_run, tiny_model, write_data
from foreign_models import s4nj1th_weights

from trm_fast import evaluate, rollouts, solve
from trm_fast.inference import supervision_steps
from trm_fast.rules import sudoku_rules
from trm_fast.thresholds import FILE, keep_threshold

NINE = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
SMALL = ("--rollouts", "4", "--depth", "2")


def blanked(count, seed=0):
    """Boards of a few clues."""
    keep = np.random.default_rng(seed).random((count, CELLS)) < 0.2
    return np.where(keep, boards(count, seed=seed), 1).astype(np.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """9 boards; some labelled by what the EMA weights say; two not everywhere."""
    inputs, labels = blanked(9), boards(9, seed=1)
    asked, model = torch.from_numpy(inputs).int(), tiny_model(107)
    for places, preset in (([0, 1], "vote"), ([2, 3, 4], "ptrm"), ([6], "eqr")):
        answers = model.predict(asked, reasoning=preset, rollouts=4, depth=2)
        labels[places] = answers.tokens.numpy()[places]
    labels[1, 3:] = labels[3, 5:] = 0
    labels[5] = np.array([int(c) for c in SOLVED]) + 1
    return write_data(tmp_path_factory.mktemp("data") / "set", inputs, labels), inputs, labels


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    return save_run(tmp_path_factory.mktemp("runs") / "tiny", data=data[0])


@pytest.fixture
def measure(run, capsys):
    """measure(*arguments, model=run) -> (status, stdout, stderr)."""

    def call(*arguments, model=run):
        status = evaluate.main([str(model), *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def counted(answers, inputs, labels):
    """The part of a report that follows from the answers alone."""
    tokens, kept = answers.tokens.numpy(), labels != 0
    same = (tokens == labels) & kept
    sure = answers.confidence.double().numpy()
    exact = same.sum(1) == kept.sum(1)
    return {
        "puzzles": len(labels),
        "exact": exact.mean(),
        "cell": (same.sum(1) / kept.sum(1)).mean(),
        "valid": sudoku_rules(inputs, tokens).mean(),
        "passes": answers.passes.double().mean().item(),
        "passes_max": answers.passes.max().item(),
    }, [(float((sure >= c).mean()), exact[sure >= c]) for c in (0.5, 0.75)]


PRESETS = {
    "restarts": {"threshold": 0.5},
    "vote": {},
    "ptrm": {},
    "eqr": {},
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_what_predict_answers(measure, data, preset):
    root, inputs, labels = data
    settings = PRESETS[preset]
    more = [f"--{name}={value}" for name, value in settings.items()]
    status, out, err = measure("--preset", preset, *SMALL, *more, "--abstain", "0.75", "--json")
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert document["supervision_steps"] == 2 and document["data"] == [str(root)]
    plan = document["reasoning"]
    assert (plan["rollouts"], plan["depth"]) == (4, 2)
    by = {"restarts": "symmetry", "vote": "symmetry", "ptrm": "noise", "eqr": "init"}
    select = {"restarts": "first-q", "vote": "mode", "ptrm": "q", "eqr": "residual"}
    assert (plan["by"], plan["select"]) == (by[preset], select[preset])
    (report,) = document["sets"].values()
    model = tiny_model(107)
    answers = model.predict(
        torch.from_numpy(inputs).int(), reasoning=preset, rollouts=4, depth=2, **settings
    )
    want, risks = counted(answers, inputs, labels)
    assert {key: report[key] for key in want} == pytest.approx(want)
    # Both curves end at the whole; a selector of its own says the same.
    ends = [report["by_rollouts"][-1]]
    if preset != "restarts":
        ends.append(report["by_depth"][-1])
        assert [p["at"] for p in report["by_depth"]] == [1, 2]
    assert [p["at"] for p in report["by_rollouts"]] == [1, 2, 3, 4]
    for point in ends:
        assert (point["exact"], point["rule"]) == (report["exact"], report["rule"])
        assert point["passes"] == pytest.approx(report["passes"])
    assert report["selectors"][plan["select"]] == report["exact"]
    assert report["rule"] >= report["valid"]
    for confidence, (answered, exact) in zip((0.5, 0.75), risks, strict=True):
        (risk,) = (r for r in report["risk"] if abs(r["confidence"] - confidence) < 1e-9)
        accuracy = exact.mean() if len(exact) else None
        assert (risk["answered"], risk["accuracy"]) == pytest.approx((answered, accuracy))


def test_the_presets_differ(measure):
    told = {}
    for preset in PRESETS:
        (report,) = json.loads(measure("--preset", preset, *SMALL, "--json")[1])["sets"].values()
        told[preset] = report["cell"], report["passes"], report["exact"]
    assert len(set(told.values())) == 4
    assert any(0 < exact < 1 for *_, exact in told.values())


def test_one_rollout_is_every_step_of_the_model(measure, data):
    _, inputs, labels = data
    batch = {"inputs": torch.from_numpy(inputs).int()}
    batch["puzzle_identifiers"] = torch.zeros(len(inputs), dtype=torch.int32)
    tokens, q = [], []
    for out in supervision_steps(tiny_model(107), batch, 5):
        tokens.append(np.where(inputs > 1, inputs, out.preds.numpy()))
        q.append(out.q.numpy())
    document = json.loads(measure("--rollouts", "1", "--depth", "5", "--json")[1])
    (report,) = document["sets"].values()
    right = [((t == labels) | (labels == 0)).all(1) for t in tokens]
    valid = [sudoku_rules(inputs, t) for t in tokens]
    rows = np.arange(len(inputs))
    assert [p["at"] for p in report["by_depth"]] == [1, 2, 3, 4, 5]
    for d, point in enumerate(report["by_depth"], 1):
        best = np.argmax(q[:d], 0)
        assert point["exact"] == pytest.approx(np.array(right)[best, rows].mean())
        assert point["rule"] == pytest.approx(np.any(valid[:d], 0).mean())
        assert point["passes"] == d
    assert report["selectors"]["last"] == pytest.approx(right[-1].mean())
    assert report["by_rollouts"][0]["exact"] == report["exact"] == report["by_depth"][-1]["exact"]


def test_the_first_boards_and_every_batch_size(measure, data):
    _, inputs, labels = data
    told = []
    for size in (1, 2, 9, 256):
        arguments = ("--preset", "vote", *SMALL, "--batch-size", size, "--max-puzzles", "5")
        (report,) = json.loads(measure(*arguments, "--json")[1])["sets"].values()
        told.append({k: report[k] for k in ("puzzles", "exact", "cell", "selectors", "passes")})
    assert told[0] == told[1] == told[2] == told[3]
    answers = tiny_model(107).predict(
        torch.from_numpy(inputs[:5]).int(), reasoning="vote", rollouts=4, depth=2
    )
    want, _ = counted(answers, inputs[:5], labels[:5])
    assert (told[0]["puzzles"], told[0]["exact"], told[0]["cell"]) == pytest.approx(
        (5, want["exact"], want["cell"])
    )


def percent(value):
    return f"{100 * value:.2f} %"


HEADS = {
    ("--preset", "restarts", "--threshold", "0.5"): (
        "4 rollouts by symmetry, up to 2 steps each, one after another, halting by q, q above 0.5"
    ),
    ("--preset", "vote"): "4 rollouts by symmetry, up to 2 steps each",
    ("--preset", "ptrm"): "4 rollouts by noise, up to 2 steps each, noise 0.3 on z_L",
    ("--preset", "eqr"): "4 rollouts by init, up to 2 steps each",
    ("--select", "valid", "--init", "random", "--rollouts-by", "symmetry", "--budget", "50"): (
        "4 rollouts by symmetry, up to 2 steps each, random first states, 50 seconds in all"
    ),
}


@pytest.mark.parametrize("arguments", HEADS, ids=lambda a: a[1])
def test_the_text_says_what_the_document_says(measure, run, arguments):
    asked = (*arguments, *SMALL, "--abstain", "0.6")
    document = json.loads(measure(*asked, "--json")[1])
    status, out, err = measure(*asked)
    assert (status, err) == (0, "") and "\x1b" not in out
    (report,) = document["sets"].values()
    select = document["reasoning"]["select"]
    lines = out.splitlines()
    assert lines[0] == f"checkpoint  {run / 'step_7'}"
    assert lines[4] == f"set all: 9 boards, {HEADS[arguments]}"
    knows = ", which knows the rules" if select == "valid" else ""
    assert lines[5].split(maxsplit=3) == [
        "exact", *percent(report["exact"]).split(), f"by {select}{knows}"
    ]  # fmt: skip
    rows = {line[:16].strip(): line[16:].split() for line in lines[6:10]}
    assert rows["cell accuracy"] == percent(report["cell"]).split()
    assert rows["valid"] == percent(report["valid"]).split()
    assert rows["passes"] == [
        f"{report['passes']:.1f}", "a", "board,", "at", "most", str(report["passes_max"])
    ]  # fmt: skip
    assert rows["seconds"][1:-1] == ["a", "board,", "by", "its", "passes", "at", "most"]
    assert lines[11] == "  of the same steps, without the rules        with them"
    assert lines[12].split() == [*report["selectors"], "any", "valid"]
    shares = [*report["selectors"].values(), report["rule"]]
    assert lines[13].replace("%", "").split() == [f"{100 * share:.2f}" for share in shares]

    blocks = "\n".join(lines[15:]).split("\n\n")
    of = "the first rollout" if select == "first-q" else "all rollouts"
    curves = [(f"steps of {of}", report["by_depth"]), ("rollouts", report["by_rollouts"])]
    curves = [curve for curve in curves if curve[1]]
    assert len(blocks) == len(curves) + 1
    assert len(curves) == (1 if select == "valid" else 2)
    for block, (words, points) in zip(blocks, curves, strict=False):
        head, *body = block.split("\n")
        assert head.split() == [*words.split(), select, "any", "valid", "passes", "seconds"]
        for line, point in zip(body, points, strict=True):
            shown = [str(point["at"])]
            shown += [*percent(point["exact"]).split(), *percent(point["rule"]).split()]
            assert line.split()[:-1] == [*shown, f"{point['passes']:.1f}"]
    head, *body = blocks[-1].split("\n")
    assert head.split() == ["confidence", "at", "least", "answered", "right"]
    assert [line.split()[0] for line in body] == [
        "0.500", "0.731", "0.881", "0.953", "0.982", "0.993", "0.998", "0.600"
    ]  # fmt: skip
    (asked_for,) = (r for r in report["risk"] if abs(r["confidence"] - 0.6) < 1e-9)
    right = "-" if asked_for["accuracy"] is None else percent(asked_for["accuracy"])
    assert body[-1].split() == [
        "0.600", *percent(asked_for["answered"]).split(), *right.split(), "<-", "--abstain"
    ]  # fmt: skip


def test_where_no_rules_are_known_no_column_speaks_of_them(measure, tmp_path):
    changes = {"seq_len": 10, "vocab_size": 9}
    inputs, labels = boards(3, cells=10, vocab=9), boards(3, seed=1, cells=10, vocab=9)
    root = write_data(tmp_path / "d", inputs, labels, vocab=9)
    run = save_run(tmp_path / "run", data=root, changes=changes)
    asked = ("--rollouts", "2", "--noise", "0.1")
    out = measure(*asked, model=run)[1]
    assert "valid" not in out and "first-q" in out
    (report,) = json.loads(measure(*asked, "--json", model=run)[1])["sets"].values()
    assert report["valid"] is report["rule"] is report["by_depth"][0]["rule"] is None


def test_the_threshold_of_the_model_is_the_default(measure, run, tmp_path, data):
    own = save_run(tmp_path / "own", data=data[0])
    keep_threshold(own / FILE, 7, "ema", tiny_model(107), {"threshold": -20.0})
    asked = ("--preset", "restarts", *SMALL, "--json")
    document = json.loads(measure(*asked, model=own)[1])
    assert document["reasoning"]["threshold"] == -20
    (report,) = document["sets"].values()
    assert (report["passes"], report["passes_max"]) == (1, 1)
    document = json.loads(measure(*asked, "--threshold", "30", model=own)[1])
    (report,) = document["sets"].values()
    assert (document["reasoning"]["threshold"], report["passes"]) == (30, 8)
    assert json.loads(measure(*asked)[1])["reasoning"]["threshold"] == 4


def test_one_budget_is_for_all_sets(measure, data, tmp_path, monkeypatch):
    root, inputs, labels = data
    other = write_data(tmp_path / "other", inputs, labels)
    now = [0.0]
    monkeypatch.setattr(rollouts, "time", SimpleNamespace(monotonic=lambda: now[0]))
    real = rollouts.Lanes.step

    def step(self):
        now[0] += 1.0
        return real(self)

    monkeypatch.setattr(rollouts.Lanes, "step", step)
    asked = ("--data", root, "--data", other, "--depth", "2", "--json")
    reports = json.loads(measure(*asked, "--budget", "3")[1])["sets"]
    assert [report["passes"] for report in reports.values()] == [2, 1]
    assert [report["cut"] for report in reports.values()] == [0, 1]
    assert [report["seconds"] for report in reports.values()] == pytest.approx([2 / 9, 1 / 9])


def test_a_budget_that_is_up_answers_nothing(measure):
    (report,) = json.loads(measure("--budget", "0", "--json")[1])["sets"].values()
    assert (report["exact"], report["cell"], report["passes"], report["puzzles"]) == (0, 0, 0, 9)
    status, out, _ = measure("--budget", "0")
    assert status == 0 and "0 seconds in all" in out
    assert "\n  cut short     100.00 %   by the budget\n" in out
    assert "cut short" not in measure("--depth", "1", "--rollouts", "2")[1]


# Pictures


def size_of(path):
    """(width, height) of a PNG."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and head[12:16] == b"IHDR"
    return struct.unpack(">II", head[16:24])


def test_the_picture_has_a_panel_for_each_curve(measure, tmp_path):
    pytest.importorskip("matplotlib")
    both, one = tmp_path / "both.png", tmp_path / "one.PNG"
    both.write_text("old")
    status, out, err = measure("--preset", "vote", *SMALL, "--plot", both, "--json")
    assert (status, err) == (0, f"{both} written\n") and json.loads(out)["sets"]
    assert measure("--plot", one)[0] == 0  # of one rollout: against depth alone
    assert size_of(both) == (1210, 495) and size_of(one) == (605, 495)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["both.png", "one.PNG"]


def test_both_curves_and_their_cost_are_drawn(measure, monkeypatch, tmp_path):
    drawn = []

    def look(panels, path, title):
        drawn.append((panels, path, title))

    monkeypatch.setattr("trm_fast.evaluate_rollouts.accuracy_curves", look)
    out = measure("--preset", "vote", *SMALL, "--plot", "x.png", "--json")[1]
    (report,) = json.loads(out)["sets"].values()
    ((panels, path, title),) = drawn
    assert (path, title) == ("x.png", "select: mode")
    for words, key in (("supervision steps", "by_depth"), ("rollouts", "by_rollouts")):
        curves, points = panels[words], report[key]
        assert list(curves) == ["all: mode", "all: any valid"]
        for curve, part in zip(curves.values(), ("exact", "rule"), strict=True):
            assert list(curve.at) == [p["at"] for p in points]
            assert list(curve.percent) == pytest.approx([100 * p[part] for p in points])
            assert list(curve.passes) == pytest.approx([p["passes"] for p in points])
            assert curve.dashed is (part == "rule")


def test_a_picture_that_cannot_be_does_not_cost_the_report(measure, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    for path, said in (
        ("no/such/x.png", "no/such/x.png: cannot be written: there is no folder no/such"),
        ("folder.png", "folder.png: cannot be written: it is a folder"),
        ("x.pdf", "x.pdf: is to be a PNG, its name must end in .png"),
    ):
        status, out, err = measure(*SMALL, "--plot", path)  # known before anything is measured
        assert (status, out, err) == (2, "", f"trm-fast evaluate: {said}\n")
    monkeypatch.setattr("trm_fast.evaluate_rollouts.check_picture", lambda *a: None)
    status, out, err = measure(*SMALL, "--plot", "no/such/x.png")  # gone in the meantime
    assert status == 2 and out.startswith("checkpoint") and "by q" in out
    said = "trm-fast evaluate: x.png is not drawn: No such file or directory"
    assert err.startswith(said) and err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["folder.png"]
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    status, out, err = measure(*SMALL, "--plot", tmp_path / "x.png", "--json")
    assert status == 2 and json.loads(out)["sets"]
    assert err == 'trm-fast evaluate: x.png is not drawn: pip install "trm-fast[viz]"\n'


# What is refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rollouts", "0"), "--rollouts must be a whole number from 1 to 65535, got 0"),
        (("--rollouts", "65536"), "--rollouts must be a whole number from 1 to 65535, got 65536"),
        (("--rollouts", "x"), "argument --rollouts: invalid int value: 'x'"),
        (("--rollouts", "2", "--depth", "65536"), "--depth must be a whole number from 1 to 65535"),
        (
            ("--rollouts", "65535", "--depth", "65535"),
            "--rollouts times --depth must be at most 134217728, got 65535 times 65535",
        ),
        (("--noise", "-1"), "--noise must be a number of at least 0, got -1.0"),
        (("--noise", "nan"), "--noise must be a number of at least 0, got nan"),
        (("--noise", "inf"), "--noise must be a number of at least 0, got inf"),
        (("--rollouts-by", "noise"), "--rollouts-by noise needs noise: --noise must be above"),
        (("--rollouts-by", "luck"), "argument --rollouts-by: invalid choice: 'luck'"),
        (("--seed", "-1"), "--seed must be a whole number from 0 to"),
        (("--budget", "-1"), "--budget must be a number of at least 0, got -1.0"),
        (("--threshold", "nan"), "--threshold must be a number, got nan"),
        (("--tolerance", "-0.5"), "--tolerance must be a number of at least 0, got -0.5"),
        (("--select", "best"), "argument --select: invalid choice: 'best'"),
        (("--preset", "magic"), "argument --preset: invalid choice: 'magic'"),
        (("--schedule", "sequential"), "--schedule sequential stops at the first good answer: "),
        (
            ("--schedule", "sequential", "--select", "q"),
            "--schedule sequential stops at the first good answer: --select must be first-q or "
            "valid, got 'q'",
        ),
        (
            ("--preset", "restarts", "--select", "mode"),
            "--schedule sequential of --preset restarts",
        ),
        (("--calibrate", "--select", "q", "--schedule", "sequential"), "--schedule sequential"),
        (("--noise-on", "z_H"), "--noise-on is for --noise above 0"),
        (("--threshold", "2"), "--threshold is for --halt q or --select first-q"),
        (("--preset", "restarts", "--tolerance", "1"), "--tolerance is for --halt fixed-point"),
        (("--calibrate",), "9 boards are too few to tell 99.0% by, 100 are needed"),
        (("--abstain", "2"), "argument --abstain: '2' is not a number from 0 to 1; see --help"),
        (("--abstain", "x"), "argument --abstain: 'x' is not a number from 0 to 1; see --help"),
        (("--noise", "0.1", "--noise-on", "z"), "argument --noise-on: invalid choice: 'z'"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "solve"])
def test_bad_options_are_one_line_before_any_work(
    run, capsys, monkeypatch, command, arguments, said
):
    monkeypatch.setattr("trm_fast.inference.blocks", lambda *a: pytest.fail("worked"))
    monkeypatch.setattr("trm_fast.reasoning_report.blocks", lambda *a: pytest.fail("worked"))
    if command == "evaluate":
        status = evaluate.main([str(run), *arguments])
    elif "--calibrate" in arguments:
        return
    else:
        status = solve.main([SOLVED, "-m", str(run), *arguments])
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith(f"trm-fast {command}: {said}") and err.count("\n") == 1


def test_what_a_model_has_not_is_refused(measure, tmp_path):
    """Rules and symmetries of puzzles that are none of ours; states of networks without them."""
    changes = {"seq_len": 10, "vocab_size": 9}
    inputs = boards(3, cells=10, vocab=9)
    root = write_data(tmp_path / "d", inputs, inputs, vocab=9)
    run = save_run(tmp_path / "run", data=root, changes=changes)
    for arguments, said in (
        (("--select", "valid"), "--select valid is for Sudoku and mazes, whose rules are known"),
        (("--preset", "vote"), "--preset vote needs symmetries, none is known of these puzzles"),
        (("--preset", "restarts"), "--preset restarts needs symmetries, none is known of these"),
        (("--rollouts", "2"), "no symmetry is known of this model's puzzles: --rollouts-by must"),
    ):
        status, out, err = measure(*arguments, model=run)
        assert (status, out) == (2, "") and err.count("\n") == 1
        assert err.startswith(f"trm-fast evaluate: {said}")
    root = write_data(tmp_path / "e", boards(2), boards(2))
    for name, wanted, states in (
        ("transformers_baseline", "z_L", "z_H"),
        ("trm_singlez", "z_H", "z_L"),
    ):
        changes = {"name": name, "H_layers": 1}
        run = save_run(tmp_path / name, data=root, changes=changes)
        status, out, err = measure("--noise", "0.1", "--noise-on", wanted, model=run)
        said = f"--noise-on {wanted}: the network {name} has {states}"
        assert (status, out, err) == (2, "", f"trm-fast evaluate: {said}\n")
        assert measure("--noise", "0.1", "--noise-on", "both", model=run)[0] == 0
    settings = {"H_cycles": 2, "L_cycles": 3, "dropout": 0.1, "hidden_dim": 12}
    file = tmp_path / "production.pt"
    torch.save({"model_state_dict": s4nj1th_weights((1,)), "config": settings}, file)
    nine = tmp_path / "nine.csv"
    nine.write_text(f"quizzes,solutions\n{'0' * 81},{NINE}\n")
    for arguments, said in (
        (("--noise", "0.1"), "--noise-on z_L: the network gated_mlp has no state"),
        (("--init", "random"), "--init random is for networks with states, gated_mlp has none"),
    ):
        status, out, err = measure(*arguments, "--csv", nine, model=file)
        assert (status, out) == (2, "") and err.endswith(f"trm-fast evaluate: {said}\n")
    assert measure("--rollouts", "2", "--csv", nine, model=file)[0] == 0


def test_the_fit_runs_every_step_whatever_chooses(measure, tmp_path, data):
    own = save_run(tmp_path / "own", data=data[0])
    given = ("--calibrate", "0.05", "--select", "mode", "--halt", "q", "--depth", "2", "--json")
    status, out, err = measure(*given, model=own)
    assert status == 0 and "16 rollouts of 2 steps" in err
    assert json.loads(out)["reasoning"]["select"] == "mode"
    assert json.loads((own / FILE).read_text())["ema@7"]["rollouts"] == 16
