"""Our model on a recording: each value of each supervision step against the official one.

Owns: building our model and carry for a Recording, the limit for each value, and the report.
Imported by tests/test_golden.py (recorded files) and tests/test_official.py (live recordings).
Source: each supervision step is compared on its own, from the official carry; see tests/parity.py.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from golden.cases import SKETCH_SIZE, Case, compact, fill_weights, run_step, states, step_seed
from golden.recording import Recording, is_exact, poisoned, unflatten, weights_digest
from parity import L2_FLOORS, L2_LIMIT, relative_l2
from safetensors.torch import load_file

from trm_fast.extension import library
from trm_fast.losses import ACTLossHead
from trm_fast.model import Model

HERE = Path(__file__).resolve().parent


class Row(NamedTuple):
    """One compared value: relative L2 error (inf or 0 where it has to be equal) and its limit."""

    step: int
    name: str
    error: float
    limit: float

    def __str__(self) -> str:
        return f"step {self.step} {self.name}: {self.error:.3e} > {self.limit:.3e}"


@functools.cache
def recorded() -> dict[str, Any]:
    """recorded.json."""
    return json.loads((HERE / "recorded.json").read_text())


def tensors_of(name: str) -> dict[str, torch.Tensor]:
    """The tensors of one file beside recorded.json."""
    return load_file(HERE / f"{name}.safetensors")


def load_case(name: str) -> Recording:
    return unflatten(tensors_of(name), recorded()["cases"][name])


def own_head(case: Case, **changes: Any) -> ACTLossHead:
    """Our model in our loss head, with the case's weights; `changes` are further config keys."""
    model = Model(case.own_config | changes)
    fill_weights(model, case.seed, zero_rows=case.twin)
    head = ACTLossHead(model, case.loss_type)
    return head.train(case.train)


def carry_before(recording: Recording, step: int, head: ACTLossHead) -> Any:
    """The official carry that `step` began with, as ours; before the first: ours, poisoned."""
    carry = head.initial_carry(recording.batches[step])
    if step == 0:
        return poisoned(carry)
    made = recording.steps[step - 1]
    before = {name: made[name] for name in states(carry.inner_carry)}
    inner = dataclasses.replace(carry.inner_carry, **before)
    data = {key: made[f"data/{key}"] for key in recording.batches[step]}
    return dataclasses.replace(
        carry, inner_carry=inner, steps=made["steps"], halted=made["halted"], current_data=data
    )


# Values that the official code computes in float64 and fused operations in float32.
FUSED_LOSSES = {"loss", "metric/lm_loss"}
# Errors in units of the limits that the reference is held to. Its operations are the official ones;
# other kernels are another draw of rounding, which a deep recursion amplifies by chance: three
# instruction sets gave 0.6 to 1.9 on the same three steps. One pass is held to the strict rule in
# tests/ops. Without fused multiply-adds one gradient of a bias, two numbers that do not average,
# comes to 7.4.
FUSED_FACTOR, FUSED_FACTOR_OF_FEW = 2.5, {"generic": 10.0}
# The limits are those of the recording machine. Where the states are not its own to the bit,
# PyTorch's products round otherwise, and the official code misses the limits, too: on a Xeon with
# AVX-512 by up to 4.3, in the same values as ours, which differ from it by 1e-6.
OTHER_PRODUCTS = 6.0


def compare(recording: Recording, backend: str = "reference", **changes: Any) -> list[Row]:
    """A Row for every value of every step; the caller asserts on those over their limit."""
    case = recording.case
    head = own_head(case, backend=backend, **changes)
    assert weights_digest(head.model, case) == recording.weights, "other weights than recorded"
    floor = L2_FLOORS[getattr(torch, case.own_config["forward_dtype"])]
    low = case.own_config["forward_dtype"] != "float32"
    rows = []
    for step, batch in enumerate(recording.batches):
        carry = carry_before(recording, step, head)
        _, made = run_step(head, carry, batch, step_seed(case.seed, step))
        expected = recording.steps[step] | (recording.oracle[step] if case.oracle else {})
        assert made.keys() == expected.keys(), sorted(made.keys() ^ expected.keys())
        names = states(carry.inner_carry)
        alike = all(torch.equal(made[name], recording.steps[step][name]) for name in names)
        for name, want in expected.items():
            got = made[name]
            if backend != "reference" and low and name == "out/preds":
                continue  # of nearly equal logits; those are compared
            if is_exact(name):
                rows.append(Row(step, name, 0.0 if torch.equal(got, want) else math.inf, 0.0))
                continue
            if want.shape != got.shape:
                assert want.numel() == SKETCH_SIZE < got.numel(), (name, got.shape, want.shape)
                got = compact(got, 0)
            limit = 2.0 * recording.errors[step][name] + floor if case.oracle else L2_LIMIT
            if backend != "reference":
                few = FUSED_FACTOR_OF_FEW.get(library.instruction_set() or "", FUSED_FACTOR)
                limit *= FUSED_FACTOR if want.numel() > 2 else few
            elif not alike:
                limit *= OTHER_PRODUCTS
            rows.append(Row(step, name, relative_l2(got, want), limit))
        wrong = {
            name: (str(value.dtype), recording.dtypes[name])
            for name, value in made.items()
            if str(value.dtype) != f"torch.{recording.dtypes[name]}"
            and not (backend != "reference" and name in FUSED_LOSSES)
        }
        assert not wrong, f"dtypes (ours, official): {wrong}"
    return rows


def assert_within(rows: list[Row]) -> None:
    """No row over its limit; the message lists the worst ten."""
    over = sorted(
        (r for r in rows if not r.error <= r.limit), key=lambda r: -r.error / (r.limit or 1)
    )
    listed = "\n".join(map(str, over[:10]))
    assert not over, f"{len(over)} of {len(rows)} values differ:\n{listed}"
