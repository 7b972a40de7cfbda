"""Weights that were not saved by this run: another run's, or the official code's.

Owns matching them to a `Model`. Imported by the trainer. Formats: our run and step folders,
safetensors files, and the official `step_N` files (`checkpoint.read_weights`).
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from trm_fast import checkpoint
from trm_fast.model import Model

PUZZLE_ROWS = "inner.puzzle_emb.weights"
NOT_SAVED = ("inner.puzzle_emb.local_weights", "inner.puzzle_emb.local_ids")  # some files hold them


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Weights under a Model's names; of a run of ours the EMA weights, where it has them.

    Args:
        path: a run or step folder of ours, a `.safetensors` file, or a torch.save'd state_dict
            under any of the official prefixes.

    Raises:
        CheckpointError: missing, damaged, or not a state_dict. Nothing in it is executed.
    """
    if Path(path).is_dir():
        saved = checkpoint.load_checkpoint(checkpoint.resolve(path))
        return saved.ema or saved.model
    state = checkpoint.read_weights(path)
    return {name: value for name, value in state.items() if name not in NOT_SAVED}


def load_weights(model: Model, path: str | Path) -> bool:
    """Copy weights from `path` into the model.

    Puzzle rows of another number become copies of the mean row (the official rule for training on
    other puzzles).

    Returns:
        Whether that happened.

    Raises:
        ValueError: see `read_state_dict`; or names or shapes that differ from the model's.
    """
    state, own = dict(read_state_dict(path)), model.state_dict()
    rows, fresh = state.get(PUZZLE_ROWS), own.get(PUZZLE_ROWS)
    reset = False
    if rows is not None and fresh is not None and len(rows) and rows.shape[1:] == fresh.shape[1:]:
        reset = len(rows) != len(fresh)
        if reset:
            state[PUZZLE_ROWS] = rows.mean(dim=0, keepdim=True).expand(fresh.shape)
    for verb, names in (("lacks", own.keys() - state.keys()), ("has", state.keys() - own.keys())):
        if names:
            shown = ", ".join(sorted(names)[:3])
            raise ValueError(f"{path} {verb} {shown} ({len(names)} names), unlike this model")
    for name, value in state.items():
        if value.shape != own[name].shape:
            raise ValueError(
                f"{path}: {name} is {list(value.shape)}, this model has {list(own[name].shape)}"
            )
    model.load_state_dict(state, strict=True)
    return reset
