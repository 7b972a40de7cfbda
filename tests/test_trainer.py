"""The training loop: its order, its schedule, what it survives, and that resuming is bitwise."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training import (
    SEQ,
    VOCAB,
    Recorder,
    assert_same,
    everything,
    make_config,
    make_data,
    make_trainer,
)

from trm_fast import checkpoint, flops, memory, optim
from trm_fast.data.dataset import from_arrays
from trm_fast.data.format import Metadata, PuzzleArrays, read_split, write_dataset
from trm_fast.interop import write_official
from trm_fast.losses import ACTLossHead
from trm_fast.model import Model
from trm_fast.trainer import for_device
from trm_fast.training_data import train_dataset


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path / "data")


VARIANTS = {
    "official": {"epochs": 4, "eval_interval": 2, "steps": None, "eval_steps": None},
    "mlp-adamw": {
        "optimizer": "adamw",
        "arch__mlp_t": True,
        "grad_clip": 1.0,
        "ema_warmup": True,
        "augment": "sudoku",
        "curriculum": 0.8,
        "arch__puzzle_emb_ndim": 0,
        "arch__puzzle_emb_len": 0,
        "arch__pos_encodings": "none",
    },
    "muon-accumulate": {"optimizer": "muon", "grad_accum": 2},
    "no-ema": {"ema": False, "arch__dropout": 0.1},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_resuming_is_bitwise_from_every_step(data, tmp_path, changes):
    config = make_config(data, save_interval=1, **changes)
    straight = make_trainer(config, tmp_path / "straight")
    assert straight.run()
    for stop in (1, 4, 5, straight.step - 1):
        again = make_trainer(config, tmp_path / "resumed")
        torch.manual_seed(99)  # whatever the process did before must not matter
        again.resume(tmp_path / "straight" / f"step_{stop}")
        assert again.step == stop
        assert again.run()
        assert_same(everything(straight), everything(again))


def test_a_stopped_run_saves_and_continues(data, tmp_path):
    config = make_config(data, log_interval=1)
    straight = make_trainer(config, tmp_path / "a")
    straight.run()
    reporter = Recorder(stop_at=3)
    first = make_trainer(config, tmp_path / "b", reporter)
    assert first.run() is False
    assert reporter.saved == ["step_3"]
    second = make_trainer(config, tmp_path / "b")
    second.resume(checkpoint.resolve(tmp_path / "b"))
    assert second.run()
    assert_same(everything(straight), everything(second))


@pytest.mark.parametrize("by", ["steps", "epochs"])
def test_an_evaluation_that_was_cut_short_is_made_up_for(data, tmp_path, by, monkeypatch):
    """Stopped between its batches: the state was saved before, and resuming evaluates."""
    changes = {"epochs": 4, "eval_interval": 2, "steps": None, "eval_steps": None}
    config = make_config(data, eval_batch_size=2, **(changes if by == "epochs" else {}))
    first_evaluation = 10 if by == "epochs" else 4
    straight = make_trainer(config, tmp_path / "straight")
    assert straight.run()
    reporter = Recorder()
    cut = make_trainer(config, tmp_path / "cut", reporter)
    asked = []

    def in_the_evaluation():
        asked.append(cut.step)
        return asked.count(first_evaluation) >= (3 if by == "epochs" else 2)

    monkeypatch.setattr(reporter, "wants_to_stop", in_the_evaluation)
    assert cut.run() is False
    assert cut.step == first_evaluation
    assert reporter.evaluations == []
    again_reporter = Recorder()
    again = make_trainer(config, tmp_path / "cut", again_reporter)
    again.resume(checkpoint.resolve(tmp_path / "cut"))
    assert again.run()
    assert [step for step, _ in again_reporter.evaluations] == [first_evaluation, straight.step]
    assert_same(everything(straight), everything(again))


def test_a_crash_in_an_evaluation_loses_no_step(data, tmp_path, monkeypatch):
    trainer = make_trainer(make_config(data), tmp_path)

    def crash():
        raise RuntimeError("killed here")

    monkeypatch.setattr(trainer, "evaluate", crash)
    with pytest.raises(RuntimeError, match="killed here"):
        trainer.run()
    assert checkpoint.load_checkpoint(checkpoint.resolve(tmp_path)).step == 4


def test_steps_are_those_of_the_official_loop(data, tmp_path):
    """Step counted first, loss / batch, rates of the schedule, rows then weights, then the EMA."""
    config = make_config(data, steps=5)
    trainer = make_trainer(config, tmp_path)
    batches = [
        batch for _, batch, _ in train_dataset(trainer.config, trainer.splits, trainer.ranks)
    ][:5]
    torch.manual_seed(config.seed)
    model = Model(trainer.model_config).train()
    head = ACTLossHead(model, config.arch.loss_type)
    rows = optim.SparseEmbeddingSignSGD(model.puzzle_emb.buffers(), 0, 0.1)
    weights = optim.AdamATan2(model.parameters(), 0, (0.9, 0.95), 0.1, model.ops)
    average = {n: p.detach().clone() for n, p in model.named_parameters()}
    carry = None
    for step, batch in enumerate(batches, start=1):
        carry = head.initial_carry(batch) if carry is None else carry
        carry, loss, _, _, _ = head(return_keys=[], carry=carry, batch=batch)
        (loss / 4).backward()
        rate = 1e-2 * (step / 2 if step < 2 else 1)
        for optimizer in (rows, weights):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        for name, p in model.named_parameters():
            average[name] = 0.999 * average[name] + 0.001 * p.detach()
    assert trainer.run()
    for name, value in model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name
    for name, value in average.items():
        torch.testing.assert_close(trainer.ema.shadow[name], value, rtol=1e-6, atol=1e-7)


def test_parts_of_a_batch_give_the_gradient_of_the_whole(data, tmp_path):
    whole = make_trainer(make_config(data), tmp_path)
    parts = make_trainer(make_config(data, grad_accum=2), tmp_path)
    ids = [1, 2, 2, 3]
    for trainer in (whole, parts):
        trainer.advance("all", np.array(ids))  # puzzle k is of identifier k % 4
    for (name, one), (_, two) in zip(
        whole.model.named_parameters(), parts.model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6, msg=name)
    rows = [t.model.puzzle_emb.weights for t in (whole, parts)]
    assert rows[0].abs().sum() > 0
    assert torch.equal(*rows)


def test_a_profile_changes_nothing_else(data, tmp_path):
    reporter = Recorder()
    plain = make_trainer(make_config(data, steps=20), tmp_path / "plain")
    profiled = make_trainer(make_config(data, steps=20, profile=True), tmp_path / "run", reporter)
    for trainer in (plain, profiled):
        trainer.run()
    assert_same(everything(plain), everything(profiled))
    ((step, line),) = reporter.profiles
    assert (step, line) == (17, f"profile of 5 steps: {tmp_path / 'run' / 'profile' / 'ops.txt'}")
    table = json.loads((tmp_path / "run" / "profile" / "ops.json").read_text())
    useful = flops.step_flops(profiled.model_config, "train", 4)
    assert table["useful_gflop"] == useful / 1e9
    assert sum(row["gflop"] or 0 for row in table["ops"]) >= table["useful_gflop"]


def test_a_run_too_short_for_its_profile_says_so(data, tmp_path):
    reporter = Recorder()
    assert make_trainer(make_config(data, profile=True), tmp_path, reporter).run()
    assert reporter.profiles == [(8, "no profile: it takes 17 steps, the run had 8")]


def test_evaluation_by_epochs_as_the_official_loop(data, tmp_path):
    reporter = Recorder()
    config = make_config(
        data, epochs=6, eval_interval=2, min_eval_interval=1, steps=None, eval_steps=None
    )
    trainer = make_trainer(config, tmp_path, reporter)
    assert trainer.total_steps == 30
    trainer.run()
    assert [step for step, _ in reporter.evaluations] == [20, 30]
    assert reporter.saved == ["step_20", "step_30"]


def test_evaluation_and_checkpoints_by_steps(data, tmp_path):
    reporter = Recorder()
    config = make_config(data, steps=10, eval_steps=4, save_interval=3, log_interval=5)
    make_trainer(config, tmp_path, reporter).run()
    assert [step for step, _ in reporter.evaluations] == [4, 8, 10]
    assert reporter.saved == [f"step_{n}" for n in (3, 4, 6, 8, 9, 10)]
    assert [step for step, _ in reporter.steps] == [5, 10]
    assert checkpoint.read_pointer(tmp_path, "last") == "step_10"
    exact = {step: r["all"].exact_accuracy[-1] for step, r in reporter.evaluations}
    best = max(exact, key=lambda step: (exact[step], -step))
    assert checkpoint.read_pointer(tmp_path, "best") == f"step_{best}"


def test_only_the_last_checkpoint_where_so_configured(data, tmp_path):
    reporter = Recorder()
    make_trainer(make_config(data, checkpoint_every_eval=False), tmp_path, reporter).run()
    assert reporter.saved == ["step_8"]


def test_evaluation_uses_the_average_and_leaves_the_weights(data, tmp_path):
    trainer = make_trainer(make_config(data, eval_steps=100), tmp_path)
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    with torch.no_grad():
        for value in trainer.ema.shadow.values():
            value.zero_()
    reports = trainer.evaluate()
    # All-zero weights answer token 0, which no label is.
    assert reports["all"].accuracy[-1] == 0.0
    assert reports["all"].puzzles == 10
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, before[name])
    assert trainer.model.training


def test_outputs_of_an_evaluation_are_saved_as_the_official_code_does(data, tmp_path):
    config = make_config(data, eval_save_outputs=["labels", "preds", "q_halt_logits"])
    trainer = make_trainer(config, tmp_path)
    reports = trainer.evaluate()
    saved = torch.load(tmp_path / "step_0_all_preds.0", weights_only=True)
    assert {name: list(value.shape) for name, value in saved.items()} == {
        "labels": [10, SEQ],
        "preds": [10, SEQ],
        "q_halt_logits": [10],
    }
    accuracy = (saved["preds"] == saved["labels"]).float().mean()
    assert reports["all"].accuracy[-1] == pytest.approx(float(accuracy))


def test_saved_ema_loads_alone(data, tmp_path):
    trainer = make_trainer(make_config(data), tmp_path)
    trainer.run()
    saved = checkpoint.load_checkpoint(tmp_path / "step_8")
    model = Model(saved.config["model"])
    model.load_state_dict(saved.ema, strict=True)
    for name, p in model.named_parameters():
        assert torch.equal(p, trainer.ema.shadow[name.removeprefix("model.")]), name
    assert saved.config["data"]["metadata"]["seq_len"] == SEQ


def test_learning_rate_and_metrics_of_the_log(data, tmp_path):
    reporter = Recorder()
    make_trainer(make_config(data, log_interval=1, steps=4), tmp_path, reporter).run()
    metrics = dict(reporter.steps)
    assert metrics[1]["train/lr"] == pytest.approx(5e-3)
    assert metrics[2]["train/lr"] == pytest.approx(1e-2)
    first = metrics[1]
    # Loss per item: near log(VOCAB) over classes, one BCE at bias -5.
    assert 0.5 < first["train/lm_loss"] < 4
    assert first["train/q_halt_loss"] == pytest.approx(math.log1p(math.exp(-5)), rel=1e-3)
    assert 0 <= metrics[3]["train/accuracy"] <= 1


def test_a_run_that_cannot_fit_is_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match="GiB are free"):
        make_trainer(make_config(data), tmp_path)


def test_data_smaller_than_a_batch_is_refused(data, tmp_path):
    config = make_config(
        data, global_batch_size=64, steps=None, epochs=5, eval_interval=1, eval_steps=None
    )
    with pytest.raises(ValueError, match="fewer examples than global_batch_size=64"):
        make_trainer(config, tmp_path).run()


def test_small_data_is_repeated_when_steps_are_given(data, tmp_path):
    trainer = make_trainer(make_config(data, global_batch_size=64, steps=3), tmp_path)
    assert trainer.run()
    assert trainer.step == 3


def test_weights_to_start_from(data, tmp_path):
    trainer = make_trainer(make_config(data), tmp_path / "a")
    trainer.run()
    official = tmp_path / "step_8"
    write_official(official, trainer.model.state_dict())
    for path in (official, tmp_path / "a"):
        started = make_trainer(make_config(data, load_checkpoint=str(path)), tmp_path / "b")
        expected = trainer.model.inner.lm_head.weight
        if path.is_dir():
            expected = trainer.ema.shadow["inner.lm_head.weight"]
        assert torch.equal(started.model.inner.lm_head.weight, expected)


def test_compiled_step_equals_the_plain_one(data, tmp_path, monkeypatch):
    plain = make_trainer(make_config(data, steps=3), tmp_path / "a")
    plain.run()
    eager = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: eager(module, backend="aot_eager"))
    compiled = make_trainer(make_config(data, steps=3, compile=True), tmp_path / "b")
    compiled.run()
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(compiled.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_steps_beyond_the_estimate_are_not_reported(tmp_path):
    """Groups of uneven puzzles give more batches than `total_steps` estimates."""
    sizes, groups = np.array([10] + [1] * 99), np.array([1, 99])
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCAB, (sizes.sum(), SEQ)).astype(np.uint8)
    ends = [np.concatenate([[0], np.cumsum(part)]).astype(np.int32) for part in (sizes, groups)]
    arrays = PuzzleArrays(tokens, tokens, np.zeros(len(sizes), np.int32), *ends)
    mean = sizes.mean().item()
    metadata = Metadata(0, 0, 0, VOCAB, SEQ, 1, len(groups), mean, len(sizes), ("all",))
    write_dataset(tmp_path / "uneven", {"train": (metadata, {"all": arrays})})
    config = make_config(
        str(tmp_path / "uneven"), steps=None, eval_steps=None, epochs=8, eval_interval=8
    )
    reporter = Recorder()
    trainer = make_trainer(config, tmp_path / "run", reporter)
    assert trainer.run()
    assert trainer.step > trainer.total_steps == 4
    assert [step for step, _ in reporter.steps] == [1, 2, 3, 4]


def test_first_evaluations_are_left_out_by_steps_too(data, tmp_path):
    reporter = Recorder()
    config = make_config(data, steps=8, eval_steps=2, min_eval_interval=2)
    make_trainer(config, tmp_path / "run", reporter).run()
    assert [step for step, _ in reporter.evaluations] == [6, 8]
    assert reporter.saved == ["step_6", "step_8"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"checkpoint_every_eval": False},
        {"checkpoint_every_eval": False, "save_interval": 1},
        {"steps": 6, "eval_steps": 3, "save_interval": 6},
    ],
    ids=["epochs", "last-only", "saved-before-the-end", "steps"],
)
def test_the_last_checkpoint_says_that_the_run_is_finished(data, tmp_path, changes):
    """By epochs it ends short of `total_steps`: short last batches are dropped."""
    by_epochs = {"steps": None, "eval_steps": None, "epochs": 6, "eval_interval": 3}
    config = make_config(data, global_batch_size=8, **{**by_epochs, **changes})
    trainer = make_trainer(config, tmp_path / "run")
    assert trainer.run()
    if not changes.get("steps"):
        assert trainer.step < trainer.total_steps
    path = checkpoint.resolve(tmp_path / "run")
    assert checkpoint.load_checkpoint(path).config["finished"] is True
    again = make_trainer(config, tmp_path / "run")
    again.resume(path)
    assert again.run()
    assert again.step == trainer.step
    assert again.validation.reports.keys() == {"all"}


def test_a_stopped_run_is_not_finished(data, tmp_path):
    trainer = make_trainer(make_config(data), tmp_path / "run", Recorder(stop_at=3))
    trainer.reporter.trainer = trainer
    assert not trainer.run()
    saved = checkpoint.load_checkpoint(checkpoint.resolve(tmp_path / "run"))
    assert saved.config["finished"] is False


def test_resuming_on_other_data_is_refused(data, tmp_path):
    config = make_config(data)
    trainer = make_trainer(config, tmp_path / "run", Recorder(stop_at=3))
    trainer.reporter.trainer = trainer
    trainer.run()
    tokens = np.full((24, SEQ), 2, np.uint8)
    metadata, arrays = from_arrays(tokens, tokens, vocab_size=VOCAB)
    write_dataset(data, {"train": (metadata, {"all": arrays})})
    other = make_trainer(config, tmp_path / "run")
    with pytest.raises(checkpoint.CheckpointError, match=r"total_groups 24 \(was 20\)"):
        other.resume(tmp_path / "run" / "step_3")


def test_resuming_on_other_puzzles_is_refused(data, tmp_path):
    """Of the same number: nothing else of the data says that a row is of another puzzle now."""
    config = make_config(data)
    trainer = make_trainer(config, tmp_path / "run", Recorder(stop_at=3))
    trainer.reporter.trainer = trainer
    trainer.run()
    Path(data, "manifest.json").unlink()  # as data of the official builder
    identifiers = Path(data, "identifiers.json")
    names = identifiers.read_text()
    identifiers.write_text(json.dumps(["<blank>", "c", "b", "a"]))
    other = make_trainer(config, tmp_path / "run")
    with pytest.raises(checkpoint.CheckpointError, match="not what it was: identifiers.json names"):
        other.resume(tmp_path / "run" / "step_3")
    identifiers.write_text(names)
    again = make_trainer(config, tmp_path / "run")
    for record in ({}, {"metadata": 3}):
        assert again.splits.changed(record) == ["nothing says what it was"]
    again.resume(tmp_path / "run" / "step_3")
    assert again.step == 3


def test_resuming_on_arrays_of_another_build_is_refused(data, tmp_path):
    """Of the same sizes: the batches would be others than the run has had."""
    config = make_config(data)
    trainer = make_trainer(config, tmp_path / "run", Recorder(stop_at=3))
    trainer.reporter.trainer = trainer
    trainer.run()
    metadata, arrays = read_split(data, "train")
    other = replace(arrays["all"], inputs=arrays["all"].inputs[::-1].copy())
    splits = {"train": (metadata, {"all": other}), "test": read_split(data, "test")}
    write_dataset(data, splits, ["<blank>", "a", "b", "c"])
    again = make_trainer(config, tmp_path / "run")
    with pytest.raises(checkpoint.CheckpointError, match="it was: the arrays are of another build"):
        again.resume(tmp_path / "run" / "step_3")
    write_dataset(data, splits | {"train": (metadata, arrays)}, ["<blank>", "a", "b", "c"])
    make_trainer(config, tmp_path / "run").resume(tmp_path / "run" / "step_3")


def test_outputs_that_cannot_be_saved_are_one_error(data, tmp_path):
    config = make_config(data, eval_save_outputs=["preds"])
    trainer = make_trainer(config, tmp_path / "run")
    (tmp_path / "run" / "step_0_all_preds.0").mkdir(parents=True)
    with pytest.raises(checkpoint.CheckpointError, match="step_0_all_preds.0: cannot be written"):
        trainer.evaluate()


def test_bfloat16_becomes_float32_on_mps(data, monkeypatch):
    config = make_config(data, arch__forward_dtype="bfloat16")
    assert for_device(config) == config
    monkeypatch.setattr("trm_fast.trainer.pick_device", lambda name: torch.device("mps"))
    assert for_device(config).arch.forward_dtype == "float32"
    half = make_config(data, arch__forward_dtype="float16")
    assert for_device(half) == half
