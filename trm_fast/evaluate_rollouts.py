"""`trm-fast evaluate` where it is asked for rollouts: what is measured, printed, drawn and fitted.

Owns these parts of the command; the numbers are `reasoning_report.py`'s. Imported by `evaluate.py`
only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path

from torch import Tensor

from trm_fast.console import Counting, percent, say
from trm_fast.distributed import Ranks
from trm_fast.labelled import Labelled
from trm_fast.loading import MODEL, USAGE, CommandError, Loaded, check_picture
from trm_fast.pretrained import SHIPPED
from trm_fast.puzzle_kind import kind_of
from trm_fast.reasoning import PRESETS, Reasoning
from trm_fast.reasoning_options import asked_reasoning
from trm_fast.reasoning_report import (
    Point,
    ReasoningReport,
    Risk,
    confidence_of,
    measure,
    traces,
)
from trm_fast.rollouts import Budget
from trm_fast.thresholds import Fit, beside, fit_threshold, keep_threshold, said_of
from trm_fast.viz import Curve, accuracy_curves

__all__ = ["calibrated", "check_asked", "draw", "measured", "set_lines"]

ENOUGH = 1000  # answers are, for any threshold
SHOWN_LOGITS = (0, 1, 2, 3, 4, 5, 6)  # confidences that get a row


def check_asked(options: argparse.Namespace, loaded: Loaded, boards: int, ranks: Ranks) -> None:
    """CommandError for options that cannot be followed with so many boards, before anything is
    worked out."""
    asked_reasoning(options, loaded)
    if options.plot:
        check_picture(options.plot, "png")
    if options.calibrate is None:
        return
    if not options.calibrate:
        raise CommandError(USAGE, "--calibrate must be above 0, got 0")
    if ranks.world > 1:
        raise CommandError(USAGE, "--calibrate is for one process")
    least = _least(options.calibrate)
    if boards < least:
        raise CommandError(
            USAGE,
            f"{boards} boards are too few to tell {options.calibrate:.1%} by, {least} are needed",
        )


def measured(
    options: argparse.Namespace,
    loaded: Loaded,
    sets: Iterable[tuple[str, Iterable[Labelled]]],
    boards: int,
    observe: Callable[[str, Mapping[str, Tensor]], None],
    ranks: Ranks,
) -> dict[str, ReasoningReport]:
    """Set by set; one budget is for all of them. `boards` is how many this process has at most."""
    plan = asked_reasoning(options, loaded)
    budget, counting = Budget(plan.budget), _counting(plan, boards, ranks.first)
    found = {}
    for name, parts in sets:

        def told(outputs: Mapping[str, Tensor], name: str = name) -> None:
            observe(name, outputs)

        with counting:
            found[name] = measure(
                loaded.model,
                parts,
                plan,
                batch_size=options.batch_size,
                budget=budget,
                ranks=ranks,
                observe=told,
                abstain=options.abstain,
                made=counting.add,
            )
    return found


def _counting(plan: Reasoning, boards: int, shown: bool = True) -> Counting:
    assert plan.depth is not None
    return Counting(boards * plan.rollouts * plan.depth, "passes", shown)


def calibrated(
    options: argparse.Namespace,
    loaded: Loaded,
    sets: Iterable[tuple[str, Iterable[Labelled]]],
    boards: int,
    names: tuple[str, ...],
) -> None:
    """Fit the threshold to all puzzles, say what was found, give it to the model and keep it.

    Raises:
        CommandError: nothing or too little to fit to, or it cannot be kept.
    """
    plan = _restarts(options, loaded)
    every = chain.from_iterable(parts for _, parts in sets)
    with _counting(plan, boards) as counting:
        q, right = traces(loaded.model, every, plan, options.batch_size, counting.add)
    try:
        fit = fit_threshold(q, right, options.calibrate)
    except ValueError as error:
        raise CommandError(USAGE, error) from None
    say(_fit_text(fit, plan, names), err=options.json)
    _check_fit(fit)
    chosen = fit.chosen.threshold
    loaded.model.q_threshold = chosen
    path = beside(loaded.folder)
    packaged = loaded.folder.resolve() == Path(__file__).with_name(SHIPPED).resolve()
    if path is None or packaged:
        what = "is one file" if path is None else "is the package's own"
        say(f"not kept: {loaded.folder} {what}; give --threshold {chosen:g}", err=True)
        return
    known = {"rollouts": plan.rollouts, "depth": plan.depth, "by": plan.by, "data": list(names)}
    try:
        keep_threshold(path, loaded.step, loaded.weights, loaded.model, said_of(fit) | known)
    except ValueError as error:
        raise CommandError(MODEL, error) from None
    say(f"  kept in {path}", err=options.json)


def _fit_text(fit: Fit, plan: Reasoning, names: tuple[str, ...]) -> str:
    lines = [
        f"q threshold fitted on {fit.puzzles} boards of {', '.join(names)}: {plan.rollouts} "
        f"rollouts of {plan.depth} steps one after another",
        f"  {'threshold':>9}{'answered':>11}{'of them right':>15}{'all right':>11}{'passes':>9}",
    ]
    for c in fit.candidates:
        if c == fit.chosen or (c.threshold >= 0 and c.threshold % 1 == 0):
            mark = "  <- chosen" if c == fit.chosen and fit.reached else ""
            lines.append(
                f"  {c.threshold:>9.2f}{100 * c.answered:>9.2f} %{100 * c.accuracy:>13.2f} %"
                f"{100 * c.exact:>9.2f} %{c.passes:>9.1f}{mark}"
            )
    return "\n".join(lines)


def _least(target: float) -> int:
    """Answers by which an accuracy can be told."""
    return min(ENOUGH, round(1 / max(1 - target, 1 / ENOUGH)))


def _check_fit(fit: Fit) -> None:
    """CommandError for a threshold that cannot be trusted."""
    if not fit.reached:
        raise CommandError(
            USAGE,
            f"no threshold makes {fit.target:.1%} of the answers above it right, the best one "
            f"{fit.chosen.accuracy:.1%}: nothing is kept",
        )
    least = _least(fit.target)
    answered = round(fit.chosen.answered * fit.puzzles)
    if answered < least:
        raise CommandError(
            USAGE,
            f"{answered} answers above the threshold are too few to tell {fit.target:.1%} by, "
            f"{least} are needed: nothing is kept",
        )


def _restarts(options: argparse.Namespace, loaded: Loaded) -> Reasoning:
    """The rollouts to fit to: those asked for, or else restarts where symmetries are known."""
    options = argparse.Namespace(**vars(options))
    known = kind_of(loaded.model.config).name in PRESETS["restarts"]
    # All that the fit runs is every step: what chooses or ends is measured afterwards.
    options.select = options.halt = options.schedule = options.budget = None
    options.threshold = options.tolerance = None
    if options.rollouts is None and options.preset is None and known:
        options.preset = "restarts"
    plan = asked_reasoning(options, loaded)
    return replace(plan, select="q", halt="never", schedule="parallel", budget=None)


def set_lines(
    title: str, report: ReasoningReport, plan: Reasoning, abstain: float | None
) -> list[str]:
    """One set: the answers that count, the selectors, both curves, and confidence."""
    noun = "board" if report.puzzles == 1 else "boards"
    cut = []
    if report.cut:
        cut.append(f"  {'cut short':<14}{percent(report.cut)}   by the budget")
    runs = "1 rollout" if plan.rollouts == 1 else f"{plan.rollouts} rollouts by {plan.by}"
    lines = [
        f"set {title}: {report.puzzles} {noun}, {runs}, up to {plan.depth} steps each{_how(plan)}",
        f"  {'exact':<14}{percent(report.exact)}   by {plan.select}{_knows(plan)}",
        f"  {'cell accuracy':<14}{percent(report.cell)}",
    ]
    if report.valid is not None:
        lines.append(f"  {'valid':<14}{percent(report.valid)}")
    lines += [
        f"  {'passes':<14}{report.passes:>8.1f}     a board, at most {report.passes_max}",
        f"  {'seconds':<14}{report.seconds:>8.4f}     a board, by its passes at most "
        f"{report.seconds_max:.4f}",
        *cut,
        "",
        "  of the same steps, without the rules" + " " * 8 + "with them",
    ]
    names, values = list(report.selectors), list(report.selectors.values())
    head = "".join(f"{select:>11}" for select in names)
    row = "".join(f"{percent(value):>11}" for value in values)
    known = report.rule is not None
    lines += [head + (f"{'any valid':>13}" if known else "")]
    lines += [row + (f"{percent(report.rule):>13}" if known else "")]
    of = "the first rollout" if plan.schedule == "sequential" else "all rollouts"
    if plan.rollouts == 1:
        of = "the rollout"
    lines += ["", *_curve_lines(f"steps of {of}", report.by_depth, plan, known)]
    if plan.rollouts > 1 and report.by_rollouts:
        lines += ["", *_curve_lines("rollouts", report.by_rollouts, plan, known)]
    return lines + ["", *_risk_lines(report, abstain)]


def _how(plan: Reasoning) -> str:
    words = []
    if plan.schedule == "sequential":
        words.append("one after another")
    if plan.noise:
        words.append(f"noise {plan.noise:g} on {plan.noise_on}")
    if plan.init == "random" and plan.by != "init":
        words.append("random first states")
    if plan.halt != "never":
        words.append(f"halting by {plan.halt}")
    if plan.halt == "q" or plan.select == "first-q":
        words.append(f"q above {plan.threshold:g}")
    if plan.budget is not None:
        words.append(f"{plan.budget:g} seconds in all")
    return "".join(f", {word}" for word in words)


def _knows(plan: Reasoning) -> str:
    return ", which knows the rules" if plan.select == "valid" else ""


def _curve_lines(of: str, points: list[Point], plan: Reasoning, known: bool) -> list[str]:
    head = f"  {of:<28}{plan.select:>10}" + (f"{'any valid':>12}" if known else "")
    lines = [f"{head}{'passes':>10}{'seconds':>10}"]
    for point in points:
        rule = f"{percent(point.rule):>12}" if known else ""
        lines.append(
            f"  {point.at:<28}{percent(point.exact):>10}{rule}{point.passes:>10.1f}"
            f"{point.seconds:>10.4f}"
        )
    return lines


def _risk_lines(report: ReasoningReport, abstain: float | None) -> list[str]:
    lines = [f"  {'confidence at least':<28}{'answered':>10}{'right':>12}"]
    shown = [confidence_of(logit) for logit in SHOWN_LOGITS]
    lines += [_risk_line(risk) for risk in report.risk if risk.confidence in shown]
    if abstain is not None:
        asked = min(report.risk, key=lambda risk: abs(risk.confidence - abstain))
        lines.append(_risk_line(asked) + "   <- --abstain")
    return lines


def _risk_line(risk: Risk) -> str:
    right = percent(risk.accuracy) if risk.accuracy is not None else "-"
    return f"  {risk.confidence:<28.3f}{percent(risk.answered):>10}{right:>12}"


def draw(reports: Mapping[str, ReasoningReport], plan: Reasoning, path: str) -> str | None:
    """Both curves of every set as a PNG; one line where that cannot be."""

    def panel(points: Callable[[ReasoningReport], list[Point]]) -> dict[str, Curve]:
        found = {}
        for name, report in reports.items():
            places = points(report)
            if not places:
                continue
            at, passes = [p.at for p in places], [p.passes for p in places]
            found[f"{name}: {plan.select}"] = Curve(at, [100 * p.exact for p in places], passes)
            if report.rule is not None:
                rule = [100 * (p.rule or 0.0) for p in places]
                found[f"{name}: any valid"] = Curve(at, rule, passes, dashed=True)
        return found

    panels = {"supervision steps": panel(lambda report: report.by_depth)}
    if plan.rollouts > 1:
        panels["rollouts"] = panel(lambda report: report.by_rollouts)
    return accuracy_curves({k: v for k, v in panels.items() if v}, path, f"select: {plan.select}")
