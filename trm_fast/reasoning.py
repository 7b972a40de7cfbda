"""How a model is asked: how deep and how often it thinks, what differs, and which answer counts.

Owns `Reasoning`, its presets, and what of it depends on the model. Imported by what runs rollouts
(`rollouts.py`), what chooses among their answers (`selectors.py`) and the commands.

Terms: a *rollout* is one run over a puzzle, of at most `depth` supervision steps; a *pass* is one
supervision step of one rollout. Of each rollout one answer is its *entry* in the choice.

Sources: PTRM (arXiv 2605.19943) adds noise to the latent state and takes the highest q; EqR (arXiv
2605.21488) starts from random states and takes the answer that has settled most.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from trm_fast.config import ModelConfig
from trm_fast.options import did_you_mean
from trm_fast.puzzle_kind import PuzzleKind
from trm_fast.variants import VARIANTS

__all__ = ["CHOICES", "PRESETS", "THRESHOLD", "Reasoning", "noisy_states", "reasoning_of"]

THRESHOLD = 4.0
"""The q logit above which an answer is trusted where no threshold was fitted to the model."""

CHOICES: dict[str, tuple[str, ...]] = {
    "by": ("symmetry", "noise", "init"),
    "noise_on": ("z_L", "z_H", "both"),
    "init": ("fixed", "random"),
    "entry": ("best-q", "last"),
    "select": ("last", "q", "mode", "residual", "first-q", "valid"),
    "halt": ("never", "q", "fixed-point"),
    "schedule": ("parallel", "sequential"),
}
STOPPING = ("first-q", "valid")  # selectors that know an answer when they see it
_MOST = 1 << 16  # rollouts and steps: what a counter of the random numbers holds
_PASSES = 1 << 27  # of one puzzle: what is known of each takes memory until it is answered


@dataclass(frozen=True)
class Reasoning:
    """How puzzles are answered; checked when it is made.

    Attributes:
        depth: supervision steps of a rollout; None is the model's halt_max_steps.
        rollouts: K, of each puzzle.
        by: what makes rollouts differ: a "symmetry" of the puzzle, undone in the answer (rollout 0
            sees the puzzle as it is), "noise", or "init", which makes the first states random;
            None is what `noise` and `init` say, or else symmetry.
        noise: standard deviation of what is added to states before every step.
        noise_on: the states it is added to.
        init: "random" starts from truncated normals of deviation 1 for each token and channel.
        entry: the answer that stands for a rollout: of its step of highest q, or of its last step.
        select: the answer that counts. "last": the last of rollout 0. "q": the entry of highest q.
            "mode": the entry found most often, weighted by sigmoid(q), or with entry="last" each
            counting one. "residual": the last of the rollout whose logits moved least in its last
            three steps. "first-q": the first answer with q above `threshold`. "valid": the first
            that keeps the rules. Where the last two find none, the entry of highest q.
        halt: what ends a rollout before its depth: "q" above `threshold`, or "fixed-point": the
            answer stays and the logits moved by at most `tolerance`.
        schedule: all rollouts "parallel", or "sequential": one after another until first-q or
            valid has found an answer.
        threshold: a q logit; None is the one fitted to the model, else `THRESHOLD`.
        tolerance: mean over tokens of the Euclidean norm of the change of the logits in one step.
        seed: of all random numbers.
        budget: seconds for all puzzles of a call, then what is there is taken; None is no limit.

    Raises:
        ValueError: one line: what was given, what is allowed.
    """

    depth: int | None = None
    rollouts: int = 1
    by: str | None = None
    noise: float = 0.0
    noise_on: str = "z_L"
    init: str = "fixed"
    entry: str = "best-q"
    select: str = "q"
    halt: str = "never"
    schedule: str = "parallel"
    threshold: float | None = None
    tolerance: float = 0.01
    seed: int = 0
    budget: float | None = None

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            given = getattr(self, name)
            if given not in allowed and not (name == "by" and given is None):
                hint = did_you_mean(given, allowed) if isinstance(given, str) else ""
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {given!r}{hint}")
        for name, least, most in (("depth", 1, _MOST), ("rollouts", 1, _MOST), ("seed", 0, 2**64)):
            given = getattr(self, name)
            if name == "depth" and given is None:
                continue
            if type(given) is not int or not least <= given < most:
                limit = f"a whole number from {least} to {most - 1}"
                raise ValueError(f"{name} must be {limit}, got {given!r}")
        for name in ("noise", "tolerance", "budget", "threshold"):
            given = getattr(self, name)
            if given is None and name in ("budget", "threshold"):
                continue
            real = isinstance(given, (int, float)) and not isinstance(given, bool)
            number = real and abs(given) <= sys.float_info.max
            if not number or (given < 0 and name != "threshold"):
                more = "a number" if name == "threshold" else "a number of at least 0"
                raise ValueError(f"{name} must be {more}, got {given!r}")
            object.__setattr__(self, name, float(given))
        self._check_together()

    def _check_together(self) -> None:
        if self.by == "noise" and not self.noise:
            raise ValueError("by='noise' needs noise: noise must be above 0, got 0")
        if self.schedule == "sequential" and self.select not in STOPPING:
            raise ValueError(
                "schedule='sequential' stops at the first good answer: select must be first-q or "
                f"valid, got {self.select!r}"
            )

    @property
    def stops(self) -> bool:
        """Whether an answer that is found ends all rollouts of its puzzle."""
        return self.select in STOPPING

    def resolved(self, config: ModelConfig, kind: PuzzleKind, threshold: float | None) -> Reasoning:
        """With depth, by and threshold as they are for a model.

        Args:
            threshold: the q logit fitted to the model, if there is one.

        Raises:
            ValueError: states, symmetries or rules that are asked for and not there.
        """
        by = self.by
        if by is None:
            by = "noise" if self.noise else "init" if self.init == "random" else "symmetry"
        if self.noise:
            noisy_states(config, self.noise_on)
        init = "random" if by == "init" else self.init
        if init == "random" and not _states(config):
            given = "by='init'" if self.by == "init" else "init='random'"
            raise ValueError(f"{given} is for networks with states, {config.kind} has none")
        differs = bool(self.noise) or init == "random"
        if by == "symmetry" and self.rollouts > 1:
            if kind.symmetries == 0:
                raise ValueError(
                    "no symmetry is known of this model's puzzles: by must be noise or init"
                )
            if kind.symmetries is not None and self.rollouts > kind.symmetries and not differs:
                raise ValueError(
                    f"a {kind.name} has {kind.symmetries} symmetries: rollouts must be at most "
                    f"{kind.symmetries}, or differ by noise or random first states, got "
                    f"{self.rollouts}"
                )
        if self.select == "valid" and kind.rules is None:
            raise ValueError("select='valid' is for Sudoku and mazes, whose rules are known")
        limit = self.threshold if self.threshold is not None else threshold
        depth = config.halt_max_steps if self.depth is None else self.depth
        if self.rollouts * depth > _PASSES:
            raise ValueError(
                f"rollouts times depth must be at most {_PASSES}, got {self.rollouts} times {depth}"
            )
        return replace(
            self,
            depth=depth,
            by=by,
            init=init,
            threshold=THRESHOLD if limit is None else limit,
        )


def noisy_states(config: ModelConfig, noise_on: str) -> list[str]:
    """The states that noise on "z_L", "z_H" or "both" is added to; ValueError if there is none."""
    names = _states(config)
    chosen = [name for name in names if noise_on == "both" or name.startswith(noise_on)]
    if not chosen:
        have = " and ".join(names) or "no state"
        raise ValueError(f"noise_on={noise_on!r}: the network {config.kind} has {have}")
    return chosen


def _states(config: ModelConfig) -> list[str]:
    """The names of the states; none for gated_mlp, which carries nothing along."""
    variant = VARIANTS.get(config.kind)
    return list(variant.initial) if variant else []


_PTRM = Reasoning(rollouts=100, depth=64, by="noise", noise=0.3, entry="last")
PRESETS: dict[str, dict[str, Reasoning]] = {
    # By kind of puzzle, as published where it was.
    "restarts": {
        "Sudoku": Reasoning(
            rollouts=16, by="symmetry", select="first-q", halt="q", schedule="sequential"
        ),
        "maze": Reasoning(
            rollouts=8, by="symmetry", select="first-q", halt="q", schedule="sequential"
        ),
    },
    "vote": {
        "Sudoku": Reasoning(rollouts=16, by="symmetry", select="mode"),
        "maze": Reasoning(rollouts=8, by="symmetry", select="mode"),
    },
    "ptrm": {
        "Sudoku": _PTRM,
        "maze": replace(_PTRM, depth=16, noise=1.0, select="mode"),
        "puzzle": replace(_PTRM, rollouts=25, depth=16, noise=0.2),
    },
    "eqr": dict.fromkeys(
        ("Sudoku", "maze", "puzzle"),
        Reasoning(
            rollouts=128, depth=64, by="init", init="random", entry="last", select="residual"
        ),
    ),
}
"""Named ways of asking: the settings, by kind of puzzle."""


def reasoning_of(
    given: Reasoning | str | None, kind: PuzzleKind, changes: Mapping[str, Any]
) -> Reasoning:
    """A preset by name, or what is given, with `changes`.

    Raises:
        ValueError: no such preset, or not for this kind of puzzle; no such setting, or its value.
    """
    base = Reasoning() if given is None else given
    if not isinstance(base, (str, Reasoning)):
        got = type(given).__name__
        raise ValueError(f"reasoning must be a Reasoning or the name of a preset, got {got}")
    if isinstance(base, str):
        if base not in PRESETS:
            hint = did_you_mean(base, PRESETS)
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {base!r}{hint}")
        if kind.name not in PRESETS[base]:
            raise ValueError(f"preset={base!r} needs symmetries, none is known of these puzzles")
        base = PRESETS[base][kind.name]
    known = [field.name for field in fields(Reasoning)]
    for name in changes:
        if name not in known:
            raise ValueError(f"no setting {name!r} of reasoning{did_you_mean(name, known)}")
    return replace(base, **changes)
