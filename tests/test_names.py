"""One name in six places: the Ops field, the reference function, the backends row, the kernel, the
test file, the bench file.
"""

import importlib
import inspect
import re
from pathlib import Path

import pytest

from trm_fast import backends, ops, reference
from trm_fast.ops import OP_NAMES

TESTS = Path(__file__).resolve().parent


@pytest.mark.parametrize("op", OP_NAMES)
def test_every_op_is_in_its_places(op):
    function = getattr(reference, op)
    assert inspect.isfunction(function)
    assert function.__name__ == op
    assert function.__module__ == "trm_fast.reference"
    rows = [row for row in backends.ROWS if row.op == op]
    assert sum(row.backend == "reference" for row in rows) == 1
    assert len({row.backend for row in rows}) == len(rows)
    assert (TESTS / "ops" / f"test_{op}.py").is_file()
    assert (TESTS.parent / "bench" / f"bench_{op}.py").is_file()


@pytest.mark.parametrize("op", OP_NAMES)
def test_every_op_has_its_kernel(op):
    module = importlib.import_module(f"trm_fast.kernels.{op}")
    function = getattr(module, op)
    assert function is getattr(backends.table("triton"), op)
    assert (function.__name__, function.__module__) == (op, module.__name__)
    assert callable(module.unsupported)
    assert callable(module.examples)
    wanted = inspect.signature(getattr(reference, op)).parameters
    assert list(inspect.signature(function).parameters) == list(wanted)


def test_nothing_else_is_in_those_places():
    assert {row.op for row in backends.ROWS} == set(OP_NAMES)
    assert {row.backend for row in backends.ROWS} <= set(backends.BACKENDS)
    files = {path.stem.removeprefix("test_") for path in (TESTS / "ops").glob("test_*.py")}
    # An operation's tests may fill more than one file: test_<op>_<part>.py.
    parts = {f for f in files for op in OP_NAMES if f.startswith(f"{op}_")}
    of_all = {"extension_contract"}  # what holds for every operation of a backend
    assert files - (parts - set(OP_NAMES)) - of_all == set(OP_NAMES)


def test_the_table_documents_every_op_with_the_arguments_of_its_reference():
    documented = re.sub(r"\s+", " ", ops.Ops.__doc__)
    for op in OP_NAMES:
        assert f" {op}(" in documented
        names = list(inspect.signature(getattr(reference, op)).parameters)
        rest = documented[documented.index(f" {op}(") :]
        listed = re.findall(r"\w+", re.sub(r"\[[^\]]*\]", "", rest[: rest.index("->")]))
        short = {"blocks", "r", "w_gate_up", "w_down"}  # the table says what these are instead
        assert [n for n in names if n not in short and n not in listed] == []


@pytest.mark.parametrize("op", OP_NAMES)
def test_only_a_name_with_an_underscore_changes_its_arguments(op):
    assert op.endswith("_") == (op == "adam_atan2_ema_")
