"""The generator: valid varied grids, unique puzzles in the range; the default job's data."""

from pathlib import Path

import numpy as np
import pytest

from trm_fast.data.format import DataError, read_split
from trm_fast.data.sudoku_generator import (
    default_job_data,
    generate,
    generate_apart,
    random_grids,
)
from trm_fast.data.sudoku_solver import candidates, digits_of, is_valid, propagate, solve
from trm_fast.symmetry import box_shape, grid_invariant

RANGES = [(9, (32, 50)), (9, (26, 28)), (6, (8, 16)), (4, (4, 8)), (9, (81, 81))]


@pytest.mark.parametrize(("size", "clues"), RANGES, ids=str)
def test_puzzles_are_unique_and_in_the_range(size: int, clues: tuple[int, int]) -> None:
    boards, grids = generate(150, clues=clues, size=size, seed=1)
    assert boards.dtype == grids.dtype == np.uint8
    givens = (boards != 0).sum(1)
    assert clues[0] <= givens.min() and givens.max() <= clues[1]
    assert ((boards == 0) | (boards == grids)).all()
    solutions = solve(boards)
    assert (solutions.counts == 1).all()
    np.testing.assert_array_equal(solutions.boards, grids)


def test_singles_alone_solve_every_puzzle() -> None:
    boards, grids = generate(300, clues=(25, 40), seed=2)
    masks = candidates(boards, box_shape(9))
    for _ in range(81):
        masks, _ = propagate(masks, box_shape(9))
    np.testing.assert_array_equal(digits_of(masks), grids)


def test_givens_are_spread_over_the_range() -> None:
    boards, _ = generate(600, clues=(32, 50), seed=3)
    counts = np.bincount((boards != 0).sum(1), minlength=51)[32:]
    assert (counts > 10).all()
    # Which cells are given is not tied to the place.
    assert 0.3 < (boards != 0).mean(0).min() < (boards != 0).mean(0).max() < 0.7


def test_the_seed_decides() -> None:
    first = generate(40, seed=5)
    again, other = generate(40, seed=5), generate(40, seed=6)
    np.testing.assert_array_equal(first[0], again[0])
    assert not (first[1] == other[1]).all(1).any()


def test_grids_are_varied() -> None:
    grids = random_grids(1500, np.random.default_rng(0))
    assert is_valid(grids).all()
    assert np.unique(grid_invariant(grids)).size == 1500
    for cell in (0, 13, 44, 80):
        assert (np.bincount(grids[:, cell], minlength=10)[1:] > 110).all()


def test_held_out_grids_differ_up_to_symmetry() -> None:
    _, grids = generate(15, size=6, clues=(12, 20), seed=0)
    avoid = grid_invariant(grids)
    _, held = generate_apart(6, avoid, size=6, clues=(12, 20), seed=0)
    kinds = grid_invariant(held)
    assert not np.isin(kinds, avoid).any() and np.unique(kinds).size == 6
    with pytest.raises(ValueError, match="no 3 grids of size 4"):
        generate_apart(3, avoid, size=4, clues=(8, 8), seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clues": (30, 20)}, "clues 30-20"),
        ({"clues": (0, 20)}, "clues 0-20"),
        ({"clues": (30, 82)}, "most <= 81"),
        ({"size": 5}, "5x5 boards"),
        ({"clues": (3, 3), "size": 4}, "clues 3-3 cannot be reached"),
    ],
)
def test_impossible_wishes(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(5, **changes)


def test_the_default_job_s_data_is_cached_and_apart(tmp_path: Path) -> None:
    root = tmp_path / "mini"
    manifest = default_job_data(root, seed=1, train_boards=200, test_boards=40)
    metadata, train = read_split(root, "train")
    assert (metadata.vocab_size, metadata.seq_len, metadata.total_groups) == (11, 81, 200)
    metadata, test = read_split(root, "test")
    assert metadata.sets == ("easy", "medium") and metadata.total_groups == 80
    for name, low, high in (("easy", 36, 50), ("medium", 28, 32)):
        givens = (test[name].inputs > 1).sum(1)
        assert len(givens) == 40 and low <= givens.min() and givens.max() <= high
    known = grid_invariant(np.array(train["all"].labels) - 1)
    held = np.concatenate([grid_invariant(np.array(arrays.labels) - 1) for arrays in test.values()])
    assert not np.isin(held, known).any() and np.unique(held).size == 80

    stamp = (root / "manifest.json").stat().st_mtime_ns
    assert default_job_data(root, seed=1, train_boards=200, test_boards=40) == manifest
    assert (root / "manifest.json").stat().st_mtime_ns == stamp
    (root / "train/all__labels.npy").write_bytes(b"damaged")
    assert default_job_data(root, seed=1, train_boards=200, test_boards=40) == manifest
    read_split(root, "train")
    assert default_job_data(root, seed=2, train_boards=200, test_boards=40) != manifest


def test_the_default_job_leaves_foreign_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="not written by this builder"):
        default_job_data(tmp_path, seed=0, train_boards=5, test_boards=2)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
