"""Random grid mazes whose shortest path is the only one and as long as asked for, many at once.

Owns the making of mazes. May be imported by data.maze and the training modules; imports
data.format and data.maze_solver.

A maze begins as a tree: one open cell, and then again and again a wall that touches exactly one
open cell is opened, mostly beside the cell opened last, so that corridors wind. Start and goal are
chosen at a distance drawn from the range. Then walls are opened that close loops but offer no way
as short as the path. At the end a breadth-first search counts the shortest paths of every maze.

Dims: N mazes, L cells, tokens as in data.maze_solver.
"""

from __future__ import annotations

import os
from math import isqrt
from typing import Any

import numpy as np

from trm_fast.data.building import one_kind, reusable
from trm_fast.data.format import one_puzzle_per_group, read_manifest, write_dataset
from trm_fast.data.maze_solver import (
    CHARSET,
    FAR,
    GOAL,
    OPEN,
    PATH,
    SIDES,
    START,
    WALL,
    explore,
    shortest_paths,
)
from trm_fast.symmetry import dihedral_transform

__all__ = [
    "GENERATOR_VERSION",
    "check_range",
    "generate",
    "generate_apart",
    "generate_splits",
    "longest_path",
    "maze_job_data",
    "wall_invariant",
]

GENERATOR_VERSION = 1
"""Raised whenever the same seed would give other mazes; part of the cache's request."""

_BATCH = 1024
_LOOP_ROUNDS = 3
_LOOPS = 0.06  # walls opened for loops at most, of all cells
_WANDER = 6.0  # how many openings back a corridor may branch off instead of going on, at most


def longest_path(side: int) -> int:
    """Steps that a shortest path may be asked to have: about as many as can be."""
    # No cell of a shortest path touches one that is not beside it on the path, so that for every
    # two cells of it there is about one wall.
    return side * side * 2 // 3


def check_range(side: int, low: int, high: int) -> None:
    """ValueError unless mazes of that side can have shortest paths of low to high steps."""
    if side not in SIDES:
        raise ValueError(f"size {side}: mazes have {SIDES[0]} to {SIDES[-1]} cells a side")
    most = longest_path(side)
    if not 2 <= low <= high <= most:
        raise ValueError(f"path of {low} to {high} steps: expected 2 <= min <= max <= {most}")


def generate(
    n: int,
    *,
    size: int = 10,
    path: tuple[int, int] | None = None,
    loops: tuple[int, int] | None = None,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """n mazes of `size` x `size` cells and the same with their path; two uint8 [n, L] of tokens.

    `path` = (fewest, most) steps of the shortest path, by default (size, longest_path(size));
    each maze's is drawn evenly from what its tree offers of the range. `loops` = (fewest, most)
    walls are opened to close loops, as far as there are such walls, by default 0 to 6 of a hundred
    cells; (0, 0) gives mazes in which every way is the only one. The same seed gives the same
    mazes. Raises ValueError for a range that is empty or that is hardly ever reached.
    """
    low, high = path or (size, longest_path(size))
    fewest, most = loops or (0, int(_LOOPS * size * size))
    check_range(size, low, high)
    if not 0 <= fewest <= most <= size * size:
        raise ValueError(f"loops {fewest}-{most}: expected 0 <= fewest <= most <= {size * size}")
    if n < 0:
        raise ValueError(f"cannot generate {n} mazes")
    rng = np.random.Generator(np.random.Philox(seed=[seed, size, 3]))
    boards = np.zeros((n, size * size), np.uint8)
    made = tried = 0
    while made < n:
        batch = min(_BATCH, (n - made) * (tried + 1) // (made + 1) + (16 if tried else 0))
        free = _trees(batch, size, rng)
        free, ends = _place_ends(free, low, high, rng)
        wanted = rng.integers(fewest, most + 1, len(free))
        free = _add_loops(free, ends, wanted, rng)
        fresh = np.where(free, OPEN, WALL).astype(np.uint8)
        each = np.arange(len(fresh))
        fresh[each, ends[:, 0]], fresh[each, ends[:, 1]] = START, GOAL
        fresh = fresh[: n - made]
        boards[made : made + len(fresh)] = fresh
        made, tried = made + len(fresh), tried + batch
        if tried >= 4 * _BATCH and made * 500 < tried:
            raise ValueError(
                f"path of {low} to {high} steps is hardly ever reached: {made} of {tried} mazes "
                f"of size {size}; allow shorter ones"
            )
    return boards, _solve(boards, low, high)


def _solve(boards: np.ndarray, low: int, high: int) -> np.ndarray:
    """The mazes with their path; each is proven to have one shortest path, of low..high steps."""
    lengths, counts, before = shortest_paths(boards)
    assert (counts == 1).all() and (lengths >= low).all() and (lengths <= high).all()
    after, _ = explore(boards != WALL, (boards == GOAL).argmax(1))
    on_path = before + after == lengths[:, None]
    assert (on_path.sum(1) == lengths + 1).all()
    return np.where(on_path & (boards == OPEN), np.uint8(PATH), boards)


def _trees(n: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """Cells of n random trees without a frame, no two branches side by side; bool [n, L]."""
    width = side + 2
    steps = np.array([-width, width, -1, 1])
    inside = np.zeros((width, width), bool)
    inside[1:-1, 1:-1] = True
    each = np.arange(n)
    free = np.zeros((n, width * width), bool)
    # Open neighbours of each cell; the frame can never be opened.
    touching = np.where(inside.reshape(-1), 0, 9).astype(np.int8)[None].repeat(n, 0)
    # The newest way on is taken, by an amount of chance that differs between mazes.
    rank = np.full((n, width * width), -1, np.float32)
    wander = rng.random(n, dtype=np.float32) ** 2 * np.float32(_WANDER)
    cell = np.flatnonzero(inside.reshape(-1))[rng.integers(0, side * side, n)]
    growing = np.ones(n, bool)
    for time in range(1, side * side + 1):
        rows = each[growing]
        here = cell[growing]
        free[rows, here] = True
        rank[rows, here] = -1
        touching[rows, here] = 9
        chance = rng.random((len(rows), 4), dtype=np.float32) * (1 + wander[rows, None])
        for k, step in enumerate(steps):
            beside = here + step
            touching[rows, beside] += 1
            once = touching[rows, beside] == 1
            rank[rows, beside] = np.where(once, np.float32(time) + chance[:, k], -1)
        cell = rank.argmax(1)
        growing = rank[each, cell] >= 0
        if not growing.any():
            break
    return free[:, inside.reshape(-1)]


def _place_ends(
    free: np.ndarray, low: int, high: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The mazes where the range can be kept, and cells of start and goal; bool [M, L], [M, 2].

    The start is a random cell, or the end of a longest corridor where that is too near to
    everything.
    """
    first = _random_cell(free, rng)
    distances, _ = explore(free, first)
    reach = np.where(free, distances, -1)
    near = reach.max(1) < low
    starts = np.where(near, reach.argmax(1), first)
    distances, _ = explore(free, starts)
    longest = np.where(free, distances, -1).max(1)
    kept = np.flatnonzero(longest >= low)
    free, starts, distances = free[kept], starts[kept], distances[kept]
    wanted = rng.integers(low, np.minimum(longest[kept], high) + 1)
    goals = _random_cell(free & (distances == wanted[:, None]), rng)
    ends = np.stack([starts, goals], 1)
    swapped = rng.random(len(ends)) < 0.5
    return free, np.where(swapped[:, None], ends[:, ::-1], ends)


def _random_cell(choices: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One of the true cells of each row [N, L], evenly; int64 [N]."""
    return np.where(choices, rng.random(choices.shape, dtype=np.float32), -1).argmax(1)


def _add_loops(
    free: np.ndarray, ends: np.ndarray, wanted: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Open up to wanted [N] walls that join ways, but none as short as the path; bool [N, L]."""
    each = np.arange(len(free))
    before, _ = explore(free, ends[:, 0])
    after, _ = explore(free, ends[:, 1])
    lengths = before[each, ends[:, 1]]
    for k in range(_LOOP_ROUNDS):
        through = _nearest(before) + _nearest(after) + 2
        # Between two open cells, so that one loop is closed. If one of them is nearer to both ends
        # `through` is a dead end's, and the way through it longer still.
        allowed = ~free & (through > lengths[:, None]) & (_neighbours(free) == 2)
        chance = np.where(allowed, rng.random(free.shape, dtype=np.float32), -1)
        share = wanted // _LOOP_ROUNDS + (wanted % _LOOP_ROUNDS > k)
        rank = (-chance).argsort(1, kind="stable").argsort(1, kind="stable")
        opened = free | (allowed & (rank < share[:, None]))
        new_before, counts = explore(opened, ends[:, 0])
        # Several walls together may have made a way that none of them makes alone.
        same = (new_before[each, ends[:, 1]] == lengths) & (counts[each, ends[:, 1]] == 1)
        free = np.where(same[:, None], opened, free)
        before = np.where(same[:, None], new_before, before)
        after = np.where(same[:, None], explore(opened, ends[:, 1])[0], after)
    return free


def _around(cells: np.ndarray, outside: int) -> list[np.ndarray]:
    """The four neighbours of every cell of [N, L], `outside` beyond the edge; four [N, s, s]."""
    n, side = len(cells), isqrt(cells.shape[1])
    frame = np.full((n, side + 2, side + 2), outside, cells.dtype)
    frame[:, 1:-1, 1:-1] = cells.reshape(n, side, side)
    return [
        frame[:, :-2, 1:-1],
        frame[:, 2:, 1:-1],
        frame[:, 1:-1, :-2],
        frame[:, 1:-1, 2:],
    ]


def _nearest(distances: np.ndarray) -> np.ndarray:
    """The smallest distance among the neighbours of each cell; int32 [N, L]."""
    least: np.ndarray = np.minimum.reduce(_around(distances, int(FAR)))
    return least.reshape(distances.shape).astype(np.int32)


def _neighbours(free: np.ndarray) -> np.ndarray:
    """How many neighbours of each cell are open; uint8 [N, L]."""
    up, down, left, right = _around(free.astype(np.uint8), 0)
    return (up + down + left + right).reshape(free.shape)


def wall_invariant(boards: np.ndarray) -> np.ndarray:
    """uint64 [N]: equal for mazes [N, L] whose walls some symmetry of the square makes equal.

    Different values are proof of different walls; start and goal do not count.
    """
    side = isqrt(boards.shape[1])
    weights = np.random.Generator(np.random.Philox(seed=[side, 4])).integers(
        0, 1 << 64, (side, side), np.uint64
    )
    images = np.stack([dihedral_transform(weights, k).reshape(-1) for k in range(8)], 1)
    walls = (boards == WALL).astype(np.uint64)
    kinds: np.ndarray = (walls @ images).min(1)
    return kinds


def generate_apart(
    n: int,
    avoid: np.ndarray,
    *,
    size: int = 10,
    path: tuple[int, int] | None = None,
    loops: tuple[int, int] | None = None,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """As generate, but every wall_invariant is new: not in `avoid` (uint64) and not repeated.

    For held-out mazes: none has the walls of a training maze, turned or mirrored. Raises ValueError
    where there are too few mazes for that.
    """
    boards, answers = generate(n, size=size, path=path, loops=loops, seed=seed)
    for attempt in range(1, 20):
        kinds = wall_invariant(boards)
        known = np.isin(kinds, avoid)
        known[np.setdiff1d(np.arange(n), np.unique(kinds, return_index=True)[1])] = True
        again = np.flatnonzero(known)
        if again.size == 0:
            return boards, answers
        more = generate(again.size, size=size, path=path, loops=loops, seed=seed + attempt * 7919)
        boards[again], answers[again] = more
    raise ValueError(f"no {n} mazes of size {size} that differ from the given ones were found")


def generate_splits(
    train: int,
    test: int,
    *,
    size: int = 10,
    path: tuple[int, int] | None = None,
    loops: tuple[int, int] | None = None,
    seed: int = 0,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mazes and answers by split, see generate; "test" only if it has any, apart from "train"."""
    splits = {"train": generate(train, size=size, path=path, loops=loops, seed=seed)}
    if test:
        taken = wall_invariant(splits["train"][0])
        held = generate_apart(test, taken, size=size, path=path, loops=loops, seed=seed + 1_000_003)
        assert not np.isin(wall_invariant(held[0]), taken).any()
        splits["test"] = held
    return splits


def maze_job_data(
    root: str | os.PathLike[str], *, seed: int, train_boards: int = 20000, test_boards: int = 500
) -> dict[str, Any]:
    """The data of the preset maze-mini, written to `root` unless it is there already.

    10x10 mazes with a path of 10 steps or more. train: without loops, set "all"; test: sets
    "perfect", without loops, and "loops", with 3 to 6, test_boards each; none has the walls of a
    training maze, turned or mirrored. Returns the manifest. A folder whose manifest has the same
    request and whose files are intact is reused. Raises DataError if `root` holds something else.
    """
    test_loops = {"perfect": (0, 0), "loops": (3, 6)}
    request = {
        "source": "generated",
        "job": "maze-mini",
        "generator_version": GENERATOR_VERSION,
        "seed": seed,
        "train": {"all": {"boards": train_boards, "loops": [0, 0]}},
        "test": {
            name: {"boards": test_boards, "loops": list(loops)}
            for name, loops in test_loops.items()
        },
    }
    manifest = reusable(root, request)
    if manifest is not None:
        return manifest
    boards, answers = generate(train_boards, loops=(0, 0), seed=seed)
    taken = wall_invariant(boards)
    train = {"all": one_puzzle_per_group(boards, answers)}
    test = {}
    for k, (name, loops) in enumerate(test_loops.items(), 1):
        boards, answers = generate_apart(test_boards, taken, loops=loops, seed=seed + k * 1_000_003)
        taken = np.concatenate([taken, wall_invariant(boards)])
        test[name] = one_puzzle_per_group(boards, answers)
    splits = {
        "train": (one_kind(len(CHARSET) + 1, 100, train_boards), train),
        "test": (one_kind(len(CHARSET) + 1, 100, len(test) * test_boards, tuple(test)), test),
    }
    write_dataset(root, splits, manifest={"request": request})
    manifest = read_manifest(root)
    assert manifest is not None
    return manifest
