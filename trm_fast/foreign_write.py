"""A `Model`'s weights in the formats of other projects.

Owns what each of them can hold: where the network, or a setting of it, has no counterpart there,
nothing is written and one line says why. Imported by `convert.py`. The formats are those of
`foreign.py`, which reads what is written here.

Dims legend: V vocabulary, D width, S prefix and puzzle tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trm_fast.config import ConfigError, ModelConfig
from trm_fast.durable import separate, write_pickle, write_tensors, write_text
from trm_fast.foreign_file import YAML, inner_width
from trm_fast.interop import OFFICIAL_PREFIX, write_official
from trm_fast.overrides import emit_yaml

__all__ = ["WRITERS", "Parcel"]


class Parcel:
    """Weights to be written.

    Args:
        config: of the model.
        weights: by the names of Model.state_dict(); the chosen ones, raw or averaged.
        raw: the weights as trained, for formats that have both.
        step: optimizer steps.
        loss_type: of the training, for formats that say it.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        raw: Mapping[str, Tensor],
        step: int = 0,
        loss_type: str = "stablemax_cross_entropy",
    ) -> None:
        self.config, self.step, self.loss_type = config, step, loss_type
        if config.damping < 1:
            raise ConfigError(
                f"cannot be written for others: they have no damping, this model {config.damping}"
            )
        self.weights, self.raw = _plain_names(weights), _plain_names(raw)

    @property
    def arch(self) -> str:
        """The network, by the name of its official file."""
        return self.config.kind


def _plain_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what only training reads: the initial values of further latents."""
    names = {name.removeprefix("inner."): value for name, value in weights.items()}
    names.pop("L_init_more", None)
    return names


def _refuse(format: str, why: str) -> ConfigError:
    return ConfigError(f"cannot be written as {format}: {why}")


def _expansion(format: str, config: ModelConfig) -> float:
    """An expansion that gives the model's inner widths by the official rule (a multiple of 256)."""
    wanted = [(config.hidden_size, config.channel_width)]
    if config.mlp_t:
        wanted.append((config.total_len, config.token_width))
    candidates = [config.expansion, 4.0] + [
        inner * 3 / (2 * width) for width, inner in wanted
    ]  # the exact ratio of each
    for expansion in candidates:
        if all(inner_width(expansion, width) == inner for width, inner in wanted):
            return expansion
    widths = ", ".join(str(inner) for _, inner in wanted)
    raise _refuse(format, f"its inner widths are multiples of 256 by one expansion, not {widths}")


def _check(format: str, config: ModelConfig, **wanted: tuple[Any, ...]) -> None:
    for name, allowed in wanted.items():
        value = getattr(config, name)
        if value not in allowed:
            shown = " or ".join(map(str, allowed))
            raise _refuse(format, f"{name} there is {shown}, this model has {value}")


def _two_logits(weights: dict[str, Tensor]) -> None:
    """A continue logit for a halting head without one; nothing reads it in these formats."""
    if weights["q_head.weight"].shape[0] == 1:
        for name, fill in (("q_head.weight", 0.0), ("q_head.bias", -5.0)):
            row = torch.full_like(weights[name], fill)
            weights[name] = torch.cat((weights[name], row))


def _one_logit(weights: dict[str, Tensor]) -> None:
    for name in ("q_head.weight", "q_head.bias"):
        weights[name] = weights[name][:1]


def write_official_file(parcel: Parcel, target: Path) -> list[str]:
    """The official step_N file, and all_config.yaml beside it unless there is one."""
    config, weights = parcel.config, dict(parcel.weights)
    if parcel.arch == "gated_mlp":
        raise _refuse("official", f"it has no such network, this model is {parcel.arch}")
    _check("official", config, q_readout=("first",))
    if config.prefix_len and not config.puzzle_emb_ndim:
        raise _refuse("official", "its prefix needs puzzle rows, this model has none")
    expansion = _expansion("official", config)
    _two_logits(weights)
    write_official(target, weights, OFFICIAL_PREFIX)
    keys = (
        *("name", "H_cycles", "L_cycles", "H_layers", "L_layers", "hidden_size", "num_heads"),
        *("pos_encodings", "act_enabled", "act_inference"),
        *("halt_max_steps", "halt_exploration_prob", "puzzle_emb_ndim", "puzzle_emb_len"),
        *("forward_dtype", "mlp_t", "no_ACT_continue", "rms_norm_eps", "rope_theta"),
    )
    values = config.to_dict()
    arch = {key: values[key] for key in keys} | {"expansion": expansion}
    arch["loss"] = {"name": "losses@ACTLossHead", "loss_type": parcel.loss_type}
    beside = target.parent / YAML
    if beside.exists():
        return [f"{beside} is left as it is"]
    write_text(beside, emit_yaml({"arch": arch}))
    return [f"its settings are in {beside}; data and optimizer there are yours to say"]


def write_rs(parcel: Parcel, target: Path) -> list[str]:
    """Candle's safetensors and the .meta.json beside it."""
    config, weights = parcel.config, dict(parcel.weights)
    if target.suffix != ".safetensors":
        raise _refuse("rs", f"the file's name ends in .safetensors, not as {target.name}")
    _plain_network("rs", parcel)
    _check("rs", config, mlp_t=(False,), prefix_len=(0,), puzzle_emb_ndim=(0,))
    _check("rs", config, pos_encodings=("rope", "none"), rope_theta=(10000.0,))
    expansion = _expansion("rs", config)
    result = {
        "embed_tokens.weight": weights.pop("embed_tokens.embedding_weight"),
        "h_init": weights.pop("H_init").float(),
        "l_init": weights.pop("L_init").float(),
        "lm_head.weight": weights.pop("lm_head.weight"),
    }
    for name, value in weights.items():
        if name.startswith("L_level.layers."):
            result["l_level.layer_" + name.removeprefix("L_level.layers.")] = value
    settings = {
        "hidden_size": config.hidden_size,
        "h_cycles": config.H_cycles,
        "l_cycles": config.L_cycles,
        "l_layers": config.L_layers,
        "num_heads": config.num_heads,
        "expansion": expansion,
        "pos_encodings": config.pos_encodings,
        "mlp_t": False,
        "halt_max_steps": config.halt_max_steps,
        "dropout": config.dropout,
        "vocab_size": config.vocab_size,
        "num_outputs": config.vocab_size,
        "seq_len": config.seq_len,
    }
    write_tensors(target, result)
    meta = {"step": parcel.step, "lr": 0.0, "loss": None, "config": json.dumps(settings)}
    write_text(Path(f"{target}.meta.json"), json.dumps(meta, indent=2) + "\n")
    return [
        "the halting head is left out: there is none there",
        "start its carry from h_init and l_init (reset_carry): the model was trained from them",
    ]


def write_nano(parcel: Parcel, target: Path) -> list[str]:
    """A Lightning checkpoint, with the moving average where its callback keeps it."""
    config, notes = parcel.config, []
    _plain_network("nano-trm", parcel)
    _check("nano-trm", config, q_readout=("first",), dropout=(0.0,))
    _check("nano-trm", config, pos_encodings=("none",) if config.mlp_t else ("rope", "none"))
    if config.prefix_len and not config.puzzle_emb_ndim:
        raise _refuse("nano-trm", "its prefix needs puzzle rows, this model has none")
    expansion = _expansion("nano-trm", config)
    vocabulary = config.vocab_size
    sudoku = vocabulary - 2 in (4, 6, 9) and config.seq_len == (vocabulary - 2) ** 2
    if sudoku:
        notes.append("Sudoku tokens are one higher there: its unused token 1 gets the row of pad")

    def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        _one_logit(weights)
        if sudoku:
            for name in ("embed_tokens.embedding_weight", "lm_head.weight"):
                rows = weights[name]
                weights[name] = torch.cat((rows[:1], rows[:1], rows[1:]))
        return {_nano_name(name): value for name, value in weights.items()}

    raw = renamed(dict(parcel.raw))
    hyper = {
        "hidden_size": config.hidden_size,
        "num_layers": config.L_layers,
        "num_heads": config.num_heads,
        "max_grid_size": round(config.seq_len**0.5),
        "H_cycles": config.H_cycles,
        "L_cycles": config.L_cycles,
        "N_supervision": config.halt_max_steps,
        "N_supervision_val": config.halt_max_steps,
        "ffn_expansion": expansion,
        "halt_exploration_prob": config.halt_exploration_prob,
        "puzzle_emb_dim": config.puzzle_emb_ndim,
        "puzzle_emb_len": config.prefix_len,
        "rope_theta": config.rope_theta,
        "pos_emb_type": "1d" if config.pos_encodings == "rope" else "null",
        "use_mlp_t": config.mlp_t,
        "vocab_size": vocabulary + sudoku,
        "num_puzzles": config.num_puzzle_identifiers,
        "batch_size": config.batch_size,
        "seq_len": config.seq_len,
    }
    buffers = ("puzzle_emb.weights", "z_H_init", "z_L_init")
    shadow = {n: v for n, v in renamed(dict(parcel.weights)).items() if n not in buffers}
    document = {
        "state_dict": separate(raw),
        "hyper_parameters": hyper,
        "hparams_name": "kwargs",
        "callbacks": {"EMACallback": {"shadow": separate(shadow), "decay": 0.999}},
        "epoch": 0,
        "global_step": parcel.step,
        "pytorch-lightning_version": "2.5.0",
    }
    write_pickle(target, document)
    return notes


def _nano_name(name: str) -> str:
    for ours, theirs in (
        ("embed_tokens.", "input_embedding."),
        ("L_level.layers.", "lenet.layers."),
        ("H_init", "z_H_init"),
        ("L_init", "z_L_init"),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _plain_network(format: str, parcel: Parcel) -> None:
    if parcel.arch != "trm":
        raise _refuse(format, f"it has the network trm only, this model is {parcel.arch}")
    _check(format, parcel.config, rms_norm_eps=(1e-5,))


def _no_lucidrains(parcel: Parcel, target: Path) -> list[str]:
    raise _refuse(
        "lucidrains", "its networks are MLPMixer1D and x-transformers, neither of which is this one"
    )


def write_s4nj1th(parcel: Parcel, target: Path) -> list[str]:
    """Its production checkpoint; the settings as a dictionary, which its main.py takes too."""
    values = parcel.config.to_dict()
    if parcel.arch != "gated_mlp":
        raise _refuse("s4nj1th", f"it holds gated residual MLPs, this model is {parcel.arch}")
    _check("s4nj1th", parcel.config, vector_gates=(False,), cell_attention=(False,))
    _check("s4nj1th", parcel.config, expansion=(4.0,), seq_len=(81,), vocab_size=(11,))
    settings = {
        **{"input_dim": 810, "hidden_dim": values["hidden_size"], "output_dim": 729},
        **{name: values[name] for name in ("L_layers", "H_cycles", "L_cycles", "dropout")},
    }
    write_pickle(target, {"model_state_dict": separate(parcel.weights), "config": settings})
    runs = {"v1": "main.py", "head": "the notebook; its main.py would run it as v1"}
    return [f"its recursion is {values['semantics']}: for {runs[values['semantics']]}"]


WRITERS: dict[str, Callable[[Parcel, Path], list[str]]] = {
    "official": write_official_file,
    "rs": write_rs,
    "nano-trm": write_nano,
    "lucidrains": _no_lucidrains,
    "s4nj1th": write_s4nj1th,
}
"""How each format is written: (what, file) -> notes for the user, a line each."""
