"""Every parser of trm_fast, for the fuzz tests: what it reads, and what may come of it.

Owns PARSERS. Each is called on a folder that holds one input; it must return, or raise one of the
errors that its documentation names. What is accepted is used as its callers use it. Imported by
the tests and by tools/fuzz.py.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import fuzz_foreign
import fuzz_inputs as inputs
import torch
from answering import tiny_model
from fuzz_inputs import Files
from fuzz_text import SEPARATOR

from trm_fast import loading, solve
from trm_fast.arc_voting import ArcVoting
from trm_fast.checkpoint import list_steps, load_checkpoint, passed_over, read_pointer, resolve
from trm_fast.config import ConfigError, TrainConfig
from trm_fast.data import arc as arc_builder
from trm_fast.data.arc_source import read_subset
from trm_fast.data.building import reusable
from trm_fast.data.dataset import PuzzleDataset, PuzzleDatasetConfig
from trm_fast.data.format import DataError, open_writer, read_metadata, read_split
from trm_fast.data.maze_source import read_mazes
from trm_fast.data.sudoku_source import read_puzzles
from trm_fast.demo.work import Demo, RequestError, parse_request
from trm_fast.durable import CheckpointError, parse_pickle, parse_tensors
from trm_fast.foreign_file import read_architecture
from trm_fast.hub import hub_id
from trm_fast.interop import read_weights
from trm_fast.overrides import HelpRequested, format_value, parse_train, parse_value, read_mapping
from trm_fast.pretrained import build, card_of, find_checkpoint, read_saved
from trm_fast.progress import MetricsWriter, read_metrics
from trm_fast.puzzle_rows import read_identifiers
from trm_fast.runs import place
from trm_fast.torch_file import read_torch_file
from trm_fast.unpickle import PickleError, plain_calls, plain_names, unpickle

MiB = 1 << 20


@dataclass(frozen=True)
class Parser:
    """A parser under test.

    Attributes:
        seeds: valid inputs.  read: reads the input in a folder; "out" in it may be written.
        errors: what it documents; their text must be one printable line.
        memory: bytes it may have allocated at once, beside `per_byte` for each byte of the input.
        finish: makes a damaged input consistent in what would hide all else, such as checksums.
        binary: for coverage-guided fuzzing, the one file that matters.
    """

    name: str
    seeds: Callable[[], tuple[Files, ...]]
    read: Callable[[Path], object]
    errors: tuple[type[BaseException], ...]
    memory: int = 16 * MiB
    per_byte: int = 64
    finish: Callable[[Files], Files] = dict
    binary: str = ""


def _dataset(folder: Path) -> None:
    for split in ("train", "test") if (folder / "test").is_dir() else ("train",):
        for test in (False, True):
            config = PuzzleDatasetConfig(
                seed=1,
                dataset_paths=(str(folder),),
                global_batch_size=2,
                test_set_mode=test,
            )
            for step, (_, batch, _) in enumerate(PuzzleDataset(config, split)):
                assert all(len(part) == 2 and part.dtype == torch.int32 for part in batch.values())
                if step == 2:
                    break
    read_metadata(folder, "train")


def _position(folder: Path) -> None:
    """Where in its data a run stood, as train_state.pt holds it."""
    for name in ("train", "test"):
        try:
            state = json.loads((folder / f"{name}.json").read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        dataset = inputs.grouped_dataset(test=name == "test")
        dataset.load_state_dict(state)
        for step, _ in enumerate(dataset):
            if step == 2:
                break


def _npy(folder: Path) -> None:
    read_split(folder, "train")


def _manifest(folder: Path) -> None:
    """A data set that is asked for again, and written over."""
    reusable(folder, {"a": 1})
    target = folder / "out" / "data"
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("out"))
    with open_writer(target, {"request": {}}) as writer:
        writer.json("identifiers.json", [])


def _sudoku(folder: Path) -> None:
    path = folder / "boards.csv"
    puzzles = read_puzzles(path, skip_bad=True)
    assert puzzles.boards.shape == puzzles.grids.shape and puzzles.grids.min() > 0
    with suppress(DataError):
        read_puzzles(path, min_difficulty=3, skip_bad=True)
    read_puzzles(path, size=4)


def _mazes(folder: Path) -> None:
    for skip in (True, False):
        mazes = read_mazes(folder / "mazes.csv", skip_bad=skip)
        assert mazes.boards.shape == mazes.grids.shape


def _arc(folder: Path) -> None:
    read_subset(str(folder / "arc"), "x")
    arc_builder.build(
        arc_builder.BuildOptions(
            input_file_prefix=str(folder / "arc"),
            output_dir=str(folder / "out" / "data"),
            subsets=("x",),
            test_set_name="x",
            num_aug=2,
        )
    )


def _arc_scoring(folder: Path) -> None:
    ArcVoting(folder).result(folder / "out")


def _config(folder: Path) -> None:
    (path,) = list(folder.glob("c.*")) or [folder / "c.json"]
    config = parse_train([f"config={path}"])
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def _architecture(folder: Path) -> None:
    read_architecture(folder / "c.yaml")


def _words(folder: Path) -> list[str]:
    data = (folder / "line.argv").read_bytes() if (folder / "line.argv").exists() else b""
    return data.decode("utf-8", "surrogateescape").split(SEPARATOR.decode())


def _arguments(folder: Path) -> None:
    config = parse_train(_words(folder))
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def _value(folder: Path) -> None:
    value = parse_value(SEPARATOR.decode().join(_words(folder)))
    assert parse_value(format_value(value)) == value


def _checkpoint(folder: Path) -> None:
    load_checkpoint(folder / "step_2")


def _run_folder(folder: Path) -> None:
    """What evaluate, solve and convert read, and what resume= reads."""
    step = resolve(folder)
    passed_over(step)
    read_pointer(folder, "best")
    saved = read_saved(folder)
    build(saved)
    card_of(saved)
    config = parse_train([f"resume={folder}"])
    place(config, 10)


def _pretrained(folder: Path) -> None:
    saved = read_saved(folder)
    build(saved)
    card_of(saved)


def _foreign(format: str, folder: Path) -> None:
    names = ("step_12", "m.safetensors", "m.ckpt", "m.pt")
    path = next((folder / name for name in names if (folder / name).exists()), folder / "m.pt")
    build(read_saved(path, given=fuzz_foreign.GIVEN[format]))


def _tensors(folder: Path) -> None:
    path = folder / "m.safetensors"
    parse_tensors(path, path.read_bytes() if path.exists() else b"")


def _torch_file(name: str, folder: Path) -> None:
    path = folder / name
    data = path.read_bytes() if path.exists() else b""
    parse_pickle(path, data, {"__main__.TRMConfig"})
    read_torch_file(data)


def _pickle(folder: Path) -> None:
    path = folder / "m.pickle"
    data = path.read_bytes() if path.exists() else b""
    stubs = {"__main__.TRMConfig"}
    unpickle(io.BytesIO(data), calls=plain_calls(), names=plain_names(), stubs=stubs)


def _boards(folder: Path) -> None:
    """`trm-fast solve`: a file, and the same text as an argument."""
    path = folder / "boards.txt"
    data = path.read_bytes() if path.exists() else b""
    try:
        solve._puzzles(argparse.Namespace(puzzles=[], input=str(path)))
    except loading.CommandError:
        word = data.decode("utf-8", "replace")
        solve._puzzles(argparse.Namespace(puzzles=[word], input=None))
        raise


@cache
def _demo() -> Demo:
    # With a policy, or the free memory would be asked for at every step.
    models = tiny_model(3, policy="save"), tiny_model(4, seq_len=25, vocab_size=6, policy="save")
    return Demo([loading.Loaded(model, {}, Path("run"), 1, "ema") for model in models])


def _request(folder: Path) -> None:
    """`trm-fast demo`: the body of a request, and the first frame of its answer."""
    path = folder / "request.json"
    asked = parse_request(path.read_bytes() if path.exists() else b"")
    if "settings" in asked:
        with closing(_demo().frames(asked)) as lines:
            json.dumps([next(lines), next(lines)], allow_nan=False)
    else:
        json.dumps(_demo().puzzle(asked), allow_nan=False)


_AT_A_PATH: tuple[Callable[[str], object], ...] = (
    lambda path: read_split(path, "train"),
    lambda path: read_metadata(path, "test"),
    read_identifiers,
    read_puzzles,
    read_mazes,
    lambda path: read_subset(path, "x"),
    ArcVoting,
    read_saved,
    find_checkpoint,
    resolve,
    read_weights,
    read_mapping,
    lambda path: parse_train([f"config={path}"]),
    lambda path: parse_train([f"resume={path}"]),
    lambda path: hub_id(path, bare=True),
    lambda path: hub_id(f"hf://{path}", bare=False),
)


def _paths(folder: Path) -> None:
    """What a user gives as the place of something: each reader takes it or raises ValueError."""
    word = _words(folder)[0].replace("\0", "")  # which no command line can hold
    for reader in _AT_A_PATH:
        for path in (word, str(folder / word)):
            try:
                reader(path)
            except ValueError as error:
                assert len(str(error)) <= 1000 + 2 * len(path), reader
    list_steps(folder / word)


def _metrics(folder: Path) -> None:
    """Read back, and written on by a run that is resumed."""
    rows = read_metrics(folder)
    (folder / "out").mkdir(exist_ok=True)
    kept = folder / "out" / "metrics.jsonl"
    kept.write_bytes(b"")
    if (folder / "metrics.jsonl").exists():
        kept.write_bytes((folder / "metrics.jsonl").read_bytes())
    MetricsWriter(folder / "out", resume_step=10**9).write(10**9 + 1, {"new": 1.0})
    again = [row for row in rows if row["step"] <= 10**9]
    assert len(read_metrics(folder / "out")) == len(again) + 1


_YAML = {"per_byte": 512}  # PyYAML keeps a place with every word
_PICKLE = {"memory": 32 * MiB, "per_byte": 300}  # as unpickle.py says
PARSERS = (
    Parser("dataset", inputs.datasets, _dataset, (DataError,), finish=inputs.mostly_signed),
    Parser("npy", inputs.flat, _npy, (DataError,), binary="all__inputs.npy"),
    Parser(
        "dataset manifest",
        inputs.with_manifest,
        _manifest,
        (DataError,),
        finish=inputs.mostly_signed,
    ),
    Parser("data position", inputs.positions, _position, (ValueError,)),
    Parser("identifiers", inputs.identifiers, read_identifiers, (DataError,)),
    Parser("Sudoku CSV", inputs.sudoku_csv, _sudoku, (DataError,)),
    Parser("maze CSV", inputs.maze_csv, _mazes, (DataError,)),
    Parser("ARC JSON", inputs.arc, _arc, (DataError,)),
    Parser("ARC scoring", inputs.arc_scoring, _arc_scoring, (DataError,)),
    Parser("run config", inputs.configs, _config, (ConfigError,), **_YAML),
    Parser("all_config.yaml", inputs.yaml_configs, _architecture, (ConfigError,), **_YAML),
    Parser("command line", inputs.arguments, _arguments, (ConfigError, HelpRequested), **_YAML),
    Parser("override value", inputs.values, _value, (ConfigError,)),
    Parser("paths", inputs.paths, _paths, ()),
    Parser("boards", inputs.boards, _boards, (loading.CommandError,)),
    Parser("demo request", inputs.requests, _request, (RequestError,), memory=64 * MiB),
    Parser("metrics.jsonl", inputs.metrics, _metrics, ()),
    Parser(
        "checkpoint",
        inputs.checkpoints,
        _checkpoint,
        (CheckpointError,),
        finish=inputs.mostly_signed,
        **_PICKLE,
    ),
    Parser(
        "run folder",
        inputs.checkpoints,
        _run_folder,
        (ValueError,),
        finish=inputs.mostly_signed,
        **_PICKLE,
    ),
    Parser("save_pretrained", inputs.pretrained, _pretrained, (ValueError,), **_PICKLE),
    Parser("safetensors", inputs.tensors, _tensors, (CheckpointError,), binary="m.safetensors"),
    Parser(
        "torch.save, zip",
        inputs.torch_zip,
        partial(_torch_file, "m.pt"),
        (CheckpointError, PickleError),
        **_PICKLE,
        binary="m.pt",
    ),
    Parser(
        "torch.save, older",
        inputs.torch_older,
        partial(_torch_file, "m.older"),
        (CheckpointError, PickleError),
        **_PICKLE,
        binary="m.older",
    ),
    Parser("pickle", inputs.pickles, _pickle, (PickleError,), **_PICKLE, binary="m.pickle"),
    *(
        Parser(f"{name} weights", seeds, partial(_foreign, name), (ValueError,), **_PICKLE)
        for name, seeds in (
            ("official", fuzz_foreign.official),
            ("rs", fuzz_foreign.rs),
            ("nano-trm", fuzz_foreign.nano),
            ("lucidrains", fuzz_foreign.lucidrains),
            ("s4nj1th", fuzz_foreign.s4nj1th),
        )
    ),
)
BY_NAME = {parser.name: parser for parser in PARSERS}
