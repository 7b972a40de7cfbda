"""The commands under torchrun: a killed process, a run that goes on, an evaluation shared out."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import free_port
from training import make_data

from trm_fast import checkpoint, evaluate
from trm_fast.progress import read_metrics

TINY = [
    "global_batch_size=4", "steps=400", "eval_steps=200", "save_interval=20", "log_interval=50",
    "arch.hidden_size=8", "arch.num_heads=1", "arch.halt_max_steps=2", "arch.puzzle_emb_len=1",
    "arch.forward_dtype=float32", "evaluators=[]", "device=cpu",
]  # fmt: skip


def torchrun(folder, *words):
    """torchrun with two processes in a folder, started."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), *words]
    root = str(Path(__file__).resolve().parent.parent)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=env, text=True, stdout=pipe, stderr=pipe)


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes under /proc")
def test_a_killed_process_is_started_again_and_the_run_ends(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    make_data(tmp_path / "data")
    run = tmp_path / "run"
    words = ["data_paths=[data]", f"checkpoint_path={run}", *TINY]
    with torchrun(tmp_path, "--max-restarts", "2", "-m", "trm_fast.train", *words) as job:
        deadline = time.monotonic() + 200
        while not checkpoint.list_steps(run) and job.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if job.poll() is None:
            os.kill(children(job.pid)[1], signal.SIGKILL)
        said, errors = job.communicate(timeout=300)
    assert job.returncode == 0, errors
    assert "another process of the run is gone" in errors
    assert "processes   2, 2 boards of every step in each" in said and "going on    from" in said
    assert checkpoint.read_pointer(run, "last") == "step_400"
    steps = [row["step"] for row in read_metrics(run) if "train/lm_loss" in row]
    assert steps == list(range(50, 401, 50)), "each once"

    # Measured by one process and by two: the same, and said once.
    assert evaluate.main([str(run), "--json", "--max-puzzles", "7", "--batch-size", "4"]) == 0
    alone = json.loads(capfd.readouterr().out)
    words = ["-m", "trm_fast.evaluate", str(run), "--json", "--max-puzzles", "7"]
    with torchrun(tmp_path, *words, "--batch-size", "2") as job:
        said, errors = job.communicate(timeout=300)
    assert job.returncode == 0, errors
    together = json.loads(said)
    both, single = (found.pop("sets")["all"] for found in (together, alone))
    assert together == alone and both["puzzles"] == 7
    for name, values in single.items():
        assert both[name] == pytest.approx(values, rel=1e-5, abs=1e-6), name
