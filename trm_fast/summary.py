"""The last words of a training job: how good the model is, on what, and what to try next.

Owns that text. Imported by `runner.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from trm_fast.console import program, say
from trm_fast.data.dataset import PuzzleDataset, PuzzleDatasetConfig
from trm_fast.data.format import DataError, read_manifest
from trm_fast.inference import SetReport, predict
from trm_fast.mazes import maze_rows
from trm_fast.model import Model
from trm_fast.rules import maze_side, sudoku_side
from trm_fast.trainer import Trainer
from trm_fast.viz import format_board, side_by_side


def summarize(trainer: Trainer, seconds: float, before: int = 0) -> None:
    """Say what the finished run achieved.

    Args:
        trainer: at the end of its run.  seconds: that this process spent in it.
        before: steps that an earlier process had made.
    """
    done = f"{trainer.step} steps"
    if before:
        done += f", {trainer.step - before} of them now"
    if seconds:
        done += f", {seconds:.0f} s including evaluation"
    say(f"finished    {done}")
    clues = _clues_of_sets(trainer)
    for name, report in trainer.validation.reports.items():
        say(_result(name, report, clues.get(name)))
    if clues:
        say("            No board shares its grid with a training board, symmetries included.")
        say("            36-50 clues is easy Sudoku, 28-32 is what newspapers call medium.")
    test = trainer.splits.test
    board = test is not None and sudoku_side(test) is not None
    maze = test is not None and maze_side(test) is not None
    if board or maze:
        _show_board(trainer, _shown_maze if maze else _shown_sudoku)
    say(f"run folder  {trainer.run_dir}")
    say("next")
    say(f"  {program()} -m trm_fast.evaluate {trainer.run_dir}{'' if test else ' --data DIR'}")
    if board:
        puzzle = _as_line(_first_test_board(trainer)[0])
        say(f'  {program()} -m trm_fast.solve -m {trainer.run_dir} "{puzzle}"')
    elif maze:
        say(f"  {program()} -m trm_fast.solve -m {trainer.run_dir} -i FILE")
    else:
        say(f"  {program()} -m trm_fast.train --help")


def _result(name: str, report: SetReport, clues: tuple[int, int] | None) -> str:
    boards = f"{report.puzzles} held-out boards"
    boards += f" of {clues[0]}-{clues[1]} clues" if clues else ""
    valid = f"; {report.valid[-1]:.1%} keep the rules" if report.valid else ""
    return (
        f"{name:<12}{boards}: {report.exact_accuracy[-1]:.1%} solved "
        f"(answer of step {len(report.exact_accuracy)}), "
        f"{report.best_q_exact_accuracy:.1%} by the answer of the highest halting score{valid}"
    )


def _clues_of_sets(trainer: Trainer) -> dict[str, tuple[int, int]]:
    """Clue ranges of generated test sets, from the manifest beside the data; {} for other data."""
    try:
        manifest = read_manifest(trainer.splits.paths_test[0])
        sets = (manifest or {})["request"]["test"]
        return {name: (int(s["clues"][0]), int(s["clues"][1])) for name, s in sets.items()}
    except (DataError, KeyError, IndexError, TypeError, ValueError):
        return {}


def _first_test_board(trainer: Trainer) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels of the first test board, tokens [L] each."""
    config = PuzzleDatasetConfig(
        seed=0, dataset_paths=trainer.splits.paths_test, global_batch_size=1, test_set_mode=True
    )
    _, batch, _ = next(iter(PuzzleDataset(config, "test")))
    return batch["inputs"][0].numpy(), batch["labels"][0].numpy()


def _show_board(trainer: Trainer, show: Callable[[np.ndarray, np.ndarray], str]) -> None:
    """One test board, its answer by the untrained model and by the trained one."""
    inputs, labels = _first_test_board(trainer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trainer.config.seed)
        untrained = Model(trainer.model_config).to(trainer.device)
    tokens = torch.from_numpy(inputs).unsqueeze(0)
    answers = [predict(untrained, tokens).tokens]
    with trainer.evaluation_weights():
        answers.append(predict(trainer.model, tokens).tokens)
    boards, titles = [show(inputs, inputs)], ["a test board"]
    for title, answer in zip(("before training", "after training"), answers, strict=True):
        cells = answer[0].numpy()
        wrong = int((cells != labels).sum())
        boards.append(show(cells, inputs))
        titles.append(f"{title}: {wrong} cells wrong")
    say()
    say(side_by_side(boards, titles))
    if show is _shown_sudoku:
        say("brackets mark the places of the clues; a dot is an answer that is no digit")
    say()


def _shown_sudoku(tokens: np.ndarray, inputs: np.ndarray) -> str:
    clues = inputs.astype(np.int64) - 1
    digits = np.clip(tokens.astype(np.int64) - 1, 0, math.isqrt(len(tokens)))
    return format_board(digits.tolist(), clues.tolist())


def _shown_maze(tokens: np.ndarray, inputs: np.ndarray) -> str:
    return maze_rows(tokens)


def _as_line(inputs: np.ndarray) -> str:
    return "".join("." if token <= 1 else str(token - 1) for token in inputs.tolist())


__all__ = ["summarize"]
