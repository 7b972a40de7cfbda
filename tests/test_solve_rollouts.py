"""solve with rollouts: answers as text and JSON, withheld ones, budgets, and being watched."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from answering import BLANK, SOLVED, save_run, tiny_model

from trm_fast import rollouts, solve
from trm_fast.thresholds import FILE, keep_threshold

CLUES = "12..34..21..43.."
ASKED = (CLUES, BLANK, "1" + BLANK[1:])
SMALL = {"rollouts": 5, "depth": 2}
OPTIONS = ("--rollouts", "5", "--depth", "2")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture
def ask(run, capsys):
    """ask(*arguments, model=run) -> (status, stdout, stderr)."""

    def call(*arguments, model=run):
        status = solve.main([*map(str, arguments), "-m", str(model)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def answered(puzzles, **settings):
    """What the EMA weights of the run answer: digits as text, and the Answers."""
    tokens = [[1 if c == "." else int(c) + 1 for c in puzzle] for puzzle in puzzles]
    answers = tiny_model(107).predict(torch.tensor(tokens), **settings)
    texts = ["".join(str(max(t - 1, 0)) for t in row) for row in answers.tokens.tolist()]
    return [text.replace("0", ".") for text in texts], answers


CASES = {
    "restarts": (("--threshold", "0.5"), {"threshold": 0.5}),
    "vote": ((), {}),
    "ptrm": (("--seed", "3"), {"seed": 3}),
    "eqr": ((), {}),
}


@pytest.mark.parametrize("preset", CASES)
def test_json_is_what_predict_answers(ask, preset):
    more, settings = CASES[preset]
    texts, answers = answered(ASKED, reasoning=preset, **SMALL, **settings)
    status, out, err = ask(*ASKED, "--preset", preset, *OPTIONS, *more, "--json")
    document = json.loads(out)
    assert (status, err) == (1, "") and document["supervision_steps"] == 2
    assert document["reasoning"]["rollouts"] == 5
    for key, value in settings.items():
        assert document["reasoning"][key] == value
    for i, told in enumerate(document["answers"]):
        assert told["answer"] == texts[i] and told["abstained"] is False
        assert told["confidence"] == pytest.approx(answers.confidence[i].item())
        assert (told["step"], told["rollout"], told["passes"]) == (
            answers.step[i].item(),
            answers.rollout[i].item() + 1,
            answers.passes[i].item(),
        )


def test_the_cases_tell_presets_apart():
    found = {}
    for preset, (_, settings) in CASES.items():
        texts, answers = answered(ASKED, reasoning=preset, **SMALL, **settings)
        found[preset] = (*texts, *answers.passes.tolist(), *answers.rollout.tolist())
    assert len(set(found.values())) == 4
    assert any(sum(rollout for rollout in told[6:]) for told in found.values())


@pytest.mark.parametrize("preset", CASES)
def test_the_text_says_how_sure_and_at_what_cost(ask, preset):
    more, settings = CASES[preset]
    (text,), answers = answered([CLUES], reasoning=preset, **SMALL, **settings)
    out = ask(CLUES, "--preset", preset, *OPTIONS, *more)[1]
    sure, rollout = answers.confidence.item(), answers.rollout.item() + 1
    words = f"halting confidence {sure:.3f} at step {answers.step.item()} of rollout {rollout}"
    if preset == "vote":
        words = f"{sure:.3f} of the votes"
    assert out.startswith(f"{text}\n\n{text[:4]}\n")
    assert out.endswith(f"; {words}, {answers.passes.item()} passes\n")


def test_the_votes_of_one_rollout_are_its_own(ask):
    out = ask(CLUES, "--select", "mode", "--entry", "last")[1]
    assert out.endswith("; 1.000 of the votes\n")


def test_the_threshold_of_the_model_ends_the_restarts(ask, tmp_path):
    own = save_run(tmp_path / "own")
    keep_threshold(own / FILE, 7, "ema", tiny_model(107), {"threshold": -30.0})
    asked = (CLUES, "--preset", "restarts", *OPTIONS, "--json")
    document = json.loads(ask(*asked, model=own)[1])
    assert document["reasoning"]["threshold"] == -30
    assert document["answers"][0]["passes"] == document["answers"][0]["rollout"] == 1
    document = json.loads(ask(*asked, "--threshold", "30", model=own)[1])
    assert document["answers"][0]["passes"] == 10


def test_an_answer_that_is_not_sure_is_withheld(ask):
    _, answers = answered(ASKED, select="q")
    sure = sorted(answers.confidence.tolist())
    assert sure[0] < sure[1]
    least = (sure[0] + sure[1]) / 2
    document = json.loads(ask(*ASKED, "--abstain", least, "--json")[1])
    places = [i for i, c in enumerate(answers.confidence.tolist()) if c < least]
    for i, told in enumerate(document["answers"]):
        assert told["abstained"] is (i in places) and (told["answer"] is None) is (i in places)
        assert told["valid"] is False
        assert told["confidence"] == pytest.approx(answers.confidence[i].item())
    assert len(places) == 1
    parts = ask(ASKED[places[0]], "--abstain", least)
    step = answers.step[places[0]].item()
    want = f"no answer: halting confidence {sure[0]:.3f} at step {step}, below {least:g}\n"
    assert parts == (1, want, "")
    out = ask(*ASKED, "--abstain", least)[1]
    parts = out.rstrip("\n").split("\n\n")
    assert f"argument {places[0] + 1}: {want}".rstrip("\n") in parts, "which of several"
    assert sum("argument" in part for part in parts) == 1


def test_withholding_a_right_answer_is_status_1(ask):
    (confidence,) = answered([SOLVED])[1].confidence.tolist()
    assert confidence < 1
    assert ask(SOLVED)[0] == ask(SOLVED, "--abstain", "0")[0] == 0
    status, out, _ = ask(SOLVED, "--abstain", "1", "--json")
    (told,) = json.loads(out)["answers"]
    assert (status, told["answer"], told["valid"], told["abstained"]) == (1, None, False, True)
    assert ask(SOLVED, "--abstain", "1")[1].startswith("no answer: halting confidence ")
    status, out, _ = ask(SOLVED, "--select", "mode", "--entry", "last", "--abstain", "1")
    assert status == 0 and out.endswith("1.000 of the votes\n"), "as sure as asked is sure enough"


@pytest.mark.parametrize("more", [(), ("--preset", "restarts"), ("--preset", "vote"), ("--watch",)])
def test_where_the_time_is_up_there_is_no_answer(ask, more):
    said = "no answer: the time was up before a step was made"
    status, out, err = ask(CLUES, SOLVED, "--budget", "0", *more)
    assert status == 1 and err == ""
    assert out.endswith(f"argument 1: {said}\n\nargument 2: {said}\n")
    told = json.loads(ask(CLUES, "--budget", "0", *more, "--json")[1])["answers"][0]
    assert (told["answer"], told["valid"], told["abstained"]) == (None, False, True)
    assert told["broken"] is None, "there is no answer that could break a rule"
    assert (told["step"], told["passes"], told["confidence"]) == (0, 0, 0.0)


def test_what_a_budget_cut_short_is_said(ask, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(rollouts, "time", SimpleNamespace(monotonic=lambda: now[0]))
    real = rollouts.Lanes.step
    monkeypatch.setattr(
        rollouts.Lanes, "step", lambda self: now.append(now.pop() + 1) or real(self)
    )
    asked = (CLUES, "--rollouts", "2", "--depth", "3")
    for seconds, said, passes in (("1.5", ", 4 passes, cut short by --budget\n", 4), ("9", "", 6)):
        out = ask(*asked, "--budget", seconds)[1]
        assert out.endswith(said or ", 6 passes\n")
        (told,) = json.loads(ask(*asked, "--budget", seconds, "--json")[1])["answers"]
        assert (told["cut"], told["passes"]) == (bool(said), passes)


@pytest.mark.parametrize("preset", CASES)
def test_watched_rollouts_answer_the_same(ask, preset):
    more, _ = CASES[preset]
    asked = (*ASKED, "--preset", preset, "--rollouts", "3", "--depth", "2", *more)
    status, plain, _ = ask(*asked)
    watched, out, err = ask(*asked, "--watch")
    assert (watched, err) == (status, "") and out.endswith(plain)
    frames = out[: -len(plain)]
    assert all(f"rollout {k} of 3" in frames for k in (1, 2, 3))
    document = json.loads(ask(*asked, "--json")[1])
    _, again, frames = ask(*asked, "--watch", "--json")
    assert json.loads(again)["reasoning"] == document["reasoning"]
    for one, other in zip(json.loads(again)["answers"], document["answers"], strict=True):
        assert one.pop("confidence") == pytest.approx(other.pop("confidence"), rel=1e-5)
        assert one == other
    assert "rollout 3 of 3" in frames


def test_a_terminal_is_told_of_restarts_where_nothing_was_asked(ask, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for arguments, said in ((ASKED, True), ((SOLVED,), False), ((*ASKED, *OPTIONS), False)):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        ask(*arguments)
        assert ("3 of 3 not solved: --preset restarts looks at" in terminal.getvalue()) is said
