"""The Sudoku builder: official bytes for official choices, every dialect, every fault named."""

import sys
from pathlib import Path
from types import SimpleNamespace

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

from trm_fast.data import sudoku_source
from trm_fast.data.format import DataError, read_manifest, read_split, verify_manifest
from trm_fast.data.sudoku import BuildOptions, build, main
from trm_fast.data.sudoku_generator import generate
from trm_fast.data.sudoku_solver import rules_hold, solve
from trm_fast.data.sudoku_source import read_puzzles
from trm_fast.symmetry import grid_invariant


def texts(boards: np.ndarray, blank: str = ".") -> list[str]:
    return ["".join(blank if d == 0 else str(d) for d in board) for board in boards]


QUESTIONS = [
    ".71.359..4.5.982....2.4783..1..7.....9..82.53...5.....2.6.5..1....826...7.....5.2",
    "...8..5..83.....4...73..918658.4.3.9.2.59....4.92..85.7.3482....86.5...71........",
    "..59..8........3..3.......6.41.8.2.7.7..51....384..5617248..9..1.......59.3..7...",
    ".2149...5.74...382.58.2..19.4......7.965...3...391.5..8.26.....41.8.296..6.....4.",
    "8.573..9...7.59.1..3.......3..42..8..84.7.5.1...31.47..1...7..8..8.9.3..........5",
    ".9....8245.....97....8.753194.62..83....5.2.917...864585.4.....2...76..8.6.3.945.",
    ".98....52....98...6....1984.45...7..2.97..8.1.....24.5..4..35...1.8542..8...7...3",
    "3.76......8..956..5....7..3...4..36.7.48..2.19...1.7....578..3...39....68......9.",
    "8.7.649.5..2...46..56.93......65.2342.37....6...31..8...9.8..1...89..542.14......",
    "..2....18..3....6.5..2..4....4...8.92......7..3.75...6...5.718..27.48..5..51.692.",
    "6....74...87246.....4..57..4.16.3.98.9.754.2.....8........68....5....6.9946572.1.",
    "2.6.95...74.1.8.......7.25..5..378....7.14.2.4.385..7.9...4..3..7.2..46...45.9.18",
]
BOARDS = np.array([[int(c) for c in text.replace(".", "0")] for text in QUESTIONS], np.uint8)
GRIDS = solve(BOARDS).boards
ANSWERS = texts(GRIDS)
RATINGS = [5, 0, 30, 12, 7, 100, 3, 8, 41, 2, 19, 11]


def rows(start: int = 0, stop: int = 12) -> list[str]:
    return [f"own,{QUESTIONS[i]},{ANSWERS[i]},{RATINGS[i]}" for i in range(start, stop)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    save(folder / "train.csv", [HEADER, *rows(0, 8)])
    save(folder / "test.csv", [HEADER, *rows(8)])
    return folder


# Bytes written by the official builder (commit e7b6871) after numpy.random.seed(5).
CHOICES = {
    "augmented": {"subsample_size": 5, "num_aug": 7},
    "plain": {"min_difficulty": 4},
}
GOLDEN = {
    "augmented": {
        "all__group_indices.npy": "8b2796b48578",
        "all__inputs.npy": "dbd8413e91cf",
        "all__labels.npy": "921d21918118",
        "all__puzzle_identifiers.npy": "491eda339bbb",
        "all__puzzle_indices.npy": "1652a65162ad",
    },
    "plain": {
        "all__group_indices.npy": "4b6d6b0bc431",
        "all__inputs.npy": "e27eef942d83",
        "all__labels.npy": "a6cc02217286",
        "all__puzzle_identifiers.npy": "cde1d14bbeaf",
        "all__puzzle_indices.npy": "4b6d6b0bc431",
    },
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_files_are_the_official_ones(source: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    build(BuildOptions(str(out), source=str(source), seed=5, **CHOICES[name]))
    arrays = {k: v for k, v in digests(out).items() if k.endswith(".npy")}
    assert arrays == GOLDEN[name]
    dtype = np.int64 if "num_aug" in CHOICES[name] else np.uint8
    assert read_split(out, "train")[1]["all"].inputs.dtype == dtype
    assert read_split(out, "test")[1]["all"].inputs.dtype == np.uint8


def test_augmented_boards_are_images_of_their_group(source: Path, tmp_path: Path) -> None:
    options = BuildOptions(str(tmp_path / "out"), source=str(source), num_aug=20, compact=True)
    build(options)
    metadata, sets = read_split(tmp_path / "out", "train")
    arrays = sets["all"]
    assert metadata.total_groups == 8 and arrays.inputs.shape == (8 * 21, 81)
    assert arrays.inputs.dtype == arrays.labels.dtype == np.uint8
    boards, grids = np.array(arrays.inputs) - 1, np.array(arrays.labels) - 1
    np.testing.assert_array_equal(boards[::21], BOARDS[:8])
    assert rules_hold(boards, grids).all()
    kinds = grid_invariant(grids).reshape(8, 21)
    assert (kinds == kinds[:, :1]).all()
    assert np.unique(boards, axis=0).shape == boards.shape


@pytest.mark.parametrize("blank", [".", "0"])
def test_all_dialects_hold_the_same_puzzles(tmp_path: Path, blank: str) -> None:
    questions = texts(BOARDS, blank)
    pairs = list(zip(questions, ANSWERS, strict=True))
    files = {
        "named": [HEADER, *(f"x,{q},{a},1" for q, a in pairs)],
        "swapped": ["answer,question", *(f"{a},{q}" for q, a in pairs)],
        "unanswered": ["question,answer", *(f"{q}," for q, _ in pairs)],
        "kaggle": ["quizzes,solutions", *(f'"{q}","{a}"' for q, a in pairs)],
        "bare": ["# a comment", *questions, ""],
    }
    for name, lines in files.items():
        puzzles = read_puzzles(save(tmp_path / name, lines))
        np.testing.assert_array_equal(puzzles.boards, BOARDS, err_msg=name)
        np.testing.assert_array_equal(puzzles.grids, GRIDS, err_msg=name)


def test_small_boards_are_read(tmp_path: Path) -> None:
    for size in (4, 6):
        boards, grids = generate(5, size=size, clues=(size * 2, size * 3), seed=1)
        puzzles = read_puzzles(save(tmp_path / "small", texts(boards)))
        np.testing.assert_array_equal(puzzles.grids, grids)
        with pytest.raises(DataError, match="row 1: .* characters, expected 81"):
            read_puzzles(tmp_path / "small", size=9)


def changed(text: str, cell: int, character: str) -> str:
    return text[:cell] + character + text[cell + 1 :]


def clue(board: int = 0) -> int:
    return int(np.flatnonzero(BOARDS[board])[0])


CLASHING = changed("." * 81, 0, "7")[:5] + "7" + "." * 75
Q, A = QUESTIONS[0], ANSWERS[0]
OTHER = str(int(A[clue()]) % 9 + 1)
BAD_ROWS = [
    (f"x,{Q[:-1]},{A},1", "80 characters, expected 81"),
    (f"x,{Q},{A}9,1", "answer of 82 characters, expected 81"),
    (f"x,{changed(Q, 4, 'x')},{A},1", "character 'x', expected a digit 1-9, '.' or '0'"),
    (f"x,{changed(Q, 4, 'é')},{A},1", "expected a digit 1-9"),
    (f"x,{Q},{changed(A, 0, '.')},1", "the answer breaks the rules"),
    (f"x,{Q},{changed(A, 0, '-')},1", "the answer has a character that is not a digit 1-9"),
    (f"x,{CLASHING},{A},1", "clues clash"),
    (f"x,{Q},{ANSWERS[1]},1", "the answer contradicts a clue"),
    (f"x,{'.' * 81},,1", "several solutions"),
    (f"x,{'12345678.' + '........9' + '.' * 63},,1", "no solution"),
    (f"x,{Q},1", "3 columns, expected 4"),
    (f"x,{Q},{A},1,2", "5 columns, expected 4"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_a_bad_row_is_named_or_skipped(tmp_path: Path, row: str, message: str) -> None:
    path = save(tmp_path / "p.csv", [HEADER, *rows(0, 2), row, *rows(2, 4)])
    assert_row_4_is_bad(read_puzzles, path, message, BOARDS[:4])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no puzzles to use"),
        (HEADER + "\n", "no puzzles to use"),
        ("a,b\n1,2\n", "row 1: columns 'a,b', expected"),
        (f"question,answer\n{'1' * 5000}\n", "row 2: longer than 4096 characters"),
        ("12\n34\n", "row 1: 2 characters, expected 16, 36 or 81"),
        ("\x00\x01\x02\n", "row 1: 3 characters"),
        ("\ufeff" + Q + "\n" + "é" * 81, "row 2: character"),
    ],
)
def test_unfit_files(tmp_path: Path, content: str, message: str) -> None:
    assert_unfit(read_puzzles, tmp_path / "p.csv", content, message)


def test_ratings_choose(tmp_path: Path) -> None:
    path = save(tmp_path / "p.csv", [HEADER, *rows()])
    hard = np.array(RATINGS) >= 12
    np.testing.assert_array_equal(read_puzzles(path, min_difficulty=12).boards, BOARDS[hard])
    save(path, [HEADER, f"x,{Q},{A},hard"])
    with pytest.raises(DataError, match="row 2: rating 'hard' is not an integer"):
        read_puzzles(path, min_difficulty=1)
    save(path, ["question,answer", f"{Q},{A}"])
    with pytest.raises(DataError, match="no column rating"):
        read_puzzles(path, min_difficulty=1)
    with pytest.raises(DataError, match="bare lines have no rating"):
        read_puzzles(save(path, [Q]), min_difficulty=1)


def test_the_command_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    with (source / "train.csv").open("a") as file:
        file.write(f"x,{CLASHING},{A},1\n")
    command = ["--source", str(source), "--output-dir", str(out), "--subsample-size", "3"]
    assert main(command) == 2
    assert not out.exists()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "train.csv row 10: clues clash" in error
    assert main([*command, "--skip-bad", "--num-aug", "2"]) == 0
    shown = capsys.readouterr()
    assert "train: 3 puzzles, 9 examples, 1 bad rows skipped" in shown.out
    assert "train.csv row 10: clues clash" in shown.err
    manifest = read_manifest(out)
    assert manifest is not None and verify_manifest(out, manifest) is None
    assert manifest["seed"] == 0 and manifest["subset"] == {"of": 8, "kept": 3}
    assert manifest["counts"]["train"] == {"groups": 3, "examples": 9, "skipped": 1}
    assert manifest["counts"]["test"] == {"groups": 4, "examples": 4, "skipped": 0}
    assert len(manifest["source"]["train_sha256"]) == 64
    # Again over our own output, but never over somebody else's.
    assert main([*command, "--skip-bad"]) == 0
    assert read_split(out, "train")[1]["all"].inputs.shape == (3, 81)
    (out / "mine.txt").write_text("x")
    assert main([*command, "--skip-bad"]) == 2
    assert (out / "mine.txt").exists()


def test_generated_sets_and_single_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--output-dir", str(out), "--seed", "3"]
    assert main([*arguments, "--generate", "20", "--clues", "40", "--test-size", "5"]) == 0
    train = np.array(read_split(out, "train")[1]["all"].inputs)
    test = read_split(out, "test")[1]["all"]
    assert ((train > 1).sum(1) == 40).all() and test.inputs.shape == (5, 81)
    assert main([*arguments, "--generate", "6", "--size", "4", "--clues", "5-7"]) == 0
    metadata, sets = read_split(out, "train")
    assert (metadata.vocab_size, metadata.seq_len) == (6, 16)
    assert not (out / "test").exists()
    path = save(tmp_path / "p.txt", QUESTIONS)
    assert main([*arguments, "--source", str(path), "--test-size", "4"]) == 0
    parts = [np.array(read_split(out, s)[1]["all"].inputs) - 1 for s in ("train", "test")]
    assert [len(part) for part in parts] == [8, 4]
    assert sorted(texts(np.concatenate(parts))) == sorted(QUESTIONS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--generate", "0"], "generate is 0, expected at least 1"),
        (["--generate", "5", "--clues", "x"], "clues 'x': expected"),
        (["--generate", "5", "--size", "7"], "7x7 boards are not supported"),
        (["--generate", "5", "--source", "x"], "give only one of"),
        (["--source", "nowhere.csv"], "nowhere.csv: No such file"),
        (["--source", "x", "--clues", "30"], "for generated puzzles only"),
        (["--source", ".", "--test-size", "5"], "test_size is for"),
        (["--generate", "5", "--num-aug", "-1"], "num_aug is -1"),
        (["--generate", "5", "--seed", "-1"], "trm-fast data sudoku: seed is -1"),
    ],
)
def test_wrong_options_exit_2(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["--output-dir", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_no_network_is_one_line_after_one_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """What was downloaded before is used; else the way around is named."""

    def answer(url: str, timeout: float) -> None:
        raise RuntimeError("no answer from\n the " + "very " * 40 + "distant hub")

    def download(repo: str, name: str, repo_type: str, local_files_only: bool) -> str:
        assert local_files_only, "it would try again and again"
        if repo == "someone/cached":
            return str(tmp_path / name)
        raise FileNotFoundError("not in the cache")

    library = SimpleNamespace(
        get_hf_file_metadata=answer, hf_hub_url=lambda *a, **k: "url", hf_hub_download=download
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    out = str(tmp_path / "out")
    assert main(["--output-dir", out]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.endswith("--source reads a local copy\n")
    assert "(no answer from the very very" in error and "very...)" in error
    for split in ("train", "test"):
        save(tmp_path / f"{split}.csv", [HEADER, f"x,{Q},{A},1"])
    assert main(["--output-dir", out, "--source-repo", "someone/cached"]) == 0


def test_the_hub_needs_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DataError, match=r"pip install 'trm-fast\[hub\]'"):
        build(BuildOptions(str(tmp_path / "out"), source_repo="someone/sudoku"))


@pytest.mark.parametrize("name", CHOICES)
def test_live_equality_with_the_official_builder(
    official_path: Path, source: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    official_build("sudoku", official_path, source, theirs, monkeypatch, **CHOICES[name])
    build(BuildOptions(str(ours), source=str(source), seed=5, **CHOICES[name]))
    assert_same_files(theirs, ours)


def test_absurd_numbers_are_one_line(tmp_path, capsys):
    assert main(["--output-dir", str(tmp_path / "d"), "--generate", "99999999999999"]) == 2
    assert (
        capsys.readouterr().err == "trm-fast data sudoku: not enough memory for so many puzzles\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_board_without_a_solution_does_not_take_for_ever(tmp_path, monkeypatch):
    """Three million guesses, of which the reader makes no more than it says."""
    monkeypatch.setattr(sudoku_source, "_GUESSES", 1000)
    endless = ".....5.8....6.1.43..........1.5........1.6...3.......553.....61........4........."
    path = save(tmp_path / "p.csv", [endless])
    with pytest.raises(DataError, match=r"p\.csv row 1: not solved in 1000 guesses; a file may"):
        read_puzzles(path)
