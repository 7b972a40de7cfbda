"""What the commands say of reasoning that cannot be: in the words of the options, on one line."""

import pytest
from answering import SOLVED, save_run

from trm_fast import solve

PRESETS = "restarts, vote, ptrm, eqr"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--rollouts 0", "--rollouts must be a whole number from 1 to 65535, got 0"),
        ("--depth 65536", "--depth must be a whole number from 1 to 65535, got 65536"),
        (
            "--rollouts 65535 --steps 65535",
            "--rollouts times --depth must be at most 134217728, got 65535 times 65535",
        ),
        ("--noise -1", "--noise must be a number of at least 0, got -1.0"),
        ("--seed -1", "--seed must be a whole number from 0 to 18446744073709551615, got -1"),
        ("--threshold nan", "--threshold must be a number, got nan"),
        (
            "--rollouts-by noise",
            "--rollouts-by noise needs noise: --noise must be above 0, got 0",
        ),
        (
            "--preset ptrm --noise 0",
            "--rollouts-by noise of --preset ptrm needs noise: --noise must be above 0, got 0",
        ),
        (
            "--schedule sequential",
            "--schedule sequential stops at the first good answer: --select must be first-q or "
            "valid, got 'q'",
        ),
        (
            "--preset restarts --select mode",
            "--schedule sequential of --preset restarts stops at the first good answer: --select "
            "must be first-q or valid, got 'mode'",
        ),
        (
            "--preset restarts --schedule sequential --select mode",
            "--schedule sequential stops at the first good answer: --select must be first-q or "
            "valid, got 'mode'",
        ),
        (
            "--preset restrats",
            f"argument --preset: invalid choice: 'restrats' (choose from {PRESETS}) (did you mean "
            "'restarts'?); see --help",
        ),
        (
            "--preset magic",
            f"argument --preset: invalid choice: 'magic' (choose from {PRESETS}); see --help",
        ),
        (
            "--noise-on z_l",
            "argument --noise-on: invalid choice: 'z_l' (choose from z_L, z_H, both) (did you mean "
            "'z_L'?); see --help",
        ),
    ],
)
def test_faults_name_options(run, capsys, arguments, said):
    assert solve.main([SOLVED, "-m", str(run), *arguments.split()]) == 2
    assert capsys.readouterr() == ("", f"trm-fast solve: {said}\n")


@pytest.mark.parametrize(
    ("changes", "arguments", "said"),
    [
        (
            {"name": "transformers_baseline", "H_layers": 1},
            "--noise 0.1",
            "--noise-on z_L: the network transformers_baseline has z_H",
        ),
        (
            {"name": "trm_singlez"},
            "--noise 0.1 --noise-on z_H",
            "--noise-on z_H: the network trm_singlez has z_L",
        ),
    ],
)
def test_faults_of_a_model_name_options(tmp_path, capsys, changes, arguments, said):
    own = save_run(tmp_path / "run", changes=changes)
    assert solve.main([SOLVED, "-m", str(own), *arguments.split()]) == 2
    assert capsys.readouterr() == ("", f"trm-fast solve: {said}\n")
