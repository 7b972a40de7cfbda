"""What a step keeps, and what its process takes: the figures' origin, their parts, the child.

No test looks at how large anything is beyond what must be so.
"""

from dataclasses import replace

import pytest
import torch

from trm_fast import memory_bench
from trm_fast.contenders import Contender, kept_for_backward, prepare
from trm_fast.workloads import CASES, quick

CPU = torch.device("cpu")
RECIPE = quick(CASES["recipe"])


def test_saved_bytes_follow_the_policy():
    """What "recompute" keeps is less than what "save" keeps, and weights are not counted."""
    kept = {}
    for policy in ("save", "recompute"):
        config = replace(RECIPE.model, policy=policy)
        kept[policy] = kept_for_backward(
            prepare(Contender("reference"), config, "train", None, CPU)
        )
    assert 0 < kept["recompute"] < kept["save"]


def test_memory_is_set_beside_the_official_codes():
    rows = [
        {"contender": "cpp", "available": True, "note": "", "saved_mib": 1.0, "before_mib": 90.0}
        | {"peak_mib": 100.0, "grown_mib": None},
        {"contender": "official", "available": True, "note": "", "saved_mib": 4.0}
        | {"before_mib": 90.0, "peak_mib": 200.0, "grown_mib": 110.0},
        {"contender": "b", "available": False, "note": "failed: killed"},
    ]
    found = memory_bench.of_official(rows)
    assert found["cpp"] == {"saved_mib": 0.25, "peak_mib": 0.5}
    assert found["official"] == {"saved_mib": 1.0, "peak_mib": 1.0, "grown_mib": 1.0}
    assert memory_bench.of_official(rows[:1]) == {}
    shown = {"case": "official", "dtype": "bfloat16", "batch": 32, "saved_batch": 8, "threads": 1}
    lines = memory_bench.text(shown | {"rows": rows, "of_official": found}).splitlines()
    assert lines[2].split() == ["cpp", "1.0", "25%", "90", "100.0", "50%"]
    assert lines[4].endswith("failed: killed")
    assert max(map(len, lines)) <= 120


def test_memory_of_a_step_in_a_process_of_its_own():
    case = quick(CASES["official"])
    found = memory_bench.in_a_child(Contender("reference", policy="save"), case, 3, 1, None)
    assert found["available"], found["note"]
    assert (found["contender"], found["policy"]) == ("reference", "save")
    entry = prepare(Contender("reference", policy="save"), case.model, "train", None, CPU)
    assert found["saved_mib"] == kept_for_backward(entry) / 2**20
    assert found["peak_mib"] > 50
    if found["source"] == "VmHWM":
        assert 0 <= found["grown_mib"] == found["peak_mib"] - found["before_mib"]
    failing = memory_bench.in_a_child(Contender("o", official=True), case, 3, 1, None)
    assert not failing["available"]
    assert failing["note"].startswith("failed: ")


def test_the_largest_size_counts_from_the_reset_on():
    if not memory_bench.reset_peak():
        pytest.skip("the system does not tell")
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    high, _ = memory_bench.peak()
    assert high > (memory_bench.resident() or 0) - 2**20
    del block
    memory_bench.reset_peak()
    after, source = memory_bench.peak()
    assert (after < high - 32 * 2**20, source) == (True, "VmHWM")
