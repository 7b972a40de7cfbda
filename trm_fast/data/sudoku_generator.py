"""Random Sudoku puzzles, many at once, in numpy, without a compiler; and the default job's data.

Owns the making of puzzles. May be imported by data.sudoku, the inference and training modules;
imports symmetry, data.building, data.format
and data.sudoku_solver.

Grids come from the solver's search over almost empty boards with random guesses. A puzzle is a grid
with cells removed in random order, each removal kept only if naked and hidden singles alone still
fill the hole; so singles solve the puzzle, and therefore it has one solution.

Dims as in data.sudoku_solver: boards [N, L] digits; inside, columns [L, N].
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from trm_fast.data.building import one_kind, reusable
from trm_fast.data.format import (
    one_puzzle_per_group,
    read_manifest,
    write_dataset,
)
from trm_fast.data.sudoku_solver import WIDTH, candidates, propagate, solve
from trm_fast.symmetry import BoxShape, box_shape, grid_invariant, random_permutations

__all__ = ["default_job_data", "generate", "generate_apart", "random_grids"]

GENERATOR_VERSION = 1
"""Raised whenever the same seed would give other puzzles; part of the cache's request."""


def random_grids(n: int, rng: np.random.Generator, size: int = 9) -> np.ndarray:
    """n random full grids; uint8 [n, L]. Not exactly uniform, but of practically all classes.

    The boxes of the diagonal are filled at random, the rest by a search with random guesses.
    """
    box = box_shape(size)
    grids = np.zeros((n, box.cells), np.uint8)
    missing = np.arange(n)
    while missing.size:
        start = np.zeros((missing.size, *box.axes), np.uint8)
        for i in range(min(box.rows, box.cols)):
            filled = random_permutations(rng, (missing.size,), box.side) + 1
            start[:, i, :, i, :] = filled.reshape(-1, box.rows, box.cols)
        found = solve(start.reshape(missing.size, -1), limit=1, rng=rng)
        grids[missing] = found.boards
        # A few fillings of small diagonals have no solution.
        missing = missing[found.counts == 0]
    return grids


def generate(
    n: int, *, clues: tuple[int, int] = (32, 50), size: int = 9, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """n puzzles of `clues` = (fewest, most) givens and their grids; two uint8 [n, L], 0 for blanks.

    The number of givens is drawn evenly from the range, per puzzle; where the digging gets stuck
    above its number but within the range, the puzzle is taken as it is. The same seed gives the
    same puzzles. Raises ValueError for a range that is empty or that digging does not reach.
    """
    box = box_shape(size)
    low, high = clues
    if not 0 < low <= high <= box.cells:
        raise ValueError(f"clues {low}-{high}: expected 1 <= fewest <= most <= {box.cells}")
    if n < 0:
        raise ValueError(f"cannot generate {n} puzzles")
    rng = np.random.Generator(np.random.Philox(seed=[seed, size]))
    boards = np.zeros((n, box.cells), np.uint8)
    grids = np.zeros((n, box.cells), np.uint8)
    made = tried = 0
    while made < n:
        # As many as should do at the rate seen so far, with some to spare.
        batch = min(WIDTH, (n - made) * (tried + 1) // (made + 1) + (64 if tried else 0))
        candidate_grids = random_grids(batch, rng, size)
        targets = rng.integers(low, high + 1, batch)
        dug = _dig(candidate_grids, targets, rng, box)
        good = np.flatnonzero((dug != 0).sum(1) <= high)[: n - made]
        boards[made : made + good.size] = dug[good]
        grids[made : made + good.size] = candidate_grids[good]
        made, tried = made + good.size, tried + batch
        if tried >= WIDTH and made * 200 < tried:
            raise ValueError(
                f"clues {low}-{high} cannot be reached: only {made} of {tried} boards of size "
                f"{size} could be dug that far; allow more clues"
            )
    return boards, grids


def _dig(
    grids: np.ndarray, targets: np.ndarray, rng: np.random.Generator, box: BoxShape
) -> np.ndarray:
    """Remove cells of each grid [N, L] until `targets` [N] are left or no cell can go; [N, L].

    Every board is in the middle of a test of its own: some cells are taken away, and each turn of
    the loop runs one round of singles on all boards. Once the holes are filled the removal is
    kept; if nothing moves any more it is undone, and tried again with half as many cells. Either
    way the board's next test begins at once, so that no board waits for another.
    """
    n = len(grids)
    boards = np.zeros_like(grids)
    ids = np.arange(n)
    full = np.uint16((1 << box.side) - 1)
    solution: np.ndarray = candidates(grids, box)
    rank: np.ndarray = np.ascontiguousarray(
        random_permutations(rng, (n,), box.cells).T.astype(np.int16)
    )
    present: np.ndarray = np.ones((box.cells, n), np.uint16)
    holes: np.ndarray = np.zeros((box.cells, n), np.uint16)
    masks: np.ndarray = solution.copy()
    # Per board: givens left, cells tried so far, cells taken away in this test, size of the next.
    left, tried, taken = (np.full(n, value, np.int16) for value in (box.cells, 0, 0))
    step: np.ndarray = np.full(n, max(1, box.cells // 5), np.int16)
    targets = targets.astype(np.int16)
    while ids.size:
        after, _ = propagate(masks, box)
        open_holes = (((after & (after - np.uint16(1))) != 0) & (holes != 0)).any(0)
        moved = (after != masks).any(0)
        kept, undone = ~open_holes, open_holes & ~moved
        present ^= holes * kept
        left -= taken * kept
        tried += np.where(kept, taken, undone & (taken == 1)).astype(np.int16)
        step = np.where(undone, np.maximum(taken // 2, 1), step).astype(np.int16)
        finished = (kept | undone) & ((left <= targets) | (tried >= box.cells))
        turn = kept | undone
        taken = np.where(
            turn, np.minimum(step, np.minimum(left - targets, box.cells - tried)), taken
        ).astype(np.int16)
        fresh_holes = ((rank >= tried) & (rank < tried + taken)) * present
        fresh = full ^ ((full ^ solution) * (present ^ fresh_holes))
        holes = np.where(turn, fresh_holes, holes)
        masks = fresh * turn + after * ~turn
        if finished.sum() * 4 >= ids.size or finished.all():
            out = np.flatnonzero(finished)
            boards[ids[out]] = grids[ids[out]] * present[:, out].T
            go = np.flatnonzero(~finished)
            columns = (solution, rank, present, holes, masks)
            solution, rank, present, holes, masks = (c.take(go, axis=1) for c in columns)
            ids, left, tried, taken = ids[go], left[go], tried[go], taken[go]
            step, targets = step[go], targets[go]
    return boards


def generate_apart(
    n: int, avoid: np.ndarray, *, clues: tuple[int, int], size: int = 9, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """As generate, but every grid_invariant is new: not in `avoid` (uint64) and not repeated.

    For held-out puzzles: none of them is a training grid in disguise. Raises ValueError if there
    are too few kinds of grids for that (4x4 has 2, 6x6 has 40).
    """
    boards, grids = generate(n, clues=clues, size=size, seed=seed)
    for attempt in range(1, 20):
        kinds = grid_invariant(grids)
        known = np.isin(kinds, avoid)
        known[np.setdiff1d(np.arange(n), np.unique(kinds, return_index=True)[1])] = True
        again = np.flatnonzero(known)
        if again.size == 0:
            return boards, grids
        more = generate(again.size, clues=clues, size=size, seed=seed + attempt * 7919)
        boards[again], grids[again] = more
    raise ValueError(
        f"no {n} grids of size {size} that differ from the given ones up to symmetry were found"
    )


def default_job_data(
    root: str | os.PathLike[str], *, seed: int, train_boards: int = 20000, test_boards: int = 500
) -> dict[str, Any]:
    """The data of the default training job, written to `root` unless it is there already.

    train: 9x9 boards of 32-50 givens, set "all"; test: sets "easy" (36-50 givens) and "medium"
    (28-32), test_boards each; all solved by singles, no test grid equal to a training grid up to
    symmetry. Returns the manifest. A folder whose manifest has the same request and whose files are
    intact is reused. Raises DataError if `root` holds something else.
    """
    request = {
        "source": "generated",
        "job": "sudoku-mini",
        "generator_version": GENERATOR_VERSION,
        "seed": seed,
        "train": {"all": {"boards": train_boards, "clues": [32, 50]}},
        "test": {
            "easy": {"boards": test_boards, "clues": [36, 50]},
            "medium": {"boards": test_boards, "clues": [28, 32]},
        },
    }
    manifest = reusable(root, request)
    if manifest is not None:
        return manifest
    boards, grids = generate(train_boards, clues=(32, 50), seed=seed)
    taken = grid_invariant(grids)
    train = {"all": one_puzzle_per_group(boards + np.uint8(1), grids + np.uint8(1))}
    test = {}
    for k, (name, clues) in enumerate((("easy", (36, 50)), ("medium", (28, 32))), 1):
        boards, grids = generate_apart(test_boards, taken, clues=clues, seed=seed + k * 1_000_003)
        kinds = grid_invariant(grids)
        assert not np.isin(kinds, taken).any()
        taken = np.concatenate([taken, kinds])
        test[name] = one_puzzle_per_group(boards + np.uint8(1), grids + np.uint8(1))
    splits = {
        "train": (one_kind(11, 81, train_boards), train),
        "test": (one_kind(11, 81, 2 * test_boards, tuple(test)), test),
    }
    write_dataset(root, splits, manifest={"request": request})
    manifest = read_manifest(root)
    assert manifest is not None
    return manifest
