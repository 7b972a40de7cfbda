"""Every parser on damaged and hostile input: documented errors, bounded memory, nothing written.

The short form of tools/fuzz.py: the same parsers and judge, few inputs, always the same ones.
"""

import os
import random

import pytest
from fuzz_inputs import damage
from fuzz_judge import judge
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
    for seed in parser.seeds():
        judge(parser, parser.finish(seed), tmp_path / "in")  # what is imported late, is now
        verdict = judge(parser, parser.finish(seed), tmp_path / "in")
        assert verdict.kind == "accepted", verdict


@every
def test_damaged_files_are_read_or_refused(parser, tmp_path):
    seeds = parser.seeds()
    for number in range(12):
        rng = random.Random(f"{parser.name} {number}")
        files = parser.finish(damage(rng.choice(seeds), rng, seeds))
        verdict = judge(parser, files, tmp_path / "in")
        assert verdict.kind != "lost", (number, verdict)


@every
def test_files_of_hypothesis_are_read_or_refused(parser, tmp_path):
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
