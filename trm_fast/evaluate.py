"""`trm-fast evaluate CHECKPOINT`: how good a trained model is on labelled puzzles.

Owns the choice of the data and the printed report; the measuring is `inference.evaluate`. Imported
by `__main__.py` only.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trm_fast.arc_voting import Ballots
from trm_fast.config import EvaluatorConfig
from trm_fast.console import Counting, percent, positive, say, show_builds
from trm_fast.data.dataset import PuzzleDataset, PuzzleDatasetConfig, from_arrays
from trm_fast.data.format import DataError
from trm_fast.data.sudoku_source import read_puzzles
from trm_fast.distributed import Elsewhere, RankLost, Ranks, asked_for, join, leave
from trm_fast.evaluate_rollouts import (
    calibrated,
    check_asked,
    draw,
    measured,
    set_lines,
)
from trm_fast.evaluators import Evaluators, score_line
from trm_fast.inference import SetReport, evaluate
from trm_fast.labelled import labelled_sets, unlabelled
from trm_fast.loading import (
    MISMATCH,
    UNREADABLE,
    USAGE,
    CommandError,
    Loaded,
    Parser,
    load_or_stop,
    pick_device,
    supervision_depth,
)
from trm_fast.puzzle_rows import puzzles_of
from trm_fast.reasoning_options import add_reasoning, asked_reasoning, is_asked, share
from trm_fast.reasoning_report import ReasoningReport
from trm_fast.rules import rules_of
from trm_fast.symmetry import box_shape

__all__ = ["main"]

ARC = EvaluatorConfig("arc@ARC")
Reports = dict[str, SetReport] | dict[str, ReasoningReport]


@dataclass(frozen=True)
class Source:
    """Labelled puzzles, and the words for where they come from."""

    dataset: PuzzleDataset
    names: tuple[str, ...]
    split: str | None


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print, as text or with `--json` as one document. Returns the exit status.

    As one of the processes that a launcher such as torchrun made, measures its part of every batch;
    the first process prints.
    """
    show_builds()
    try:
        options = _parser().parse_args(argv)
        ranks = _joined(options)
        loaded = ranks.in_turn(lambda: load_or_stop(options.checkpoint, options))
        source, evaluators = ranks.together(lambda: _prepared(options, loaded, ranks))
        reports = _reports(options, loaded, source, evaluators, ranks)
        votes = evaluators.gathered(ranks.control)
        scores = ranks.together(lambda: _scores(options, evaluators, votes, ranks))
        leave()
    except CommandError as error:
        say(f"trm-fast evaluate: {error}", err=True)
        return error.status
    except RankLost as error:
        say(f"trm-fast evaluate: {error}", err=True)
        return UNREADABLE
    except Elsewhere:
        return UNREADABLE
    if not ranks.first:
        return 0
    if options.json:
        voted = scores | evaluators.counts
        say(json.dumps(_document(options, loaded, source, reports) | voted, indent=2))
    elif reports:
        say(_text(options, loaded, source, reports))
        if scores:
            say(f"\n{score_line(scores, evaluators.unanswered)}")
    return _drawn(options, loaded, reports)


def _drawn(options: argparse.Namespace, loaded: Loaded, reports: Reports) -> int:
    """The picture, if there is to be one, behind the report, which a full disk shall not cost."""
    measured = {n: r for n, r in reports.items() if isinstance(r, ReasoningReport)}
    fault = None
    if options.plot:
        fault = draw(measured, asked_reasoning(options, loaded), options.plot)
        say(f"{options.plot} written" if fault is None else f"trm-fast evaluate: {fault}", err=True)
    return USAGE if fault else 0


def _joined(options: argparse.Namespace) -> Ranks:
    """The processes of this command; `options.device` becomes this one's."""
    try:
        asked = asked_for()
        if asked.world == 1:
            return asked
        device = asked.device(pick_device(options.device))
        options.device = str(device)
        return join(asked, device)
    except ValueError as error:
        raise CommandError(USAGE, error) from None


def _prepared(
    options: argparse.Namespace, loaded: Loaded, ranks: Ranks
) -> tuple[Source, Evaluators]:
    source = _source(options, loaded, ranks)
    return source, _evaluators(options, loaded, source)


def _parser() -> Parser:
    parser = Parser(
        "trm-fast evaluate",
        "Measure a checkpoint on labelled puzzles: the answer of every supervision step, and that\n"
        "of the step with the highest halting logit.",
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a run folder, RUN/last, RUN/best or RUN/step_N"
    )
    data = parser.add_mutually_exclusive_group()
    data.add_argument(
        "--data",
        action="append",
        metavar="DIR",
        help="data directory (again for more; default: the test data of the run)",
    )
    data.add_argument(
        "--csv",
        metavar="FILE",
        help="Sudoku as source,question,answer,rating or quizzes,solutions, or one board a line",
    )
    parser.add_argument("--split", help="split of the data directory (default: test)")
    parser.add_argument(
        "--max-puzzles", type=positive, metavar="N", help="only the first N boards of each set"
    )
    parser.add_argument(
        "--submission", metavar="FILE", help="write the answers to an ARC data set's test inputs"
    )
    parser.add_shared()
    add_reasoning(parser)
    parser.add_argument(
        "--abstain",
        type=share,
        metavar="C",
        help="how many answers have a confidence of at least C, and how many of them are right",
    )
    parser.add_argument(
        "--calibrate",
        type=share,
        nargs="?",
        const=0.99,
        metavar="ACCURACY",
        help="fit the q threshold to these boards, so that so many answers above it are right, and "
        "keep it with the checkpoint (default: 0.99); measure on others",
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="draw accuracy against depth and rollouts, as a .png"
    )
    return parser


def _reports(
    options: argparse.Namespace,
    loaded: Loaded,
    source: Source,
    evaluators: Evaluators,
    ranks: Ranks,
) -> Reports:
    """The measures of each set: of rollouts where they are asked for, else of every step."""
    asks = is_asked(options) or options.plot or options.abstain is not None
    if not asks and options.calibrate is None:
        return _measure(options, loaded, source, evaluators, ranks)
    boards = _boards(options, source, ranks)
    ranks.together(lambda: check_asked(options, loaded, boards, ranks))
    observe = evaluators.begin(source.dataset.directories)
    sets = labelled_sets(source.dataset, options.max_puzzles, ranks)
    if options.calibrate is not None:
        calibrated(options, loaded, sets, boards, source.names)
        if not asks:
            return {}
        sets = labelled_sets(source.dataset, options.max_puzzles, ranks)
    return measured(options, loaded, sets, boards, observe, ranks)


def _boards(options: argparse.Namespace, source: Source, ranks: Ranks) -> int:
    """How many this process measures, at most: its part of every batch."""
    mine, whole = options.batch_size, options.batch_size * ranks.world
    every = [len(arrays.inputs) for arrays in source.dataset.sets.values()]
    counts = [min(count, options.max_puzzles or count) for count in every]
    return sum(min(count, -(-count // whole) * mine) for count in counts)


def _source(options: argparse.Namespace, loaded: Loaded, ranks: Ranks) -> Source:
    """The puzzles to measure on; CommandError if they are not there, unreadable, or do not fit."""
    try:
        read = _read_csv if options.csv else _read_directories
        source = read(options, loaded, ranks)
    except (DataError, OSError) as error:
        raise CommandError(UNREADABLE, error) from None
    data, model = source.dataset.metadata, loaded.model.config
    facts = (
        ("tokens per board", data.seq_len, model.seq_len, data.seq_len == model.seq_len),
        ("token values", data.vocab_size, model.vocab_size, data.vocab_size == model.vocab_size),
        (
            "puzzle identifiers",
            data.num_puzzle_identifiers,
            model.num_puzzle_identifiers,
            # Without puzzle rows the identifiers are not looked at.
            data.num_puzzle_identifiers <= model.num_puzzle_identifiers
            or model.puzzle_emb_ndim == 0,
        ),
    )
    for what, theirs, ours, fits in facts:
        if not fits:
            raise CommandError(
                MISMATCH, f"{', '.join(source.names)}: {theirs} {what}, the model has {ours}"
            )
    empty = unlabelled(source.dataset)
    if empty:
        raise CommandError(
            UNREADABLE, f"{', '.join(source.names)}: no labelled boards in set {empty[0]}"
        )
    return source


def _read_csv(options: argparse.Namespace, loaded: Loaded, ranks: Ranks) -> Source:
    if options.split is not None:
        raise CommandError(USAGE, "--split is for data directories, --csv has no splits")
    if not Path(options.csv).is_file():
        raise CommandError(USAGE, f"{options.csv}: no such file")
    puzzles = read_puzzles(options.csv)
    side = box_shape(cells=puzzles.boards.shape[1]).side
    data = from_arrays(puzzles.boards + 1, puzzles.grids + 1, vocab_size=side + 2)
    return Source(PuzzleDataset(_visit((), options, ranks), data=data), (options.csv,), None)


def _read_directories(options: argparse.Namespace, loaded: Loaded, ranks: Ranks) -> Source:
    paths, hint = options.data, ""
    if paths is None:
        saved = loaded.config.get("data") or {}
        paths = (
            saved.get("data_paths_test")
            or loaded.config.get("data_paths_test")
            or saved.get("data_paths")
            or loaded.config.get("data_paths")
        )
        hint = " (the run's own data; --data DIR or --csv FILE names other)"
        if not paths:
            raise CommandError(USAGE, "the run names no data: give --data DIR or --csv FILE")
    for path in paths:
        if not os.path.isdir(path):
            raise CommandError(USAGE, f"{path}: no such data directory{hint}")
    split = options.split or "test"
    dataset = PuzzleDataset(_visit(paths, options, ranks), split)
    return Source(dataset, tuple(map(str, paths)), split)


def _visit(paths: Sequence[str], options: argparse.Namespace, ranks: Ranks) -> PuzzleDatasetConfig:
    return PuzzleDatasetConfig(
        seed=0,
        dataset_paths=tuple(paths),
        global_batch_size=options.batch_size * ranks.world,
        test_set_mode=True,
        rank=ranks.rank,
        num_replicas=ranks.world,
    )


def _evaluators(options: argparse.Namespace, loaded: Loaded, source: Source) -> Evaluators:
    """Votes over ARC data, with the options of the run where it names the evaluator."""
    saved = [EvaluatorConfig.from_value(item) for item in loaded.config.get("evaluators") or []]
    paths = source.names if source.split == "test" else ()
    try:
        evaluators = Evaluators([item for item in saved if item.name == ARC.name] or [ARC], paths)
    except ValueError as error:
        raise CommandError(UNREADABLE, error) from None
    if options.submission is not None and len(evaluators) != 1:
        raise CommandError(USAGE, "--submission needs one ARC data directory, measured on its test")
    return evaluators


def _scores(
    options: argparse.Namespace,
    evaluators: Evaluators,
    votes: Sequence[list[Ballots] | None],
    ranks: Ranks,
) -> dict[str, float]:
    """What the evaluators say, and the submission written if there is to be one."""
    scores = evaluators.result(votes=votes)
    if options.submission is not None and ranks.first:
        try:
            evaluators.write_submission(Path(options.submission))
        except OSError as error:
            raise CommandError(USAGE, f"{options.submission}: {error.strerror or error}") from None
    return scores


def _measure(
    options: argparse.Namespace,
    loaded: Loaded,
    source: Source,
    evaluators: Evaluators,
    ranks: Ranks,
) -> dict[str, SetReport]:
    arch = loaded.config.get("arch") or {}
    vote = evaluators.begin(source.dataset.directories)
    with Counting(_boards(options, source, ranks), "boards", ranks.first) as counting:

        def observe(name: str, outputs: Mapping[str, Tensor]) -> None:
            counting.add(len(outputs["inputs"]))
            vote(name, outputs)

        return evaluate(
            loaded.model,
            source.dataset,
            steps=supervision_depth(loaded, options.steps),
            max_puzzles=options.max_puzzles,
            loss_type=arch.get("loss_type", "stablemax_cross_entropy"),
            rules=rules_of(source.dataset.metadata),
            observe=observe,
            ranks=ranks,
        )


def _document(
    options: argparse.Namespace,
    loaded: Loaded,
    source: Source,
    reports: Reports,
) -> dict[str, Any]:
    plain = options.calibrate is None and all(
        isinstance(report, SetReport) for report in reports.values()
    )
    plan = None if plain else asked_reasoning(options, loaded)
    return {
        "checkpoint": str(loaded.folder),
        "step": loaded.step,
        "weights": loaded.weights,
        "quantize": loaded.model.config.quantize,
        "data": list(source.names),
        "split": source.split,
        "other_puzzles": _other_puzzles(loaded, source),
        "max_puzzles": options.max_puzzles,
        "supervision_steps": plan.depth if plan else supervision_depth(loaded, options.steps),
        "reasoning": asdict(plan) if plan else None,
        "q_threshold": loaded.model.q_threshold,
        "sets": {name: report.to_dict() for name, report in reports.items()},
    }


def _other_puzzles(loaded: Loaded, source: Source) -> bool | None:
    """Whether the model has puzzle rows, and the data's identifiers name other puzzles than the
    training data's did; None where one of them does not say."""
    config, trained = loaded.model.config, (loaded.config.get("data") or {}).get("puzzles")
    if not config.puzzle_emb_ndim:
        return False
    if source.split is None:  # boards of a file have the blank identifier
        return False if config.num_puzzle_identifiers == 1 else None
    found = [puzzles_of([name]) for name in source.names]
    if trained is None:
        return None
    if any(puzzles not in (trained, None) for puzzles in found):
        return True
    return None if None in found else False


def _text(
    options: argparse.Namespace,
    loaded: Loaded,
    source: Source,
    reports: Reports,
) -> str:
    split = f" ({source.split} split)" if source.split else ""
    lines = [
        f"checkpoint  {loaded.folder}",
        f"weights     {WEIGHT_NAMES[loaded.weights]}, optimizer step {loaded.step}",
        f"data        {', '.join(source.names)}{split}",
    ]
    if _other_puzzles(loaded, source):
        lines.append(
            "puzzles     not those trained on: the puzzle rows were learned for other identifiers"
        )
    if loaded.model.config.quantize != "none":
        lines.append(f"products    {loaded.model.config.quantize}")
    for name, report in reports.items():
        title = name
        if len(source.names) > 1:
            title += f" of {source.names[source.dataset.directories[name]]}"
        if isinstance(report, SetReport):
            lines += ["", *_set_lines(title, report)]
        else:
            plan = asked_reasoning(options, loaded)
            lines += ["", *set_lines(title, report, plan, options.abstain)]
    return "\n".join(lines)


WEIGHT_NAMES = {"ema": "moving average (ema)", "raw": "raw"}


def _set_lines(title: str, report: SetReport) -> list[str]:
    """One set: the two answers side by side, then a row per supervision step."""
    steps = len(report.accuracy)
    rows: list[tuple[str, float, float | None]] = [
        ("cell accuracy", report.accuracy[-1], report.best_q_accuracy),
        ("exact", report.exact_accuracy[-1], report.best_q_exact_accuracy),
    ]
    if report.valid:
        rows.append(("valid", report.valid[-1], report.best_q_valid))
    rows.append(("q accuracy", report.q_halt_accuracy[-1], None))
    noun = "board" if report.puzzles == 1 else "boards"
    lines = [
        f"set {title}: {report.puzzles} {noun}, {steps} supervision steps",
        f"{'':<16}{'last step':>10}{'highest q':>11}",
    ]
    for label, last, best in rows:
        lines.append(f"  {label:<14}{percent(last):>10}{percent(best):>11}".rstrip())
    lines.append(f"  {'step':<14}{steps:>10}{report.best_q_steps:>9.1f} on average".rstrip())
    columns = {
        "cell": report.accuracy,
        "exact": report.exact_accuracy,
        "valid": report.valid,
        "q": report.q_halt_accuracy,
    }
    columns = {title: values for title, values in columns.items() if values}
    lines += ["", "  step" + "".join(f"{title:>10}" for title in columns)]
    for index in range(steps):
        values = "".join(f"{percent(column[index]):>10}" for column in columns.values())
        lines.append(f"  {index + 1:>4}{values}")
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
