"""Every setting of the project: the model's, the training run's, the presets.

Owns TrainConfig and the layering of settings, and hands on ModelConfig, ArchConfig, PRESETS,
ConfigError and did_you_mean: anything may import those from here. It imports `model_config`,
`presets`, `names`, `options` and the standard library only. Keys and defaults are those of the
official TinyRecursiveModels configuration, so that its command lines keep working; the keys in
BEYOND_OFFICIAL are ours, and their defaults leave the official behaviour as it is.
"""

from __future__ import annotations

import dataclasses
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trm_fast.model_config import (
    ARCHS,
    QUANTIZED,
    ArchConfig,
    ModelConfig,
    arch_defaults,
    arch_name,
)
from trm_fast.names import slug
from trm_fast.options import ConfigError, check_fields, did_you_mean, option, show, to_int
from trm_fast.presets import PRESETS

__all__ = [
    "ARCHS",
    "DEFAULT_PRESET",
    "PRESETS",
    "QUANTIZED",
    "ArchConfig",
    "ConfigError",
    "EvaluatorConfig",
    "ModelConfig",
    "TrainConfig",
    "canonical_key",
    "did_you_mean",
    "flatten",
    "from_preset",
    "layer",
    "option_fields",
    "show",
]

DEFAULT_PRESET = "sudoku-mini"
LOSS_HEAD = "losses@ACTLossHead"
# Keys that the official code does not have.
BEYOND_OFFICIAL = """
    preset generate generate_puzzle augment curriculum depth_stages grad_accum steps seeds
    max_skipped optimizer muon_lr weight_decay_on grad_clip step_loss_decay constraint_weight
    constraint_boxes ema_warmup eval_steps eval_max_puzzles eval_batch_size eval_steps_max resume
    load_identifiers save_interval keep official log_interval logger device threads compile profile
    cuda_graph
    arch.loss_type arch.intermediate_size arch.token_intermediate_size arch.intermediate_multiple
    arch.q_readout arch.q_logits arch.semantics arch.vector_gates arch.cell_attention arch.dropout
    arch.damping arch.noise arch.random_init arch.latents arch.backend arch.policy arch.quantize
"""
Plain = str | int | float | bool | None
ALIASES = {
    "arch": "arch.name",
    "arch.loss.loss_type": "arch.loss_type",
    "data_path": "data_paths",
}


MOST_COMPILED = 6  # stages: with the last one fewer than the variants that Dynamo keeps


@dataclass(frozen=True)
class EvaluatorConfig:
    """One evaluator by its official name, such as `arc@ARC`, with its own options."""

    name: str
    options: tuple[tuple[str, Plain | tuple[Plain, ...]], ...] = ()

    @classmethod
    def from_value(cls, value: object) -> EvaluatorConfig:
        """From a name or a mapping `{name: arc@ARC, ...}`; ConfigError for anything else."""
        if isinstance(value, cls):
            return value
        given = {"name": value} if isinstance(value, str) else value
        if isinstance(given, Mapping) and isinstance(given.get("name"), str) and given["name"]:
            rest = {k: v for k, v in given.items() if k != "name"}
            values = {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in rest.items()}
            flat = [x for v in values.values() for x in (v if isinstance(v, tuple) else (v,))]
            plain = (str, int, float, bool, type(None))
            if all(isinstance(k, str) for k in rest) and all(isinstance(x, plain) for x in flat):
                return cls(given["name"], tuple(values.items()))
        raise ConfigError(
            f"evaluators must be a list of names or of {{name: NAME, option: value}}, "
            f"got {show(value)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """`{"name": ..., option: value, ...}`."""
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in self.options}
        return {"name": self.name, **options}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run. `TrainConfig()` is the official cfg_pretrain with arch=trm."""

    preset: str | None = option("start from a named set of values, see Presets", None)

    data_paths: tuple[str, ...] = option(
        "data directories to train on", ("data/arc-aug-1000",), section="Data"
    )
    data_paths_test: tuple[str, ...] = option(
        "data directories to evaluate on; none: data_paths", ()
    )
    generate: int = option("train on this many generated boards, not on data_paths", 0, low=0)
    generate_puzzle: str = option(
        "what generate makes: 9x9 Sudoku, or 10x10 mazes", "sudoku", choices=("sudoku", "maze")
    )
    augment: str = option(
        "symmetries drawn anew for every board", "none", choices=("none", "sudoku", "dihedral")
    )
    curriculum: float = option(
        "part of the run over which solution cells are handed back, fading out", 0.0, low=0, high=1
    )

    depth_stages: tuple[str, ...] = option(
        "cycles H x L until that part of the run: [0.3:1x2, 0.6:2x4]; then those of arch", ()
    )

    global_batch_size: int = option("boards per step on all processes", 768, low=1, section="Steps")
    grad_accum: int = option("parts that a batch is worked off in, to save memory", 1, low=1)
    epochs: int = option("visits of each puzzle group; sets the number of steps", 100000, low=1)
    steps: int | None = option("optimizer steps in all; goes before epochs", None, low=1)
    seed: int = option("seed of weights, data order and exploration", 0, low=0)
    seeds: int = option("runs one after another with seed, seed + 1, ...", 1, low=1)
    max_skipped: int = option("steps in a row with a non-finite gradient that stop a run", 5, low=1)

    optimizer: str = option(
        "optimizer of the weights",
        "adam_atan2",
        choices=("adam_atan2", "adamw", "muon"),
        section="Optimizer",
    )
    lr: float = option("highest learning rate", 1e-4, low=0)
    lr_min_ratio: float = option("last learning rate / lr; 1 = no decay", 1.0, low=0, high=1)
    lr_warmup_steps: int = option("steps of linear warm-up", 2000, low=0)
    weight_decay: float = option("decoupled weight decay", 0.1, low=0)
    weight_decay_on: str = option(
        "what decays: all weights, or matrices only and no biases, norms and gates (adamw)",
        "all",
        choices=("all", "matrices"),
    )
    beta1: float = option("decay of the mean of the gradient", 0.9, low=0, high=1, open=")")
    beta2: float = option("decay of the mean of its square", 0.95, low=0, high=1, open=")")
    muon_lr: float = option("learning rate of the matrices with optimizer=muon", 0.02, low=0)
    grad_clip: float = option("largest norm of the gradient; 0 = no limit", 0.0, low=0)
    step_loss_decay: float = option(
        "weight of the cells' loss in a supervision step, of that in the one before",
        1.0,
        low=0,
        high=1,
        open="(",
    )
    constraint_weight: float = option(
        "Sudoku: weight of a loss on rows, columns and boxes that hold a digit twice", 0.0, low=0
    )
    constraint_boxes: bool = option("whether boxes count in it, beside rows and columns", True)
    puzzle_emb_lr: float = option("learning rate of the puzzle embeddings", 1e-2, low=0)
    puzzle_emb_weight_decay: float = option("weight decay of the puzzle embeddings", 0.1, low=0)
    freeze_weights: bool = option("train the puzzle embeddings only", False)
    ema: bool = option("evaluate and keep a moving average of the weights", False)
    ema_rate: float = option("decay of the average per step", 0.999, low=0, high=1)
    ema_warmup: bool = option("decay min(ema_rate, (1 + t) / (10 + t)) at step t", False)

    evaluators: tuple[EvaluatorConfig, ...] = option(
        "scores beyond the accuracies", (EvaluatorConfig("arc@ARC"),), section="Evaluation"
    )
    eval_interval: int | None = option(
        "epochs between evaluations, unused with steps; null: one at the end", 10000, low=1
    )
    eval_steps: int | None = option(
        "optimizer steps between evaluations; goes before eval_interval", None, low=1
    )
    min_eval_interval: int | None = option("evaluations left out at the start of the run", 0, low=0)
    eval_max_puzzles: int | None = option("evaluate at most this many puzzles", None, low=1)
    eval_batch_size: int | None = option(
        "boards per evaluation batch; null: global_batch_size", None, low=1
    )
    eval_steps_max: int | None = option(
        "supervision steps in evaluation; null: arch.halt_max_steps", None, low=1
    )
    eval_save_outputs: tuple[str, ...] = option(
        "tensors that evaluations save",
        (),
        choices=("inputs", "labels", "puzzle_identifiers", "logits", "preds", "q_halt_logits"),
    )

    project_name: str | None = option(
        "folder of the runs; null: named after the data", None, section="Files"
    )
    run_name: str | None = option("folder of this run; null: a drawn name", None)
    checkpoint_path: str | None = option(
        "run folder; null: checkpoints/<project_name>/<run_name>", None
    )
    load_checkpoint: str | None = option("weights to start from", None)
    load_identifiers: str | None = option(
        "data of load_checkpoint: puzzles of the same names keep their rows; auto: its own",
        None,
    )
    resume: str = option("auto: go on with an unfinished run; never; or the PATH of one", "auto")
    checkpoint_every_eval: bool = option("checkpoint at every evaluation, not only the last", True)
    save_interval: int | None = option(
        "steps between checkpoints; null: at evaluations", None, low=1
    )
    keep: int | None = option("newest checkpoints kept beside best; null: all", None, low=1)
    official: bool = option("also write the official step_N and all_config.yaml", False)
    log_interval: int = option("steps between log lines", 1, low=1)
    logger: tuple[str, ...] = option(
        "trackers to report to", (), choices=("wandb", "trackio", "tensorboard")
    )

    device: str = option("auto, cpu, cuda, cuda:N or mps", "auto", section="Machine")
    threads: int | None = option("CPU threads; null: PyTorch's choice", None, low=1, high=1024)
    compile: bool = option("run the step through torch.compile", False)
    profile: bool = option(
        "record where the time of a few steps goes, in the run's folder profile", False
    )
    cuda_graph: bool = option("capture the step into one CUDA graph, on NVIDIA GPUs", True)

    arch: ArchConfig = dataclasses.field(default_factory=ArchConfig)

    def __post_init__(self) -> None:
        check_fields(self, skip=("arch", "evaluators"))
        if not isinstance(self.arch, ArchConfig):
            raise ConfigError(f"arch must be an ArchConfig, got {show(self.arch)}")
        given: Any = self.evaluators
        items = given if isinstance(given, (list, tuple)) else [given]
        evaluators = tuple(EvaluatorConfig.from_value(item) for item in items)
        object.__setattr__(self, "evaluators", evaluators)
        self._check_together()

    def _check_together(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            hint = did_you_mean(self.preset, PRESETS)
            raise ConfigError(
                f"preset must be one of {', '.join(PRESETS)}, got {show(self.preset)}{hint}"
            )
        if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,4})?", self.device):
            raise ConfigError(
                f"device must be one of auto, cpu, cuda, cuda:N, mps, got {show(self.device)}"
            )
        for key in ("project_name", "run_name"):
            name = getattr(self, key)
            if name is not None and (re.search(r"[/\\]", name) or name in (".", "..")):
                raise ConfigError(
                    f"{key} must be a folder name, got {show(name)}: paths are for checkpoint_path"
                )
        if self.generate and self.data_paths:
            raise ConfigError("data_paths and generate exclude each other: one must be [] or 0")
        if not self.generate and not self.data_paths:
            raise ConfigError(
                "data_paths must name at least one directory (or generate > 0 boards)"
            )
        if self.global_batch_size % self.grad_accum:
            raise ConfigError(
                f"global_batch_size must be a multiple of grad_accum, "
                f"got {self.global_batch_size} and {self.grad_accum}"
            )
        by_epochs = self.steps is None and self.eval_steps is None
        if by_epochs and self.eval_interval is not None and self.epochs % self.eval_interval:
            raise ConfigError(
                f"epochs must be a multiple of eval_interval, got {self.epochs} and "
                f"{self.eval_interval} (eval_interval=null evaluates at the end)"
            )
        if self.load_identifiers and not self.load_checkpoint:
            raise ConfigError("load_identifiers must be given with load_checkpoint")
        if self.weight_decay_on == "matrices" and self.optimizer != "adamw":
            raise ConfigError(
                f"weight_decay_on=matrices needs optimizer=adamw, got {self.optimizer}"
            )
        if self.official and self.arch.kind == "gated_mlp":
            raise ConfigError("official=true is for the official code's networks, not gated_mlp")
        self._check_depth()
        if self.freeze_weights and self.arch.puzzle_emb_ndim == 0:
            raise ConfigError("freeze_weights=true needs arch.puzzle_emb_ndim > 0, got 0")

    def _check_depth(self) -> None:
        arch, before = self.arch, 0.0
        if self.official and (arch.damping < 1 or arch.latents > 1):
            raise ConfigError(
                "official=true is for networks that the official code has: it needs "
                f"arch.damping=1 and arch.latents=1, got {arch.damping} and {arch.latents}"
            )
        if self.depth_stages and arch.kind in ("gated_mlp", "transformers_baseline", "trm_hier6"):
            raise ConfigError(f"depth_stages is for recursions of H x L cycles, not {arch.kind}")
        if self.compile and len(self.depth_stages) > MOST_COMPILED:
            raise ConfigError(
                f"compile=true takes up to {MOST_COMPILED} depth_stages, got "
                f"{len(self.depth_stages)}: PyTorch compiles a function for few settings only"
            )
        for text in self.depth_stages:
            part, H, L = depth_stage(text)
            if not before < part < 1:
                raise ConfigError(
                    f"depth_stages must name growing parts of the run between 0 and 1, got "
                    f"{show(list(self.depth_stages))}"
                )
            if not (1 <= H <= arch.H_cycles and 1 <= L <= arch.L_cycles):
                raise ConfigError(
                    f"depth_stages must be within arch.H_cycles x arch.L_cycles = "
                    f"{arch.H_cycles}x{arch.L_cycles}, got {H}x{L}"
                )
            before = part

    def cycles(self, step: int, total_steps: int) -> tuple[int, int]:
        """H and L cycles of optimizer step `step`, 1-based, of `total_steps`."""
        for part, H, L in map(depth_stage, self.depth_stages):
            if step <= round(part * total_steps):
                return H, L
        return self.arch.H_cycles, self.arch.L_cycles

    def to_dict(self) -> dict[str, Any]:
        """All keys, `arch` nested, ready for JSON; `from_dict` gives an equal configuration."""
        result: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            result[field.name] = list(value) if isinstance(value, tuple) else value
        result["evaluators"] = [item.to_dict() for item in self.evaluators]
        result["arch"] = self.arch.to_dict()
        return result

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """From nested or dotted keys over the official base; ConfigError as everywhere."""
        return cls.from_flat(flatten(values))

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> TrainConfig:
        """From dotted canonical keys, as `flatten` and `layer` give them."""
        arch = {k[5:]: v for k, v in values.items() if k.startswith("arch.")}
        arch = {**arch_defaults(arch.get("name", "trm")), **arch}
        return cls(
            arch=ArchConfig(**arch),
            **{k: v for k, v in values.items() if not k.startswith("arch.")},
        )

    def replace(self, values: Mapping[str, Any]) -> TrainConfig:
        """This configuration with other values, by dotted key: `replace({"arch.L_cycles": 4})`."""
        new = flatten(values)
        if "preset" in new:
            raise ConfigError("preset cannot be replaced: start from from_preset(name)")
        return self.from_flat(layer(flatten(self.to_dict()), new))

    def local_batch_size(self, processes: int) -> int:
        """Boards per step of each of `processes`; ConfigError where they cannot be divided."""
        for name in ("global_batch_size", "eval_batch_size"):
            size = getattr(self, name)
            if size and size % processes:
                raise ConfigError(
                    f"{name} must be a multiple of the {processes} processes, got {size}"
                )
        local = self.global_batch_size // processes
        if local % self.grad_accum:
            raise ConfigError(
                f"global_batch_size must be a multiple of grad_accum times the {processes} "
                f"processes, got {self.global_batch_size} and grad_accum={self.grad_accum}"
            )
        return local

    def total_steps(self, total_groups: int, mean_puzzle_examples: float) -> int:
        """Optimizer steps of the run: `steps`, or the official estimate from `epochs`.

        Args:
            total_groups: puzzle groups in the training data (dataset.json).
            mean_puzzle_examples: mean examples per puzzle (dataset.json).
        """
        if self.steps is not None:
            return self.steps
        total = int(self.epochs * total_groups * mean_puzzle_examples / self.global_batch_size)
        if total < 1:
            raise ConfigError(
                f"epochs={self.epochs} gives no full batch of {self.global_batch_size}: "
                f"raise epochs or give steps"
            )
        return total

    def with_names(self, number: int | None = None) -> TrainConfig:
        """With project_name, run_name and checkpoint_path filled in where they are not given.

        Args:
            number: picks the drawn part of run_name, so that several processes can agree on it;
                None draws one, again while a folder of that name exists.
        """
        project = self.project_name or (
            f"{os.path.basename(os.path.normpath(self.data_paths[0])).capitalize()}-ACT-torch"
            if self.data_paths
            else f"{self.generate_puzzle.capitalize()}-mini"
        )
        start = self.preset or self.arch.kind
        for _ in range(100):
            drawn = secrets.randbelow(4096) if number is None else number
            run = self.run_name or f"{start}-{slug(drawn)}"
            path = self.checkpoint_path or os.path.join("checkpoints", project, run)
            if self.run_name or number is not None or not os.path.exists(path):
                break
        return dataclasses.replace(self, project_name=project, run_name=run, checkpoint_path=path)

    def official_dict(self) -> dict[str, Any]:
        """What the official code would put into `all_config.yaml`; our own keys are left out."""
        ours = BEYOND_OFFICIAL.split()
        result = {k: v for k, v in self.to_dict().items() if k not in ours}
        if self.arch.kind != "transformers_baseline":
            ours += ["arch.act_enabled", "arch.act_inference"]  # of that network only
        arch = {k: v for k, v in result["arch"].items() if f"arch.{k}" not in ours}
        loss = {"name": LOSS_HEAD, "loss_type": self.arch.loss_type}
        return {**result, "arch": {"loss": loss, **arch}}


def depth_stage(text: str) -> tuple[float, int, int]:
    """Part of the run, H and L cycles of a text like "0.3:1x2"; ConfigError for any other."""
    found = re.fullmatch(r" *(0?\.[0-9]{1,9}) *: *([0-9]{1,4}) *x *([0-9]{1,4}) *", text)
    if found is None:
        raise ConfigError(f"depth_stages must be texts like 0.3:1x2, got {show(text)}")
    return float(found[1]), int(found[2]), int(found[3])


def option_fields() -> dict[str, dataclasses.Field[Any]]:
    """Every key a user can set, dotted, with its field: type, default, metadata (help, range)."""
    fields = {f.name: f for f in dataclasses.fields(TrainConfig) if f.name != "arch"}
    return fields | {f"arch.{f.name}": f for f in dataclasses.fields(ArchConfig)}


def canonical_key(key: object) -> str | None:
    """The dotted key that `key` means; None for an official key without effect.

    Dashes are underscores, `arch` is `arch.name`, `data_path` is `data_paths`. Raises ConfigError
    with a did-you-mean for a key that there is not.
    """
    known = option_fields()
    if isinstance(key, str):
        name = key.replace("-", "_")
        name = ALIASES.get(name, name)
        if name in known or name == "arch.loss.name":
            return name
        if name in [f"arch.{ignored}" for ignored in ArchConfig.IGNORED]:
            return None
        raise ConfigError(f"unknown key {show(key)}{did_you_mean(name, known)}")
    raise ConfigError(f"unknown key {show(key)}: a key is text")


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested or dotted keys as a dictionary of dotted canonical keys; values stay as they are."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if key in ("arch", "arch.loss") and isinstance(value, Mapping):
            flat.update(flatten({f"{key}.{inner}": item for inner, item in value.items()}))
            continue
        name = canonical_key(key)
        if name == "arch.loss.name":
            if value != LOSS_HEAD:
                raise ConfigError(f"arch.loss.name must be {LOSS_HEAD}, got {show(value)}")
        elif name is not None:
            # The official architecture files say "as hidden_size" in OmegaConf's language.
            follows = name == "arch.puzzle_emb_ndim" and value == "${.hidden_size}"
            flat[name] = None if follows else value
    return flat


def layer(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys of `above` over those of `below`.

    Another network than that of `below` brings its official sizes with it. A key that would stay
    without effect because of one further down switches that one off: `epochs` clears `steps`,
    `eval_interval` clears `eval_steps`, and of `data_paths` and `generate` the one given last
    counts.
    """
    merged = {**below, **above}
    if "arch.name" in above:
        chosen, before = arch_defaults(above["arch.name"]), below.get("arch.name", "trm")
        if chosen["name"] != arch_name(before):
            # What the network before brought along goes with it.
            brought = {f"arch.{key}" for key in arch_defaults(before)}
            kept = {key: value for key, value in below.items() if key not in brought}
            merged = {**kept, **{f"arch.{k}": v for k, v in chosen.items()}, **above}
    for winner, loser in (("epochs", "steps"), ("eval_interval", "eval_steps")):
        if winner in above and loser not in above:
            merged[loser] = None
    if above.get("data_paths") and "generate" not in above:
        merged["generate"] = 0
    if to_int(above.get("generate", 0)) and "data_paths" not in above:
        merged["data_paths"] = []
    return merged


def from_preset(name: str = DEFAULT_PRESET) -> TrainConfig:
    """The configuration of a preset; ConfigError with a did-you-mean for a name there is not."""
    return TrainConfig.from_flat({**PRESETS.get(name, {}), "preset": name})
