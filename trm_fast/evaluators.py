"""The scores beyond the accuracies that a configuration asks for under `evaluators`.

Owns the names of evaluators and their options, and which data sets they are for. Imported by the
trainer and `trm-fast evaluate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from trm_fast.arc_voting import ArcVoting, write_submission
from trm_fast.config import ConfigError, EvaluatorConfig, did_you_mean, show

__all__ = ["Evaluators", "score_line"]

_NEEDED = "test_puzzles.json"
_KINDS = {"submission_K": int, "pass_Ks": tuple, "aggregated_voting": bool}


class Evaluators:
    """Every configured evaluator for every data directory that it is for.

    Args:
        configs: as configured; only `arc@ARC` is known, with the options submission_K, pass_Ks
            and aggregated_voting.
        paths: the test data directories. An evaluator is left out for those without its files, as
            officially; `left_out` says which.

    Raises:
        ConfigError: another name or option.
        DataError: the files of an evaluator cannot be read.
    """

    def __init__(self, configs: Sequence[EvaluatorConfig], paths: Sequence[str]) -> None:
        self.left_out: list[str] = []
        self._several = len(paths) > 1
        self._votings: list[tuple[int, ArcVoting]] = []
        for config in configs:
            options = _checked(config)
            for index, path in enumerate(paths):
                if not Path(path, _NEEDED).is_file():
                    self.left_out.append(f"{config.name} (no {_NEEDED} in {path})")
                    continue
                try:
                    voting = ArcVoting(path, **options)
                except ValueError as error:
                    raise ConfigError(f"evaluators: {config.name}: {error}") from None
                self._votings.append((index, voting))

    def __len__(self) -> int:
        return len(self._votings)

    def begin(self) -> None:
        """Before an evaluation."""
        for _, voting in self._votings:
            voting.begin()

    def observe(self, set_name: str, outputs: Mapping[str, Tensor]) -> None:
        """A batch of the set of that name, with what `inference.evaluate` observes."""
        digits = set_name[len(set_name.rstrip("0123456789")) :]
        for index, voting in self._votings:
            # The sets of the k-th data directory have k after their names.
            if not self._several or digits == (str(index) if index else ""):
                voting.update(outputs)

    def result(self, folder: Path | None = None) -> dict[str, float]:
        """The scores by name; submission.json goes to the folder `evaluator_ARC<folder's end>`.

        `folder` is the path that `evaluator_ARC` is put before, `RUN/step_N`: the official place
        is RUN/evaluator_ARC_step_N/submission.json. Of a second data directory the names begin
        with ARC1, of a third with ARC2. {} on all processes but the first.
        """
        scores: dict[str, float] = {}
        for index, voting in self._votings:
            name = f"ARC{index or ''}"
            place = folder and folder.with_name(f"evaluator_{name}_{folder.name}")
            for key, value in (voting.result(place) or {}).items():
                scores[name + key.removeprefix("ARC")] = value
        return scores

    def write_submission(self, path: Path) -> None:
        """The submission of the first of them in the last evaluation, as JSON."""
        write_submission(path, self._votings[0][1].submission)

    @property
    def unanswered(self) -> int:
        """Test inputs that got no answer in the last evaluation."""
        return sum(voting.unanswered for _, voting in self._votings)


def _checked(config: EvaluatorConfig) -> dict[str, Any]:
    if config.name != "arc@ARC":
        hint = did_you_mean(config.name, ["arc@ARC"])
        raise ConfigError(f"evaluators must be arc@ARC, got {show(config.name)}{hint}")
    options = dict(config.options)
    for name, value in options.items():
        if name not in _KINDS:
            raise ConfigError(
                f"evaluators: arc@ARC has the options {', '.join(_KINDS)}, got "
                f"{show(name)}{did_you_mean(name, _KINDS)}"
            )
        if type(value) is not _KINDS[name]:
            kind = {int: "a whole number", tuple: "a list", bool: "true or false"}[_KINDS[name]]
            raise ConfigError(f"evaluators: arc@ARC: {name} must be {kind}, got {show(value)}")
    return dict(options)


def score_line(scores: Mapping[str, float]) -> str:
    """Scores on one line: `ARC/pass@1 2.50 %, ...`."""
    return ", ".join(f"{name} {100 * value:.2f} %" for name, value in scores.items())
