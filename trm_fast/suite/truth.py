"""Is it right: every operation against a wider dtype, and whole steps against the reference.

Owns these items of stage A; they are gates: where one goes wrong nothing is timed. Imported by
`stages.py`. Inputs are fresh for every seed, and fresh memory is filled with NaN.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from trm_fast import contenders
from trm_fast.config import ModelConfig
from trm_fast.contenders import LOSS_LIMITS, Contender, ParityError
from trm_fast.op_bench import expect, functions, operations, oracle_dtype
from trm_fast.op_cases import OpCase, cases
from trm_fast.suite.records import measurement
from trm_fast.suite.session import Rows, Session, Skip

SEEDS = (0, 1, 2)
BATCHES = (8, 768)
SUPERVISION_STEPS = 3


def check_case(session: Session, case: OpCase, seeds: Sequence[int]) -> Rows:
    """Every compiled backend on one case, forward and backward; errors over what is allowed.

    Raises:
        ParityError: one of them computes something else.
    """
    found, _ = functions(case, session.device, session.interpreted)
    del found["reference"]
    judged = case.judged or case
    for direction in session.directions(case):
        worst = dict.fromkeys(found, 0.0)
        for seed in seeds:
            expectation = expect(judged, direction, seed, session.device, oracle_dtype(judged))
            for name, function in found.items():
                worst[name] = max(worst[name], expectation.check(function, name))
        for name, error in worst.items():
            tag = f"{case.op}/{case.name}/{direction} B{case.config.batch_size} {dtype_tag(case)}"
            yield measurement(f"correct/{tag}", error, "of allowed", contender=name)


def dtype_tag(case: OpCase) -> str:
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[case.config.forward_dtype]


def need_fused(session: Session, op: str) -> None:
    """Skip where there is nothing to hold against the reference."""
    for case in cases(op, session.size, dtype=session.dtype):
        found, absent = functions(case, session.device, session.interpreted)
        if len(found) > 1:
            return
    raise Skip(f"no compiled backend serves {op}: {'; '.join(sorted(set(absent.values())))}")


def operation(session: Session, op: str) -> Rows:
    """One operation at a few boards and at all of them."""
    need_fused(session, op)
    for batch in (2,) if session.tiny else BATCHES:
        for case in cases(op, session.size, batch, session.dtype):
            yield from check_case(session, case, SEEDS[:1] if session.tiny else SEEDS)


def other_dtypes(session: Session, ops: Sequence[str]) -> Rows:
    """The dtypes that the official networks do not use, at a few boards."""
    if session.tiny:
        raise Skip("the dry run has one dtype")
    for dtype in ("float32", "float16"):
        for op in ops:
            for case in cases(op, "real", 8, dtype):
                yield from check_case(session, case, SEEDS[:1])


def fused_head(session: Session, config: ModelConfig) -> nn.Module:
    """A loss head that runs on the compiled backends; interpreted ones in the dry run."""
    name = contenders.fused(config, session.device)
    if not name and not session.interpreted:
        raise Skip("no compiled backend serves this network here")
    contender = Contender(name or "interpreted", backend="auto")
    head = contenders.build(
        contender, replace(config, backend="auto", policy="save"), None, session.device
    )
    if session.interpreted:
        head.model.inner.ops = operations(config, session.device, interpreted=True)  # type: ignore[union-attr]
    return head


def losses(head: nn.Module, carry: Any, batch: dict[str, torch.Tensor]) -> tuple[Any, float]:
    """One supervision step with its backward; the next carry and the loss per board."""
    torch.manual_seed(7)
    head.zero_grad(set_to_none=True)
    carry, loss, _, _, _ = head(return_keys=(), carry=carry, batch=batch)
    loss.backward()
    return carry, float(loss.detach()) / len(batch["inputs"])


def widened(carry: Any, dtype: torch.dtype) -> Any:
    """The same carry with states of another dtype."""
    wide = copy.copy(carry)
    wide.inner_carry = copy.copy(carry.inner_carry)
    wide.inner_carry.z_H = carry.inner_carry.z_H.to(dtype)
    wide.inner_carry.z_L = carry.inner_carry.z_L.to(dtype)
    return wide


def supervision_steps(session: Session, mixer: str) -> Rows:
    """The loss of each supervision step, from the reference's carry, beside float32's.

    A deep recursion amplifies rounding: a loss may be twice as far from that of float32 as the
    reference's in bfloat16, and the two per cent that the whole-step benchmarks allow.
    """
    config = replace(session.config(mixer, 768), policy="save", backend="reference")
    fused = fused_head(session, config).train()
    plain = contenders.build(Contender("reference"), config, None, session.device).train()
    wide_config = replace(config, forward_dtype="float32")
    wide = contenders.build(Contender("reference"), wide_config, None, session.device).train()
    wide.load_state_dict(plain.state_dict())
    batch = contenders.make_batch(config, session.device)
    with torch.device(session.device):
        carry = plain.initial_carry(batch)  # type: ignore[operator]
    for part in ("z_H", "z_L"):  # uninitialised: all items start anew
        getattr(carry.inner_carry, part).zero_()
    for step in range(session.count(SUPERVISION_STEPS)):
        with torch.no_grad():
            torch.manual_seed(7)
            _, exact, _, _, _ = wide((), widened(carry, torch.float32), batch)
        want = float(exact) / len(batch["inputs"])
        _, got = losses(fused, carry, batch)
        carry, base = losses(plain, carry, batch)
        limit = LOSS_LIMITS[getattr(torch, config.forward_dtype)]
        allowed = 2 * abs(base - want) + limit * abs(want)
        name = f"supervision step {step + 1}/{mixer}"
        yield measurement(
            f"{name}/loss", got, "a board", note=f"reference {base:.5f}, float32 {want:.5f}"
        )
        gradients = gradient_distance(fused, plain)
        yield measurement(f"{name}/gradient", gradients, "relative L2", note="for information")
        if not abs(got - want) <= allowed:
            raise ParityError(
                f"{name}: the loss {got:.5f} is off from {want:.5f} by more than {allowed:.2e}"
            )


def gradient_distance(a: nn.Module, b: nn.Module) -> float:
    """Relative L2 between the gradients of all weights of two heads."""
    difference = norm = 0.0
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        if p.grad is not None and q.grad is not None:
            difference += float((p.grad - q.grad).double().square().sum())
            norm += float(q.grad.double().square().sum())
    return (difference / norm) ** 0.5 if norm else 0.0
