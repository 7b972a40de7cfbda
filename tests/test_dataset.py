"""PuzzleDataset: the official order, ranks, padding, exact resumption, arrays in memory."""

import hashlib
import io
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from trm_fast.data import (
    IGNORE_LABEL_ID,
    DataError,
    Metadata,
    PuzzleArrays,
    PuzzleDataset,
    PuzzleDatasetConfig,
    from_arrays,
    write_dataset,
)

GOLDEN_FIRST = [0, 74, 67, 52, 96, 8, 62, 29]
GOLDEN_DIGEST = "a233bc383bec95ec"


def write(root: Path, groups: int, max_puzzles: int, max_examples: int, seed: int) -> str:
    """A data set whose first token names the example; train and test hold the same."""
    rng = np.random.default_rng(seed)
    group_indices = np.cumsum([0, *rng.integers(1, max_puzzles + 1, groups)]).astype(np.int32)
    puzzles = int(group_indices[-1])
    puzzle_indices = np.cumsum([0, *rng.integers(1, max_examples + 1, puzzles)]).astype(np.int32)
    examples = int(puzzle_indices[-1])
    inputs = np.stack([np.arange(examples), np.zeros(examples, int)], 1).astype(np.int16)
    labels = rng.integers(0, 4, (examples, 2)).astype(np.uint8)
    identifiers = rng.integers(0, 7, puzzles).astype(np.int32)
    arrays = PuzzleArrays(inputs, labels, identifiers, puzzle_indices, group_indices)
    metadata = Metadata(1, 0, 0, 1000, 2, 7, groups, examples / puzzles, puzzles, ("all",))
    splits = {name: (metadata, {"all": arrays}) for name in ("train", "test")}
    write_dataset(root, splits)
    return str(root)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("data")
    return {
        "single": write(root / "single", 40, 4, 1, 1),
        "several": write(root / "several", 30, 3, 6, 2),
    }


def config(*dataset_paths: str, **changes) -> PuzzleDatasetConfig:
    given = {
        "seed": 3,
        "dataset_paths": dataset_paths,
        "global_batch_size": 8,
        "test_set_mode": False,
        "epochs_per_iter": 2,
        "rank": 0,
        "num_replicas": 1,
    }
    return PuzzleDatasetConfig(**{**given, **changes})


def order(dataset: PuzzleDataset, iterations: int = 1) -> list[tuple[str, list[int], int]]:
    return [
        (name, batch["inputs"][:, 0].tolist(), size)
        for _ in range(iterations)
        for name, batch, size in dataset
    ]


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def test_the_training_order_is_the_recorded_official_one(paths: dict[str, str]) -> None:
    # Recorded from the official PuzzleDataset (commit e7b6871) over the same files.
    batches = order(PuzzleDataset(config(paths["single"])), 3)
    assert len(batches) == 30
    assert batches[0] == ("all", GOLDEN_FIRST, 8)
    assert digest(batches) == GOLDEN_DIGEST


def test_big_puzzles_are_cut_at_the_batch_end(paths: dict[str, str]) -> None:
    dataset = PuzzleDataset(config(paths["several"]))
    arrays = dataset._sets["all"]
    for _name, batch, _size in dataset:
        examples = batch["inputs"][:, 0].numpy()
        puzzles = np.searchsorted(arrays.puzzle_indices, examples, side="right") - 1
        np.testing.assert_array_equal(
            batch["puzzle_identifiers"].numpy(), arrays.puzzle_identifiers[puzzles]
        )
        blocks = [list(block) for _, block in itertools.groupby(puzzles)]
        for block in blocks[:-1]:
            size = np.diff(arrays.puzzle_indices)[block[0]]
            assert len(block) % size == 0
        assert len(set(examples.tolist())) >= len(set(puzzles.tolist()))
    first = order(PuzzleDataset(config(paths["several"])))
    assert first == order(PuzzleDataset(config(paths["several"])))
    assert first != order(PuzzleDataset(config(paths["several"], seed=4)))


def test_every_group_is_visited_once_per_epoch(paths: dict[str, str]) -> None:
    dataset = PuzzleDataset(config(paths["single"], epochs_per_iter=1))
    groups = dataset._sets["all"].group_indices
    seen = [e for _, examples, _ in order(dataset) for e in examples]
    visited = np.searchsorted(groups, seen, side="right") - 1
    assert sorted(visited.tolist()) == list(range(40))


def test_ranks_share_a_global_batch(paths: dict[str, str]) -> None:
    for path in paths.values():
        for test_set_mode in (False, True):
            changes = {"test_set_mode": test_set_mode, "num_replicas": 4}
            whole = order(PuzzleDataset(config(path, test_set_mode=test_set_mode)))
            parts = [order(PuzzleDataset(config(path, rank=r, **changes))) for r in range(4)]
            joined = [
                (batch[0][0], [e for part in batch for e in part[1]], batch[0][2])
                for batch in zip(*parts, strict=True)
            ]
            assert joined == whole


def test_test_mode_visits_everything_and_pads_the_last_batch(paths: dict[str, str]) -> None:
    dataset = PuzzleDataset(config(paths["several"], test_set_mode=True), "test")
    total = len(dataset._sets["all"].inputs)
    batches = list(dataset)
    examples = torch.cat([batch["inputs"][:size, 0] for _, batch, size in batches])
    assert examples.tolist() == list(range(total))
    _, last, size = batches[-1]
    assert size == total % 8 > 0
    assert last["inputs"].shape == (8, 2)
    assert (last["inputs"][size:] == 1).all()
    assert (last["labels"][size:] == IGNORE_LABEL_ID).all()
    assert (last["puzzle_identifiers"][size:] == 0).all()
    stored = torch.from_numpy(np.array(dataset._sets["all"].labels[:8]).astype(np.int32))
    expected = torch.where(stored == 0, IGNORE_LABEL_ID, stored)
    assert torch.equal(batches[0][1]["labels"], expected)
    assert all(t.dtype == torch.int32 for _, b, _ in batches for t in b.values())


def test_several_paths_are_keyed_and_counted_like_the_official(paths: dict[str, str]) -> None:
    dataset = PuzzleDataset(config(paths["single"], paths["several"]))
    assert dataset.metadata.num_puzzle_identifiers == 14
    assert dataset.metadata.total_groups == 70
    assert [name for name, _ in itertools.groupby(n for n, _, _ in order(dataset))] == [
        "all",
        "all1",
    ]
    assert dataset.directories == {"all": 0, "all1": 1}
    # The second set is the second "iteration" of the generator.
    alone = PuzzleDataset(config(paths["several"], seed=4))
    second = [batch for batch in order(PuzzleDataset(config(*paths.values()))) if batch[0] != "all"]
    assert [batch[1] for batch in second] == [batch[1] for batch in order(alone)]


def test_sets_of_several_paths_need_names_of_their_own(tmp_path: Path) -> None:
    tokens = np.ones((2, 4), np.uint8)
    metadata, arrays = from_arrays(tokens, tokens, vocab_size=3)
    both = replace(metadata, sets=("all", "all1"), total_groups=4, total_puzzles=4)
    write_dataset(tmp_path, {"train": (both, {"all": arrays, "all1": arrays})})
    with pytest.raises(DataError, match="sets all, all1 of several paths: names collide"):
        PuzzleDataset(config(str(tmp_path), str(tmp_path)))
    alone = PuzzleDataset(config(str(tmp_path)))
    assert alone.directories == {"all": 0, "all1": 0}


@pytest.mark.parametrize("test_set_mode", [False, True])
def test_resuming_gives_the_exact_next_batches(paths: dict[str, str], test_set_mode: bool) -> None:
    settings = config(*paths.values(), test_set_mode=test_set_mode)
    dataset = PuzzleDataset(settings)
    states, batches = [dataset.state_dict()], []
    for _ in range(2):
        for batch in dataset:
            batches.append(batch)
            states.append(dataset.state_dict())
    for cut in range(len(batches)):
        file = io.BytesIO()
        torch.save(json.loads(json.dumps(states[cut])), file)
        file.seek(0)
        restored = PuzzleDataset(settings)
        restored.load_state_dict(torch.load(file, weights_only=True))
        following: list = []
        while len(following) < len(batches) - cut:
            following += list(restored)
        for (name, got, size), (want_name, want, want_size) in zip(
            following, batches[cut:], strict=False
        ):
            assert (name, size) == (want_name, want_size)
            assert all(torch.equal(got[key], want[key]) for key in want)


def test_a_position_of_another_run_is_refused(paths: dict[str, str]) -> None:
    state = PuzzleDataset(config(paths["single"])).state_dict()
    with pytest.raises(ValueError, match="saved with global_batch_size=8, this run has .*=4"):
        PuzzleDataset(config(paths["single"], global_batch_size=4)).load_state_dict(state)


def test_an_iteration_left_early_is_not_continued_by_accident(paths: dict[str, str]) -> None:
    dataset = PuzzleDataset(config(paths["single"]))
    next(iter(dataset))
    assert order(dataset) == order(PuzzleDataset(config(paths["single"])), 2)[10:]


def test_from_arrays_serves_own_puzzles() -> None:
    inputs = np.arange(12).reshape(6, 2) % 5
    metadata, arrays = from_arrays(inputs, inputs + 1, puzzle_identifiers=np.arange(6))
    assert (metadata.vocab_size, metadata.num_puzzle_identifiers, metadata.seq_len) == (6, 6, 2)
    dataset = PuzzleDataset(config(global_batch_size=3), data=(metadata, arrays))
    seen = [batch for _, batch, _ in dataset]
    ids = torch.cat([batch["puzzle_identifiers"] for batch in seen])
    assert sorted(ids.tolist()) == sorted([*range(6), *range(6)])
    assert torch.equal(torch.cat([b["labels"] - b["inputs"] for b in seen]), torch.ones(12, 2))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": np.zeros((2, 3), int)}, r"labels.npy: shape \(2, 3\) does not match"),
        ({"inputs": np.zeros((2, 2))}, r"inputs: float64 of shape \(2, 2\)"),
        ({"inputs": np.zeros(4, int)}, r"inputs: int64 of shape \(4,\)"),
        ({"labels": np.full((2, 2), 5), "vocab_size": 5}, r"labels.npy row 0: 5 is not in 0..4"),
        ({"puzzle_identifiers": np.zeros(3, int)}, "3 identifiers for 2 puzzles"),
    ],
)
def test_from_arrays_names_what_is_wrong(given: dict, message: str) -> None:
    arrays = {"inputs": np.ones((2, 2), int), "labels": np.ones((2, 2), int), **given}
    with pytest.raises(DataError, match=message):
        from_arrays(**arrays)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch_size": 0}, "global_batch_size is 0"),
        ({"global_batch_size": 5, "num_replicas": 2}, "not a multiple of the 2 replicas"),
        ({"rank": 2, "num_replicas": 2}, "rank 2 is not in 0..1"),
        ({"epochs_per_iter": 0}, "epochs_per_iter is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"dataset_paths": "data"}, "expected a list of paths"),
    ],
)
def test_config_faults(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_unfit_data_is_refused(paths: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data directory given"):
        PuzzleDataset(config())
    metadata, arrays = from_arrays(np.ones((2, 2), int), np.ones((2, 2), int))
    other = str(tmp_path / "other")
    write_dataset(other, {"train": (metadata, {"all": arrays})})
    with pytest.raises(DataError, match="pad_id is 0, but 1 in .*must agree"):
        PuzzleDataset(config(paths["single"], other))
    hollow = PuzzleArrays(
        arrays.inputs, arrays.labels, arrays.puzzle_identifiers, arrays.puzzle_indices,
        np.array([0, 0, 2]),
    )  # fmt: skip
    with pytest.raises(DataError, match=r"group_indices.npy row 0: an empty group"):
        PuzzleDataset(config(), data=(metadata, hollow))


def test_live_equality_with_the_official_dataset(
    official_path: Path, paths: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("argdantic")
    monkeypatch.syspath_prepend(str(official_path))
    known = set(sys.modules)
    import puzzle_dataset as official

    try:
        for test_set_mode, rank in itertools.product((False, True), (0, 1)):
            changes = {"test_set_mode": test_set_mode, "rank": rank, "num_replicas": 2}
            ours = PuzzleDataset(config(paths["single"], **changes))
            fields = {**vars(ours.config), "dataset_paths": [paths["single"]]}
            theirs = official.PuzzleDataset(official.PuzzleDatasetConfig(**fields))
            assert theirs.metadata.model_dump() == ours.metadata.to_dict()
            for _ in range(3):
                for mine, other in zip(ours, theirs, strict=True):
                    assert (mine[0], mine[2]) == (other[0], other[2])
                    for key, tensor in other[1].items():
                        assert tensor.dtype == mine[1][key].dtype
                        assert torch.equal(tensor, mine[1][key])
    finally:
        for name in set(sys.modules) - known:
            if name.split(".")[0] in {"puzzle_dataset", "models", "dataset"}:
                del sys.modules[name]
