"""Shortest paths through grid mazes: distances, how many there are, and whether an answer is one.

Owns the search that the generator proves its mazes with and the rule that judges answers. May be
imported by the other maze modules and by rules; imports numpy only.

A maze is a row of L = side * side tokens, read left to right, top to bottom: 0 padding, 1 wall
`#`, 2 open, 3 start `S`, 4 goal `G`, 5 path `o`. A step goes to one of the four neighbours. The
length of a path is its number of steps, so that a shortest path of length D has D - 1 cells `o`.

Dims: N mazes, L cells.
"""

from __future__ import annotations

from math import isqrt

import numpy as np

__all__ = [
    "CHARSET",
    "FAR",
    "GOAL",
    "OPEN",
    "PATH",
    "SIDES",
    "START",
    "WALL",
    "explore",
    "is_maze",
    "leads_to_goal",
    "maze_rules",
    "shortest_paths",
]

CHARSET = "# SGo"
"""Character of token t at position t - 1, as the official builder has it."""

WALL, OPEN, START, GOAL, PATH = range(1, 6)
SIDES = range(5, 101)
"""Sides of mazes. One of 4 would have the number of tokens and of values of 4x4 Sudoku."""

FAR = np.int16(1 << 14)
"""Distance of a cell that cannot be reached; the sum of two of them is still an int16's."""

_CHUNK = 2048


def explore(free: np.ndarray, sources: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Breadth-first search from one cell of each maze.

    Args:
        free: [N, L] bool, cells that may be entered.  sources: [N] int, a cell each.

    Returns:
        distances [N, L] int16 (FAR where there is no way), and the number of shortest paths from
        the source [N, L] uint8: 0, 1, or 2 for two and more.
    """
    distances = np.full(free.shape, FAR, np.int16)
    counts = np.zeros(free.shape, np.uint8)
    for start in range(0, len(free), _CHUNK):
        rows = slice(start, start + _CHUNK)
        distances[rows], counts[rows] = _explore(free[rows], sources[rows])
    return distances, counts


def _explore(free: np.ndarray, sources: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    n, side = len(free), isqrt(free.shape[1])
    # Mazes along the last axis and a frame of zeros: the neighbours of all cells are slices.
    unseen = np.ascontiguousarray(free.T).reshape(side, side, n).astype(np.uint8)
    wave = np.zeros((side + 2, side + 2, n), np.uint8)
    wave[1 + sources // side, 1 + sources % side, np.arange(n)] = 1
    inner = wave[1:-1, 1:-1]
    distances = np.full(unseen.shape, FAR, np.int16)
    counts = np.zeros(unseen.shape, np.uint8)
    for distance in range(side * side):
        reached = inner != 0
        if not reached.any():
            break
        np.copyto(distances, np.int16(distance), where=reached)
        counts += inner
        unseen[reached] = 0
        following = wave[:-2, 1:-1] + wave[2:, 1:-1]
        following += wave[1:-1, :-2]
        following += wave[1:-1, 2:]
        np.minimum(following, 2, out=following)
        np.multiply(following, unseen, out=inner)
    return distances.reshape(-1, n).T, counts.reshape(-1, n).T


def is_maze(boards: np.ndarray) -> np.ndarray:
    """Whether boards [N, L] consist of walls, open cells, one start and one goal; bool [N]."""
    known = (boards >= WALL) & (boards <= GOAL)
    return known.all(1) & ((boards == START).sum(1) == 1) & ((boards == GOAL).sum(1) == 1)


def shortest_paths(boards: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The length of the shortest path of each maze [N, L] and how many there are.

    Returns (lengths [N] int16, FAR without a way; counts [N] uint8, at most 2; distances [N, L]
    int16 from the start). Mazes as `is_maze` has them.
    """
    each = np.arange(len(boards))
    distances, counts = explore(boards != WALL, (boards == START).argmax(1))
    goals = (boards == GOAL).argmax(1)
    return distances[each, goals], counts[each, goals], distances


def maze_rules(inputs: np.ndarray, preds: np.ndarray) -> np.ndarray:
    """Whether answers mark some shortest path: tokens [N, L] and [N, L] -> bool [N].

    Right is an answer that differs from the maze only in open cells that became path, these cells
    being exactly a path from start to goal than which there is no shorter one. So of several
    shortest paths any is right. False where the input is no maze or has no way to its goal.
    """
    inputs, preds = np.asarray(inputs), np.asarray(preds)
    marked = preds == PATH
    right = is_maze(inputs) & (np.where(marked, OPEN, preds) == inputs).all(1)
    rows = np.flatnonzero(right)
    if rows.size:
        lengths, _, distances = shortest_paths(inputs[rows])
        marked, goals = marked[rows], inputs[rows] == GOAL
        # One cell nearer to the start beside every cell of the path and the goal leads back from
        # there in as few steps as can be; no cell is left over if there are as many as steps.
        on_path = marked | goals
        nearer = _beside(np.where(marked | (inputs[rows] == START), distances, FAR), distances)
        right[rows] = (lengths < FAR) & (marked.sum(1) == lengths - 1) & (nearer | ~on_path).all(1)
    return right


def _beside(kept: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """Whether a neighbour's value in `kept` is one less than the cell's distance; bool [N, L]."""
    n, side = len(kept), isqrt(kept.shape[1])
    frame = np.full((n, side + 2, side + 2), FAR, np.int16)
    frame[:, 1:-1, 1:-1] = kept.reshape(n, side, side)
    before = distances.reshape(n, side, side) - 1
    found = (frame[:, :-2, 1:-1] == before) | (frame[:, 2:, 1:-1] == before)
    found |= (frame[:, 1:-1, :-2] == before) | (frame[:, 1:-1, 2:] == before)
    return found.reshape(n, -1)


def leads_to_goal(answers: np.ndarray) -> np.ndarray:
    """Whether the path cells of answers [N, L] join start and goal, none apart; bool [N]."""
    used = (answers == PATH) | (answers == START) | (answers == GOAL)
    distances, _ = explore(used, (answers == START).argmax(1))
    return ((distances < FAR) == used).all(1)
