"""What the builders of data sets share: options, sources, held-out puzzles, the report.

Owns everything around the puzzles of a builder that turns a file, a data set of the Hugging Face
hub or nothing into a data set. Imported by the builders and their sources; imports data.format.
The subset is drawn as the official builders draw it under `numpy.random.seed(seed)`.

Dims: N puzzles, L cells.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from trm_fast import __version__
from trm_fast.console import Parser, integer, say
from trm_fast.data.format import (
    DataError,
    Metadata,
    one_line,
    read_manifest,
    sha256,
    verify_manifest,
)

__all__ = [
    "BuildOptions",
    "Faults",
    "Puzzles",
    "add_shared",
    "attempt",
    "bounded_lines",
    "command",
    "describe",
    "load_splits",
    "one_kind",
    "reusable",
    "subsample",
]

_LISTED = 1000
_SHOWN = 20


@dataclass(frozen=True)
class Puzzles:
    """boards, grids [N, L] uint8: puzzles and their answers; skipped: how many rows were bad, and
    the first thousand of them as one line each."""

    boards: np.ndarray
    grids: np.ndarray
    skipped: int = 0
    listed: tuple[str, ...] = ()

    def take(self, rows: np.ndarray) -> Puzzles:
        """These puzzles of them, in this order."""
        return Puzzles(self.boards[rows], self.grids[rows], self.skipped, self.listed)


@dataclass
class Faults:
    """Bad rows of a file: the first one raises, or with skip_bad they are counted and listed."""

    path: Path
    skip_bad: bool = False
    skipped: int = 0
    listed: list[str] = field(default_factory=list)

    def bad(self, row: int, reason: str) -> None:
        """A fault of a row, counted from 1; raises DataError unless it may be skipped."""
        message = f"{self.path} row {row}: {reason}"
        if not self.skip_bad:
            raise DataError(message)
        self.skipped += 1
        if len(self.listed) < _LISTED:
            self.listed.append(message)


def bounded_lines(file: TextIO, path: Path, limit: int) -> Iterator[tuple[int, str]]:
    """(row from 1, line with its end); lines of absurd length stop it before they fill memory."""
    number = 0
    while line := file.readline(limit):
        number += 1
        if len(line) == limit and not line.endswith("\n"):
            raise DataError(f"{path} row {number}: longer than {limit} characters")
        yield number, line


@dataclass(frozen=True)
class BuildOptions:
    """What to build; the fields are flags of the command line.

    One of source (a file, or a directory with train.csv and test.csv), source_repo (a data set on
    the Hugging Face hub) and generate (how many puzzles) says where puzzles come from.
    """

    output_dir: str
    source: str | None = None
    source_repo: str | None = None
    generate: int | None = None
    size: int | None = None
    test_size: int = 0
    subsample_size: int | None = None
    seed: int = 0
    skip_bad: bool = False

    def __post_init__(self) -> None:
        origins = [self.source, self.source_repo, self.generate]
        if sum(origin is not None for origin in origins) > 1:
            raise ValueError("give only one of source, source_repo and generate")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}, expected 0..{2**32 - 1}")
        for name, low in (("generate", 1), ("subsample_size", 1), ("test_size", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} is {value}, expected at least {low}")


def load_splits(
    options: BuildOptions,
    read: Callable[[Path], Puzzles],
    generate: Callable[[int], tuple[dict[str, Puzzles], dict[str, Any]]],
    default_repo: str,
) -> tuple[dict[str, Puzzles], dict[str, Any]]:
    """Puzzles per split, and where they came from, for the manifest.

    Raises DataError for what cannot be read or downloaded, ValueError for options.
    """
    if options.generate is not None:
        return generate(options.generate)
    if options.source is not None and not Path(options.source).is_dir():
        path = Path(options.source)
        return _hold_out(read(path), options), {"file": path.name, "sha256": sha256(path)}
    if options.test_size:
        raise ValueError("test_size is for generated puzzles and single files")
    if options.source is not None:
        paths = {name: Path(options.source) / f"{name}.csv" for name in ("train", "test")}
        origin = {"directory": Path(options.source).resolve().name}
    else:
        repo = options.source_repo or default_repo
        paths = {name: _download(repo, f"{name}.csv") for name in ("train", "test")}
        origin = {"repo": repo}
    splits = {name: read(path) for name, path in paths.items()}
    if len({puzzles.boards.shape[1] for puzzles in splits.values()}) > 1:
        raise DataError(f"{paths['test']}: boards of another size than in {paths['train']}")
    return splits, {**origin, **{f"{k}_sha256": sha256(p) for k, p in paths.items()}}


def _download(repo: str, name: str) -> Path:
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    except ImportError:
        raise DataError(
            f"{repo}: needs huggingface_hub (pip install 'trm-fast[hub]'), or a local copy with "
            "--source"
        ) from None
    reason = None
    try:  # once: without an answer hf_hub_download tries again and again, with a line each time
        get_hf_file_metadata(hf_hub_url(repo, name, repo_type="dataset"), timeout=10)
    except Exception as error:  # whatever the HTTP client of the library's version raises
        reason = one_line(error)
    cached = reason is not None
    try:
        return Path(hf_hub_download(repo, name, repo_type="dataset", local_files_only=cached))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{repo}: {name} cannot be downloaded ({reason or one_line(error)}); --source reads a "
            "local copy"
        ) from None


def _hold_out(whole: Puzzles, options: BuildOptions) -> dict[str, Puzzles]:
    """A single file as train split, with test_size random puzzles of it held out."""
    if not options.test_size:
        return {"train": whole}
    total = len(whole.boards)
    if options.test_size >= total:
        raise ValueError(f"test_size {options.test_size} leaves nothing of {total} puzzles")
    order = np.random.Generator(np.random.Philox(seed=[options.seed, 2])).permutation(total)
    test, train = np.sort(order[: options.test_size]), np.sort(order[options.test_size :])
    return {
        "train": whole.take(train),
        "test": Puzzles(whole.boards[test], whole.grids[test]),
    }


def subsample(
    splits: dict[str, Puzzles], size: int | None, random: np.random.RandomState
) -> dict[str, int]:
    """Keep `size` random training puzzles, if there are more; what the manifest says of it."""
    train = splits["train"]
    subset = {"of": len(train.boards), "kept": len(train.boards)}
    if size is not None and size < len(train.boards):
        splits["train"] = train.take(random.choice(len(train.boards), size=size, replace=False))
        subset["kept"] = size
    return subset


def describe(
    options: BuildOptions,
    origin: dict[str, Any],
    subset: dict[str, int],
    splits: dict[str, Puzzles],
    images: int,
) -> dict[str, Any]:
    """The manifest of a build; each training puzzle stands there with `images` images of it."""
    return {
        "version": __version__,
        "source": origin,
        "options": {k: v for k, v in asdict(options).items() if k != "output_dir"},
        "seed": options.seed,
        "subset": subset,
        "counts": {
            name: {
                "groups": len(puzzles.boards),
                "examples": len(puzzles.boards) * (images if name == "train" else 1),
                "skipped": puzzles.skipped,
            }
            for name, puzzles in splits.items()
        },
        "skipped": [line for puzzles in splits.values() for line in puzzles.listed],
    }


def one_kind(
    vocab_size: int, seq_len: int, groups: int, sets: tuple[str, ...] = ("all",)
) -> Metadata:
    """Metadata of `groups` groups of puzzles that all have the blank identifier, the fields as the
    official builders of Sudoku and mazes write them."""
    return Metadata(
        pad_id=0,
        ignore_label_id=0,
        blank_identifier_id=0,
        vocab_size=vocab_size,
        seq_len=seq_len,
        num_puzzle_identifiers=1,
        total_groups=groups,
        mean_puzzle_examples=1.0,
        total_puzzles=groups,
        sets=sets,
    )


def reusable(root: str | os.PathLike[str], request: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest in `root` if it answers exactly `request` and all its files are intact."""
    try:
        manifest = read_manifest(root)
        if manifest is None or manifest.get("request") != request:
            return None
        return manifest if verify_manifest(root, manifest) is None else None
    except DataError:
        return None


def add_shared(parser: Parser, default_repo: str) -> None:
    """The flags of `BuildOptions`."""
    add = parser.add_argument
    add("--output-dir", required=True, help="where the data set appears, whole or not at all")
    add("--source", help="puzzle file, or directory with train.csv and test.csv")
    add("--source-repo", help=f"data set on the Hugging Face hub (default {default_repo})")
    add("--generate", type=integer, metavar="N", help="make N puzzles instead")
    add("--test-size", type=integer, default=0, help="held-out puzzles (generated, or of one file)")
    add("--subsample-size", type=integer, help="keep that many random training puzzles")
    add("--seed", type=integer, default=0, help="of subsample, augmentation and generation")
    add("--skip-bad", action="store_true", help="leave bad rows out, counted and listed")


def _parse_range(name: str, text: str) -> tuple[int, int]:
    """`A-B`, or `A` for both; ValueError for anything else."""
    low, _, high = text.partition("-")
    if not low.isdecimal() or not (high or low).isdecimal():
        raise ValueError(f"{name} {text!r}: expected a number or a range such as 32-50")
    return int(low), int(high or low)


def attempt(prog: str, build: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """The manifest that the builder of the command `prog` returns; None, with a line, for bad
    input."""
    try:
        return build()
    except (ValueError, OSError) as error:
        say(f"{prog}: {error}", err=True)
    except MemoryError:
        say(f"{prog}: not enough memory for so many puzzles", err=True)
    return None


def command(
    parser: Parser,
    argv: Sequence[str] | None,
    ranged: str,
    build: Callable[[dict[str, Any]], dict[str, Any]],
) -> int:
    """Run a builder on its command line, in which the flag `ranged` is a range such as 32-50, and
    say what it wrote: 0, or 2 for bad input."""
    arguments = vars(parser.parse_args(argv))

    def run() -> dict[str, Any]:
        text = arguments[ranged]
        return build({**arguments, ranged: None if text is None else _parse_range(ranged, text)})

    manifest = attempt(parser.prog, run)
    if manifest is None:
        return 2
    for line in manifest["skipped"][:_SHOWN]:
        say(f"skipped {line}", err=True)
    for name, count in manifest["counts"].items():
        bad = f", {count['skipped']} bad rows skipped" if count["skipped"] else ""
        say(f"{name}: {count['groups']} puzzles, {count['examples']} examples{bad}")
    say(f"written to {arguments['output_dir']}")
    return 0
