"""A run in several processes: written once, measured together, stopped and gone on with."""

import contextlib
import io
import json
import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from answering import boards, save_run, write_data
from processes import free_port, in_processes
from training import Recorder, assert_same, everything, make_config, make_data

from trm_fast import checkpoint, evaluate
from trm_fast.distributed import SINGLE, leave
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


def _evaluated(rank, world, ports, folder, commands):
    """In one of the processes, each `trm-fast evaluate ...`: its status, and what it said."""
    torch.set_num_threads(1)
    found = []
    for port, command in zip(ports, commands, strict=True):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = evaluate.main(command)
        leave()
        found.append((status, out.getvalue(), err.getvalue()))
    torch.save(found, Path(folder, str(rank)))


def test_rollouts_are_measured_together(tmp_path, capsys):
    """Nine boards in uneven parts, one board for two, and what is refused: as one process reports
    it, and said once."""
    inputs, labels = boards(9, seed=3), boards(9, seed=1)
    inputs[:, ::2] = 1  # the seventh, of the second process, takes most passes
    data = write_data(tmp_path / "data", inputs, labels)
    run = save_run(tmp_path / "run", data=data)
    asked = [str(run), "--json", "--device", "cpu", "--depth", "2", "--rollouts", "3"]
    restarts = [*asked, "--preset", "restarts", "--threshold=-0.5", "--batch-size", "2"]
    noise = [*asked, "--noise", "0.5", "--select", "mode", "--max-puzzles", "1"]
    commands = [restarts, noise, [*asked, "--calibrate"], [*asked, "--seed", "-1"]]
    ports = [free_port() for _ in commands]
    mp.spawn(_evaluated, (2, ports, str(tmp_path), commands), 2)
    first, second = (torch.load(tmp_path / str(rank), weights_only=False) for rank in (0, 1))
    for command, told, other in zip(commands[:2], first, second, strict=False):
        assert (told[0], told[2]) == (0, "") and other == (0, "", "")
        assert evaluate.main(command) == 0
        together, alone = (json.loads(text) for text in (told[1], capsys.readouterr().out))
        for document in (together, alone):
            report = document["sets"]["all"]
            for point in (report, *report["by_depth"], *report["by_rollouts"]):
                assert point.pop("seconds") > 0
            assert report.pop("seconds_max") > 0
        (mine,), (theirs,) = (found.pop("sets").values() for found in (together, alone))
        assert together == alone
        assert mine.pop("risk") == theirs.pop("risk")
        for key, value in theirs.items():
            if key.startswith("by_"):
                for point, want in zip(mine[key], value, strict=True):
                    assert point == pytest.approx(want)
            else:
                assert mine[key] == pytest.approx(value), key
    assert mine["puzzles"] == 1
    for told, other, said in (
        (first[2], second[2], "--calibrate is for one process"),
        (first[3], second[3], "--seed must be a whole number from 0 to"),
    ):
        assert told[:2] == (2, "") and told[2].startswith(f"trm-fast evaluate: {said}")
        assert told[2].count("\n") == 1 and other[1:] == ("", "")
