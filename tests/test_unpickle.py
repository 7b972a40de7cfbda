"""Files of torch.save: what is in them comes out, and what they want beyond that never happens.

Left out: machines of big-endian byte order, whose files are refused by one line.
"""

import builtins
import collections
import io
import operator
import os
import pickle
import pickletools
import shutil
import struct
import subprocess
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trm_fast.torch_file import read_torch_file
from trm_fast.unpickle import Holder, PickleError, unpickle


def saved(value, new=True):
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


def archive(pickled, compression=zipfile.ZIP_STORED, **entries):
    """A zip archive of torch.save's layout around any pickle; entries data_0=bytes, ..."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        for name, content in entries.items():
            file.writestr(f"archive/{name.replace('_', '/')}", content)
    return buffer.getvalue()


both = pytest.mark.parametrize("new", [True, False], ids=["zip", "older"])


@both
def test_tensors_and_plain_values_come_out_as_they_went_in(new):
    base = torch.arange(24, dtype=torch.float32)
    dtypes = (
        *(torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16),
        *(torch.int8, torch.uint8, torch.bool, torch.complex64),
    )
    value = {
        "views": [base, base[3:9].view(2, 3).t(), base[::5]],
        "dtypes": {str(d): torch.tensor([0, 1, 1, 0]).to(d) for d in dtypes},
        "empty": torch.zeros(0, 3),
        "number": torch.tensor(2.5),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "ordered": collections.OrderedDict(a=1, b=(2, "x", None, True, 1.5, b"\x00", 2**70)),
        "state": torch.nn.Linear(2, 1).state_dict(),
        "set": {1, 2},
        "shape": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "np": [np.float64(0.25), np.int32(-3), np.arange(6, dtype=np.int16).reshape(2, 3)],
    }
    got = read_torch_file(saved(value, new))
    assert all(map(torch.equal, got["views"], value["views"]))
    assert got["views"][0].data_ptr() == got["views"][2].data_ptr()
    for name, tensor in value["dtypes"].items():
        assert got["dtypes"][name].dtype == tensor.dtype
        assert torch.equal(got["dtypes"][name], tensor), name
    assert got["empty"].shape == (0, 3) and got["number"].item() == 2.5
    assert torch.equal(got["parameter"], torch.ones(2)) and not got["parameter"].requires_grad
    assert got["ordered"] == dict(value["ordered"])
    assert torch.equal(got["state"]["weight"], value["state"]["weight"])
    assert (got["set"], got["shape"], got["dtype"]) == ({1, 2}, (2, 3), torch.bfloat16)
    assert got["np"][:2] == [0.25, -3] and got["np"][2].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_views_that_are_not_plain():
    row = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(read_torch_file(saved(row.expand(4, 3))), row.expand(4, 3))
    for view in (torch.ones(2, dtype=torch.complex64).conj(), torch._neg_view(row)):
        with pytest.raises(PickleError, match=r"conjugate or negative .*resolve_conj"):
            read_torch_file(saved({"a": view}))
    assert torch.equal(read_torch_file(saved(torch._neg_view(row).resolve_neg())), -row)


def test_types_without_a_storage_of_their_own():
    value = {"f8": torch.ones(3).to(torch.float8_e4m3fn), "u": torch.tensor([7]).to(torch.uint32)}
    got = read_torch_file(saved(value))
    assert torch.equal(got["f8"].float(), torch.ones(3)) and got["u"].tolist() == [7]


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol(protocol):
    value = {"a": [1, -(2**40), 2.5, "é", b"\xff", None, True, False, (), (1,), (1, 2), [], {}]}
    data = pickle.dumps(value, protocol)
    plain = {"_codecs.encode": lambda text, _: text.encode("latin-1"), "builtins.bytes": bytes}
    assert unpickle(io.BytesIO(data), calls=plain, names={}) == value


class Settings:
    pass


@both
def test_a_named_class_becomes_a_holder_and_no_other_does(new):
    settings_ = Settings()
    settings_.L_layers, settings_.device = 4, "cuda"
    data = saved({"config": settings_}, new)
    name = f"{Settings.__module__}.Settings"
    (holder,) = read_torch_file(data, stubs={name}).values()
    assert isinstance(holder, Holder) and holder.name == name
    assert holder.state == {"L_layers": 4, "device": "cuda"}
    with pytest.raises(PickleError, match=rf"wants {name}, which is not allowed"):
        read_torch_file(data, stubs={"other.Settings"})


# Hostile files


class Wants:
    """Pickles as a call of anything."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


class Built(Wants):
    def __reduce__(self):
        return (Settings, (), self.call)


MARK = "trm_fast_was_here"
TOUCH = f"touch {MARK}"
HOSTILE = {
    "posix.system": Wants(os.system, (TOUCH,)),
    "builtins.eval": Wants(eval, (f"open('{MARK}', 'w')",)),
    "builtins.exec": Wants(exec, (f"open('{MARK}', 'w')",)),
    "io.open": Wants(open, (MARK, "w")),
    "subprocess.Popen": Wants(subprocess.Popen, (["touch", MARK],)),
    "shutil.rmtree": Wants(shutil.rmtree, (".",)),
    "builtins.getattr": Wants(getattr, (Wants(__import__, ("os",)), "system")),
    "builtins.bytearray": Wants(bytearray, (10**15,)),
    "builtins.map": Wants(map, (Wants(os.system, (TOUCH,)), [1])),
    "torch.serialization.load": Wants(torch.load, (MARK,)),
    "torch._utils._rebuild_sparse_tensor": torch.eye(2).to_sparse(),
    "test_unpickle.Settings": Built({"x": Wants(os.system, (TOUCH,))}),
    "operator.attrgetter": Wants(operator.attrgetter("system"), (1,)),
    "builtins.__import__": Wants(builtins.__import__, ("antigravity",)),
}


@pytest.mark.parametrize("wanted", HOSTILE)
@both
def test_what_a_file_wants_is_named_and_does_not_happen(tmp_path, monkeypatch, wanted, new):
    monkeypatch.chdir(tmp_path)
    value = HOSTILE[wanted]
    for content in (value, {"w": torch.ones(2), "x": [value]}, [(), {"a": (1, value)}]):
        data = saved(content, new)
        with pytest.raises(PickleError, match=f"wants {wanted}, which is not allowed") as caught:
            read_torch_file(data)
        assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []
    # The same bytes in Python's own unpickler would have done it.
    if wanted == "posix.system":
        torch.load(io.BytesIO(saved(value, new)), weights_only=False)
        assert os.listdir(tmp_path) == [MARK]


def instructions(*parts):
    """A pickle by hand: bytes, and opcodes by their names in pickletools."""
    codes = {op.name: op.code.encode("latin-1") for op in pickletools.opcodes}
    return b"".join(codes[p] if isinstance(p, str) else p for p in parts)


def word(text):
    return instructions("SHORT_BINUNICODE", bytes([len(text)]), text.encode())


SYSTEM = instructions("GLOBAL", b"os\nsystem\n", word(TOUCH), "TUPLE1", "REDUCE", "STOP")
LONG_WAY = instructions(word("os"), word("system"), "STACK_GLOBAL", "STOP")
ORDERED = instructions("GLOBAL", b"collections\nOrderedDict\n")
FLOATS = instructions(word("storage"), "GLOBAL", b"torch\nFloatStorage\n", word("0"), word("cpu"))


def tensor_of(numel, shape, stride, dtype=FLOATS):
    """A pickle of one tensor with the given shape and stride over a storage of `numel` numbers."""

    def integers(values):
        each = [instructions("LONG1", b"\x08", struct.pack("<q", v)) for v in values]
        return instructions("MARK", *each, "TUPLE")

    storage = instructions("MARK", dtype, integers([numel])[1:-1], "TUPLE", "BINPERSID")
    return instructions(
        *("PROTO", b"\x02", "GLOBAL", b"torch._utils\n_rebuild_tensor_v2\n", "MARK", storage),
        *("BININT1", b"\x00", integers(shape), integers(stride), "NEWFALSE", "NONE", "TUPLE"),
        *("REDUCE", "STOP"),
    )


# A tuple of itself twice, and so on: as text, or hashed, it has no end.
DOUBLED = instructions("EMPTY_TUPLE") + b"".join(
    instructions("MEMOIZE", "BINGET", bytes([n]), "TUPLE2") for n in range(100)
)
SETTINGS = instructions("GLOBAL", b"__main__\nSettings\n", "EMPTY_TUPLE", "REDUCE")
SET = ("NONE", "SETITEM")
NUMBERS = [instructions("BININT", struct.pack("<i", n), "NONE") for n in range(10_001)]

BAD = {
    "by-name": (SYSTEM, r"wants os\.system"),
    "by-stack": (LONG_WAY, r"wants os\.system"),
    "inst": (instructions("MARK", word(TOUCH), "INST", b"os\nsystem\n", "STOP"), r"wants os\.sys"),
    "inst-of-allowed": (
        instructions("MARK", "INST", b"collections\nOrderedDict\n", "STOP"),
        "by an instruction that is not allowed",
    ),
    "obj": (instructions("MARK", ORDERED, "OBJ", "STOP"), "instruction OBJ"),
    "extension": (instructions("EXT1", b"\x01", "STOP"), "instruction EXT1"),
    "persistent-by-text": (instructions("PERSID", b"x\n", "STOP"), "instruction PERSID"),
    "persistent-other": (instructions(word("x"), "BINPERSID", "STOP"), "not a storage"),
    "call-of-text": (instructions(word("x"), "EMPTY_TUPLE", "REDUCE", "STOP"), "calls a str"),
    "state-of-list": (instructions("EMPTY_LIST", "NONE", "BUILD", "STOP"), "state of a list"),
    "key": (
        instructions("EMPTY_DICT", *["EMPTY_TUPLE", "TUPLE1"], "NONE", "SETITEM", "STOP"),
        "key of type tuple",
    ),
    "key-of-ordered": (
        instructions(ORDERED, "EMPTY_LIST", *["EMPTY_TUPLE"] * 2, "TUPLE2", "APPEND", "TUPLE1")
        + instructions("REDUCE", "STOP"),
        "key of type tuple",
    ),
    "no-end": (instructions("NONE"), "damaged"),
    "empty-stack": (instructions("STOP"), "damaged"),
    "no-mark": (instructions("TUPLE", "STOP"), "damaged"),
    "unknown-memo": (instructions("BINGET", b"\x05", "STOP"), "damaged"),
    "text-of-a-terabyte": (
        instructions("BINUNICODE8", struct.pack("<Q", 2**40), b"abc", "STOP"),
        "damaged",
    ),
    "bytes-of-a-terabyte": (
        instructions("BYTEARRAY8", struct.pack("<Q", 2**40), b"abc", "STOP"),
        "damaged",
    ),
    "not-a-number": (instructions("INT", b"1" * 9000 + b"\n", "STOP"), "damaged"),
    "escape": (
        instructions("GLOBAL", b"os\x1b[2J\nsys\x07tem\n", "STOP"),
        r"wants os\?\[2J\.sys\?tem",
    ),
    "encoding": (
        instructions("GLOBAL", b"_codecs\nencode\n", word("x"), word("zip"), "TUPLE2", "REDUCE"),
        "encoding zip; latin1 is allowed",
    ),
    "numpy-objects": (
        instructions("GLOBAL", b"numpy\ndtype\n", word("O8"), "TUPLE1", "REDUCE", "STOP"),
        "NumPy type O8",
    ),
    "tensor-beyond": (tensor_of(1, [2], [1]), "larger than its storage"),
    "tensor-expanded": (tensor_of(1, [10**15], [0]), "many times the bytes"),
    "tensor-negative": (tensor_of(1, [-1], [1]), "impossible shape"),
    "tensor-of-many-sizes": (tensor_of(1, [2**62] * 20_000, [1] * 20_000), "impossible shape"),
    "name-that-doubles": (DOUBLED + instructions(word("x"), "STACK_GLOBAL", "STOP"), "not text"),
    "module-that-doubles": (
        instructions(word("x")) + DOUBLED + instructions("STACK_GLOBAL", "STOP"),
        "not text",
    ),
    "attribute-that-doubles": (
        SETTINGS + instructions("EMPTY_DICT") + DOUBLED + instructions(*SET, "BUILD", "STOP"),
        "key of type tuple",
    ),
    "attributes-as-pairs": (
        SETTINGS + DOUBLED + instructions("NONE", "TUPLE2", "TUPLE1", "TUPLE1", "BUILD", "STOP"),
        "attributes from other than a dict",
    ),
    "attribute-of-number": (
        SETTINGS + instructions("EMPTY_DICT", "BININT1", b"\x07", *SET, "BUILD", "STOP"),
        "whose name is not text",
    ),
    "key-of-many-bits": (
        instructions("EMPTY_DICT", "LONG1", b"\x09", bytes(8) + b"\x01", *SET, "STOP"),
        "too large numbers as keys",
    ),
    "keys-of-one-hash": (
        instructions("EMPTY_DICT", "MARK", *NUMBERS, "SETITEMS", "STOP"),
        "too many numbers as keys",
    ),
    "set-of-one-hash": (
        instructions("GLOBAL", b"builtins\nset\n", "MARK", *NUMBERS, "LIST", "TUPLE1", "REDUCE")
        + instructions("STOP"),
        "too many numbers as keys",
    ),
    "storage-of-another-size": (tensor_of(10**15, [1], [1]), "damaged"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_instructions_are_one_line_and_take_no_memory(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    pickled, said = BAD[case]
    tracemalloc.start()
    with pytest.raises(PickleError, match=said) as caught:
        read_torch_file(archive(pickled, data_0=b"\0\0\0\0"), stubs={"__main__.Settings"})
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()
    assert os.listdir(tmp_path) == []


def test_a_memo_number_reserves_nothing():
    pickled = instructions("NONE", "LONG_BINPUT", struct.pack("<I", 2**32 - 1), "STOP")
    tracemalloc.start()
    assert read_torch_file(archive(pickled)) is None
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()


def test_what_doubles_itself_stays_small():
    """Each level holds the one below twice: 2 ** 5000 leaves, five thousand lists."""
    pickled = instructions("EMPTY_LIST", *["DUP", "POP"] * 0, "MEMOIZE")
    level = [
        instructions("EMPTY_LIST", "MEMOIZE", "MARK", "BINGET", bytes([n]), "BINGET", bytes([n]))
        + instructions("APPENDS")
        for n in range(250)
    ]
    value = read_torch_file(archive(pickled + b"".join(level) + instructions("STOP")))
    assert len(value) == 2 and value[0] is value[1]


def test_too_many_instructions_end(monkeypatch):
    monkeypatch.setattr("trm_fast.unpickle.LIMIT", 1000)
    with pytest.raises(PickleError, match="more than 1,000 instructions"):
        read_torch_file(archive(instructions(*["NONE", "POP"] * 600, "NONE", "STOP")))


def test_copies_of_one_list_end(monkeypatch):
    monkeypatch.setattr("trm_fast.unpickle.COPIED", 0)
    monkeypatch.setattr("trm_fast.unpickle.FREE", 100_000)
    made = instructions("GLOBAL", b"builtins\nset\n", "BINGET", b"\0", "TUPLE1", "REDUCE", "POP")
    start = instructions("MARK", *["NONE"] * 1000, "LIST", "MEMOIZE")
    assert len(read_torch_file(archive(start + made * 3 + instructions("STOP")))) == 1000
    with pytest.raises(PickleError, match="copies more than 100,000 bytes"):
        read_torch_file(archive(start + made * 4 + instructions("STOP")))


def test_zip_bombs_and_archives_of_other_things():
    good = saved({"a": torch.ones(8)})
    pickled = zipfile.ZipFile(io.BytesIO(good)).read("archive/data.pkl")
    assert torch.equal(
        read_torch_file(archive(pickled, data_0=torch.ones(8).numpy().tobytes()))["a"],
        torch.ones(8),
    )
    bomb = archive(pickled, zipfile.ZIP_DEFLATED, data_0=bytes(50_000_000))
    assert len(bomb) < 100_000
    tracemalloc.start()
    with pytest.raises(PickleError, match="compressed or overlapping entries"):
        read_torch_file(bomb)
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()
    lying = bytearray(archive(pickled, data_0=bytes(32)))
    record = lying.rindex(b"PK\x01\x02")
    lying[record + 20 : record + 28] = struct.pack("<II", 2**30, 2**30)
    tracemalloc.start()
    with pytest.raises(PickleError, match="compressed or overlapping entries"):
        read_torch_file(bytes(lying))
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()
    with pytest.raises(PickleError, match="an entry of the archive is missing"):
        read_torch_file(archive(pickled))
    for entries in ({"constants.pkl": b""}, {"data.pkl": pickled}):
        other = io.BytesIO(good if "constants.pkl" in entries else b"")
        with zipfile.ZipFile(other, "a") as file:
            for name, content in entries.items():
                file.writestr(f"archive/{name}" if "data" not in name else name, content)
        with pytest.raises(PickleError, match=r"but not one of torch\.save"):
            read_torch_file(other.getvalue())
    order = archive(pickled, byteorder=b"big", data_0=bytes(32))
    with pytest.raises(PickleError, match="another byte order"):
        read_torch_file(order)


def test_many_views_of_one_storage_are_refused():
    base = torch.zeros(300_000)
    few = read_torch_file(saved([base.view(-1) for _ in range(10)]))
    assert len(few) == 10
    with pytest.raises(PickleError, match="many times the bytes"):
        read_torch_file(saved([base.view(-1) for _ in range(30)]))


def test_older_files_with_impossible_sizes():
    data = bytearray(saved({"a": torch.ones(4)}, new=False))
    assert struct.unpack("<q", data[-24:-16]) == (4,)
    for size, said in ((2**61, "ends within"), (-1, "ends within"), (3, "12 bytes, not 4")):
        data[-24:-16] = struct.pack("<q", size)
        with pytest.raises(PickleError, match=said):
            read_torch_file(bytes(data))
    for text in (b"", b"\x80\x02N.", b"not weights", pickle.dumps({"a": 1})):
        with pytest.raises(PickleError, match=r"damaged|not a file of torch\.save"):
            read_torch_file(text)


VALUE = {"w": torch.arange(40.0).view(8, 5), "n": [1, 2.5, "x"], "b": torch.ones(3).bool()}
FILES = {new: saved(VALUE, new) for new in (True, False)}


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_cut_and_flipped_files_are_errors_or_right(data):
    new = data.draw(st.booleans())
    content = bytearray(FILES[new])
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    try:
        got = read_torch_file(bytes(content))
    except PickleError as error:
        assert "\n" not in str(error)
        return
    # The archive has checksums: what a flip leaves readable is what was written.
    if new:
        assert torch.equal(got["w"], VALUE["w"]) and got["n"] == VALUE["n"]
