"""The GPU measuring suite: `python bench/gpu_suite.py --stage A|B|C`. See docs/benchmarks.md.

Runs one stage of `trm_fast.suite` in a process of its own, watches over it, and prints the table.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # OpenMP reads it when torch is loaded

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a checkout that is not installed

from trm_fast.console import say  # noqa: E402
from trm_fast.suite import records, supervisor  # noqa: E402

RESULTS = ROOT / "bench" / "results"
BUDGET = 420.0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_suite.py", description="measure on a GPU, in stages")
    parser.add_argument("--stage", choices="ABC", help="A truth, B speed, C why")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds; default %(default)g")
    parser.add_argument("--official", type=Path, metavar="PATH", help="official checkout")
    parser.add_argument("--out", type=Path, metavar="FILE", help="results, one JSON object a line")
    parser.add_argument("--commit", help="recorded where the checkout has lost its .git")
    parser.add_argument("--only", metavar="REGEX", help="items whose names match, and no others")
    parser.add_argument("--tiny", action="store_true", help="dry run: tiny sizes, on the CPU")
    parser.add_argument("--one", metavar="OP/CASE/DIRECTION[/BACKEND]", help="one call")
    parser.add_argument("--batch", type=int, help="boards of --one")
    for name in ("--run", "--until", "--after"):  # for the process that measures
        parser.add_argument(name, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    try:
        re.compile(given.only or "")
    except re.error as error:
        parser.error(f"--only {given.only!r} is no regular expression: {error}")
    if given.stage is None and given.one is None:
        parser.error("one of --stage and --one is needed")
    if given.official is not None:
        given.official = given.official.expanduser().resolve()
        if not given.official.is_dir():
            parser.error(f"--official {given.official}: no such folder")
    return given


def device_tag() -> str:
    """The GPU's name for a file name, "cpu" without one; asked without loading torch."""
    if shutil.which("nvidia-smi") is None:
        return "cpu"
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    said = subprocess.run(asked, capture_output=True, text=True).stdout.splitlines()
    return re.sub(r"[^a-z0-9]+", "-", said[0].lower()).strip("-") if said else "cpu"


def results_file(given: argparse.Namespace) -> Path:
    if given.out is not None:
        return given.out.resolve()
    if given.tiny:  # nothing that a dry run measures is worth keeping
        return Path(tempfile.mkdtemp(prefix="trm-fast-suite-")) / "dry-run.jsonl"
    date = time.strftime("%Y-%m-%d", time.gmtime())
    return RESULTS / f"{device_tag()}-{date}-suite.jsonl"


def measure(given: argparse.Namespace) -> int:
    """What the process of its own does."""
    if given.tiny:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported
    import torch

    from trm_fast.suite import why
    from trm_fast.suite.session import Session, run_stage
    from trm_fast.suite.stages import STAGES

    cuda = torch.cuda.is_available() and not given.tiny
    if not cuda and not given.tiny:
        say("gpu_suite.py: needs a CUDA GPU; --tiny is the dry run on the CPU", err=True)
        return 2
    device = torch.device("cuda" if cuda else "cpu")
    if given.one is not None:
        why.run_one(given.one, device, given.batch, given.tiny)
        return 0
    if given.tiny:
        torch.set_num_threads(1)
    session = Session(
        stage=given.stage,
        run=given.run,
        out=given.out,
        until=float(given.until),
        device=device,
        tiny=given.tiny,
        official=given.official,
        program=Path(__file__).resolve(),
        commit=given.commit,
    )
    with supervisor.stop_signals():
        items = [i for i in STAGES[given.stage] if re.search(given.only or "", i.name)]
        if not items:
            there = ", ".join(i.name for i in STAGES[given.stage])
            say(f"gpu_suite.py: no item of stage {given.stage} matches {given.only!r}", err=True)
            say(f"there are: {there}", err=True)
            return 2
        return run_stage(session, items, given.after)


def watch(given: argparse.Namespace) -> int:
    """Start the process, keep it going, print the table; 0, or 1 if an item went wrong."""
    out = results_file(given)
    out.parent.mkdir(parents=True, exist_ok=True)
    run = f"{given.stage}-{time.strftime('%H%M%S', time.gmtime())}-{os.getpid()}"
    command = [sys.executable, str(Path(__file__).resolve()), "--stage", given.stage]
    command += ["--out", str(out), "--run", run, "--until", str(time.time() + given.budget)]
    command += ["--tiny"] if given.tiny else []
    command += ["--official", str(given.official)] if given.official else []
    command += ["--only", given.only] if given.only else []
    command += ["--commit", given.commit] if given.commit else []
    status = 1
    try:
        with supervisor.stop_signals():
            status = supervisor.supervise(command, out, given.stage, run)
    except supervisor.Stopped as stopped:
        status = 128 + int(stopped.args[0])
    found = records.read(out, run)
    say(f"\n{records.table(found)}\n{out}")
    return status or int(any(r.get("status") in records.BAD for r in found))


def main(argv: Sequence[str] | None = None) -> int:
    given = parse(argv)
    if given.one is not None or given.run is not None:
        try:
            return measure(given)
        except supervisor.Stopped as stopped:
            return 128 + int(stopped.args[0])
    return watch(given)


if __name__ == "__main__":
    raise SystemExit(main())
