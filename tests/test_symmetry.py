"""Symmetries: valid images, exact inverses, numpy as torch; what the invariant tells apart."""

import numpy as np
import pytest
import torch

from trm_fast.data.sudoku_generator import random_grids
from trm_fast.data.sudoku_solver import is_valid
from trm_fast.symmetry import (
    DIHEDRAL_INVERSE,
    box_shape,
    dihedral_transform,
    grid_invariant,
    invert_permutation,
    random_color_maps,
    sudoku_symmetries,
)

SIZES = [4, 6, 9]


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.mark.parametrize("side", SIZES)
def test_images_of_grids_are_grids_and_the_inverse_is_exact(side: int) -> None:
    grids = random_grids(200, rng(), side)
    symmetry = sudoku_symmetries(200, rng(), side)
    images = symmetry.apply(grids)
    assert images.dtype == grids.dtype
    assert is_valid(images).all()
    assert (images != grids).any(1).mean() > 0.95
    np.testing.assert_array_equal(symmetry.inverse().apply(images), grids)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_blanks_padding_and_ignored_labels_survive(dtype: type) -> None:
    symmetry = sudoku_symmetries(50, rng())
    digits = rng().integers(0, 10, (50, 81)).astype(dtype)
    moved = symmetry.apply(digits)
    np.testing.assert_array_equal(moved == 0, np.take_along_axis(digits, symmetry.cells, 1) == 0)
    np.testing.assert_array_equal(symmetry.apply_tokens(digits + 1), moved + 1)
    if dtype is not np.uint8:
        assert (symmetry.apply_tokens(np.full((50, 81), -100, dtype)) == -100).all()
    assert (symmetry.apply_tokens(np.zeros((50, 81), dtype)) == 0).all()


def test_torch_gives_what_numpy_gives() -> None:
    symmetry = sudoku_symmetries(20, rng())
    tokens = rng().integers(0, 11, (20, 81)).astype(np.int32)
    tokens[3, :5] = -100
    images = symmetry.apply_tokens(torch.from_numpy(tokens))
    assert images.dtype == torch.int32
    np.testing.assert_array_equal(images.numpy(), symmetry.apply_tokens(tokens))


def test_every_kind_of_move_is_drawn() -> None:
    symmetry = sudoku_symmetries(4000, rng())
    first = symmetry.cells[:, 0]
    assert set(first) == set(range(81))
    transposed = symmetry.cells[:, 1] // 9 != first // 9
    assert 0.45 < transposed.mean() < 0.55
    assert all(set(symmetry.digits[:, d]) == set(range(1, 10)) for d in range(1, 10))
    oblong = sudoku_symmetries(500, rng(), 6)
    assert (oblong.cells[:, 1] // 6 == oblong.cells[:, 0] // 6).all()


def test_unsupported_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="8x8 boards are not supported"):
        box_shape(8)
    with pytest.raises(ValueError, match="boards of 80 cells are not supported"):
        box_shape(cells=80)


EXPECTED_DIHEDRAL = {
    0: [[0, 1, 2], [3, 4, 5]],
    1: [[2, 5], [1, 4], [0, 3]],
    2: [[5, 4, 3], [2, 1, 0]],
    3: [[3, 0], [4, 1], [5, 2]],
    4: [[2, 1, 0], [5, 4, 3]],
    5: [[3, 4, 5], [0, 1, 2]],
    6: [[0, 3], [1, 4], [2, 5]],
    7: [[5, 2], [4, 1], [3, 0]],
}


@pytest.mark.parametrize("tid", range(8))
def test_dihedral_ids_are_the_official_ones(tid: int) -> None:
    grid = np.arange(6).reshape(2, 3)
    image = dihedral_transform(grid, tid)
    assert image.tolist() == EXPECTED_DIHEDRAL[tid]
    assert dihedral_transform(torch.from_numpy(grid), tid).tolist() == EXPECTED_DIHEDRAL[tid]
    np.testing.assert_array_equal(dihedral_transform(image, DIHEDRAL_INVERSE[tid]), grid)
    with pytest.raises(ValueError, match="dihedral id 8"):
        dihedral_transform(grid, 8)


def test_color_maps_keep_what_is_named_and_invert() -> None:
    maps = random_color_maps(300, rng(), keep=(0, 4))
    assert (maps[:, 0] == 0).all() and (maps[:, 4] == 4).all()
    assert set(maps[:, 1]) == set(range(10)) - {0, 4}
    identity = np.take_along_axis(invert_permutation(maps), maps, 1)
    np.testing.assert_array_equal(identity, np.tile(np.arange(10), (300, 1)))
    with pytest.raises(ValueError, match="outside 0..9"):
        random_color_maps(1, rng(), keep=(10,))


@pytest.mark.parametrize("side", SIZES)
def test_the_invariant_is_the_same_for_all_images(side: int) -> None:
    grids = random_grids(60, rng(), side)
    kinds = grid_invariant(grids)
    for seed in range(5):
        symmetry = sudoku_symmetries(60, np.random.default_rng(seed), side)
        np.testing.assert_array_equal(grid_invariant(symmetry.apply(grids)), kinds)


def test_the_invariant_tells_random_grids_apart() -> None:
    grids = random_grids(2000, rng())
    assert np.unique(grid_invariant(grids)).size == 2000
    # All 288 grids of size 4 fall into exactly two classes.
    small = np.unique(random_grids(4000, rng(), 4), axis=0)
    assert len(small) == 288
    assert np.unique(grid_invariant(small)).size == 2
    assert grid_invariant(grids[:0]).shape == (0,)
