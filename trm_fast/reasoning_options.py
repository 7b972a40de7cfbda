"""The options by which a command asks a model, and what they mean.

Owns them for `evaluate` and `solve`; the settings themselves are `reasoning.py`'s. Imported by the
command modules.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from trm_fast.console import number_in
from trm_fast.inference import plan_for
from trm_fast.loading import USAGE, CommandError, Loaded, supervision_depth
from trm_fast.options import did_you_mean, show
from trm_fast.puzzle_kind import kind_of
from trm_fast.reasoning import CHOICES, PRESETS, Reasoning, reasoning_of

__all__ = ["add_reasoning", "asked_reasoning", "is_asked", "share"]


share = number_in(0, 1)


def add_reasoning(parser: argparse.ArgumentParser) -> None:
    """Add the options; `--depth` is one that every command with a model has."""
    group = parser.add_argument_group("reasoning")

    def add(name: str, words: str, kind: Callable[[str], Any] = str, metavar: str = "X") -> None:
        choices = PRESETS if name == "preset" else CHOICES.get(_field(name))
        if choices:
            kind, metavar = _one_of(tuple(choices)), f"{{{','.join(choices)}}}"
        group.add_argument(f"--{name}", type=kind, help=words, dest=name, metavar=metavar)

    add("preset", "settings that go together (docs/reasoning.md)")
    add("rollouts", "runs over each puzzle (default: 1)", int, "K")
    add("rollouts-by", "what makes them differ (default: what is given below, or else symmetry)")
    add("noise", "deviation of what is added to the states before every step", float, "SIGMA")
    add("noise-on", "states it is added to (default: z_L)")
    add("init", "first states: the model's own, or random ones (default: fixed)")
    add("entry", "answer that stands for a rollout (default: best-q)")
    add("select", "answer that counts; `valid` knows the rules, no other does (default: q)")
    add("halt", "what ends a rollout early (default: never)")
    add("schedule", "rollouts at once, or one after another until first-q or valid finds an answer")
    add("threshold", "q logit above which an answer is trusted (default: the model's)", float, "Q")
    add("tolerance", "how still the logits of a fixed point are (default: 0.01)", float, "T")
    add("seed", "of all random numbers (default: 0)", int, "N")
    add("budget", "end after so many seconds with what is there", float, "SECONDS")


NAMES = (
    *("rollouts", "rollouts-by", "noise", "noise-on", "init", "entry", "select", "halt"),
    *("schedule", "threshold", "tolerance", "seed", "budget"),
)


def _one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """For an argument parser: as its own `choices`, with the one that may be meant."""

    def chosen(text: str) -> str:
        if text not in choices:
            allowed = f"choose from {', '.join(choices)}"
            hint = did_you_mean(text, choices)
            raise argparse.ArgumentTypeError(f"invalid choice: {show(text)} ({allowed}){hint}")
        return text

    return chosen


def _field(name: str) -> str:
    return "by" if name == "rollouts-by" else name.replace("-", "_")


OPTIONS = {_field(name): f"--{name}" for name in (*NAMES, "depth", "preset")}
_SETTING = re.compile(
    r"\b(?:(?P<limited>NAME)(?= must be| times )|(?P<set>NAME)='(?P<to>[^']*)')".replace(
        "NAME", "|".join(OPTIONS)
    )
)


def _as_options(message: str, given: Collection[str], preset: str | None) -> str:
    """What `Reasoning` says, in the words of the command line.

    Settings are named as the options that set them, `noise_on='z_L'` as `--noise-on z_L`. Of a
    value that is not among the `given` it is said that the preset has it.
    """

    bases = PRESETS.get(preset or "", {}).values()

    def named(found: re.Match[str]) -> str:
        if found["limited"]:
            return OPTIONS[found["limited"]]
        name, value = found["set"], found["to"]
        of_preset = name not in given and value in {getattr(base, name, None) for base in bases}
        return f"{OPTIONS[name]} {value}" + (f" of --preset {preset}" if of_preset else "")

    return _SETTING.sub(named, message)


def asked_reasoning(options: argparse.Namespace, loaded: Loaded) -> Reasoning:
    """The reasoning that the options ask of a model, everything filled in.

    Without `--depth` it is the preset's, or else what the run was evaluated with.

    Raises:
        CommandError: with status USAGE.
    """
    values = vars(options)
    changes = {_field(name): values[name] for name in NAMES if values[name] is not None}
    if changes.get("by") == "init" and changes.get("init") == "fixed":
        raise CommandError(
            USAGE, "--rollouts-by init is with random first states, not --init fixed"
        )
    model = loaded.model
    try:
        given = reasoning_of(options.preset, kind_of(model.config), changes)
        if options.steps is not None or given.depth is None:
            changes["depth"] = supervision_depth(loaded, options.steps)
        plan = plan_for(model, options.preset, **changes)
    except ValueError as error:
        raise CommandError(USAGE, _as_options(str(error), changes, options.preset)) from None
    idle = _without_effect(plan, changes)
    if idle is not None:
        raise CommandError(USAGE, idle)
    return plan


def _without_effect(plan: Reasoning, given: Collection[str]) -> str | None:
    """A line about an option that changes nothing of this plan."""
    used = {
        "noise_on": (plan.noise > 0, "--noise above 0"),
        "threshold": (plan.halt == "q" or plan.select == "first-q", "--halt q or --select first-q"),
        "tolerance": (plan.halt == "fixed-point", "--halt fixed-point"),
    }
    for name, (effect, where) in used.items():
        if name in given and not effect:
            return f"{OPTIONS[name]} is for {where}"
    return None


def is_asked(options: argparse.Namespace) -> bool:
    """Whether any of these options was given."""
    return any(vars(options)[name] is not None for name in (*NAMES, "preset"))
