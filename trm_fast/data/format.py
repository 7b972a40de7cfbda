"""What a puzzle data set is on disk: the layouts that are read, the one that is written.

Owns Metadata, PuzzleArrays, the checks of data, the atomic writer. Imports data.manifest,
data.atomic and options.

The layout is that of the official code: `<root>/identifiers.json`, and per split
`<root>/<split>/dataset.json` (Metadata) with `<set>__{inputs,labels,puzzle_identifiers,
puzzle_indices,group_indices}.npy` for every set that dataset.json names. Also read: a flat folder
without splits or index files (one puzzle per group), and nano-trm's layout (tokens one higher).
The writer adds `<root>/manifest.json`: what was asked for, and the sha256 of every file.

Dims: E examples, L tokens of one example, Z puzzles, G groups. Puzzle p holds the examples
puzzle_indices[p] .. puzzle_indices[p + 1], group g the puzzles group_indices[g] .. [g + 1].
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from trm_fast.data.atomic import whole_folder
from trm_fast.data.manifest import (
    MANIFEST,
    DataError,
    check_files,
    make_manifest,
    one_line,
    read_json,
    read_manifest,
    same_data,
    sha256,
    verify_manifest,
)
from trm_fast.options import show

__all__ = [
    "IGNORE_LABEL_ID",
    "DataError",
    "DatasetWriter",
    "Metadata",
    "PuzzleArrays",
    "check_arrays",
    "one_line",
    "one_puzzle_per_group",
    "open_writer",
    "read_json",
    "read_manifest",
    "read_metadata",
    "read_split",
    "sha256",
    "verify_manifest",
    "write_dataset",
]

IGNORE_LABEL_ID = -100
"""Label of a token that no loss and no metric counts."""

FIELDS = ("inputs", "labels", "puzzle_identifiers", "puzzle_indices", "group_indices")
_MAX_JSON_BYTES = 1 << 20
_MAX_HEADER_BYTES = 10_000  # of .npy; numpy's own limit, which it applies too late
_CHECK_ROWS = 1 << 16
# What numpy's reader raises on damaged bytes, apart from OSError and ValueError.
_DAMAGE = (EOFError, TypeError, SyntaxError, TokenError, ArithmeticError, MemoryError, RuntimeError)


@dataclass(frozen=True)
class Metadata:
    """The fields of dataset.json; `sets` names the array files of the split.

    total_groups counts groups over all sets; mean_puzzle_examples is examples per puzzle;
    ignore_label_id (or None) is the label value that becomes IGNORE_LABEL_ID in a batch.
    """

    pad_id: int
    ignore_label_id: int | None
    blank_identifier_id: int
    vocab_size: int
    seq_len: int
    num_puzzle_identifiers: int
    total_groups: int
    mean_puzzle_examples: float
    total_puzzles: int
    sets: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """What dataset.json holds."""
        return {**asdict(self), "sets": list(self.sets)}


@dataclass(frozen=True)
class PuzzleArrays:
    """The arrays of one set: inputs, labels [E, L]; puzzle_identifiers [Z]; indices [Z+1], [G+1].

    Any integer dtype; inputs and labels may be read-only memory maps.
    """

    inputs: np.ndarray
    labels: np.ndarray
    puzzle_identifiers: np.ndarray
    puzzle_indices: np.ndarray
    group_indices: np.ndarray

    def items(self) -> Iterator[tuple[str, np.ndarray]]:
        """(field name, array) in the order of the files."""
        return ((name, getattr(self, name)) for name in FIELDS)


def one_puzzle_per_group(
    inputs: np.ndarray, labels: np.ndarray, puzzle_identifiers: np.ndarray | None = None
) -> PuzzleArrays:
    """PuzzleArrays in which every example is a puzzle and a group of its own; identifiers 0."""
    index = np.arange(len(inputs) + 1, dtype=np.int32)
    if puzzle_identifiers is None:
        puzzle_identifiers = np.zeros(len(inputs), np.int32)
    return PuzzleArrays(inputs, labels, puzzle_identifiers, index, index.copy())


def read_metadata(root: str | os.PathLike[str], split: str) -> Metadata:
    """Metadata of one split (of foreign layouts completed from the arrays).

    Raises DataError naming the file that is missing or wrong.
    """
    folder, raw = _read_description(Path(root), split)
    if _is_official(folder, raw):
        return _parse_metadata(folder / "dataset.json", raw)
    return read_split(root, split)[0]


def read_split(
    root: str | os.PathLike[str], split: str
) -> tuple[Metadata, dict[str, PuzzleArrays]]:
    """Metadata and checked arrays per set of one split; inputs and labels as memory maps.

    Everything is checked: dtypes, shapes, index arrays, every token, label and identifier; then
    the files against manifest.json, where our writer left one.
    Raises DataError naming the file and the row. Pickled and object arrays are refused.
    """
    folder, raw = _read_description(Path(root), split)
    if not _is_official(folder, raw):
        return _read_foreign(folder, raw)
    metadata = _parse_metadata(folder / "dataset.json", raw)
    sets = {name: _read_set(folder, name) for name in metadata.sets}
    for name, arrays in sets.items():
        check_arrays(metadata, arrays, folder / f"{name}__")
    groups = sum(arrays.group_indices.size - 1 for arrays in sets.values())
    if groups != metadata.total_groups:
        raise DataError(
            f"{folder / 'dataset.json'}: total_groups is {metadata.total_groups}, "
            f"the arrays hold {groups} groups"
        )
    check_files(root, split)
    return metadata, sets


def _read_description(root: Path, split: str) -> tuple[Path, dict[str, Any]]:
    """The folder of a split and its dataset.json ({} where a flat folder has none)."""
    if not os.path.isdir(root):  # False too for a name that is too long
        raise DataError(f"{root}: no such data directory")
    if (root / split).is_dir():
        folder = root / split
    elif (root / "all__inputs.npy").is_file():
        folder = root
    else:
        found = sorted(p.name for p in root.iterdir() if (p / "dataset.json").is_file())
        raise DataError(f"{root}: no split {split!r}; it has {', '.join(found) or 'no splits'}")
    path = folder / "dataset.json"
    if folder == root and not path.exists():
        return folder, {}
    raw = read_json(path, _MAX_JSON_BYTES)
    if not isinstance(raw, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    return folder, raw


def _is_official(folder: Path, raw: Mapping[str, Any]) -> bool:
    """Whether dataset.json is official, or meant to be (then its faults are reported)."""
    return "sets" in raw or (folder / "all__group_indices.npy").exists()


def _parse_metadata(path: Path, raw: Mapping[str, Any]) -> Metadata:
    names = [field.name for field in fields(Metadata)]
    missing = [name for name in names if name not in raw]
    if missing:
        raise DataError(f"{path}: {', '.join(missing)} missing")
    smallest = {"vocab_size": 1, "seq_len": 1, "num_puzzle_identifiers": 1}
    values: dict[str, Any] = {}
    for name in names:
        value = raw[name]
        if name == "sets":
            values[name] = _parse_sets(path, value)
        elif name == "mean_puzzle_examples":
            if type(value) not in (int, float) or not 0 <= value < 2**31:
                raise DataError(f"{path}: {name} is {show(value)}, expected a number >= 0")
            values[name] = float(value)
        elif name == "ignore_label_id" and value is None:
            values[name] = None
        else:
            low = -(2**31) if name == "ignore_label_id" else smallest.get(name, 0)
            if type(value) is not int or not low <= value < 2**31:
                raise DataError(f"{path}: {name} is {show(value)}, expected an integer >= {low}")
            values[name] = value
    metadata = Metadata(**values)
    if metadata.pad_id >= metadata.vocab_size:
        raise DataError(
            f"{path}: pad_id {metadata.pad_id} is outside vocab_size {metadata.vocab_size}"
        )
    return metadata


def _parse_sets(path: Path, value: Any) -> tuple[str, ...]:
    """Set names become file names, so only plain words are let through."""
    plain = isinstance(value, list) and all(
        isinstance(name, str) and 0 < len(name) <= 100 and name.replace("-", "_").isidentifier()
        for name in value
    )
    if not plain or not value or len(set(value)) != len(value):
        raise DataError(f"{path}: sets is {show(value)}, expected a list of different names")
    return tuple(value)


def _read_set(folder: Path, name: str) -> PuzzleArrays:
    arrays = {}
    for field in FIELDS:
        array = _load(folder / f"{name}__{field}.npy")
        in_memory = field not in ("inputs", "labels")
        arrays[field] = np.array(array) if in_memory else array
    return PuzzleArrays(**arrays)


def _load(path: Path) -> np.ndarray:
    """One .npy file of integers as a read-only memory map; never unpickles."""
    try:
        with path.open("rb") as file:
            start = file.read(12)
        size = int.from_bytes(start[8 : 10 if start[6:7] == b"\x01" else 12], "little")
        if size > _MAX_HEADER_BYTES:  # numpy reserves memory for all of it
            raise DataError(f"{path}: not a readable .npy file (a header of {size} bytes)")
        with np.errstate(over="ignore"):  # a shape beyond all bounds is refused, not warned of
            array = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise DataError(f"{path}: missing") from None
    except DataError:
        raise
    except (OSError, ValueError, *_DAMAGE) as error:
        raise DataError(f"{path}: not a readable .npy file ({one_line(error)})") from None
    if array.dtype.kind not in "iu":
        raise DataError(f"{path}: holds {str(array.dtype)[:60]}, expected integers")
    if max(array.shape, default=0) >= 2**31:  # of an empty array, which has no bytes to tell
        raise DataError(f"{path}: shape {show(array.shape)} of {array.size} integers")
    return array


def _read_foreign(folder: Path, raw: Mapping[str, Any]) -> tuple[Metadata, dict[str, PuzzleArrays]]:
    """A folder without index files: the flat variant, or nano-trm's with its shifted tokens."""
    where = folder / "dataset.json"
    inputs, labels = _load(folder / "all__inputs.npy"), _load(folder / "all__labels.npy")
    identifiers = None
    if (folder / "all__puzzle_identifiers.npy").exists():
        identifiers = np.array(_load(folder / "all__puzzle_identifiers.npy"))
    for name, tokens in (("inputs", inputs), ("labels", labels)):
        if tokens.ndim != 2 or not tokens.shape[1]:  # rows of nothing take no bytes, in any number
            path = folder / f"all__{name}.npy"
            raise DataError(f"{path}: shape {show(tokens.shape)}, expected [E, L]")
    vocab_size, seq_len = raw.get("vocab_size", 256), raw.get("seq_len", inputs.shape[1])
    if "num_groups" in raw or "grid_size" in raw:
        if raw.get("max_grid_size", raw.get("grid_size")) != raw.get("grid_size"):
            raise DataError(f"{where}: boards padded to max_grid_size are not supported")
        inputs, labels = _shift_tokens(inputs), _shift_tokens(labels)
        vocab_size = vocab_size - 1 if isinstance(vocab_size, int) else vocab_size
    arrays = one_puzzle_per_group(inputs, labels, identifiers)
    ids = arrays.puzzle_identifiers
    metadata = _parse_metadata(
        where,
        {
            **dict.fromkeys(("pad_id", "ignore_label_id", "blank_identifier_id"), 0),
            **dict.fromkeys(("total_groups", "total_puzzles"), len(inputs)),
            "vocab_size": vocab_size,
            "seq_len": seq_len,
            "num_puzzle_identifiers": int(ids.max()) + 1 if ids.size else 1,
            "mean_puzzle_examples": 1.0,
            "sets": ["all"],
        },
    )
    check_arrays(metadata, arrays, folder / "all__")
    return metadata, {"all": arrays}


def _shift_tokens(tokens: np.ndarray) -> np.ndarray:
    """nano-trm's tokens (0 padding, 1 end, 2 blank, digit d as d + 2) as ours; ignored become 0."""
    shifted = np.empty(tokens.shape, np.int32)
    for start in range(0, len(tokens), _CHECK_ROWS):
        rows = slice(start, start + _CHECK_ROWS)
        np.maximum(tokens[rows].astype(np.int64) - 1, 0, out=shifted[rows], casting="unsafe")
    return shifted


def check_arrays(metadata: Metadata, arrays: PuzzleArrays, prefix: str | os.PathLike[str]) -> None:
    """Raise DataError, naming `<prefix><field>.npy` and the row, unless the arrays fit.

    Labels may also be metadata.ignore_label_id or IGNORE_LABEL_ID.
    """
    for name, array in arrays.items():
        want = 2 if name in ("inputs", "labels") else 1
        if array.dtype.kind not in "iu":
            raise DataError(f"{prefix}{name}.npy: holds {array.dtype}, expected integers")
        if array.ndim != want:
            raise DataError(
                f"{prefix}{name}.npy: shape {show(array.shape)}, expected {want} dimensions"
            )
    if arrays.inputs.shape != arrays.labels.shape:
        raise DataError(
            f"{prefix}labels.npy: shape {show(arrays.labels.shape)} does not match the inputs' "
            f"{show(arrays.inputs.shape)}"
        )
    if arrays.inputs.shape[1] != metadata.seq_len:
        raise DataError(
            f"{prefix}inputs.npy: rows of {arrays.inputs.shape[1]} tokens, "
            f"seq_len is {metadata.seq_len}"
        )
    _check_index(arrays.puzzle_indices, len(arrays.inputs), f"{prefix}puzzle_indices.npy")
    puzzles = arrays.puzzle_indices.size - 1
    _check_index(arrays.group_indices, puzzles, f"{prefix}group_indices.npy")
    if arrays.puzzle_identifiers.size != puzzles:
        raise DataError(
            f"{prefix}puzzle_identifiers.npy: {arrays.puzzle_identifiers.size} identifiers for "
            f"{puzzles} puzzles"
        )
    count, vocab = metadata.num_puzzle_identifiers, metadata.vocab_size
    _check_range(arrays.puzzle_identifiers, count, (), f"{prefix}puzzle_identifiers.npy")
    _check_range(arrays.inputs, vocab, (), f"{prefix}inputs.npy")
    ignored = {IGNORE_LABEL_ID, metadata.ignore_label_id} - {None}
    _check_range(arrays.labels, vocab, tuple(ignored), f"{prefix}labels.npy")


def _check_index(index: np.ndarray, total: int, path: str) -> None:
    if index.size == 0 or int(index[0]) != 0:
        raise DataError(f"{path}: must begin with 0")
    falls = np.flatnonzero(index[1:] < index[:-1])
    if falls.size:
        raise DataError(f"{path} row {falls[0] + 1}: smaller than the row before it")
    if int(index[-1]) != total:
        raise DataError(f"{path}: ends with {int(index[-1])}, expected {total}")


def _check_range(array: np.ndarray, limit: int, allowed: Sequence[int | None], path: str) -> None:
    for start in range(0, len(array), _CHECK_ROWS):
        rows = array[start : start + _CHECK_ROWS]
        if rows.size == 0 or (int(rows.min()) >= 0 and int(rows.max()) < limit):
            continue
        wrong = (rows < 0) | (rows >= limit)
        for value in allowed:
            wrong &= rows != value
        if wrong.any():
            place = np.argwhere(wrong)[0]
            raise DataError(
                f"{path} row {start + int(place[0])}: {int(rows[tuple(place)])} is not in "
                f"0..{limit - 1}"
            )


class DatasetWriter:
    """Fills a temporary folder that open_writer turns into the data set; never used alone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def array(
        self, split: str, set_name: str, field: str, shape: tuple[int, ...], dtype: Any
    ) -> np.memmap:
        """A new writable memory map for `<split>/<set_name>__<field>.npy`, to be filled."""
        path = self._folder / split / f"{set_name}__{field}.npy"
        path.parent.mkdir(exist_ok=True)
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
        _reserve(path)
        return array

    def arrays(self, split: str, set_name: str, arrays: PuzzleArrays) -> None:
        """Write the arrays of one set, in their dtypes."""
        (self._folder / split).mkdir(exist_ok=True)
        for field, array in arrays.items():
            np.save(self._folder / split / f"{set_name}__{field}.npy", array, allow_pickle=False)

    def metadata(self, split: str, metadata: Metadata) -> None:
        """Write `<split>/dataset.json`."""
        (self._folder / split).mkdir(exist_ok=True)
        self.json(f"{split}/dataset.json", metadata.to_dict())

    def json(self, name: str, value: Any) -> None:
        """Write `value` to the JSON file `name`, a path below the root."""
        (self._folder / name).write_text(json.dumps(value), encoding="utf-8")


def _reserve(path: Path) -> None:
    """Take the disk space of a file with holes: a full disk is an error here, and in a memory map
    a signal that kills."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:  # also what a file system says that cannot reserve
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise


@contextmanager
def open_writer(
    root: str | os.PathLike[str], manifest: Mapping[str, Any]
) -> Iterator[DatasetWriter]:
    """Write a data set that appears at `root` whole or not at all.

    Files go to a hidden folder beside `root`; on leaving the block they get a manifest.json
    (`manifest` plus format and the sha256 of each file) and the folder is renamed. If the block
    raises, nothing is left. Raises DataError if `root` cannot be written, or exists and is neither
    empty nor exactly what an earlier manifest of ours lists.
    """
    target = Path(os.path.realpath(root))
    _check_replaceable(target)
    try:
        with whole_folder(target, lambda folder: same_data(folder, target)) as folder:
            yield DatasetWriter(folder)
            make_manifest(folder, manifest)
            folder.chmod(0o755)
            _check_replaceable(target)
    except OSError as error:
        raise DataError(f"{target}: cannot be written ({error.strerror or error})") from None


def _check_replaceable(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise DataError(f"{target}: exists and is not a directory")
    present = {p.relative_to(target).as_posix() for p in target.rglob("*") if not p.is_dir()}
    if not present:
        return
    manifest = read_manifest(target)
    if manifest is None:
        raise DataError(f"{target}: not empty and not written by this builder; choose another")
    foreign = sorted(present - set(manifest["files"]) - {MANIFEST})
    if foreign:
        raise DataError(f"{target}: holds {foreign[0]}, which its manifest does not list")


def write_dataset(
    root: str | os.PathLike[str],
    splits: Mapping[str, tuple[Metadata, Mapping[str, PuzzleArrays]]],
    identifiers: Sequence[str] = ("<blank>",),
    manifest: Mapping[str, Any] | None = None,
) -> None:
    """Write arrays held in memory: {split: (metadata, {set: arrays})}; see open_writer.

    Raises DataError for arrays that do not fit their metadata.
    """
    for split, (metadata, sets) in splits.items():
        for name, arrays in sets.items():
            check_arrays(metadata, arrays, f"{split}/{name}__")
    with open_writer(root, manifest or {}) as writer:
        for split, (metadata, sets) in splits.items():
            writer.metadata(split, metadata)
            for name, arrays in sets.items():
                writer.arrays(split, name, arrays)
        writer.json("identifiers.json", list(identifiers))
