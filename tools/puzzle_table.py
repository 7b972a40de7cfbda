"""What a table of puzzle rows takes in each process of a run: the memory figures of
`docs/distributed.md`.

    python tools/puzzle_table.py                        # ARC with 1000 augmentations, two processes
    python tools/puzzle_table.py --rows 10000 --processes 4

Trains a tiny network with such a table for a few steps under torchrun, in a temporary folder, and
reads the resident memory of the processes meanwhile: 16 GB of memory and 6 GB of disk for ARC's.
Linux only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from trm_fast.checkpoint import resolve
from trm_fast.console import positive, say
from trm_fast.data.dataset import from_arrays
from trm_fast.data.format import write_dataset

GB = 1e9
JOB = [
    "data_paths=[data]", "checkpoint_path=run", "evaluators=[]", "augment=none", "curriculum=0",
    "global_batch_size=32", "steps=20", "eval_steps=20", "log_interval=1", "keep=1", "device=cpu",
    "arch.hidden_size=512", "arch.puzzle_emb_ndim=512", "arch.puzzle_emb_len=1",
    "arch.H_cycles=1", "arch.L_cycles=1", "arch.L_layers=1", "arch.halt_max_steps=2",
]  # fmt: skip


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", type=positive, default=876_406, help="puzzle identifiers")
    parser.add_argument("--processes", type=positive, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="puzzle-table-") as name:
        folder = Path(name)
        _write_data(folder / "data", options.rows)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(options.processes), "-m", "trm_fast.train", *JOB]
        with open(folder / "log", "w+") as log:
            job = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
            usual, most = _watched(job)
            log.seek(0)
            if job.returncode != 0:
                say(log.read(), err=True)
                return 1
        files = sorted(resolve(folder / "run").iterdir())
        say(f"table       {options.rows} x 512 float32, {options.rows * 2048 / GB:.2f} GB")
        for rank, pid in enumerate(sorted(most)):
            say(f"process {rank}   {usual[pid] / GB:.1f} GB resident, at most {most[pid] / GB:.1f}")
        sizes = ", ".join(f"{f.name} {f.stat().st_size / GB:.2f}" for f in files)
        say(f"checkpoint  {sum(f.stat().st_size for f in files) / GB:.1f} GB: {sizes}")
    return 0


def _write_data(folder: Path, rows: int) -> None:
    """Random boards, whose identifiers are spread over all rows."""
    rng, splits = np.random.default_rng(0), {}
    for split, count in (("train", 4000), ("test", 16)):
        tokens = rng.integers(2, 12, (count, 64)).astype(np.uint8)
        ids = rng.integers(0, rows, count)
        ids[0] = rows - 1
        metadata, arrays = from_arrays(tokens, tokens, vocab_size=12, puzzle_identifiers=ids)
        splits[split] = (metadata, {"all": arrays})
    write_dataset(folder, splits, ["<blank>", *(f"puzzle {n}" for n in range(1, rows))])


def _watched(job: subprocess.Popen[bytes]) -> tuple[dict[int, float], dict[int, float]]:
    """Median and greatest resident bytes of each process that the launcher made."""
    seen: dict[int, list[int]] = {}
    while job.poll() is None:
        time.sleep(0.2)
        try:
            pids = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
            for pid in map(int, pids):
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                seen.setdefault(pid, []).append(pages * 4096)
        except (OSError, IndexError):
            continue
    return (
        {pid: float(np.median(values)) for pid, values in seen.items()},
        {pid: float(max(values)) for pid, values in seen.items()},
    )


if __name__ == "__main__":
    sys.exit(main())
