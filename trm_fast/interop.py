"""Weights that were not saved by this run: another run's, or the official code's.

Owns matching them to a `Model`, and the official single-file format, in and out. Imported by the
trainer and the commands. Formats: our run and step folders, safetensors files, and the official
`step_N` files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from trm_fast import checkpoint
from trm_fast.durable import (
    CheckpointError,
    parse_pickle,
    parse_tensors,
    read_bytes,
    separate,
    write_pickle,
)
from trm_fast.model import Model
from trm_fast.options import printable, show
from trm_fast.puzzle_rows import carried_rows, mean_rows, puzzles_of, read_identifiers

OFFICIAL_PREFIX = "_orig_mod.model.inner."

PUZZLE_ROWS = "inner.puzzle_emb.weights"
LATENTS = "inner.L_init_more"
NOT_SAVED = ("inner.puzzle_emb.local_weights", "inner.puzzle_emb.local_ids")  # some files hold them


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Weights under a Model's names; of a run of ours the EMA weights, where it has them.

    Args:
        path: a run or step folder of ours, a folder of `save_pretrained`, a `.safetensors` file,
            or a torch.save'd state_dict under any of the official prefixes.

    Raises:
        CheckpointError: missing, damaged, or not a state_dict. Nothing in it is executed.
    """
    plain = Path(path) / checkpoint.MODEL
    if plain.is_file() and not (Path(path) / checkpoint.MANIFEST).exists():
        path = plain
    if Path(path).is_dir():
        saved = checkpoint.load_checkpoint(checkpoint.resolve(path))
        return saved.ema or saved.model
    state = read_weights(path)
    return {name: value for name, value in state.items() if name not in NOT_SAVED}


def load_weights(
    model: Model, path: str | Path, names: tuple[Sequence[str], Sequence[str]] | None = None
) -> int | None:
    """Copy weights from `path` into the model.

    Puzzle rows of another number become copies of the mean row (the official rule for training on
    other puzzles). Where further latents begin stays the model's own: nothing learns it.

    Args:
        names: the puzzles' names by identifier, of the weights and of the model: rows of puzzles
            that both name are kept, under whatever number; the others become the mean row.

    Returns:
        How many puzzle rows kept what was learned for them, or None where rows were copied as they
        are (also where there are none).

    Raises:
        ValueError: see `read_state_dict`; names or shapes that differ from the model's; or `names`
            of another number of puzzles.
    """
    state, own = dict(read_state_dict(path)), model.state_dict()
    rows, fresh = state.get(PUZZLE_ROWS), own.get(PUZZLE_ROWS)
    kept = None
    if rows is not None and fresh is not None and len(rows) and rows.shape[1:] == fresh.shape[1:]:
        if names is not None:
            state[PUZZLE_ROWS], kept = carried_rows(rows, *names)
        elif len(rows) != len(fresh):
            state[PUZZLE_ROWS], kept = mean_rows(rows, len(fresh)), 0
    state.pop(LATENTS, None)
    if LATENTS in own:
        state[LATENTS] = own[LATENTS]
    if fault := mismatch(state, own):
        raise ValueError(f"{path}: {fault}")
    model.load_state_dict(state, strict=True)
    return kept


def trained_puzzles(path: str | Path) -> list[str]:
    """The names of the puzzles that a run of ours was trained on, from the data it was trained on.

    Raises ValueError where `path` is no run or step folder, or the data is no longer there or names
    other puzzles now.
    """
    if not Path(path).is_dir():
        raise ValueError(f"{path} does not say what it was trained on: give load_identifiers=DIR")
    config = checkpoint.load_checkpoint(checkpoint.resolve(path)).config
    data = config.get("data") or {}
    paths = data.get("data_paths") or [None]
    if len(paths) != 1 or not isinstance(paths[0], str):
        raise ValueError(f"{path} was not trained on one data set: give load_identifiers=DIR")
    names, then = read_identifiers(paths[0]), data.get("puzzles")
    if then is not None and puzzles_of(paths) != then:
        raise ValueError(
            f"{paths[0]}: identifiers.json is not the one that {path} was trained with: give "
            "load_identifiers=FILE, a copy of that one"
        )
    return names


def mismatch(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str | None:
    """The first way in which weights differ from a model's own in names or shapes, in words."""
    for verb, names in (("lacks", own.keys() - state.keys()), ("has", state.keys() - own.keys())):
        if names:
            shown = ", ".join(sorted(names)[:3])
            return f"{verb} {printable(shown)} ({len(names)} names), unlike this model"
    for name, value in state.items():
        if value.shape != own[name].shape:
            return (
                f"{printable(name)} is {list(value.shape)}, this model has {list(own[name].shape)}"
            )
    return None


def write_official(
    path: str | os.PathLike[str], state_dict: Mapping[str, Tensor], prefix: str = OFFICIAL_PREFIX
) -> None:
    """Write weights as the one pickled file (named step_N, no ending) that the official code loads.

    Args:
        path: the file; not in the run folder, where step_N is a folder of ours.
        state_dict: of a Model, its `.inner` or a loss head; keys get `prefix` before inner names.
        prefix: as the official compiled model writes them; `model.inner.` is its uncompiled form.

    Raises CheckpointError for a path that cannot be written.
    """
    weights = {prefix + inner_name(k): v for k, v in separate(state_dict).items()}
    write_pickle(Path(path), weights)


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Weights from one file, official (pickled, weights only) or safetensors, as `inner.<name>`.

    Raises CheckpointError for a file that is neither. Nothing in it is executed.
    """
    file = Path(path)
    parse = parse_tensors if file.suffix == ".safetensors" else parse_pickle
    weights: dict[str, Any] = parse(file, read_bytes(file))
    if odd := [k for k, v in weights.items() if not (type(k) is str and isinstance(v, Tensor))]:
        raise CheckpointError(
            f"{file}: entry {show(odd[0])} is not a tensor; a state_dict was expected"
        )
    return {"inner." + inner_name(key): value for key, value in weights.items()}


def inner_name(key: str) -> str:
    """The parameter's name inside the model: `_orig_mod.`, `model.` and `inner.` taken off."""
    return key.replace("_orig_mod.", "").removeprefix("model.").removeprefix("inner.")
