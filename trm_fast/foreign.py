"""Weights of other projects: told apart by their names, and read as a `Model`'s own.

Owns the formats that can be read: the official code's (its five networks, under every prefix),
tiny-recursive-rs, nano-trm, lucidrains/tiny-recursive-model and s4nj1th/tiny-recursive-model.
Imported by `pretrained.py`. What a file holds is taken from the shapes in it, from the settings
stored in it, or from an all_config.yaml beside it; what none of these say, the caller gives.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trm_fast.config import ConfigError
from trm_fast.durable import one_line
from trm_fast.foreign_file import (
    ARCH_KEYS,
    ASKED,
    LAYER,
    YAML,
    Foreign,
    Source,
    inner_width,
    lengths,
    open_source,
    read_architecture,
    sizes,
)
from trm_fast.interop import NOT_SAVED, inner_name
from trm_fast.options import reject_unknown, show
from trm_fast.unpickle import Holder

__all__ = ["FORMATS", "read_foreign"]

FORMATS = ("official", "hrm", "rs", "nano-trm", "lucidrains", "s4nj1th")
_TO_ASK = ("H_cycles", "L_cycles", "num_heads", "seq_len")
_ONLY = {"carry": ("rs",), "semantics": ("s4nj1th",), "keep_tokens": ("nano-trm",)}
_HYDRA = {
    f"omegaconf.{name}"
    for name in (
        *("dictconfig.DictConfig", "listconfig.ListConfig", "base.ContainerMetadata"),
        *("base.Metadata", "nodes.AnyNode"),
    )
} | {"typing.Any"}
_S4NJ1TH = {f"{module}.TRMConfig" for module in ("__main__", "__mp_main__", "main")}


def read_foreign(
    path: str | Path,
    format: str = "auto",
    *,
    given: Mapping[str, Any] | None = None,
    config: str | Path | None = None,
) -> Foreign:
    """The weights of one file of another project.

    Args:
        path: safetensors, or anything that torch.save wrote: nothing in it is run.
        format: one of FORMATS, or auto: by the names of the weights.
        given: values by the names of ASKED; they go before what the file says.
        config: an official all_config.yaml; None: the one beside the file, if there is one.

    Raises:
        ValueError: one line: not weights, of no known format, of a network that is not this
            one, or a size lacks, with the flag that gives it.
    """
    file = Path(path)
    if format not in ("auto", *FORMATS):
        raise ValueError(f"the format is {format!r}; auto, {', '.join(FORMATS)} are allowed")
    reject_unknown(given or {}, ASKED, "config")
    source = open_source(file, given or {}, _HYDRA | _S4NJ1TH)
    found = _detect(source)
    wanted = "official" if format == "hrm" else format
    if wanted not in ("auto", found):
        raise source.fail(f"its names are those of {found}, not of {format}")
    if odd := [key for key in source.given if found not in _ONLY.get(key, (found,))]:
        raise source.fail(f"is of {found}, which has no {odd[0]} to choose")
    beside = _settings_beside(source, found, config)
    try:
        foreign = _READERS[found](source)
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise source.fail(f"is damaged, or not of {found} ({one_line(error)})") from error
    foreign.notes += [f"settings are those of {beside}"] if beside else []
    if format == "hrm" and foreign.arch != "hrm":
        raise source.fail(f"is of the official network {foreign.arch}, not of hrm")
    foreign.config |= {k: v for k, v in source.given.items() if k in ARCH_KEYS or k == "seq_len"}
    if foreign.format != "s4nj1th":
        _require(source, foreign)
    if match := re.search(r"(?:step|epoch)_(\d{1,15})", file.name):
        foreign.step = foreign.step or int(match[1])
    return foreign


def _settings_beside(source: Source, format: str, config: str | Path | None) -> Path | None:
    """Read the official settings into `source`: the file that is given, or of the official
    formats the one beside the weights. Returns which it was."""
    if config is None:
        path = source.path.parent / YAML
        if format != "official" or not path.is_file():
            return None
    else:
        path = Path(config)
        if format == "s4nj1th":
            raise source.fail(f"is of {format}, for which no {YAML} says anything")
    source.arch = read_architecture(path)
    return path


def _detect(source: Source) -> str:
    names = {inner_name(name) for name in source.weights}
    marks = {
        "official": "embed_tokens.embedding_weight",
        "rs": "l_level.layer_0.mlp.down_proj.weight",
        "nano-trm": "input_embedding.embedding_weight",
        "lucidrains": "to_halt_pred.1.weight",
        "s4nj1th": "latent_gate",
    }
    for format, mark in marks.items():
        if mark in names:
            return format
    shown = ", ".join(sorted(source.weights)[:3])
    raise source.fail(
        f"is of no known format ({', '.join(FORMATS)}); its first names are {shown[:200]}"
    )


def _require(source: Source, foreign: Foreign) -> None:
    """CheckpointError that names the flags of what is still not known."""
    needed = [k for k in _TO_ASK if k not in foreign.config]
    if foreign.config.get("mlp_t") and "num_heads" in needed:
        foreign.config["num_heads"] = 1  # no attention
        needed.remove("num_heads")
    if foreign.arch == "transformers_baseline":
        needed = [k for k in needed if not k.endswith("_cycles")]
    if needed:
        flags = ", ".join(ASKED[key] for key in needed)
        raise source.fail(
            f"a file of {foreign.format} does not hold {', '.join(needed)}: {flags}; trm-fast "
            "convert takes these, as does config= in Python"
        )


def _official(source: Source) -> Foreign:
    source.weights = {inner_name(k): v for k, v in source.weights.items()}
    source.weights = {k: v for k, v in source.weights.items() if f"inner.{k}" not in NOT_SAVED}
    names = source.weights.keys()
    levels = {match[1] for name in names if (match := LAYER.match(name))}
    arch = "trm"
    if levels == {"H", "L"}:
        arch = "hrm"
    elif levels == {"H"}:
        arch = "transformers_baseline"
    elif "L1_init" in names:
        arch = "trm_hier6"
    elif "H_init" not in names:
        arch = "trm_singlez"
    values = sizes(source)
    # Only the official TRM networks have a prefix longer than the puzzle rows need.
    notes = lengths(source, values, 16 if arch.startswith("trm") else 0)
    loss = source.arch.get("loss")
    settings = dict(loss) if isinstance(loss, Mapping) else {}
    return Foreign("official", arch, source.weights, config=values, settings=settings, notes=notes)


def _rs(source: Source) -> Foreign:
    """Candle's names. One supervision step from zeros; no halting head, no puzzle rows."""
    weights = source.weights
    renamed = {
        "embed_tokens.embedding_weight": weights.get("embed_tokens.weight"),
        "H_init": weights.get("h_init"),
        "L_init": weights.get("l_init"),
    }
    for name, value in weights.items():
        if name.startswith("l_level.layer_"):
            renamed["L_level.layers." + name.removeprefix("l_level.layer_")] = value
        elif name not in ("embed_tokens.weight", "h_init", "l_init"):
            renamed[name] = value
    lacking = [name for name, value in renamed.items() if value is None]
    if lacking:
        raise source.fail(f"lacks what becomes {lacking[0]}")
    state = {name: value.float() for name, value in renamed.items() if value is not None}
    source.weights = state
    width = source.shape("embed_tokens.embedding_weight")[1]
    if "L_level.layers.0.self_attn.qkv_proj.weight" not in state:
        raise source.fail(
            "was made with mlp_t=true, which in tiny-recursive-rs only drops attention: nothing "
            "mixes its cells, and no network here is like that"
        )
    state["q_head.weight"] = torch.zeros(1, width)
    state["q_head.bias"] = torch.full((1,), -5.0)
    carry = source.given.get("carry", "zeros")
    if carry not in ("zeros", "init"):
        raise ConfigError(f"carry must be zeros or init, got {show(carry)}")
    notes = ["it has no halting head: the one written never halts early"]
    if carry == "zeros":
        state["H_init"], state["L_init"] = torch.zeros(width), torch.zeros(width)
        notes.append("the states start at zero, as in its training (--carry init: at h_init)")
    values = sizes(source) | {"halt_max_steps": 1, "puzzle_emb_len": 0, "q_logits": 1}
    values |= _rs_settings(source)
    return Foreign("rs", "trm", state, config=values, notes=notes)


def _rs_settings(source: Source) -> dict[str, Any]:
    """From FILE.meta.json, whose `config` its own trainer leaves empty and our writer fills."""
    names = {"h_cycles": "H_cycles", "l_cycles": "L_cycles", "num_heads": "num_heads"}
    with suppress(OSError, ValueError, RecursionError, AttributeError, TypeError):
        meta = json.loads(Path(f"{source.path}.meta.json").read_text(encoding="utf-8"))
        values = json.loads(meta["config"])
        known = {ours: values[theirs] for theirs, ours in names.items() if theirs in values}
        if "seq_len" in values:
            known["seq_len"] = values["seq_len"]
        return known | {"pos_encodings": values.get("pos_encodings", "rope")}
    return {}


def _nano(source: Source) -> Foreign:
    """A Lightning checkpoint: settings in hyper_parameters, the moving average in a callback."""
    convolutions = ("dwconv", "board_conv")
    if odd := [n for n in source.weights if any(c in n for c in convolutions)]:
        raise source.fail(f"has convolutional feed-forward layers ({odd[0]}), not built here")
    given = source.rest.get("hyper_parameters")
    hyper = given if isinstance(given, dict) else {}
    if hyper.get("pos_emb_type") == "2d":
        raise source.fail("has two-dimensional rotary positions (pos_emb_type=2d), not built here")
    raw = {_nano_name(name): value for name, value in source.weights.items()}
    raw = {name: value for name, value in raw.items() if f"inner.{name}" not in NOT_SAVED}
    source.weights = raw
    values = sizes(source)
    names = {
        **{"H_cycles": "H_cycles", "L_cycles": "L_cycles", "num_heads": "num_heads"},
        **{"halt_max_steps": "N_supervision", "expansion": "ffn_expansion"},
        **{"halt_exploration_prob": "halt_exploration_prob", "rope_theta": "rope_theta"},
        **{"seq_len": "seq_len", "batch_size": "batch_size"},
    }
    if not values["puzzle_emb_ndim"]:
        names["num_puzzle_identifiers"] = "num_puzzles"
    values |= {ours: hyper[theirs] for ours, theirs in names.items() if theirs in hyper}
    if not values["mlp_t"] and hyper.get("pos_emb_type", "1d") != "1d":
        values["pos_encodings"] = "none"
    inner = source.shape("L_level.layers.0.mlp.down_proj.weight")[1]
    values["intermediate_size"] = inner
    if inner == inner_width(values["expansion"], values["hidden_size"]):
        del values["intermediate_size"]
    values["puzzle_emb_len"] = hyper.get("puzzle_emb_len") if values["puzzle_emb_ndim"] else 0
    notes = lengths(source, values, 16)
    ema = None
    callbacks = source.rest.get("callbacks")
    for state in callbacks.values() if isinstance(callbacks, dict) else ():
        shadow = state.get("shadow") if isinstance(state, dict) else None
        if isinstance(shadow, dict) and shadow:
            ema = dict(raw)
            ema |= {_nano_name(str(n)): v for n, v in shadow.items() if isinstance(v, Tensor)}
    if _sudoku_tokens(values) and not source.given.get("keep_tokens"):
        notes.append("Sudoku tokens are one lower here: the row of its unused token 1 is dropped")
        values["vocab_size"] -= 1
        raw = _without_token(raw)
        ema = ema and _without_token(ema)
    step = source.rest.get("global_step")
    return Foreign("nano-trm", "trm", raw, ema, values, {}, notes, step if type(step) is int else 0)


def _nano_name(name: str) -> str:
    for theirs, ours in (
        ("input_embedding.", "embed_tokens."),
        ("lenet.layers.", "L_level.layers."),
        ("z_H_init", "H_init"),
        ("z_L_init", "L_init"),
    ):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _sudoku_tokens(values: Mapping[str, Any]) -> bool:
    """Whether the sizes are those of nano-trm's Sudoku: pad, end, blank, digits, square boards."""
    side = values["vocab_size"] - 3
    return side in (4, 6, 9) and values.get("seq_len") == side * side


def _without_token(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights for tokens 0, 2, 3, ..., which become 0, 1, 2, ..."""
    result = dict(state)
    for name in ("embed_tokens.embedding_weight", "lm_head.weight"):
        result[name] = torch.cat((state[name][:1], state[name][2:]))
    return result


def _lucidrains(source: Source) -> Foreign:
    """All but its network has a counterpart here; of networks only one built as ours is."""
    weights = source.weights
    width = source.shape("input_embed.weight")[1]
    blocks = {n: v for n, v in weights.items() if n.startswith("network.")}
    if "network.layers.0.mlp.down_proj.weight" not in blocks:
        kind = "an x-transformers stack" if any(".layers." in n for n in blocks) else "MLPMixer1D"
        raise source.fail(
            f"its network is {kind} (pre-norm layers with gains and biases); only one of post-norm "
            "blocks without them, with a SwiGLU each, is a network here"
        )
    scale = math.sqrt(width)
    state = {f"L_level.{n.removeprefix('network.')}": value for n, value in blocks.items()}
    source.shape("to_pred.weight")
    source.shape("to_halt_pred.1.weight")
    for name in ("output_init_embed", "latent_init_embed"):
        source.shape(name, 1)
    registers = torch.zeros(0, width)
    if "register_tokens" in weights and weights["register_tokens"].numel():
        source.shape("register_tokens")
        registers = weights["register_tokens"]
    state |= {
        # Ours are multiplied by sqrt(D) on the way in.
        "embed_tokens.embedding_weight": weights["input_embed.weight"] / scale,
        "lm_head.weight": source.weights["to_pred.weight"],
        "q_head.weight": source.weights["to_halt_pred.1.weight"],
        "q_head.bias": torch.zeros(1),
        "H_init": weights["output_init_embed"],
        "L_init": weights["latent_init_embed"],
    }
    if len(registers):
        state["puzzle_emb.weights"] = (registers / scale).reshape(1, -1)
    source.weights = state
    values = sizes(source) | {"q_readout": "mean", "puzzle_emb_len": len(registers)}
    values["halt_max_steps"] = 12
    notes = lengths(source, values, len(registers))
    notes.append("rope and rms_norm_eps 1e-5 are assumed of its network")
    return Foreign("lucidrains", "trm", state, config=values, notes=notes)


def _s4nj1th(source: Source) -> Foreign:
    """The gated residual MLP: its two versions differ in the shape of the gates."""
    gates = []
    for name in ("latent_gate", "output_gate"):
        if name not in source.weights:
            raise source.fail(f"lacks {name}")
        gates.append(tuple(source.weights[name].shape))
    found = {(1,): "v1", (): "head"}.get(gates[0])
    chosen = source.given.get("semantics", found)
    if chosen not in ("v1", "head") or gates[0] != gates[1] or found is None:
        raise source.fail(
            f"has gates of shapes {gates}, of neither version: one number each was expected"
        )
    raw = source.rest.get("config")
    plain = raw.state if isinstance(raw, Holder) else raw if isinstance(raw, dict) else {}
    scalars = (str, int, float, bool, type(None))
    settings = {str(k): v for k, v in plain.items() if isinstance(v, scalars)}
    width, inputs = source.shape("input_proj.weight")
    layers = {
        int(m[1]) for n in source.weights if (m := re.match(r"latent_layers\.(\d{1,3})\.", n))
    }
    settings |= {
        "input_dim": inputs,
        "hidden_dim": width,
        "output_dim": source.shape("output_proj.weight")[0],
        "L_layers": len(layers),
        "semantics": chosen,
    }
    for name in ("H_cycles", "L_cycles"):
        if name in source.given:
            settings[name] = source.given[name]
    notes = []
    if chosen != found:
        notes.append(f"its gates are those of {found}; run as {chosen}, as asked")
    if "H_cycles" not in settings:
        raise source.fail(f"holds no config: {ASKED['H_cycles']}, {ASKED['L_cycles']}")
    state = dict(source.weights)
    for name in ("latent_gate", "output_gate"):
        state[name] = state[name].reshape(() if chosen == "head" else (1,))
    # 81 cells of empty and nine digits in, of nine digits out; a token for padding here.
    if inputs % 10 or settings["output_dim"] != inputs // 10 * 9:
        raise source.fail(f"has {inputs} inputs and {settings['output_dim']} outputs: no Sudoku's")
    config = {
        **{"hidden_size": width, "L_layers": len(layers), "semantics": chosen},
        **{"H_cycles": settings["H_cycles"], "L_cycles": settings.get("L_cycles") or 1},
        **{"seq_len": inputs // 10, "vocab_size": 11, "dropout": settings.get("dropout") or 0.0},
        **{"expansion": source.shape("latent_layers.0.net.1.weight")[0] / width},
        **{"batch_size": 1, "num_puzzle_identifiers": 1},
    }
    return Foreign("s4nj1th", "gated_mlp", state, None, config, settings, notes)


_READERS: dict[str, Callable[[Source], Foreign]] = {
    "official": _official,
    "rs": _rs,
    "nano-trm": _nano,
    "lucidrains": _lucidrains,
    "s4nj1th": _s4nj1th,
}
