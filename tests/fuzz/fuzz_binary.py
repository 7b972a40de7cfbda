"""Damage to binary files: .npy, safetensors, pickles, the archives of torch.save.

Every function takes bytes and a `random.Random` and returns bytes; headers, offsets and
instructions are changed as such, so that what comes out often gets past the first checks.
Imported by fuzz_inputs.
"""

from __future__ import annotations

import ast
import io
import json
import pickle
import pickletools
import struct
import warnings
import zipfile
from random import Random
from typing import Any

from fuzz_text import change_tree, damage_bytes, dump, number, value

_NPY = b"\x93NUMPY"
DESCRS = (
    *("|u1", "|i1", "<i4", ">i4", "<i8", "<u8", "<f8", "<f2", "|O", "<U5", "|S3", "<c16", "|V8"),
    *("<M8[ns]", "|b1", "<i3", "i", "", "O", "x" * 400, None, 5),
    *([("a", "<i4")], [("a", "|O")], ("<i4", (2, 2)), {"names": ["a"], "formats": ["<i4"]}),
)
_SHAPES = (
    *((), (0,), (1,), (-1,), (2**31,), (2**62, 4), (2**40, 0), (0, 2**62), (4, 4, 4)),
    *((2**63,), (10**30,), (1.5,), (True,), ("4",), [4, 4], 4, None, ((4,),), (4,) * 70),
)
_HEADERS = (
    *("", "{}", "[]", "None", "'" * 9, "(" * 300, "{'a':" * 200, "1" * 5000, "\x00", "é"),
    *("__import__('os').system('true')", "{'descr': '|u1', 'fortran_order': False}"),
    *("{**{}}", "[x for x in ()]", "-" * 400 + "1", "{'shape': (1,), 'shape': (2,)}"),
)


def npy(header: Any, body: bytes, version: tuple[int, int] = (1, 0)) -> bytes:
    """A .npy file with that header, a text or what repr makes of it."""
    text = (header if isinstance(header, str) else repr(header)).encode("utf-8", "replace")
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    size = struct.pack("<H" if version == (1, 0) else "<I", len(text) % 65536)
    return _NPY + bytes(version) + size + text + body


def damage_npy(data: bytes, rng: Random) -> bytes:
    try:
        (length,) = struct.unpack("<H", data[8:10])
        header = ast.literal_eval(data[10 : 10 + length].decode("latin-1"))
        body = data[10 + length :]
        header["shape"]
    except (ValueError, SyntaxError, struct.error, RecursionError, TypeError, KeyError):
        return damage_bytes(data, rng)
    except MemoryError:
        return damage_bytes(data, rng)
    act = rng.randrange(9)
    if act == 0:
        header["descr"] = rng.choice(DESCRS)
    elif act == 1:
        header["shape"] = rng.choice(_SHAPES)
    elif act == 2:
        header["shape"] = tuple(number(rng) for _ in range(rng.randrange(4)))
    elif act == 3:
        header["fortran_order"] = rng.choice((True, 1, None, "x", value(rng)))
    elif act == 4:
        header.pop(rng.choice(sorted(header)), None)
        header |= {"extra": 1} if rng.random() < 0.5 else {}
    elif act == 5:
        header = rng.choice(_HEADERS)
    elif act == 6:
        body = damage_bytes(body, rng)
    elif act == 7:
        version = rng.choice(((1, 0), (2, 0), (3, 0), (9, 9), (0, 0)))
        file = npy(header, body, version)
        lie = struct.pack("<I", rng.choice((0, 1, 64, 65535, 2**31, 2**32 - 1)))
        return file[:8] + lie + file[12:] if rng.random() < 0.5 else file
    else:
        return damage_bytes(data, rng)
    return npy(header, body)


def damage_safetensors(data: bytes, rng: Random) -> bytes:
    try:
        (length,) = struct.unpack("<Q", data[:8])
        tree = json.loads(data[8 : 8 + length])
    except (ValueError, struct.error, RecursionError):
        return damage_bytes(data, rng)
    text, body = data[8 : 8 + length], data[8 + length :]
    entries = [v for v in tree.values() if isinstance(v, dict)] if isinstance(tree, dict) else []
    act = rng.randrange(9)
    if act < 2:
        text = dump(change_tree(tree, rng), rng)
    elif act < 5 and entries:
        entry = rng.choice(entries)
        key = rng.choice(("dtype", "shape", "data_offsets"))
        types = (
            "F64",
            "F32",
            "F16",
            "BF16",
            "I64",
            "I8",
            "BOOL",
            "U8",
            "F8_E4M3",
            "F4",
            "C64",
            "x",
        )
        choices = {
            "dtype": rng.choice(types),
            "shape": [number(rng) for _ in range(rng.randrange(4))],
            "data_offsets": sorted(rng.randrange(len(body) + 9) for _ in range(2)),
        }
        entry[key] = value(rng) if rng.random() < 0.2 else choices[key]
        text = dump(tree, rng)
    elif act == 5:
        length = rng.choice((0, 1, 8, 2**20, 10**8 + 1, 2**32, 2**63, 2**64 - 1, len(text) + 1))
        return struct.pack("<Q", length) + text + body
    elif act == 6:
        text = text + b" " * rng.randrange(64) + rng.choice((b"", b"\x00", b"}", b"{}"))
    elif act == 7:
        body = damage_bytes(body, rng)
    else:
        return damage_bytes(data, rng)
    return struct.pack("<Q", len(text)) + text + body


GLOBALS = (
    *(
        "os system",
        "builtins eval",
        "builtins exec",
        "builtins getattr",
        "posix system",
        "sys exit",
    ),
    *(
        "subprocess Popen",
        "torch load",
        "torch._utils _rebuild_tensor_v2",
        "torch Size",
        "torch float8",
    ),
    *("torch._utils _rebuild_parameter", "torch FloatStorage", "torch.storage UntypedStorage"),
    *(
        "collections OrderedDict",
        "builtins set",
        "builtins frozenset",
        "_codecs encode",
        "numpy dtype",
    ),
    *("numpy ndarray", "numpy._core.multiarray scalar", "numpy._core.multiarray _reconstruct"),
    *("torch bfloat16", "torch device", "__main__ TRMConfig", "builtins bytearray", "typing Any"),
)
FRAGMENTS = (
    *(
        b"(",
        b"]",
        b"}",
        b"\x8f",
        b")",
        b"N",
        b"\x88",
        b"0",
        b"1",
        b"2",
        b"R",
        b"b",
        b"o",
        b"i",
        b"Q",
    ),
    *(
        b"\x94",
        b"h\x00",
        b"q\x00",
        b"j\x00\x00\x00\x7f",
        b"r\xff\xff\xff\xff",
        b"K\x05",
        b"a",
        b"e",
    ),
    *(
        b"s",
        b"u",
        b"t",
        b"\x85",
        b"\x86",
        b"\x87",
        b"l",
        b"d",
        b"\x90",
        b"\x91",
        b"\x81",
        b"\x92",
        b".",
    ),
    *(
        b"\x80\x02",
        b"\x80\xff",
        b"\x82\x01",
        b"\x97",
        b"\x98",
        b"\x93",
        b"c\n\n",
        b"P1\n",
        b"S'\\x'\n",
    ),
    *(b"\x8d" + struct.pack("<Q", 2**62), b"\x8e" + struct.pack("<Q", 2**40), b"X\xff\xff\xff\x7f"),
    *(
        b"\x8b\xff\xff\xff\x7f",
        b"\x8a\xff" + b"\xff" * 255,
        b"I" + b"9" * 5000 + b"\n",
        b"F1e999\n",
    ),
    *(
        b"\x95" + struct.pack("<Q", 2**60),
        b"\x96" + struct.pack("<Q", 2**50),
        b"L" + b"1" * 999 + b"L\n",
    ),
)


def _growing(rng: Random) -> bytes:
    """Instructions whose value holds itself, or grows twofold with every few bytes."""
    rounds = rng.choice((3, 30, 300, 3000))
    kind = rng.randrange(5)
    if kind == 0:
        return b"]q\x00" + b"h\x00h\x00\x86q\x00" * rounds
    if kind == 1:
        return b"]q\x00h\x00a" + b"(h\x00h\x00h\x00e" * rounds
    if kind == 2:
        return b"]" * rounds + b"a" * (rounds - 1)  # a list in a list in a list
    if kind == 3:  # a text, encoded again and again
        size = 100 * rounds
        text = b"X" + struct.pack("<I", size) + b"x" * size + b"q\x01X\x06\x00\x00\x00latin1q\x02"
        return text + b"c_codecs\nencode\nq\x03" + b"h\x03h\x01h\x02\x86R" * rounds
    return b"\x8f(" + b"".join(b"K" + bytes([i % 256]) for i in range(rounds)) + b"\x90"


def instructions(data: bytes) -> tuple[list[bytes], int]:
    """The instructions of the pickle that data begins with, and where it ends."""
    stream = io.BytesIO(data)
    starts = [position for _, _, position in pickletools.genops(stream) if position is not None]
    ends = [*starts[1:], stream.tell()]
    return [data[a:b] for a, b in zip(starts, ends, strict=True)], stream.tell()


def damage_pickle(data: bytes, rng: Random) -> bytes:
    """One pickle with changed instructions; what follows it stays."""
    try:
        parts, end = instructions(data)
    except Exception:  # whatever an earlier change made of it
        return damage_bytes(data, rng)
    rest = data[end:]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(parts))
        act = rng.randrange(9)
        if act == 0:
            parts[at] = b""
        elif act == 1:
            parts.insert(at, rng.choice(parts))
        elif act == 2:
            other = rng.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        elif act == 3:
            parts[at] = b"c" + rng.choice(GLOBALS).replace(" ", "\n").encode() + b"\n"
        elif act == 4:
            parts.insert(at, rng.choice(FRAGMENTS))
        elif act == 5:
            plain = value(rng)
            whole = pickle.dumps(plain, rng.choice((2, 4)))
            parts[at] = b"".join(p for p in instructions(whole)[0][1:-1] if p[:1] != b"\x95")
        elif act == 6:
            numbers = [i for i, p in enumerate(parts) if p[:1] in (b"K", b"M", b"J")]
            at = rng.choice(numbers) if numbers else at
            near = struct.pack("<i", rng.choice((0, 1, -1, 2, 255, 65536, 2**31 - 1, -(2**31))))
            parts[at] = b"J" + near
        elif act == 7:
            parts[at] = damage_bytes(parts[at], rng)
        else:
            parts.insert(at, _growing(rng))
    return b"".join(parts) + rest


def damage_pickles(data: bytes, rng: Random) -> bytes:
    """A row of pickles with bytes behind it, as the older torch.save writes."""
    skipped = 0
    try:
        for _ in range(rng.randrange(5)):
            skipped += instructions(data[skipped:])[1]
    except Exception:
        skipped = 0
    tail = data[skipped:]
    if rng.random() < 0.15:
        return data[:skipped] + damage_bytes(tail, rng)
    return data[:skipped] + damage_pickle(tail, rng)


def archive(entries: list[tuple[str, bytes, int]]) -> bytes:
    """A zip archive of (name, content, compression)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that stand twice
        for name, content, kind in entries:
            file.writestr(zipfile.ZipInfo(name), content, kind)
    return buffer.getvalue()


def entries_of(data: bytes) -> list[tuple[str, bytes, int]]:
    """(name, content, stored) of everything in a zip archive; nothing of what is none."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            return [(i.filename, file.read(i), zipfile.ZIP_STORED) for i in file.infolist()]
    except Exception:  # whatever an earlier change made of it
        return []


def damage_archive(data: bytes, rng: Random) -> bytes:
    entries = entries_of(data)
    if not entries:
        return damage_bytes(data, rng)
    at = rng.randrange(len(entries))
    name, content, kind = entries[at]
    act = rng.randrange(12)
    if act < 5:
        at = next((i for i, e in enumerate(entries) if e[0].endswith("data.pkl")), at)
        name, content, kind = entries[at]
        entries[at] = (name, damage_pickle(content, rng), kind)
    elif act == 5:
        entries[at] = (name, damage_bytes(content, rng), kind)
    elif act == 6:
        names = (
            "../../evil",
            "/etc/evil",
            "archive/data.pkl",
            "a/data.pkl",
            "x",
            "",
            name + "/",
            "\x00",
        )
        entries[at] = (rng.choice(names), content, kind)
    elif act == 7:  # a bomb: zeros, compressed
        kind = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
        entries[at] = (name, bytes(rng.choice((10, 10**5, 10**6))), kind)
    elif act == 8:
        del entries[at]
    elif act == 9:
        entries.append(("archive/constants.pkl" if rng.random() < 0.3 else name, content, kind))
    else:
        return _damage_directory(data, rng)
    return archive(entries)


def _damage_directory(data: bytes, rng: Random) -> bytes:
    """Sizes, offsets and flags in the headers of a zip archive."""
    marks = (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06")
    spots = []
    for mark in marks:
        start = data.find(mark)
        while start >= 0:
            spots.append(start)
            start = data.find(mark, start + 1)
    if not spots:
        return damage_bytes(data, rng)
    at = rng.choice(spots) + rng.randrange(4, 46)
    lie = rng.choice(
        (b"\x00", b"\x01", b"\xff\xff", b"\x00\x00\x00\x00", b"\xff\xff\xff\xff", b"\x08\x00")
    )
    return data[:at] + lie + data[at + len(lie) :]
