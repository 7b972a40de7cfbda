"""The layouts on disk: what is written is read back, and every fault names its file and row."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trm_fast.data.format import (
    DataError,
    Metadata,
    PuzzleArrays,
    one_puzzle_per_group,
    open_writer,
    read_manifest,
    read_metadata,
    read_split,
    verify_manifest,
    write_dataset,
)

METADATA = Metadata(0, 0, 0, 6, 4, 3, 3, 1.25, 4, ("all",))


def arrays(dtype: str = "uint8") -> PuzzleArrays:
    """Three groups of 1, 2, 1 puzzles; the puzzles have 1, 2, 1, 1 examples."""
    tokens = np.arange(20).reshape(5, 4)
    return PuzzleArrays(
        (tokens % 6).astype(dtype),
        (tokens % 5 + 1).astype(dtype),
        np.array([0, 1, 2, 0], np.int32),
        np.array([0, 1, 3, 4, 5], np.int32),
        np.array([0, 1, 3, 4], np.int32),
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "data", {"train": (METADATA, {"all": arrays()})})
    return tmp_path / "data"


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "int64", ">i4"])
def test_any_integer_dtype_is_read(tmp_path: Path, dtype: str) -> None:
    write_dataset(tmp_path / "d", {"train": (METADATA, {"all": arrays(dtype)})})
    metadata, sets = read_split(tmp_path / "d", "train")
    assert metadata == METADATA == read_metadata(tmp_path / "d", "train")
    for name, array in sets["all"].items():
        np.testing.assert_array_equal(array, getattr(arrays(), name))
    assert sets["all"].inputs.dtype == np.dtype(dtype)
    assert isinstance(sets["all"].inputs, np.memmap)


def test_the_layout_is_the_official_one(root: Path) -> None:
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    fields = ["group_indices", "inputs", "labels", "puzzle_identifiers", "puzzle_indices"]
    assert names == [
        "identifiers.json",
        "manifest.json",
        *(f"train/all__{field}.npy" for field in fields),
        "train/dataset.json",
    ]
    assert json.loads((root / "identifiers.json").read_text()) == ["<blank>"]
    assert json.loads((root / "train/dataset.json").read_text()) == {
        "pad_id": 0,
        "ignore_label_id": 0,
        "blank_identifier_id": 0,
        "vocab_size": 6,
        "seq_len": 4,
        "num_puzzle_identifiers": 3,
        "total_groups": 3,
        "mean_puzzle_examples": 1.25,
        "total_puzzles": 4,
        "sets": ["all"],
    }


def test_the_flat_layout_needs_no_index_no_json_no_identifiers(tmp_path: Path) -> None:
    np.save(tmp_path / "all__inputs.npy", np.arange(12).reshape(3, 4))
    np.save(tmp_path / "all__labels.npy", np.arange(12).reshape(3, 4))
    metadata, sets = read_split(tmp_path, "train")
    assert (metadata.vocab_size, metadata.seq_len, metadata.num_puzzle_identifiers) == (256, 4, 1)
    assert sets["all"].group_indices.tolist() == [0, 1, 2, 3]
    np.save(tmp_path / "all__puzzle_identifiers.npy", np.array([0, 4, 1], np.int32))
    (tmp_path / "dataset.json").write_text('{"vocab_size": 12, "seq_len": 4, "num_examples": 0}')
    metadata, sets = read_split(tmp_path, "test")
    assert (metadata.vocab_size, metadata.num_puzzle_identifiers) == (12, 5)
    assert metadata == read_metadata(tmp_path, "test")
    (tmp_path / "dataset.json").write_text('{"vocab_size": 11, "seq_len": 4}')
    with pytest.raises(DataError, match=r"all__inputs.npy row 2: 11 is not in 0..10"):
        read_split(tmp_path, "train")


def test_tokens_of_nano_trm_are_shifted_down(tmp_path: Path) -> None:
    folder = tmp_path / "val"
    folder.mkdir()
    np.save(folder / "all__inputs.npy", np.array([[2, 3, 11, 0]]))
    np.save(folder / "all__labels.npy", np.array([[3, 4, 11, -100]]))
    described = {"num_puzzles": 1, "num_groups": 1, "grid_size": 9, "vocab_size": 12, "seq_len": 4}
    (folder / "dataset.json").write_text(json.dumps(described))
    metadata, sets = read_split(tmp_path, "val")
    assert metadata.vocab_size == 11
    assert sets["all"].inputs.tolist() == [[1, 2, 10, 0]]
    assert sets["all"].labels.tolist() == [[2, 3, 10, 0]]
    (folder / "dataset.json").write_text(json.dumps({**described, "max_grid_size": 10}))
    with pytest.raises(DataError, match="padded to max_grid_size"):
        read_split(tmp_path, "val")


def edit(root: Path, field: str, change) -> None:
    path = root / "train" / f"all__{field}.npy"
    array = change(np.load(path))
    np.save(path, array, allow_pickle=True)


def put(row: int, value: int):
    def change(array: np.ndarray) -> np.ndarray:
        array = array.astype(np.int64)
        array[row] = value
        return array

    return change


FAULTS = [
    ("inputs", put(3, 6), r"all__inputs.npy row 3: 6 is not in 0..5"),
    ("labels", put(4, -1), r"all__labels.npy row 4: -1 is not in 0..5"),
    ("labels", lambda a: a[:4], r"all__labels.npy: shape \(4, 4\) does not match"),
    ("inputs", lambda a: a.astype(np.float32), r"all__inputs.npy: holds float32"),
    ("inputs", lambda a: a.astype(object), r"all__inputs.npy: not a readable .npy"),
    ("labels", lambda a: a.ravel(), r"all__labels.npy: shape \(20,\), expected 2 dim"),
    ("puzzle_identifiers", put(2, 3), r"all__puzzle_identifiers.npy row 2: 3 is not in 0..2"),
    ("puzzle_identifiers", lambda a: a[:3], r"3 identifiers for 4 puzzles"),
    ("puzzle_indices", put(2, 0), r"all__puzzle_indices.npy row 2: smaller"),
    ("puzzle_indices", put(4, 9), r"all__puzzle_indices.npy: ends with 9, expected 5"),
    ("group_indices", put(0, 1), r"all__group_indices.npy: must begin with 0"),
    ("group_indices", lambda a: np.array([0, 4]), r"total_groups is 3, the arrays hold 1 groups"),
    ("group_indices", lambda a: a[:0], r"all__group_indices.npy: must begin with 0"),
]


@pytest.mark.parametrize(("field", "change", "message"), FAULTS)
def test_faults_of_arrays_name_file_and_row(root: Path, field: str, change, message: str) -> None:
    edit(root, field, change)
    with pytest.raises(DataError, match=message) as caught:
        read_split(root, "train")
    assert "\n" not in str(caught.value)


def test_ignored_labels_are_in_range(root: Path) -> None:
    edit(root, "labels", put(1, -100))
    (root / "manifest.json").unlink()
    assert (read_split(root, "train")[1]["all"].labels[1] == -100).all()


def test_missing_and_truncated_files_are_named(root: Path) -> None:
    path = root / "train" / "all__labels.npy"
    whole = path.read_bytes()
    for size in (0, 5, 60, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"all__labels.npy: not a readable .npy file"):
            read_split(root, "train")
    path.unlink()
    with pytest.raises(DataError, match=r"all__labels.npy: missing"):
        read_split(root, "train")
    with pytest.raises(DataError, match=r"no split 'test'; it has train"):
        read_split(root, "test")
    with pytest.raises(DataError, match="no such data directory"):
        read_metadata(root / "nowhere", "train")


JSON_FAULTS = [
    ({"vocab_size": 0}, "vocab_size is 0, expected an integer >= 1"),
    ({"vocab_size": "6"}, "vocab_size is '6'"),
    ({"seq_len": 5}, "rows of 4 tokens, seq_len is 5"),
    ({"pad_id": True}, "pad_id is True"),
    ({"pad_id": 6}, "pad_id 6 is outside vocab_size 6"),
    ({"mean_puzzle_examples": None}, "mean_puzzle_examples is None"),
    ({"mean_puzzle_examples": float("inf")}, "mean_puzzle_examples is inf"),
    ({"sets": ["../all"]}, "expected a list of different names"),
    ({"sets": []}, "expected a list of different names"),
    ({"vocab_size": 5}, r"all__inputs.npy row 1: 5 is not in 0..4"),
]


@pytest.mark.parametrize(("change", "message"), JSON_FAULTS)
def test_faults_of_dataset_json(root: Path, change: dict, message: str) -> None:
    path = root / "train" / "dataset.json"
    path.write_text(json.dumps({**METADATA.to_dict(), **change}))
    with pytest.raises(DataError, match=message):
        read_split(root, "train")


@pytest.mark.parametrize(
    "text", ["", "[", "[]", '{"sets": ["all"]}', "\xff", "[" * 100000, "1" * 5000]
)
def test_broken_dataset_json(root: Path, text: str) -> None:
    (root / "train" / "dataset.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"dataset.json: "):
        read_split(root, "train")


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 200), value=st.integers(0, 255))
def test_a_damaged_header_is_a_data_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    root = tmp_path_factory.mktemp("d") / "d"
    write_dataset(root, {"train": (METADATA, {"all": arrays()})})
    path = root / "train" / "all__inputs.npy"
    data = bytearray(path.read_bytes())
    data[position % len(data)] = value
    path.write_bytes(data)
    try:
        read_split(root, "train")
    except DataError as error:
        assert "all__inputs.npy" in str(error) or "all__labels.npy" in str(error)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), open_writer(tmp_path / "d", {}) as writer:
        writer.arrays("train", "all", arrays())
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match=r"train/all__inputs.npy: rows of 4"):
        write_dataset(tmp_path / "d", {"train": (replace(METADATA, seq_len=3), {"all": arrays()})})
    assert list(tmp_path.iterdir()) == []


def test_only_our_own_output_is_replaced(root: Path) -> None:
    new = one_puzzle_per_group(np.ones((2, 4), np.uint8), np.ones((2, 4), np.uint8))
    metadata = replace(METADATA, total_groups=2)
    write_dataset(root, {"test": (metadata, {"all": new})}, manifest={"seed": 3})
    assert not (root / "train").exists()
    assert len(read_split(root, "test")[1]["all"].inputs) == 2
    assert [p.name for p in root.parent.iterdir()] == ["data"]
    (root / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"holds notes.txt, which its manifest does not list"):
        write_dataset(root, {"test": (metadata, {"all": new})})
    (root / "manifest.json").unlink()
    with pytest.raises(DataError, match="not written by this builder"):
        write_dataset(root, {"test": (metadata, {"all": new})})
    assert (root / "notes.txt").read_text() == "mine"


def test_the_manifest_knows_its_files(root: Path) -> None:
    manifest = read_manifest(root)
    assert manifest is not None and len(manifest["files"]) == 7
    assert verify_manifest(root, manifest) is None
    edit(root, "inputs", lambda a: a[::-1].copy())
    assert verify_manifest(root, manifest) == "train/all__inputs.npy"
    assert read_manifest(root.parent) is None
