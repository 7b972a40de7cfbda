"""Augmentation in the training step: drawn by counter, the same for any part of the batch."""

import numpy as np
import pytest
import torch

from trm_fast.data.augment import (
    SYMMETRY,
    augmentation_words,
    dihedral_augment,
    hand_back,
    sudoku_augment,
)
from trm_fast.data.sudoku_generator import random_grids
from trm_fast.data.sudoku_solver import is_valid
from trm_fast.philox import Draws
from trm_fast.symmetry import dihedral_transform, sudoku_symmetries_of

BOARDS = 600


def grids(side):
    return torch.from_numpy(random_grids(BOARDS, np.random.default_rng(7), side))


def draws(rows=range(BOARDS), step=3, side=9):
    counts = augmentation_words(side**2, "sudoku", handed_back=True)
    return Draws(11, torch.tensor(step), torch.tensor(list(rows)), counts)


def symmetries(side):
    return sudoku_symmetries_of(draws(side=side).words(SYMMETRY), side)


@pytest.mark.parametrize("side", [4, 6, 9])
def test_images_are_grids_and_the_inverse_is_exact(side):
    boards, symmetry = grids(side), symmetries(side)
    images = symmetry.apply(boards)
    assert images.dtype == boards.dtype and is_valid(images.numpy()).all()
    assert (images != boards).any(1).float().mean() > 0.95
    assert torch.equal(symmetry.inverse().apply(images), boards)


def test_every_kind_of_move_is_drawn():
    symmetry = symmetries(9)
    first = symmetry.cells[:, 0]
    assert first.unique().numel() == 81
    transposed = symmetry.cells[:, 1] // 9 != first // 9
    assert 0.4 < transposed.float().mean() < 0.6
    assert all(symmetry.digits[:, d].unique().tolist() == list(range(1, 10)) for d in range(1, 10))
    small = symmetries(6).cells
    assert (small[:, 1] // 6 == small[:, 0] // 6).all(), "oblong boxes are not transposed"


def test_a_board_is_changed_by_its_place_in_the_batch_alone():
    labels = grids(9).int() + 1
    inputs = torch.where(torch.rand(labels.shape) < 0.5, labels, 1)
    inputs[0, :3], labels[0, :3] = 0, -100
    whole = sudoku_augment(inputs, labels, draws())
    part = sudoku_augment(inputs[200:], labels[200:], draws(range(200, BOARDS)))
    assert all(torch.equal(w[200:], p) for w, p in zip(whole, part, strict=True))
    other = sudoku_augment(inputs, labels, draws(step=4))
    assert not torch.equal(whole[1], other[1])
    given = whole[0] > 1
    assert torch.equal(whole[0][given], whole[1][given]), "the same for input and label"
    assert (whole[1][0] == -100).sum() == 3 and (whole[0][0] == 0).sum() == 3


def dihedral_draws(rows=range(BOARDS), step=3):
    counts = augmentation_words(25, "dihedral", handed_back=False)
    return Draws(11, torch.tensor(step), torch.tensor(list(rows)), counts)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8], ids=str)
def test_each_symmetry_of_the_square_is_drawn_for_input_and_label_alike(dtype):
    inputs = torch.arange(25, dtype=dtype).expand(BOARDS, 25)
    labels = inputs.int() - 100
    whole = dihedral_augment(inputs, labels, dihedral_draws())
    assert [t.dtype for t in whole] == [dtype, torch.int32]
    assert torch.equal(whole[0].int() - 100, whole[1])
    images = [dihedral_transform(inputs[0].view(5, 5), k).reshape(25) for k in range(8)]
    found = (whole[0][:, None] == torch.stack(images)).all(2).sum(0)
    assert int(found.sum()) == BOARDS and int(found.min()) > BOARDS / 16
    part = dihedral_augment(inputs[200:], labels[200:], dihedral_draws(range(200, BOARDS)))
    assert all(torch.equal(w[200:], p) for w, p in zip(whole, part, strict=True))
    other = dihedral_augment(inputs, labels, dihedral_draws(step=4))
    assert not torch.equal(whole[0], other[0])


def test_only_square_grids_are_turned():
    with pytest.raises(ValueError, match="boards of 24 tokens are not square"):
        dihedral_augment(torch.zeros(2, 24), torch.zeros(2, 24), dihedral_draws(range(2)))


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0, -0.5, torch.tensor(0.3)], ids=str)
def test_handing_back(fraction):
    labels = grids(9).int() + 1
    inputs = torch.ones_like(labels)
    inputs[:, :9] = labels[:, :9]
    inputs[:, 9], labels[:, 10] = 0, -100
    found = hand_back(inputs, labels, fraction, draws())
    changed = found != inputs
    assert torch.equal(found[changed], labels[changed])
    assert not changed[:, :11].any(), "clues, padding and cells without a label stay"
    part = float(changed[:, 11:].float().mean())
    assert part == pytest.approx(min(max(float(fraction), 0), 1), abs=0.02)


def test_handing_back_the_path_of_mazes():
    inputs = torch.tensor([[1, 2, 3, 4, 2, 2, 0]]).repeat(BOARDS, 12)[:, :81]
    labels = torch.tensor([[1, 5, 3, 4, 2, -100, 5]]).repeat(BOARDS, 12)[:, :81]
    found = hand_back(inputs, labels, 0.5, draws(), blank=2)
    changed = found != inputs
    assert 0.45 < changed[:, 1::7].float().mean() < 0.55 and (found[changed] == 5).all()
    assert not changed.index_select(1, torch.tensor([0, 2, 3, 4, 5, 6])).any()
