"""Files of torch.save, read without PyTorch's unpickler: tensors and plain values, nothing else.

Owns both containers that torch.save writes, the zip archive and the older row of pickles, and how
their tensors are made. Imported by `durable.py`. Every size is compared with the bytes that are
there before anything is made of it; compressed entries, which torch.save does not write, are
refused, and so is a file whose tensors add up to many times its bytes.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Container
from typing import Any, BinaryIO

import torch
from torch import Tensor

from trm_fast.options import printable
from trm_fast.unpickle import PickleError, plain_calls, plain_names, unpickle, volume

__all__ = ["read_torch_file"]

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the older container
_AMPLIFIED = 16  # bytes of all tensors for each byte of their storages: views may overlap
_STORED_AS = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
}
_DTYPES = (
    "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool "
    "complex64 complex128 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz"
)


class _StorageType:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class _Storage:
    """Bytes [n] uint8 and the type of the numbers in them."""

    def __init__(self, data: bytearray | None, dtype: torch.dtype) -> None:
        self.data = torch.frombuffer(data, dtype=torch.uint8) if data else torch.zeros(0).byte()
        if dtype == torch.bool:  # which is undefined for other bytes than 0 and 1
            self.data = (self.data != 0).view(torch.uint8)
        self.dtype = dtype


def read_torch_file(data: bytes, stubs: Container[str] = ()) -> object:
    """The value that torch.save wrote: tensors on the CPU without gradient, plain containers.

    Args:
        data: the file's bytes.
        stubs: "module.Class" of classes whose objects become an `unpickle.Holder`.

    Raises:
        PickleError: one line; not such a file, damaged, or it wants what it may not have.
    """
    if data[:4] == b"PK\x03\x04":
        return _Archive(data, stubs).value()
    return _older(data, stubs)


class _Tensors:
    """Makes tensors of storages and keeps count of their bytes."""

    def __init__(self, stubs: Container[str]) -> None:
        self.stubs = stubs
        self.storages: dict[str, _Storage] = {}
        self.held = self.made = 0

    def storage(
        self, key: str, dtype: torch.dtype, size: int, read: Callable[[], bytearray]
    ) -> _Storage:
        """The storage of that key, of `size` numbers; read where it is asked for first."""
        if key not in self.storages:
            data = read()
            if len(data) != size * dtype.itemsize:
                raise PickleError(
                    f"is damaged (storage {printable(key)} has {len(data)} bytes, "
                    f"not {size} numbers)"
                )
            self.storages[key] = _Storage(data, dtype)
            self.held += len(data)
        found = self.storages[key]
        if found.dtype != dtype or found.data.numel() != size * dtype.itemsize:
            raise PickleError(f"is damaged (storage {printable(key)} has two types or sizes)")
        return found

    def tensor(
        self,
        storage: _Storage,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
        requires_grad: object = False,
        hooks: object = None,
        metadata: object = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """A view of a storage; the arguments are those of torch._utils._rebuild_tensor_v2.

        `metadata` says that the numbers stand for their conjugates or negatives.
        """
        if metadata:
            raise PickleError(
                "has a tensor kept as the conjugate or negative of another "
                "(save it after .resolve_conj().resolve_neg())"
            )
        count = volume(size, "tensor")
        if len(size) != len(stride) or type(offset) is not int or offset < 0:
            raise PickleError("has a tensor of an impossible shape")
        volume(stride, "tensor")
        kind = dtype or storage.dtype
        there = storage.data.numel() // kind.itemsize
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if count and last >= there:
            raise PickleError("has a tensor larger than its storage")
        self.made += count * kind.itemsize
        if self.made > _AMPLIFIED * self.held + 2**20:
            raise PickleError("has tensors that add up to many times the bytes in it")
        if not count:
            return torch.zeros(size, dtype=kind)
        return storage.data.view(kind).as_strided(size, stride, offset)

    def typed(self, *arguments: object) -> Tensor:
        """As torch._utils._rebuild_tensor_v3, whose seventh argument is the type."""
        storage, offset, size, stride, _, _, dtype, *metadata = arguments
        if not isinstance(dtype, torch.dtype) or dtype == torch.bool:
            raise PickleError("has a tensor without a type of numbers")
        view: tuple[Any, ...] = (storage, offset, size, stride, False, None, *metadata)
        return self.tensor(*view, dtype=dtype)

    def unpickle(self, stream: BinaryIO, persistent: Callable[[object], object]) -> object:
        calls = plain_calls() | {
            "torch._utils._rebuild_tensor": self.tensor,
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_tensor_v3": self.typed,
            "torch._utils._rebuild_parameter": _first,
            "torch._utils._rebuild_parameter_with_state": _first,
            "torch.Size": _size,
            "torch.device": _text,
        }
        names = plain_names()
        names |= {f"torch.{name}": getattr(torch, name) for name in _DTYPES.split()}
        names |= {f"torch.{name}Storage": _StorageType(kind) for name, kind in _STORED_AS.items()}
        for module in ("torch", "torch.storage"):
            names[f"{module}.UntypedStorage"] = _StorageType(torch.uint8)
        return unpickle(stream, calls=calls, names=names, stubs=self.stubs, persistent=persistent)


def _first(value: object, *_: object) -> object:
    if not isinstance(value, Tensor):
        raise PickleError("has a parameter that is no tensor")
    return value


def _size(sizes: object) -> tuple[object, ...]:
    volume(sizes, "torch.Size")
    return tuple(sizes)  # type: ignore[arg-type]


def _text(*words: object) -> str:
    return ":".join(str(word)[:20] for word in words if isinstance(word, (str, int)))


def _reference(value: object) -> tuple[str, torch.dtype, int]:
    """(key, dtype, numbers) of a reference to a storage."""
    if isinstance(value, tuple) and len(value) >= 5 and value[0] == "storage":
        _, kind, key, _, size, *view = value
        plain = isinstance(key, str) and type(size) is int and size >= 0 and view in ([], [None])
        if plain and isinstance(kind, _StorageType):
            return key, kind.dtype, size
    raise PickleError("refers to something that is not a storage of numbers")


class _Archive:
    """The zip archive: NAME/data.pkl, NAME/byteorder, NAME/data/0, ..."""

    def __init__(self, data: bytes, stubs: Container[str]) -> None:
        self.tensors = _Tensors(stubs)
        try:
            self.zip = zipfile.ZipFile(io.BytesIO(data))
        except Exception as error:  # whatever the parser meets in a hostile file
            raise PickleError("is damaged (its zip directory cannot be read)") from error
        self.entries = {entry.filename: entry for entry in self.zip.infolist()}
        if sum(entry.file_size for entry in self.entries.values()) > len(data):
            raise PickleError(
                "has compressed or overlapping entries, which torch.save never writes"
            )
        found = [
            name for name in self.entries if name.count("/") == 1 and name.endswith("/data.pkl")
        ]
        if len(found) != 1 or any(name.endswith("/constants.pkl") for name in self.entries):
            raise PickleError("is a zip archive, but not one of torch.save")
        self.root = found[0].removesuffix("data.pkl")

    def value(self) -> object:
        order = self.root + "byteorder"
        if order in self.entries and self.read(order) != b"little":
            raise PickleError("was written on a machine of another byte order")
        return self.tensors.unpickle(io.BytesIO(self.read(self.root + "data.pkl")), self.storage)

    def storage(self, value: object) -> _Storage:
        key, dtype, size = _reference(value)
        return self.tensors.storage(key, dtype, size, lambda: self.read(f"{self.root}data/{key}"))

    def read(self, name: str) -> bytearray:
        entry = self.entries.get(name)
        if entry is None:
            raise PickleError("is damaged (an entry of the archive is missing)")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise PickleError(
                "has compressed or overlapping entries, which torch.save never writes"
            )
        result, filled = bytearray(entry.file_size), 0
        try:
            with self.zip.open(entry) as file:
                while block := file.read(1 << 20):
                    result[filled : filled + len(block)] = block
                    filled += len(block)
        except Exception as error:  # a checksum that does not match, or a header elsewhere
            raise PickleError(
                "is damaged (an entry does not match its checksum; one saved with "
                "compute_crc32=False has none: save it anew)"
            ) from error
        if filled != len(result):
            raise PickleError("is damaged (an entry is too short)")
        return result


def _older(data: bytes, stubs: Container[str]) -> object:
    """Pickles in a row (magic number, version, machine, value, keys), then all sizes and bytes."""
    stream = io.BytesIO(data)

    def plain() -> object:
        return unpickle(stream, calls=plain_calls(), names=plain_names())

    if plain() != _MAGIC:
        raise PickleError("is not a file of torch.save")
    if plain() != _PROTOCOL:
        raise PickleError("is of a version of torch.save that is not known")
    machine = plain()
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise PickleError("was written on a machine of another byte order")
    start = stream.tell()
    # The bytes stand behind the value, so it is read twice: once for what it refers to.
    kinds: dict[str, tuple[torch.dtype, int]] = {}

    def note(value: object) -> _Storage:
        key, dtype, size = _reference(value)
        kinds.setdefault(key, (dtype, size))
        return _Storage(None, dtype)

    first = _Tensors(stubs)
    first.tensor = lambda *_, **__: torch.zeros(0)  # type: ignore[method-assign]
    first.unpickle(stream, note)
    keys = plain()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise PickleError("is damaged (its storages have no names)")
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        if key not in kinds or key in places:
            raise PickleError("is damaged (its storages have other names)")
        (size,) = struct.unpack("<q", stream.read(8).ljust(8, b"\xff"))
        begin, length = stream.tell(), size * kinds[key][0].itemsize
        if not 0 <= length <= len(data) - begin:
            raise PickleError("is damaged (it ends within a storage)")
        places[key] = (begin, length)
        stream.seek(begin + length)
    tensors = _Tensors(stubs)

    def storage(value: object) -> _Storage:
        key, dtype, size = _reference(value)
        if key not in places:
            raise PickleError("is damaged (a storage is missing)")
        begin, length = places[key]
        return tensors.storage(
            key, dtype, size, lambda: bytearray(memoryview(data)[begin : begin + length])
        )

    stream.seek(start)
    return tensors.unpickle(stream, storage)
