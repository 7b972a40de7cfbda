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
    real = trainer.train_step.forward

    def forward(**kwargs):
        carry, loss, metrics, outputs, done = real(**kwargs)
        if trainer.step in steps:
            loss = loss * math.nan if what == "loss" else _NaNGradient.apply(loss)
        return carry, loss, metrics, outputs, done

    monkeypatch.setattr(trainer.train_step, "forward", forward)


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
    batches = list(trainer.dataset.choices())
    trainer.advance(*batches[0])
    before = everything(trainer)
    trainer.advance(*batches[1])
    assert reporter.skipped == [], "nobody asked the device yet"
    after = everything(trainer)
    untouched = ("model.", "ema.", "state.optimizers.", "state.ema_updates")
    kept = [n for n in before if n.startswith(untouched) and not n.endswith(".lr")]
    changed = {n for n in kept if not same(before[n], after[n])}
    assert not changed
    trainer.check()
    (told,) = reporter.skipped
    assert told[0] == 2 and told[1].skipped == 1 and math.isnan(told[1].norm)
    trainer.advance(*batches[2])
    trainer.check()
    assert len(reporter.skipped) == 1, "told once"
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert not same(before["model.inner.lm_head.weight"], trainer.model.inner.lm_head.weight)


def same(one, other):
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_repeated_bad_gradients_stop_the_run(data, tmp_path, monkeypatch):
    trainer = make_trainer(make_config(data, max_skipped=3), tmp_path)
    poison(trainer, monkeypatch, {2, 3, 4}, "gradient")
    with pytest.raises(TrainingStopped, match=r"3 gradients in a row .* step 4 \(iteration 0,"):
        trainer.run()


@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_what_went_wrong_between_two_log_lines_costs_nothing(data, tmp_path, monkeypatch, what):
    """The host looks after step 8; from step 3 on no weight has changed any more."""
    straight = make_trainer(make_config(data, steps=2, eval_steps=None), tmp_path / "two")
    straight.run()
    config = make_config(data, log_interval=8, eval_steps=None, max_skipped=2)
    trainer = make_trainer(config, tmp_path / "run")
    poison(trainer, monkeypatch, {3, 4}, what)
    number = 3 if what == "loss" else 4
    with pytest.raises(
        TrainingStopped, match=rf" at step {number} \(iteration 0, .*; no checkpoint"
    ):
        trainer.run()
    assert trainer.step == 8
    for (name, was), (_, now) in zip(
        straight.model.named_parameters(), trainer.model.named_parameters(), strict=True
    ):
        assert torch.equal(was, now), name
    assert not list((tmp_path / "run").glob("step_*"))


def test_a_bad_loss_stops_the_run_and_keeps_the_last_checkpoint(data, tmp_path, monkeypatch):
    trainer = make_trainer(make_config(data), tmp_path)
    poison(trainer, monkeypatch, {6}, "loss")
    with pytest.raises(TrainingStopped, match=r"the loss is nan at step 6 .*identifiers.* is kept"):
        trainer.run()
    saved = checkpoint.load_checkpoint(checkpoint.resolve(tmp_path))
    assert saved.step == 4
    assert all(value.isfinite().all() for value in saved.model.values())


@pytest.mark.parametrize(
    "forge",
    [
        lambda state, weights: state.pop("step"),
        lambda state, weights: state.update(guard=[]),
        lambda state, weights: state.update(carries=[3]),
        lambda state, weights: state.update(optimizers=[]),
        lambda state, weights: state.update(rng={"cpu": torch.zeros(3, dtype=torch.uint8)}),
        lambda state, weights: state.update(best=["x", 1]),
        lambda state, weights: weights.popitem(),
    ],
    ids=["step", "guard", "carries", "optimizers", "rng", "best", "weights"],
)
def test_a_checkpoint_that_is_whole_and_no_state_of_the_run(data, tmp_path, forge):
    trainer = make_trainer(make_config(data, steps=2, eval_steps=None), tmp_path / "run")
    trainer.run()
    saved = checkpoint.load_checkpoint(tmp_path / "run" / "step_2")
    state, weights = dict(saved.train_state), dict(saved.model)
    forge(state, weights)
    parts = {"model": weights, "ema": saved.ema, "config": saved.config, "train_state": state}
    forged = checkpoint.save_checkpoint(tmp_path / "forged", 2, **parts)
    with pytest.raises(checkpoint.CheckpointError, match="is no state of this run") as caught:
        trainer.resume(forged)
    assert "\n" not in str(caught.value)
