"""`trm-fast export CHECKPOINT FOLDER`: a model for where this package is not.

Owns the command line, the choice of files, and what they say of themselves. A file is compared with
the model (`agreement.py`) before it is put in its place. Imported by `__main__.py` only.

Dims legend: see `portable.py`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from trm_fast import __version__, onnx_file
from trm_fast.agreement import Agreement, Expected, Graph, some_boards
from trm_fast.console import say
from trm_fast.data.maze_solver import CHARSET
from trm_fast.durable import CheckpointError, write_bytes
from trm_fast.loading import MODEL, USAGE, CommandError, Loaded, Parser, load, supervision_depth
from trm_fast.model import Model
from trm_fast.portable import (
    ExportError,
    Solve,
    Step,
    examples,
    loaded_program,
    plain_model,
    program_bytes,
    state_shape,
    traced,
)
from trm_fast.rules import maze_side, sudoku_side

__all__ = ["main"]

UNLIKE = 6
"""Exit status when a graph cannot be made, or says something else than the model."""

FORMATS, GRAPHS = ("onnx", "pt2"), ("step", "solve")
BOARDS = 8  # that a file is compared on


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files and say how they compare. Returns the exit status."""
    try:
        options = _parser().parse_args(argv)
        loaded = _load(options)
        files = _made(options, loaded)
        _place(Path(options.folder), files)
    except CommandError as error:
        say(f"trm-fast export: {error}", err=True)
        return error.status
    for name, (data, agreement) in files.items():
        say(
            f"{Path(options.folder, name)}  {len(data) / 1e6:.2f} MB; on {BOARDS} boards error "
            f"{agreement.error:.1e} in a step, {agreement.unlike} of {agreement.cells} cells unlike"
        )
    return 0


def _parser() -> Parser:
    parser = Parser(
        "trm-fast export",
        "Write a trained model as graphs that run without this package: one supervision step, and\n"
        "a solve of M steps, as ONNX and as torch.export programs, for any number of boards.\n"
        "Every file is compared with the model before it is put in its place.",
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a run folder, RUN/last, RUN/best, RUN/step_N, a file of another project, or shipped",
    )
    parser.add_argument("folder", metavar="FOLDER", help="where step.onnx, solve.onnx, ... go")
    parser.add_argument(
        "--format",
        dest="formats",
        action="append",
        choices=FORMATS,
        help="files to write (again for more; default: both)",
    )
    parser.add_argument(
        "--graph",
        dest="graphs",
        action="append",
        choices=GRAPHS,
        help="graphs to write (again for more; default: both)",
    )
    parser.add_argument(
        "--int8",
        action=argparse.BooleanOptionalAction,
        help="products in 8 bits (default: the run's own, no unless arch.quantize=int8 was given)",
    )
    parser.add_model()
    parser.set_defaults(formats=None, graphs=None)
    return parser


def _load(options: argparse.Namespace) -> Loaded:
    """The model; CommandError, also where what ONNX files need is not installed."""
    options.formats, options.graphs = options.formats or FORMATS, options.graphs or GRAPHS
    try:
        if "onnx" in options.formats:
            onnx_file.needed()
    except ExportError as error:
        raise CommandError(USAGE, error) from None
    if options.steps is not None and "solve" not in options.graphs:
        raise CommandError(USAGE, "--steps is for the graph solve; the graph step is one step")
    if Path(options.folder).is_file():
        raise CommandError(USAGE, f"{options.folder}: is a file; a folder was expected")
    products = {True: "int8", False: "none", None: None}[options.int8]
    try:
        loaded = load(options.checkpoint, weights=options.weights, device="cpu", quantize=products)
    except (ValueError, OSError) as error:
        raise CommandError(MODEL, error) from None
    config = loaded.model.config
    if config.quantize == "fp8":
        raise CommandError(USAGE, "8-bit floats are not exported: --int8, or --no-int8")
    for note in loaded.notes:
        say(f"note: {note}", err=True)
    if config.forward_dtype != "float32":
        say(f"note: the graphs compute in float32, the run in {config.forward_dtype}", err=True)
    return loaded


def _made(options: argparse.Namespace, loaded: Loaded) -> dict[str, tuple[bytes, Agreement]]:
    """Every file that was asked for, by its name, with how it compares; CommandError where one
    cannot be made, or says something else."""
    steps = supervision_depth(loaded, options.steps)
    try:
        model = plain_model(loaded.model, loaded.model.config.quantize)
        if "onnx" in options.formats:
            _fits(model)
        maker = _Maker(model, steps)
        suffix = "-int8" if model.config.quantize == "int8" else ""
        files = {}
        for kind in options.graphs:
            for format in options.formats:
                facts = facts_of(loaded, model, kind, format, steps)
                made = maker.pt2(kind, facts) if format == "pt2" else maker.onnx(kind, facts)
                files[f"{kind}{suffix}.{format}"] = made
    except (ExportError, ValueError) as error:
        raise CommandError(UNLIKE, f"{options.checkpoint}: {error}") from None
    return files


def _fits(model: Model) -> None:
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    if weights > onnx_file.LARGEST:
        raise ExportError(
            f"{weights / 1e9:.1f} GB of weights, an ONNX file holds "
            f"{onnx_file.LARGEST / 1e9:.1f} GB; --format pt2 holds them"
        )


class _Maker:
    """The files of one model, each compared with it as soon as it is made."""

    def __init__(self, model: Model, steps: int) -> None:
        inputs = some_boards(model, BOARDS)
        self._step, self._shape, self._steps = Step(model), state_shape(model), steps
        self._example = examples(model, inputs[:2])
        self._expected = Expected(model, inputs, steps)

    @cached_property
    def _program(self) -> ExportedProgram:
        return traced(self._step, self._example)

    @cached_property
    def _graph(self) -> Any:
        with torch.no_grad():
            outputs = list(self._step(self._example))
        return onnx_file.from_program(self._program, self._example, outputs)

    def onnx(self, kind: str, facts: dict[str, str]) -> tuple[bytes, Agreement]:
        graph = self._graph
        if kind == "solve":
            graph = onnx_file.unrolled(graph, self._shape, self._steps)
        data = onnx_file.file_bytes(graph, facts)
        return data, self._compared(kind, onnx_file.running(data))

    def pt2(self, kind: str, facts: dict[str, str]) -> tuple[bytes, Agreement]:
        program = self._program if kind == "step" else self._solve()
        data = program_bytes(program, json.dumps(facts, indent=2))
        return data, self._compared(kind, loaded_program(data))

    def _solve(self) -> ExportedProgram:
        given = {name: t for name, t in self._example.items() if name not in self._shape}
        given.pop("halted", None)
        return traced(Solve(self._step, self._shape, self._steps), given)

    def _compared(self, kind: str, graph: Graph) -> Agreement:
        judge = self._expected.of_step if kind == "step" else self._expected.of_solve
        return judge(graph)


def facts_of(loaded: Loaded, model: Model, kind: str, format: str, steps: int) -> dict[str, str]:
    """What a file says of itself: texts, also where they are numbers."""
    config, place = model.config, loaded.folder
    facts = {
        "trm_fast": __version__,
        "graph": kind,
        "network": config.kind,
        # Not the whole path, which is nobody else's business.
        "model": "/".join(place.parts[-2:] if place.is_dir() else place.parts[-1:]),
        "optimizer_step": str(loaded.step),
        "weights": loaded.weights,
        "products": "int8" if config.quantize == "int8" else "float32",
        "seq_len": str(config.seq_len),
        "vocab_size": str(config.vocab_size),
        "tokens": _tokens(model),
        "supervision_steps": str(steps),
        "states": json.dumps(state_shape(model)),
    }
    return facts | ({"opset": str(onnx_file.OPSET)} if format == "onnx" else {})


def _tokens(model: Model) -> str:
    """What the token values stand for, as far as the sizes tell."""
    if sudoku_side(model.config):
        return "0 padding, 1 blank, digit d is d + 1; row by row"
    if maze_side(model.config):
        return f"0 padding, 1 to 5 are the characters of {CHARSET!r}; row by row"
    return f"0 padding, 1 to {model.config.vocab_size - 1} as in the training data"


def _place(folder: Path, files: dict[str, tuple[bytes, Agreement]]) -> None:
    try:
        for name, (data, _) in files.items():
            write_bytes(folder / name, data)
    except CheckpointError as error:
        raise CommandError(USAGE, error) from None


if __name__ == "__main__":
    raise SystemExit(main())
