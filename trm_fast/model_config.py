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

# The networks we build, by the short name of their official file and by their official class path.
ARCHS = {
    "trm": "recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1",
    "trm_singlez": "recursive_reasoning.trm_singlez@TinyRecursiveReasoningModel_ACTV1",
    "trm_hier6": "recursive_reasoning.trm_hier6@TinyRecursiveReasoningModel_ACTV1",
    "hrm": "recursive_reasoning.hrm@HierarchicalReasoningModel_ACTV1",
    "transformers_baseline": "recursive_reasoning.transformers_baseline@Model_ACTV2",
    "gated_mlp": "gated_mlp@TinyRecursiveModel",  # of s4nj1th/tiny-recursive-model
}
QUANTIZED = ("none", "int8", "fp8")
HIER6_LEVELS, GATED_OUTPUT_BLOCKS = 6, 2
# What the official classes fix, where a dictionary for one of them does not say otherwise: as many
# prefix tokens as the puzzle rows fill, a second Q value to halt against, one pass of one network.
_FIXED: dict[str, dict[str, Any]] = {
    "hrm": {"puzzle_emb_len": 0, "no_ACT_continue": False},
    "transformers_baseline": {
        "puzzle_emb_len": 0,
        "no_ACT_continue": False,
        "H_cycles": 1,
        "L_cycles": 1,
        "L_layers": 1,
    },
    "gated_mlp": {
        "puzzle_emb_ndim": 0,
        "puzzle_emb_len": 0,
        "pos_encodings": "none",
        "halt_max_steps": 1,
        "halt_exploration_prob": 0.0,
        "q_logits": 1,
        "expansion": 4.0,
        "num_heads": 8,
        "forward_dtype": "float32",
    },
}
# The sizes in the official architecture files, where they differ from those of arch=trm.
_SIZES: dict[str, dict[str, Any]] = {
    "hrm": {"H_cycles": 2, "L_cycles": 2, "H_layers": 4, "L_layers": 4},
    "transformers_baseline": {"H_layers": 8, "num_heads": 12},
    "gated_mlp": {"H_cycles": 6, "L_layers": 4, "loss_type": "softmax_cross_entropy"},
}


@dataclass(frozen=True, kw_only=True)
class _Network:
    """The keys that ModelConfig and ArchConfig share. D = hidden_size, P = prefix_len."""

    PREFIX: ClassVar[str] = ""

    H_cycles: int = option("answer updates per supervision step, the last with gradient", low=1)
    L_cycles: int = option("latent updates before each answer update", low=1)
    L_layers: int = option("blocks in the network; hrm: in the one of the latent", low=1)
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
    H_layers: int = option(
        "blocks in the network of the answer; hrm and transformers_baseline only", 0, low=0
    )
    act_enabled: bool = option("false: a board in training thinks halt_max_steps, always", True)
    act_inference: bool = option(
        "`Model` halts by its Q values in evaluation too; commands show every step instead", False
    )
    name: str = option("the network; `arch=NAME` sets it and its official sizes", ARCHS["trm"])
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
    semantics: str = option(
        "gated_mlp: recursion and gates of that project's latest version, or of its first",
        "head",
        choices=("head", "v1"),
    )
    vector_gates: bool = option("gated_mlp: a gate for each feature instead of one for all", False)
    cell_attention: bool = option(
        "gated_mlp: a state for each cell, and attention among them, instead of one for all", False
    )
    dropout: float = option("dropout inside the block", 0.0, low=0, high=1, open=")")
    damping: float = option(
        "trm: part of an updated state that is the network's, 1 for all of it; the rest stays",
        1.0,
        low=0,
        high=1,
        open="(",
    )
    noise: float = option(
        "trm: deviation of the noise that every update of a state gets in training", 0.0, low=0
    )
    random_init: bool = option(
        "trm: boards in training start from random states, drawn anew each time", False
    )
    latents: int = option(
        "trm: latents of a board in training; the one with the lowest loss learns", 1, low=1
    )
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
        object.__setattr__(self, "name", arch_name(self.name))
        check_fields(self, self.PREFIX)
        pre = self.PREFIX
        if not self.mlp_t:
            if self.hidden_size < self.num_heads:
                raise ConfigError(
                    f"{pre}hidden_size must be at least {pre}num_heads, "
                    f"got {self.hidden_size} and {self.num_heads}"
                )
            if self.pos_encodings == "rope" and self.head_dim % 2:
                raise ConfigError(
                    f"{pre}hidden_size / {pre}num_heads must be even for rope, got {self.head_dim}"
                )
        self._check_arch()
        if self.puzzle_emb_ndim > self.prefix_len * self.hidden_size:
            raise ConfigError(
                f"{pre}puzzle_emb_ndim must be at most puzzle_emb_len * hidden_size = "
                f"{self.prefix_len * self.hidden_size}, got {self.puzzle_emb_ndim}"
            )
        if self.q_logits == 1 and not self.no_ACT_continue:
            raise ConfigError(f"{pre}no_ACT_continue=false needs {pre}q_logits=2, got 1")

    def _check_arch(self) -> None:
        pre, arch = self.PREFIX, self.kind
        if arch in ("hrm", "transformers_baseline") and self.H_layers < 1:
            raise ConfigError(f"{arch} needs {pre}H_layers >= 1, got {self.H_layers}")
        if arch == "trm_hier6" and self.L_cycles > HIER6_LEVELS:
            raise ConfigError(
                f"{arch} has {HIER6_LEVELS} latent levels: {pre}L_cycles must be at most that, "
                f"got {self.L_cycles}"
            )
        if arch == "transformers_baseline" and self.mlp_t:
            raise ConfigError(f"{arch} has no token MLP: {pre}mlp_t must be false")
        self._check_depth_options()
        if arch == "gated_mlp":
            if self.cell_attention and self.hidden_size % self.num_heads:
                raise ConfigError(
                    f"{pre}cell_attention needs {pre}hidden_size to be a multiple of "
                    f"{pre}num_heads, got {self.hidden_size} and {self.num_heads}"
                )
            lacking: dict[str, Any] = {
                "puzzle_emb_ndim": 0,
                "puzzle_emb_len": 0,
                "halt_max_steps": 1,
            }
            lacking |= {"mlp_t": False, "no_ACT_continue": True, "quantize": "none"}
            for key, value in lacking.items():
                if getattr(self, key) != value:
                    raise ConfigError(
                        f"{arch} needs {pre}{key}={str(value).lower()}, got {getattr(self, key)}"
                    )

    def _check_depth_options(self) -> None:
        pre, off = self.PREFIX, {"damping": 1.0, "noise": 0.0, "random_init": False, "latents": 1}
        for key, value in off.items():
            if getattr(self, key) != value and self.kind != "trm":
                raise ConfigError(f"{pre}{key} is for arch=trm, got arch={self.kind}")
        if self.latents > 1:
            apart = {"noise": 0.0, "random_init": False, "dropout": 0.0, "no_ACT_continue": True}
            for key, value in apart.items():
                if getattr(self, key) != value:
                    raise ConfigError(
                        f"{pre}latents={self.latents} needs {pre}{key}={str(value).lower()}, "
                        f"got {str(getattr(self, key)).lower()}"
                    )

    def mixes_states(self, training: bool) -> bool:
        """Whether an updated state is more than what the network makes: damped, or in training
        with noise."""
        return self.damping < 1 or (training and self.noise > 0)

    @property
    def draws_states(self) -> bool:
        """Whether training draws states, or noise for them."""
        return self.random_init or self.noise > 0

    @property
    def kind(self) -> str:
        """The short name of the network, a key of ARCHS."""
        return next(short for short, path in ARCHS.items() if path == self.name)

    @property
    def head_dim(self) -> int:
        """Width of one attention head, rounded down."""
        return self.hidden_size // self.num_heads

    @property
    def attention_width(self) -> int:
        """Features of all attention heads together."""
        return self.head_dim * self.num_heads

    @property
    def passes(self) -> tuple[int, int, int]:
        """Blocks applied in one supervision step: in all; of them with a gradient, where one is
        wanted; and the passes of a network that the latter are made in."""
        if self.kind == "hrm":
            latent = self.H_cycles * self.L_cycles * self.L_layers
            return latent + self.H_cycles * self.H_layers, self.L_layers + self.H_layers, 2
        if self.kind == "transformers_baseline":
            return self.H_layers, self.H_layers, 1
        if self.kind == "gated_mlp":
            latent, answer = self.gated_passes
            blocks = latent * self.L_layers + answer * GATED_OUTPUT_BLOCKS
            return blocks, blocks, latent + answer
        tracked = self.L_cycles + 1
        return self.H_cycles * tracked * self.L_layers, tracked * self.L_layers, tracked

    @property
    def gated_passes(self) -> tuple[int, int]:
        """Of gated_mlp: passes of the latent's blocks, and of the answer's."""
        if self.semantics == "head":
            return self.H_cycles + 1, self.H_cycles + 1
        return self.H_cycles * self.L_cycles, self.H_cycles

    @property
    def blocks(self) -> int:
        """Blocks with weights of their own."""
        if self.kind == "transformers_baseline":
            return self.H_layers
        if self.kind == "gated_mlp":
            return self.L_layers + GATED_OUTPUT_BLOCKS
        return self.L_layers + (self.H_layers if self.kind == "hrm" else 0)

    @property
    def states(self) -> int:
        """Recurrent states [B, S, D] that an item carries along."""
        counts = {"trm_singlez": 1, "transformers_baseline": 1, "trm_hier6": 1 + HIER6_LEVELS}
        counts["gated_mlp"] = 0
        return counts.get(self.kind, 2)

    @property
    def learns_to_continue(self) -> bool:
        """Whether training gives the second Q value a target: what another step is worth. The
        official trainer never asks the transformer baseline for it."""
        return not self.no_ACT_continue and self.kind != "transformers_baseline"

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

    IGNORED: ClassVar[tuple[str, ...]] = ("causal", "loss")

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
        """From the official dictionary; ConfigError for an unknown or missing key or bad value.

        The official dictionaries do not name their class: "name" does, as in the official
        architecture files or in short ("hrm"); without it the network is trm's.
        """
        fields = dataclasses.fields(cls)
        values = {**_FIXED.get(short_name(values.get("name", "trm")), {}), **values}
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
    IGNORED: ClassVar[tuple[str, ...]] = ("causal",)

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
    loss_type: str = option(
        "loss of a cell",
        "stablemax_cross_entropy",
        choices=("stablemax_cross_entropy", "softmax_cross_entropy"),
    )

    def __post_init__(self) -> None:
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


def arch_defaults(value: object) -> dict[str, Any]:
    """What choosing a network means for other `arch.*` keys, as its official file has them."""
    short = short_name(arch_name(value))
    return {"name": ARCHS[short], **_FIXED.get(short, {}), **_SIZES.get(short, {})}


def short_name(value: object) -> str:
    """`hrm` of `hrm` and of `recursive_reasoning.hrm@...`; anything else as it is, as text."""
    text = str(value)
    return next((short for short, path in ARCHS.items() if text == path), text)


def arch_name(value: object) -> str:
    """The official class path of a network given by it or by its short name; else ConfigError."""
    short = short_name(value)
    if isinstance(value, str) and short in ARCHS:
        return ARCHS[short]
    hint = did_you_mean(value, ARCHS) if isinstance(value, str) else ""
    raise ConfigError(f"arch must be one of {', '.join(ARCHS)}, got {show(value)}{hint}")
