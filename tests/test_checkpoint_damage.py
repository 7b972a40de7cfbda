"""Checkpoints: every crash point of a save, failing disks, damaged and hostile files.

Left out: power loss (what the disk does after fsync is not ours), several writers.
"""

import contextlib
import errno
import io
import json
import os
import pickle
import random
import re
import shutil
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoint import FILES, holds, names, save

from trm_fast import checkpoint
from trm_fast.checkpoint import (
    CheckpointError,
    load_checkpoint,
    prune,
    resolve,
    save_checkpoint,
    verify,
)
from trm_fast.interop import read_weights


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """A killed process loses nothing that was written; fsync is for power loss."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


# Failures while writing


def test_leftovers_of_killed_processes_are_removed_by_the_next_save(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step_1", tmp_path / ".step_7.tmp")
    shutil.copytree(tmp_path / "step_1", tmp_path / ".step_1.old")
    (tmp_path / ".hidden").mkdir()
    save(tmp_path, 2)
    assert names(tmp_path) == [".hidden", "last", "step_1", "step_2"]


def test_a_replacement_cut_short_keeps_the_version_it_found(tmp_path):
    save(tmp_path, 3)
    os.rename(tmp_path / "step_3", tmp_path / ".step_3.old")
    assert resolve(tmp_path) == tmp_path / ".step_3.old"
    assert holds(load_checkpoint(tmp_path / "step_3"), 3)
    assert resolve(tmp_path / "step_3").name == ".step_3.old"
    assert prune(tmp_path, 1) == []
    save(tmp_path, 4)
    assert names(tmp_path) == ["last", "step_3", "step_4"]


OPERATIONS = [
    (os, "mkdir"),
    (os, "fsync"),
    (os, "rename"),
    (os, "replace"),
    (checkpoint.safetensors.torch, "save_file"),
    (torch, "save"),
]


def before_each(monkeypatch, act, operations):
    """Call `act(name)` before every operation by which a save changes the disk."""

    def wrapped(name, original):
        def call(*args, **kwargs):
            act(name)
            return original(*args, **kwargs)

        return call

    for module, name in operations:
        monkeypatch.setattr(module, name, wrapped(name, getattr(module, name)))


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done = []
    before_each(monkeypatch, done.append, OPERATIONS)
    save(tmp_path, 1)
    # Five files and their folder; the name; the run folder; then the pointer and its folder.
    begun = ["mkdir", "mkdir", "save_file", "save_file", "save"]
    synced = ["fsync"] * 6 + ["rename", "fsync"]
    assert done == [*begun, *synced, "fsync", "replace", "fsync"]


def in_child(work):
    """Run `work` in a forked process; its exit status (negative: the signal that killed it)."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@needs_fork
@pytest.mark.parametrize("again", [False, True], ids=["new-step", "same-step"])
def test_killed_before_any_operation_of_a_save_a_checkpoint_is_readable(
    tmp_path, monkeypatch, again
):
    new = 1 if again else 2
    for point in range(1, 100):
        run = tmp_path / str(point)
        save(run, 1, 100)
        left = [point]

        def die(name, left=left):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def work(run=run, die=die):
            before_each(monkeypatch, die, [*OPERATIONS, (shutil, "rmtree")])
            save(run, new, 200)

        status = in_child(work)
        loaded = load_checkpoint(resolve(run))
        assert holds(loaded, 100) or (holds(loaded, 200) and loaded.step == new), point
        if status == 0:
            break
        assert status == -signal.SIGKILL
        save(run, 3, 300)  # goes on, and tidies up
        assert not [name for name in names(run) if name.startswith(".")]
        assert holds(load_checkpoint(resolve(run)), 300)
    assert point > 15 and holds(loaded, 200)


@needs_fork
def test_killed_at_any_time_during_repeated_saves_a_checkpoint_is_readable(tmp_path):
    chance = random.Random(0)
    seen = 0
    for _ in range(10):
        readable, writable = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                for step in range(1, 10**6):
                    save(tmp_path, step % 3, step)
                    prune(tmp_path, 2)
                    os.write(writable, b".")
            finally:
                os._exit(1)
        os.close(writable)
        os.read(readable, 1)
        for _ in range(chance.randrange(8)):
            os.read(readable, 1)
        for _ in range(chance.randrange(30000)):
            pass
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        os.close(readable)
        loaded = load_checkpoint(resolve(tmp_path))
        value = int(loaded.model["inner.w"][0, 0])
        assert value % 3 == loaded.step and holds(loaded, value)
        seen += value
    assert seen >= 10


@pytest.mark.parametrize(
    "code, new", [(errno.ENOSPC, 1), (errno.ENOSPC, 2), (errno.EROFS, 2)], ids=str
)
def test_a_full_or_read_only_disk_is_one_line_and_harms_nothing(tmp_path, code, new):
    save(tmp_path, 1, 100)
    said = f"{tmp_path / f'step_{new}'}: cannot be written: {os.strerror(code)}"
    for point in range(1, 100):
        left = [point]

        def fail(name, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(code, os.strerror(code))

        with pytest.MonkeyPatch.context() as patch:
            before_each(patch, fail, OPERATIONS)
            if point == 2:  # the first, a mkdir of what exists, may fail
                with pytest.raises(CheckpointError, match=f"^{re.escape(said)}$"):
                    save(tmp_path, new, 200)
            else:
                with contextlib.suppress(CheckpointError):
                    save(tmp_path, new, 200)
        loaded = load_checkpoint(resolve(tmp_path))
        if left[0] > 0:
            break
        assert not [name for name in names(tmp_path) if name.endswith(".tmp")]
        assert holds(loaded, 100) or holds(loaded, 200)
    assert point > 15 and holds(loaded, 200) and loaded.step == new


@needs_fork
def test_a_file_size_limit_is_reported_like_a_full_disk(tmp_path):
    """A real failure below Python: the writers of safetensors and torch meet EFBIG."""
    resource = pytest.importorskip("resource")
    small, big = {"w": torch.zeros(10)}, {"w": torch.zeros(100000)}

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        rest = {"ema": None, "config": {}}
        save_checkpoint(tmp_path, 0, model=small, train_state={}, **rest)
        for model, state in ((big, {}), (small, big)):
            with pytest.raises(CheckpointError, match=r"step_1: cannot be written: [^\n]+$"):
                save_checkpoint(tmp_path, 1, model=model, train_state=state, **rest)

    assert in_child(work) == 0
    assert names(tmp_path) == ["last", "step_0"] and verify(resolve(tmp_path)) == 0


def test_a_file_in_the_way_is_not_deleted(tmp_path):
    (tmp_path / "step_4").write_text("somebody's")
    with pytest.raises(CheckpointError, match="step_4: cannot be written: a file of that name"):
        save(tmp_path, 4)
    with pytest.raises(CheckpointError, match="cannot be written: (Not a directory|File exists)"):
        save(tmp_path / "step_4", 1)
    assert (tmp_path / "step_4").read_text() == "somebody's" and names(tmp_path) == ["step_4"]


# Damaged and hostile files


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    folder = save(tmp_path_factory.mktemp("run"), 7)
    return folder, {name: (folder / name).read_bytes() for name in FILES}


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_flipped_and_cut_bytes_are_found(intact, data):
    folder, files = intact
    name = data.draw(st.sampled_from(FILES))
    content = bytearray(files[name])
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    try:
        (folder / name).write_bytes(content)
        for read in (load_checkpoint, verify):
            try:
                read(folder)
                # Only white space of the manifest can change without changing what it says.
                assert name == "manifest.json" and json.loads(content) == json.loads(files[name])
            except CheckpointError as error:
                assert str(folder / name) in str(error) and "\n" not in str(error)
    finally:
        (folder / name).write_bytes(files[name])


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path, name):
    folder = save(tmp_path, 7)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: No such file"):
        load_checkpoint(folder)
    (folder / name).mkdir()
    with pytest.raises(CheckpointError, match=f"{name}: Is a directory"):
        verify(folder)


def forge(folder, name, data):
    """Replace a file and make the manifest agree, as an attacker would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    if name == "manifest.json":
        manifest.update(data)
    else:
        (folder / name).write_bytes(data)
        manifest["files"][name] = checkpoint._fingerprint(data)
    del manifest["sha256"]
    manifest["sha256"] = checkpoint.body_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


class Attack:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return (open, (self.target, "w"))


def test_no_code_in_a_checkpoint_is_run(tmp_path):
    folder = save(tmp_path, 1)
    buffer = io.BytesIO()
    torch.save({"a": Attack(tmp_path / "owned")}, buffer)
    for data in (buffer.getvalue(), pickle.dumps({"a": Attack(tmp_path / "owned")}, 2)):
        forge(folder, "train_state.pt", data)
        with pytest.raises(CheckpointError, match=r"train_state.pt: cannot be loaded: [^\n]*$"):
            load_checkpoint(folder)
        (tmp_path / "step_9").write_bytes(data)
        with pytest.raises(CheckpointError, match="step_9: cannot be loaded"):
            read_weights(tmp_path / "step_9")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "name, data, said",
    [
        ("config.json", b"[" * 100000, "is not JSON"),
        ("config.json", b"[1]", "holds a list; an object was expected"),
        ("config.json", b"\xff\xfe", "is not JSON"),
        ("model.safetensors", b"\xff" * 8 + b"{}", "is not safetensors"),
        ("model.safetensors", b"", "is not safetensors"),
        ("train_state.pt", b"PK\x03\x04" + bytes(50), "cannot be loaded"),
        ("train_state.pt", b"", "cannot be loaded"),
        ("manifest.json", {"format": 2}, "format 2; 1 is known"),
        ("manifest.json", {"step": "7"}, "has no step"),
        ("manifest.json", {"files": {"../../secret": {}}}, r"lists \.\./\.\./secret"),
        ("manifest.json", {"files": {}}, "lists no files"),
        (
            "manifest.json",
            {"files": dict.fromkeys(sorted(checkpoint.REQUIRED))},
            "without checksum",
        ),
    ],
)
def test_a_forged_file_is_an_error_in_one_line(tmp_path, name, data, said):
    folder = save(tmp_path, 1)
    forge(folder, name, data)
    with pytest.raises(CheckpointError, match=f"{name}: .*{said}") as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value)
