"""Votes of augmented puzzles: the official scores and submissions, options, faults, a whole run."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from arc_tasks import CHOICES, VOTED, predictions, write_subsets
from golden.record_arc import ATTEMPTS, RANKS, official_votes
from training import Recorder, make_config, make_trainer

from trm_fast import arc_voting, evaluate
from trm_fast.arc_voting import ArcVoting, cut
from trm_fast.config import ConfigError, EvaluatorConfig
from trm_fast.data.arc import BuildOptions, build
from trm_fast.data.format import DataError
from trm_fast.evaluators import Evaluators
from trm_fast.progress import read_metrics
from trm_fast.runner import Console, Signals
from trm_fast.runs import Place

TESTS = Path(__file__).parent
GOLDEN = json.loads((TESTS / "golden" / "arc.json").read_text())["votes"]


def built(folder: Path, num_aug: int) -> Path:
    choice, out = CHOICES[VOTED], folder / "data"
    wanted = choice.subsets, choice.test_set_name
    build(BuildOptions(write_subsets(folder), str(out), *wanted, num_aug=num_aug))
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("arc"), CHOICES[VOTED].num_aug)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """7 boards to test on, as they are."""
    return built(tmp_path_factory.mktemp("small"), 0)


def voted(data: Path, ranks: int = 1, **options: object) -> list[ArcVoting]:
    """Evaluators that have the recorded predictions, every ranks-th batch each."""
    votings = [ArcVoting(data, **options) for _ in range(ranks)]
    for index, batch in enumerate(predictions(data)):
        votings[index % ranks].update(batch)
    return votings


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "submission.json").read_bytes()).hexdigest()[:16]


@pytest.mark.parametrize("ranks", [1, RANKS])
def test_scores_and_submission_are_the_official_ones(
    data: Path, tmp_path: Path, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    votings = voted(data, ranks, submission_K=ATTEMPTS)
    parts = [voting._ballots for voting in votings]
    monkeypatch.setattr(arc_voting, "_gathered", lambda own, group: parts)
    assert votings[0].result(tmp_path) == GOLDEN[str(ranks)]["scores"]
    assert digest(tmp_path) == GOLDEN[str(ranks)]["submission"]


def test_the_official_evaluator_says_the_same_now(data: Path, official_path: Path) -> None:
    assert official_votes(official_path, data, RANKS) == GOLDEN[str(RANKS)]


PROCESS = """
import sys
from pathlib import Path
import torch.distributed as dist
from arc_tasks import predictions
from trm_fast.arc_voting import ArcVoting
data, store, rank, ranks, attempts = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
voting = ArcVoting(data, submission_K=attempts)
for index, batch in enumerate(predictions(Path(data))):
    if index % ranks == rank:
        voting.update(batch)
dist.init_process_group("gloo", f"file://{store}/store", rank=rank, world_size=ranks)
scores = voting.result(Path(store))
assert (scores is None) == (rank > 0)
dist.destroy_process_group()
"""


def test_processes_vote_together(data: Path, tmp_path: Path) -> None:
    arguments = [str(data), str(tmp_path)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, *arguments, *map(str, (rank, RANKS, ATTEMPTS))],
            cwd=TESTS,
            env={"PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1", "PATH": ""},
        )
        for rank in range(RANKS)
    ]
    assert [process.wait(100) for process in processes] == [0] * RANKS
    assert digest(tmp_path) == GOLDEN[str(RANKS)]["submission"]


def test_cut_is_the_largest_rectangle_of_colours() -> None:
    draws = np.random.RandomState(0)
    tokens = draws.choice([0, 1, 2, 11, 12], (60, 900), p=[0.02, 0.02, 0.46, 0.48, 0.02])
    tokens[:20] = np.where(draws.rand(20, 900) < 0.002, 1, 2)
    tokens[0], tokens[1] = 2, 0
    for canvas, rows, columns in zip(tokens.reshape(-1, 30, 30), *cut(tokens), strict=True):
        best, size = 0, (0, 0)
        for height in range(1, 31):
            for width in range(1, 31):
                inside = canvas[:height, :width]
                if height * width > best and ((inside >= 2) & (inside <= 11)).all():
                    best, size = height * width, (height, width)
        if best != rows * columns:
            assert size == (rows, columns)
        assert ((canvas[:rows, :columns] >= 2) & (canvas[:rows, :columns] <= 11)).all()
    assert [c.tolist() for c in cut(tokens[:2])] == [[30, 0], [30, 0]]


def test_packed_grids_unpack() -> None:
    draws = np.random.RandomState(0)
    for shape in ((1, 1), (3, 5), (30, 30), (2, 3), (0, 0)):
        grid = draws.randint(0, 10, shape).astype(np.uint8)
        np.testing.assert_array_equal(arc_voting._unpacked(arc_voting._packed(grid)), grid)


def test_an_evaluation_forgets_the_one_before_unless_told_not_to(data: Path) -> None:
    votes = {}
    for aggregated in (False, True):
        voting = ArcVoting(data, aggregated_voting=aggregated)
        for _ in range(2):
            voting.begin()
            for batch in predictions(data):
                voting.update(batch)
        votes[aggregated] = sum(len(ballot.q) for ballot in voting._ballots.values())
        assert voting.result() == GOLDEN["1"]["scores"]
    examples = len(np.load(data / "test" / "all__inputs.npy"))
    assert votes == {False: examples, True: 2 * examples}


def test_test_inputs_without_votes_keep_their_place(data: Path) -> None:
    """The official submission leaves them out, so that later answers move up."""
    voting = ArcVoting(data, pass_Ks=[1])
    assert voting.result() == {"ARC/pass@1": 0.0}
    assert voting.unanswered == 7
    sizes = [len(answers) for answers in voting.submission.values()]
    assert sorted(sizes) == [1, 1, 2, 3]
    nothing = {"attempt_1": [[0]], "attempt_2": [[0]]}
    assert voting.submission["e0000001"] == [nothing, nothing]


def test_what_is_no_test_input_is_not_kept(data: Path) -> None:
    voting = ArcVoting(data)
    ids = torch.from_numpy(np.load(data / "train" / "all__puzzle_identifiers.npy"))[:50]
    tokens = torch.from_numpy(np.load(data / "train" / "all__inputs.npy"))[:50]
    batch = {"inputs": tokens, "preds": tokens, "puzzle_identifiers": ids}
    voting.update(batch | {"q_halt_logits": torch.zeros(50)})
    assert voting._ballots == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": torch.zeros(2, 81)}, r"900 tokens, got inputs \[2, 81\]"),
        ({"preds": torch.zeros(1, 900)}, r"predictions \[1, 900\]"),
        ({"puzzle_identifiers": torch.tensor([0, 305])}, "305 is not among the 305 of"),
    ],
)
def test_batches_that_do_not_fit(data: Path, changes: dict, message: str) -> None:
    batch = {
        "inputs": torch.zeros(2, 900),
        "preds": torch.zeros(2, 900),
        "puzzle_identifiers": torch.zeros(2, dtype=torch.int32),
        "q_halt_logits": torch.zeros(2),
    }
    ArcVoting(data).update(batch)
    with pytest.raises(ValueError, match=message):
        ArcVoting(data).update(batch | changes)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("identifiers.json", {}, "identifiers.json: expected a list of names"),
        ("identifiers.json", ["a", 3], "identifiers.json: expected a list of names"),
        ("identifiers.json", ["a|||t9|||0"], "identifiers.json: 'a.*' is not TASK"),
        ("identifiers.json", ["<blank>"], "1 names for 305 identifiers"),
        ("test_puzzles.json", [], "test_puzzles.json: expected an object"),
        ("test_puzzles.json", {}, "test_puzzles.json: no tasks"),
        ("test_puzzles.json", {"x": {"test": [{}]}}, "task x test pair 0 input: expected 1 to 30"),
        ("test/dataset.json", {"seq_len": 81}, "boards of 81 tokens, those of ARC have 900"),
    ],
)
def test_damaged_files(data: Path, tmp_path: Path, name: str, value: object, message: str) -> None:
    (tmp_path / "test").mkdir()
    for file in ("identifiers.json", "test_puzzles.json", "test/dataset.json"):
        (tmp_path / file).write_bytes((data / file).read_bytes())
    if name == "test/dataset.json":
        value = json.loads((data / name).read_text()) | value
    (tmp_path / name).write_text(json.dumps(value))
    with pytest.raises(DataError, match=message):
        ArcVoting(tmp_path)


@pytest.mark.parametrize(
    ("evaluator", "message"),
    [
        ({"name": "arc@ARK"}, r"must be arc@ARC, got 'arc@ARK' \(did you mean 'arc@ARC'\?\)"),
        ({"name": "arc@ARC", "pass_K": [1]}, r"got 'pass_K' \(did you mean 'pass_Ks'\?\)"),
        ({"name": "arc@ARC", "pass_Ks": 1}, "pass_Ks must be a list, got 1"),
        ({"name": "arc@ARC", "pass_Ks": [0]}, r"pass_Ks must be whole numbers from 1, got \[0\]"),
        ({"name": "arc@ARC", "pass_Ks": []}, r"pass_Ks must be whole numbers from 1, got \[\]"),
        ({"name": "arc@ARC", "submission_K": 1.5}, "submission_K must be a whole number, got 1.5"),
        ({"name": "arc@ARC", "aggregated_voting": 1}, "must be true or false, got 1"),
    ],
)
def test_evaluator_options(data: Path, evaluator: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Evaluators([EvaluatorConfig.from_value(evaluator)], [str(data)])


def test_an_evaluator_counts_once(data: Path) -> None:
    with pytest.raises(ConfigError, match="evaluators names arc@ARC twice"):
        Evaluators([EvaluatorConfig("arc@ARC")] * 2, [str(data)])


def test_data_without_a_test_split_is_not_voted_on(tmp_path: Path) -> None:
    (tmp_path / "test_puzzles.json").write_text("{}")
    evaluators = Evaluators([EvaluatorConfig("arc@ARC")], [str(tmp_path)])
    assert len(evaluators) == 0 and evaluators.counts == {}
    assert evaluators.left_out == [f"arc@ARC (no test in {tmp_path})"]


def test_each_data_directory_votes_on_its_own_sets(data: Path, tmp_path: Path) -> None:
    evaluators = Evaluators([EvaluatorConfig("arc@ARC")], [str(data), str(tmp_path), str(data)])
    assert evaluators.left_out == [f"arc@ARC (no test_puzzles.json in {tmp_path})"]
    # Digits at the end of a name are not always those of the directory.
    observe = evaluators.begin({"arc2": 0, "arc22": 2})
    for batch in predictions(data):
        observe("arc22", batch)
    scores = evaluators.result(tmp_path / "step_4")
    assert (
        scores["ARC/pass@2"] == 0.0 and scores["ARC2/pass@2"] == GOLDEN["1"]["scores"]["ARC/pass@2"]
    )
    assert (tmp_path / "evaluator_ARC2_step_4" / "submission.json").is_file()
    missing = evaluators.unanswered
    observe = evaluators.begin({"arc2": 0, "arc22": 2})
    for batch in predictions(data):
        observe("arc2", batch)
    first = evaluators.result()
    assert first["ARC/pass@2"] == scores["ARC2/pass@2"] and first["ARC2/pass@2"] == 0.0
    assert evaluators.counts == {"ARC/unanswered": missing} and missing > 0


@pytest.fixture(scope="module")
def run(small: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorder, dict]:
    """A run of two steps on the built data: its folder, what it said, its scores."""
    folder, reporter = tmp_path_factory.mktemp("run") / "r", Recorder()
    wanted = {"name": "arc@ARC", "pass_Ks": [1, 3]}
    config = make_config(
        str(small), steps=2, eval_steps=1, evaluators=[wanted], threads=1, arch__H_cycles=1,
        arch__hidden_size=8, arch__halt_max_steps=1, eval_batch_size=7,
    )  # fmt: skip
    trainer = make_trainer(config, folder, reporter)
    trainer.run()
    votings = [voting for _, voting in trainer.validation.evaluators._votings]
    votes = [b.q for voting in votings for b in voting._ballots.values()]
    assert sum(map(len, votes)) == len(np.load(small / "test" / "all__inputs.npy"))  # the last ones
    return folder, reporter, trainer.validation.scores


def test_a_run_scores_every_evaluation(run: tuple[Path, Recorder, dict]) -> None:
    folder, reporter, scores = run
    assert [step for step, _ in reporter.evaluations] == [1, 2]
    assert set(scores) == {"ARC/pass@1", "ARC/pass@3"}
    for step in (1, 2):
        text = (folder / f"evaluator_ARC_step_{step}" / "submission.json").read_text()
        submission = json.loads(text)
        assert sorted(submission) == [f"e000000{k}" for k in range(4)]
        assert all(set(a) == {"attempt_1", "attempt_2"} for t in submission.values() for a in t)


def test_the_console_says_and_logs_what_got_no_answer(
    small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make_config(
        str(small), evaluators=[{"name": "arc@ARC", "pass_Ks": [1]}], eval_max_puzzles=3,
        arch__hidden_size=8, arch__halt_max_steps=1, threads=1,
    )  # fmt: skip
    console = Console(Place(config, tmp_path, None), 2, Signals())
    trainer = make_trainer(config, tmp_path, console)
    trainer.evaluate()
    console.close()
    told = "".join(capfd.readouterr())
    assert "ARC/pass@1 0.00 %; 4 test inputs have no answer, which is wrong" in told
    assert read_metrics(tmp_path)[-1]["ARC/unanswered"] == 4


def test_the_command_votes_too(
    run: tuple[Path, Recorder, dict],
    small: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _, scores = run
    out = tmp_path / "mine.json"
    arguments = [str(folder), "--data", str(small), "--device", "cpu"]
    assert evaluate.main([*arguments, "--submission", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {name: document[name] for name in scores} == scores
    assert document["ARC/unanswered"] == 0
    last = folder / "evaluator_ARC_step_2" / "submission.json"
    assert out.read_bytes() == last.read_bytes()
    assert evaluate.main([*arguments, "--max-puzzles", "3"]) == 0
    said = capsys.readouterr().out
    assert "ARC/pass@1 0.00 %, ARC/pass@3 0.00 %" in said and "test inputs have no answer" in said
    assert evaluate.main([*arguments, "--split", "train", "--submission", str(out)]) == 2
    assert "--submission needs one ARC data directory" in capsys.readouterr().err
    assert evaluate.main([*arguments, "--submission", str(tmp_path / "no" / "x")]) == 2
    assert "No such file" in capsys.readouterr().err
