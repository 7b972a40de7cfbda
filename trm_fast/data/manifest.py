"""The manifest of a data set: what was asked for, and the sha256 of every file.

Owns DataError, the reading of JSON files of limited size, and `<root>/manifest.json`, which the
writer of `format.py` leaves and its reader compares with the files. Imports nothing of the package.

A manifest also holds the sha256 of itself. Data of other builders has none, and is not compared.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

__all__ = [
    "DataError",
    "body_digest",
    "check_files",
    "make_manifest",
    "one_line",
    "read_json",
    "read_manifest",
    "same_data",
    "sha256",
    "verify_manifest",
]

MANIFEST = "manifest.json"
_FORMAT = "trm_fast data set 1"
_MAX_BYTES = 1 << 30
_BLOCK = 1 << 20
# A file that was changed this many seconds ago or less may change again within the same tick of its
# times; and so may one from the future, where the clock was set back.
_SETTLED = 2.0
# Digests by device, inode, size and times: a run opens its data several times.
_known: dict[tuple[int, ...], str] = {}


class DataError(ValueError):
    """Data that cannot be used: one line that names the file and, where there is one, the row."""


def one_line(error: BaseException) -> str:
    """The message of an error of somebody else's, on one line of decent length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else (text[:157].rpartition(" ")[0] or text[:157]) + "..."


def read_json(path: Path, limit: int) -> Any:
    """What a JSON file of at most `limit` bytes holds; DataError if it cannot be read."""
    data = bytearray()
    try:
        with path.open("rb") as file:
            # In parts: one call would reserve memory for all that the limit allows.
            while len(data) <= limit and (block := file.read(_BLOCK)):
                data += block
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    if len(data) > limit:
        raise DataError(f"{path}: larger than {limit} bytes")
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # also bad UTF-8, and numbers of 5000 digits
        raise DataError(f"{path}: not valid JSON ({one_line(error)})") from None


def body_digest(body: Mapping[str, Any]) -> str:
    """The sha256 of a JSON object, in hexadecimal, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def make_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest of all files below `folder`: `content`, the format, the digests."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
    body = {**content, "format": _FORMAT, "files": digests}
    text = json.dumps({**body, "sha256": body_digest(body)}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(root: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The manifest our writer left in `root`, or None; DataError if it is damaged."""
    path = Path(root) / MANIFEST
    if not path.is_file():
        return None
    manifest = read_json(path, _MAX_BYTES)
    if not isinstance(manifest, dict):
        return None
    digest = manifest.pop("sha256", None)
    ours = digest is not None and isinstance(manifest.get("files"), dict)
    if ours and digest != body_digest(manifest):
        raise DataError(f"{path}: damaged (its checksum does not match)")
    if manifest.get("format") != _FORMAT:
        return None
    if not isinstance(manifest.get("files"), dict):
        raise DataError(f"{path}: files missing")
    return manifest


def verify_manifest(root: str | os.PathLike[str], manifest: Mapping[str, Any]) -> str | None:
    """The first file that is missing or differs from its sha256 in the manifest; None if none."""
    return _first_difference(Path(root), manifest["files"])


def same_data(folder: Path, other: Path) -> bool:
    """Whether both have the same manifest, and the other one's files are as it says."""
    try:
        manifest = read_manifest(other)
        if manifest is None or manifest != read_manifest(folder):
            return False
        return verify_manifest(other, manifest) is None
    except DataError:
        return False


def check_files(root: str | os.PathLike[str], split: str) -> None:
    """Compare the files of a split, and those beside the splits, with the manifest, if there is
    one.

    Raises DataError naming the first one that differs. A file that is missing is for the reader
    that needs it to complain of.
    """
    manifest = read_manifest(root)
    if manifest is None:
        return
    mine = {
        name: digest
        for name, digest in manifest["files"].items()
        if ("/" not in name or name.startswith(f"{split}/")) and os.path.isfile(Path(root, name))
    }
    damaged = _first_difference(Path(root), mine)
    if damaged is not None:
        raise DataError(
            f"{Path(root, damaged)}: damaged, or changed since it was built: {MANIFEST} has "
            "another sha256"
        )


def _first_difference(root: Path, files: Mapping[str, str]) -> str | None:
    def differs(name: str) -> bool:
        path = root / name
        try:
            return not path.is_file() or _digest(path) != files[name]
        except OSError:  # also what a disk says of a sector that it cannot read
            return True

    with ThreadPoolExecutor(4) as pool:  # two large files make up a split
        found = zip(files, pool.map(differs, files), strict=True)
        return next((name for name, wrong in found if wrong), None)


def _digest(path: Path) -> str:
    """The sha256 of a file, taken once as long as the file stays as it is."""
    about = path.stat()
    key = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
    if key not in _known:
        digest = sha256(path)
        if time.time() - max(about.st_mtime, about.st_ctime) <= _SETTLED:
            return digest
        _known[key] = digest
    return _known[key]


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
