"""From whatever holds a trained model to a `Model`, and from a Model to a folder or the hub.

Owns `Model.from_pretrained`, `save_pretrained` and `push_to_hub`, and `read_saved`, which every
command that takes a model goes through: run and step folders, folders of save_pretrained, files
of other projects (`foreign.py`), repositories of the hub (`hub.py`).
"""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from trm_fast import hub, thresholds
from trm_fast.checkpoint import load_checkpoint, passed_over, read_pointer, resolve
from trm_fast.config import ConfigError, TrainConfig
from trm_fast.durable import (
    CheckpointError,
    one_line,
    parse_tensors,
    read_bytes,
    unwritable,
    write_tensors,
    write_text,
)
from trm_fast.foreign import read_foreign
from trm_fast.foreign_file import ASKED, YAML, Foreign
from trm_fast.hub import Card
from trm_fast.interop import mismatch
from trm_fast.model import Model
from trm_fast.model_config import ArchConfig, ModelConfig
from trm_fast.options import reject_unknown
from trm_fast.overrides import OF_ONE_RUN, format_value
from trm_fast.progress import read_metrics

__all__ = [
    "SHIPPED",
    "WEIGHTS",
    "Saved",
    "build",
    "card_of",
    "find_checkpoint",
    "from_pretrained",
    "push_to_hub",
    "read_saved",
    "save_pretrained",
]

CONFIG, MODEL, README = "config.json", "model.safetensors", "README.md"
SHIPPED = "shipped"
"""The name of the model that comes with the package, where there is no such path."""
WEIGHTS = ("ema", "raw")
LONGEST, DEEPEST = 1_000_000, 10_000  # tokens, cycles: what a file may ask for
_PASSES, _TABLE = 100_000, 1 << 26  # cycles in all; numbers in what is not in the file


@dataclass(frozen=True)
class Saved:
    """A model as it was found.

    Attributes:
        config: "model" has the values of ModelConfig; of a run, all its settings beside it.
        model: the weights as trained, by the names of Model.state_dict().
        ema: their moving average, where there is one.
        step: optimizer steps.  place: the step folder or file, for messages.
        notes: what was assumed in reading it, a line each.
        only: where there is no `ema`, which weights `model` are: "raw", or the moving average.
    """

    config: dict[str, Any]
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    step: int
    place: Path
    notes: list[str] = field(default_factory=list)
    only: str = "raw"


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The step folder that a path means.

    Args:
        path: a step folder, a run folder (its newest intact step), or `last` or `best` in one.

    Raises:
        ValueError: there is none.
    """
    path = Path(path)
    if path.name in ("last", "best") and os.path.isfile(path):
        name = read_pointer(path.parent, path.name)
        # Of `last` any intact neighbour will do; a `best` that is damaged has no substitute.
        return resolve(path.parent if path.name == "last" else path.parent / str(name))
    if not os.path.exists(path):  # nor a name that is too long
        raise CheckpointError(f"{path}: no such checkpoint")
    return resolve(path)


def read_saved(
    source: str | os.PathLike[str],
    *,
    format: str = "auto",
    given: Mapping[str, Any] | None = None,
    config: str | Path | None = None,
    file: str | None = None,
    revision: str | None = None,
    bare_id: bool = False,
) -> Saved:
    """A model from anywhere.

    Args:
        source: what `find_checkpoint` takes, a folder of `save_pretrained`, a file that
            `foreign.read_foreign` takes, hf://owner/name, or `SHIPPED`.
        format, given, config: see `foreign.read_foreign`, for files of other projects.
        file: of a hub repository, the file of another project to read.
        revision: of a hub repository, the branch, tag or commit.
        bare_id: take owner/name for a hub repository where no such path exists.

    Raises:
        ValueError: one line: not there, damaged, of no known format, or a size is not known.
    """
    text = os.fspath(source)
    path = Path(text)
    if text == SHIPPED and not path.exists():
        path = Path(__file__).with_name(SHIPPED)
    reject_unknown(given or {}, ASKED, "config")
    repo = None if os.path.exists(path) else hub.hub_id(text, bare=bare_id)
    if repo is not None:
        path = _fetched(repo, file, revision)
    elif os.path.exists(path) and (file is not None or revision is not None):
        raise CheckpointError(f"{text}: is here; file and revision are for repositories of the hub")
    if os.path.isfile(path) and path.name not in ("last", "best"):
        return _from_foreign(path, read_foreign(path, format, given=given, config=config))
    if format != "auto":
        raise CheckpointError(f"{path}: is not a file of {format}")
    if os.path.exists(path) and (given or config is not None):
        odd = next(iter(given), "config") if given else f"the configuration {config}"
        raise CheckpointError(
            f"{path}: says all its settings itself; {odd} is for files of other projects"
        )
    if os.path.isfile(path / MODEL) and not (path / "manifest.json").exists():
        return _from_folder(path)
    folder = find_checkpoint(path)
    saved = load_checkpoint(folder)
    named = path.name == "best" or path.name.startswith("step_")  # neither has a substitute
    fault = None if named else passed_over(folder)
    notes = [fault] if fault else []
    only = _only(saved.config)
    return Saved(saved.config, saved.model, saved.ema, saved.step, folder, notes, only)


def _fetched(repo: str, file: str | None, revision: str | None) -> Path:
    """The local folder of a repository of save_pretrained, or the local copy of `file`."""
    if file is not None:
        path = hub.download(repo, file, revision)
        beside = str(PurePosixPath(file).with_name(YAML))
        hub.fetch(repo, beside, revision, optional=True)
        return path
    hub.download(repo, CONFIG, revision)
    hub.fetch(repo, thresholds.FILE, revision, optional=True)
    return hub.download(repo, MODEL, revision).parent


def _from_folder(folder: Path) -> Saved:
    """A folder of `save_pretrained`."""
    path = folder / CONFIG
    try:
        config = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: is not JSON: {one_line(error)}") from None
    if not isinstance(config, dict) or config.get("library_name") != "trm_fast":
        raise CheckpointError(
            f"{path}: is not a configuration of trm_fast; name the file of weights itself"
        )
    state = parse_tensors(folder / MODEL, read_bytes(folder / MODEL))
    step = config.get("step")
    steps = step if type(step) is int else 0
    return Saved(config, state, None, steps, folder, only=_only(config))


def _only(config: Mapping[str, Any]) -> str:
    """Which weights those are that lie there alone, by what `convert` and `save_pretrained` say."""
    return "ema" if config.get("weights") == "ema" else "raw"


def _from_foreign(path: Path, foreign: Foreign) -> Saved:
    values = {**foreign.config, "name": foreign.arch}
    try:
        config = ModelConfig.from_dict(values)
        _bounded(config, foreign.model)
        own = _shapes(config)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None

    def fitted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        named = {f"inner.{name}": value for name, value in state.items()}
        if fault := _unfit(named, own):
            raise CheckpointError(f"{path}: {fault}")
        return {name: named[name].to(value.dtype) for name, value in own.items()}

    arch = {k: v for k, v in config.to_dict().items() if k in ArchConfig.__dataclass_fields__}
    loss = foreign.settings.get("loss_type")
    if loss in ArchConfig.__dataclass_fields__["loss_type"].metadata["choices"]:
        arch["loss_type"] = loss
    settings: dict[str, Any] = {
        "arch": arch,
        "model": config.to_dict(),
        "source": f"{foreign.format}: {path.name}",
    }
    ema = None if foreign.ema is None else fitted(foreign.ema)
    return Saved(settings, fitted(foreign.model), ema, foreign.step, path, foreign.notes)


def _unfit(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str | None:
    """The first way in which weights are not those of such a model, in words."""
    for name, value in state.items():
        if not value.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            return f"{name} is of {kind}; a floating type was expected"
    return mismatch(state, own)


def _shapes(config: ModelConfig) -> dict[str, Tensor]:
    """Names, shapes and types of a Model's weights, without memory for them."""
    if config.pos_encodings == "rope":  # whose tables are no weights
        config = replace(config, pos_encodings="none")
    try:
        with torch.device("meta"):
            return Model(config).state_dict()
    except (RuntimeError, OverflowError) as error:  # sizes beyond what PyTorch can count
        raise ConfigError(f"no such network can be built ({one_line(error)})") from None


def _bounded(config: ModelConfig, state: Mapping[str, Tensor]) -> None:
    """ConfigError where a configuration wants more memory than its weights fill, or endless work:
    a file from elsewhere may say anything."""
    largest = max((value.numel() for value in state.values()), default=0)
    largest = max(4 * largest, 1 << 20)  # what is near is told better by the names and shapes
    token = config.total_len * config.token_width if config.mlp_t else 0
    head = config.head_dim if config.pos_encodings == "rope" and not config.mlp_t else 0
    gated, channel = 0, config.channel_width
    if config.kind == "gated_mlp":
        gated, channel = round(config.expansion * config.hidden_size), 0
    wanted = {
        "expansion": (gated * config.hidden_size, largest),
        "vocab_size": (config.vocab_size * config.hidden_size, largest),
        "intermediate_size": (config.hidden_size * channel, largest),
        "token_intermediate_size": (token, largest),
        "puzzle_emb_ndim": (config.num_puzzle_identifiers * config.puzzle_emb_ndim, largest),
        "L_layers": (config.blocks, len(state)),
        "batch_size": (config.batch_size, 1 << 16),
        "seq_len": (config.total_len, LONGEST),
        "H_cycles": (config.H_cycles, DEEPEST),
        "L_cycles": (config.L_cycles, DEEPEST),
        "halt_max_steps": (config.halt_max_steps, DEEPEST),
        "latents": (config.latents, DEEPEST),
        "H_cycles * L_cycles * halt_max_steps": (
            config.H_cycles * config.L_cycles * config.halt_max_steps,
            _PASSES,
        ),
        # What no shape in the file says: rotary tables, the rows of a batch.
        "seq_len * hidden_size / num_heads": (config.total_len * head, _TABLE),
        "batch_size * puzzle_emb_ndim": (config.batch_size * config.puzzle_emb_ndim, _TABLE),
    }
    for name, (size, limit) in wanted.items():
        if size > limit:
            raise ConfigError(f"{name} is larger than any such model's: {size}, up to {limit}")


def build(
    saved: Saved, weights: str | None = None, quantize: str | None = None
) -> tuple[Model, str]:
    """The model on the CPU, in evaluation mode, and which weights it has: "ema" or "raw".

    Args:
        saved: of `read_saved`.
        weights: "ema" or "raw"; None is the moving average where there is one.
        quantize: `arch.quantize` in place of the saved one.

    Raises:
        ValueError: no moving average in it, weights that do not fit or are not finite, or a
            `quantize` that there is not.
    """
    if weights is not None and weights not in WEIGHTS:
        raise ValueError(f"weights must be 'ema' or 'raw', got {weights!r}")
    place = saved.place
    if saved.ema is None and weights not in (None, saved.only):
        lacks = "the moving average only; take weights ema"
        if weights == "ema":
            lacks = "no moving average; take weights raw"
        raise CheckpointError(f"{place}: the run kept {lacks}")
    chosen = weights or (saved.only if saved.ema is None else "ema")
    state = saved.model if chosen == "raw" or saved.ema is None else saved.ema
    values = saved.config.get("model")
    if not isinstance(values, dict):
        raise CheckpointError(f"{place / CONFIG}: the model's configuration is missing")
    try:
        config = ModelConfig.from_dict(values)
        _bounded(config, state)
        own = _shapes(config)
    except ValueError as error:
        raise CheckpointError(f"{place / CONFIG}: {error}") from None
    if fault := _unfit(state, own):
        raise CheckpointError(f"{place}: weights do not fit config.json ({fault})")
    if quantize is not None:  # a wrong one is the caller's fault, not the file's
        config = replace(config, quantize=quantize)
    try:
        model = Model(config)
    except ValueError as error:
        raise CheckpointError(f"{place / CONFIG}: {error}") from None
    model.load_state_dict(state, strict=True)
    broken = next((name for name, t in state.items() if not torch.isfinite(t).all()), None)
    if broken is not None:
        raise CheckpointError(f"{place}: {chosen} weights are not finite in {broken}")
    kept = thresholds.beside(place)
    if kept is not None:
        model.q_threshold, fault = thresholds.kept_threshold(kept, saved.step, chosen, model)
        saved.notes.extend([fault] if fault else [])
    return model.eval(), chosen


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    weights: str | None = None,
    config: Mapping[str, Any] | None = None,
    file: str | None = None,
    revision: str | None = None,
) -> Model:
    """A trained model, on the CPU, in evaluation mode.

    Args:
        source: a run or step folder, a folder of `save_pretrained`, a file of another project
            (official, tiny-recursive-rs, nano-trm, ...), a hub repository, owner/name, or
            `SHIPPED`.
        weights: "ema" or "raw"; None is the moving average where there is one.
        config: what a file of another project does not hold: H_cycles, L_cycles, num_heads,
            seq_len, ... (`foreign_file.ASKED`).
        file: of a hub repository, the file of another project to read.
        revision: of a hub repository, the branch, tag or commit.

    Raises:
        ValueError: one line that names the source and the reason.
    """
    saved = read_saved(source, given=config, file=file, revision=revision, bare_id=True)
    return build(saved, weights)[0]


def save_pretrained(
    model: Model,
    folder: str | os.PathLike[str],
    card: Card | None = None,
    step: int = 0,
    weights: str | None = None,
) -> Path:
    """Write config.json, model.safetensors and the model card README.md, and q_threshold.json where
    the model has one; returns the folder.

    Args:
        model: on any device.
        folder: made if missing; files of these names in it are replaced.
        card: what the card says beyond the network.  step: optimizer steps, if known.
        weights: "ema" or "raw", so that whoever reads them is told; None: they count as raw.

    Raises CheckpointError for a folder that cannot be written.
    """
    target = Path(folder)
    return _write_folder(model, target, card, step, weights, target.resolve().name or "model")


def _write_folder(
    model: Model, target: Path, card: Card | None, step: int, weights: str | None, title: str
) -> Path:
    values = model.config.to_dict()
    config = {"library_name": "trm_fast", "model": values, "step": step}
    config |= {} if weights is None else {"weights": weights}
    parameters = sum(p.numel() for p in model.parameters())
    text = hub.model_card(values, parameters, card or Card(), title)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(target, error) from None
    metadata = {"format": "pt", "trm_fast": json.dumps(config)}
    write_tensors(target / MODEL, model.state_dict(), metadata)
    write_text(target / CONFIG, json.dumps(config, indent=2) + "\n")
    write_text(target / README, text)
    kept = target / thresholds.FILE
    if model.q_threshold is None:
        try:
            kept.unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(kept, error) from None
    else:
        entry = {"threshold": model.q_threshold}
        thresholds.keep_threshold(kept, step, weights or "raw", model, entry)
    return target


def push_to_hub(
    model: Model,
    repo: str,
    card: Card | None = None,
    *,
    private: bool = False,
    step: int = 0,
    weights: str | None = None,
) -> str:
    """Send the files of `save_pretrained` to the hub; returns the address.

    Args:
        model, card, step, weights: see `save_pretrained`.
        repo: owner/name; made if it is not there, then `private` counts.

    Raises CheckpointError: huggingface_hub is not installed, no permission, no network.
    """
    name = hub.hub_id(repo, bare=True)
    if name is None:
        raise CheckpointError(f"{repo}: not of the form owner/name")
    with tempfile.TemporaryDirectory() as folder:
        target = _write_folder(model, Path(folder) / name, card, step, weights, name)
        words = "Model trained with trm_fast"
        return hub.upload(target, name, private=private, message=words, owned=[thresholds.FILE])


def card_of(saved: Saved) -> Card:
    """What a run's own settings and measurements say for its card."""
    config = saved.config
    data, source = config.get("data"), config.get("source")
    if not isinstance(data, dict):
        return Card(data=f"Converted from {source}." if isinstance(source, str) else None)
    paths = ", ".join(map(str, data.get("data_paths") or ())) or "boards generated by trm_fast"
    base = TrainConfig().to_dict()
    words = []
    arch = config.get("arch")
    given = {k: v for k, v in config.items() if k in base and k not in ("arch", *OF_ONE_RUN)}
    given |= {f"arch.{k}": v for k, v in (arch.items() if isinstance(arch, dict) else ())}
    usual = {**base, **{f"arch.{k}": v for k, v in base["arch"].items()}}
    for key, value in given.items():
        if key in usual and usual[key] != value and key not in ("preset", "project_name"):
            words.append(shlex.quote(f"{key}={format_value(value)}"))
    rows = read_metrics(saved.place.parent)
    metrics = {
        name: value
        for row in rows
        if row.get("step") == saved.step
        for name, value in row.items()
        if isinstance(value, float) and not name.startswith("train/") and "/" in name
    }
    return Card(paths, " ".join(["trm-fast train arch=trm", *words]), metrics)
