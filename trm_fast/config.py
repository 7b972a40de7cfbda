"""Every setting of the project: model, training run, presets, and the checks on their values.

Owns ModelConfig, ArchConfig, TrainConfig, PRESETS and the did-you-mean helper. Anything may import
it; it imports the word list `names` and the standard library only. Names and defaults up to the
line "beyond the official keys" are those of the official TinyRecursiveModels configuration files.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")
_WHOLE = re.compile(r"[+-]?[0-9]{1,19}(\.0*)?")
_BOOLS = {"true": True, "yes": True, "on": True, "1": True}
_BOOLS |= {"false": False, "no": False, "off": False, "0": False}


class ConfigError(ValueError):
    """A setting that cannot be used: one line saying what was given and what is allowed."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the closest of `known`, or `""`; `mlp_t` finds `arch.mlp_t`."""
    known = list(known)
    low = name[:100].lower()
    inside = [k for k in known if k.lower() == low or k.lower().rpartition(".")[2] == low]
    close = inside or difflib.get_close_matches(name[:100], known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def show(value: object) -> str:
    """The value as it goes into a message: one line, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def option(
    help: str,
    default: Any = MISSING,
    *,
    low: float | None = None,
    high: float | None = None,
    open: str = "",
    choices: tuple[str, ...] = (),
    section: str = "",
) -> Any:
    """A dataclass field with its help and its range; `open` names the excluded ends, "(" or ")"."""
    metadata = {"help": help, "low": low, "high": high, "open": open, "choices": choices}
    metadata["section"] = section
    return dataclasses.field(default=default, metadata=metadata)


def _to_int(value: object) -> int | None:
    if isinstance(value, str):
        text = value.strip()
        return int(text.partition(".")[0]) if _WHOLE.fullmatch(text) else None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    try:
        return None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _to_float(value: object) -> float | None:
    if isinstance(value, str):
        text = value.strip()
        value = float(text) if _NUMBER.fullmatch(text) else None
    elif not isinstance(value, float):
        value = _to_int(value)
    try:
        number = math.nan if value is None else float(value)  # type: ignore[arg-type]
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _to_bool(value: object) -> bool | None:
    if isinstance(value, bool):
        return value
    return _BOOLS.get(str(value).lower()) if isinstance(value, (str, int)) else None


def _to_str(value: object) -> str | None:
    return value if isinstance(value, str) and value.strip() and "\0" not in value else None


def _to_strs(value: object) -> tuple[str, ...] | None:
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or any(_to_str(item) is None for item in items):
        return None
    return tuple(items)


_CONVERT: dict[str, tuple[str, Callable[[object], Any]]] = {
    "int": ("an integer", _to_int),
    "float": ("a number", _to_float),
    "bool": ("true or false", _to_bool),
    "str": ("text", _to_str),
    "tuple[str, ...]": ("a list of texts", _to_strs),
}


def _span(low: float | None, high: float | None, open: str) -> str:
    if low is None:
        return ""
    if high is None:
        return f" {'>' if '(' in open else '>='} {low}"
    return f" in {'(' if '(' in open else '['}{low}, {high}{')' if ')' in open else ']'}"


def _inside(value: float, low: float | None, high: float | None, open: str) -> bool:
    above = low is None or value > low or (value == low and "(" not in open)
    return above and (high is None or value < high or (value == high and ")" not in open))


def convert(name: str, field: dataclasses.Field[Any], value: object) -> Any:
    """`value` as the type of `field`; ConfigError naming `name` for a wrong type, range or choice.

    Lenient as the official pydantic classes are: 3.0 and "3" are the integer 3, an integer is a
    number, "true" is true; but a bool is no number, and nan and infinity are refused.
    """
    kind = str(field.type).removesuffix(" | None")
    optional = kind != field.type
    meta = field.metadata
    wanted, to = _CONVERT[kind]
    if value is None and optional:
        return None
    result = to(value)
    choices = meta["choices"]
    if choices:
        wanted = ("a list of " if kind.startswith("tuple") else "one of ") + ", ".join(choices)
        bad = [r for r in (result if isinstance(result, tuple) else [result]) if r not in choices]
        if result is None or bad:
            hint = did_you_mean(bad[0], choices) if bad and isinstance(bad[0], str) else ""
            raise ConfigError(f"{name} must be {wanted}, got {show(value)}{hint}")
    numeric = kind in ("int", "float")
    span = _span(meta["low"], meta["high"], meta["open"]) if numeric else ""
    ok = result is not None
    if ok and numeric:
        ok = abs(result) < 2**63 if kind == "int" else True
        ok = ok and _inside(result, meta["low"], meta["high"], meta["open"])
    if not ok:
        wanted += span + (" or null" if optional else "")
        raise ConfigError(f"{name} must be {wanted}, got {show(value)}")
    return result


def check_fields(instance: Any, prefix: str = "") -> None:
    """Convert and check every field of a frozen dataclass instance in place (for __post_init__)."""
    for field in dataclasses.fields(instance):
        value = convert(prefix + field.name, field, getattr(instance, field.name))
        object.__setattr__(instance, field.name, value)


def _reject_unknown(given: Mapping[str, object], known: Iterable[str], what: str) -> None:
    known = list(known)
    for key in given:
        if key not in known:
            hint = did_you_mean(key, known) if isinstance(key, str) else ""
            raise ConfigError(f"unknown {what} key {show(key)}{hint}")


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
    puzzle_emb_len: int = option(
        "prefix tokens P; 0 = as many as puzzle_emb_ndim needs", 16, low=0
    )
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
        "implementation of the fused operations",
        "auto",
        choices=("auto", "cuda", "triton", "cpp", "reference"),
    )
    policy: str = option(
        "what the backward pass keeps: all, less, or next to nothing",
        "auto",
        choices=("auto", "save", "light", "recompute"),
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
        _reject_unknown(values, [f.name for f in fields] + list(cls.IGNORED), "model")
        missing = [f.name for f in fields if f.default is MISSING and f.name not in values]
        if missing:
            raise ConfigError(f"the model needs the keys {', '.join(missing)}")
        return cls(**{key: value for key, value in values.items() if key not in cls.IGNORED})
