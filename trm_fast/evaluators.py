"""The scores beyond the accuracies that a configuration asks for under `evaluators`.

Owns the names of evaluators and their options, and which data sets they are for. Imported by the
trainer and `trm-fast evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from trm_fast.arc_voting import ArcVoting, Ballots, write_submission
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
        ConfigError: another name or option, or the same evaluator twice.
        DataError: the files of an evaluator cannot be read.
    """

    def __init__(self, configs: Sequence[EvaluatorConfig], paths: Sequence[str]) -> None:
        self.left_out: list[str] = []
        self._votings: list[tuple[int, ArcVoting]] = []
        for place, config in enumerate(configs):
            options = _checked(config)
            if any(config.name == other.name for other in configs[:place]):
                raise ConfigError(f"evaluators names {config.name} twice")
            for index, path in enumerate(paths):
                # The builder writes an empty one where there is no test split.
                needed = next((n for n in (_NEEDED, "test") if not Path(path, n).exists()), None)
                if needed is not None:
                    self.left_out.append(f"{config.name} (no {needed} in {path})")
                    continue
                try:
                    voting = ArcVoting(path, **options)
                except ValueError as error:
                    raise ConfigError(f"evaluators: {config.name}: {error}") from None
                self._votings.append((index, voting))

    def __len__(self) -> int:
        return len(self._votings)

    def begin(self, directories: Mapping[str, int]) -> Callable[[str, Mapping[str, Tensor]], None]:
        """Before an evaluation of the sets in `PuzzleDataset.directories`; returns what takes in
        its batches, with the set's name and what `inference.evaluate` observes."""
        for _, voting in self._votings:
            voting.begin()

        def observe(set_name: str, outputs: Mapping[str, Tensor]) -> None:
            for index, voting in self._votings:
                if directories[set_name] == index:
                    voting.update(outputs)

        return observe

    def gathered(self, group: Any = None) -> list[list[Ballots] | None]:
        """The votes of all processes on the first of them, by evaluator; `group` as for ArcVoting.
        All processes must call it."""
        return [voting.gathered(group) for _, voting in self._votings]

    def result(
        self, folder: Path | None = None, votes: Sequence[list[Ballots] | None] | None = None
    ) -> dict[str, float]:
        """The scores by name; submission.json goes to the folder `evaluator_ARC<folder's end>`.

        `folder` is the path that `evaluator_ARC` is put before, `RUN/step_N`: the official place
        is RUN/evaluator_ARC_step_N/submission.json. Of a second data directory the names begin
        with ARC1, of a third with ARC2. `votes` are what `gathered` returned, which is called where
        they are not given; {} on all processes but the first.
        """
        scores: dict[str, float] = {}
        votes = self.gathered() if votes is None else votes
        for (index, voting), parts in zip(self._votings, votes, strict=True):
            name = f"ARC{index or ''}"
            place = folder and folder.with_name(f"evaluator_{name}_{folder.name}")
            for key, value in (voting.count(parts, place) or {}).items():
                scores[name + key.removeprefix("ARC")] = value
        return scores

    def write_submission(self, path: Path) -> None:
        """The submission of the first of them in the last evaluation, as JSON."""
        write_submission(path, self._votings[0][1].submission)

    @property
    def unanswered(self) -> int:
        """Test inputs that got no answer in the last evaluation."""
        return sum(voting.unanswered for _, voting in self._votings)

    @property
    def counts(self) -> dict[str, int]:
        """`ARC/unanswered`, to stand beside the scores; {} where nothing is scored."""
        return {"ARC/unanswered": self.unanswered} if self._votings else {}


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


def score_line(scores: Mapping[str, float], unanswered: int) -> str:
    """Scores on one line: `ARC/pass@1 2.50 %, ...`, and how many answers they lack."""
    line = ", ".join(f"{name} {100 * value:.2f} %" for name, value in scores.items())
    return (
        f"{line}; {unanswered} test inputs have no answer, which is wrong" if unanswered else line
    )
