"""The test set-up itself: poisoned memory, fixed seeds, `--official`."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "fresh",
    [
        lambda: torch.empty(3),
        lambda: torch.empty((2, 2), dtype=torch.bfloat16),
        lambda: torch.empty(3, requires_grad=True),
        lambda: torch.empty_like(torch.zeros(2, dtype=torch.float64)),
        lambda: torch.empty_strided((2, 2), (1, 2)),
        lambda: torch.zeros(1).new_empty(3),
        lambda: torch.zeros(1).new_empty_strided((2,), (1,)),
    ],
)
def test_fresh_float_memory_is_nan(fresh):
    assert fresh().isnan().all()


def test_fresh_integer_memory_is_left_alone():
    assert torch.empty(3, dtype=torch.int32).dtype == torch.int32


@pytest.mark.parametrize("repeat", [0, 1])
def test_every_test_starts_from_the_same_seed(repeat):
    drawn = (random.random(), np.random.random(), torch.rand(()).item())
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    assert drawn == (random.random(), np.random.random(), torch.rand(()).item())


def test_environment_is_set_before_torch_reads_it():
    assert os.environ["OMP_WAIT_POLICY"]
    assert torch.cuda.is_available() or os.environ["TRITON_INTERPRET"] == "1"
    assert torch.get_num_threads() <= 2


def pytest_run(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_official_must_be_a_checkout(tmp_path):
    done = pytest_run("--official", str(tmp_path), "tests/test_conftest.py")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"--official {tmp_path}: not a checkout of the official code" in done.stderr
    assert "pretrain.py is missing" in done.stderr


PROBE = "def test_probe(official_path):\n    assert (official_path / 'pretrain.py').is_file()\n"


def test_official_path_is_handed_on_or_skipped_with_a_reason(tmp_path):
    checkout = tmp_path / "official"
    for name in ("pretrain.py", "puzzle_dataset.py", "models/recursive_reasoning/trm.py"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).touch()
    probe = tmp_path / "test_probe.py"
    probe.write_text(PROBE)
    setup = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "conftest"]
    given = pytest_run(*setup, "--official", str(checkout), str(probe))
    assert "1 passed" in given.stdout
    left_out = pytest_run(*setup, str(probe))
    assert "1 skipped" in left_out.stdout
    assert "run `pytest --official PATH`" in left_out.stdout
