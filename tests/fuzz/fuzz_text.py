"""Damage to text that a parser reads: JSON, YAML, CSV, command lines, boards.

Every function takes bytes and a `random.Random` and returns bytes. The changes know the grammar:
values of another type, keys that repeat, nesting without end, numbers beyond every type.
Imported by fuzz_inputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from random import Random
from typing import Any

Mutation = Callable[[bytes, Random], bytes]

NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 9, 16, 81, 255, 256, 65535, 10**6, 2**31 - 1, 2**31, -(2**31) - 1),
    *(2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30, 10**400),
    *(0.5, -0.0, 1e-5, 1e308, 5e-324, float("inf"), float("-inf"), float("nan")),
)
WORDS = (
    *("", " ", "0", "-1", "nan", "null", "true", "auto", "never", "all", "trm", "hrm", "none"),
    *("a\nb", "a\rb", "a\x00b", "\x1b[2J", "\u202eabc", "\ud800", "é", "٣", "²", "\U0001f600"),
    *("../../../etc/passwd", "/etc", "..", ".", "C:\\x", "a/b", "|||", "|||t1|||0123456789"),
    *("x" * 300, "9" * 4500, "{}", "[]", "${.hidden_size}", "%s%n", "__class__", "step_1"),
)
JSON_TEXTS = (
    *(b"", b"null", b"[]", b"{}", b"0", b'"x"', b"NaN", b"[NaN,Infinity,-Infinity]", b"{,}"),
    *(b"[" * 5000, b'{"a":' * 3000 + b"1" + b"}" * 3000, b"9" * 5000, b"1e999", b"-", b'"\\ud800"'),
    *(b"\xef\xbb\xbf{}", b"\xff\xfe{\x00}\x00", b"{}{}", b'{"a": 1, "a": 2}', b"\x00", b"[1,]"),
)
YAML_TEXTS = (
    *(b"!!int ''", b"!!float ''", b"!!bool maybe", b"!!timestamp then", b"!!binary '?'", b"*no"),
    *(b"!!python/object/apply:os.system ['true']", b"!!set {a, b}", b"!!omap [a: 1]", b"<<: 1"),
    *(b"!!null x", b"!x y", b"190:20:30", b"0x" + b"f" * 300, b"1_000", b"0o9", b".inf", b".NaN"),
    *(
        b"2001-12-14t21:59:43.10-05:00",
        b"2001-99-99",
        b"? [a]\n: b",
        b"{[a]: b}",
        b"{? a}",
        b"- - -",
    ),
    *(b"&a [*a]", b"&a {b: *a}", b"&a {<<: *a}", b"%YAML 9.9\n---\na: 1", b"---\n---", b"\t- a"),
    *(b"|\n  text", b">\n  text", b"'open", b'"open', b'"\\xZZ"', b'"\\U99999999"', b"@", b"`"),
    *(b"[" * 400, b"{a: " * 400, b"- " * 400, b"!!pairs [a]", b"!!str {a: 1}", b"!!map [1]"),
)
_DEEP = (9, 60, 2000)


def number(rng: Random) -> Any:
    return rng.choice(NUMBERS) if rng.random() < 0.8 else rng.randrange(-(2**70), 2**70)


def value(rng: Random, depth: int = 0) -> Any:
    """Any JSON value."""
    kind = rng.randrange(9 if depth < 3 else 5)
    if kind < 2:
        return number(rng)
    if kind == 2:
        return rng.choice(WORDS)
    if kind < 5:
        return rng.choice((None, True, False))
    if kind < 7:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(WORDS): value(rng, depth + 1) for _ in range(rng.randrange(3))}


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key or index) of everything in a JSON tree."""
    stack = [tree]
    while stack:
        node = stack.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, item in list(items):
            yield node, key
            if isinstance(item, (dict, list)):
                stack.append(item)


def _deeper(item: Any, rng: Random) -> Any:
    for _ in range(rng.choice(_DEEP[:2])):
        item = [item] if rng.random() < 0.5 else {"a": item}
    return item


def change_tree(tree: Any, rng: Random) -> Any:
    """One change of a JSON tree, which is changed itself where it can be."""
    spots = list(places(tree)) if isinstance(tree, (dict, list)) else []
    if not spots or rng.random() < 0.02:
        return value(rng)
    node, key = rng.choice(spots)
    act = rng.randrange(8)
    if act < 3:
        node[key] = value(rng)
    elif act == 3:
        del node[key]
    elif act == 4:
        other, there = rng.choice(spots)
        # Copies, so that nothing comes to hold itself.
        node[key], other[there] = deepcopy(other[there]), deepcopy(node[key])
    elif act == 5:
        wide = rng.random() < 0.1
        node[key] = [node[key]] * 999 if wide else _deeper(node[key], rng)
    elif act == 6 and type(node[key]) is int:
        node[key] += rng.choice((-1, 1, 2**31, -(2**31), 10**18))
    elif isinstance(node, dict):
        node[rng.choice(WORDS) if rng.random() < 0.5 else f"{key}x"] = node.pop(key)
    else:
        node.insert(key, node[key] if rng.random() < 0.5 else value(rng))
    return tree


def dump(tree: Any, rng: Random) -> bytes:
    """JSON text of a tree; sometimes with raw characters, or a key that stands twice."""
    try:
        text = json.dumps(tree, ensure_ascii=rng.random() < 0.7)
    except (ValueError, RecursionError):  # a tree that holds itself
        text = "[]"
    if rng.random() < 0.05 and text.startswith("{") and len(text) > 2:
        first = text[1:].partition(",")[0]
        text = "{" + first.rstrip("}") + ", " + text[1:]
    return text.encode("utf-8", "surrogatepass")


def damage_json(data: bytes, rng: Random) -> bytes:
    if rng.random() < 0.05:
        return rng.choice(JSON_TEXTS)
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return damage_bytes(data, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        tree = change_tree(tree, rng)
    return dump(tree, rng)


def damage_lines(data: bytes, rng: Random) -> bytes:
    """Text by lines; a metrics file is one of JSON objects."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    act = rng.randrange(6)
    if act < 3 and lines[at].startswith(b"{"):
        lines[at] = damage_json(lines[at], rng)
    elif act == 3:
        lines.insert(at, rng.choice(lines))
    elif act == 4:
        del lines[at]
    else:
        lines[at] = damage_bytes(lines[at], rng)
    return b"\n".join(lines)


def merge_bomb(rng: Random) -> bytes:
    """YAML whose aliases or merge keys would make many times its size."""
    levels, width = rng.randrange(2, 12), rng.randrange(2, 10)
    lines = ["a0: &a0 {k: v}"]
    for level in range(1, levels):
        inner = ", ".join([f"*a{level - 1}"] * width)
        body = f"{{<<: [{inner}]}}" if rng.random() < 0.8 else f"[{inner}]"
        lines.append(f"a{level}: &a{level} {body}")
    return "\n".join(lines).encode()


def damage_yaml(data: bytes, rng: Random) -> bytes:
    act = rng.randrange(10)
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    if act < 4:
        key = lines[at].partition(b":")[0]
        given = rng.choice(YAML_TEXTS) if rng.random() < 0.6 else dump(value(rng), rng)
        lines[at] = key + b": " + given
    elif act == 4:
        lines.insert(at, rng.choice(YAML_TEXTS))
    elif act == 5:
        lines[at] = b" " * rng.randrange(5) + lines[at]
    elif act == 6:
        lines[at:at] = [merge_bomb(rng)]
    elif act == 7:
        other = rng.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    elif act == 8:
        del lines[at]
    else:
        return damage_bytes(data, rng)
    return b"\n".join(lines)


def damage_csv(data: bytes, rng: Random) -> bytes:
    """Cells, columns, quotes, characters; rows that repeat or are cut."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    cells = lines[at].split(b",")
    cell = rng.randrange(len(cells))
    act = rng.randrange(9)
    if act == 0:
        cells[cell] = rng.choice(WORDS).encode("utf-8", "surrogatepass")
    elif act == 1:
        cells.insert(cell, rng.choice(cells))
    elif act == 2:
        del cells[cell]
    elif act == 3:
        cells[cell] = b'"' + cells[cell] + rng.choice((b'"', b"", b'""'))
    elif act == 4:
        cells[cell] *= rng.choice((2, 3, 60, 500))
    elif act == 5 and cells[cell]:
        place = rng.randrange(len(cells[cell]))
        new = rng.choice((b"0", b".", b"1", b"9", b"S", b"G", b"#", b"o", b" ", b"\xff", b"\x00"))
        cells[cell] = cells[cell][:place] + new + cells[cell][place + 1 :]
    elif act == 6:
        lines.insert(at, rng.choice(lines))
    elif act == 7:
        cells.reverse()
    else:
        return damage_bytes(data, rng)
    lines[at] = b",".join(cells)
    return rng.choice((b"\n", b"\n", b"\n", b"\r\n", b"\r")).join(lines)


SEPARATOR = b"\x1e"  # between the words of a command line
_MARKS = (
    b"[",
    b"]",
    b"{",
    b"}",
    b",",
    b":",
    b"'",
    b'"',
    b"\\",
    b"=",
    b"+",
    b"--",
    b"-",
    b"~",
    b" ",
)


def damage_arguments(data: bytes, rng: Random) -> bytes:
    """Words of a command line: keys, values and the marks of their grammar."""
    words = data.split(SEPARATOR)
    at = rng.randrange(len(words))
    key, equals, text = words[at].partition(b"=")
    act = rng.randrange(8)
    if act < 2:
        given = (
            dump(value(rng), rng)
            if rng.random() < 0.5
            else rng.choice(WORDS).encode("utf-8", "replace")
        )
        words[at] = key + b"=" + given
    elif act == 2:
        words[at] = rng.choice((b"+", b"++", b"--", b"~", b"-")) + key + equals + text
    elif act == 3:
        place = rng.randrange(len(words[at]) + 1)
        words[at] = words[at][:place] + rng.choice(_MARKS) + words[at][place:]
    elif act == 4:
        words[at] = rng.choice(words).partition(b"=")[0] + b"=" + text
    elif act == 5:
        words[at] = key + b"=" + rng.choice((b"[", b"{a: ")) * rng.choice(_DEEP) + text
    elif act == 6:
        words.insert(at, rng.choice(words))
    else:
        words[at] = damage_bytes(words[at], rng)
    return SEPARATOR.join(words)


def damage_board(data: bytes, rng: Random) -> bytes:
    """A text of boards: characters, lines and their ends."""
    if rng.random() < 0.3:
        return damage_csv(data, rng)
    data = data or b"."
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)
        new = rng.choice((*b"0123456789.#SGo _*,\n\r\t\x00\xff\x0b\x1c", 0xC2, 0x85))
        data = (
            data[:at]
            + bytes([new]) * rng.choice((1, 1, 1, 1, 4, 90, 5000))
            + data[at + rng.randrange(3) :]
        )
    return data


def damage_bytes(data: bytes, rng: Random) -> bytes:
    """Bits, bytes, stretches: what a disk or a transfer does, and what no grammar foresees."""
    if not data:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(9)))
    at = rng.randrange(len(data))
    size = rng.choice((1, 1, 2, 4, 8, 64, len(data) // 2 + 1))
    act = rng.randrange(8)
    if act == 0:
        return data[:at]
    if act == 1:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if act == 2:
        return data[:at] + data[at + size :]
    if act == 3:
        return data[:at] + data[at : at + size] + data[at:]
    if act == 4:
        return (
            data[:at] + bytes(rng.randrange(256) for _ in range(min(size, 64))) + data[at + size :]
        )
    if act == 5:
        return (
            data[:at] + rng.choice((b"\x00", b"\xff", b"\x7f", b"\x80")) * size + data[at + size :]
        )
    if act == 6:
        there = rng.randrange(len(data))
        return data[:at] + data[there : there + size] + data[at + size :]
    return data + data[at : at + size] * rng.choice((1, 1, 30))
