"""`trm-fast COMMAND ...`, the same as `python -m trm_fast COMMAND ...`.

Owns the list of commands. Each is a module with `main(argv) -> int`, imported only when it is
called, so that `trm-fast --help` answers at once. Imported by nobody. It imports nothing of the
package before `main` runs: a Ctrl-C while modules are loaded, too, ends on one line.
"""

import sys
from collections.abc import Sequence
from importlib import import_module

__all__ = ["main"]

# command -> (module, what it does)
COMMANDS = {
    "train": ("trm_fast.train", "train a model; with no arguments, the default 9x9 Sudoku job"),
    "evaluate": ("trm_fast.evaluate", "measure a checkpoint on a data directory or a CSV file"),
    "solve": ("trm_fast.solve", "answer puzzles given as arguments, in a file or on stdin"),
    "demo": ("trm_fast.demo.command", "a local page: watch a model think, step by step"),
    "data": ("", "build a data set: trm-fast data sudoku ..."),
    "convert": ("trm_fast.convert", "models from and to the formats of other projects"),
    "export": ("trm_fast.export", "write a model as ONNX and torch.export graphs"),
    "info": ("trm_fast.info", "versions, devices, and which implementation serves which op"),
    "bench": ("trm_fast.bench", "what you gain here: training and solving, timed"),
}
ALIASES = {"eval": "evaluate"}
BUILDERS = {
    "sudoku": ("trm_fast.data.sudoku", "9x9, 6x6 and 4x4 Sudoku: from files or generated"),
    "arc": ("trm_fast.data.arc", "ARC-AGI-1, ARC-AGI-2, ConceptARC: from the Kaggle files"),
    "maze": ("trm_fast.data.maze", "mazes on square grids: from files or generated"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` without the program name (default: the process's own).

    Returns the command's exit status; 2 for a command that does not exist; 130 after Ctrl-C.
    """
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        from trm_fast.console import say

        say("interrupted", err=True)
        return 130


def _main(args: list[str]) -> int:
    from trm_fast import __version__
    from trm_fast.console import say

    if not args or args[0] in ("-h", "--help", "help"):
        say(_help())
        return 0
    if args[0] in ("-V", "--version"):
        say(f"trm-fast {__version__}")
        return 0
    name, rest = ALIASES.get(args[0], args[0]), args[1:]
    if name == "data":
        return _data(rest)
    if name not in COMMANDS:
        return _unknown("command", args[0], [*COMMANDS, *ALIASES])
    return _run(COMMANDS[name][0], rest)


def _data(args: list[str]) -> int:
    from trm_fast.console import say

    if not args or args[0] in ("-h", "--help"):
        say("usage: trm-fast data BUILDER ...\n\nbuilders:\n" + _table(BUILDERS))
        return 0
    if args[0] not in BUILDERS:
        return _unknown("builder", args[0], list(BUILDERS))
    return _run(BUILDERS[args[0]][0], args[1:])


def _run(module: str, args: list[str]) -> int:
    from trm_fast.console import say
    from trm_fast.extension.build import BuildError

    try:
        return int(import_module(module).main(args))
    except BuildError as error:  # TRM_FAST_EXT=require, or another word there
        say(f"trm-fast: {error}", err=True)
        return 2


def _unknown(kind: str, given: str, allowed: list[str]) -> int:
    from trm_fast.console import say
    from trm_fast.options import did_you_mean

    hint = did_you_mean(given, allowed)
    say(f"trm-fast: unknown {kind} {given!r}{hint}; allowed: {', '.join(allowed)}", err=True)
    return 2


def _help() -> str:
    return (
        "usage: trm-fast COMMAND ...      (or: python -m trm_fast COMMAND ...)\n\ncommands:\n"
        f"{_table(COMMANDS)}\n\n"
        "`trm-fast COMMAND --help` explains one of them; `eval` is short for `evaluate`."
    )


def _table(rows: dict[str, tuple[str, str]]) -> str:
    return "\n".join(f"  {name:<10}{meaning}" for name, (_, meaning) in rows.items())


if __name__ == "__main__":
    sys.exit(main())
