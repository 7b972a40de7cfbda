"""The maze generator and the search behind it: one shortest path, as long as asked for."""

from collections import deque

import numpy as np
import pytest

from trm_fast.data.format import read_split
from trm_fast.data.maze_generator import (
    check_range,
    generate,
    generate_apart,
    generate_splits,
    longest_path,
    maze_job_data,
    wall_invariant,
)
from trm_fast.data.maze_solver import (
    FAR,
    GOAL,
    OPEN,
    PATH,
    START,
    WALL,
    explore,
    is_maze,
    leads_to_goal,
    maze_rules,
    shortest_paths,
)
from trm_fast.symmetry import dihedral_transform


def plain_search(free: np.ndarray, source: int) -> tuple[list[int], list[int]]:
    """Distances (FAR for none) and numbers of shortest paths, cell by cell in Python."""
    side = int(len(free) ** 0.5)
    distances, counts, waiting = [int(FAR)] * len(free), [0] * len(free), deque([source])
    distances[source], counts[source] = 0, 1
    while waiting:
        cell = waiting.popleft()
        row, column = divmod(cell, side)
        for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            beside = r * side + c
            if not (0 <= r < side and 0 <= c < side and free[beside]):
                continue
            if distances[beside] == FAR:
                distances[beside] = distances[cell] + 1
                waiting.append(beside)
            if distances[beside] == distances[cell] + 1:
                counts[beside] += counts[cell]
    return distances, counts


@pytest.mark.parametrize("density", [0.0, 0.3, 0.6])
def test_the_search_equals_a_plain_one(density: float) -> None:
    rng = np.random.default_rng(1)
    free = rng.random((20, 49)) >= density
    sources = rng.integers(0, 49, 20)
    free[np.arange(20), sources] = True
    distances, counts = explore(free, sources)
    for i in range(20):
        want = plain_search(free[i], sources[i])
        assert distances[i].tolist() == want[0]
        assert counts[i].tolist() == [min(count, 2) for count in want[1]]


def test_many_mazes_are_explored_like_few() -> None:
    free = np.random.default_rng(2).random((2100, 25)) > 0.3
    free[:, 3] = True
    sources = np.full(2100, 3)
    whole = explore(free, sources)
    for part, at_once in zip(explore(free[2040:], sources[2040:]), whole, strict=True):
        np.testing.assert_array_equal(part, at_once[2040:])


RANGES = [(10, None), (10, (2, 3)), (12, (40, 60)), (5, (5, 12)), (21, (60, 80))]


@pytest.mark.parametrize(("size", "path"), RANGES, ids=str)
def test_the_shortest_path_is_the_only_one_and_in_the_range(size, path) -> None:
    boards, answers = generate(60, size=size, path=path, seed=1)
    assert boards.dtype == answers.dtype == np.uint8 and boards.shape == (60, size * size)
    assert is_maze(boards).all()
    low, high = path or (size, longest_path(size))
    for board, answer in zip(boards, answers, strict=True):
        distances, counts = plain_search(board != WALL, int((board == START).argmax()))
        goal = int((board == GOAL).argmax())
        assert counts[goal] == 1 and low <= distances[goal] <= high
        assert (answer == PATH).sum() == distances[goal] - 1
    changed = boards != answers
    assert (boards[changed] == OPEN).all() and (answers[changed] == PATH).all()
    assert leads_to_goal(answers).all() and maze_rules(boards, answers).all()


def loops_of(boards: np.ndarray) -> np.ndarray:
    """Independent loops of mazes without unreachable cells: joints - cells + 1, 0 for a tree."""
    side = int(boards.shape[1] ** 0.5)
    free = (boards != WALL).reshape(-1, side, side)
    joints = (free[:, 1:] & free[:, :-1]).sum((1, 2))
    joints += (free[:, :, 1:] & free[:, :, :-1]).sum((1, 2))
    return joints - free.sum((1, 2)) + 1


@pytest.mark.parametrize("loops", [(0, 0), (1, 3), (6, 6)], ids=str)
def test_loops_are_as_many_as_asked_for(loops) -> None:
    boards, _ = generate(200, size=12, path=(10, 30), loops=loops, seed=2)
    found = loops_of(boards)
    # Some mazes have no wall left to open; two walls side by side close a loop more.
    assert (found >= loops[0]).mean() > 0.9 and (found <= loops[1]).mean() > 0.7
    assert found.max() <= 2 * loops[1]
    distances, _ = explore(boards != WALL, (boards == START).argmax(1))
    assert ((distances < FAR) == (boards != WALL)).all(), "no cell is cut off"


def test_lengths_and_places_are_spread() -> None:
    boards, _ = generate(300, size=10, path=(6, 20), seed=2)
    lengths = shortest_paths(boards)[0]
    assert (np.bincount(lengths, minlength=21)[6:] > 4).all()
    for token in (WALL, START, GOAL):
        share = (boards == token).mean(0)
        assert share.max() < 10 * share.mean() and (share > 0).mean() > 0.9


def test_the_seed_decides() -> None:
    first, again, other = (generate(30, seed=seed)[0] for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert not (first == other).all(1).any()
    np.testing.assert_array_equal(generate(10, seed=5)[0].shape, (10, 100))
    assert generate(0)[0].shape == (0, 100)


def test_kinds_of_walls_are_those_up_to_symmetry() -> None:
    boards, answers = generate(40, size=7, seed=3)
    kinds = wall_invariant(boards)
    assert np.unique(kinds).size == 40
    for k in range(8):
        images = dihedral_transform(boards.reshape(-1, 7, 7), k).reshape(40, 49)
        np.testing.assert_array_equal(wall_invariant(images), kinds)
    # Neither start and goal nor the path count.
    np.testing.assert_array_equal(wall_invariant(answers), kinds)


def test_held_out_mazes_are_none_of_the_others_turned() -> None:
    seen = generate(200, size=5, path=(2, 4), seed=0)[0]
    taken = wall_invariant(seen)
    boards, answers = generate_apart(200, taken, size=5, path=(2, 4), seed=1)
    plain = generate(200, size=5, path=(2, 4), seed=1)[0]
    assert np.isin(wall_invariant(plain), taken).any(), "else this test shows nothing"
    kinds = wall_invariant(boards)
    assert not np.isin(kinds, taken).any() and np.unique(kinds).size == 200
    assert maze_rules(boards, answers).all()
    parts = generate_splits(50, 20, size=6, seed=4)
    assert [len(parts[name][0]) for name in ("train", "test")] == [50, 20]
    assert list(generate_splits(5, 0, size=6, seed=4)) == ["train"]


@pytest.mark.parametrize(
    ("size", "path", "message"),
    [
        (4, (2, 3), "size 4: mazes have 5 to 100 cells a side"),
        (101, (2, 3), "size 101"),
        (10, (1, 5), "path of 1 to 5 steps: expected 2 <= min <= max <= 66"),
        (10, (6, 5), "path of 6 to 5 steps"),
        (10, (6, 67), "path of 6 to 67 steps"),
    ],
)
def test_ranges_that_cannot_be(size, path, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_range(size, *path)


def test_the_job_s_data_is_cached_and_apart(tmp_path) -> None:
    root = tmp_path / "mini"

    def make(seed: int) -> dict:
        return maze_job_data(root, seed=seed, train_boards=60, test_boards=20)

    manifest = make(1)
    metadata, train = read_split(root, "train")
    assert (metadata.vocab_size, metadata.seq_len, metadata.total_groups) == (6, 100, 60)
    metadata, test = read_split(root, "test")
    assert metadata.sets == ("perfect", "loops") and metadata.total_groups == 40
    assert (loops_of(np.array(test["perfect"].inputs)) == 0).all()
    assert (loops_of(np.array(test["loops"].inputs)) > 0).mean() > 0.9
    held = np.concatenate([wall_invariant(np.array(arrays.inputs)) for arrays in test.values()])
    assert not np.isin(held, wall_invariant(np.array(train["all"].inputs))).any()
    assert np.unique(held).size == 40

    stamp = (root / "manifest.json").stat().st_mtime_ns
    assert make(1) == manifest and (root / "manifest.json").stat().st_mtime_ns == stamp
    (root / "train/all__labels.npy").write_bytes(b"damaged")
    assert make(1) == manifest
    read_split(root, "train")
    assert make(2) != manifest
