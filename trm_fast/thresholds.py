"""The q logit above which an answer is trusted: fitted on boards with labels, kept with the model.

Owns the fit and the file `q_threshold.json` beside a checkpoint. Imported by `pretrained.py`, which
gives a model its threshold, and by what measures. A threshold belongs to the very weights that it
was fitted to, and to their 8-bit products where there are any; of others, or where the file cannot
be read, there is none.

Dims legend: P puzzles, K rollouts, D steps.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trm_fast.durable import one_line, read_bytes, write_text
from trm_fast.model import Model

__all__ = [
    "FILE",
    "Candidate",
    "Fit",
    "beside",
    "digest_of",
    "fit_threshold",
    "keep_threshold",
    "kept_threshold",
    "said_of",
]

FILE = "q_threshold.json"
GRID = tuple(quarter / 4 for quarter in range(-8 * 4, 16 * 4 + 1))


@dataclass(frozen=True)
class Candidate:
    """What rollouts in sequence come to that stop at the first answer with q above a threshold.

    Attributes:
        threshold: q logit.
        answered: share of puzzles where such an answer came.  accuracy: share of those right.
        exact: share of all puzzles right, where the others take the answer of highest q.
        passes: mean supervision steps of a puzzle.
    """

    threshold: float
    answered: float
    accuracy: float
    exact: float
    passes: float


@dataclass(frozen=True)
class Fit:
    """The lowest threshold whose answers are right often enough.

    Attributes:
        chosen: it; where `reached` is False, the one of highest accuracy.
        reached: whether its accuracy is at least the `target`.
        candidates: those that were compared, in order.  puzzles: P.
    """

    chosen: Candidate
    reached: bool
    target: float
    candidates: tuple[Candidate, ...]
    puzzles: int


def fit_threshold(q: Tensor, right: Tensor, target: float) -> Fit:
    """Fit to recorded rollouts, none of them ended early.

    Args:
        q: [P, K, D] float32.  right: [P, K, D] bool, whether that answer is the label.
        target: accuracy that the answers above the threshold must have, in (0, 1].

    Raises:
        ValueError: no puzzles, or a target outside its range.
    """
    if not 0 < target <= 1:
        raise ValueError(f"the accuracy to be reached must be in (0, 1], got {target}")
    if not len(q):
        raise ValueError("there is nothing to fit a threshold to")
    flat, labels = q.flatten(1), right.flatten(1)
    rows = torch.arange(len(flat))
    other = labels[rows, flat.argmax(-1)]
    found = []
    for threshold in GRID:
        above = flat > threshold
        there, first = above.any(-1), above.int().argmax(-1)
        hits = labels[rows, first]
        count = int(there.sum())
        if not count:
            break
        passes = torch.where(there, first + 1, flat.shape[1])
        found.append(
            Candidate(
                threshold,
                count / len(flat),
                float(hits[there].double().mean()),
                float(torch.where(there, hits, other).double().mean()),
                float(passes.double().mean()),
            )
        )
    if not found:
        raise ValueError(f"no answer has a q above {GRID[0]}: there is nothing to be trusted")
    good = [candidate for candidate in found if candidate.accuracy >= target]
    chosen = good[0] if good else max(found, key=lambda c: (c.accuracy, -c.threshold))
    return Fit(chosen, bool(good), target, tuple(found), len(flat))


def beside(place: Path) -> Path | None:
    """Where the thresholds of a checkpoint are kept: with its run, or in its own folder; None of a
    file of another project. `place` as `pretrained.Saved` names it."""
    if not place.is_dir():
        return None
    of_run = (place / "manifest.json").exists()
    return (place.parent if of_run else place) / FILE


def said_of(fit: Fit) -> dict[str, Any]:
    """What is kept of a fit."""
    return {**asdict(fit.chosen), "target": fit.target, "puzzles": fit.puzzles}


def digest_of(model: Model) -> str:
    """What tells these weights from others: SHA-256 over their names, types, shapes and bytes, and
    how often they are applied.

    Puzzle rows are left out, which may be gigabytes: runs with `freeze_weights`, which train
    nothing else, have the digest of the model that they started from.
    """
    config = model.config
    found = hashlib.sha256(f"{config.kind} {config.H_cycles}x{config.L_cycles}\n".encode())
    for name, value in sorted(model.state_dict().items()):
        if not name.startswith("inner.puzzle_emb."):
            found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            found.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def keep_threshold(
    path: Path, step: int, weights: str, model: Model, entry: Mapping[str, Any]
) -> None:
    """Write a "threshold" and what is known of it into the file; those of other steps, weights
    ("ema" or "raw") and products stay as they are.

    Raises CheckpointError where it cannot be written.
    """
    try:
        kept = _read(path)
    except ValueError:
        kept = {}
    new = {_key(step, weights, model): {**entry, "digest": digest_of(model)}}
    try:
        text = json.dumps(kept | new, indent=2)
    except RecursionError:  # of what somebody else put there
        text = json.dumps(new, indent=2)
    write_text(path, text + "\n")


def kept_threshold(
    path: Path, step: int, weights: str, model: Model
) -> tuple[float | None, str | None]:
    """The threshold of this model, and one line where there is one that cannot be taken: the file
    cannot be read, or it does not say of which weights it is, or it is of others."""
    key = _key(step, weights, model)
    try:
        entry = _read(path).get(key)
    except ValueError as error:
        return None, f"{path}: is left aside: {one_line(error)}"
    if entry is None:
        return None, None
    value: Any = entry.get("threshold") if isinstance(entry, dict) else None
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:  # NaN, True
        return None, f"{path}: is left aside: no threshold in it"
    digest = entry.get("digest")
    if digest != digest_of(model):
        whose = "does not say its weights" if digest is None else "is of other weights"
        return None, f"{path}: is left aside: {key} {whose}; evaluate --calibrate fits it anew"
    return float(value), None


def _key(step: int, weights: str, model: Model) -> str:
    """ema@5000, and ema@5000 int8 with such products, whose q are others."""
    quantize = model.config.quantize
    return f"{weights}@{step}" + (f" {quantize}" if quantize != "none" else "")


def _read(path: Path) -> dict[str, Any]:
    """ValueError for what is there and is not such a file."""
    if not path.exists():
        return {}
    try:
        found = json.loads(read_bytes(path))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found
