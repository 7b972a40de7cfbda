"""The ARC builder: official bytes for official choices, leaks told, every fault named."""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from arc_tasks import CHOICES, digests, make_subsets, write_subsets
from golden.record_arc import official_build

from trm_fast.data import arc, arc_augment, arc_source
from trm_fast.data.arc import BuildOptions, build, main
from trm_fast.data.arc_augment import Plan, draw_plan, encode, parse_name, undo
from trm_fast.data.arc_source import Task, read_subset
from trm_fast.data.format import DataError, read_manifest, read_split, verify_manifest

GOLDEN = json.loads((Path(__file__).parent / "golden" / "arc.json").read_text())["files"]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_subsets(tmp_path_factory.mktemp("arc"))


def options(prefix: str, out: Path, name: str = "as-arc-1", **changes: object) -> BuildOptions:
    return BuildOptions(prefix, str(out), **{**asdict(CHOICES[name]), **changes})


@pytest.mark.parametrize("name", CHOICES)
def test_every_file_is_the_official_one(prefix: str, tmp_path: Path, name: str) -> None:
    build(options(prefix, tmp_path / "out", name))
    assert digests(tmp_path / "out") == GOLDEN[name]


def test_the_official_builder_says_the_same_now(
    prefix: str, tmp_path: Path, official_path: Path
) -> None:
    choice = CHOICES["two-test-sets"]
    official_build(official_path, choice, prefix, tmp_path / "out")
    assert digests(tmp_path / "out") == GOLDEN["two-test-sets"]


def test_blocks_do_not_change_the_files(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arc, "_BLOCK", 7)
    monkeypatch.setattr(arc_augment.Offsets, "_BLOCK", 5)
    build(options(prefix, tmp_path / "out"))
    assert digests(tmp_path / "out") == GOLDEN["as-arc-1"]


def test_what_is_built_reads_back(prefix: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = build(options(prefix, out))
    manifest = read_manifest(out)
    assert manifest is not None and verify_manifest(out, manifest) is None
    assert manifest["source"]["arc_concept_solutions.json"]
    assert told["fewer_images"] == {"a0000003": 1, "single": 8}
    metadata, sets = read_split(out, "train")
    assert (metadata.vocab_size, metadata.seq_len, metadata.ignore_label_id) == (12, 900, 0)
    assert told["counts"]["train"] == {
        "groups": metadata.total_groups,
        "puzzles": metadata.total_puzzles,
        "examples": len(sets["all"].inputs),
    }
    names = json.loads((out / "identifiers.json").read_text())
    assert len(names) == metadata.num_puzzle_identifiers == told["identifiers"]
    # The task of two subsets has one identifier, its images of the second build others.
    assert names.count("a0000002") == 1 and len(set(names)) == len(names)


def test_images_are_undone_by_their_names(prefix: str) -> None:
    tasks = {task.name: task for task in read_subset(prefix, "training")[0]}
    task = tasks["a0000004"]
    plan = draw_plan(task, 40, np.random.RandomState(3))
    assert len(plan) == 41 and len(set(plan.symmetries.tolist())) == 8
    pairs = list(task.pairs())
    for image, name in enumerate(plan.names(task.name)):
        base, symmetry, colours = parse_name(name)
        assert base == task.name
        one = Plan(plan.symmetries[image : image + 1], plan.colours[image : image + 1])
        tokens, _ = encode(pairs, one, np.zeros((1, len(pairs), 2), np.uint8))
        for (x, _), canvas in zip(pairs, tokens[0].reshape(-1, 30, 30), strict=True):
            height, width = x.shape[::-1] if symmetry in (1, 3, 6, 7) else x.shape
            grid = canvas[:height, :width] - np.uint8(2)
            np.testing.assert_array_equal(undo(grid, symmetry, colours), x)
            assert (canvas[height:, width:] == 0).all() and (canvas[:height, width] == 1).all()


@pytest.mark.parametrize("name", ["a|||t8|||0123456789", "a|||t1|||0123456788", "a|||t1", "|||t1"])
def test_names_of_no_image(name: str) -> None:
    with pytest.raises(ValueError, match="is not TASK"):
        parse_name(name)


def test_equal_images_are_left_out_also_where_fingerprints_are_equal(
    prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one fingerprint for all, the grids decide; the plan stays what it was."""
    tasks = read_subset(prefix, "training")[0]
    plans = [draw_plan(task, 30, np.random.RandomState(1)) for task in tasks]
    monkeypatch.setattr(
        arc_augment._Seen, "_fingerprints", lambda self, s, c: np.zeros(len(s), np.uint64)
    )
    for task, plan in zip(tasks, plans, strict=True):
        again = draw_plan(task, 30, np.random.RandomState(1))
        np.testing.assert_array_equal(again.symmetries, plan.symmetries)
        np.testing.assert_array_equal(again.colours, plan.colours)


def test_leaks(prefix: str, tmp_path: Path) -> None:
    report = build(options(prefix, tmp_path / "out", num_aug=0, compare=("unsolved",)))["leaks"]
    assert report == json.loads((tmp_path / "out" / "leaks.json").read_text())
    assert report["test_pairs"] == sum(
        len(task["test"]) for task in make_subsets()["evaluation"].values()
    )
    assert report["in_training"]["pair"] == {
        "exact": {"own_task": 0, "other_tasks": 0},
        "symmetric": {"own_task": 1, "other_tasks": 1},
    }
    assert [(f["test"], f["in"]) for f in report["found"] if "pair" in f] == [
        ("evaluation/e0000001 test 0", ["training/shows train 0"]),
        ("evaluation/e0000002 test 0", ["evaluation/e0000002 train 3"]),
    ]
    overlap = {tuple(row["subsets"]): row for row in report["overlap"]}
    assert overlap["training", "concept"]["tasks_exact"] == ["a0000002 = a0000002"]
    row = overlap["evaluation", "unsolved"]  # their test outputs differ: one is unknown
    assert row["same_name"] == 4 and row["equal_exact"] == 0 and row["sharing_a_pair_exact"] == 4


def test_without_solutions_only_inputs_are_compared(prefix: str, tmp_path: Path) -> None:
    told = build(options(prefix, tmp_path / "out", "unsolved", num_aug=0))
    assert told["without_solutions"] == ["unsolved"]
    leaks = told["leaks"]["in_training"]
    assert leaks["output"]["exact"] == {"own_task": 0, "other_tasks": 0}
    assert leaks["input"]["symmetric"]["other_tasks"] == 1


DEEP = json.loads("[" * 400 + "]" * 400)
GRID = [[1, 2], [3, 4]]


def _first(change: Callable[[dict], object]) -> Callable[[dict], object]:
    """Change the first pair that is trained on."""
    return lambda tasks: change(tasks["a0000000"]["train"][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tasks: [], "expected an object of tasks, got a list"),
        (lambda tasks: tasks.update(x=3), "task x: expected an object, got a number"),
        (lambda tasks: tasks.update(x={"tain": []}), "task x: tain is neither train nor test"),
        (lambda tasks: tasks.update(x={"train": []}), "task x: no pairs"),
        (lambda tasks: tasks.update(x={"train": {}}), "x train: expected a list of pairs, got an"),
        (lambda tasks: tasks.update({"a|||b": {}}), "a task's name is 1 to 200 printable"),
        (lambda tasks: tasks.update({"a\nb": {}}), r"task a\\nb: a task's name"),
        (lambda tasks: tasks.update(x={"train": [4]}), "x train pair 0: expected an object"),
        (_first(lambda p: p.pop("output")), "train pair 0 output: expected 1 to 30 rows, got noth"),
        (_first(lambda p: p.update(input=[])), "a0000000 train pair 0 input: .* got 0 rows"),
        (_first(lambda p: p.update(input=[[]])), "input row 0: expected 1 to 30 colours, got 0"),
        (_first(lambda p: p.update(input=[[1]] * 31)), "input: expected 1 to 30 rows, got 31"),
        (_first(lambda p: p.update(input=[[1] * 31])), "row 0: expected 1 to 30 colours, got 31"),
        (_first(lambda p: p.update(output=[[1, 2], [1]])), "output row 1: 1 colours, the first"),
        (_first(lambda p: p.update(output=[[1, 10]])), "row 0 column 1: 10 is not a colour 0..9"),
        (_first(lambda p: p.update(output=[[-1]])), "-1 is not a colour"),
        (_first(lambda p: p.update(output=[[1.0]])), "1.0 is not a colour"),
        (_first(lambda p: p.update(output=[[True]])), "True is not a colour"),
        (_first(lambda p: p.update(output=[[float("nan")]])), "nan is not a colour"),
        (_first(lambda p: p.update(output=[[10**400]])), "a huge number is not a colour"),
        (_first(lambda p: p.update(output=[["1" * 999]])), r"column 0: 1+\.\.\. is not a colour"),
        (_first(lambda p: p.update(output=[[None]])), "None is not a colour"),
        (_first(lambda p: p.update(output="3")), "output: expected 1 to 30 rows, got a text"),
        (_first(lambda p: p.update(output=[GRID])), "column 0: a list is not a colour"),
        (_first(lambda p: p.update(output=DEEP)), "column 0: a list is not a colour"),
    ],
)
def test_hostile_tasks(tmp_path: Path, change: Callable[[dict], object], message: str) -> None:
    tasks = copy.deepcopy(make_subsets()["training"])
    tasks = [] if change(tasks) == [] else tasks
    path = tmp_path / "p_training_challenges.json"
    path.write_text(json.dumps(tasks))
    with pytest.raises(DataError, match=message) as caught:
        read_subset(str(tmp_path / "p"), "training")
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b"[" * 200000, "not valid JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "not valid JSON"),
        (b'{"\xff": 1}', "not valid JSON"),
    ],
    ids=["empty", "deep", "long", "bytes"],
)
def test_files_that_are_no_tasks(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "p_a_challenges.json").write_bytes(text)
    with pytest.raises(DataError, match=f"p_a_challenges.json: {message}"):
        read_subset(str(tmp_path / "p"), "a")
    with pytest.raises(DataError, match="p_b_challenges.json: no such file"):
        read_subset(str(tmp_path / "p"), "b")


def test_huge_files(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arc_source, "_MAX_BYTES", 1000)
    with pytest.raises(DataError, match="arc_training_challenges.json: larger than 1000 bytes"):
        read_subset(prefix, "training")


@pytest.mark.parametrize(
    ("solutions", "message"),
    [
        ([], "expected an object of tasks, got a list"),
        ({}, "task x: expected a list of outputs, got nothing"),
        ({"x": [GRID]}, "task x: 1 outputs for 2 test inputs in"),
        ({"x": [GRID, [[11]]]}, "task x test pair 1 output row 0 column 0: 11 is not a colour"),
    ],
)
def test_hostile_solutions(tmp_path: Path, solutions: object, message: str) -> None:
    task = {"train": [{"input": GRID, "output": GRID}], "test": [{"input": GRID}] * 2}
    task["test"] = [dict(pair) for pair in task["test"]]
    (tmp_path / "p_a_challenges.json").write_text(json.dumps({"x": task}))
    (tmp_path / "p_a_solutions.json").write_text(json.dumps(solutions))
    with pytest.raises(DataError, match=message):
        read_subset(str(tmp_path / "p"), "a")


def test_a_test_set_needs_demonstrations_and_tests(tmp_path: Path) -> None:
    pair = {"input": GRID, "output": GRID}
    (tmp_path / "p_a_challenges.json").write_text(json.dumps({"x": {"test": [pair]}}))
    wanted = BuildOptions(str(tmp_path / "p"), str(tmp_path / "out"), ("a",), "a", num_aug=0)
    with pytest.raises(DataError, match="subset a: task x: no train pairs"):
        build(wanted)
    assert not (tmp_path / "out").exists()
    assert Task("x", {"test": []}).to_json() == {"test": []}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subsets": ()}, "subsets names none"),
        ({"seed": -1}, "seed is -1"),
        ({"num_aug": -1}, r"num_aug is -1, expected 0\.\.1000000"),
        ({"puzzle_identifiers_start": 0}, "puzzle_identifiers_start is 0, expected 1"),
        ({"puzzle_identifiers_start": 10**7 + 1}, r"expected 1\.\.10000000"),
    ],
)
def test_options(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options("p", tmp_path, **changes)


def test_more_examples_than_the_indices_can_count(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arc, "_MAX_EXAMPLES", 40)
    with pytest.raises(ValueError, match="num_aug=20 makes [0-9]+ examples, 40 at most"):
        build(options(prefix, tmp_path / "out"))


def test_command_line(prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    arguments = ["--input-file-prefix", prefix, "--output-dir", out, "--test-set-name", "unsolved"]
    subsets = ["--subsets", "training", "unsolved", "--num-aug", "3", "--seed", "7"]
    assert main([*arguments, *subsets, "--compare", "evaluation"]) == 0
    said = capsys.readouterr().out
    assert digests(tmp_path / "out") == GOLDEN["unsolved"]
    for words in (
        "unsolved: no solutions file",
        "1 tasks have fewer than 3 different images, a0000003 1",
        "test: 4 tasks, 16 puzzles",
        "tasks of unsolved and evaluation: 4 of the same name, 0 equal (0 up to symmetry), 4 shar",
        "51 identifiers",
    ):
        assert words in said
    assert main([*arguments, "--subsets", "concept", "--num-aug", "0"]) == 0
    said = capsys.readouterr().out
    assert "no test split: none of the subsets is called unsolved or your_test_set" in said
    assert not (tmp_path / "out" / "test").exists()
    assert main([*arguments, "--subsets", "nowhere"]) == 2
    assert "arc_nowhere_challenges.json: no such file" in capsys.readouterr().err
