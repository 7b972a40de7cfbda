"""Which puzzles of a data set are measured: numbers, limits, parts, sets without a label."""

import numpy as np
import pytest
import torch

from trm_fast import labelled
from trm_fast.data import IGNORE_LABEL_ID, PuzzleDataset, PuzzleDatasetConfig, from_arrays
from trm_fast.distributed import SINGLE
from trm_fast.labelled import Labelled, labelled_batches, labelled_sets, unlabelled

L = 3
UNLABELLED = {"one": (2, 5), "two": (0,)}
COUNTS = {"one": 11, "two": 4}


def dataset(batch_size=4, unlabelled=UNLABELLED, rank=0, world=1):
    """Sets whose boards are told apart by their first token: 1, 2, ... and 101, 102, ..."""
    sets, metadata = {}, None
    for name, first in (("one", 1), ("two", 101)):
        count = COUNTS[name]
        inputs = np.ones((count, L), np.uint8)
        inputs[:, 0] = first + np.arange(count)
        labels = np.ones((count, L), np.uint8)
        labels[list(unlabelled[name])] = 0
        metadata, sets[name] = from_arrays(inputs, labels, vocab_size=200, ignore_label_id=0)
    config = PuzzleDatasetConfig(
        seed=0,
        dataset_paths=(),
        global_batch_size=batch_size,
        test_set_mode=True,
        rank=rank,
        num_replicas=world,
    )
    return PuzzleDataset(config, data=(metadata, sets))


def names_of(inputs):
    return inputs[:, 0].tolist()


WHOLE = {"one": [1, 2, 4, 5, 7, 8, 9, 10, 11], "two": [102, 103, 104]}


@pytest.mark.parametrize("batch_size", [1, 4, 50])
@pytest.mark.parametrize("most", [None, 1, 2, 3, 8, 9, 50])
def test_the_first_labelled_boards_of_each_set(batch_size, most):
    found, numbers = {}, {}
    for name, parts in labelled_sets(dataset(batch_size), most):
        for part in parts:
            found.setdefault(name, []).extend(names_of(part.inputs))
            numbers.setdefault(name, []).extend(part.numbers.tolist())
            assert (part.labels == 1).all() and not part.identifiers.any()
    assert found == {name: boards[:most] for name, boards in WHOLE.items()}
    assert numbers == {name: list(range(len(boards))) for name, boards in found.items()}


def test_no_more_is_read_of_a_set_than_is_measured():
    for most, batches in ((1, 1 + 1), (3, 1 + 1), (4, 2 + 1), (None, 3 + 1)):
        data, read = dataset(), []
        real = data.collate
        data.collate = lambda name, rows, real=real, read=read: (
            read.append(name) or real(name, rows)
        )
        found = [len(batch["labels"]) for _, batch, *_ in labelled_batches(data, most)]
        assert len(read) == batches
        assert sum(found) == sum(len(boards[:most]) for boards in WHOLE.values())
    # What is no PuzzleDataset is read to its end.
    whole = list(dataset())
    assert [len(batch["labels"]) for _, batch, *_ in labelled_batches(whole, 1)] == [1, 0, 0, 1]


def test_a_skipped_set_is_not_gone_back_to():
    data = dataset()
    batches = iter(data)
    assert next(batches)[0] == "one"
    data.skip_set()
    data.skip_set()  # once is enough
    state = data.state_dict()
    assert [name for name, *_ in batches] == ["two"]
    again = dataset()
    again.load_state_dict(state)
    assert [name for name, *_ in again] == ["two"]
    assert [name for name, *_ in again] == ["one", "one", "one", "two"], "the next time all of it"
    last = iter(again)
    assert [next(last)[0] for _ in range(4)][-1] == "two"
    again.skip_set()  # the last one: then it is over
    state = again.state_dict()
    assert list(last) == []
    data.load_state_dict(state)
    assert next(iter(data))[0] == "one"


class Pair:
    """Two processes one after the other: the sizes that they would tell each other."""

    world = 2

    def __init__(self, rank, sizes):
        self.rank, self._sizes = rank, iter(sizes)

    def numbers(self, number):
        sizes = next(self._sizes)
        assert sizes[self.rank] == number
        return sizes


def test_processes_number_and_limit_through_each_other():
    sizes = [[2, 1], [1, 2], [2, 1], [1, 2]]  # of 4 boards each, halved; without the unlabelled
    for most, want in (
        (None, [[1, 2, 5, 9, 10, 102], [4, 7, 8, 11, 103, 104]]),
        (2, [[1, 2, 102], [103]]),
        (4, [[1, 2, 5, 102], [4, 103, 104]]),
    ):
        told = {}
        for rank in (0, 1):
            # What a set has no need of is not asked about.
            asked = {None: sizes, 2: [sizes[0], sizes[3]], 4: [*sizes[:2], sizes[3]]}[most]
            pair = Pair(rank, asked)
            found = []
            for _, parts in labelled_sets(dataset(rank=rank, world=2), most, pair):
                for part in parts:
                    found += names_of(part.inputs)
                    told.update(zip(names_of(part.inputs), part.numbers.tolist(), strict=True))
            assert found == want[rank]
        for boards in WHOLE.values():
            assert [told[b] for b in boards[:most]] == list(range(len(boards[:most])))


@pytest.mark.parametrize("room", [1, 60, 100])
def test_processes_end_a_part_behind_the_same_batch(monkeypatch, room):
    """Also where one has fewer labelled boards than the other."""
    monkeypatch.setattr(labelled, "PART_BYTES", room)
    sizes = [[2, 1], [1, 2], [2, 1], [1, 2]]
    ends = []
    for rank in (0, 1):
        asked = []
        pair = Pair(rank, sizes)
        real = pair.numbers
        pair.numbers = lambda number, real=real, asked=asked: asked.append(number) or real(number)
        sets = labelled_sets(dataset(rank=rank, world=2), None, pair)
        ends.append([len(asked) for _, parts in sets for _ in parts])
    # A batch is 4 boards of 24 bytes, 48 bytes of each; the end of a set is seen behind it.
    assert ends[0] == ends[1] == {1: [1, 2, 3, 4], 60: [2, 4, 4], 100: [3, 4]}[room]


@pytest.mark.parametrize(("room", "sizes"), [(1, [3, 3, 3]), (300, [9]), (100, [6, 3])])
def test_a_set_is_held_in_parts(monkeypatch, room, sizes):
    monkeypatch.setattr(labelled, "PART_BYTES", room)  # a board takes 2 * 3 * 4 bytes
    (_, one), *_ = ((name, list(parts)) for name, parts in labelled_sets(dataset()))
    assert [len(part.inputs) for part in one] == sizes
    assert [n for part in one for n in part.numbers.tolist()] == list(range(9))


def test_numbers_are_asked_for_only_where_they_matter():
    class Mute:
        rank, world = 0, 1

        def numbers(self, number):
            raise AssertionError("asked")

    found = list(labelled_batches(dataset(), None, Mute()))
    assert sum(len(batch["labels"]) for _, batch, *_ in found) == 12
    assert {numbers for _, _, numbers, _ in found} == {None}
    assert SINGLE.numbers(3) == [3]


def test_sets_without_a_label():
    assert unlabelled(dataset()) == []
    assert unlabelled(dataset(unlabelled={"one": (2,), "two": range(4)})) == ["two"]
    assert unlabelled(dataset(unlabelled={"one": range(11), "two": range(4)})) == ["one", "two"]
    inputs = np.ones((2, L), np.uint8)
    metadata, arrays = from_arrays(inputs, inputs * 0, vocab_size=5, ignore_label_id=None)
    data = PuzzleDataset(dataset().config, data=(metadata, arrays))
    assert unlabelled(data) == [], "where nothing is ignored, 0 is a label"


def test_right_where_there_is_a_label():
    labels = torch.tensor([[1, 2, IGNORE_LABEL_ID], [3, 3, 3]])
    puzzles = Labelled(labels, labels, torch.zeros(2), torch.arange(2))
    answers = torch.tensor([[1, 2, 9], [1, 3, 9], [3, 3, 3], [3, 3, 4]])
    assert puzzles.right(torch.tensor([0, 0, 1, 1]), answers).tolist() == [True, False, True, False]
