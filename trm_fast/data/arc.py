"""Builds an ARC data set: `python -m trm_fast.data.arc --input-file-prefix P --output-dir DIR ...`.

Owns the builder and its command line; imported by trm_fast.__main__ only. Writes the official
layout (data.format) and the official arrays: for the same choices and the same seed all files hold
the same numbers, in the same dtypes and under the same puzzle names, as those of the official
build_arc_dataset.py. Beside them stand manifest.json and leaks.json (data.arc_leaks).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trm_fast import __version__
from trm_fast.console import Parser, integer, say
from trm_fast.data.arc_augment import CELLS, PAD, VOCABULARY, Offsets, Plan, draw_plan, encode
from trm_fast.data.arc_leaks import Subset, leak_report, report_lines
from trm_fast.data.arc_source import Pair, Task, read_subset
from trm_fast.data.building import attempt
from trm_fast.data.format import DataError, DatasetWriter, Metadata, open_writer, sha256

__all__ = ["BuildOptions", "build", "main"]

_BLOCK = 1 << 12  # examples encoded at once
_MAX_EXAMPLES = 2**31 - 1  # the official indices are int32


@dataclass(frozen=True)
class BuildOptions:
    """What to build; the fields are the flags of the command line, as the official ones.

    compare: more subsets, of the leak report only.
    """

    input_file_prefix: str
    output_dir: str
    subsets: tuple[str, ...]
    test_set_name: str
    test_set_name2: str = "your_test_set"
    seed: int = 42
    num_aug: int = 1000
    puzzle_identifiers_start: int = 1
    compare: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.subsets:
            raise ValueError("subsets names none")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}, expected 0..{2**32 - 1}")
        limits = (("num_aug", 0, 10**6), ("puzzle_identifiers_start", 1, 10**7))
        for name, low, high in limits:
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {low}..{high}")

    @property
    def test_sets(self) -> tuple[str, str]:
        """The subsets whose test inputs are the test split."""
        return (self.test_set_name, self.test_set_name2)


@dataclass(frozen=True)
class _Planned:
    """A task, the images of it that become puzzles, their identifiers and its pairs by split."""

    task: Task
    plan: Plan
    identifiers: np.ndarray
    splits: dict[str, list[Pair]]


def build(options: BuildOptions) -> dict[str, Any]:
    """Build the data set and return its manifest (without the files' sha256) plus "leaks".

    Raises DataError (bad tasks, unwritable or foreign output directory) or ValueError (options).
    Nothing appears at output_dir unless all of it was written.
    """
    # The official builder draws from numpy's global generator, all in this order.
    random = np.random.RandomState(options.seed)
    subsets, sources = _read(options)
    names = ["<blank>"] * options.puzzle_identifiers_start
    planned = list(_plan(options, subsets, random, names))
    leaks = leak_report(subsets)
    counts = {
        split: {
            "groups": sum(split in item.splits for item in planned),
            "puzzles": sum(len(item.plan) for item in planned if split in item.splits),
            "examples": sum(
                len(item.plan) * len(item.splits[split]) for item in planned if split in item.splits
            ),
        }
        for split in ("train", "test")
    }
    if (most := max(count["examples"] for count in counts.values())) > _MAX_EXAMPLES:
        raise ValueError(
            f"num_aug={options.num_aug} makes {most} examples, {_MAX_EXAMPLES} at most"
        )
    manifest = {
        "version": __version__,
        "source": sources,
        "options": {
            k: v for k, v in asdict(options).items() if k not in ("output_dir", "input_file_prefix")
        },
        "seed": options.seed,
        "counts": counts,
        "identifiers": len(names),
        "fewer_images": {
            item.task.name: len(item.plan) - 1
            for item in planned
            if len(item.plan) <= options.num_aug
        },
        "without_solutions": [s.name for s in subsets if not s.solved],
    }
    with open_writer(options.output_dir, manifest) as writer:
        for split, count in counts.items():
            if count["groups"]:
                _write_split(writer, split, planned, random, len(names))
        writer.json("identifiers.json", names)
        tested = {item.task.name: item.task.to_json() for item in planned if "test" in item.splits}
        writer.json("test_puzzles.json", tested)
        writer.json("leaks.json", leaks)
    return {**manifest, "leaks": leaks}


def _read(options: BuildOptions) -> tuple[list[Subset], dict[str, str]]:
    """The subsets to build from and those to compare with, and the sha256 of their files."""
    subsets, sources = [], {}
    for name in dict.fromkeys((*options.subsets, *options.compare)):
        tasks, solved = read_subset(options.input_file_prefix, name)
        role = "compared"
        if name in options.subsets:
            role = "test" if name in options.test_sets else "train"
        subsets.append(Subset(name, tasks, role, solved))
        for kind in ("challenges", "solutions")[: 2 if solved else 1]:
            path = Path(f"{options.input_file_prefix}_{name}_{kind}.json")
            sources[path.name] = sha256(path)
    return subsets, sources


def _plan(
    options: BuildOptions,
    subsets: Sequence[Subset],
    random: np.random.RandomState,
    names: list[str],
) -> Iterator[_Planned]:
    """Tasks in the official order, with their images; the puzzles' names are added to `names`."""
    built = {subset.name: subset for subset in subsets}
    often = Counter(task.name for name in options.subsets for task in built[name].tasks)
    known: dict[str, int] = {}  # identifiers of puzzles of the tasks that come more than once
    for name in options.subsets:
        subset = built[name]
        tasks = list(subset.tasks)
        random.shuffle(tasks)  # type: ignore[arg-type]
        for task in tasks:
            splits = _splits(task, subset)
            plan = draw_plan(task, options.num_aug, random)
            first = len(names)
            if often[task.name] == 1:
                names.extend(plan.names(task.name))
                identifiers = np.arange(first, len(names), dtype=np.int32)
            else:
                own = list(plan.names(task.name))
                for puzzle in own:
                    if puzzle not in known:
                        known[puzzle] = len(names)
                        names.append(puzzle)
                identifiers = np.array([known[puzzle] for puzzle in own], np.int32)
            yield _Planned(task, plan, identifiers, splits)


def _splits(task: Task, subset: Subset) -> dict[str, list[Pair]]:
    if subset.role == "train":
        return {"train": list(task.pairs())}
    splits = {split: task.parts.get(split, []) for split in ("train", "test")}
    for split, pairs in splits.items():
        if not pairs:
            raise DataError(f"subset {subset.name}: task {task.name}: no {split} pairs")
    return splits


def _write_split(
    writer: DatasetWriter,
    split: str,
    planned: Sequence[_Planned],
    random: np.random.RandomState,
    identifiers: int,
) -> None:
    """One group per task, one puzzle per image, one example per pair.

    Training pairs are moved about the canvas; test pairs stand in the corner, and the draws that
    the official builder makes for them, its last ones, change nothing.
    """
    items = [item for item in planned if split in item.splits]
    sizes = [len(item.splits[split]) for item in items]
    images = [len(item.plan) for item in items]
    examples = int(np.dot(sizes, images))
    files = [_Appender(writer, split, field, examples) for field in ("inputs", "labels")]
    offsets = Offsets(random) if split == "train" else None
    try:
        for item, size in zip(items, sizes, strict=True):
            pairs, step = item.splits[split], max(1, _BLOCK // size)
            for start in range(0, len(item.plan), step):
                rows = slice(start, start + step)
                plan = Plan(item.plan.symmetries[rows], item.plan.colours[rows])
                moved = np.zeros((len(plan), size, 2), np.uint8)
                if offsets is not None:
                    moved = offsets.draw(pairs, plan.symmetries)
                for file, tokens in zip(files, encode(pairs, plan, moved), strict=True):
                    file.append(tokens)
    finally:
        for file in files:
            file.close()
    of_puzzles = np.repeat(sizes, images)
    small = {
        "puzzle_identifiers": np.concatenate([item.identifiers for item in items]),
        "puzzle_indices": np.cumsum([0, *of_puzzles.tolist()]),
        "group_indices": np.cumsum([0, *images]),
    }
    for field, array in small.items():
        writer.array(split, "all", field, array.shape, np.int32)[:] = array
    puzzles = sum(images)
    metadata = Metadata(
        pad_id=PAD,
        ignore_label_id=PAD,
        blank_identifier_id=0,
        vocab_size=VOCABULARY,
        seq_len=CELLS,
        num_puzzle_identifiers=identifiers,
        total_groups=len(items),
        mean_puzzle_examples=examples / puzzles,
        total_puzzles=puzzles,
        sets=("all",),
    )
    writer.metadata(split, metadata)


class _Appender:
    """Fills an array file from its beginning; unlike a memory map it keeps nothing in memory."""

    def __init__(self, writer: DatasetWriter, split: str, field: str, examples: int) -> None:
        array = writer.array(split, "all", field, (examples, CELLS), np.uint8)
        assert array.filename is not None
        self._file = open(array.filename, "r+b")  # noqa: SIM115
        self._file.seek(array.offset)

    def append(self, tokens: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(tokens).data)

    def close(self) -> None:
        self._file.close()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 for bad input or options."""
    parser = _parser()
    arguments = vars(parser.parse_args(argv))
    lists = {name: tuple(arguments[name]) for name in ("subsets", "compare")}
    tests = dict.fromkeys((arguments["test_set_name"], arguments["test_set_name2"]))
    if not tests.keys() & set(arguments["subsets"]):
        say(f"no test split: none of the subsets is called {' or '.join(tests)}")
    manifest = attempt(parser.prog, lambda: build(BuildOptions(**{**arguments, **lists})))
    if manifest is None:
        return 2
    options = manifest["options"]
    for name in manifest["without_solutions"]:
        say(f"{name}: no solutions file; unknown test outputs stand as one black cell")
    if few := manifest["fewer_images"]:
        task = min(few, key=lambda name: few[name])
        say(
            f"{len(few)} tasks have fewer than {options['num_aug']} different images, "
            f"{task} {few[task]}"
        )
    for split, count in manifest["counts"].items():
        say(
            f"{split}: {count['groups']} tasks, {count['puzzles']} puzzles, "
            f"{count['examples']} examples"
        )
    for line in report_lines(manifest["leaks"]):
        say(line)
    say(
        f"written to {arguments['output_dir']}, {manifest['identifiers']} identifiers with the "
        "blank"
    )
    return 0


def _parser() -> Parser:
    parser = Parser(
        "trm-fast data arc",
        "Build an ARC data set in the official layout from the Kaggle JSON files.",
    )
    add = parser.add_argument
    add(
        "--input-file-prefix",
        required=True,
        metavar="PREFIX",
        help="PREFIX_<subset>_challenges.json and PREFIX_<subset>_solutions.json are read",
    )
    add("--output-dir", required=True, help="where the data set appears, whole or not at all")
    add("--subsets", required=True, nargs="+", metavar="NAME", help="such as training evaluation")
    add("--test-set-name", required=True, metavar="NAME", help="the subset that is tested on")
    add("--test-set-name2", default="your_test_set", metavar="NAME", help="a second one")
    add("--seed", type=integer, default=42, help="of order, images and places (default 42)")
    add("--num-aug", type=integer, default=1000, help="random images per task (default 1000)")
    add(
        "--puzzle-identifiers-start",
        type=integer,
        default=1,
        help="the first identifier (default 1)",
    )
    add(
        "--compare",
        nargs="+",
        default=[],
        metavar="NAME",
        help="more subsets that the leak report looks for shared tasks in",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
