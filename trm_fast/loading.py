"""From a checkpoint on disk to a model that answers, and the exit statuses of answer commands.

Owns choosing the folder, the weights (moving average or raw) and the device, and the options and
errors that these commands share. Imported by evaluate and solve; the device also by the trainer.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from trm_fast.capture import graphs_allowed
from trm_fast.config import QUANTIZED
from trm_fast.console import positive, say
from trm_fast.model import Model
from trm_fast.options import did_you_mean
from trm_fast.pretrained import WEIGHTS, build, read_saved

USAGE, MODEL, UNREADABLE, MISMATCH = 2, 3, 4, 5
"""Exit statuses: the command line or a missing input; the checkpoint; input that cannot be read;
input that has another size or vocabulary than the model."""


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
        folder: the step folder, or the file of another project.
        step: optimizer steps taken.  weights: "ema" or "raw".
        notes: what was assumed in reading it, a line each.
    """

    model: Model
    config: dict[str, Any]
    folder: Path
    step: int
    weights: str
    notes: Sequence[str] = ()


def check_picture(name: str, kind: str) -> None:
    """CommandError unless a picture can be written under this name: its ending is that of `kind`,
    such as "png", and its folder is there."""
    path = Path(name)
    if path.suffix.lower() != f".{kind}":
        raise CommandError(
            USAGE, f"{name}: is to be a {kind.upper()}, its name must end in .{kind}"
        )
    if path.is_dir():
        raise CommandError(USAGE, f"{name}: cannot be written: it is a folder")
    if not path.parent.is_dir():
        raise CommandError(USAGE, f"{name}: cannot be written: there is no folder {path.parent}")


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


def load(
    path: str | os.PathLike[str],
    *,
    weights: str | None = None,
    device: str = "auto",
    quantize: str | None = None,
) -> Loaded:
    """The model of a checkpoint, in evaluation mode, and where it comes from.

    Args:
        path: see `pretrained.read_saved`.
        weights: "ema" or "raw"; None is the moving average where the run kept one.
        device: see `pick_device`.
        quantize: `arch.quantize` in place of the run's own: "none", "int8" or "fp8".

    Raises:
        ValueError: no checkpoint, a damaged one, no moving average in it, or another device.
    """
    where = pick_device(device)
    saved = read_saved(path)
    model, chosen = build(saved, weights, quantize)
    return Loaded(model.to(where), saved.config, saved.place, saved.step, chosen, saved.notes)


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
    """`load` by the shared options of a command: CommandError with status USAGE (device,
    environment) or MODEL (all else). What was assumed in reading is said on standard error."""
    weights, device, quantize = options.weights, options.device, options.quantize
    try:
        pick_device(device)
        graphs_allowed()
    except ValueError as error:
        raise CommandError(USAGE, error) from None
    try:
        loaded = load(path, weights=weights, device=device, quantize=quantize)
    except (ValueError, OSError) as error:
        raise CommandError(MODEL, error) from None
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    for note in loaded.notes:
        say(f"note: {note}", err=True)
    return loaded


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line: CommandError with status USAGE."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=(
                "exit status: 0 done; 1 an answer breaks the rules or is withheld (solve only); "
                "2 command\nline or missing input; 3 checkpoint; 4 input that cannot be read; 5 "
                "size or vocabulary\nunlike the model's; 6 a graph unlike the model (export only)"
            ),
        )

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message and unknown.startswith("--"):
            given = unknown.split()[0].partition("=")[0]
            message += did_you_mean(given, self._option_string_actions)
        raise CommandError(USAGE, f"{message}; see --help")

    def add_model(self) -> None:
        """The options of every command that runs a model: which weights, how many steps."""
        self.add_argument(
            "--depth",
            "--steps",
            dest="steps",
            type=positive,
            metavar="D",
            help="supervision steps (default: the run's own)",
        )
        self.add_argument(
            "--weights",
            choices=WEIGHTS,
            help="moving average or raw weights (default: ema where the run kept it)",
        )

    def add_threads(self) -> None:
        """The option of every command that answers."""
        self.add_argument(
            "--threads",
            type=positive,
            metavar="N",
            help="CPU threads (default: PyTorch's, one a core; fewer are faster where other work "
            "keeps the cores busy)",
        )

    def add_shared(self) -> None:
        """The options that every answer command has."""
        self.add_model()
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
        self.add_threads()
        self.add_argument(
            "--quantize",
            choices=QUANTIZED,
            help="products in 8 bits, faster on CPUs (int8) or GPUs (fp8) and less exact, or as "
            "usual (default: the run's own, none unless arch.quantize was given)",
        )
        self.add_argument("--json", action="store_true", help="one JSON document on stdout")


def supervision_depth(loaded: Loaded, given: int | None) -> int:
    """Supervision steps to run: the option, or what the run was evaluated with."""
    return given or loaded.config.get("eval_steps_max") or loaded.model.config.halt_max_steps
