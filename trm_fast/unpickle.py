"""Pickles read by a machine of our own, which holds data and can call nothing.

Owns the instructions it knows and the plain values they make. Imported by `torch_file.py`, which
adds tensors. Python's own unpickler imports and calls whatever a file names; here a name is looked
up in tables that the caller gives, and one that is not there ends the reading with an error that
says it. What a hostile file can still ask for is bounded: no instruction reserves memory for bytes
that the file does not have, their number is limited, and what they copy is in proportion to it: all
in all up to 300 bytes for each byte of the file, and 16 MiB.
Format: Python's `pickle` documentation, protocols 0 to 5; `pickletools` splits the instructions.
"""

from __future__ import annotations

import io
import pickletools
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, BinaryIO

import numpy as np

from trm_fast.options import printable

__all__ = ["Holder", "PickleError", "plain_calls", "plain_names", "unpickle"]

LIMIT = 4_000_000  # instructions; a checkpoint of a thousand tensors has a hundred thousand
# Bytes that calls may copy, for each byte of the file and beside that: any number of calls can copy
# one list.
COPIED, FREE = 64, 1 << 24
_KEYS = (str, bytes, int, float, type(None))  # bool is an int; a nested tuple may never end hashing
# Hashes of numbers can be chosen to be equal: of those below 2**63 few are, and few are allowed.
_NUMBERS, _ATTRIBUTES, _DIMS = 10_000, 1_000, 64


class PickleError(ValueError):
    """A pickle that is damaged or wants what it may not have; one line."""


class Holder:
    """Stands in for an object of a class that is known by name only.

    Attributes:
        name: "module.Class".  state: its attributes, as the file gives them.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: dict[str, object] = {}


class _Stub:
    """The class of a Holder, before there is one."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Call:
    """A function of ours under the name that files have for it."""

    def __init__(self, name: str, function: Callable[..., object]) -> None:
        self.name, self.function = name, function


def unpickle(
    stream: BinaryIO,
    *,
    calls: Mapping[str, Callable[..., object]],
    names: Mapping[str, object],
    stubs: Container[str] = (),
    persistent: Callable[[object], object] | None = None,
) -> object:
    """The value of one pickle; the stream is left behind its last instruction.

    Args:
        stream: seekable bytes.
        calls: "module.name" -> what stands in for that function or class when it is called.
        names: "module.name" -> what that name means where it is not called.
        stubs: "module.Class" of classes whose objects become a `Holder`.
        persistent: makes the value of a reference to outside the pickle; None allows none.

    Raises:
        PickleError: anything else than plain values and the above; damaged; too long.
    """
    start = stream.tell()
    size = stream.seek(0, io.SEEK_END) - start
    stream.seek(start)
    machine = _Machine(calls, names, stubs, persistent, FREE + COPIED * size)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count > LIMIT:
                raise PickleError(f"has more than {LIMIT:,} instructions")
            if opcode.name == "STOP":
                return machine.pop()
            machine.run(opcode.name, argument)
    except PickleError:
        raise
    except Exception as error:  # whatever a damaged or hostile file leads to
        raise PickleError("is damaged (its pickle cannot be read)") from error
    raise PickleError("is damaged (its pickle has no end)")


def plain_names() -> dict[str, object]:
    """Names that calls of `plain_calls` take as arguments."""
    return {"numpy.ndarray": np.ndarray}


def plain_calls() -> dict[str, Callable[..., object]]:
    """What stands in for containers and for NumPy's numbers and arrays."""
    calls: dict[str, Callable[..., object]] = {
        "collections.OrderedDict": _ordered,
        "builtins.set": _members(set),
        "builtins.frozenset": _members(frozenset),
        "_codecs.encode": _encode,
        "numpy.dtype": _dtype,
    }
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        calls[f"{module}.scalar"] = _scalar
        calls[f"{module}._reconstruct"] = _array
    return calls


def _ordered(items: object = ()) -> dict[object, object]:
    if not isinstance(items, (list, tuple)):
        raise PickleError("has an OrderedDict that is not made of pairs")
    return _put({}, items)


def _members(kind: type) -> Callable[..., object]:
    def make(items: object = ()) -> object:
        if not isinstance(items, (list, tuple)) or not all(isinstance(i, _KEYS) for i in items):
            raise PickleError("has a set of other things than text and numbers")
        return kind(_put({}, [(item, None) for item in items]))

    return make


def _encode(text: object, encoding: object) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise PickleError(f"wants the encoding {_shown(encoding)}; latin1 is allowed")
    return text.encode("latin-1")


def _dtype(code: object, *flags: object) -> np.dtype:
    if not isinstance(code, str) or not re.fullmatch(r"[<=|]?[biufc][0-9]{1,2}", code):
        raise PickleError(f"wants the NumPy type {_shown(code)}; those of numbers are allowed")
    return np.dtype(code)


def _scalar(dtype: object, data: object) -> object:
    if not isinstance(dtype, np.dtype) or not isinstance(data, bytes):
        raise PickleError("has a NumPy number without type or bytes")
    if len(data) != dtype.itemsize:
        raise PickleError("has a NumPy number of another size than its type")
    return np.frombuffer(data, dtype)[0].item()


def _array(kind: object, shape: object, code: object) -> np.ndarray:
    if kind is not np.ndarray:
        raise PickleError("has a NumPy array of an unknown class")
    return np.empty(0, np.uint8)  # its content follows, by BUILD


def _build_array(array: np.ndarray, state: Any) -> None:
    _, shape, dtype, _, data = state
    if not isinstance(dtype, np.dtype) or not isinstance(data, bytes):
        raise PickleError("has a NumPy array without type or bytes")
    size = dtype.itemsize * volume(shape, "NumPy array")
    if size != len(data):
        raise PickleError("has a NumPy array whose size is not that of its bytes")
    array.__setstate__(state)


def volume(shape: object, what: str) -> int:
    """How many numbers a shape has; PickleError for one that is none, before it takes time."""
    if not isinstance(shape, (tuple, list)) or len(shape) > _DIMS:
        raise PickleError(f"has a {what} of an impossible shape")
    count = 1
    for length in shape:
        if type(length) is not int or length < 0 or length.bit_length() > 63:
            raise PickleError(f"has a {what} of an impossible shape")
        count *= length
    return count


def _put(target: dict[object, object], items: Iterable[Any]) -> dict[object, object]:
    """Set each (key, value) of `items` in `target`, which is returned."""
    for key, value in items:
        if not isinstance(key, _KEYS):
            raise PickleError(
                f"has a key of type {type(key).__name__}; text and numbers are allowed"
            )
        if isinstance(key, (int, float)) and key not in (True, False):
            long = isinstance(key, int) and key.bit_length() > 63
            if long or len(target) >= _NUMBERS:
                raise PickleError(
                    f"has too {'large' if long else 'many'} numbers as keys; "
                    f"{_NUMBERS:,} of up to 63 bits are allowed"
                )
        target[key] = value
    return target


def _shown(value: object) -> str:
    """A word out of a file, fit for one line."""
    return printable(value[:80]) if isinstance(value, str) else type(value).__name__


class _Machine:
    """The stack, the marks and the memo; `run` carries out one instruction."""

    def __init__(
        self,
        calls: Mapping[str, Callable[..., object]],
        names: Mapping[str, object],
        stubs: Container[str],
        persistent: Callable[[object], object] | None,
        most: int,
    ) -> None:
        self.calls, self.names, self.stubs, self.persistent = calls, names, stubs, persistent
        self.most = most  # bytes that may be copied
        self.protocol = self.copied = 0
        self.stack: list[object] = []
        self.marks: list[list[object]] = []
        self.memo: dict[int, object] = {}  # by number, so that a number reserves nothing

    def pop(self) -> object:
        return self.stack.pop()

    def marked(self) -> list[object]:
        """What was put on the stack since the last mark, which is taken away."""
        found, self.stack = self.stack, self.marks.pop()
        return found

    def run(self, name: str, argument: object) -> None:
        if name in _VALUES:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        elif name == "PROTO":
            self.protocol = int(argument)  # type: ignore[call-overload]
        elif name != "FRAME":
            raise PickleError(f"has the instruction {name}, which files of weights do not need")

    def find(self, module: object, name: object) -> object:
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleError("is damaged (a name in it is not text)")
        if self.protocol < 3:
            # These protocols have the names of Python 2, such as __builtin__.
            old = (module, name)
            module, name = NAME_MAPPING.get(old, (IMPORT_MAPPING.get(module, module), name))
        wanted = f"{module}.{name}"
        if wanted in self.names:
            return self.names[wanted]
        if wanted in self.calls:
            return _Call(wanted, self.calls[wanted])
        if wanted in self.stubs:
            return _Stub(wanted)
        raise PickleError(f"wants {_shown(wanted)}, which is not allowed in a file of weights")

    def on_mark(self, _: object) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def on_pop(self, _: object) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.marked()

    def on_pop_mark(self, _: object) -> None:
        self.marked()

    def on_memoize(self, _: object) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def on_put(self, index: object) -> None:
        self.memo[int(index)] = self.stack[-1]  # type: ignore[call-overload]

    def on_get(self, index: object) -> None:
        self.stack.append(self.memo[int(index)])  # type: ignore[call-overload]

    def on_new(self, make: Callable[[], object]) -> None:
        self.stack.append(make())

    def on_tuple(self, length: int) -> None:
        start = len(self.stack) - length
        if start < 0:
            raise PickleError("is damaged (its stack is empty)")
        self.stack[start:] = [tuple(self.stack[start:])]

    def on_marked(self, make: Callable[[list[object]], object]) -> None:
        items = self.marked()
        self.stack.append(make(items))

    def extend(self, items: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise PickleError("is damaged (it appends to no list)")
        target.extend(items)

    def set_items(self, items: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise PickleError("is damaged (it sets items of no dictionary)")
        _put(target, zip(items[::2], items[1::2], strict=True))

    def on_append(self, _: object) -> None:
        self.extend([self.pop()])

    def on_appends(self, _: object) -> None:
        self.extend(self.marked())

    def on_setitem(self, _: object) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def on_setitems(self, _: object) -> None:
        self.set_items(self.marked())

    def on_additems(self, _: object) -> None:
        items = self.marked()
        target = self.stack[-1]
        if not isinstance(target, set):
            raise PickleError("is damaged (it adds to no set)")
        if len(target) > _NUMBERS:
            raise PickleError(f"has a set of more than {_NUMBERS:,} members")
        target.update(_members(frozenset)(items))  # type: ignore[arg-type]

    def on_global(self, argument: object) -> None:
        module, _, name = str(argument).partition(" ")
        self.stack.append(self.find(module, name))

    def on_stack_global(self, _: object) -> None:
        name, module = self.pop(), self.pop()
        self.stack.append(self.find(module, name))

    def on_inst(self, argument: object) -> None:
        module, _, name = str(argument).partition(" ")
        self.find(module, name)
        raise PickleError(f"makes a {_shown(name)} by an instruction that is not allowed")

    def on_reduce(self, _: object) -> None:
        arguments, function = self.pop(), self.pop()
        self.stack.append(self.make(function, arguments))

    def on_newobj_ex(self, _: object) -> None:
        named = self.pop()
        if named != {}:
            raise PickleError("makes an object from named arguments, which is not allowed")
        self.on_reduce(None)

    def make(self, function: object, arguments: object) -> object:
        if not isinstance(arguments, tuple):
            raise PickleError("is damaged (it calls without arguments)")
        self.count(*arguments[:8])
        if isinstance(function, _Stub):
            return Holder(function.name)
        if not isinstance(function, _Call):
            raise PickleError(f"calls a {type(function).__name__}, which is not allowed")
        try:
            return function.function(*arguments)
        except PickleError:
            raise
        except Exception as error:  # of any kind, by arguments of any kind
            raise PickleError(f"has a {function.name} that cannot be made") from error

    def count(self, *values: object) -> None:
        """Note what a call may copy; PickleError where it becomes too much."""
        for value in values:
            if isinstance(value, (str, bytes, list, tuple)):
                self.copied += len(value) * (1 if isinstance(value, (str, bytes)) else 32)
        if self.copied > self.most:
            raise PickleError(f"copies more than {self.most:,} bytes of its own values")

    def on_build(self, _: object) -> None:
        state = self.pop()
        target = self.stack[-1]
        if isinstance(target, Holder):
            for part in state if isinstance(state, tuple) else (state,):
                if part is not None:
                    _set_attributes(target, part)
        elif isinstance(target, np.ndarray):
            self.count(*state if isinstance(state, tuple) else ())
            _build_array(target, state)
        elif isinstance(target, np.dtype):
            # The state of a type of numbers says its byte order and nothing else that matters.
            if not isinstance(state, tuple) or state[1] not in ("<", "|", "="):
                raise PickleError("has a NumPy type of another byte order")
        elif not isinstance(target, dict):  # of a state_dict: its versions, which we do not need
            raise PickleError(f"sets the state of a {type(target).__name__}, which is not allowed")

    def on_persistent(self, _: object) -> None:
        if self.persistent is None:
            raise PickleError("refers to something outside of it, which is not allowed here")
        self.stack.append(self.persistent(self.pop()))


def _set_attributes(target: Holder, part: object) -> None:
    if not isinstance(part, dict) or len(part) + len(target.state) > _ATTRIBUTES:
        raise PickleError(f"sets attributes from other than a dict of up to {_ATTRIBUTES:,}")
    if not all(isinstance(key, str) for key in part):
        raise PickleError("sets an attribute whose name is not text")
    target.state.update(part)


def _marked_dict(items: list[object]) -> dict[object, object]:
    return _ordered(list(zip(items[::2], items[1::2], strict=True)))


_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BYTEARRAY8"),
}
_CONSTANTS: dict[str, object] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_CONSTANTS["EMPTY_TUPLE"] = ()
_ACTIONS: dict[str, Callable[[_Machine, object], None]] = {
    "MARK": _Machine.on_mark,
    "POP": _Machine.on_pop,
    "POP_MARK": _Machine.on_pop_mark,
    "MEMOIZE": _Machine.on_memoize,
    "EMPTY_LIST": lambda machine, _: machine.on_new(list),
    "EMPTY_DICT": lambda machine, _: machine.on_new(dict),
    "EMPTY_SET": lambda machine, _: machine.on_new(set),
    "TUPLE1": lambda machine, _: machine.on_tuple(1),
    "TUPLE2": lambda machine, _: machine.on_tuple(2),
    "TUPLE3": lambda machine, _: machine.on_tuple(3),
    "TUPLE": lambda machine, _: machine.on_marked(tuple),
    "LIST": lambda machine, _: machine.on_marked(list),
    "DICT": lambda machine, _: machine.on_marked(_marked_dict),
    "FROZENSET": lambda machine, _: machine.on_marked(_members(frozenset)),
    "APPEND": _Machine.on_append,
    "APPENDS": _Machine.on_appends,
    "SETITEM": _Machine.on_setitem,
    "SETITEMS": _Machine.on_setitems,
    "ADDITEMS": _Machine.on_additems,
    "GLOBAL": _Machine.on_global,
    "STACK_GLOBAL": _Machine.on_stack_global,
    "INST": _Machine.on_inst,
    "REDUCE": _Machine.on_reduce,
    "NEWOBJ": _Machine.on_reduce,
    "NEWOBJ_EX": _Machine.on_newobj_ex,
    "BUILD": _Machine.on_build,
    "BINPERSID": _Machine.on_persistent,
}
_ACTIONS |= dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.on_put)
_ACTIONS |= dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.on_get)
