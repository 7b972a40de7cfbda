"""Inputs by hypothesis: files of a parser's kind that no valid one was the beginning of.

Owns `inputs_for`. Imported by the tests and by tools/fuzz.py.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import fuzz_binary
import fuzz_text
from fuzz_inputs import Files
from fuzz_parsers import Parser
from hypothesis import strategies as st

_plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(fuzz_text.WORDS),
)
_tree = st.recursive(
    _plain,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text(max_size=6), inner, max_size=4),
    ),
    max_leaves=8,
)


def _dumped(tree: object) -> bytes:
    return json.dumps(tree, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _json(seed: bytes) -> st.SearchStrategy[bytes]:
    """Any JSON, or an object with the seed's keys and values of any kind, or text of its marks."""
    try:
        keys = json.loads(seed)
    except ValueError:
        keys = None
    options: list[st.SearchStrategy[bytes]] = [
        _tree.map(_dumped),
        st.text('{}[]",:0123456789.eE+-\\u nultrefas', max_size=60).map(str.encode),
    ]
    if isinstance(keys, dict):
        shaped = {k: st.one_of(st.just(v), st.just(v), _tree) for k, v in keys.items()}
        options.append(st.fixed_dictionaries(shaped).map(_dumped))
    return st.one_of(options)


def _yaml(seed: bytes) -> st.SearchStrategy[bytes]:
    pieces = [line + b"\n" for line in seed.splitlines()] + [
        t + b"\n" for t in fuzz_text.YAML_TEXTS
    ]
    marks = [
        b"- ",
        b"a: ",
        b"? ",
        b"&b ",
        b"*b ",
        b"  ",
        b"[",
        b"]",
        b"{",
        b"}",
        b",",
        b"\n",
        b"<<: ",
    ]
    lines = st.lists(st.sampled_from(pieces + marks), max_size=12).map(b"".join)
    return st.one_of(lines, _tree.map(_dumped))


def _lines(seed: bytes) -> st.SearchStrategy[bytes]:
    """Lines of the seed's characters, and of a few that are not."""
    text = seed.decode("utf-8", "replace")
    alphabet = "".join(sorted({*text, *"0.,#SGo \n\r\t\x00é٣\x85\u2028"}))
    lines = st.lists(
        st.one_of(st.sampled_from(text.split("\n")), st.text(alphabet, max_size=30)), max_size=6
    )
    return lines.map("\n".join).map(str.encode)


def _argv(seed: bytes) -> st.SearchStrategy[bytes]:
    keys = [word.partition(b"=")[0] for word in seed.split(fuzz_text.SEPARATOR)]
    texts = st.one_of(
        st.text("[]{}:,'\"\\ =ae1.-_", max_size=14).map(str.encode),
        _tree.map(_dumped),
        st.sampled_from([w.encode("utf-8", "replace") for w in fuzz_text.WORDS]),
    )
    word = st.tuples(st.sampled_from([*keys, b""]), st.sampled_from([b"=", b"", b"=["]), texts)
    return st.lists(word.map(b"".join), max_size=5).map(fuzz_text.SEPARATOR.join)


def _npy(seed: bytes) -> st.SearchStrategy[bytes]:
    header = st.fixed_dictionaries(
        {
            "descr": st.sampled_from(fuzz_binary.DESCRS),
            "fortran_order": st.one_of(st.booleans(), _plain),
            "shape": st.one_of(
                st.lists(st.integers(0, 7), max_size=3).map(tuple),
                st.lists(st.integers(), max_size=3).map(tuple),
                _plain,
            ),
        }
    )
    headers = st.one_of(header, st.text(max_size=40))
    return st.builds(fuzz_binary.npy, headers, st.binary(max_size=100))


def _safetensors(seed: bytes) -> st.SearchStrategy[bytes]:
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "I64", "U8", "BOOL", "F8_E4M3", "C64", "x"]),
            "shape": st.lists(st.one_of(st.integers(0, 4), st.integers(0, 2**64)), max_size=3),
            "data_offsets": st.lists(st.integers(0, 48), min_size=2, max_size=2),
        }
    )
    header = st.dictionaries(st.text(max_size=4), st.one_of(entry, entry, _tree), max_size=3)

    def whole(text: bytes, body: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text + body

    return st.builds(whole, header.map(_dumped), st.binary(max_size=48))


def _pickle(seed: bytes) -> st.SearchStrategy[bytes]:
    """Instructions of the seed and hostile ones, in any order."""
    parts, end = fuzz_binary.instructions(seed)
    pieces = [*parts, *fuzz_binary.FRAGMENTS]
    pieces += [b"c" + name.replace(" ", "\n").encode() + b"\n" for name in fuzz_binary.GLOBALS]
    chosen = st.lists(st.sampled_from(pieces), max_size=25).map(b"".join)
    return chosen.map(lambda body: b"\x80\x02" + body + b"." + seed[end:])


def _archive(seed: bytes) -> st.SearchStrategy[bytes]:
    entries = fuzz_binary.entries_of(seed)
    at = next((i for i, entry in enumerate(entries) if entry[0].endswith("data.pkl")), None)
    if at is None:  # not a zip archive: the older container
        return _pickle(seed)

    def whole(pickled: bytes) -> bytes:
        return fuzz_binary.archive(
            [*entries[:at], (entries[at][0], pickled, 0), *entries[at + 1 :]]
        )

    return _pickle(entries[at][1]).map(whole)


_BY_ENDING: dict[str, Callable[[bytes], st.SearchStrategy[bytes]]] = {
    ".json": _json,
    ".yaml": _yaml,
    ".jsonl": _lines,
    ".csv": _lines,
    ".txt": _lines,
    ".argv": _argv,
    ".npy": _npy,
    ".safetensors": _safetensors,
    ".pickle": _pickle,
    ".older": _pickle,
    ".pt": _archive,
    ".ckpt": _archive,
    "": _archive,
}


def inputs_for(parser: Parser) -> st.SearchStrategy[Files]:
    """A seed of the parser with one file made anew, or of any bytes."""
    options = []
    for seed in parser.seeds():
        for name, content in seed.items():
            make = _BY_ENDING.get(Path(name).suffix)
            contents = [st.binary(max_size=64)]
            if make is not None and (Path(name).suffix or content[:2] in (b"PK", b"\x80\x02")):
                contents = [make(content)] * 4 + contents
            options.append(
                st.one_of(contents).map(lambda new, seed=seed, name=name: {**seed, name: new})
            )
    return st.one_of(options).map(parser.finish)
