"""A training job from settings to exit status: data, run folder, signals, what the user sees.

Owns everything around `Trainer` that belongs to a person at a terminal. Imported by `train.py`.
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from trm_fast import backends, memory
from trm_fast.capture import graphs_allowed
from trm_fast.checkpoint import CheckpointError, passed_over
from trm_fast.config import ModelConfig, TrainConfig, option_fields
from trm_fast.console import program, say
from trm_fast.data.maze_generator import maze_job_data
from trm_fast.data.sudoku import split_of_csv
from trm_fast.data.sudoku_generator import default_job_data
from trm_fast.distributed import SINGLE, Elsewhere, RankLost, Ranks, asked_for, join, leave
from trm_fast.durable import one_line
from trm_fast.evaluators import score_line
from trm_fast.extension import library
from trm_fast.extension.build import BuildError
from trm_fast.inference import SetReport
from trm_fast.interop import write_official
from trm_fast.loading import pick_device
from trm_fast.optim import GuardState
from trm_fast.overrides import emit_yaml, format_value
from trm_fast.progress import MetricsError, MetricsWriter, StatusLine, make_loggers, read_metrics
from trm_fast.runs import Place, RunLock, latest, place
from trm_fast.splits import Splits, open_splits
from trm_fast.summary import summarize
from trm_fast.trainer import Reporter, Trainer, TrainingStopped, for_device
from trm_fast.viz import learning_curve


class Signals:
    """SIGINT and SIGTERM, noted instead of obeyed while active; a second SIGINT ends at once.

    Args:
        ranks: of several processes the first one says that it was noted. Under a launcher, which
            passes on what the terminal sent to all anyway, further ones are ignored.
    """

    def __init__(self, ranks: Ranks = SINGLE) -> None:
        self.received: int | None = None
        self._speaks, self._launched = ranks.first, "WORLD_SIZE" in os.environ
        self._before: dict[int, object] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.received == signal.SIGINT and number == signal.SIGINT
        if again and not self._launched:
            raise KeyboardInterrupt
        if self.received is None and self._speaks:
            text = b"\nstopping: the run is saved after this step or evaluation batch\n"
            os.write(sys.stderr.fileno(), text)  # a handler must not use buffered streams
        self.received = number


class Console(Reporter):
    """The Reporter of the command line: status line, metric files, trackers, official files."""

    def __init__(
        self, spot: Place, total_steps: int, signals: Signals, lock: RunLock | None = None
    ) -> None:
        config, self.run_dir, self.signals = spot.config, spot.run_dir, signals
        self.lock = lock
        self.config = config
        self.writer = MetricsWriter(self.run_dir, spot.resume_step)
        rows = read_metrics(self.run_dir)
        self.evaluated = {row["step"] for row in rows if _is_evaluation(row)}
        self._told = spot.resume_step or 0  # the step of the last line
        self.status = StatusLine(total_steps, start=self._told)
        self.trackers = make_loggers(
            config.logger,
            project=config.project_name or "trm_fast",
            run_name=config.run_name or self.run_dir.name,
            config=config.to_dict(),
            run_dir=self.run_dir,
            resume_step=spot.resume_step,
        )

    def on_step(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        self._log(trainer.step, metrics)
        boards = (trainer.step - self._told) * self.config.global_batch_size
        self._told = trainer.step
        exact = metrics["train/exact_accuracy"]
        self.status.update(trainer.step, metrics["train/lm_loss"], exact, boards)

    def on_evaluation(self, trainer: Trainer, reports: dict[str, SetReport]) -> None:
        metrics: dict[str, float] = {}
        for name, report in reports.items():
            metrics |= {f"{name}/{key}": value for key, value in report.metrics().items()}
            self.status.message(f"step {trainer.step}  {_sentence(name, report)}")
        found = trainer.validation
        if found.scores:
            line = score_line(found.scores, found.evaluators.unanswered)
            self.status.message(f"step {trainer.step}  {line}")
        if trainer.step not in self.evaluated:  # made again to show a finished run
            self._log(trainer.step, metrics | found.scores | found.evaluators.counts)

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        if self.config.official:
            folder = self.run_dir / "official"
            write_official(folder / path.name, trainer.official_weights())
            settings = emit_yaml(trainer.config.official_dict())
            (folder / "all_config.yaml").write_text(settings, encoding="utf-8")

    def on_skip(self, trainer: Trainer, state: GuardState) -> None:
        self._log(trainer.step, {"train/skipped": float(state.skipped)})
        # Which steps were left out is known of the last one only, and where it ends the run.
        where = f"step {state.stopped_at}" if state.stopped_at else f"by step {trainer.step}"
        self.status.message(
            f"{where}  the norm of a gradient was {state.norm}: step left out "
            f"({state.consecutive} in a row, {state.skipped} in all)"
        )

    def on_profile(self, trainer: Trainer, line: str) -> None:
        self.status.message(line)

    def wants_to_stop(self) -> bool:
        if self.lock is not None:
            self.lock.check()
        return self.signals.received is not None

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        self.writer.write(step, metrics)
        for tracker in self.trackers:
            tracker.log(step, metrics)

    def close(self) -> None:
        self.status.close()
        for tracker in self.trackers:
            tracker.close()


class Listener(Reporter):
    """The Reporter of all processes but the first: it only passes on that the run is to stop."""

    def __init__(self, signals: Signals) -> None:
        self.signals = signals

    def wants_to_stop(self) -> bool:
        return self.signals.received is not None

    def close(self) -> None:
        """Nothing is open."""


def _is_evaluation(row: dict[str, Any]) -> bool:
    names = (name for name in row if name.endswith("/exact_accuracy"))
    return any(not name.startswith("train/") for name in names)


def _sentence(name: str, report: SetReport) -> str:
    valid = f", valid {report.valid[-1]:.1%}" if report.valid else ""
    return (
        f"{name}: exact {report.exact_accuracy[-1]:.1%} (best-q {report.best_q_exact_accuracy:.1%})"
        f"{valid}, cells {report.accuracy[-1]:.1%}, {report.puzzles} boards"
    )


def train(config: TrainConfig) -> int:
    """Run a job, alone or as one of the processes that a launcher such as torchrun made; returns
    the exit status that `train.main` documents."""
    lost, ranks = "nothing was trained", SINGLE
    try:
        asked = asked_for()
        ranks = join(asked, asked.device(pick_device(config.device)))
        ranks.together(lambda: config.local_batch_size(ranks.world))
        ranks.in_turn(lambda: _check_machine(config))
        with_data = ranks.in_turn(lambda: _with_data(config, ranks))
        lost = "what came after the last checkpoint is not saved"
        run = _run_seeds if config.seeds > 1 else _run
        status, _ = run(with_data, ranks)
    except RankLost as error:
        say(f"trm-fast train: {error}; {lost}", err=True)
        return 1
    except TrainingStopped as error:
        if ranks.first:  # it is the same for all
            say(f"trm-fast train: {error}", err=True)
        status = 1
    except Elsewhere:
        status = 1
    # From here on perhaps of this process alone: it ends, and the others notice.
    except (CheckpointError, MetricsError) as error:
        say(f"trm-fast train: {error}", err=True)
        return 1
    except (BuildError, ValueError, OSError) as error:
        say(f"trm-fast train: {error}", err=True)
        return 2
    except MemoryError:
        say("trm-fast train: not enough memory for so many boards", err=True)
        return 2
    except RuntimeError as error:
        if not memory.is_exhausted(error):
            raise
        less = "arch.policy=recompute or a smaller batch needs less"
        say(f"trm-fast train: out of memory: {one_line(error)}; {less}; {lost}", err=True)
        return 1
    except KeyboardInterrupt:
        say(f"interrupted; {lost}", err=True)
        return 130
    leave()
    return status


def _check_machine(config: TrainConfig) -> None:
    """What may be refused or take a minute, before the data is made: the device, the compiled
    extension, the backend that was asked for.

    Raises:
        ValueError: the device is not there, the backend does not serve it, or
            TRM_FAST_CUDA_GRAPH is not 0 or 1.
        BuildError: of TRM_FAST_EXT=require.
    """
    config = for_device(config)
    device = pick_device(config.device)
    graphs_allowed()
    if device.type == "cpu" and config.arch.backend in ("auto", "cpp"):
        library.unavailable("cpu")
    backends.check_device(config.arch.backend, device, getattr(torch, config.arch.forward_dtype))


def _with_data(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """The settings with `generate` replaced by the folder of the generated data."""
    tell = say if ranks.first else _nothing
    if not config.generate:
        return _with_csv(config, tell)
    puzzle = config.generate_puzzle
    root = Path("data", f"{puzzle}-mini-{config.generate}")
    began = time.monotonic()
    noun = {"sudoku": "boards", "maze": "mazes"}[puzzle]
    before = root.stat().st_ino if root.exists() else None
    if before is None:
        tell(f"data        generating {config.generate:,} {noun}")
    make = {"sudoku": default_job_data, "maze": maze_job_data}[puzzle]
    make(root, seed=0, train_boards=config.generate)
    again = before not in (None, root.stat().st_ino)
    why = ", made again: what was there was damaged or of another request" if again else ""
    seconds = time.monotonic() - began
    tell(f"data        {root}, {config.generate} training {noun}, {seconds:.1f} s{why}")
    project = config.project_name or f"{puzzle.capitalize()}-mini"
    return config.replace({"data_paths": [str(root)], "project_name": project})


def _nothing(text: str) -> None:
    """What all processes but the first say."""


def _with_csv(config: TrainConfig, tell: Callable[[str], None]) -> TrainConfig:
    """The settings with each puzzle file among the data replaced by the folder made of it."""
    paths = []
    for path in config.data_paths:
        if path.lower().endswith((".csv", ".txt")) and not Path(path).is_dir():
            began = time.monotonic()
            tell(f"data        reading {path}")
            folder = split_of_csv(path, "data")
            tell(f"data        {folder} of {path}, {time.monotonic() - began:.1f} s")
            path = str(folder)
        paths.append(path)
    return config if paths == list(config.data_paths) else config.replace({"data_paths": paths})


def _run_seeds(config: TrainConfig, ranks: Ranks) -> tuple[int, Trainer]:
    """The job once per seed, then mean and spread of the last accuracies; as `_run` returns."""
    tell = say if ranks.first else _nothing
    base = ranks.of_first(config.with_names)
    finals: dict[str, list[float]] = {}
    for seed in range(config.seed, config.seed + config.seeds):
        tell(f"--- seed {seed} ---")
        # seeds=1, so that what stopped one of them is continued as the run that it is.
        own = {"seed": seed, "seeds": 1, "run_name": f"{base.run_name}-seed{seed}"}
        folder = f"{base.checkpoint_path}-seed{seed}"
        status, trainer = _run(base.replace({**own, "checkpoint_path": folder}), ranks)
        if status != 0:
            return status, trainer
        for set_name, report in trainer.validation.reports.items():
            for answer, value in (
                ("last step", report.exact_accuracy[-1]),
                ("best-q", report.best_q_exact_accuracy),
            ):
                finals.setdefault(f"{set_name} exact, {answer}", []).append(value)
    tell(f"--- {config.seeds} seeds ---")
    for label, values in finals.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        shown = ", ".join(f"{value:.1%}" for value in values)
        tell(f"{label}: mean {statistics.mean(values):.1%}, deviation {spread:.1%} ({shown})")
    return 0, trainer


def _run(config: TrainConfig, ranks: Ranks) -> tuple[int, Trainer]:
    """One run; its exit status and the trainer as it ended."""
    config = for_device(config)
    splits = ranks.together(lambda: open_splits(config))
    firsts = ranks.of_first(lambda: splits)
    ranks.together(lambda: _check_same_data(splits, firsts, ranks))
    total = config.total_steps(splits.train.total_groups, splits.train.mean_puzzle_examples)
    spot = ranks.of_first(lambda: place(config, total))
    lock = ranks.together(lambda: RunLock(spot.run_dir) if ranks.first else None)
    try:
        with Signals(ranks) as signals:
            spot = ranks.of_first(lambda: latest(spot))
            return _run_locked(spot, splits, total, signals, ranks, lock)
    finally:
        if lock is not None:
            lock.release()


def _check_same_data(splits: Splits, firsts: Splits, ranks: Ranks) -> None:
    if words := splits.unlike(firsts):
        raise ValueError(
            f"process {ranks.rank} has other data in {', '.join(splits.paths)} than the first: "
            f"{', '.join(words[:3])}"
        )


def _run_locked(
    spot: Place,
    splits: Splits,
    total: int,
    signals: Signals,
    ranks: Ranks,
    lock: RunLock | None,
) -> tuple[int, Trainer]:
    console = ranks.together(
        lambda: Console(spot, total, signals, lock) if ranks.first else Listener(signals)
    )
    try:
        trainer = Trainer(spot.config, splits, spot.run_dir, console, spot.resume_from, ranks)
        ranks.together(lambda: _announce(trainer, spot) if ranks.first else None)
        began = time.monotonic()
        finished = trainer.run()
        seconds = time.monotonic() - began
    finally:
        console.close()
    ranks.together(lambda: _conclude(trainer, spot, seconds, finished) if ranks.first else None)
    # A signal during the last evaluation came too late to stop this run, not the next seed's.
    received = max(ranks.numbers(signals.received or 0))
    if not finished:
        received = received or signal.SIGINT
    return 128 + received if received else 0, trainer


def _conclude(trainer: Trainer, spot: Place, seconds: float, finished: bool) -> None:
    """The last words of a run that came to its end, or was stopped."""
    if not finished:
        several = " the same command under the launcher, or in one process" * (
            trainer.ranks.world > 1
        )
        say(f"stopped at step {trainer.step}; everything is saved. Go on with{several}:")
        say(f"  {program()} -m trm_fast.train resume={spot.run_dir}")
        return
    summarize(trainer, seconds, spot.resume_step or 0)
    picture = spot.run_dir / "learning_curve.png"
    say(learning_curve(read_metrics(spot.run_dir), picture) or f"curve       {picture}")


def _engine(trainer: Trainer) -> str:
    """Whose recursion trains, and why not a faster one where that is plain PyTorch."""
    # Where the recursion is composed, this is the operation that takes most of its time.
    config = trainer.model_config
    if config.kind == "gated_mlp":
        return "plain PyTorch"
    mixed = config.mixes_states(training=True)
    op = "deep_recursion" if config.kind == "trm" and not mixed else "swiglu_rmsnorm"
    if config.dropout:  # no fused recursion drops anything
        op = "residual_rmsnorm"
    (row,) = (r for r in trainer.model.backend_report() if r.op == op)
    if trainer.config.arch.backend == "reference":
        return "reference"
    if row.implementation != "reference":
        when = "" if config.mixes_states(training=False) else " in training"
        return row.implementation + (f", the recursion composed{when}" if mixed else "")
    mine = {"cpu": "cpp: ", "cuda": "triton: "}.get(trainer.device.type, " ")
    why = next((r for r in row.reason.split("; ") if r.startswith(mine)), "")
    return f"plain PyTorch; {why}" if why else "plain PyTorch"


def _depth_options(config: TrainConfig) -> str:
    """Those of docs/training-options.md that are not the default."""
    keys = ("act_enabled", "random_init", "noise", "damping", "latents")
    stages = f"[{', '.join(config.depth_stages)}]"
    words = [f"depth_stages={stages}"] if config.depth_stages else []
    given = {"step_loss_decay": config.step_loss_decay}
    given |= {f"arch.{key}": getattr(config.arch, key) for key in keys}
    usual = option_fields()
    words += [f"{k}={format_value(v)}" for k, v in given.items() if v != usual[k].default]
    return " ".join(words)


def _products(config: ModelConfig) -> str:
    """What is made of 8-bit numbers, and when: `arch.quantize` in words."""
    where = "in evaluations and answers"
    if config.quantize == "fp8":
        if config.dropout:
            where += " only: training drops"
        elif config.kind == "trm" and config.H_cycles == 1:
            where += " only: with arch.H_cycles=1 no cycle of training is without a gradient"
        else:
            where += ", and in training cycles without a gradient"
    return f"{config.quantize} {where}"


def _announce(trainer: Trainer, spot: Place) -> None:
    parameters = sum(p.numel() for p in trainer.model.parameters())
    say(f"run folder  {spot.run_dir}")
    if spot.resume_from is not None:
        asked = Path(spot.config.resume).name
        if asked != spot.resume_from.name and (fault := passed_over(spot.resume_from)):
            say(f"going on    {fault}")
        begins = "measured again" if trainer.finished else "a new run_name= starts anew"
        ends = ", the end of the run" if trainer.finished else ""
        say(f"going on    from step {trainer.step}{ends} ({begins})")
    say(
        f"model       {parameters:,} parameters, {trainer.config.arch.forward_dtype}, "
        f"on {trainer.device} ({_engine(trainer)})"
    )
    if options := _depth_options(trainer.config):
        say(f"options     {options}")
    if trainer.model_config.quantize != "none":
        say(f"products    {_products(trainer.model_config)}")
    if trainer.ranks.world > 1:
        each = trainer.model_config.batch_size
        say(f"processes   {trainer.ranks.world}, {each} boards of every step in each")
    say(
        f"training    {trainer.total_steps} steps of {trainer.config.global_batch_size} boards, "
        f"about {trainer.step_bytes / memory.GIB:.2f} GiB"
    )
    if trainer.kept_rows is not None:
        rows = trainer.model_config.num_puzzle_identifiers
        say(f"puzzle rows {trainer.kept_rows} of {rows} as trained, the others their mean row")
    if trainer.config.curriculum:
        until = int(trainer.config.curriculum * trainer.total_steps)
        say(f"curriculum  cells given away fade out by step {until}: till then boards get harder")
    if trainer.splits.test is None:
        say("evaluation  none: the data has no test split")
    if trainer.validation.evaluators.left_out and trainer.splits.test is not None:
        left_out = ", ".join(trainer.validation.evaluators.left_out)
        say(f"evaluators  none for this data: {left_out}; evaluators=[] asks for none")
