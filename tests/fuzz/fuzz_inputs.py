"""Inputs of the fuzz tests: valid files to begin with, and what damages a file of each name.

An input is `Files`: relative path -> content. Imported by fuzz_parsers and tools/fuzz.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import safetensors.torch
import torch
from fuzz_binary import damage_archive, damage_npy, damage_pickles, damage_safetensors
from fuzz_text import (
    SEPARATOR,
    Mutation,
    damage_arguments,
    damage_board,
    damage_bytes,
    damage_csv,
    damage_json,
    damage_lines,
    damage_yaml,
)

from trm_fast.checkpoint import save_checkpoint
from trm_fast.config import TrainConfig
from trm_fast.data.dataset import PuzzleDataset, PuzzleDatasetConfig, from_arrays
from trm_fast.data.format import Metadata, PuzzleArrays, write_dataset
from trm_fast.model import Model
from trm_fast.overrides import emit_yaml
from trm_fast.pretrained import save_pretrained

Files = dict[str, bytes]
_BY_ENDING: dict[str, Mutation] = {
    ".json": damage_json,
    ".jsonl": damage_lines,
    ".yaml": damage_yaml,
    ".npy": damage_npy,
    ".csv": damage_csv,
    ".txt": damage_board,
    ".argv": damage_arguments,
    ".safetensors": damage_safetensors,
    ".older": damage_pickles,
    ".pickle": damage_pickles,
    ".pt": damage_archive,
    ".ckpt": damage_archive,
}


def _damage_weights(data: bytes, rng: Random) -> bytes:
    """Of a file whose name does not say what it is, such as the official step_N."""
    known = {b"PK": damage_archive, b"\x80\x02": damage_pickles}
    return known.get(data[:2], damage_bytes)(data, rng)


def damage(files: Files, rng: Random, seeds: tuple[Files, ...] = ()) -> Files:
    """The files after one to four changes; sometimes a file is lost, or another seed's."""
    files = dict(files)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        name = rng.choice(sorted(files)) if files else "none"
        chance = rng.random()
        if chance < 0.02:
            files.pop(name, None)
        elif chance < 0.04 and seeds:
            other = rng.choice(seeds)
            files[name] = other.get(name, b"")
        elif chance < 0.06 and len(files) > 1:
            files[name] = files[rng.choice(sorted(files))]
        elif chance < 0.16:
            files[name] = damage_bytes(files.get(name, b""), rng)
        else:
            content = files.get(name, b"")
            files[name] = _BY_ENDING.get(Path(name).suffix, _damage_weights)(content, rng)
    return files


def read_folder(root: Path) -> Files:
    """Every file below a folder."""
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in files}


def _made(write: Callable[[Path], Any]) -> Files:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return read_folder(Path(folder))


# Data sets


@cache
def _grouped() -> tuple[Metadata, PuzzleArrays]:
    """Two groups of two puzzles of one or two examples."""
    tokens = np.random.default_rng(3).integers(0, 6, (6, 16), dtype=np.uint8)
    arrays = PuzzleArrays(
        tokens,
        tokens[:, ::-1].astype(np.int32),
        np.array([1, 2, 3, 4], np.int32),
        np.array([0, 1, 3, 5, 6], np.int32),
        np.array([0, 2, 4], np.int64),
    )
    return Metadata(0, 0, 0, 6, 16, 5, 2, 1.5, 4, ("all",)), arrays


def grouped_dataset(test: bool) -> PuzzleDataset:
    """Of these, in batches of two."""
    config = PuzzleDatasetConfig(
        seed=1, dataset_paths=(), global_batch_size=2, test_set_mode=test, epochs_per_iter=9
    )
    return PuzzleDataset(config, data=_grouped())


@cache
def positions() -> tuple[Files, ...]:
    """Where training and evaluation stand after their first batch, and before it."""
    result = []
    for steps in (0, 1):
        files = {}
        for name in ("train", "test"):
            dataset = grouped_dataset(test=name == "test")
            for _ in zip(range(steps), dataset, strict=False):
                pass
            files[f"{name}.json"] = json.dumps(dataset.state_dict()).encode()
        result.append(files)
    return tuple(result)


@cache
def datasets() -> tuple[Files, ...]:
    """The official layout, with groups of several puzzles, and as Sudoku; flat; nano-trm's."""
    grouped, arrays = _grouped()
    tokens = arrays.inputs

    def official(root: Path) -> None:
        named = {"train": (grouped, {"all": arrays}), "test": (grouped, {"all": arrays})}
        write_dataset(root, named, [f"task{i}" for i in range(5)])

    metadata, plain = from_arrays(tokens, tokens, vocab_size=6)

    def sudoku(root: Path) -> None:
        write_dataset(root, {"train": (metadata, {"all": plain})})

    def flat(root: Path, **said: int) -> None:
        for name in ("inputs", "labels"):
            np.save(root / f"all__{name}.npy", tokens + 2 * bool(said))
        if said:
            (root / "dataset.json").write_text(json.dumps(said))
        else:
            np.save(root / "all__puzzle_identifiers.npy", np.arange(6))

    def nano(root: Path) -> None:
        flat(root, vocab_size=9, seq_len=16, num_groups=6, grid_size=4, max_grid_size=4)

    return tuple(map(_made, (official, sudoku, flat, nano)))


@cache
def identifiers() -> tuple[Files, ...]:
    names = ["<blank>", "a1", "a1|||t3|||0123456789", "é"]
    return ({"identifiers.json": json.dumps(names).encode()},)


@cache
def sudoku_csv() -> tuple[Files, ...]:
    board, grid = "1.3434.2.14343.1", "1234341221434321"
    texts = (
        f"source,question,answer,rating\nx,{board},{grid},3\ny,{board},,4\n",
        f"quizzes,solutions\n{board.replace('.', '0')},{grid}\n{grid},{grid}\n",
        f"# boards\n{board}\n{grid}\n",
    )
    return tuple({"boards.csv": text.encode()} for text in texts)


MAZE = "#####", "#S  #", "# # #", "#  G#", "#####"
ANSWER = "#####", "#So #", "# #o#", "#  G#", "#####"


@cache
def maze_csv() -> tuple[Files, ...]:
    solved = "".join(MAZE).replace("S  ", "Soo"), "".join(MAZE)
    right = "######Soo## #o##  G######"
    text = f"source,question,answer,rating\na,{solved[1]},{right},0\nb,{solved[1]},{right},1\n"
    return ({"mazes.csv": text.encode()},)


@cache
def boards() -> tuple[Files, ...]:
    """Texts that `solve` takes: lines, grids, CSV; mazes as rows and on one line."""
    row = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
    grid = "\n".join(row[i : i + 9] for i in range(0, 81, 9))
    texts = (
        f"{row}\n{row}\n",
        f"# two\n{grid}\n\n{grid}\n",
        f"question,x\n{row},1\n{row},2\n",
        "1..4..2..3..4..1",
        "\n".join(MAZE) + "\n\n" + "\n".join(MAZE) + "\n",
        "".join(MAZE) + "\n" + "".join(MAZE),
    )
    return tuple({"boards.txt": text.encode()} for text in texts)


@cache
def requests() -> tuple[Files, ...]:
    """What the page of the demo asks its server."""
    board, maze = "1..4..2..3..4..1", "\n".join(MAZE)
    settings = {"rollouts": 2, "depth": 2, "noise": 0.1, "select": "q", "threshold": None}
    asked = (
        {"model": 0, "text": board},
        {"model": 0, "seed": 3, "level": "easy"},
        {"model": 1, "text": maze},
        {"model": 1, "seed": 3},
        {"model": 0, "text": board, "settings": settings},
        {"model": 0, "text": board, "settings": settings | {"rollouts": 1}},
        {"model": 0, "text": board, "settings": {"depth": 1, "init": "random"}},
        {"model": 1, "text": maze, "settings": {}},
        {"model": 1, "text": maze, "settings": {"rollouts": 2, "by": "symmetry"}},
    )
    return tuple({"request.json": json.dumps(one).encode()} for one in asked)


@cache
def arc() -> tuple[Files, ...]:
    pair = {"input": [[1, 2], [3, 4]], "output": [[0]]}
    tasks = {
        "a": {"train": [pair, pair], "test": [{"input": [[5]]}]},
        "b": {"train": [pair], "test": [pair]},
    }
    solutions = {"a": [[[1, 1]]], "b": [[[0]]]}
    return (
        {
            "arc_x_challenges.json": json.dumps(tasks).encode(),
            "arc_x_solutions.json": json.dumps(solutions).encode(),
        },
        {"arc_x_challenges.json": json.dumps(tasks).encode()},
    )


@cache
def arc_scoring() -> tuple[Files, ...]:
    """A data directory as the ARC evaluator reads it."""
    pair = {"input": [[1, 2], [3, 4]], "output": [[0]]}
    puzzles = {"a": {"train": [pair], "test": [pair]}}
    names = ["<blank>", "a", "a|||t3|||0123456789"]
    metadata = Metadata(0, 0, 0, 12, 900, 3, 1, 1.0, 1, ("all",)).to_dict()
    return (
        {
            "identifiers.json": json.dumps(names).encode(),
            "test_puzzles.json": json.dumps(puzzles).encode(),
            "test/dataset.json": json.dumps(metadata).encode(),
        },
    )


@cache
def metrics() -> tuple[Files, ...]:
    rows = [
        {"step": i, "train/lm_loss": 1.5 / i, "all/accuracy": None, "note": "a"} for i in (1, 2, 3)
    ]
    return ({"metrics.jsonl": "".join(json.dumps(r) + "\n" for r in rows).encode()},)


# Configurations


@cache
def configs() -> tuple[Files, ...]:
    """Our config.json, the official all_config.yaml, and the official cfg_pretrain.yaml."""
    ours = TrainConfig(steps=5, data_paths=("data/x",), evaluators=()).to_dict()
    pretrain = (
        "defaults:\n  - arch: trm\n  - _self_\nhydra:\n  output_subdir: null\n"
        "data_paths: ['data/arc-aug-1000']\nevaluators:\n  - name: arc@ARC\n    pass_Ks: [1, 2]\n"
        "global_batch_size: 768\nepochs: 100000\neval_interval: 10000\nlr: 1e-4\n"
        "lr_min_ratio: 1.0\nbeta1: 0.9\nseed: 0\nema: False\nemb: &a {x: 1}\n"
    )
    return (
        {"c.json": json.dumps(ours).encode()},
        {"c.yaml": emit_yaml(TrainConfig().official_dict()).encode()},
        {"c.yaml": pretrain.replace("emb: &a {x: 1}\n", "").encode()},
    )


@cache
def arguments() -> tuple[Files, ...]:
    lines = (
        "arch=trm data_paths=[data/sudoku-extreme-1k-aug-1000] evaluators=[] epochs=50000 "
        "eval_interval=5000 lr=1e-4 puzzle_emb_lr=1e-4 weight_decay=1.0 arch.mlp_t=True "
        "arch.pos_encodings=none arch.L_layers=2 +run_name=r ema=True",
        "preset=maze-hard --seed 3 --ema --lr=2e-4 data_paths=['a','b']",
        "evaluators=[{name: arc@ARC, pass_Ks: [1,2], aggregated_voting: false}] arch=hrm steps=5 "
        "load_checkpoint=null logger=[tensorboard] resume=never device=cuda:0",
        "generate=100 curriculum=0.5 augment=sudoku optimizer=muon "
        "arch.loss.loss_type=softmax_cross_entropy",
    )
    return tuple({"line.argv": SEPARATOR.join(w.encode() for w in _words(line))} for line in lines)


def _words(line: str) -> list[str]:
    """Split at blanks outside of brackets."""
    words, depth = [""], 0
    for char in line:
        depth += (char in "[{") - (char in "]}")
        if char == " " and not depth:
            words.append("")
        else:
            words[-1] += char
    return words


@cache
def values() -> tuple[Files, ...]:
    texts = ("[1, 2.5, {a: 'b\\'c', 'd e': null}]", "1e-4", "[a,b]", '{x: [true, "q"]}', "word")
    return tuple({"line.argv": text.encode()} for text in texts)


@cache
def paths() -> tuple[Files, ...]:
    """Words that name no file here."""
    words = ("c.yaml", "owner/name", "best", "runs/step_3", "m.safetensors")
    return tuple({"line.argv": word.encode()} for word in words)


# Weights


def _model() -> Model:
    torch.manual_seed(0)
    return Model(
        {
            **{"batch_size": 1, "seq_len": 3, "num_puzzle_identifiers": 2, "vocab_size": 4},
            **{"H_cycles": 1, "L_cycles": 1, "L_layers": 1, "hidden_size": 4, "expansion": 1.0},
            **{"intermediate_size": 2, "num_heads": 1, "pos_encodings": "learned"},
            **{"halt_max_steps": 2, "halt_exploration_prob": 0.0, "puzzle_emb_ndim": 4},
            **{"puzzle_emb_len": 1, "forward_dtype": "float32"},
        }
    )


@cache
def checkpoints() -> tuple[Files, ...]:
    model = _model()
    config = {**TrainConfig(steps=3).to_dict(), "model": model.config.to_dict(), "finished": False}
    state = {"step": 2, "rng": torch.arange(4), "data": {"iters": 1, "position": None}}

    def write(root: Path) -> None:
        weights = model.state_dict()
        save_checkpoint(root, 2, model=weights, ema=weights, config=config, train_state=state)

    return (_made(write),)


def signed(files: Files) -> Files:
    """Checkpoint or data set with a manifest that is true of its files: these are parsed then."""
    files = dict(files)
    for path in [p for p in files if p.endswith("manifest.json")]:
        try:
            manifest = json.loads(files[path])
            listed = dict(manifest["files"])
            manifest.pop("sha256", None)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
        for name in listed:
            data = files.get(path.replace("manifest.json", name))
            if data is not None:
                digest = hashlib.sha256(data).hexdigest()
                whole = {"sha256": digest, "bytes": len(data)}  # of a checkpoint
                manifest["files"][name] = digest if isinstance(listed[name], str) else whole
        body = json.dumps(manifest, sort_keys=True).encode()
        whole = {**manifest, "sha256": hashlib.sha256(body).hexdigest()}
        files[path] = json.dumps(whole).encode()
    return files


@cache
def pretrained() -> tuple[Files, ...]:
    return (_made(lambda root: save_pretrained(_model(), root, step=7)),)


@cache
def tensors() -> tuple[Files, ...]:
    plain = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1), "c": torch.zeros(0, 2)}
    plain |= {"d": torch.ones(3, dtype=torch.bfloat16), "e": torch.tensor([True, False])}
    data = safetensors.torch.save(plain, {"format": "pt", "trm_fast": "{}"})
    return ({"m.safetensors": data},)


def saved(value: object, new: bool = True) -> bytes:
    """What torch.save writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "archive.pt")
        torch.save(value, path, _use_new_zipfile_serialization=new)
        return Path(path).read_bytes()


def torch_value() -> dict[str, object]:
    base = torch.arange(12, dtype=torch.float32)
    return {
        **{"a": base, "b": base[2:8].view(2, 3).t(), "c": torch.tensor([True]), "n": 3},
        **{"w": torch.nn.Parameter(torch.ones(2)), "l": [1, (2, None), "x", b"y"], "s": {1, 2}},
        **{"np": np.arange(4, dtype=np.int16), "f": np.float64(0.5), "size": torch.Size([2])},
    }


@cache
def torch_zip() -> tuple[Files, ...]:
    return ({"m.pt": saved(torch_value())}, {"m.pt": saved({"x": torch.zeros(3)})})


@cache
def torch_older() -> tuple[Files, ...]:
    return ({"m.older": saved(torch_value(), new=False)},)


@cache
def pickles() -> tuple[Files, ...]:
    plain = {"a": [1, -(2**40), 2.5, "é", b"\xff", None, True, (), (1, 2), {"x": {3}}]}
    arrays = [np.float64(0.25), np.arange(4, dtype=np.int16)]
    # Protocol 5 has a form of its own for arrays, which files of weights do not use.
    older = ({"m.pickle": pickle.dumps([plain, arrays], protocol)} for protocol in (2, 3, 4))
    return (*older, {"m.pickle": pickle.dumps(plain, 5)})


def flat() -> tuple[Files, ...]:
    """The arrays of the flat layout, which needs no other file."""
    return datasets()[2:3]


def with_manifest() -> tuple[Files, ...]:
    """What our writer left, manifest included."""
    return datasets()[:2]


def yaml_configs() -> tuple[Files, ...]:
    """The official settings, as they stand beside weights."""
    return configs()[1:2]


def mostly_signed(files: Files) -> Files:
    """`signed`, but for one input of eight: damage that the checksums must find."""
    return files if sum(map(len, files.values())) % 8 == 0 else signed(files)
