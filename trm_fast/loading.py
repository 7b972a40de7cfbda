"""From a checkpoint on disk to a model that answers, and the exit statuses of answer commands.

Owns choosing the folder, the weights (moving average or raw) and the device, and the options and
errors that these commands share. Imported by evaluate and solve; the device also by the trainer.
"""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from trm_fast.checkpoint import CheckpointError, load_checkpoint, read_pointer, resolve
from trm_fast.config import QUANTIZED, ModelConfig
from trm_fast.model import Model

USAGE, MODEL, UNREADABLE, MISMATCH = 2, 3, 4, 5
"""Exit statuses: the command line or a missing input; the checkpoint; input that cannot be read;
input that has another size or vocabulary than the model."""

WEIGHTS = ("ema", "raw")


class CommandError(Exception):
    """Ends a command: one line for the user, and the exit status."""

    def __init__(self, status: int, message: object) -> None:
        super().__init__(" ".join(str(message).split()))
        self.status = status


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode and where it comes from.

    Attributes:
        config: the training configuration as saved, with "model" and "data".
        folder: the step folder.  step: optimizer steps taken.  weights: "ema" or "raw".
    """

    model: Model
    config: dict[str, Any]
    folder: Path
    step: int
    weights: str


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; `auto` is CUDA, else MPS, else the CPU. ValueError if not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda, cuda:N or mps, got {name!r}") from None
    there = {
        "cpu": device.index in (None, 0),
        "cuda": (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if device.type not in there:
        raise ValueError(f"device must be auto, cpu, cuda, cuda:N or mps, got {name!r}")
    if not there[device.type]:
        raise ValueError(f"device {name!r} is not there; trm-fast info lists what is")
    return device


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The step folder that a path means.

    Args:
        path: a step folder, a run folder (its newest intact step), or `last` or `best` in one.

    Raises:
        ValueError: there is none.
    """
    path = Path(path)
    if path.name in ("last", "best") and path.is_file():
        name = read_pointer(path.parent, path.name)
        # Of `last` any intact neighbour will do; a `best` that is damaged has no substitute.
        return resolve(path.parent if path.name == "last" else path.parent / str(name))
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint")
    return resolve(path)


def load(
    path: str | os.PathLike[str],
    *,
    weights: str | None = None,
    device: str = "auto",
    quantize: str | None = None,
) -> Loaded:
    """The model of a checkpoint, in evaluation mode, and where it comes from.

    Args:
        path: see `find_checkpoint`.
        weights: "ema" or "raw"; None is the moving average where the run kept one.
        device: see `pick_device`.
        quantize: `arch.quantize` in place of the run's own: "none", "int8" or "fp8".

    Raises:
        ValueError: no checkpoint, a damaged one, no moving average in it, or another device.
    """
    if weights is not None and weights not in WEIGHTS:
        raise ValueError(f"weights must be 'ema' or 'raw', got {weights!r}")
    where = pick_device(device)
    folder = find_checkpoint(path)
    saved = load_checkpoint(folder)
    if weights == "ema" and saved.ema is None:
        raise CheckpointError(f"{folder}: the run kept no moving average; take weights raw")
    chosen = weights or ("raw" if saved.ema is None else "ema")
    state = saved.model if chosen == "raw" or saved.ema is None else saved.ema
    values = saved.config.get("model")
    if not isinstance(values, dict):
        raise CheckpointError(f"{folder / 'config.json'}: the model's configuration is missing")
    if quantize is not None:
        values = values | {"quantize": quantize}
    try:
        model = Model(ModelConfig.from_dict(values))
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder}: weights do not fit config.json ({_first(error)})"
        ) from None
    broken = next((name for name, t in state.items() if not torch.isfinite(t).all()), None)
    if broken is not None:
        raise CheckpointError(f"{folder}: {chosen} weights are not finite in {broken}")
    return Loaded(model.to(where).eval(), saved.config, folder, saved.step, chosen)


def _first(error: RuntimeError) -> str:
    """The first fault that load_state_dict lists, on one line."""
    lines = [line.strip() for line in str(error).splitlines()]
    return (lines[1] if len(lines) > 1 else lines[0])[:200]


def load_model(
    path: str | os.PathLike[str],
    *,
    weights: str | None = None,
    device: str = "auto",
    quantize: str | None = None,
) -> tuple[Model, dict[str, Any]]:
    """The model and the saved configuration; arguments and errors as `load`."""
    loaded = load(path, weights=weights, device=device, quantize=quantize)
    return loaded.model, loaded.config


def load_or_stop(path: str | os.PathLike[str], options: argparse.Namespace) -> Loaded:
    """`load` by the shared options of a command: CommandError with status USAGE (device) or MODEL
    (all else)."""
    weights, device, quantize = options.weights, options.device, options.quantize
    try:
        pick_device(device)
    except ValueError as error:
        raise CommandError(USAGE, error) from None
    try:
        return load(path, weights=weights, device=device, quantize=quantize)
    except (ValueError, OSError) as error:
        raise CommandError(MODEL, error) from None


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line: CommandError with status USAGE."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=(
                "exit status: 0 done; 1 an answer breaks the rules (solve only); 2 command line "
                "or missing\ninput; 3 checkpoint; 4 input that cannot be read; 5 size or "
                "vocabulary unlike the model's"
            ),
        )

    def error(self, message: str) -> NoReturn:
        raise CommandError(USAGE, f"{message}; see --help")

    def add_shared(self) -> None:
        """The options that every answer command has."""
        self.add_argument(
            "--steps", type=positive, metavar="M", help="supervision steps (default: the run's own)"
        )
        self.add_argument(
            "--weights",
            choices=WEIGHTS,
            help="moving average or raw weights (default: ema where the run kept it)",
        )
        self.add_argument(
            "--batch-size",
            type=positive,
            default=256,
            metavar="B",
            help="boards at a time; does not change the results (default: 256)",
        )
        self.add_argument(
            "--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)"
        )
        self.add_argument(
            "--quantize",
            choices=QUANTIZED,
            help="products in 8 bits, faster on CPUs (int8) or GPUs (fp8) and less exact, or as "
            "usual (default: the run's own, none unless arch.quantize was given)",
        )
        self.add_argument("--json", action="store_true", help="one JSON document on stdout")


def positive(text: str) -> int:
    """An integer of at least 1, for an argument parser."""
    if not re.fullmatch("0*[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 999999999")
    return int(text)


def supervision_depth(loaded: Loaded, given: int | None) -> int:
    """Supervision steps to run: the option, or what the run was evaluated with."""
    return given or loaded.config.get("eval_steps_max") or loaded.model.config.halt_max_steps
