"""`trm-fast convert SOURCE TARGET`: trained models from and to the formats of other projects.

Owns the command line and what is printed; reading is `pretrained.read_saved`, writing is
`foreign_write` and, for our own formats, `checkpoint` and `pretrained`. Imported by `__main__.py`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trm_fast.checkpoint import CONFIG, list_steps, save_checkpoint
from trm_fast.console import say
from trm_fast.foreign import FORMATS
from trm_fast.foreign_write import WRITERS, Parcel
from trm_fast.hub import Card
from trm_fast.loading import MODEL, USAGE, CommandError, Parser, positive
from trm_fast.model import Model
from trm_fast.pretrained import Saved, build, card_of, push_to_hub, read_saved, save_pretrained
from trm_fast.thresholds import FILE, keep_threshold

__all__ = ["main"]

OURS = ("trm_fast", "pretrained", "hub")


def main(argv: Sequence[str] | None = None) -> int:
    """Read, write and say what was done. Returns 0, 2 (command line) or 3 (models)."""
    try:
        options = _parser().parse_args(argv)
        saved = _read(options)
        lines = _write(options, saved)
    except CommandError as error:
        say(f"trm-fast convert: {error}", err=True)
        return error.status
    for line in [*saved.notes, *lines]:
        say(f"note: {line}", err=True)
    say(f"{options.source} -> {options.target} ({options.to})")
    return 0


def _parser() -> Parser:
    parser = Parser(
        "trm-fast convert",
        "Turn a trained model into another project's format, or one of theirs into ours.\n"
        "SOURCE: a run or step folder, a folder of save_pretrained, hf://owner/name, or a file of\n"
        "another project. TARGET: by --to, a run folder (trm_fast), a folder (pretrained), a file\n"
        "(all others), or owner/name on the hub (hub).",
    )
    add = parser.add_argument
    add("source", metavar="SOURCE")
    add("target", metavar="TARGET")
    add("--from", dest="format", default="auto", choices=("auto", "trm_fast", *FORMATS))
    add("--to", default="trm_fast", choices=(*OURS, *WRITERS), help="(default: trm_fast)")
    add("--config", metavar="FILE", help="an official all_config.yaml (default: beside SOURCE)")
    add("--file", metavar="NAME", help="of a hub repository, the file to read")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--ema", action="store_true", help="only the moving average")
    which.add_argument("--raw", action="store_true", help="only the weights as trained")
    for name in ("H-cycles", "L-cycles", "num-heads", "seq-len", "halt-max-steps"):
        add(f"--{name}", type=positive, metavar="N", help="what the file does not hold")
    add("--puzzle-emb-len", type=_whole, metavar="N", help="prefix tokens, 0 or more")
    add("--pos-encodings", choices=("rope", "learned", "none"))
    add("--carry", choices=("zeros", "init"), help="rs: where the states start (default: zeros)")
    add("--semantics", choices=("v1", "head"), help="s4nj1th: in place of what the gates say")
    add("--keep-tokens", action="store_true", help="nano-trm: leave Sudoku's tokens as they are")
    add("--step", type=_whole, metavar="N", help="optimizer steps that TARGET shall say")
    add("--private", action="store_true", help="hub: make the repository a private one")
    return parser


def _whole(text: str) -> int:
    return 0 if text == "0" else positive(text)


def _read(options: argparse.Namespace) -> Saved:
    names = (
        *("H_cycles", "L_cycles", "num_heads", "seq_len", "halt_max_steps", "puzzle_emb_len"),
        *("pos_encodings", "carry", "semantics", "keep_tokens"),
    )
    given = {name: getattr(options, name) for name in names}
    given = {name: value for name, value in given.items() if value not in (None, False)}
    given |= {"puzzle_emb_len": 0} if options.puzzle_emb_len == 0 else {}
    try:
        saved = read_saved(
            options.source,
            format="auto" if options.format == "trm_fast" else options.format,
            given=given,
            config=options.config,
            file=options.file,
        )
    except (ValueError, OSError) as error:
        raise CommandError(MODEL, error) from None
    if options.format == "trm_fast" and saved.place.is_file():
        raise CommandError(MODEL, f"{options.source}: is not a run of trm_fast")
    return saved


def _write(options: argparse.Namespace, saved: Saved) -> list[str]:
    weights = "ema" if options.ema else "raw" if options.raw else None
    step = saved.step if options.step is None else options.step
    target = Path(options.target)
    try:
        model, chosen = build(saved, weights)
        if options.to == "trm_fast":
            return _write_run(saved, target, step, weights, model, chosen)
        card: Card = card_of(saved)
        if options.to == "pretrained":
            save_pretrained(model, target, card, step, chosen)
            return [f"{chosen} weights"]
        if options.to == "hub":
            private = options.private
            where = push_to_hub(
                model, options.target, card, private=private, step=step, weights=chosen
            )
            return [where]
        if target.is_dir():
            raise CommandError(USAGE, f"{target}: is a folder; {options.to} is one file")
        arch = saved.config.get("arch")
        loss = arch.get("loss_type") if isinstance(arch, dict) else None
        parcel = Parcel(
            model.config,
            model.state_dict(),
            model.state_dict() if options.ema else saved.model,
            step,
            loss or "stablemax_cross_entropy",
        )
        return [f"{chosen} weights", *WRITERS[options.to](parcel, target)]
    except (ValueError, OSError) as error:
        raise CommandError(MODEL, f"{options.source}: {_without(options.source, error)}") from None


def _without(source: str, error: Exception) -> str:
    """The error's text, without the name of the source where it begins with it."""
    return str(error).removeprefix(f"{source}: ")


def _write_run(
    saved: Saved, target: Path, step: int, weights: str | None, model: Model, chosen: str
) -> list[str]:
    """A run folder with one step: what evaluate, solve and load_checkpoint read. `model` is
    `saved` as built, with its threshold, of the weights `chosen`."""
    standing = [folder.name for _, folder in list_steps(target) if not _is_converted(folder)]
    if standing:
        raise CommandError(
            USAGE, f"{target}: holds a run ({standing[-1]}) already; name another folder"
        )
    # "source" says that there is no run here to go on with.
    config: dict[str, Any] = {
        "source": f"trm_fast: {saved.place}",
        **saved.config,
        "finished": True,
        "weights": chosen,
    }
    raw = saved.ema if weights == "ema" and saved.ema is not None else saved.model
    ema = None if weights is not None else saved.ema
    folder = save_checkpoint(
        target, step, model=raw, ema=ema, config=config, train_state={"converted": True}
    )
    if model.q_threshold is not None:
        keep_threshold(target / FILE, step, chosen, model, {"threshold": model.q_threshold})
    kept = "raw and ema weights" if ema is not None else f"{chosen} weights only"
    return [f"{folder}: {kept}; to train on from them: load_checkpoint={target}"]


def _is_converted(folder: Path) -> bool:
    """Whether a step folder was written here, and not by a training run."""
    try:
        return "source" in json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, TypeError):
        return False


if __name__ == "__main__":
    raise SystemExit(main())
