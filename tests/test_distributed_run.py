"""A run in several processes: written once, measured together, stopped and gone on with."""

from pathlib import Path

import pytest
import torch
from processes import in_processes
from training import Recorder, assert_same, everything, make_config, make_data

from trm_fast import checkpoint
from trm_fast.distributed import SINGLE
from trm_fast.splits import open_splits
from trm_fast.trainer import Trainer, TrainingStopped

SETTINGS = {
    "global_batch_size": 8,
    "log_interval": 1,
    "arch__backend": "reference",
    "eval_max_puzzles": 5,
    "eval_save_outputs": ["inputs", "preds"],
}


def make_run(ranks, data, run_dir, stop_at=None, resume_from=None, **changes):
    config = make_config(data, **(SETTINGS | changes))
    reporter = Recorder(stop_at if ranks.rank == ranks.world - 1 else None)
    return Trainer(config, open_splits(config), Path(run_dir), reporter, resume_from, ranks)


def outcome(trainer):
    """What is to be the same: everything of the run, its evaluations and its log."""
    found = {name: report.to_dict() for name, report in trainer.validation.reports.items()}
    return everything(trainer), found, trainer.reporter.steps


def straight_and_in_two(ranks, data, folder, first):
    """A run from its start to its end; the same stopped, where only the last process is asked to,
    and gone on with; and one that goes on with the checkpoint `first`."""
    dropout = {"arch__dropout": 0.1} if ranks.world > 1 else {}
    straight = make_run(ranks, data, f"{folder}/straight", **dropout)
    assert straight.run()
    stopped = make_run(ranks, data, f"{folder}/stopped", stop_at=3, **dropout)
    assert not stopped.run() and stopped.step == 3
    step = Path(f"{folder}/stopped/step_3")
    resumed = make_run(ranks, data, f"{folder}/stopped", None, step, **dropout)
    assert resumed.run()
    other = make_run(ranks, data, f"{folder}/other", resume_from=first)
    taken_up = everything(other)
    reports = {name: report.to_dict() for name, report in other.evaluate().items()}
    assert other.run()
    return outcome(straight), outcome(resumed), (taken_up, reports), bad_gradient(ranks, data)


def bad_gradient(ranks, data):
    """What is said, and which puzzles are named, where only one process has a loss of NaN."""
    trainer = make_run(ranks, data, "nowhere")
    real = trainer.train_step.forward

    def forward(**kwargs):
        carry, loss, *rest = real(**kwargs)
        return carry, loss * (torch.nan if ranks.rank == ranks.world - 1 else 1), *rest

    trainer.train_step.forward = forward
    trainer.advance(*next(trainer.dataset.choices()))
    with pytest.raises(TrainingStopped) as caught:
        trainer.check()
    bad_rows(ranks, data)
    return str(caught.value)


def bad_rows(ranks, data):
    """Rows whose gradient is NaN in one process only: no process makes the step. Weights that are
    not the same in all are not saved."""
    trainer = make_run(ranks, data, "nowhere")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    if ranks.rank == ranks.world - 1:
        rows = trainer.model.puzzle_emb.local_weights
        rows.register_hook(lambda grad: grad * torch.nan)
    trainer.advance(*next(trainer.dataset.choices()))
    trainer.check()
    ((step, state),) = trainer.reporter.skipped
    assert step == 1 and state.skipped == 1
    assert_same(before, dict(trainer.model.state_dict()))
    if ranks.world > 1:
        with torch.no_grad():
            trainer.model.inner.lm_head.weight[0, 0] += float(ranks.rank)
        with pytest.raises(TrainingStopped, match="the weights of the processes differ at step 1"):
            trainer.save()


def without(flat, part):
    return {name: value for name, value in flat.items() if part not in name}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process: its data, its folder, and what `straight_and_in_two` found."""
    folder = tmp_path_factory.mktemp("alone")
    data = make_data(folder / "data")
    first = make_run(SINGLE, data, folder / "first", stop_at=3)
    first.run()
    step = folder / "first" / "step_3"
    return data, step, straight_and_in_two(SINGLE, data, folder, step)


@pytest.mark.parametrize("world", [2, 4])
def test_a_run_of_several_processes(alone, tmp_path, world):
    data, first, (_, _, (taken_up, reports), said) = alone
    args = (data, str(tmp_path), first)
    found = in_processes(world, straight_and_in_two, *args)

    for mine, resumed, (taken, measured), told in found:
        # Stopped and gone on with, it ends bitwise where it would have ended.
        assert_same(without(resumed[0], "sums"), without(mine[0], "sums"))
        assert resumed[1] == mine[1] == found[0][0][1], "all know all results"
        assert [row for row in mine[2] if row[0] > 3] == resumed[2]
        # What one process saved, several take up, and measure the same boards.
        weights = {n: v for n, v in taken_up.items() if n.startswith(("model.", "ema."))}
        assert_same({n: taken[n] for n in weights}, weights)
        assert measured["all"].pop("puzzles") == 5
        for name, values in measured["all"].items():
            assert values == pytest.approx(reports["all"][name], rel=1e-5, abs=1e-6), name
        assert told.startswith("the loss is nan at step 1 (iteration 0, puzzle identifiers ")
    first_process = found[0]
    assert first_process[3] == said, "it names the puzzles of all"
    assert_same(without(first_process[2][0], "rng"), without(taken_up, "rng"))

    # The files are those of one process, and one process goes on with them.
    run = tmp_path / "stopped"
    assert {p.name for p in run.iterdir()} == {
        "last", "best", "step_3", "step_4", "step_8",
        *(f"step_{step}_all_preds.{rank}" for step in (4, 8) for rank in range(world)),
    }  # fmt: skip
    assert checkpoint.load_checkpoint(run / "step_3").config["model"]["batch_size"] == 8
    again = make_run(SINGLE, data, tmp_path / "again", resume_from=run / "step_3")
    assert again.step == 3 and again.run()
    sizes = [len(torch.load(run / f"step_4_all_preds.{r}")["preds"]) for r in range(world)]
    assert sizes == {2: [4, 1], 4: [2, 2, 1, 0]}[world]
