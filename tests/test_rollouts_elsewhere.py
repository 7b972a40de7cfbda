"""evaluate and solve with rollouts on mazes, on ARC, and on checkpoints of the official layout."""

import json

import pytest
import torch
from answering import boards, save_run, write_data
from arc_tasks import CHOICES, VOTED, write_subsets

from trm_fast import convert, evaluate, solve
from trm_fast.data.arc import BuildOptions, build
from trm_fast.evaluators import Evaluators
from trm_fast.loading import load

SMALL = ("--rollouts", "4", "--depth", "2")


@pytest.fixture
def measure(capsys):
    """measure(checkpoint, *arguments) -> (status, stdout, stderr)."""

    def call(*arguments):
        status = evaluate.main(list(map(str, arguments)))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_mazes_have_eight_images(measure, tmp_path):
    changes = {"seq_len": 25, "vocab_size": 6}
    inputs, labels = boards(4, cells=25), boards(4, seed=1, cells=25)
    run = save_run(tmp_path / "m", changes=changes)
    model = load(run).model
    asked = torch.from_numpy(inputs).int()
    labels[:2] = model.predict(asked, reasoning="vote", depth=2).tokens.numpy()[:2]
    root = write_data(tmp_path / "d", inputs, labels)
    given = ("--data", root, "--depth", "2", "--json")
    document = json.loads(measure(run, "--preset", "vote", *given)[1])
    assert document["reasoning"]["rollouts"] == 8
    (report,) = document["sets"].values()
    assert report["exact"] == 0.5 and report["passes"] == 16
    assert [p["at"] for p in report["by_rollouts"]] == [1, 2, 3, 4, 6, 8]
    status, out, err = measure(run, "--preset", "vote", "--rollouts", "9", *given)
    assert (status, out) == (2, "")
    assert err == (
        "trm-fast evaluate: a maze has 8 symmetries: --rollouts must be at most 8, or differ by "
        "noise or random first states, got 9\n"
    )
    more = ("--rollouts", "9", "--rollouts-by", "symmetry", "--noise", "0.1")
    assert measure(run, *more, *given)[0] == 0


def test_mazes_are_solved_with_rollouts(tmp_path, capsys):
    rows = ["S    ", "#### ", "     ", " ####", "    G"]
    run = save_run(tmp_path / "m", changes={"seq_len": 25, "vocab_size": 6})
    tokens = torch.tensor([[{"#": 1, " ": 2, "S": 3, "G": 4}[c] for c in "".join(rows)]])
    want = load(run).model.predict(tokens, reasoning="vote", depth=2)
    arguments = ["".join(rows), "-m", str(run), "--preset", "vote", "--depth", "2"]
    status = solve.main([*arguments, "--json"])
    (told,) = json.loads(capsys.readouterr().out)["answers"]
    assert told["passes"] == 16 and told["rollout"] == int(want.rollout) + 1
    shown = "".join(
        "o" if t == 5 else given
        for t, given in zip(want.tokens[0].tolist(), "".join(rows), strict=True)
    )
    assert "".join(told["answer"]) == shown
    assert told["confidence"] == pytest.approx(float(want.confidence))
    assert solve.main(arguments) == status
    said = capsys.readouterr().out
    assert said.rstrip().endswith(f"; {float(want.confidence):.3f} of the votes, 16 passes")
    assert solve.main([*arguments, "--abstain", "1"]) == 1
    assert capsys.readouterr().out.startswith("no answer: ")
    assert solve.main([*arguments, "--rollouts", "9"]) == 2
    assert "a maze has 8 symmetries" in capsys.readouterr().err


def test_arc_votes_are_of_the_answers_that_count(tmp_path, capsys, monkeypatch):
    choice, root = CHOICES[VOTED], tmp_path / "data"
    wanted = choice.subsets, choice.test_set_name
    build(BuildOptions(write_subsets(tmp_path), str(root), *wanted, num_aug=0))
    about = json.loads((root / "test" / "dataset.json").read_text())
    puzzles = about["num_puzzle_identifiers"]
    changes = {"seq_len": 900, "vocab_size": 12, "hidden_size": 8, "num_heads": 1}
    changes |= {"num_puzzle_identifiers": puzzles, "puzzle_emb_ndim": 8, "puzzle_emb_len": 1}
    run = save_run(tmp_path / "run", changes=changes, data=root)
    seen, begin = [], Evaluators.begin

    def looked_at(self, directories):
        update = begin(self, directories)

        def observe(name, outputs):
            seen.append(outputs)
            update(name, outputs)

        return observe

    monkeypatch.setattr(Evaluators, "begin", looked_at)
    command = [str(run), "--rollouts", "2", "--noise", "0.3", "--depth", "2"]
    out = tmp_path / "mine.json"
    assert evaluate.main([*command, "--submission", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ARC/unanswered"] == 0 and "ARC/pass@2" in document
    assert sorted(json.loads(out.read_text())) == [f"e000000{k}" for k in range(4)]
    told = {key: torch.cat([part[key] for part in seen]) for key in seen[0]}
    answers = load(run).model.predict(
        told["inputs"], told["puzzle_identifiers"], rollouts=2, noise=0.3, depth=2
    )
    assert len(told["inputs"]) == 7
    assert torch.equal(told["preds"], answers.tokens)
    assert torch.equal(told["q_halt_logits"], answers.q)
    first = load(run).model.predict(told["inputs"], told["puzzle_identifiers"], depth=2)
    assert not torch.equal(first.tokens, answers.tokens), "a second rollout counts somewhere"
    assert evaluate.main(command) == 0
    assert "ARC/pass@1 " in capsys.readouterr().out


@pytest.fixture
def official(tmp_path, capsys):
    """A run, and the same weights as a checkpoint of the official layout."""
    changes = {"mlp_t": True, "pos_encodings": "none", "expansion": 4.0}
    changes |= {"intermediate_multiple": 256, "hidden_size": 16}
    inputs, labels = boards(9), boards(9, seed=1)
    inputs[:, ::2] = 1
    data = write_data(tmp_path / "data", inputs, labels)
    run = save_run(tmp_path / "run", ema=False, changes=changes, data=data)
    theirs = tmp_path / "theirs" / "step_7"
    assert convert.main([str(run), str(theirs), "--to", "official"]) == 0
    capsys.readouterr()
    return run, theirs, data


@pytest.mark.parametrize("preset", ["restarts", "vote", "ptrm", "eqr"])
def test_checkpoints_of_the_official_layout_take_the_same_flags(measure, official, capsys, preset):
    run, theirs, data = official
    limit = ("--threshold", "0.5") if preset == "restarts" else ()
    asked = ("--preset", preset, *SMALL, *limit, "--data", data, "--json")
    ours, other = (json.loads(measure(place, *asked)[1]) for place in (run, theirs))
    assert other["checkpoint"] == str(theirs) and other["weights"] == "raw"
    assert other["reasoning"] == ours["reasoning"]
    for key in ("exact", "cell", "selectors", "valid", "rule", "passes", "passes_max"):
        assert other["sets"]["all"][key] == pytest.approx(ours["sets"]["all"][key]), key
    told = []
    for place in (run, theirs):
        puzzle = "1..." + "." * 12
        arguments = ["-m", str(place), "--preset", preset, *SMALL, *limit, "--json"]
        assert solve.main([puzzle, *arguments]) in (0, 1)
        (answer,) = json.loads(capsys.readouterr().out)["answers"]
        told.append((answer["answer"], answer["rollout"], answer["step"], answer["passes"]))
    assert told[0] == told[1]
