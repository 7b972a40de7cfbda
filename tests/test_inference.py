"""Answers per supervision step, their measures against a plain loop, and the choice among steps."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from answering import CELLS, DEPTH, VOCAB, boards, tiny_config, tiny_model, with_given

from trm_fast.data.dataset import PuzzleDataset, PuzzleDatasetConfig, from_arrays
from trm_fast.data.format import IGNORE_LABEL_ID
from trm_fast.inference import evaluate, predict, supervision_steps
from trm_fast.losses import LOSSES
from trm_fast.recursion import Carry, State, take_new_data
from trm_fast.rules import sudoku_rules

SOLVED = np.array([int(c) for c in "1234341221434321"])


def as_batch(inputs, labels=None):
    batch = {
        "inputs": torch.as_tensor(np.asarray(inputs), dtype=torch.int32),
        "puzzle_identifiers": torch.zeros(len(inputs), dtype=torch.int32),
    }
    if labels is not None:
        batch["labels"] = torch.as_tensor(np.asarray(labels), dtype=torch.int32)
    return batch


class Scripted(torch.nn.Module):
    """Answers from a table: board i (its first token of the identifiers) at step m is preds[m, i].

    preds [M, N, L] tokens, q [M, N].
    """

    def __init__(self, preds, q, config=None):
        super().__init__()
        self.preds, self.q = torch.as_tensor(preds), torch.as_tensor(q, dtype=torch.float32)
        self.config = config or tiny_config(halt_max_steps=len(preds))
        self.inner = torch.nn.Module()
        self.inner.device = torch.device("cpu")
        self.q_threshold = None

    def initial_carry(self, batch):
        size = len(batch["inputs"])
        nothing = State(torch.zeros(size), torch.zeros(size))
        steps, halted = torch.zeros(size, dtype=torch.int32), torch.ones(size, dtype=torch.bool)
        return Carry(nothing, steps, halted, {name: t.clone() for name, t in batch.items()})

    def forward(self, carry, batch):
        carry.current_data = take_new_data(carry.halted, batch, carry.current_data)
        step, ids = carry.steps.long(), carry.current_data["puzzle_identifiers"].long()
        step = torch.where(carry.halted, 0, step)
        logits = torch.nn.functional.one_hot(self.preds[step, ids], VOCAB).float() * 5
        carry.steps = step.int() + 1
        return carry, {"logits": logits, "q_halt_logits": self.q[step, ids]}


def scripted_batches(inputs, labels, size) -> Iterator:
    """Batches whose puzzle_identifiers number the boards; the last padded as the sampler does."""
    for start in range(0, len(inputs), size):
        batch = as_batch(inputs[start : start + size], labels[start : start + size])
        count = len(batch["inputs"])
        batch["puzzle_identifiers"] = torch.arange(start, start + count, dtype=torch.int32)
        fill = size - count
        padded = {
            "inputs": torch.nn.functional.pad(batch["inputs"], (0, 0, 0, fill)),
            "labels": torch.nn.functional.pad(
                batch["labels"], (0, 0, 0, fill), value=IGNORE_LABEL_ID
            ),
            "puzzle_identifiers": torch.nn.functional.pad(batch["puzzle_identifiers"], (0, fill)),
        }
        yield "all", padded, count


@pytest.mark.parametrize("steps", [1, DEPTH, DEPTH + 4])
def test_supervision_steps_equal_calling_the_model(steps):
    model = tiny_model()
    batch = as_batch(boards(3))
    got = list(supervision_steps(model, batch, steps))
    assert len(got) == steps
    halted = torch.ones(3, dtype=torch.bool)
    state = model.inner.empty_carry(3)
    with torch.no_grad():
        for out in got:
            state, logits, (q, _) = model.inner(state, batch, halted)
            halted = torch.zeros(3, dtype=torch.bool)
            torch.testing.assert_close(out.logits, logits, rtol=0, atol=0)
            torch.testing.assert_close(out.q, q, rtol=0, atol=0)
            assert torch.equal(out.preds, logits.argmax(-1))
    if steps == DEPTH:
        carry = model.initial_carry(batch)
        with torch.no_grad():
            for out in got:
                carry, outputs = model(carry, batch)
                torch.testing.assert_close(out.logits, outputs["logits"], rtol=0, atol=0)


def test_a_step_changes_the_answer():
    first, *_, last = supervision_steps(tiny_model(), as_batch(boards(3)), DEPTH)
    assert not torch.equal(first.logits, last.logits)
    assert not first.logits.requires_grad


def plain_measures(preds, q, inputs, labels, loss_type="stablemax_cross_entropy"):
    """The report of `evaluate` by loops over steps and boards; preds [M, N, L], q [M, N]."""
    boards_used = [i for i in range(len(labels)) if (labels[i] != IGNORE_LABEL_ID).any()]
    result = {key: [] for key in ("accuracy", "exact_accuracy", "valid", "q_halt_accuracy")}
    share, right = np.zeros(q.shape), np.zeros(q.shape, bool)
    for m in range(len(preds)):
        rows = {key: [] for key in result}
        for i in boards_used:
            cells = [j for j in range(CELLS) if labels[i, j] != IGNORE_LABEL_ID]
            share[m, i] = sum(preds[m, i, j] == labels[i, j] for j in cells) / len(cells)
            right[m, i] = share[m, i] == 1
            rows["accuracy"].append(share[m, i])
            rows["exact_accuracy"].append(right[m, i])
            rows["q_halt_accuracy"].append((q[m, i] >= 0) == right[m, i])
            rows["valid"].append(sudoku_rules(inputs[i : i + 1], preds[m, i : i + 1])[0])
        for key, values in rows.items():
            result[key].append(float(np.mean(values)))
    best = {i: int(np.argmax(q[:, i])) for i in boards_used}
    result["best_q_accuracy"] = np.mean([share[best[i], i] for i in boards_used])
    result["best_q_exact_accuracy"] = np.mean([right[best[i], i] for i in boards_used])
    result["best_q_valid"] = np.mean(
        [sudoku_rules(inputs[i : i + 1], preds[best[i], i : i + 1])[0] for i in boards_used]
    )
    result["best_q_steps"] = np.mean([best[i] + 1 for i in boards_used])
    result["puzzles"] = len(boards_used)
    logits = torch.nn.functional.one_hot(torch.as_tensor(preds[-1]), VOCAB).float() * 5
    losses, q_losses = [], []
    for i in boards_used:
        kept = labels[i] != IGNORE_LABEL_ID
        chosen = LOSSES[loss_type](
            logits[i : i + 1, kept], torch.as_tensor(labels[i : i + 1, kept])
        )
        losses.append(float(chosen.mean()))
        p = 1 / (1 + np.exp(-q[-1, i]))
        q_losses.append(-np.log(p if right[-1, i] else 1 - p))
    result["lm_loss"], result["q_halt_loss"] = np.mean(losses), np.mean(q_losses)
    return result


@pytest.fixture
def script():
    """6 boards, 3 steps: right, right then lost, wrong, partly labelled, not labelled, right."""
    rng = np.random.default_rng(1)
    inputs = np.ones((6, CELLS), np.int64)
    inputs[:, :3] = SOLVED[:3] + 1
    labels = np.tile(SOLVED + 1, (6, 1))
    labels[3, 5:] = IGNORE_LABEL_ID
    labels[4] = IGNORE_LABEL_ID
    preds = rng.integers(0, VOCAB, (3, 6, CELLS))
    preds[2, 0] = preds[0, 1] = preds[1, 5] = SOLVED + 1
    preds[1:, 3, :5] = SOLVED[:5] + 1
    q = rng.normal(size=(3, 6))
    q[:, 0], q[:, 1], q[:, 5] = [-1, 0.5, 2], [3, 3, -1], [-2, 4, 3]
    return preds, q, inputs, labels


@pytest.mark.parametrize("loss_type", list(LOSSES))
@pytest.mark.parametrize("size", [1, 2, 4, 6, 50])
def test_evaluate_equals_a_plain_loop_at_every_batch_size(script, size, loss_type):
    preds, q, inputs, labels = script
    reports = evaluate(
        Scripted(preds, q),
        scripted_batches(inputs, labels, size),
        loss_type=loss_type,
        rules=sudoku_rules,
    )
    assert list(reports) == ["all"]
    got, want = reports["all"].to_dict(), plain_measures(preds, q, inputs, labels, loss_type)
    assert set(got) == set(want)
    for key, value in want.items():
        assert got[key] == pytest.approx(value, rel=1e-6), key
    assert got["puzzles"] == 5
    assert got["exact_accuracy"] == [0.2, 0.4, 0.4]
    assert got["best_q_exact_accuracy"] == pytest.approx(
        np.mean([1, 1, np.argmax(q[:, 2]) > 9, np.argmax(q[:, 3]) > 0, 1])
    )


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize("most", [1, 4, 5, 9])
def test_max_puzzles_takes_the_first_labelled_boards(script, most, size):
    preds, q, inputs, labels = script
    used = [0, 1, 2, 3, 5][:most]
    report = evaluate(
        Scripted(preds, q),
        scripted_batches(inputs, labels, size),
        max_puzzles=most,
        rules=sudoku_rules,
    )["all"]
    want = plain_measures(preds[:, used], q[:, used], inputs[used], labels[used])
    assert report.puzzles == len(used)
    assert report.accuracy == pytest.approx(want["accuracy"])
    assert report.best_q_steps == pytest.approx(want["best_q_steps"])


def test_max_puzzles_counts_per_set(script):
    preds, q, inputs, labels = script
    batches = [
        (name, batch, n)
        for name in ("all", "all1")
        for _, batch, n in scripted_batches(inputs, labels, 4)
    ]
    reports = evaluate(Scripted(preds, q), batches, max_puzzles=2)
    assert {name: report.puzzles for name, report in reports.items()} == {"all": 2, "all1": 2}
    assert reports["all"] == reports["all1"]


def test_without_rules_there_is_no_valid(script):
    preds, q, inputs, labels = script
    report = evaluate(Scripted(preds, q), scripted_batches(inputs, labels, 6))["all"]
    assert report.valid == []
    assert report.best_q_valid is None
    assert "valid" not in report.metrics()


def test_metrics_are_those_of_the_last_step(script):
    preds, q, inputs, labels = script
    report = evaluate(
        Scripted(preds, q), scripted_batches(inputs, labels, 6), steps=2, rules=sudoku_rules
    )["all"]
    assert report.metrics() == {
        "accuracy": report.accuracy[1],
        "exact_accuracy": 0.4,
        "q_halt_accuracy": report.q_halt_accuracy[1],
        "steps": 2.0,
        "lm_loss": report.lm_loss,
        "q_halt_loss": report.q_halt_loss,
        "best_q_exact_accuracy": report.best_q_exact_accuracy,
        "valid": 0.2,
    }


def test_evaluate_a_real_model_over_the_sampler():
    model = tiny_model().train()
    inputs = boards(7)
    steps = list(supervision_steps(model.eval(), as_batch(inputs), DEPTH))
    labels = boards(7, seed=1)
    labels[:3] = steps[1].preds[:3].numpy()
    model.train()
    visit = PuzzleDatasetConfig(0, (), global_batch_size=3, test_set_mode=True)
    dataset = PuzzleDataset(visit, "test", data=from_arrays(inputs, labels, vocab_size=VOCAB))
    report = evaluate(model, dataset)["all"]
    assert model.training
    assert report.puzzles == 7
    assert report.exact_accuracy[1] == pytest.approx(3 / 7)
    want = [(step.preds.numpy() == labels).mean() for step in steps]
    assert report.accuracy == pytest.approx(want)


def test_evaluate_restores_the_mode_when_it_fails():
    model = tiny_model().train()
    with pytest.raises(KeyError):
        evaluate(model, [("all", as_batch(boards(2)), 2)])
    assert model.training


def test_nothing_to_evaluate():
    with pytest.raises(ValueError, match="the data has no puzzles"):
        evaluate(tiny_model(), [])


@pytest.mark.parametrize("size", [1, 2, 50])
def test_predict_chooses_the_last_step_or_the_highest_q(script, size):
    preds, q, inputs, _ = script
    model = Scripted(preds, q)
    ids = torch.arange(6)
    last = predict(model, torch.as_tensor(inputs), ids, select="last", batch_size=size)
    written = with_given(model, torch.as_tensor(inputs), torch.as_tensor(preds[-1]))
    assert torch.equal(last.tokens, written)
    assert last.step.tolist() == [3] * 6
    assert last.q.numpy() == pytest.approx(q[-1])
    best = predict(model, torch.as_tensor(inputs), ids, batch_size=size)
    steps = q.argmax(0)
    assert steps[1] == 0  # a tie between steps 1 and 2: the earliest
    assert best.step.tolist() == (steps + 1).tolist()
    tokens = torch.as_tensor(preds[steps, np.arange(6)])
    assert torch.equal(best.tokens, with_given(model, torch.as_tensor(inputs), tokens))
    assert best.q.numpy() == pytest.approx(q.max(0))


def test_predict_depth_and_mode():
    model = tiny_model().train()
    inputs = torch.as_tensor(boards(3))
    answers = predict(model, inputs, depth=5, select="last")
    assert model.training
    *_, out = supervision_steps(model.eval(), as_batch(boards(3)), 5)
    assert torch.equal(answers.tokens, with_given(model, inputs, out.preds))
    assert answers.tokens.dtype == torch.int64
    assert answers.step.tolist() == [5, 5, 5]
    assert predict(model, inputs, select="last").step.tolist() == [DEPTH] * 3


def test_predict_nothing():
    answers = predict(tiny_model(), torch.zeros(0, CELLS, dtype=torch.int32))
    assert answers.tokens.shape == (0, CELLS)
    assert answers.q.shape == answers.step.shape == (0,)


@pytest.mark.parametrize(
    ("inputs", "select", "said"),
    [
        (torch.ones(2, 16), "q", r"inputs must be integers, got torch.float32"),
        (torch.ones(2, 16) > 0, "q", r"inputs must be integers, got torch.bool"),
        (torch.ones(2, 15).int(), "q", r"inputs must be \[N, 16\], got \[2, 15\]"),
        (torch.ones(16).int(), "q", r"inputs must be \[N, 16\], got \[16\]"),
        (torch.full((1, 16), VOCAB), "q", r"tokens must be in 0\.\.5"),
        (torch.full((1, 16), -1), "q", r"tokens must be in 0\.\.5"),
        (
            torch.ones(1, 16).int(),
            "first",
            "select must be one of last, q, mode, .*valid, got 'first'",
        ),
    ],
)
def test_predict_refuses(inputs, select, said):
    with pytest.raises(ValueError, match=said):
        predict(tiny_model(), inputs, select=select)


@pytest.mark.parametrize("steps", [0, -1])
def test_no_supervision_steps_is_an_error(steps):
    batch = as_batch([SOLVED + 1], [SOLVED + 1])
    with pytest.raises(ValueError, match=f"depth must be a whole number from 1 to .*, got {steps}"):
        predict(tiny_model(), batch["inputs"], depth=steps)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        evaluate(tiny_model(), [("all", batch, 1)], steps=steps)
