"""The settings of the network: ModelConfig for a model, ArchConfig for the `arch.*` keys of a run.

Owns both and the names of the networks we build. Everybody else takes them from config, which
imports this; it imports `options` only. Names and defaults above the line "Beyond the official
keys" are those of the official TinyRecursiveModels configuration files, so that its dictionaries
keep working.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar

from trm_fast.options import (
    ConfigError,
    check_fields,
    did_you_mean,
    option,
    reject_unknown,
    show,
)

# The network we build, by the short name of its official file and by its official class path.
ARCHS = {"trm": "recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1"}
QUANTIZED = ("none", "int8", "fp8")
UNBUILT_ARCHS = ("trm_singlez", "trm_hier6", "hrm", "transformers_baseline")


@dataclass(frozen=True, kw_only=True)
class _Network:
    """The keys that ModelConfig and ArchConfig share. D = hidden_size, P = prefix_len."""

    PREFIX: ClassVar[str] = ""

    H_cycles: int = option("answer updates per supervision step, the last with gradient", low=1)
    L_cycles: int = option("latent updates before each answer update", low=1)
    L_layers: int = option("blocks in the network", low=1)
    hidden_size: int = option("width D of a token", low=1)
    expansion: float = option("SwiGLU width as a multiple of D (times 2/3)", low=0, open="(")
    num_heads: int = option("attention heads", low=1)
    pos_encodings: str = option("position encoding", choices=("rope", "learned", "none"))
    halt_max_steps: int = option("supervision steps a board gets at most", low=1)
    halt_exploration_prob: float = option(
        "chance that a board must think a random number of steps before it may halt", low=0, high=1
    )
    puzzle_emb_ndim: int = option("numbers in a puzzle's own embedding; 0 = none", 0, low=0)
    rms_norm_eps: float = option("epsilon of RMSNorm", 1e-5, low=0, open="(")
    rope_theta: float = option("base of the rotary frequencies", 10000.0, low=0, open="(")
    forward_dtype: str = option(
        "type of the forward pass",
        "bfloat16",
        choices=("bfloat16", "float32", "float16", "float64"),
    )
    mlp_t: bool = option("mix tokens by an MLP instead of attention", False)
    puzzle_emb_len: int = option("prefix tokens P; 0 = as many as puzzle_emb_ndim needs", 16, low=0)
    no_ACT_continue: bool = option("halt by the sign of the halt logit, no Q-learning target", True)
    # Beyond the official keys.
    intermediate_size: int | None = option(
        "inner width of the channel SwiGLU; null = from expansion", None, low=1
    )
    token_intermediate_size: int | None = option(
        "inner width of the token MLP (mlp_t); null = from expansion", None, low=1
    )
    intermediate_multiple: int = option("inner widths are rounded up to a multiple", 256, low=1)
    q_readout: str = option(
        "halt logits read the first token or the mean", "first", choices=("first", "mean")
    )
    q_logits: int = option("halt logits: 2 (halt, continue) or 1 (halt)", 2, low=1, high=2)
    dropout: float = option("dropout inside the block", 0.0, low=0, high=1, open=")")
    backend: str = option(
        "implementation of the fused operations; what it lacks runs on the reference",
        "auto",
        choices=("auto", "cuda", "triton", "cpp", "reference"),
    )
    policy: str = option(
        "what the backward pass keeps: all, less, or next to nothing",
        "auto",
        choices=("auto", "save", "light", "recompute"),
    )
    quantize: str = option(
        "products in 8 bits: int8 in answers, for CPUs; fp8 in cycles without gradient, for GPUs",
        "none",
        choices=QUANTIZED,
    )

    def __post_init__(self) -> None:
        if self.pos_encodings is None:
            object.__setattr__(self, "pos_encodings", "none")
        check_fields(self, self.PREFIX)
        pre = self.PREFIX
        if not self.mlp_t:
            if self.hidden_size % self.num_heads:
                raise ConfigError(
                    f"{pre}hidden_size must be a multiple of {pre}num_heads, "
                    f"got {self.hidden_size} and {self.num_heads}"
                )
            if self.pos_encodings == "rope" and self.head_dim % 2:
                raise ConfigError(
                    f"{pre}hidden_size / {pre}num_heads must be even for rope, got {self.head_dim}"
                )
        if self.puzzle_emb_ndim > self.prefix_len * self.hidden_size:
            raise ConfigError(
                f"{pre}puzzle_emb_ndim must be at most puzzle_emb_len * hidden_size = "
                f"{self.prefix_len * self.hidden_size}, got {self.puzzle_emb_ndim}"
            )
        if self.q_logits == 1 and not self.no_ACT_continue:
            raise ConfigError(f"{pre}no_ACT_continue=false needs {pre}q_logits=2, got 1")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def prefix_len(self) -> int:
        """P, the puzzle-prefix tokens: puzzle_emb_len, or ceil(puzzle_emb_ndim / hidden_size)."""
        return self.puzzle_emb_len or -(-self.puzzle_emb_ndim // self.hidden_size)

    @property
    def channel_width(self) -> int:
        """Inner width of the SwiGLU over features."""
        return self.intermediate_size or self._inner_width(self.hidden_size)

    def _inner_width(self, width: int) -> int:
        inner, multiple = round(self.expansion * width * 2 / 3), self.intermediate_multiple
        return max(1, -(-inner // multiple)) * multiple

    def to_dict(self) -> dict[str, Any]:
        """All keys and values, ready for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Network):
    """All a model is built from: the official dictionary, checked, and our options, default off."""

    IGNORED: ClassVar[tuple[str, ...]] = ("H_layers", "causal", "name", "loss")

    batch_size: int = option("boards per step on this process", low=1)
    seq_len: int = option("tokens of a board", low=1)
    num_puzzle_identifiers: int = option("puzzle embeddings, the blank one included", low=1)
    vocab_size: int = option("token values, padding included", low=1)

    @property
    def total_len(self) -> int:
        """S = P + seq_len, the tokens that the network sees."""
        return self.prefix_len + self.seq_len

    @property
    def token_width(self) -> int:
        """Inner width of the SwiGLU over the S tokens (mlp_t)."""
        return self.token_intermediate_size or self._inner_width(self.total_len)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """From the official dictionary; ConfigError for an unknown or missing key or bad value."""
        fields = dataclasses.fields(cls)
        reject_unknown(values, [f.name for f in fields] + list(cls.IGNORED), "model")
        missing = [f.name for f in fields if f.default is MISSING and f.name not in values]
        if missing:
            raise ConfigError(f"the model needs the keys {', '.join(missing)}")
        return cls(**{key: value for key, value in values.items() if key not in cls.IGNORED})


def _again(name: str, default: Any, help: str = "") -> Any:
    """A field of _Network once more, with the default that the official architecture file gives."""
    metadata = dict(_Network.__dataclass_fields__[name].metadata)
    if help:
        metadata["help"] = help
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ArchConfig(_Network):
    """The `arch.*` keys: ModelConfig without what the data gives. Defaults: official arch=trm."""

    PREFIX: ClassVar[str] = "arch."
    IGNORED: ClassVar[tuple[str, ...]] = ("H_layers", "causal")

    H_cycles: int = _again("H_cycles", 3)
    L_cycles: int = _again("L_cycles", 6)
    L_layers: int = _again("L_layers", 2)
    hidden_size: int = _again("hidden_size", 512)
    expansion: float = _again("expansion", 4.0)
    num_heads: int = _again("num_heads", 8)
    pos_encodings: str = _again("pos_encodings", "rope")
    halt_max_steps: int = _again("halt_max_steps", 16)
    halt_exploration_prob: float = _again("halt_exploration_prob", 0.1)
    puzzle_emb_ndim: int = _again(
        "puzzle_emb_ndim", None, "numbers in a puzzle's own embedding; not given: hidden_size"
    )
    name: str = option("the network; `arch=trm` sets it", ARCHS["trm"])
    loss_type: str = option(
        "loss of a cell",
        "stablemax_cross_entropy",
        choices=("stablemax_cross_entropy", "softmax_cross_entropy"),
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", arch_name(self.name))
        if self.puzzle_emb_ndim is None:
            object.__setattr__(self, "puzzle_emb_ndim", self.hidden_size)
        super().__post_init__()

    def model_config(
        self, *, batch_size: int, seq_len: int, vocab_size: int, num_puzzle_identifiers: int
    ) -> ModelConfig:
        """The model's configuration for data of this shape."""
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(_Network)}
        return ModelConfig(
            batch_size=batch_size,
            seq_len=seq_len,
            vocab_size=vocab_size,
            num_puzzle_identifiers=num_puzzle_identifiers,
            **shared,
        )


def arch_name(value: object) -> str:
    """The official class path for `trm` or that path itself; ConfigError for any other network."""
    if isinstance(value, str):
        short = value.partition("@")[0].rpartition(".")[2]
        if value in ARCHS or value in ARCHS.values():
            return ARCHS[short]
        if short in UNBUILT_ARCHS:
            raise ConfigError(f"arch={short} is not built yet; there is: {', '.join(ARCHS)}")
        hint = did_you_mean(value, ARCHS)
    else:
        hint = ""
    raise ConfigError(f"arch must be one of {', '.join(ARCHS)}, got {show(value)}{hint}")
