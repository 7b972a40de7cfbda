"""Data sets on damaged and full disks, and builders that are killed.

Left out: power loss (a file that never reached the disk is found by its sha256).
"""

import errno
import json
import os
import random
import shutil
import signal

import numpy as np
import pytest
from test_checkpoint_damage import before_each, in_child, needs_fork
from test_data_format import METADATA, arrays

from trm_fast.data import manifest
from trm_fast.data.atomic import whole_folder
from trm_fast.data.dataset import PuzzleDataset, PuzzleDatasetConfig
from trm_fast.data.format import DataError, open_writer, read_manifest, read_split, write_dataset


def write(root, splits=("train", "test"), **request):
    content = {split: (METADATA, {"all": arrays()}) for split in splits}
    write_dataset(root, content, ["<blank>", "a", "b"], request)


@pytest.fixture
def root(tmp_path):
    write(tmp_path / "data")
    return tmp_path / "data"


def read(root, splits=("train", "test")):
    """What a run takes from these splits, as bytes, and the manifest."""
    taken = []
    for split in splits:
        config = PuzzleDatasetConfig(0, (str(root),), 1, True)
        data = PuzzleDataset(config, split)
        taken += [array.tobytes() for _, array in data.sets["all"].items()]
    return taken, read_manifest(root)


def test_flipped_and_cut_bytes_are_found_in_every_file(root):
    chance = random.Random(0)
    before = read(root)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    assert len(files) == 14
    for path in files:
        content = path.read_bytes()
        for trial in range(12):
            damaged = bytearray(content)
            if trial % 3:
                damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            else:
                del damaged[chance.randrange(len(content)) :]
            path.write_bytes(damaged)
            try:
                # Only white space and the key of the checksum itself say nothing.
                assert read(root) == before and path.name == "manifest.json"
            except DataError as error:
                assert str(path) in str(error) and "\n" not in str(error)
        path.write_bytes(content)
    assert read(root) == before


CHANGES = {
    "train/dataset.json": ('"blank_identifier_id": 0', '"blank_identifier_id": 1'),
    "identifiers.json": ('"a"', '"c"'),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_only_the_manifest_tells_is_told(root, name):
    """Files that are good by themselves, and not those that were written."""
    text = (root / name).read_text()
    (root / name).write_text(text.replace(*CHANGES[name]))
    with pytest.raises(DataError, match=f"{name}: damaged, or changed since it was built"):
        read_split(root, "train")
    (root / "manifest.json").unlink()
    assert read_split(root, "train")[0].seq_len == 4


def test_the_other_split_may_be_gone_and_manifests_without_checksum_are_read(root):
    shutil.rmtree(root / "test")
    (root / "identifiers.json").unlink()
    text = json.loads((root / "manifest.json").read_text())
    del text["sha256"]
    (root / "manifest.json").write_text(json.dumps(text))
    assert read_split(root, "train")[0] == METADATA
    text["files"]["train/all__inputs.npy"] = "0" * 64
    (root / "manifest.json").write_text(json.dumps(text))
    with pytest.raises(DataError, match="all__inputs.npy: damaged"):
        read_split(root, "train")


def test_files_are_read_once_for_their_digest_and_again_when_they_change(root, monkeypatch):
    read_by = []

    def counted(path, real=manifest.sha256):
        read_by.append(path.name)
        return real(path)

    monkeypatch.setattr(manifest, "sha256", counted)
    read_split(root, "train")
    read_split(root, "train")
    assert len(read_by) == 14, "a file that changed just now may change again unseen"
    now = manifest.time.time
    monkeypatch.setattr(manifest.time, "time", lambda: now() + 3)
    read_split(root, "train")
    read_split(root, "train")
    assert len(read_by) == 21
    labels = root / "train" / "all__labels.npy"
    np.save(labels, np.load(labels)[::-1].copy())
    with pytest.raises(DataError, match="all__labels.npy: damaged"):
        read_split(root, "train")
    # A file from the future: the clock was set back, and tells nothing.
    monkeypatch.setattr(manifest.time, "time", lambda: now() - 86400)
    np.save(labels, np.load(labels)[::-1].copy())
    read_by.clear()
    read_split(root, "train")
    read_split(root, "train")
    assert read_by == ["all__labels.npy"] * 2


# Builders


OPERATIONS = [(os, "mkdir"), (os, "rename"), (np, "save"), (shutil, "rmtree"), (json, "dumps")]


@needs_fork
@pytest.mark.parametrize("again", [False, True], ids=["new", "replaced"])
def test_killed_before_any_operation_a_builder_can_be_run_again(tmp_path, monkeypatch, again):
    for point in range(1, 100):
        root = tmp_path / str(point) / "data"
        if again:
            write(root, ["train"], seed=1)
        left = [point]

        def die(name, left=left):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def work(root=root, die=die):
            before_each(monkeypatch, die, OPERATIONS)
            write(root, ["train"], seed=2)

        status = in_child(work)
        if root.exists():
            assert read(root, ["train"])[1]["seed"] in ((1, 2) if again else (2,)), point
        else:  # between two renames the one before is beside it
            assert not again or list(root.parent.glob(".data.*.replaced/data")), point
        if status == 0:
            break
        assert status == -signal.SIGKILL
        write(root, ["train"], seed=3)
        assert read(root, ["train"])[1]["seed"] == 3
        assert [path.name for path in root.parent.iterdir()] == ["data"]
    assert point > 10


def test_what_a_killed_builder_had_moved_aside_comes_back(root):
    before = read(root)
    aside = root.parent / ".data.x1.replaced"
    aside.mkdir()
    root.rename(aside / "data")
    with pytest.raises(ZeroDivisionError), open_writer(root, {}):
        raise ZeroDivisionError
    assert read(root) == before
    assert [path.name for path in root.parent.iterdir()] == ["data"]


def test_what_another_builder_works_on_is_left_alone(tmp_path):
    for name in (".data.settings", ".data2.x.building", ".data.X.building", "data.x.building"):
        (tmp_path / name).mkdir()
    with whole_folder(tmp_path / "data") as one:
        (one / "file").write_text("1")
        with whole_folder(tmp_path / "data") as other:
            assert one.is_dir()
            (other / "file").write_text("2")
    assert (tmp_path / "data" / "file").read_text() == "1"
    assert len(list(tmp_path.iterdir())) == 5


def test_what_another_builder_wrote_meanwhile_stays_where_it_is_the_same(root):
    """Others read it already, and between two renames it would not be there."""

    def place():
        return (root.stat().st_ino, read(root))

    before = place()
    write(root)
    assert place() == before
    (root / "test" / "all__labels.npy").write_bytes(b"damaged")
    write(root)
    assert place()[0] != before[0] and place()[1] == before[1]
    write(root, seed=1)
    assert read(root)[1]["seed"] == 1


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_a_full_disk_is_one_line_before_anything_is_written(tmp_path, monkeypatch):
    code = errno.ENOSPC

    def full(descriptor, start, size):
        raise OSError(code, os.strerror(code))

    with open_writer(tmp_path / "data", {}) as writer:  # a hole would be a fault when written to
        writer.array("train", "all", "inputs", (1000, 1000), np.uint8)[-1] = 7
        path = next(tmp_path.glob(".data.*/train/*.npy"))
        assert path.stat().st_blocks * 512 >= 1000000
    monkeypatch.setattr(os, "posix_fallocate", full)
    said = r"other: cannot be written \(No space left on device\)$"
    with pytest.raises(DataError, match=said), open_writer(tmp_path / "other", {}) as writer:
        writer.array("train", "all", "inputs", (10, 10), np.uint8)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    code = errno.EOPNOTSUPP  # a file system that cannot reserve space can write all the same
    with open_writer(tmp_path / "data2", {}) as writer:
        writer.array("train", "all", "inputs", (10, 10), np.uint8)
    assert np.load(tmp_path / "data2" / "train" / "all__inputs.npy").shape == (10, 10)
