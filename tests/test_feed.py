"""Batches in tensors that stay where they are: the same from the host and from the device."""

import numpy as np
import pytest
import torch

from trm_fast.data.dataset import PuzzleDataset, PuzzleDatasetConfig
from trm_fast.data.feed import Feed, resident_bytes
from trm_fast.data.format import Metadata, PuzzleArrays

CPU = torch.device("cpu")


def dataset(vocab=6, ignore=0, counts=(7, 5)):
    """Two sets; puzzles of one or two examples, identifiers that tell them apart."""
    rng = np.random.default_rng(1)
    sets = {}
    for name, count in zip("ab", counts, strict=True):
        tokens = rng.integers(1, vocab, (count, 4))
        tokens[:, 1] = 0
        index = np.array([0, *range(2, count + 1)])
        ids = np.arange(len(index) - 1) % 5
        sets[name] = PuzzleArrays(tokens, tokens[::-1].copy(), ids, index, np.arange(len(index)))
    metadata = Metadata(
        pad_id=0,
        ignore_label_id=ignore,
        blank_identifier_id=0,
        vocab_size=vocab,
        seq_len=4,
        num_puzzle_identifiers=5,
        total_groups=10,
        mean_puzzle_examples=1.2,
        total_puzzles=10,
        sets=("a", "b"),
    )
    config = PuzzleDatasetConfig(0, ("memory",), 3, False)
    return PuzzleDataset(config, data=(metadata, sets))


@pytest.mark.parametrize("vocab", [6, 200, 1000])
@pytest.mark.parametrize("resident", [True, False], ids=["resident", "from the host"])
def test_batches_are_those_of_the_data_set(resident, vocab, monkeypatch):
    monkeypatch.setattr("trm_fast.data.feed.CHUNK", 2)
    data = dataset(vocab)
    feed = Feed(data, CPU, resident)
    assert resident_bytes(data) == 12 * (4 * {6: 2, 200: 5, 1000: 8}[vocab] + 4)
    for name, examples in [("a", [0, 6, 3]), ("b", [4, 4, 0]), ("a", [1, 2, 5])]:
        feed.put(name, np.array(examples))
        found, wanted = feed.batch(), data.collate(name, np.array(examples))
        assert found.keys() == wanted.keys()
        for key, values in wanted.items():
            assert found[key].dtype == torch.int32
            assert torch.equal(found[key], values), key
    assert (wanted["labels"][:, 1] == -100).all() and wanted["puzzle_identifiers"].any()


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "from the host"])
def test_a_batch_stays_in_its_place(resident):
    feed = Feed(dataset(), CPU, resident)
    feed.put("a", np.array([0, 1, 2]))
    read = feed._examples if resident else feed.batch()["inputs"]
    place = read.data_ptr()
    feed.put("b", np.array([0, 1, 2]))
    assert (feed._examples if resident else feed.batch()["inputs"]).data_ptr() == place
