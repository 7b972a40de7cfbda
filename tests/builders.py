"""Files for builders of data sets and what they wrote; the official builders run on local files."""

import hashlib
import importlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from trm_fast.data.building import Puzzles
from trm_fast.data.format import DataError

HEADER = "source,question,answer,rating"


def save(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def assert_row_4_is_bad(
    read: Callable[..., Puzzles], path: Path, message: str, others: np.ndarray
) -> None:
    """It is named in one line, or left out, counted and listed; the others are read."""
    with pytest.raises(DataError, match=rf"{path.name} row 4: ") as caught:
        read(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    puzzles = read(path, skip_bad=True)
    np.testing.assert_array_equal(puzzles.boards, others)
    assert puzzles.skipped == 1 and message in puzzles.listed[0]


def assert_unfit(read: Callable[..., Puzzles], path: Path, content: str, message: str) -> None:
    """A file of that content is refused with that message."""
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read(path)


def digests(root: Path, split: str = "train") -> dict[str, str]:
    """Start of the sha256 of each file of a split."""
    files = sorted((root / split).iterdir())
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest()[:12] for f in files}


def official_build(
    puzzle: str, official: Path, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **choices
) -> None:
    """Run the official builder of "sudoku" or "maze" on local files, seeded as our --seed 5."""
    for module in ("argdantic", "tqdm", "huggingface_hub"):
        pytest.importorskip(module)
    monkeypatch.syspath_prepend(str(official / "dataset"))
    builder = importlib.import_module(f"build_{puzzle}_dataset")
    monkeypatch.setattr(
        builder, "hf_hub_download", lambda repo, name, repo_type: str(source / name)
    )
    monkeypatch.setattr(builder, "tqdm", lambda items: items)
    np.random.seed(5)
    config = builder.DataProcessConfig(output_dir=str(out), **choices)
    for split in ("train", "test"):
        builder.convert_subset(split, config)


def assert_same_files(theirs: Path, ours: Path) -> None:
    """The same bytes in every array, the same description, the same identifiers."""
    for split in ("train", "test"):
        want, got = digests(theirs, split), digests(ours, split)
        assert want.keys() == got.keys()
        for name in want:
            if name.endswith(".npy"):
                assert got[name] == want[name], name
        described = [
            json.loads((root / split / "dataset.json").read_text()) for root in (theirs, ours)
        ]
        assert described[0] == described[1]
    names = [json.loads((root / "identifiers.json").read_text()) for root in (theirs, ours)]
    assert names[0] == names[1]
