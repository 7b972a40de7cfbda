"""Losses and metrics of a supervision step, against loops over single boards and cells."""

import math

import pytest
import torch
from parity import make_inputs
from tiny import MIXERS, compilable, tiny_batch, tiny_model
from torch import nn

from trm_fast.losses import (
    LOSSES,
    ACTLossHead,
    softmax_cross_entropy,
    stablemax_cross_entropy,
)
from trm_fast.recursion import Carry, State

IGNORED = -100
METRICS = ["count", "accuracy", "exact_accuracy", "q_halt_accuracy", "steps"]


def stablemax(values):
    """Probabilities of one cell."""
    s = [x + 1 if x >= 0 else 1 / (1 - x) for x in values]
    return [x / sum(s) for x in s]


def softmax(values):
    top = max(values)
    s = [math.exp(x - top) for x in values]
    return [x / sum(s) for x in s]


PROBABILITIES = {"stablemax_cross_entropy": stablemax, "softmax_cross_entropy": softmax}


def cell_losses(name, logits, labels):
    return [
        [
            0.0 if label == IGNORED else -math.log(PROBABILITIES[name](cell)[label])
            for cell, label in zip(board, row, strict=True)
        ]
        for board, row in zip(logits.tolist(), labels.tolist(), strict=True)
    ]


class Scripted(nn.Module):
    """A model whose outputs are given; the carry says which boards halted after how many steps."""

    def __init__(self, outputs, labels, steps, halted):
        super().__init__()
        self.outputs = outputs
        self.carry = Carry(State(None, None), steps, halted, {"labels": labels})

    def initial_carry(self, batch):
        return ("carry of", batch)

    def forward(self, carry, batch):
        return self.carry, dict(self.outputs)


def scripted(ids=4, cells=5, classes=6, *, halted=None, labels=None, wanted=None, more=None):
    """A head on random logits; the first board's answer is right in every cell that counts."""
    logits, q_halt, q_continue = make_inputs(
        (ids, cells, classes), (ids,), (ids,), scale=2.0, requires_grad=True
    )
    if labels is None:
        labels = tiny_batch(ids, length=cells)["labels"] % classes
        labels[1, 0], labels[1, 1] = IGNORED, 3
        labels[0] = logits.argmax(-1)[0]
        labels[0, 2] = IGNORED
    steps = torch.arange(1, ids + 1, dtype=torch.int32)
    halted = torch.ones(ids, dtype=torch.bool) if halted is None else torch.tensor(halted)
    outputs = {"logits": logits, "q_halt_logits": q_halt, "q_continue_logits": q_continue}
    model = Scripted(outputs | (more or {}), labels, steps, halted)
    head = ACTLossHead(model, wanted or "stablemax_cross_entropy")
    return head, model, labels


def looped(model, labels, name):
    """Loss and metrics of one step, board by board in Python."""
    logits, q_halt = model.outputs["logits"], model.outputs["q_halt_logits"].tolist()
    totals = dict.fromkeys([*METRICS, "lm_loss", "q_halt_loss"], 0.0)
    per_cell = cell_losses(name, logits, labels)
    for i, row in enumerate(labels.tolist()):
        valid = [j for j, label in enumerate(row) if label != IGNORED]
        right = [j for j in valid if int(logits[i, j].argmax()) == row[j]]
        solved = len(right) == len(valid)
        totals["lm_loss"] += sum(per_cell[i]) / max(len(valid), 1)
        q = q_halt[i]
        totals["q_halt_loss"] += math.log1p(math.exp(-q)) if solved else math.log1p(math.exp(q))
        if bool(model.carry.halted[i]) and valid:
            totals["count"] += 1
            totals["accuracy"] += len(right) / len(valid)
            totals["exact_accuracy"] += solved
            totals["q_halt_accuracy"] += (q >= 0) == solved
            totals["steps"] += int(model.carry.steps[i])
    return totals["lm_loss"] + 0.5 * totals["q_halt_loss"], totals


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_of_every_cell(name, dtype):
    (logits,) = make_inputs((3, 5, 7), dtype=dtype, scale=2.0, requires_grad=True)
    labels = tiny_batch(3, length=5)["labels"] % 7
    labels[2] = IGNORED
    loss = LOSSES[name](logits, labels)
    assert loss.dtype == (torch.float64 if name.startswith("stable") else torch.float32)
    want = torch.tensor(cell_losses(name, logits, labels), dtype=torch.float64)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    loss.sum().backward()
    assert logits.grad.dtype == dtype
    assert torch.equal(logits.grad[2], torch.zeros(5, 7, dtype=dtype))
    if dtype == torch.float32:
        probabilities = PROBABILITIES[name]
        shift = 1e-4
        moved = logits.detach().double()[0, 1].tolist()
        label = int(labels[0, 1])
        moved[2] += shift
        up = -math.log(probabilities(moved)[label])
        moved[2] -= 2 * shift
        slope = (up + math.log(probabilities(moved)[label])) / (2 * shift)
        assert logits.grad[0, 1, 2].item() == pytest.approx(slope, abs=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_ignore_index_and_mask(name):
    (logits,) = make_inputs((2, 3, 5))
    labels = torch.tensor([[0, 1, 2], [4, 0, 3]], dtype=torch.int32)
    plain = LOSSES[name](logits, labels)
    assert (plain > 0).all()
    ignoring = LOSSES[name](logits, labels, ignore_index=0)
    assert torch.equal(ignoring, torch.where(labels == 0, 0, plain))
    mask = torch.tensor([[True, False, True], [False, True, True]])
    assert torch.equal(LOSSES[name](logits, labels, valid_mask=mask), torch.where(mask, plain, 0))
    both = LOSSES[name](logits, labels, ignore_index=0, valid_mask=mask)
    assert torch.equal(both, torch.where(mask, plain, 0))  # the mask replaces the index


def test_stablemax_runs_on_the_ops_given():
    calls = []

    class Fake:
        def stablemax_loss(self, logits, labels):
            calls.append(labels.tolist())
            return torch.ones(labels.shape), None, None

    logits, labels = torch.zeros(1, 2, 3), torch.tensor([[0, 7]])
    out = stablemax_cross_entropy(logits, labels, ignore_index=7, ops=Fake())
    assert torch.equal(out, torch.ones(1, 2))
    assert calls == [[[0, IGNORED]]]
    softmax_cross_entropy(logits, labels, ignore_index=7, ops=Fake())  # has no fused form


def test_softmax_of_float64_stays_float64():
    (logits,) = make_inputs((1, 2, 3), dtype=torch.float64)
    assert softmax_cross_entropy(logits, torch.tensor([[0, 1]])).dtype == torch.float64


@pytest.mark.parametrize("name", ["stablemax_cross_entropi", "softmax_crossentropy", "zzz"])
def test_unknown_loss(name):
    with pytest.raises(ValueError) as error:
        ACTLossHead(nn.Identity(), name)
    text = str(error.value)
    assert text.startswith(f"unknown loss_type {name!r}")
    assert text.endswith("allowed: stablemax_cross_entropy, softmax_cross_entropy")
    assert ("did you mean" in text) == (name != "zzz")


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("halted", [[True] * 4, [True, False, True, False], [False] * 4], ids=str)
def test_metrics_against_a_loop(name, halted):
    head, model, labels = scripted(halted=halted, wanted=name)
    carry, loss, metrics, outputs, all_halted = head(return_keys=[], carry=None, batch=None)
    want_loss, want = looped(model, labels, name)
    assert carry is model.carry
    assert outputs == {}
    assert bool(all_halted) == all(halted)
    assert list(metrics) == list(want)
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())
    for key, value in want.items():
        assert float(metrics[key]) == pytest.approx(value, rel=1e-5), key
    assert loss.item() == pytest.approx(want_loss, rel=1e-5)
    if halted[0]:
        assert int(metrics["exact_accuracy"]) == 1


def test_gradient_of_the_total_loss():
    head, model, labels = scripted()
    _, loss, _, _, _ = head(return_keys=[], carry=None, batch=None)
    loss.backward()
    logits = model.outputs["logits"].detach().double().requires_grad_()
    q_halt = model.outputs["q_halt_logits"].detach().double().requires_grad_()
    counts = (labels != IGNORED).sum(-1, keepdim=True).clamp_min(1)
    solved = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    q_loss = nn.functional.softplus(q_halt) - q_halt * solved
    exact = (stablemax_cross_entropy(logits, labels) / counts).sum() + 0.5 * q_loss.sum()
    exact.backward()
    got = model.outputs["logits"].grad
    torch.testing.assert_close(got.double(), logits.grad, rtol=1e-6, atol=1e-9)
    got = model.outputs["q_halt_logits"].grad
    torch.testing.assert_close(got.double(), q_halt.grad, rtol=1e-6, atol=1e-9)
    assert model.outputs["q_continue_logits"].grad is None


def test_padded_rows_count_in_the_halting_loss_only():
    """A row without labels is solved by definition: log(1 + e^5) at the initial logit of -5."""
    labels = torch.full((4, 5), IGNORED)
    labels[0] = 1
    q_halt = torch.full((4,), -5.0)
    head, model, _ = scripted(labels=labels, more={"q_halt_logits": q_halt})
    _, loss, metrics, _, _ = head(return_keys=[], carry=None, batch=None)
    assert int(metrics["count"]) == 1
    assert int(metrics["steps"]) == 1
    padded = 3 * math.log1p(math.exp(5))
    first = metrics["q_halt_loss"].item() - padded
    assert first == pytest.approx(math.log1p(math.exp(-5)), abs=1e-4)
    _, alone_loss, _, _, _ = ACTLossHead(
        Scripted(
            {"logits": model.outputs["logits"][:1], "q_halt_logits": q_halt[:1]},
            labels[:1],
            torch.ones(1),
            torch.ones(1, dtype=torch.bool),
        ),
        "stablemax_cross_entropy",
    )(return_keys=[], carry=None, batch=None)
    assert loss.item() == pytest.approx(alone_loss.item() + 0.5 * padded, rel=1e-6)


def test_all_labels_ignored():
    head, model, _ = scripted(labels=torch.full((4, 5), IGNORED))
    _, loss, metrics, _, _ = head(return_keys=[], carry=None, batch=None)
    assert [float(metrics[name]) for name in [*METRICS, "lm_loss"]] == [0.0] * 6
    loss.backward()
    assert torch.equal(model.outputs["logits"].grad, torch.zeros(4, 5, 6))
    assert torch.isfinite(model.outputs["q_halt_logits"].grad).all()


def test_halting_is_right_from_zero_on():
    labels = torch.zeros(4, 5, dtype=torch.int32)
    logits = torch.zeros(4, 5, 6)
    logits[:2, :, 0] = 1.0  # the first two boards are solved
    logits[2:, :, 1] = 1.0
    q_halt = torch.tensor([0.0, 0.0, 0.0, -0.1])
    more = {"logits": logits, "q_halt_logits": q_halt}
    head, _, _ = scripted(labels=labels, more=more)
    metrics = head(return_keys=[], carry=None, batch=None)[2]
    assert int(metrics["q_halt_accuracy"]) == 3  # solved at 0 twice, unsolved at -0.1
    assert int(metrics["exact_accuracy"]) == 2
    assert metrics["accuracy"].item() == 2


def test_continue_target():
    target = torch.tensor([0.25, 0.5, 0.75, 1.0])
    head, model, labels = scripted(more={"target_q_continue": target})
    _, loss, metrics, _, _ = head(return_keys=[], carry=None, batch=None)
    q = model.outputs["q_continue_logits"].tolist()
    want = sum(math.log1p(math.exp(x)) - x * t for x, t in zip(q, target.tolist(), strict=True))
    assert metrics["q_continue_loss"].item() == pytest.approx(want, rel=1e-5)
    without, _ = looped(model, labels, "stablemax_cross_entropy")
    assert loss.item() == pytest.approx(without + 0.5 * want, rel=1e-5)
    loss.backward()
    got = model.outputs["q_continue_logits"].grad
    torch.testing.assert_close(got, 0.5 * (torch.tensor(q).sigmoid() - target))


def test_return_keys():
    head, model, _ = scripted()
    keys = ["preds", "q_halt_logits", "nonsense", "logits"]
    returned = head(return_keys=keys, carry=None, batch=None)[3]
    assert set(returned) == {"preds", "q_halt_logits", "logits"}
    assert not any(value.requires_grad for value in returned.values())
    assert torch.equal(returned["preds"], model.outputs["logits"].argmax(-1))
    assert torch.equal(returned["logits"], model.outputs["logits"])
    assert returned["preds"].dtype == torch.int64


def test_initial_carry_is_the_models():
    head, _, _ = scripted()
    assert head.initial_carry("batch") == ("carry of", "batch")
    assert head.model is head.model


@pytest.mark.parametrize("mixer", MIXERS)
def test_steps_and_count_of_a_real_model(mixer):
    """In evaluation every board halts at the last step, so those metrics are known."""
    model = tiny_model(halt_max_steps=3, **MIXERS[mixer]).eval()
    head = ACTLossHead(model, "stablemax_cross_entropy")
    batch = tiny_batch()
    batch["labels"][2] = IGNORED
    carry = head.initial_carry(batch)
    for step in (1, 2, 3):
        carry, loss, metrics, outputs, done = head(
            return_keys=["preds", "logits"], carry=carry, batch=batch
        )
        assert bool(done) == (step == 3)
        assert int(metrics["count"]) == (3 if step == 3 else 0)
    assert int(metrics["steps"]) == 9
    right = (outputs["preds"] == batch["labels"]).sum(-1) / (
        (batch["labels"] != IGNORED).sum(-1).clamp_min(1)
    )
    assert metrics["accuracy"].item() == pytest.approx(right.sum().item())
    assert torch.isfinite(loss)


SHALLOW = {"H_cycles": 2, "L_cycles": 1, "halt_exploration_prob": 0.5}


@pytest.mark.parametrize("mixer", MIXERS)
def test_compiled_without_a_graph_break_equals_eager(mixer, monkeypatch):
    compilable(monkeypatch)

    def two_steps(compiled):
        model = tiny_model(**SHALLOW, **MIXERS[mixer])
        head = ACTLossHead(model, "stablemax_cross_entropy")
        run = torch.compile(head, fullgraph=True, backend="aot_eager") if compiled else head
        carry = head.initial_carry(tiny_batch())
        torch.manual_seed(5)
        found = []
        for step in range(2):
            carry, loss, metrics, _, _ = run(
                return_keys=[], carry=carry, batch=tiny_batch(seed=step)
            )
            loss.backward()
            found += [loss, *metrics.values(), carry.steps, carry.inner_carry.z_H]
        return found + [p.grad for p in model.parameters()] + [model.puzzle_emb.local_weights.grad]

    for got, want in zip(two_steps(True), two_steps(False), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("mixer, name", zip(MIXERS, LOSSES, strict=True))
def test_head_around_a_compiled_model(mixer, name, monkeypatch):
    compilable(monkeypatch)
    model = tiny_model(**SHALLOW, **MIXERS[mixer])
    batch = tiny_batch()
    carry = model.initial_carry(batch)
    results = []
    for inner in (model, torch.compile(model, fullgraph=True, backend="eager")):
        head = ACTLossHead(inner, name)
        torch.manual_seed(5)
        _, loss, _, _, _ = head(return_keys=[], carry=carry, batch=batch)
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
