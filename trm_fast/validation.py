"""The evaluations of a training run: what they visit, what they found, which was the best.

Owns `Validation`, which measures a run's model on its test data, each process its part of every
batch. Imported by the trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from trm_fast.config import TrainConfig
from trm_fast.data.dataset import PuzzleDataset
from trm_fast.distributed import Ranks
from trm_fast.durable import unwritable
from trm_fast.evaluators import Evaluators
from trm_fast.inference import SetReport, evaluate
from trm_fast.model import Model
from trm_fast.rules import rules_of
from trm_fast.splits import Splits, dataset_config

__all__ = ["Validation"]


class _Interrupted(Exception):
    """The run is to stop in the middle of an evaluation."""


class Validation:
    """Measures the model of a run.

    Args:
        config, splits: of the run.  run_dir: where answers and submissions go.
        ranks: the processes of the run; each answers a part.

    Raises:
        ConfigError, DataError: of the configured evaluators.

    Attributes:
        evaluators: the configured ones.
        at: the step of the last evaluation that came to its end, or -1.
        best: (exact accuracy, step) of the best one, or None.
        reports, scores: of the last one; the latter of the evaluators, {} in all processes but the
            first.
    """

    def __init__(self, config: TrainConfig, splits: Splits, run_dir: Path, ranks: Ranks) -> None:
        self.config, self.splits, self.run_dir, self.ranks = config, splits, run_dir, ranks
        self.evaluators = Evaluators(config.evaluators, splits.paths_test)
        self.at = -1
        self.best: tuple[float, int] | None = None
        self.reports: dict[str, SetReport] = {}
        self.scores: dict[str, float] = {}

    def measure(
        self,
        model: Model,
        step: int,
        wants_to_stop: Callable[[], bool],
        max_puzzles: int | None = None,
    ) -> bool:
        """Measure the model as it is at a step; False where there is no test data, and where
        `wants_to_stop`, asked before each batch, said so.

        Raises:
            CheckpointError: answers or a submission cannot be written.
        """
        if self.splits.test is None:
            self.at = step
            return False
        config, ranks = self.config, self.ranks
        visit = dataset_config(config, self.splits.paths_test, 1, test=True, ranks=ranks)
        batches = PuzzleDataset(visit, "test")
        collect: dict[str, list[Tensor]] = {name: [] for name in config.eval_save_outputs}
        with suppress(_Interrupted):
            self.reports = evaluate(
                model,
                _until(batches, wants_to_stop),
                steps=config.eval_steps_max,
                max_puzzles=max_puzzles or config.eval_max_puzzles,
                loss_type=config.arch.loss_type,
                rules=rules_of(self.splits.test),
                collect=collect,
                observe=self.evaluators.begin(batches.directories),
                cuda_graph=config.cuda_graph,
                ranks=ranks,
            )
            self.at = step
        if self.at != step:
            return False
        if collect:
            ranks.together(lambda: self._save_outputs(step, collect))
        self.scores = self._scores(self.run_dir / f"step_{step}")
        exact = next(iter(self.reports.values())).exact_accuracy[-1]
        if self.best is None or exact > self.best[0]:
            self.best = (exact, step)
        return True

    def _scores(self, folder: Path) -> dict[str, float]:
        """The votes of all processes, counted by the first one."""
        votes = self.evaluators.gathered(self.ranks.control)

        def count() -> dict[str, float]:
            try:
                return self.evaluators.result(folder, votes)
            except OSError as error:
                raise unwritable(folder, error) from error

        return self.ranks.together(count)

    def _save_outputs(self, step: int, collected: dict[str, list[Tensor]]) -> None:
        """The file that the official code names after the process."""
        path = self.run_dir / f"step_{step}_all_preds.{self.ranks.rank}"
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            # A process that measured no board has nothing to put together.
            whole = {name: torch.cat(p) if p else torch.empty(0) for name, p in collected.items()}
            torch.save(whole, path)
        except (OSError, RuntimeError) as error:
            raise unwritable(path, error) from error


def _until(
    batches: Iterable[tuple[str, dict[str, Tensor], int]], wants_to_stop: Callable[[], bool]
) -> Iterator[tuple[str, dict[str, Tensor], int]]:
    for batch in batches:
        if wants_to_stop():
            raise _Interrupted
        yield batch
