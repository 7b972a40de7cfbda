"""Command lines and configuration files: from what a user wrote to a TrainConfig, and back to text.

Owns the grammar of values, the order base < preset < file < command line, the text of `--help` and
a small YAML writer. Command modules and the trainer may import it; it imports config only, and
PyYAML where a .yaml file is read. The grammar accepts what Hydra accepts of the command lines in
the official README: `key=value`, `+key=value`, lists with or without inner quotes.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trm_fast.config import (
    DEFAULT_PRESET,
    PRESETS,
    ConfigError,
    TrainConfig,
    canonical_key,
    did_you_mean,
    flatten,
    layer,
    option_fields,
    show,
)

_NULLS = ("null", "Null", "NULL", "None")
_WORDS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[+-]?(0|[1-9][0-9]{0,39})")
_FLOAT = re.compile(r"[+-]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][+-]?[0-9]{1,4})?")
_BARE = re.compile(r"[A-Za-z0-9_./@+=-]+")
_YAML_BARE = re.compile(r"[A-Za-z_/][A-Za-z0-9_./@+-]*")
_YAML_WORDS = ("true", "false", "yes", "no", "on", "off", "null", "y", "n")
_STEP = re.compile(r"step_[0-9]{1,15}")
_DEEPEST = 8
_LARGEST = 1 << 18  # bytes of a file of settings; YAML is read at 100 kB a second
# Top-level keys of files that hold no settings: Hydra's own, and what a checkpoint's config.json
# says of the run, of the data and of the model built for it.
NOT_SETTINGS = ("hydra", "finished", "model", "data", "source", "weights")
# Where that run lies: settings of it alone, not of another run that takes over its values.
OF_ONE_RUN = ("run_name", "checkpoint_path", "resume")


class HelpRequested(Exception):
    """`-h` or `--help` stands on the command line: show `help_text()` and exit 0."""


def _scalar(word: str) -> Any:
    """A bare word as null, bool, int, float, or the word itself."""
    if word in _NULLS:
        return None
    if word in _WORDS:
        return _WORDS[word]
    if _INTEGER.fullmatch(word):
        return int(word)
    if _FLOAT.fullmatch(word) and math.isfinite(float(word)):
        return float(word)
    return word


class _Reader:
    """One value of the grammar: a quoted text, [list], {key: value} or a bare word."""

    def __init__(self, text: str, words: bool = False) -> None:
        self.text, self.words, self.at = text, words, 0

    def fail(self, why: str) -> ConfigError:
        return ConfigError(f"cannot read {show(self.text)}: {why}")

    def peek(self) -> str:
        while self.text[self.at : self.at + 1].isspace():
            self.at += 1
        return self.text[self.at : self.at + 1]

    def whole(self) -> Any:
        result = self.value("", 0)
        if self.peek():
            raise self.fail(f"nothing may follow the value, found {self.text[self.at]!r}")
        return result

    def value(self, stops: str, depth: int) -> Any:
        if depth > _DEEPEST:
            raise self.fail(f"nested more than {_DEEPEST} deep")
        start = self.peek()
        if start == "[":
            return self.read_list(depth)
        if start == "{":
            return self.read_mapping(depth)
        if start and start in "'\"":
            return self.read_quoted()
        word = self.read_word(stops)
        return word if self.words else _scalar(word)

    def read_word(self, stops: str) -> str:
        start = self.at
        while self.at < len(self.text) and self.text[self.at] not in stops:
            self.at += 1
        word = self.text[start : self.at].strip()
        if not word:
            raise self.fail("a value is missing")
        return word

    def read_quoted(self) -> str:
        found: list[str] = []
        quote = self.text[self.at]
        self.at += 1
        while self.at < len(self.text):
            char = self.text[self.at]
            if char == quote:
                self.at += 1
                return "".join(found)
            following = self.text[self.at + 1 : self.at + 2]
            if char == "\\" and following and following in "\\'\"":
                char, self.at = following, self.at + 1
            found.append(char)
            self.at += 1
        raise self.fail(f"the closing {quote} is missing")

    def read_list(self, depth: int) -> list[Any]:
        items: list[Any] = []
        self.at += 1
        if self.peek() == "]":
            self.at += 1
            return items
        while True:
            items.append(self.value(",]}", depth + 1))
            if self.more("]"):
                return items

    def read_mapping(self, depth: int) -> dict[str, Any]:
        items: dict[str, Any] = {}
        self.at += 1
        if self.peek() == "}":
            self.at += 1
            return items
        while True:
            quoted = self.peek() in ("'", '"')
            key = self.read_quoted() if quoted else self.read_word(":,]}")
            if self.peek() != ":":
                raise self.fail("a key in { } needs a colon and a value")
            self.at += 1
            items[key] = self.value(",]}", depth + 1)
            if self.more("}"):
                return items

    def more(self, end: str) -> bool:
        """Step over the comma (False) or the closing bracket (True) that must come now."""
        char = self.peek()
        if char not in (",", end) or not char:
            raise self.fail(f"the closing {end} is missing")
        self.at += 1
        return char == end


def parse_value(text: str) -> Any:
    """Text as null, bool, int, float, str, list or dict; ConfigError where it cannot be read."""
    return _Reader(text).whole()


def format_value(value: Any) -> str:
    """The text that `parse_value` reads back as an equal value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        if _BARE.fullmatch(value) and isinstance(_scalar(value), str):
            return value
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    if isinstance(value, Mapping):
        pairs = (f"{format_value(str(k))}: {format_value(v)}" for k, v in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(format_value(item) for item in value) + "]"
    return repr(value)


def _read_option(key: str, text: str) -> Any:
    """The value of one command-line option: text stays text where the key wants text."""
    field = option_fields()[key]
    kind = str(field.type).removesuffix(" | None")
    text = text.strip()
    if not text:
        if kind != field.type:
            return None
        raise ConfigError(f"{key} has no value")
    try:
        if kind == "str":
            quoted = text[0] in "'\""
            return None if text in _NULLS else parse_value(text) if quoted else text
        if not kind.startswith("tuple"):
            return parse_value(text)
        if text[0] in "'\"":
            inner = parse_value(text)
            if not inner.lstrip().startswith("["):
                return [inner]
            text = inner.strip()
        if not text.startswith("["):
            text = f"[{text}]"
        return _Reader(text, words=kind == "tuple[str, ...]").whole()
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None


def _assignments(argv: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs (key, text) of a command line; flags without a value are `true`."""
    pairs = []
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if token in ("-h", "--help"):
            raise HelpRequested
        if token.startswith("~"):
            raise ConfigError(f"{show(token)}: keys cannot be taken away, only set")
        flag = token.startswith("--")
        key, equals, text = token.removeprefix("--").partition("=")
        key = key if flag else key.removeprefix("+").removeprefix("+")
        if not flag and (token.startswith("-") or not equals):
            raise ConfigError(f"{show(token)} is not key=value{_hint(key)}; see --help")
        if not key:
            raise ConfigError(f"{show(token)} has no key; see --help")
        if flag and not equals:
            text = _flag_value(key, tokens)
        pairs.append((key, text))
    return pairs


def _hint(word: str) -> str:
    if word in PRESETS:
        return f" (did you mean preset={word}?)"
    known = [*option_fields(), "config"]
    return f" (did you mean {word}=VALUE?)" if word in known else did_you_mean(word, known)


def _flag_value(key: str, tokens: list[str]) -> str:
    name = key if key == "config" else canonical_key(key)
    field = option_fields().get(name or "")
    if field is not None and field.type == "bool":
        return tokens.pop(0) if tokens and tokens[0].lower() in ("true", "false") else "true"
    if not tokens or tokens[0].startswith("--"):
        raise ConfigError(f"--{key} needs a value")
    return tokens.pop(0)


def _read_yaml(path: Path, text: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise ConfigError(
            f"reading {path} needs PyYAML: pip install 'trm-fast[compat]' (or use a .json file)"
        ) from None

    class Loader(yaml.SafeLoader):
        """Without merge keys (<<): a few lines of them stand for any number of settings."""

        def flatten_mapping(self, node: Any) -> None:
            if merges := [key for key, _ in node.value if key.tag == "tag:yaml.org,2002:merge"]:
                where = merges[0].start_mark.line + 1
                raise yaml.YAMLError(f"line {where}: merge keys (<<) are not allowed")
            super().flatten_mapping(node)

    try:
        return yaml.load(text, Loader)  # plain values only
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not YAML: {str(error)[:150]}") from None
    except (ArithmeticError, RecursionError):  # a number or a nesting beyond all bounds
        raise ConfigError(f"{path} is not YAML that can be read") from None


def _saved_config(path: str) -> dict[str, Any]:
    """The settings of the run (or step) folder that `resume=PATH` names."""
    folder = Path(path)
    try:
        step = (folder / "last").read_bytes()[:100].decode("ascii", "replace").strip()
    except (OSError, ValueError):
        step = ""
    # Nothing but a step's name: a damaged pointer leads nowhere else.
    file = folder / (step if _STEP.fullmatch(step) else ".") / "config.json"
    with suppress(OSError):  # a name too long for any folder
        if not file.is_file():  # killed before `last` was written: any step, all have the same
            file = next(folder.glob("step_*/config.json"), file)
        if file.is_file():
            return read_config_file(file, same_run=True)
    raise ConfigError(
        f"resume must be auto, never or a run folder with a checkpoint, got {show(path)}"
    )


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The content of a .json, .yaml or .yml file as it stands; ConfigError naming the file.

    YAML is read by PyYAML's safe loader, which makes plain values only.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".json", ".yaml", ".yml"):
        raise ConfigError(f"config must be a .json or .yaml file, got {show(str(path))}")
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
        text = data.decode("utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"cannot read config {show(str(path))}: {reason}") from None
    if len(data) > _LARGEST:
        raise ConfigError(f"{path}: larger than {_LARGEST} bytes, not a configuration")
    if kind == ".json":
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not JSON: {str(error)[:150]}") from None
    else:
        values = _read_yaml(path, text)
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} must hold keys and values, got {show(values)}")
    return dict(values)


def read_config_file(path: str | Path, *, same_run: bool = False) -> dict[str, Any]:
    """A .json, .yaml or .yml file as dotted canonical keys; ConfigError naming the file.

    Our config.json, the official all_config.yaml and the official cfg_pretrain.yaml are all read;
    of the first what describes the data and the model built for it is left out, and unless it is
    for the same run also that run's name and folder; of the last `hydra` is left out, and its
    `defaults` may choose the architecture.
    """
    path, values = Path(path), read_mapping(path)
    left_out = NOT_SETTINGS if same_run or "model" not in values else NOT_SETTINGS + OF_ONE_RUN
    values = {k: v for k, v in values.items() if k not in left_out}
    defaults = values.pop("defaults", [])
    if not isinstance(defaults, list):
        raise ConfigError(f"{path}: defaults must be a list, got {show(defaults)}")
    for entry in defaults:
        if isinstance(entry, Mapping) and "arch" in entry:
            values.setdefault("arch", entry["arch"])
    try:
        return flatten(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_train(argv: Sequence[str]) -> TrainConfig:
    """The configuration that a command line (without the program name) asks for.

    Order: official base < preset < --config files < key=value. Without preset and without `arch`
    the preset is sudoku-mini; `arch=trm`, or a file that names an architecture, starts from the
    official base; `resume=PATH` starts from the settings of that run. Raises ConfigError (one
    line) or HelpRequested.
    """
    preset: Any = None
    official_base = False
    files, given = [], {}
    for key, text in _assignments(argv):
        if key == "config":
            files.append(read_config_file(text))
        elif key == "arch.loss.name":
            flatten({key: text})
        else:
            name = canonical_key(key)
            if name is not None:
                given[name] = _read_option(name, text)
                official_base = official_base or key == "arch"
    resumed = given.get("resume", "auto")
    if isinstance(resumed, str) and resumed not in ("auto", "never"):
        files.insert(0, _saved_config(resumed))
    preset = given.get("preset")
    for file in files:
        preset = preset or file.get("preset")
        official_base = official_base or "arch.name" in file
    if preset is None and not official_base:
        preset = DEFAULT_PRESET
    if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
        hint = did_you_mean(preset, PRESETS) if isinstance(preset, str) else ""
        raise ConfigError(f"preset must be one of {', '.join(PRESETS)}, got {show(preset)}{hint}")
    flat: dict[str, Any] = dict(PRESETS[preset]) if preset else {}
    for above in (*files, given):
        flat = layer(flat, above)
    return TrainConfig.from_flat({**flat, "preset": preset})


def _yaml_scalar(value: Any) -> str:
    if isinstance(value, float) and "e" in repr(value) and "." not in repr(value):
        return repr(value).replace("e", ".0e")  # YAML 1.1 takes 1e-05 for text
    if not isinstance(value, str):
        return format_value(value)
    if _YAML_BARE.fullmatch(value) and value.lower() not in _YAML_WORDS:
        return value
    escaped = []
    for char in value:
        code = ord(char)
        if char in '"\\':
            escaped.append("\\" + char)
        elif char.isprintable():
            escaped.append(char)
        else:
            escaped.append(f"\\U{code:08x}" if code > 0xFFFF else f"\\u{code:04x}")
    return '"' + "".join(escaped) + '"'


def emit_yaml(value: Any, indent: int = 0) -> str:
    """Dicts, lists and scalars as YAML text that `yaml.safe_load` reads back as equal values."""
    pad = "  " * indent
    if isinstance(value, Mapping) and value:
        lines = [
            f"{pad}{_yaml_scalar(key)}:{_yaml_child(item, indent)}"
            for key, item in sorted(value.items())
        ]
        return "".join(lines)
    if isinstance(value, (list, tuple)) and value:
        return "".join(f"{pad}-{_yaml_child(item, indent)}" for item in value)
    return f"{pad}{_yaml_scalar(value) if not isinstance(value, tuple) else '[]'}\n"


def _yaml_child(item: Any, indent: int) -> str:
    text = emit_yaml(item, indent + 1)
    nested = isinstance(item, (Mapping, list, tuple)) and len(item) > 0
    return f"\n{text}" if nested else f" {text.lstrip()}"


def option_rows() -> list[tuple[str, str, str, str]]:
    """Every key as (section, key, default of the official base, meaning), in reading order."""
    shown = {"arch.name": "trm", "arch.puzzle_emb_ndim": "hidden_size", "evaluators": "[arc@ARC]"}
    rows, section = [], "Start"
    for key, field in option_fields().items():
        section = "Model" if key.startswith("arch.") else field.metadata["section"] or section
        default = shown.get(key) or format_value(field.default)
        choices = field.metadata["choices"]
        meaning = field.metadata["help"] + (f" ({', '.join(choices)})" if choices else "")
        rows.append((section, key, default, meaning))
        if key == "preset":
            rows.append((section, "config", "null", "read a .json or .yaml file of settings"))
    return rows


def help_text() -> str:
    """The text of `--help`: how to write settings, every key, every preset; 100 columns."""
    lines = [
        "usage: python -m trm_fast.train [preset=NAME] [arch=trm] [config=FILE] [key=value ...]",
        "",
        "Settings are layered: official base, preset, file, command line; the later one counts.",
        f"With neither preset nor arch the preset is {DEFAULT_PRESET}. arch=trm takes the official",
        "base. Write key=value, +key=value, --key value or --key=value; lists as [a,b]; null for",
        "no value. The defaults shown are the official base's; the presets stand at the end.",
    ]
    section = ""
    for row_section, key, default, meaning in option_rows():
        if row_section != section:
            section = row_section
            lines += ["", section]
        lines += _help_row(key, default, meaning)
    lines += ["", "Presets"]
    for name, values in PRESETS.items():
        words = " ".join(f"{key}={format_value(value)}" for key, value in values.items())
        lines.append(f"  {name}" + (" (the default job)" if name == DEFAULT_PRESET else ""))
        lines += textwrap.wrap(
            words, 98, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
        )
    return "\n".join(lines) + "\n"


def _help_row(key: str, default: str, meaning: str) -> list[str]:
    start = f"  {key:<28} {default:<24} "
    return textwrap.wrap(
        meaning, 100, initial_indent=start, subsequent_indent=" " * 56, drop_whitespace=True
    )
