"""The maze builder: official bytes for official choices, every fault named, generated sets."""

from pathlib import Path

import numpy as np
import pytest
from builders import (
    HEADER,
    assert_row_4_is_bad,
    assert_same_files,
    assert_unfit,
    digests,
    official_build,
    save,
)

from trm_fast.data.format import DataError, read_manifest, read_split, verify_manifest
from trm_fast.data.maze import BuildOptions, build, main
from trm_fast.data.maze_generator import wall_invariant
from trm_fast.data.maze_solver import maze_rules, shortest_paths
from trm_fast.data.maze_source import read_mazes, tokens_of
from trm_fast.symmetry import dihedral_transform

SIDE = 6
MAZES = [
    ("    ##   #     #S  # # #G##       # ", "    ##   #     #S  # #o#G##oo oooo# "),
    (" ##  G  #  ##  #   # # # S      #   ", " ## oG  # o##  #o  # #o# Sooo   #   "),
    ("##S   # # #    #     #G# #       #  ", "##Sooo# # #o   #oo   #G# #       #  "),
    (" #       #   ##S  G## #    #       #", " #ooo ooo#o o##So G## #    #       #"),
    ("   # S    #     #    #  #   # G #   ", "   # S    #o    #o   # o#ooo#oGo#ooo"),
    ("     # #S#    # # #      ####  G    ", "  ooo# #S#oo  # #o#    o ####o Goooo"),
    (" S#   #  ##   #    #     # #    G   ", " S#   #o ## oo#   o#    o# #  ooG   "),
    ("     G # ##    #    #  #    # #   S ", "     G # ##o   #oo  #oo#   o# #  oS "),
    ("   G     ##  #     # ##        #  #S", "   Goo   ##o #   o # ##o     o #  #S"),
    ("    G  #### #  S#   #       #  #    ", "    Go ####o#  S#o  #ooo    #  #    "),
    ("     S ### #    # #      G  #  #    ", "oooooSo### #oo  # #o     G  #  #    "),
    ("#  #    #     #    #G #   ##    S  #", "#  #    #     #ooo #Go#o  ##oo  Soo#"),
]
BOARDS, ANSWERS = (tokens_of([pair[k] for pair in MAZES]) for k in (0, 1))
Q, A = MAZES[0]


def rows(start: int = 0, stop: int = 12) -> list[str]:
    return [f"own,{question},{answer},7" for question, answer in MAZES[start:stop]]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    save(folder / "train.csv", [HEADER, *rows(0, 8)])
    save(folder / "test.csv", [HEADER, *rows(8)])
    return folder


# Bytes written by the official builder (commit e7b6871) after numpy.random.seed(5).
CHOICES = {"augmented": {"subsample_size": 5, "aug": True}, "plain": {}}
GOLDEN = {
    "augmented": {
        "all__group_indices.npy": "8b2796b48578",
        "all__inputs.npy": "8a385d394e06",
        "all__labels.npy": "f1a005003909",
        "all__puzzle_identifiers.npy": "491eda339bbb",
        "all__puzzle_indices.npy": "1652a65162ad",
    },
    "plain": {
        "all__group_indices.npy": "fcf3e376923b",
        "all__inputs.npy": "24fedbd05246",
        "all__labels.npy": "c75d0183420a",
        "all__puzzle_identifiers.npy": "e85567acdebf",
        "all__puzzle_indices.npy": "fcf3e376923b",
    },
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_files_are_the_official_ones(source: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    build(BuildOptions(str(out), source=str(source), seed=5, **CHOICES[name]))
    arrays = {k: v for k, v in digests(out).items() if k.endswith(".npy")}
    assert arrays == GOLDEN[name]


@pytest.mark.parametrize("name", CHOICES)
def test_live_equality_with_the_official_builder(
    official_path: Path, source: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    official_build("maze", official_path, source, theirs, monkeypatch, **CHOICES[name])
    build(BuildOptions(str(ours), source=str(source), seed=5, **CHOICES[name]))
    assert_same_files(theirs, ours)


def test_augmented_mazes_are_the_eight_images_of_their_group(source: Path, tmp_path: Path) -> None:
    build(BuildOptions(str(tmp_path / "out"), source=str(source), aug=True))
    metadata, sets = read_split(tmp_path / "out", "train")
    assert (metadata.seq_len, metadata.vocab_size, metadata.total_groups) == (SIDE**2, 6, 8)
    assert sets["all"].inputs.dtype == sets["all"].labels.dtype == np.uint8
    inputs, labels = (
        np.array(part).reshape(8, 8, SIDE, SIDE)
        for part in (sets["all"].inputs, sets["all"].labels)
    )
    for k in range(8):
        np.testing.assert_array_equal(
            inputs[:, k], dihedral_transform(BOARDS[:8].reshape(-1, SIDE, SIDE), k)
        )
    flat = inputs.reshape(64, -1), labels.reshape(64, -1)
    assert maze_rules(*flat).all() and np.unique(flat[0], axis=0).shape[0] == 64
    assert np.diff(sets["all"].group_indices).tolist() == [8] * 8
    # The test split is never augmented.
    assert read_split(tmp_path / "out", "test")[1]["all"].inputs.shape == (4, SIDE**2)


def test_columns_may_be_quoted_and_in_another_order(tmp_path: Path) -> None:
    lines = ["Answer,question", *(f'"{a}",{q}' for q, a in MAZES)]
    path = tmp_path / "p.csv"
    path.write_text("\ufeff" + "\r\n".join(lines) + "\r\n\r\n")
    mazes = read_mazes(path)
    np.testing.assert_array_equal(mazes.boards, BOARDS)
    np.testing.assert_array_equal(mazes.grids, ANSWERS)


def changed(maze: str, cell: int, character: str) -> str:
    return maze[:cell] + character + maze[cell + 1 :]


STEP, WALL, START = A.index("o"), Q.index("#"), Q.index("S")
BAD_ROWS = [
    (f"x,{Q[:-1]},{A},1", "35 characters, expected 36"),
    (f"x,{Q},{A} ,1", "answer of 37 characters, expected 36"),
    (f"x,{changed(Q, STEP, 'x')},{A},1", "character 'x', expected one of '# SGo'"),
    (f"x,{changed(Q, STEP, 'é')},{A},1", "expected one of"),
    (f"x,{Q},{changed(A, STEP, '.')},1", "character '.', expected one of '# SGo'"),
    (f"x,{A},{A},1", "a path in the question"),
    (f"x,{changed(Q, START, ' ')},{A},1", "expected one start S and one goal G"),
    (f"x,{changed(Q, STEP, 'S')},{A},1", "expected one start S and one goal G"),
    (f"x,{Q},{changed(A, WALL, 'o')},1", "the answer is another maze"),
    (f"x,{Q},{MAZES[1][1]},1", "the answer is another maze"),
    (f"x,{Q},{changed(A, STEP, ' ')},1", "the answer's path does not lead from S to G"),
    (f"x,{Q},{Q},1", "the answer's path does not lead from S to G"),
    (f"x,{Q},{A}", "3 columns, expected 4"),
    (f'x,"{Q},{A},1', "2 columns, expected 4"),
    (f"x,{Q},{A},1,2", "5 columns, expected 4"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_a_bad_row_is_named_or_skipped(tmp_path: Path, row: str, message: str) -> None:
    path = save(tmp_path / "p.csv", [HEADER, *rows(0, 2), row, *rows(2, 4)])
    assert_row_4_is_bad(read_mazes, path, message, BOARDS[:4])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "row 1: columns '', expected source,question,answer,rating"),
        (HEADER + "\n", "no mazes to use"),
        ("a,b\n1,2\n", "row 1: columns 'a,b', expected"),
        (f"question,answer\n{' ' * 40000}\n", "row 2: longer than 32768 characters"),
        (f"question,answer\n{' ' * 16},{' ' * 16}\n", "row 2: 16 characters, expected the square"),
        ("question,answer\n\x00\x01,\x02\n", "row 2: 2 characters"),
        ('question,answer\n"\n', "row 2: "),
    ],
)
def test_unfit_files(tmp_path: Path, content: str, message: str) -> None:
    assert_unfit(read_mazes, tmp_path / "p.csv", content, message)


def test_files_of_any_bytes_are_one_line(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    good = "\n".join([HEADER, *rows(0, 3)]).encode()
    for _ in range(60):
        data = np.frombuffer(good, np.uint8).copy()
        data[rng.integers(0, len(data), 3)] = rng.integers(0, 256, 3)
        (tmp_path / "p.csv").write_bytes(data.tobytes())
        try:
            assert len(read_mazes(tmp_path / "p.csv").boards) > 0
        except DataError as error:
            assert "\n" not in str(error)


def test_roundabout_answers_are_kept_and_counted(tmp_path: Path) -> None:
    open_maze = "S   G" + " " * 20
    shortest, longer = "SoooG" + " " * 20, "So oG" + " ooo " + " " * 15
    block = "S " + " " * 22 + "G"
    corner = "Soooo" + "    o" * 3 + "    G"
    lines = [f"{open_maze},{shortest}", f"{open_maze},{longer}", f"{block},{corner}"]
    save(tmp_path / "train.csv", ["question,answer", *lines])
    save(tmp_path / "test.csv", ["question,answer", lines[0]])
    manifest = build(BuildOptions(str(tmp_path / "out"), source=str(tmp_path)))
    assert manifest["paths_in_source"] == {
        "train": {"several_shortest": 1, "not_shortest": 1},
        "test": {"several_shortest": 0, "not_shortest": 0},
    }
    assert manifest["counts"]["train"]["groups"] == 3
    single = BuildOptions(str(tmp_path / "out"), source=str(tmp_path / "train.csv"), test_size=1)
    assert build(single)["paths_in_source"] == {"train": {"several_shortest": 1, "not_shortest": 1}}


def test_the_command_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    with (source / "train.csv").open("a") as file:
        file.write(BAD_ROWS[0][0] + "\n")
    command = ["--source", str(source), "--output-dir", str(out), "--subsample-size", "3"]
    assert main(command) == 2 and not out.exists()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "train.csv row 10: 35 characters" in error
    assert main([*command, "--skip-bad", "--aug"]) == 0
    shown = capsys.readouterr()
    assert "train: 3 puzzles, 24 examples, 1 bad rows skipped" in shown.out
    assert "test: 4 puzzles, 4 examples" in shown.out
    manifest = read_manifest(out)
    assert manifest is not None and verify_manifest(out, manifest) is None
    assert manifest["subset"] == {"of": 8, "kept": 3} and manifest["options"]["aug"] is True
    assert main([*command, "--skip-bad", "--no-aug"]) == 0
    assert read_split(out, "train")[1]["all"].inputs.shape == (3, SIDE**2)
    save(source / "test.csv", [HEADER, f"x,{'S' + ' ' * 23 + 'G'},{'S' + ' ' * 23 + 'G'},1"])
    assert main([*command, "--skip-bad"]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_generated_mazes_keep_the_range_and_the_test_set_is_apart(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    arguments = ["--generate", "60", "--test-size", "20", "--size", "6", "--min-path", "7"]
    assert main(["--output-dir", out, *arguments, "--max-path", "9", "--seed", "3"]) == 0
    parts = [read_split(out, split)[1]["all"] for split in ("train", "test")]
    assert [len(part.inputs) for part in parts] == [60, 20]
    for part in parts:
        lengths, counts, _ = shortest_paths(np.array(part.inputs))
        assert set(lengths.tolist()) == {7, 8, 9} and (counts == 1).all()
        assert maze_rules(np.array(part.inputs), np.array(part.labels)).all()
    kinds = [wall_invariant(np.array(part.inputs)) for part in parts]
    assert not np.isin(kinds[1], kinds[0]).any() and np.unique(kinds[1]).size == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--generate", "0"], "generate is 0, expected at least 1"),
        (["--generate", "5", "--size", "4"], "size 4: mazes have 5 to 100 cells a side"),
        (["--generate", "5", "--min-path", "1"], "path of 1 to 66 steps: expected 2 <= min"),
        (["--generate", "5", "--max-path", "67"], "path of 10 to 67 steps: expected 2 <= min"),
        (["--generate", "5", "--source", "x"], "give only one of"),
        (["--source", "nowhere.csv"], "nowhere.csv: No such file"),
        (["--source", "x", "--min-path", "30"], "for generated mazes only"),
        (["--source", "x", "--loops", "3"], "for generated mazes only"),
        (["--generate", "5", "--loops", "x"], "loops 'x': expected a number or a range"),
        (["--generate", "5", "--loops", "5-3"], "loops 5-3: expected 0 <= fewest"),
        (["--source", "x", "--size", "3"], "size 3: mazes have"),
        (["--generate", "5", "--seed", "-1"], "seed is -1"),
        (["--generate", "99999999999999"], "not enough memory for so many puzzles"),
        (["--generate", "5", "--min-path", "65"], "path of 65 to 66 steps is hardly ever reached"),
    ],
)
def test_wrong_options_exit_2(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["--output-dir", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
