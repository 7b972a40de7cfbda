"""One file of weights of another project: opened, and what its shapes say of the network.

Owns `Foreign`, what such a file comes to, and the parts that the formats of `foreign.py` share.
Imported by that module and by `foreign_write.py`.

Dims legend: V vocabulary, D width, S prefix and puzzle tokens, L puzzle tokens.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from trm_fast.config import ConfigError
from trm_fast.durable import CheckpointError, parse_pickle, parse_tensors, read_bytes
from trm_fast.options import show
from trm_fast.overrides import read_mapping

__all__ = [
    "ARCH_KEYS",
    "ASKED",
    "LAYER",
    "YAML",
    "Foreign",
    "Source",
    "inner_width",
    "lengths",
    "open_source",
    "read_architecture",
    "sizes",
]

ASKED = {  # what a caller may give, and the command line's word for it
    "H_cycles": "--H-cycles N",
    "L_cycles": "--L-cycles N",
    "num_heads": "--num-heads N",
    "seq_len": "--seq-len N (81 for 9x9 Sudoku, 900 for ARC and 30x30 mazes)",
    "puzzle_emb_len": "--puzzle-emb-len N",
    "pos_encodings": "--pos-encodings rope|learned|none",
    "halt_max_steps": "--halt-max-steps N",
    "carry": "--carry zeros|init",
    "semantics": "--semantics v1|head",
    "keep_tokens": "--keep-tokens",
}
YAML = "all_config.yaml"
# Settings of the official `arch` that no shape says.
ARCH_KEYS = (
    *("H_cycles", "L_cycles", "num_heads", "expansion", "pos_encodings", "halt_max_steps"),
    *("halt_exploration_prob", "puzzle_emb_len", "rms_norm_eps", "rope_theta", "no_ACT_continue"),
    *("act_enabled", "act_inference"),
)
LAYER = re.compile(r"([HL])_level\.layers\.(\d{1,3})\.")


@dataclass
class Foreign:
    """What a file holds, under the names of a Model's `inner`.

    Attributes:
        format: one of FORMATS.  arch: the network, by the name of its official file.
        model: the weights as trained.  ema: their moving average, where the file has both.
        config: keys of ModelConfig, as far as the file says them.
        settings: what else the file says of the network (s4nj1th's configuration).
        notes: what was assumed or left out, a line each.  step: optimizer steps, 0 if unknown.
    """

    format: str
    arch: str
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    step: int = 0


@dataclass
class Source:
    """A file being read: its weights by their own names, all else in it, and what was given."""

    path: Path
    weights: dict[str, Tensor]
    rest: dict[str, Any]
    given: Mapping[str, Any]
    arch: Mapping[str, Any] = field(default_factory=dict)

    def fail(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {why}")

    def shape(self, name: str, dims: int = 2) -> tuple[int, ...]:
        """The shape of one tensor; CheckpointError where it lacks or has other dims."""
        if name not in self.weights:
            raise self.fail(f"lacks {name}")
        shape = tuple(self.weights[name].shape)
        if len(shape) != dims or not all(shape):
            raise self.fail(f"{name} is {list(shape)}; {dims} sizes above 0 were expected")
        return shape


def open_source(
    file: Path,
    given: Mapping[str, Any],
    stubs: Container[str] = (),
) -> Source:
    """A file of safetensors or of torch.save.

    Args:
        file, given: see `foreign.read_foreign`.
        stubs: see `durable.parse_pickle`.
    """
    data = read_bytes(file)
    rest: dict[str, Any] = {}
    if file.suffix == ".safetensors":
        weights: Any = parse_tensors(file, data)
    else:
        rest = parse_pickle(file, data, stubs)
        weights = rest
        for name in ("state_dict", "model_state_dict"):
            if isinstance(rest.get(name), dict):
                weights = rest[name]
    odd = [k for k, v in weights.items() if not (type(k) is str and isinstance(v, Tensor))]
    if odd or not weights:
        what = f"entry {show(odd[0])} is not a tensor" if odd else "it is empty"
        raise CheckpointError(f"{file}: holds no weights: {what}")
    return Source(file, weights, rest, given)


def read_architecture(path: Path) -> dict[str, Any]:
    """The `arch` of an official configuration: plain values, and its loss."""
    arch = read_mapping(path).get("arch")
    if not isinstance(arch, Mapping):
        raise ConfigError(f"{path}: has no arch with settings in it")
    plain = (str, int, float, bool, type(None))
    for key in ARCH_KEYS:
        if not isinstance(arch.get(key), plain):
            raise ConfigError(f"{path}: arch.{key} must be one value, got {show(arch[key])}")
    return {key: arch[key] for key in (*ARCH_KEYS, "loss") if key in arch}


def sizes(source: Source) -> dict[str, Any]:
    """What the shapes of official names say of the configuration."""
    weights = source.weights
    vocabulary, width = source.shape("embed_tokens.embedding_weight")
    if source.shape("lm_head.weight")[0] != vocabulary:
        raise source.fail("has another vocabulary in lm_head.weight than in the embedding")
    layers: dict[str, set[int]] = {"H": set(), "L": set()}
    for name in weights:
        if match := LAYER.match(name):
            layers[match[1]].add(int(match[2]))
    level = "L" if layers["L"] else "H"
    if not layers[level] or any(n != {*range(len(n))} for n in layers.values()):
        raise source.fail("lacks some of its layers")
    first = f"{level}_level.layers.0."
    states = [n for n in ("H_init", "L_init", "L1_init") if n in weights]
    if not states:
        raise source.fail("lacks H_init and L_init")
    dtype = str(weights[states[0]].dtype).removeprefix("torch.")
    values: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        f"{level}_layers": len(layers[level]),
        "mlp_t": f"{first}mlp_t.down_proj.weight" in weights,
        "forward_dtype": dtype,
        "q_logits": source.shape("q_head.weight")[0],
        "puzzle_emb_ndim": 0,
        "num_puzzle_identifiers": 1,
        "batch_size": 1,
        "halt_max_steps": 16,
        "halt_exploration_prob": 0.1,
        "expansion": 4.0,
        "pos_encodings": "none" if f"{first}mlp_t.down_proj.weight" in weights else "rope",
    }
    if layers["H"] and layers["L"]:
        values["H_layers"] = len(layers["H"])
    if "puzzle_emb.weights" in weights:
        rows = source.shape("puzzle_emb.weights")
        values["num_puzzle_identifiers"], values["puzzle_emb_ndim"] = rows
    if "embed_pos.embedding_weight" in weights:
        values["pos_encodings"] = "learned"
    values |= {k: v for k, v in source.arch.items() if k in ARCH_KEYS and v is not None}
    inner = source.shape(f"{first}mlp.down_proj.weight")[1]
    if inner != inner_width(values["expansion"], width):
        values["intermediate_size"] = inner
    return values


def inner_width(expansion: object, width: int) -> int:
    """The official inner width of a SwiGLU over `width` features."""
    if not isinstance(expansion, (int, float)) or not 0 < expansion < 1e6:
        raise ConfigError(f"arch.expansion must be a number above 0, got {show(expansion)}")
    return -(-round(expansion * width * 2 / 3) // 256) * 256


def lengths(source: Source, values: dict[str, Any], default: int) -> list[str]:
    """Fill in puzzle_emb_len, seq_len and the token MLP's width; what was assumed, as notes.

    Args:
        values: of `sizes`.
        default: prefix tokens where nothing says them.
    """
    notes = []
    total = None
    if values["mlp_t"]:
        total, inner = source.shape("L_level.layers.0.mlp_t.down_proj.weight")
        if inner != inner_width(values["expansion"], total):
            values["token_intermediate_size"] = inner
    elif "embed_pos.embedding_weight" in source.weights:
        total = source.shape("embed_pos.embedding_weight")[0]
    given = source.given.get("puzzle_emb_len", values.get("puzzle_emb_len"))
    seq_len = source.given.get("seq_len")
    for name, value in (("puzzle_emb_len", given), ("seq_len", seq_len)):
        if value is not None and type(value) is not int:
            raise ConfigError(f"{name} must be a whole number, got {show(value)}")
    if given is not None:
        prefix = given or -(-values["puzzle_emb_ndim"] // values["hidden_size"])
    elif total is not None and seq_len is not None:
        prefix = total - seq_len
    elif not values["puzzle_emb_ndim"]:
        prefix = 0
    else:
        prefix = default or -(-values["puzzle_emb_ndim"] // values["hidden_size"])
        notes.append(f"puzzle_emb_len {prefix} is assumed (--puzzle-emb-len, or {YAML})")
    values["puzzle_emb_len"] = prefix
    if total is not None and seq_len is None:
        values["seq_len"] = total - prefix
        if total <= prefix:
            raise source.fail(f"has {total} tokens, no more than the {prefix} of the prefix")
    return notes
