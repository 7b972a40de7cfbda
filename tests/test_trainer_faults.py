"""What a training run survives: gradients and losses that are not finite."""

import math

import pytest
import torch
from training import Recorder, everything, make_config, make_data, make_trainer

from trm_fast import checkpoint
from trm_fast.trainer import TrainingStopped


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path / "data")


def poison(trainer, monkeypatch, steps, what):
    """Make the loss ("loss") or only its gradient ("gradient") NaN at the given steps."""
    real = trainer.forward

    def forward(**kwargs):
        carry, loss, metrics, outputs, done = real(**kwargs)
        if trainer.step in steps:
            loss = loss * math.nan if what == "loss" else _NaNGradient.apply(loss)
        return carry, loss, metrics, outputs, done

    monkeypatch.setattr(trainer, "forward", forward)


class _NaNGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.nan


def test_a_step_without_finite_gradient_changes_nothing(data, tmp_path, monkeypatch):
    reporter = Recorder()
    trainer = make_trainer(make_config(data), tmp_path, reporter)
    poison(trainer, monkeypatch, {2}, "gradient")
    batches = [batch for _, batch, _ in trainer._train_dataset()]
    trainer.train_step(batches[0])
    before = everything(trainer)
    trainer.train_step(batches[1])
    after = everything(trainer)
    untouched = ("model.", "ema.", "state.optimizers.", "state.ema_updates")
    changed = {n for n in before if n.startswith(untouched) and not same(before[n], after[n])}
    assert not changed
    assert trainer.guard.skipped == 1
    assert [step for step, _ in reporter.skipped] == [2]
    trainer.train_step(batches[2])
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert not same(before["model.inner.lm_head.weight"], trainer.model.inner.lm_head.weight)


def same(one, other):
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_repeated_bad_gradients_stop_the_run(data, tmp_path, monkeypatch):
    trainer = make_trainer(make_config(data, max_skipped=3), tmp_path)
    poison(trainer, monkeypatch, {2, 3, 4}, "gradient")
    with pytest.raises(TrainingStopped, match=r"3 gradients in a row .* step 4 \(iteration 0,"):
        trainer.run()


def test_a_bad_loss_stops_the_run_and_keeps_the_last_checkpoint(data, tmp_path, monkeypatch):
    trainer = make_trainer(make_config(data), tmp_path)
    poison(trainer, monkeypatch, {6}, "loss")
    with pytest.raises(TrainingStopped, match=r"the loss is nan at step 6 .*puzzle identifiers"):
        trainer.run()
    saved = checkpoint.load_checkpoint(checkpoint.resolve(tmp_path))
    assert saved.step == 4
    assert all(value.isfinite().all() for value in saved.model.values())
