"""Feeds damaged and hostile files to every parser of trm_fast, and counts what comes of it.

    python tools/fuzz.py --inputs 100000
    python tools/fuzz.py --inputs 100000 --atheris    # coverage-guided, the binary parsers

Three of four inputs are valid ones, changed by their grammar; the fourth comes from hypothesis.
A parser must accept an input or refuse it with an error that it documents, of one line, in bounded
memory and time, and write nothing outside its target; anything else is lost: the table counts it,
the input is made smaller and kept, and the exit status is 1. Each parser runs in a process of its
own. The parsers and their inputs are in tests/fuzz; `make test` has a short form of this.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "fuzz")]
ADDRESS_SPACE = 4 << 30  # bytes that a worker may take beyond what it has to begin with
BY_HYPOTHESIS = 4  # one input of so many
SHRINKS = 400  # tries to make a lost input smaller


@dataclass
class Count:
    """What came of the inputs of one parser; `lost`: reason -> one input's folder."""

    name: str
    tried: int = 0
    accepted: int = 0
    refused: int = 0
    lost: int = 0
    peak: int = 0
    size: int = 0
    seconds: float = 0.0
    reasons: dict[str, str] = field(default_factory=dict)


def main() -> int:
    """Run what is asked for and print the table; 1 where anything is lost."""
    options = _parser().parse_args()
    if options.atheris and importlib.util.find_spec("atheris") is None:
        sys.stderr.write("tools/fuzz.py: --atheris needs atheris (pip install 'trm-fast[fuzz]')\n")
        return 2
    options.keep = options.keep.resolve()
    if options.worker:
        return _work(options)
    from fuzz_parsers import PARSERS

    names = [p.name for p in PARSERS if p.binary or not options.atheris]
    if options.only:
        if unknown := sorted({*options.only} - {*names}):
            sys.stderr.write(f"tools/fuzz.py: no parser {unknown[0]!r}: {', '.join(names)}\n")
            return 2
        names = options.only
    each = -(-options.inputs // len(names))
    counts, running = [], []
    for name in names:
        while len(running) >= options.jobs:
            running = [job for job in running if not job.finished()]
            time.sleep(0.1)
        job = _Job(name, each, options)
        running.append(job)
        counts.append(job.count)
    while running := [job for job in running if not job.finished()]:
        time.sleep(0.1)
    sys.stdout.write(table(counts))
    for count in counts:
        for reason, folder in count.reasons.items():
            sys.stdout.write(f"lost by {count.name}: {reason}\n    {folder}\n")
    return 1 if any(count.lost for count in counts) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--inputs", type=int, default=100_000, help="inputs in all (default 100000)")
    add("--only", nargs="+", metavar="PARSER", help="these parsers, by the names of the table")
    add("--seed", type=int, default=1, help="other seeds make other inputs (default 1)")
    add("--jobs", type=int, default=1, help="parsers at a time (default 1)")
    add("--keep", type=Path, default=Path("fuzz-lost"), help="where lost inputs go")
    add("--atheris", action="store_true", help="coverage-guided, of the binary parsers")
    for name in ("--worker", "--report"):
        add(name, help=argparse.SUPPRESS)
    add("--start", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def table(counts: list[Count]) -> str:
    """The counts as Markdown, with a line for all."""
    whole = Count("all")
    for count in counts:
        for name in ("tried", "accepted", "refused", "lost", "seconds"):
            setattr(whole, name, getattr(whole, name) + getattr(count, name))
        whole.peak = max(whole.peak, count.peak)
    lines = [
        "| parser | tried | accepted | refused | lost | most memory | of bytes | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for count in [*counts, whole]:
        size = f"{count.size:,}" if count.size else ""
        lines.append(
            f"| {count.name} | {count.tried:,} | {count.accepted:,} | {count.refused:,} "
            f"| {count.lost:,} | {count.peak / 2**20:.1f} MiB | {size} | {count.seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


class _Job:
    """The process of one parser, begun again behind an input that ended it."""

    def __init__(self, name: str, inputs: int, options: argparse.Namespace) -> None:
        self.count = Count(name)
        self._inputs, self._options = inputs, options
        # In memory, where the system has such a place: a folder is written for every input.
        place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self._folder = tempfile.TemporaryDirectory(prefix="trm-fast-fuzz-", dir=place)
        self._start()

    def _start(self) -> None:
        o, count = self._options, self.count
        command = [sys.executable, __file__, "--worker", count.name, "--keep", str(o.keep)]
        command += ["--inputs", str(self._inputs), "--start", str(count.tried)]
        command += ["--seed", str(o.seed), "--report", self._folder.name]
        command += ["--atheris"] if o.atheris else []
        self._log = open(Path(self._folder.name) / "log", "w+")  # noqa: SIM115
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, stdout=self._log, stderr=subprocess.STDOUT, env=environment
        )

    def finished(self) -> bool:
        if self._process.poll() is None:
            return False
        self._add()
        if self.count.tried < self._inputs and self.count.lost < 100:
            self._start()
            return False
        count = self.count
        sys.stderr.write(f"{count.name}: {count.tried:,} tried, {count.lost} lost\n")
        self._folder.cleanup()
        return True

    def _add(self) -> None:
        """Take over what the worker reported; where it died, its last input is lost."""
        count, report = self.count, Path(self._folder.name) / "report.json"
        done: dict[str, Any] = json.loads(report.read_text()) if report.is_file() else {}
        report.unlink(missing_ok=True)
        for name in ("tried", "accepted", "refused", "lost", "seconds"):
            setattr(count, name, getattr(count, name) + done.get(name, 0))
        if done.get("peak", 0) > count.peak:
            count.peak, count.size = done["peak"], done["size"]
        count.reasons |= done.get("reasons", {})
        if not done.get("finished"):
            self._log.seek(0)
            said = self._log.read()[-2000:].strip()
            reason = f"the process ended with {self._process.returncode}: {said[-200:]!r}"
            kept = _kept(Path(self._folder.name) / "in", self._options.keep, reason)
            count.reasons[reason] = kept
            count.tried, count.lost = count.tried + 1, count.lost + 1


def _kept(folder: Path, keep: Path, reason: str) -> str:
    """Where a lost input was put."""
    target = keep / re.sub(r"\W+", "-", reason)[:80].strip("-")
    if folder.is_dir():
        shutil.copytree(folder, target, dirs_exist_ok=True)
    return str(target)


class _Worker:
    """Judges inputs and counts; reports now and then, so that little is lost with the process."""

    def __init__(self, options: argparse.Namespace) -> None:
        from fuzz_judge import judge, warm
        from fuzz_parsers import BY_NAME

        self.parser, self.judge = BY_NAME[options.worker], judge
        self.folder, self.keep = Path(options.report), options.keep
        self.count = Count(options.worker)
        self.seeds = self.parser.seeds()
        warm(self.parser)
        self._begun = time.process_time()
        used = Path("/proc/self/statm")
        if used.exists():
            pages = int(used.read_text().split()[0])
            limit = pages * resource.getpagesize() + ADDRESS_SPACE
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))

    def take(self, files: dict[str, bytes]) -> None:
        """Judge one input."""
        count = self.count
        verdict = self.judge(self.parser, files, self.folder / "in")
        count.tried += 1
        setattr(count, verdict.kind, getattr(count, verdict.kind) + 1)
        if verdict.peak > count.peak:
            count.peak, count.size = verdict.peak, sum(map(len, files.values()))
        if verdict.kind == "lost":
            self._lose(files, verdict.why)
        if count.tried % 64 == 0:
            self.report()

    def report(self, finished: bool = False) -> None:
        self.count.seconds = time.process_time() - self._begun
        temporary = self.folder / "report.tmp"
        temporary.write_text(json.dumps({**asdict(self.count), "finished": finished}))
        temporary.replace(self.folder / "report.json")

    def _lose(self, files: dict[str, bytes], why: str) -> None:
        reason = _alike(why, self.folder)
        if reason in self.count.reasons:
            return
        smaller = shrink(files, lambda tried: self._loses(tried, reason))
        self._loses(smaller, reason)  # leaves it in the folder
        self.count.reasons[reason] = _kept(
            self.folder / "in", self.keep, f"{self.parser.name} {reason}"
        )

    def _loses(self, files: dict[str, bytes], reason: str) -> bool:
        verdict = self.judge(self.parser, files, self.folder / "in")
        return verdict.kind == "lost" and _alike(verdict.why, self.folder) == reason


def _alike(why: str, folder: Path) -> str:
    """A reason without what differs between inputs."""
    text = re.sub(r"[0-9][0-9,_]*", "N", why.replace(str(folder), ""))
    return re.sub(r"'[^']{20,}'", "'...'", text)[:160]


def shrink(files: dict[str, bytes], loses: Callable[[dict[str, bytes]], bool]) -> dict[str, bytes]:
    """Files that are lost for the same reason with as much as possible cut away."""
    tries = SHRINKS
    for name in sorted(files, key=lambda n: -len(files[n])):
        without = {k: v for k, v in files.items() if k != name}
        tries -= 1
        if without and loses(without):
            files = without
            continue
        size = len(files[name])
        while size and tries > 0:
            at = 0
            while at < len(files[name]) and tries > 0:
                content = files[name]
                tried = {**files, name: content[:at] + content[at + size :]}
                tries -= 1
                if loses(tried):
                    files = tried
                else:
                    at += size
            size //= 2
    return files


def _work(options: argparse.Namespace) -> int:
    if options.atheris:
        return _work_guided(options)
    worker = _Worker(options)
    from fuzz_inputs import damage

    todo = options.inputs - options.start
    hypothetical = todo // BY_HYPOTHESIS if options.start == 0 else 0
    for index in range(options.start, options.inputs - hypothetical):
        rng = Random(f"{options.seed} {worker.parser.name} {index}")
        seed = rng.choice(worker.seeds)
        worker.take(worker.parser.finish(damage(seed, rng, worker.seeds)))
    worker.report()
    if hypothetical:
        _by_hypothesis(worker, hypothetical, options.seed)
    worker.report(finished=True)
    return 0


def _by_hypothesis(worker: _Worker, inputs: int, seed: int) -> None:
    from fuzz_strategies import inputs_for
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    left = inputs

    def one(files: dict[str, bytes]) -> None:
        nonlocal left
        if left:
            left -= 1
            worker.take(files)

    while left:  # it ends early where it has made all there is
        before = left
        run = settings(
            max_examples=left,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )(given(inputs_for(worker.parser))(one))
        seeded(seed)(run)()
        seed += 1
        if before - left < 8:
            break


def _work_guided(options: argparse.Namespace) -> int:
    import atheris

    with atheris.instrument_imports(include=["trm_fast", "numpy.lib", "pickletools", "zipfile"]):
        worker = _Worker(options)
    from fuzz_inputs import damage

    parser = worker.parser
    corpus = worker.folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for index, seed in enumerate(worker.seeds):
        (corpus / str(index)).write_bytes(seed[parser.binary])
    todo = options.inputs - options.start

    def one(data: bytes) -> None:
        worker.take(parser.finish({**worker.seeds[0], parser.binary: data}))
        if worker.count.tried >= todo:
            worker.report(finished=True)
            os._exit(0)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = Random(seed)
        if rng.random() < 0.5:
            return atheris.Mutate(data, most)
        changed = damage({parser.binary: data}, rng, worker.seeds).get(parser.binary, b"")
        return changed[:most]

    arguments = [sys.argv[0], f"-seed={options.seed + options.start}", f"-runs={10 * todo + 1000}"]
    arguments += [
        "-max_len=16384",
        "-len_control=0",
        "-rss_limit_mb=0",
        "-timeout=120",
        str(corpus),
    ]
    atheris.Setup(arguments, one, custom_mutator=mutate)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
