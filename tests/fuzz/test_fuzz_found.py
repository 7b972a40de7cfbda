"""What fuzzing found, each input made small: it is refused in one line, or read, and costs little.

Every row failed once: by an error of another kind, by memory, or by a message without end.
"""

import json
import struct

import pytest
from fuzz_binary import npy
from fuzz_inputs import datasets, signed
from fuzz_judge import judge, warm
from fuzz_parsers import BY_NAME

from trm_fast.config import ConfigError
from trm_fast.overrides import parse_train, read_mapping
from trm_fast.progress import MetricsWriter, read_metrics


def header(shape, descr="|u1"):
    return {"descr": descr, "fortran_order": False, "shape": shape}


def long_header(version, length):
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<I", length) + b"{}"


GROUPED = datasets()[0]
FLAT, NANO = datasets()[2:]
LONG = [["a" * 50] * 50] * 50
BOMB = "a0: &a0 {k: v}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 9)
)


def grouped(**changes):
    said = json.loads(GROUPED["train/dataset.json"]) | changes
    return signed({**GROUPED, "train/dataset.json": json.dumps(said).encode()})


def standing(**changes):
    """A position in training data with something else in it."""
    files = BY_NAME["data position"].seeds()[1]
    state = json.loads(files["train.json"])
    state["position"] |= changes
    return {"train.json": json.dumps(state).encode()}


def listing(name):
    """A data set whose manifest lists one more file."""
    said = json.loads(GROUPED["manifest.json"])
    said["files"][name] = "0" * 64
    return signed({**GROUPED, "manifest.json": json.dumps(said).encode()})


def manifest(**changes):
    files = BY_NAME["checkpoint"].seeds()[0]
    name = "step_2/manifest.json"
    return signed({**files, name: json.dumps(json.loads(files[name]) | changes).encode()})


def pointing(text):
    return {**BY_NAME["run folder"].seeds()[0], "last": text.encode()}


FOUND = [
    # A reader that was given a limit reserved that much: 1 GiB for any identifiers.json.
    ("identifiers", {"identifiers.json": b'["a"]'}, ""),
    ("ARC scoring", BY_NAME["ARC scoring"].seeds()[0], ""),
    # NumPy reserves what a header says of its own length.
    ("npy", {**FLAT, "all__inputs.npy": long_header(2, 2**31)}, "a header of 2147483648 bytes"),
    ("npy", {**FLAT, "all__labels.npy": long_header(3, 2**32 - 1)}, "a header of 4294967295 b"),
    # Rows of no tokens take no bytes, in any number.
    ("npy", {**FLAT, "all__inputs.npy": npy(header((2**30, 0)), b"")}, "expected [E, L]"),
    ("dataset", {**NANO, "all__inputs.npy": npy(header((0, 2**62)), b"")}, "of 0 integers"),
    ("dataset", {**NANO, "all__labels.npy": npy(header(()), b"\1")}, "shape (), expected [E, L]"),
    # A product of sizes that overflows was a warning of NumPy's beside the error.
    ("npy", {**FLAT, "all__inputs.npy": npy(header((2**62, 4)), b"")}, "not a readable .npy"),
    # A place outside of a generator's buffer was believed, and read from.
    ("data position", standing(rng=" ".join("0" * 10) + " -5 0 0"), "no state of a generator"),
    ("data position", standing(set=7), "a count out of range"),
    ("data position", standing(next=1.5), "a count out of range"),
    ("data position", {"train.json": b'{"iters": 1}'}, "the position in the data is damaged"),
    # Messages that held all of what they complained about.
    ("dataset", grouped(mean_puzzle_examples=LONG), "expected a number >= 0"),
    ("dataset", grouped(vocab_size=LONG), "expected an integer >= 1"),
    ("dataset", grouped(sets=LONG), "expected a list of different names"),
    ("checkpoint", manifest(format=LONG), "; 1 is known"),
    ("checkpoint", manifest(files={"a" * 9000: {}}), "manifest.json: lists aaaa"),
    ("dataset", listing("x" * 300), ""),
    # Each of 9,000 empty lines was filled up to the length of the longest.
    ("boards", {"boards.txt": b"#" * 9000 + b"SG" + b"\n" * 9000}, "a line of 9002 characters"),
    # A path that is no file's, because of its length.
    ("paths", {"line.argv": b"x" * 300}, ""),
    ("paths", {"line.argv": b"x" * 300 + b"/last"}, ""),
    ("command line", {"line.argv": b"resume=" + b"x" * 300}, "resume must be auto, never or"),
    # What PyYAML quotes of a file was printed as it is.
    ("run config", {"c.yaml": '{"a\U0009c174": "b" "c"'.encode()}, "is not YAML: while parsing"),
    # PyYAML makes scalars by calls that fail in ways of their own.
    ("run config", {"c.yaml": b"lr: !!int ''"}, "c.yaml is not YAML: string index out of range"),
    ("run config", {"c.yaml": b"ema: !!bool maybe"}, "c.yaml is not YAML: 'maybe'"),
    ("run config", {"c.yaml": b"lr: !!timestamp x"}, "c.yaml is not YAML: "),
    ("run config", {"c.yaml": b"lr: 1" + b":1" * 200 + b".5"}, "c.yaml is not YAML that can be"),
    # Nine lines that stand for 9^8 settings.
    ("run config", {"c.yaml": BOMB.encode()}, "line 2: merge keys (<<) are not allowed"),
    ("all_config.yaml", {"c.yaml": BOMB.encode()}, "line 2: merge keys (<<) are not allowed"),
    # The pointer of a run that is resumed led anywhere, or was longer than any name.
    ("run folder", pointing("step_" + "9" * 3000), ""),
    ("run folder", pointing("../../../../../../../../etc"), ""),
    # What a resumed run takes over of its metrics must be a number or a text.
    ("metrics.jsonl", {"metrics.jsonl": b'{"step": 1, "a": NaN}\n{"step": 2, "a": 1e999}\n'}, ""),
    ("metrics.jsonl", {"metrics.jsonl": b'{"step": 1, "\\ud800": 1}\n'}, ""),
    ("metrics.jsonl", {"metrics.jsonl": b'{"step": 1, "a": [1]}\n[]\n7\n'}, ""),
]


@pytest.mark.parametrize(("name", "files", "said"), FOUND, ids=range(len(FOUND)))
def test_what_was_found(name, files, said, tmp_path):
    parser = BY_NAME[name]
    warm(parser)
    verdict = judge(parser, files, tmp_path / "in")
    assert verdict.kind == ("refused" if said else "accepted"), verdict
    assert said in verdict.why


def test_metrics_that_are_not_finite_are_none_and_other_values_no_metrics(tmp_path):
    lines = ['{"step": 1, "a": NaN}', '{"step": 2, "a": -1e999, "b": "x"}', '{"step": 3, "a": {}}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    kept = [{"step": 1, "a": None}, {"step": 2, "a": None, "b": "x"}]
    assert read_metrics(tmp_path) == kept
    MetricsWriter(tmp_path, resume_step=5)
    assert read_metrics(tmp_path) == kept
    assert (tmp_path / "metrics.csv").read_text() == "step,a,b\n1,,\n2,,x\n"


def test_a_pointer_to_elsewhere_is_not_followed(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"seed": 5}')
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last").write_text("../other")
    with pytest.raises(ConfigError, match="resume must be auto, never or a run folder"):
        parse_train([f"resume={tmp_path / 'run'}"])


@pytest.mark.parametrize("name", ["c.json", "c.yaml"])
def test_a_file_of_settings_has_a_size(name, tmp_path):
    text = '{"seed": 3}'
    (tmp_path / name).write_text(text.ljust(2**18))
    assert read_mapping(tmp_path / name) == {"seed": 3}
    (tmp_path / name).write_text(text.ljust(2**18 + 1))
    with pytest.raises(ConfigError, match="larger than 262144 bytes, not a configuration"):
        read_mapping(tmp_path / name)


def test_aliases_are_read_as_yaml_writes_them(tmp_path):
    (tmp_path / "c.yaml").write_text("a: &id001 [1, 2]\nb: *id001\n")
    assert read_mapping(tmp_path / "c.yaml") == {"a": [1, 2], "b": [1, 2]}
