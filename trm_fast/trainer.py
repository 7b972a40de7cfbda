"""Deep supervision with adaptive computation: the training loop, its evaluation, its checkpoints.

Owns `Trainer`: everything a run consists of, saved and restored as a whole, so that a resumed run
continues bitwise. Prints nothing: what happens is told to a `Reporter`. Imported by `runner.py`
and `summary.py`. What happens in a step is `train_step.py`'s.

Dims legend: B batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trm_fast import backends, checkpoint, memory, optim
from trm_fast.config import TrainConfig
from trm_fast.data.dataset import PuzzleDataset
from trm_fast.data.feed import Feed
from trm_fast.distributed import SINGLE, Ranks
from trm_fast.ema import EMA
from trm_fast.flat import bits_sum
from trm_fast.flops import step_flops
from trm_fast.inference import SetReport
from trm_fast.interop import load_weights
from trm_fast.loading import pick_device
from trm_fast.losses import ACTLossHead
from trm_fast.model import Model
from trm_fast.optim import GuardState
from trm_fast.profiling import WARM_UP, StepProfile
from trm_fast.random_state import random_state, set_random_state
from trm_fast.splits import Splits
from trm_fast.train_step import TrainStep
from trm_fast.training_data import (
    epochs_per_iteration,
    kept_on_device,
    puzzle_names,
    train_dataset,
)
from trm_fast.validation import Validation


class TrainingStopped(RuntimeError):
    """The run cannot go on; one line with step and batch. The last checkpoint is as it was."""


class Reporter:
    """Told how a run goes, each process its own; this one keeps it to itself."""

    def on_step(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """After every `log_interval` steps and the last one, with the means since the last call."""

    def on_evaluation(self, trainer: Trainer, reports: dict[str, SetReport]) -> None:
        """After every evaluation."""

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """After a checkpoint is complete on disk."""

    def on_skip(self, trainer: Trainer, state: GuardState) -> None:
        """After `check` found steps left out whose gradient was not finite."""

    def on_profile(self, trainer: Trainer, line: str) -> None:
        """Once with profile=true: where the profile is, or why there is none."""

    def wants_to_stop(self) -> bool:
        """Asked after every step and evaluated batch; True ends the run after a checkpoint."""
        return False


def for_device(config: TrainConfig) -> TrainConfig:
    """The settings as they are on the run's device: float32 in place of bfloat16 on MPS.

    Raises:
        ValueError: the device is not there.
    """
    if pick_device(config.device).type == "mps" and config.arch.forward_dtype == "bfloat16":
        return config.replace({"arch.forward_dtype": "float32"})
    return config


class Trainer:
    """One run: model, optimizers, EMA, carry, data position, random state.

    With several processes each makes its own with the same settings, and all call the same methods
    in the same order; the first one writes.

    Args:
        config: with names filled in; `data_paths` name what `splits` was opened from.
        splits: of `open_splits`.
        run_dir: where checkpoints go; made when the first one is written.
        reporter: told about everything.
        resume_from: a checkpoint of this run to take up, see `resume`; the first process reads it.
        ranks: the processes of the run, joined.

    Raises:
        ValueError: the device is missing, a step does not fit its memory, or a batch cannot be
            divided among the processes.

    Attributes:
        step: optimizer steps so far.  total_steps: of the whole run.
        kept_rows: puzzle rows that load_checkpoint brought along by name, None where rows stayed as
            they are.
        validation: the evaluations: reports and scores of the last, step of the best.
    """

    def __init__(
        self,
        config: TrainConfig,
        splits: Splits,
        run_dir: Path,
        reporter: Reporter,
        resume_from: Path | None = None,
        ranks: Ranks = SINGLE,
    ) -> None:
        self.splits, self.run_dir, self.reporter, self.ranks = splits, run_dir, reporter, ranks
        self.config = config = for_device(config)
        self.step = self.iteration = 0
        self.kept_rows: int | None = None
        self.model, self.dataset, feed = ranks.together(lambda: self._prepare(resume_from is None))
        ranks.copy_first_(self._weights())
        self.train_step = TrainStep(
            config,
            ACTLossHead(
                self.model,
                config.arch.loss_type,
                config.constraint_weight,
                config.constraint_boxes,
                config.step_loss_decay,
            ),
            feed,
            self.total_steps,
            ranks,
        )
        self._profile = self._new_profile()
        self._skipped = 0  # steps that the reporter was told about
        self._saved_at = -1
        self._seed_dropout()
        if resume_from is not None:
            self.resume(resume_from)

    def _seed_dropout(self) -> None:
        """Several processes draw different numbers, and at every step others."""
        if self.ranks.world > 1:
            words = (self.config.seed, self.step, self.ranks.rank)
            torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]))

    def _prepare(self, anew: bool) -> tuple[Model, PuzzleDataset, Feed]:
        """What meets no other process; with `anew` the weights of load_checkpoint are taken."""
        config, ranks, metadata = self.config, self.ranks, self.splits.train
        self.device = ranks.device(pick_device(config.device))
        if config.threads:
            torch.set_num_threads(config.threads)
        self.validation = Validation(config, self.splits, self.run_dir, ranks)
        self.total_steps = config.total_steps(metadata.total_groups, metadata.mean_puzzle_examples)
        local = config.local_batch_size(ranks.world)
        self.model_config = config.arch.model_config(
            batch_size=local,
            seq_len=metadata.seq_len,
            vocab_size=metadata.vocab_size,
            num_puzzle_identifiers=metadata.num_puzzle_identifiers,
        )
        dtype = getattr(torch, self.model_config.forward_dtype)
        engine = backends.recursion_engine(self.device, dtype, self.model_config)
        part = local // config.grad_accum
        self.step_bytes = memory.check_fits(self.model_config, part, self.device, engine)
        torch.manual_seed(config.seed)
        model = Model(self.model_config).to(self.device).train()
        if config.load_checkpoint and anew and ranks.first:  # the others get them from the first
            try:
                rows = self.model_config.num_puzzle_identifiers
                names = puzzle_names(config, self.splits, rows)
                self.kept_rows = load_weights(model, config.load_checkpoint, names)
            except ValueError as error:
                raise ValueError(f"load_checkpoint: {error}") from error
        dataset = train_dataset(config, self.splits, ranks)
        return model, dataset, Feed(dataset, self.device, kept_on_device(dataset, self.device))

    def _new_profile(self) -> StepProfile:
        config, model_config = self.config, self.model_config
        profile = StepProfile(
            self.run_dir,
            self.device,
            getattr(torch, model_config.forward_dtype),
            self._useful_flops(),
            counted=not config.compile,
            tell=lambda line: self.reporter.on_profile(self, line),
        )
        profile.done = not (config.profile and self.ranks.first)
        return profile

    def _useful_flops(self) -> int:
        """Of a step that a profile begun now would record: other stages have other cycles."""
        seen = min(self.step + WARM_UP + 1, self.total_steps)
        H, L = self.config.cycles(seen, self.total_steps)
        staged = replace(self.model_config, H_cycles=H, L_cycles=L)
        return step_flops(staged, "train", staged.batch_size)

    @property
    def ema(self) -> EMA | None:
        """The moving average of the weights, if there is one."""
        return self.train_step.ema

    # Training

    def advance(self, name: str, examples: np.ndarray) -> None:
        """One optimizer step on examples [B] int64 of a data set; the device is not waited for."""
        self.step += 1
        if self.step <= self.total_steps:
            # A profile shows the ops of plain steps: of a graph there are kernels only.
            self.train_step.run(name, examples, self.step, plain=not self._profile.done)
        elif self.ema is not None:
            self.ema.update(self.model)

    def check(self) -> None:
        """See, waiting for the device, whether all steps so far could be made.

        Raises:
            TrainingStopped: a loss was not finite, or too many steps in a row were left out.
        """
        self.ranks.numbers(0)  # a process that is gone is noticed here, not on the device
        state = self.train_step.guard.read()
        if state.skipped > self._skipped:
            self._skipped = state.skipped
            self.ranks.together(lambda: self.reporter.on_skip(self, state))
        if not state.stopped_at:
            return
        what = f"the loss is {state.loss}"
        if math.isfinite(state.loss):
            what = f"{state.consecutive} gradients in a row are not finite, the last one"
        ids = self.train_step.worked_on()
        shown = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
        kept = f"the last good checkpoint is kept in {self.run_dir}"
        raise TrainingStopped(
            f"{what} at step {state.stopped_at} (iteration {self.iteration}, puzzle identifiers "
            f"{shown}); {kept if checkpoint.list_steps(self.run_dir) else 'no checkpoint was made'}"
        )

    # The run

    def run(self) -> bool:
        """Train from where the state stands to the end; True if it got there, False if stopped.

        Raises:
            TrainingStopped: see `check`.
            CheckpointError: a checkpoint could not be written.
        """
        if self._owes_evaluation() or (self.finished and not self.validation.reports):
            self._evaluate_and_save()
        self._profile.useful = self._useful_flops()
        with self._profile:
            return self._run()

    def _run(self) -> bool:
        for batch in self._batches():
            if batch is None:
                due = self._evaluates_by_epoch()
            else:
                self.advance(*batch)
                self._profile.step()
                due = self._evaluates_now()
            logs = batch is not None and self.step % self.config.log_interval == 0
            if (logs or self.finished) and self.train_step.sums.steps:
                self._report_step()
            if due:
                self._evaluate_and_save()
            every = self.config.save_interval
            if batch is not None and every and self.step % every == 0:
                self._save_once()
            if self._wants_to_stop():
                self._save_once()
                return False
        if self.validation.at != self.step:
            self._save_once()
            self.evaluate()
            self.save()
        self._save_once()
        return not self._owes_evaluation()

    def _wants_to_stop(self) -> bool:
        """Whether somebody asked one of the processes to stop."""
        return self.ranks.any(self.reporter.wants_to_stop)

    def _batches(self) -> Iterator[tuple[str, np.ndarray] | None]:
        """Set name and examples of each batch to the end of the run; None where an iteration over
        the data ends."""
        config = self.config
        while not self.finished:
            for batch in self.dataset.choices():
                yield batch
                if self.finished:
                    return
            if self.step == 0:
                raise ValueError(
                    f"the data has fewer examples than global_batch_size={config.global_batch_size}"
                )
            self.iteration += 1
            self._saved_at = -1  # a checkpoint of this step says that the iteration goes on
            yield None

    @property
    def finished(self) -> bool:
        """Whether all steps, or all epochs, are done (`total_steps` only estimates the latter)."""
        if self.config.steps:
            return self.step >= self.total_steps
        drawn = epochs_per_iteration(self.config, self.splits.train.total_groups)
        return self.iteration >= self.config.epochs // drawn

    def _evaluates_by_epoch(self) -> bool:
        config = self.config
        past_first = self.iteration > (config.min_eval_interval or 0)
        return config.eval_steps is None and config.steps is None and past_first

    def _evaluates_now(self) -> bool:
        every, left_out = self.config.eval_steps, self.config.min_eval_interval or 0
        return every is not None and self.step % every == 0 and self.step // every > left_out

    def _report_step(self) -> None:
        config, sums = self.config, self.train_step.sums
        self.check()
        metrics = sums.means(config.global_batch_size, self.ranks)
        sums.clear()
        _, base = self.train_step.optimizers[-1]
        now = min(self.step, self.total_steps), base, config.lr_warmup_steps
        rate = optim.cosine_schedule(*now, self.total_steps, config.lr_min_ratio)
        self.ranks.together(lambda: self.reporter.on_step(self, metrics | {"train/lr": rate}))

    def _evaluate_and_save(self) -> None:
        """A checkpoint before the evaluation too: it may take hours, and be killed."""
        if self.config.checkpoint_every_eval:
            self._save_once()
        if self.evaluate() and self.config.checkpoint_every_eval:
            self.save()

    def _owes_evaluation(self) -> bool:
        """Whether the evaluation that belongs to this step has not come to its end."""
        if self.step == 0 or self.validation.at == self.step:
            return False
        between = self.iteration > 0 and self.dataset.state_dict()["position"] is None
        return self.finished or self._evaluates_now() or (between and self._evaluates_by_epoch())

    def evaluate(self, max_puzzles: int | None = None) -> dict[str, SetReport]:
        """Measure the EMA weights (the raw ones without EMA) on the test data.

        Returns {} where there is none, and where the reporter wanted to stop meanwhile.
        """
        self.check()
        with self.evaluation_weights():
            validation, stop = self.validation, self._wants_to_stop
            if not validation.measure(self.model, self.step, stop, max_puzzles):
                return {}
        self.ranks.together(lambda: self.reporter.on_evaluation(self, validation.reports))
        return validation.reports

    def evaluation_weights(self) -> AbstractContextManager[None]:
        """A context in which the model has the weights that are evaluated."""
        return self.ema.swap(self.model) if self.ema else nullcontext()

    # Checkpoints

    def _save_once(self) -> None:
        if self._saved_at != self.step:
            self.save()

    def save(self) -> Path:
        """Write a checkpoint of everything, and move the pointers `last` and `best` to it.

        Raises:
            TrainingStopped: see `check`, or the processes have come apart; nothing is written.
        """
        self.check()
        if self.ranks.world > 1 and len(set(self.ranks.numbers(bits_sum(self._weights())))) > 1:
            raise TrainingStopped(
                f"the weights of the processes differ at step {self.step}; nothing is saved"
            )
        whole = self.state_dict()
        path = self.ranks.of_first(lambda: self._write(whole))
        self._saved_at = self.step
        self.ranks.together(lambda: self.reporter.on_checkpoint(self, path))
        return path

    def _write(self, whole: dict[str, Any]) -> Path:
        state = self.model.state_dict()
        path = checkpoint.save_checkpoint(
            self.run_dir,
            self.step,
            model=state,
            ema=self.ema.merged(state) if self.ema else None,
            config=self._config_record(),
            train_state=whole,
        )
        found = self.validation.best
        best = f"step_{found[1]}" if found else None
        if best and (self.run_dir / best).is_dir():
            checkpoint.write_pointer(self.run_dir, "best", best)
        if self.config.keep:
            checkpoint.prune(self.run_dir, self.config.keep)
        return path

    def _weights(self) -> list[Tensor]:
        """What is to be the same in all processes."""
        return list(self.model.state_dict().values())

    def official_weights(self) -> dict[str, Tensor]:
        """What the official code would save: the EMA copy where there is one."""
        state = self.model.state_dict()
        return self.ema.merged(state) if self.ema else state

    def _config_record(self) -> dict[str, Any]:
        model = self.model_config.to_dict() | {"batch_size": self.config.global_batch_size}
        return {
            **self.config.to_dict(),
            "finished": self.finished,
            "model": model,
            "data": self.splits.record(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights, for torch.load(weights_only=True). All processes must call
        it, and the first gets the whole."""
        best = self.validation.best
        return {
            "step": self.step,
            "iteration": self.iteration,
            "evaluated_at": self.validation.at,
            "best": list(best) if best else None,
            "dataset": self.dataset.state_dict(),
            "rng": random_state(self.device, self.ranks),
            **self.train_step.state_dict(),
        }

    def resume(self, path: Path) -> None:
        """Take up a checkpoint of this run: the next step is bitwise the one that would have come,
        where as many processes go on as made it, and the same but for rounding where others do.

        Raises:
            CheckpointError: damaged, or of other data than the run is given now.
        """
        state = self.ranks.of_first(lambda: self._read(path))
        self.ranks.copy_first_(self._weights())
        if self.ema is not None:
            self.ranks.copy_first_(list(self.ema.shadow.values()))
        self.ranks.together(lambda: self._take_up(path, state))

    def _take_up(self, path: Path, state: dict[str, Any]) -> None:
        """All but weights and average, which are there."""
        try:
            if self.ema is not None:
                own = {"updates": state["ema_updates"], "shadow": self.ema.shadow}
                self.ema.load_state_dict(own)
            self.train_step.load_state_dict(state)
            self.dataset.load_state_dict(state["dataset"])
            self.step, self.iteration = int(state["step"]), int(state["iteration"])
            self._skipped = int(state["guard"]["skipped"])
            best = state["best"]
            self.validation.best = (float(best[0]), int(best[1])) if best else None
            self.validation.at, self._saved_at = int(state["evaluated_at"]), self.step
            self._seed_dropout()
            set_random_state(state["rng"], self.device, self.ranks)
        except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            raise checkpoint.not_of_this_run(path, error) from None

    def _read(self, path: Path) -> dict[str, Any]:
        """Weights and average into this process; returns the rest."""
        saved = checkpoint.load_checkpoint(path)
        if changed := self.splits.changed(saved.config.get("data") or {}):
            raise checkpoint.CheckpointError(
                f"{path}: the training data is not what it was: {', '.join(changed[:3])}"
            )
        try:
            self.model.load_state_dict(saved.model, strict=True)
            if self.ema is not None and saved.ema is not None:
                self.ema.load_merged(saved.ema, saved.train_state["ema_updates"])
        except (LookupError, TypeError, RuntimeError, ValueError) as error:
            raise checkpoint.not_of_this_run(path, error) from None
        return saved.train_state
