"""What happens to real runs, done to a tiny one: the table of `docs/faults.md`.

    python tools/faults.py               # everything, half an hour of two busy cores
    python tools/faults.py --short       # a few trials of most, as in the tests
    python tools/faults.py --only disk   # the faults with that word in their names

Each fault is tried on jobs of their own, which then go on to their end; the end is compared bit by
bit with that of a job left in peace. `trials/job.py` has what they share and says what the columns
count. Exit status 1 where anything was lost or not survived.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from trials import damage, disks, kills, ranks
from trials.job import Bench, Row

from trm_fast.console import say


class Fault(NamedTuple):
    """A line of the table: what is done, how often, how often with --short, and whether that needs
    file systems of its own."""

    name: str
    act: Callable[[Bench, Row, int], None]
    times: int
    short: int
    mounts: bool = False


FAULTS = [
    Fault("SIGKILL at any moment of a process, imports included", kills.kills, 50, 0),
    Fault("SIGKILL at any moment of data, training, evaluation", kills.forked_kills, 50, 2),
    Fault("SIGKILL inside a save", kills.kills_in_saves, 30, 1),
    Fault("SIGKILL while a data set is written or replaced", kills.kills_in_data, 30, 0),
    Fault("kill with the log's last line torn", kills.torn_logs, 15, 0),
    Fault("SIGINT, SIGTERM at any moment", kills.signals, 30, 0),
    Fault("disk full at any moment of a run", disks.full_disks, 30, 1, True),
    Fault("disk full after any page of a checkpoint", disks.full_disks_by_page, 30, 6, True),
    Fault("disk full from the k-th operation on", disks.failing_writes, 40, 1),
    Fault("disk full under the printed log", disks.full_logs, 6, 1),
    Fault("disk full while a data set is written", disks.full_data, 10, 1, True),
    Fault("run folder read-only, from the start or a moment on", disks.read_only, 15, 1, True),
    Fault("checkpoint bit-flipped, cut short, file missing", damage.checkpoints, 42, 1),
    Fault("all checkpoints damaged", damage.all_checkpoints, 5, 0),
    Fault("data set bit-flipped, cut short, file missing", damage.data_sets, 42, 0),
    Fault("NaN in a gradient, and a SIGKILL", damage.gradients, 15, 1),
    Fault("NaN in all gradients from a step on", damage.gradients_for_good, 10, 0),
    Fault("out of memory in a step", damage.memory, 15, 0),
    Fault("clocks a day back, and a SIGKILL", damage.clocks, 20, 1),
    Fault("two processes in one run folder", damage.two_processes, 15, 1),
    Fault("run folder or checkpoint deleted under the run", damage.deleted_folders, 20, 1),
    Fault("SIGKILL of one of two processes under torchrun", ranks.loss, 6, 0),
    Fault("loss of one of two machines under torchrun", ranks.loss_of_a_machine, 3, 0),
]


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--short", action="store_true", help="a few trials of each")
    parser.add_argument("--only", default="", help="faults with this word in their names")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", help="write the table to this file, too")
    parser.add_argument("--mounts", choices=["try", "no", "here"], default="try")
    options = parser.parse_args()
    mounts = options.mounts == "here"
    if options.mounts == "try" and _has_mounts():
        # A namespace of its own: what is mounted there is gone with it.
        command = [sys.executable, *sys.argv, "--mounts", "here"]
        os.execvp("unshare", ["unshare", "--user", "--map-root-user", "--mount", *command])
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    began = time.monotonic()
    try:
        rows = _table(options, Bench(folder, options.seed, 12 if options.short else 20, mounts))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    bad = [row for row in rows if row.survived < row.tried or row.lost]
    for row in bad:
        for wrong in row.wrong:
            say(f"{row.fault}: {wrong}", err=True)
    tried, lost = sum(row.tried for row in rows), sum(row.lost for row in rows)
    say(f"\n{tried} trials, {lost} lost, {time.monotonic() - began:.0f} s")
    if options.json:
        content = [row.record() for row in rows]
        Path(options.json).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 1 if bad else 0


def _has_mounts() -> bool:
    """Whether file systems can be mounted in a namespace of one's own here."""
    if shutil.which("unshare") is None:
        return False
    words = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "x", "/mnt"]
    return subprocess.run(words, capture_output=True).returncode == 0


def _table(options: argparse.Namespace, bench: Bench) -> list[Row]:
    say("| fault | tried | survived | lost | what became of it |\n|---|---|---|---|---|")
    rows = []
    for fault in FAULTS:
        count = fault.short if options.short else fault.times
        if not count or options.only not in fault.name:
            continue
        row = Row(fault.name)
        if fault.mounts and not bench.mounts:
            say(f"| {row.fault} | 0 | 0 | 0 | left out: file systems cannot be mounted here |")
            continue
        fault.act(bench, row, count)
        seen = ", ".join(f"{n} {what}" for what, n in row.seen.most_common())
        say(f"| {row.fault} | {row.tried} | {row.survived} | {row.lost} | {seen} |")
        rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())
