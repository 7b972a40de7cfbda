"""Checked fields: what makes a frozen dataclass refuse a wrong type, range or choice in one line.

Owns ConfigError, the did-you-mean helper, `option(...)` (a field with its help and range) and the
conversions. Anything may import it; it imports the standard library only.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING
from typing import Any

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")
_WHOLE = re.compile(r"[+-]?[0-9]{1,19}(\.0*)?")
_SHORT = reprlib.Repr()  # a value whose parts hold each other many times has an endless repr
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, 90, 90, 90
_SHORT.maxtuple = _SHORT.maxlist = _SHORT.maxdict = _SHORT.maxset = _SHORT.maxfrozenset = 8
_BOOLS = {"true": True, "yes": True, "on": True, "1": True}
_BOOLS |= {"false": False, "no": False, "off": False, "0": False}


class ConfigError(ValueError):
    """A setting that cannot be used: one line saying what was given and what is allowed."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.split())))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the closest of `known`, or `""`; `mlp_t` finds `arch.mlp_t`."""
    known = list(known)
    low = name[:100].lower()
    inside = [k for k in known if k.lower() == low or k.lower().rpartition(".")[2] == low]
    close = inside or difflib.get_close_matches(name[:100], known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def printable(text: str) -> str:
    """The text with ? for what is not printable: a name out of a file may clear a terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def show(value: object) -> str:
    """The value as it goes into a message: one line, at most 60 characters."""
    try:
        text = printable(_SHORT.repr(value))
    except ValueError:  # Python refuses to print integers of thousands of digits
        text = "a huge number"
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


def to_int(value: object) -> int | None:
    if isinstance(value, str):
        text = value.strip()
        return int(text.partition(".")[0]) if _WHOLE.fullmatch(text) else None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    try:
        return None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def to_float(value: object) -> float | None:
    if isinstance(value, str):
        text = value.strip()
        value = float(text) if _NUMBER.fullmatch(text) else None
    elif not isinstance(value, float):
        value = to_int(value)
    try:
        number = math.nan if value is None else float(value)  # type: ignore[arg-type]
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def to_bool(value: object) -> bool | None:
    if isinstance(value, bool):
        return value
    return _BOOLS.get(str(value).lower()) if isinstance(value, (str, int)) else None


def to_str(value: object) -> str | None:
    return value if isinstance(value, str) and value.strip() and "\0" not in value else None


def to_strs(value: object) -> tuple[str, ...] | None:
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or any(to_str(item) is None for item in items):
        return None
    return tuple(items)


_CONVERT: dict[str, tuple[str, Callable[[object], Any]]] = {
    "int": ("an integer", to_int),
    "float": ("a number", to_float),
    "bool": ("true or false", to_bool),
    "str": ("text", to_str),
    "tuple[str, ...]": ("a list of texts", to_strs),
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


def check_fields(instance: Any, prefix: str = "", skip: Collection[str] = ()) -> None:
    """Convert and check every field of a frozen dataclass instance in place (for __post_init__)."""
    for field in dataclasses.fields(instance):
        if field.name in skip:
            continue
        value = convert(prefix + field.name, field, getattr(instance, field.name))
        object.__setattr__(instance, field.name, value)


def reject_unknown(given: Mapping[str, object], known: Iterable[str], what: str) -> None:
    known = list(known)
    for key in given:
        if key not in known:
            hint = did_you_mean(key, known) if isinstance(key, str) else ""
            raise ConfigError(f"unknown {what} key {show(key)}{hint}")
