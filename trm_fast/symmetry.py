"""Symmetries of puzzles: of Sudoku boards, of the square, of colours; and what they leave alone.

Owns the group actions used for augmentation (data.augment, data.sudoku), for answers averaged over
equivalent puzzles, and for telling two solution grids apart up to symmetry. Any module of the
package may import it; it imports numpy and torch only.

Dims: N boards, L = side * side cells, K colours. A board is a row of L cells read left to right,
top to bottom, holding digits 0 (blank) .. side. Every function takes and returns arrays of the kind
it was given, numpy or torch (on the device of the boards).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import Any, TypeVar

import numpy as np
import torch

__all__ = [
    "DIHEDRAL_INVERSE",
    "BoxShape",
    "SudokuSymmetry",
    "TokenSymmetry",
    "box_shape",
    "dihedral_cells",
    "dihedral_transform",
    "grid_invariant",
    "invert_permutation",
    "random_color_maps",
    "random_permutations",
    "sudoku_symmetries",
    "sudoku_symmetries_of",
    "sudoku_words",
]

Array = TypeVar("Array", np.ndarray, torch.Tensor)

DIHEDRAL_INVERSE = (0, 3, 2, 1, 4, 5, 6, 7)
"""Id of the inverse of each of the eight symmetries of the square (see dihedral_transform)."""


@dataclass(frozen=True)
class BoxShape:
    """Rows and columns of one box; a board has `rows * cols` digits, rows, columns and boxes."""

    rows: int
    cols: int

    @property
    def side(self) -> int:
        return self.rows * self.cols

    @property
    def cells(self) -> int:
        return self.side * self.side

    @property
    def has_transpose(self) -> bool:
        """Whether mirroring along the main diagonal maps boxes to boxes."""
        return self.rows == self.cols

    @property
    def axes(self) -> tuple[int, int, int, int]:
        """(band, row in band, stack, column in stack): the shape that makes every unit an axis."""
        return (self.cols, self.rows, self.rows, self.cols)


_BOXES = {4: BoxShape(2, 2), 6: BoxShape(2, 3), 9: BoxShape(3, 3)}


def box_shape(side: int | None = None, *, cells: int | None = None) -> BoxShape:
    """The box shape of boards with `side` rows (4, 6 or 9) or with `cells` cells (16, 36 or 81).

    Raises ValueError for any other size.
    """
    if side is None:
        if cells is None:
            raise ValueError("box_shape needs side or cells")
        side = isqrt(cells) if cells > 0 and isqrt(cells) ** 2 == cells else -cells
    if side not in _BOXES:
        given = f"{side}x{side} boards" if side > 0 else f"boards of {-side} cells"
        raise ValueError(f"{given} are not supported: 4x4, 6x6 or 9x9 (16, 36 or 81 cells)")
    return _BOXES[side]


def invert_permutation(permutations: Array) -> Array:
    """Inverse of each permutation of 0..K-1 along the last axis; [..., K] -> [..., K] same kind."""
    return permutations.argsort(-1)


def random_permutations(rng: np.random.Generator, shape: tuple[int, ...], size: int) -> np.ndarray:
    """Independent uniform permutations of 0..size-1; int64 [*shape, size]."""
    return rng.random((*shape, size)).argsort(-1)


@dataclass(frozen=True)
class SudokuSymmetry:
    """N symmetries, one per board: first the cells move, then the digits are renamed.

    cells [N, L] int64: new cell i holds what was in old cell cells[i];
    digits [N, side + 1] int64: digit d becomes digits[d]; digits[0] == 0, blanks stay blank.
    Both numpy, or both torch on one device; boards are taken to where they are.
    """

    cells: Any
    digits: Any

    def apply(self, boards: Array) -> Array:
        """Images of boards [N, L] of digits 0..side (any integer dtype, kept)."""
        return _take(boards, self.cells, self.digits)

    def apply_tokens(self, tokens: Array) -> Array:
        """Images of token boards [N, L]: 0 padding, 1 blank, digit d as d + 1; negatives stay."""
        return _take(tokens, self.cells, self.token_maps())

    def token_maps(self) -> Any:
        """The digit renaming in terms of tokens; int64 [N, side + 2], padding to padding."""
        return _after_zero(self.digits + 1)

    def inverse(self) -> SudokuSymmetry:
        """The symmetries that undo these exactly: s.inverse().apply(s.apply(b)) == b."""
        return SudokuSymmetry(invert_permutation(self.cells), invert_permutation(self.digits))


@dataclass(frozen=True)
class TokenSymmetry:
    """N symmetries of tokens, one per board, in torch: new cell i holds the renamed old cell.

    cells [N, L] int64: new cell i holds what was in old cell cells[i];
    values [N, V] int64: token v becomes values[v].
    """

    cells: torch.Tensor
    values: torch.Tensor

    def apply(self, tokens: torch.Tensor) -> torch.Tensor:
        """Images of tokens [N, L], their dtype kept; negatives stay."""
        return _take(tokens, self.cells, self.values)

    def inverse(self) -> TokenSymmetry:
        """The symmetries that undo these: s.inverse().apply(s.apply(t)) == t."""
        return TokenSymmetry(invert_permutation(self.cells), invert_permutation(self.values))


def _after_zero(rows: Array) -> Array:
    if isinstance(rows, torch.Tensor):
        return torch.nn.functional.pad(rows, (1, 0))
    return np.pad(rows, ((0, 0), (1, 0)))


def _take(boards: Array, cells: Any, values: Any) -> Array:
    if isinstance(boards, torch.Tensor):
        cell_index, value_map = (torch.as_tensor(t).to(boards.device) for t in (cells, values))
        moved = boards.gather(1, cell_index)
        renamed = value_map.gather(1, moved.long().clamp_min(0))
        return torch.where(moved < 0, moved, renamed.to(boards.dtype))
    rows = np.arange(len(boards))[:, None]
    moved = boards[rows, cells]
    renamed = values.astype(boards.dtype)[rows, np.maximum(moved, 0)]
    if np.issubdtype(boards.dtype, np.unsignedinteger):
        return renamed
    return np.where(moved < 0, moved, renamed)


def sudoku_symmetries(n: int, rng: np.random.Generator, side: int = 9) -> SudokuSymmetry:
    """n independent uniform symmetries of a side x side board, in numpy.

    Digits, bands, rows within a band, stacks, columns within a stack, and, where the boxes are
    square, transposition (done first). For 9x9 that is the whole group of 9! * 2 * 6**8 elements.
    """
    return _symmetry(
        side,
        lambda *shape: random_permutations(rng, (n, *shape[:-1]), shape[-1]),
        lambda: rng.random(n) < 0.5,
    )


def sudoku_words(side: int = 9) -> int:
    """Random words per board that `sudoku_symmetries_of` takes."""
    bands, rows_in, stacks, cols_in = box_shape(side).axes
    return side + bands + bands * rows_in + stacks + stacks * cols_in + 1


def sudoku_symmetries_of(words: torch.Tensor, side: int = 9) -> SudokuSymmetry:
    """As `sudoku_symmetries`, from words [N, sudoku_words(side)] int64 in [0, 2**32); in torch, by
    operations that a CUDA graph can hold."""
    at = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        count = math.prod(shape)
        at += count
        return words[:, at - count : at].reshape(-1, *shape)

    return _symmetry(
        side,
        lambda *shape: take(*shape).argsort(dim=-1, stable=True),
        lambda: take(1)[:, 0] % 2 == 1,
    )


def _symmetry(
    side: int, permutations: Callable[..., Any], coins: Callable[[], Any]
) -> SudokuSymmetry:
    """permutations(*shape) -> [N, *shape], each row along the last axis; coins() -> [N] bool."""
    box = box_shape(side)
    bands, rows_in, stacks, cols_in = box.axes
    digits = _after_zero(permutations(side) + 1)
    rows = _lines(permutations(bands), permutations(bands, rows_in))
    cols = _lines(permutations(stacks), permutations(stacks, cols_in))
    cells = rows[:, :, None] * side + cols[:, None, :]
    if box.has_transpose:
        mirrored = cols[:, None, :] * side + rows[:, :, None]
        cells = cells + coins()[:, None, None] * (mirrored - cells)
    return SudokuSymmetry(cells.reshape(-1, side * side), digits)


def _lines(order: Any, inside: Any) -> Any:
    """[N, blocks], [N, blocks, within] -> the permutations of all lines [N, blocks * within]."""
    n, blocks, within = inside.shape
    return (order[:, :, None] * within + inside).reshape(n, blocks * within)


def dihedral_transform(grids: Array, tid: int) -> Array:
    """Symmetry `tid` of the square, over the last two axes; the ids are those of the official code.

    0 identity; 1, 2, 3 quarter turns counter-clockwise; 4 left-right; 5 up-down; 6 transpose;
    7 a quarter turn, then left-right. Undone by DIHEDRAL_INVERSE[tid]. Raises ValueError for
    other ids.
    """
    if not 0 <= tid < 8:
        raise ValueError(f"dihedral id {tid} is not one of 0..7")
    turns, mirror = (tid, False) if tid < 4 else ((0, 2, 3, 1)[tid - 4], True)
    result: Any
    if isinstance(grids, torch.Tensor):
        result = torch.rot90(grids, turns, (-2, -1))
        return result.flip(-1) if mirror else result
    result = np.rot90(grids, turns, (-2, -1))
    return result[..., ::-1] if mirror else result


def dihedral_cells(side: int, device: torch.device | None = None) -> torch.Tensor:
    """int64 [8, side * side]: cell i of image `tid` holds what was in cell [tid, i]."""
    places = torch.arange(side * side, device=device).view(side, side)
    return torch.stack([dihedral_transform(places, tid).reshape(-1) for tid in range(8)])


def random_color_maps(
    n: int, rng: np.random.Generator, colors: int = 10, keep: tuple[int, ...] = (0,)
) -> np.ndarray:
    """n uniform renamings of 0..colors-1 that leave the colours of `keep`; int64 [n, colors].

    Undone by invert_permutation.
    """
    if any(not 0 <= color < colors for color in keep):
        raise ValueError(f"keep={keep} names a colour outside 0..{colors - 1}")
    free = np.setdiff1d(np.arange(colors), np.asarray(keep, dtype=np.int64))
    maps = np.tile(np.arange(colors), (n, 1))
    maps[:, free] = free[random_permutations(rng, (n,), len(free))]
    return maps


def grid_invariant(grids: np.ndarray) -> np.ndarray:
    """A fingerprint of full grids that no symmetry changes; [N, L] digits 1..side -> uint64 [N].

    Equal for all images of a grid under sudoku_symmetries; different for grids of different classes
    in practice (colour refinement, not a proof of isomorphism). Two lines define a renaming of the
    digits; its cycle type, for all pairs of rows and all pairs of columns, together with which
    pairs share a band or stack, is the first colour of the lines. Cells, digits, boxes and lines
    then refine each other twice.
    """
    grids = np.asarray(grids)
    box = box_shape(cells=grids.shape[1])
    return np.concatenate(
        [_invariant_chunk(grids[i : i + 4096], box) for i in range(0, len(grids), 4096)]
        or [np.zeros(0, np.uint64)]
    )


def _invariant_chunk(grids: np.ndarray, box: BoxShape) -> np.ndarray:
    side, n = box.side, len(grids)
    digits = grids.reshape(n, side, side).astype(np.int64) - 1
    # With oblong boxes rows and columns are never exchanged, so they get different seeds.
    row_seed, col_seed = (1, 1) if box.has_transpose else (1, 2)
    rows = _line_colors(digits, box.rows, row_seed)
    cols = _line_colors(digits.transpose(0, 2, 1), box.cols, col_seed)
    board = np.arange(n)[:, None, None]
    box_of = _box_ids(box)
    cells = np.zeros((n, side, side), np.uint64)
    for _ in range(2):
        cells = _mix(cells + _mix(rows)[:, :, None] + _mix(cols)[:, None, :], 3)
        by_digit = np.zeros((n, side), np.uint64)
        by_box = np.zeros((n, side), np.uint64)
        np.add.at(by_digit, (board, digits), cells)
        np.add.at(by_box, (board, box_of[None]), cells)
        cells = _mix(cells + _mix(by_digit, 4)[board, digits] + _mix(by_box, 5)[board, box_of], 6)
        rows = _mix(rows + _mix(cells, 7).sum(2), row_seed)
        cols = _mix(cols + _mix(cells, 7).sum(1), col_seed)
    return _mix(_mix(cells).sum((1, 2)), 8)


def _box_ids(box: BoxShape) -> np.ndarray:
    line = np.arange(box.side)
    return (line // box.rows)[:, None] * box.rows + (line // box.cols)[None, :]


def _line_colors(digits: np.ndarray, per_band: int, seed: int) -> np.ndarray:
    """Colour of every row from its cycle types with the others; [n, side, side] -> [n, side].

    A permutation without fixed points of up to nine digits is known by how many digits its
    second, third and fourth powers leave alone.
    """
    n, side, _ = digits.shape
    where = digits.argsort(-1)
    pair = np.zeros((n, side, side), np.uint64)
    identity = np.arange(side)
    for a in range(side):
        for b in range(a + 1, side):
            once = np.take_along_axis(digits[:, b], where[:, a], 1)
            twice = np.take_along_axis(once, once, 1)
            thrice = np.take_along_axis(once, twice, 1)
            fourth = np.take_along_axis(twice, twice, 1)
            fixed = [(power == identity).sum(1) for power in (twice, thrice, fourth)]
            pair[:, a, b] = pair[:, b, a] = fixed[0] + 16 * fixed[1] + 256 * fixed[2]
    band = identity // per_band
    inside = (band[:, None] == band[None, :]) & (identity[:, None] != identity[None, :])
    own = (_mix(pair, 10 + seed) * inside).sum(2)
    blocks = _mix(pair, 20 + seed).reshape(n, side, side // per_band, per_band).sum(3)
    elsewhere = band[:, None] != np.arange(side // per_band)[None, :]
    return _mix(own + (_mix(blocks, 30) * elsewhere).sum(2), seed)


def _mix(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """A fixed bijective scrambling of uint64 (the finalizer of splitmix64), one per seed."""
    x = values + np.uint64(0x9E3779B97F4A7C15 * (seed + 1) % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
