"""What of the data is checked against the settings before a run begins."""

import numpy as np
import pytest

from trm_fast.config import TrainConfig
from trm_fast.data.dataset import from_arrays
from trm_fast.data.format import DataError, write_dataset
from trm_fast.splits import open_splits

TRAIN, TEST = {"count": 8}, {"count": 4}


def puzzles(count, seq=16, vocab=6, identifiers=1):
    tokens = np.ones((max(count, 1), seq), np.uint8)
    ids = np.arange(max(count, 1)) % identifiers
    metadata, arrays = from_arrays(tokens, tokens, vocab_size=vocab, puzzle_identifiers=ids)
    if count == 0:
        metadata = type(metadata)(**{**metadata.to_dict(), "total_groups": 0, "sets": ("all",)})
        fields = {name: array[:0] for name, array in arrays.items()}
        fields |= {name: np.zeros(1, np.int32) for name in ("puzzle_indices", "group_indices")}
        arrays = type(arrays)(**fields)
    return metadata, {"all": arrays}


@pytest.fixture
def job(tmp_path):
    def make(train=TRAIN, test=TEST, **changes):
        splits = {"train": puzzles(**train)} | ({"test": puzzles(**test)} if test else {})
        write_dataset(tmp_path / "d", splits)
        values = {"data_paths": [str(tmp_path / "d")], "arch.hidden_size": 16, **changes}
        return TrainConfig.from_dict(values)

    return make


def test_both_splits_are_described(job):
    splits = open_splits(job())
    assert (splits.train.total_groups, splits.test.total_groups) == (8, 4)
    assert splits.paths == splits.paths_test


def test_data_without_a_test_split_can_be_trained_on(job):
    assert open_splits(job(test=None)).test is None


def test_a_test_split_that_was_asked_for_must_be_there(job, tmp_path):
    config = job(test=None, data_paths_test=[str(tmp_path / "d")])
    with pytest.raises(DataError, match="no split 'test'"):
        open_splits(config)


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ({"count": 0}, "the test split has no puzzles"),
        ({"count": 4, "seq": 36}, "seq_len of the test split is 36, in training 16"),
        ({"count": 4, "vocab": 7}, "vocab_size of the test split is 7, in training 6"),
        (
            {"count": 4, "identifiers": 2},
            "num_puzzle_identifiers of the test split is 2, in training 1",
        ),
    ],
    ids=["empty", "seq_len", "vocab_size", "identifiers"],
)
def test_a_test_split_that_cannot_be_measured_is_refused(job, test, message):
    with pytest.raises(DataError, match=message):
        open_splits(job(test=test))


def test_identifiers_do_not_count_without_puzzle_rows(job):
    config = job(test={"count": 4, "identifiers": 2}, **{"arch.puzzle_emb_ndim": 0})
    assert open_splits(config).test.num_puzzle_identifiers == 2


SIZES = {"sudoku4": (16, 6), "sudoku6": (36, 8), "maze": (25, 6), "square": (25, 20)}
SIZES |= {"odd": (24, 6), "arc": (900, 12)}
FITTING = {
    "augment=sudoku": ("sudoku4", "sudoku6"),
    "augment=dihedral": ("sudoku4", "maze"),
    "curriculum=0.5": ("sudoku4", "sudoku6", "maze"),
}


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("setting", FITTING)
def test_what_changes_boards_must_fit_them(job, setting, kind):
    seq, vocab = SIZES[kind]
    size = {"seq": seq, "vocab": vocab}
    key, value = setting.split("=")
    config = job(train={"count": 8, **size}, test={"count": 4, **size}, **{key: value})
    if kind in FITTING[setting]:
        assert open_splits(config).train.seq_len == seq
        return
    with pytest.raises(ValueError, match=f"{key}.* 6x6 Sudoku|{seq} tokens of {vocab} values"):
        open_splits(config)
