"""Every parser on damaged and hostile input: documented errors, bounded memory, nothing written.

The short form of tools/fuzz.py: the same parsers and judge, few inputs, always the same ones.
"""

import importlib.util
import os
import random
import sys
from pathlib import Path

import pytest
from fuzz_inputs import damage
from fuzz_judge import judge, warm
from fuzz_parsers import BY_NAME, PARSERS, Parser
from fuzz_strategies import inputs_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trm_fast.durable import CheckpointError

short = settings(
    max_examples=5,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, *HealthCheck],
)
every = pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)


@every
def test_valid_files_are_accepted(parser, tmp_path):
    warm(parser)
    for seed in parser.seeds():
        verdict = judge(parser, parser.finish(seed), tmp_path / "in")
        assert verdict.kind == "accepted", verdict


@every
def test_damaged_files_are_read_or_refused(parser, tmp_path):
    warm(parser)
    seeds = parser.seeds()
    for number in range(12):
        rng = random.Random(f"{parser.name} {number}")
        files = parser.finish(damage(rng.choice(seeds), rng, seeds))
        verdict = judge(parser, files, tmp_path / "in")
        assert verdict.kind != "lost", (number, verdict)


@every
def test_files_of_hypothesis_are_read_or_refused(parser, tmp_path):
    warm(parser)

    @short
    @given(inputs_for(parser))
    def run(files):
        verdict = judge(parser, files, tmp_path / "in")
        assert verdict.kind != "lost", verdict

    run()


@short
@given(st.data())
def test_damage_can_be_made_smaller_by_hypothesis(data):
    """It draws from any Random, so that a failure found so shrinks by itself."""
    seeds = BY_NAME["ARC JSON"].seeds()
    files = damage(seeds[0], data.draw(st.randoms(use_true_random=False)), seeds)
    assert all(type(content) is bytes for content in files.values())


# The judge itself: what it must not let pass


def fake(read, **kinds):
    return Parser("fake", lambda: ({"a.txt": b"x"},), read, (CheckpointError,), **kinds)


def refuse(text):
    def read(folder):
        error = CheckpointError("x")
        error.args = (text,)
        raise error

    return read


def write(path):
    def read(folder):
        target = folder / path
        if path.startswith("out"):
            target.parent.mkdir()
        target.write_text("x")

    return read


def allocate(folder):
    return bytes(24 << 20)


@pytest.mark.parametrize(
    ("read", "kind", "why"),
    [
        (lambda folder: None, "accepted", ""),
        (refuse("m.pt: is damaged"), "refused", "m.pt: is damaged"),
        (refuse("two\nlines"), "lost", "is not one line"),
        (refuse("\x1b[2J"), "lost", "is not printable"),
        (refuse(" "), "lost", "says nothing"),
        (refuse("x" * 1001), "lost", "is too long"),
        (lambda folder: {}["a"], "lost", "KeyError"),
        (lambda folder: exit(3), "lost", "SystemExit"),
        (allocate, "lost", r"bytes allocated, 16,777,280 allowed"),
        (write("out/b"), "accepted", ""),
        (write("b"), "lost", "did open"),
        (write("../b"), "lost", "did open"),
        (lambda folder: (folder / "a.txt").unlink(), "lost", "did os.remove"),
        (lambda folder: os.system("true"), "lost", "did os.system"),
    ],
)
def test_the_judge(read, kind, why, tmp_path):
    verdict = judge(fake(read), {"a.txt": b"x"}, tmp_path / "in")
    assert verdict.kind == kind and why in verdict.why


# The tool


@pytest.fixture(scope="module")
def tool():
    path = Path(__file__).resolve().parent.parent.parent / "tools" / "fuzz.py"
    spec = importlib.util.spec_from_file_location("fuzz_tool", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_tool"] = module  # where its dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_a_lost_input_is_made_small(tool):
    files = {"a": b"x" * 500 + b"BAD" + b"y" * 70, "b": b"zzz", "c/d": b""}
    assert tool.shrink(files, lambda tried: b"BAD" in tried.get("a", b"")) == {"a": b"BAD"}


def test_the_table_adds_up(tool):
    counts = [
        tool.Count("npy", 10, 3, 6, 1, 2**20, 1234, 2.4),
        tool.Count("boards", 5, 5, 0, 0, 2**21, 0, 1.0),
    ]
    assert tool.table(counts).splitlines()[2:] == [
        "| npy | 10 | 3 | 6 | 1 | 1.0 MiB | 1,234 | 2 |",
        "| boards | 5 | 5 | 0 | 0 | 2.0 MiB |  | 1 |",
        "| all | 15 | 8 | 6 | 1 | 2.0 MiB |  | 3 |",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--atheris"], "--atheris needs atheris (pip install 'trm-fast[fuzz]')"),
        (["--only", "npz"], "no parser 'npz': dataset, npy, "),
    ],
)
def test_what_the_tool_cannot_do_is_one_line(tool, monkeypatch, capsys, words, said):
    monkeypatch.setattr(sys, "argv", ["fuzz.py", *words])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert tool.main() == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
