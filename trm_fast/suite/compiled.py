"""The compiled library of the device: built, registered as PyTorch asks, right, and a step on it.

Owns these items of stages A and B; on a GPU it is the CUDA library, in the dry run the CPU's.
Imported by `stages.py`. "auto" takes the Triton kernels where they serve: beside them this library
would be measured by nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from trm_fast import backends, contenders, op_cases
from trm_fast.contenders import Contender
from trm_fast.extension import library
from trm_fast.extension._common import EXTENSION
from trm_fast.op_bench import RUN, Function, expect, functions, make_inputs, oracle_dtype
from trm_fast.op_cases import OpCase
from trm_fast.ops import POLICIES
from trm_fast.suite.records import measurement
from trm_fast.suite.session import Rows, Session, Skip
from trm_fast.suite.steps import breakdown, check_loss, step_rows
from trm_fast.suite.truth import dtype_tag

BACKENDS = {"cuda": "cuda", "cpu": "cpp"}  # by device
BOARDS = 8


def backend_of(session: Session) -> str:
    """The library's name as a backend; Skip with the reason where it is not there."""
    missing = library.unavailable(session.device.type)
    if missing:
        raise Skip(f"no compiled library: {missing}")
    return BACKENDS[session.device.type]


def ready(session: Session) -> Rows:
    """Build and load it."""
    begin = time.perf_counter()
    backend_of(session)
    state = library.state(session.device.type)
    yield measurement("compiled/ready", time.perf_counter() - begin, "s", note=state)


def dtypes(session: Session) -> Sequence[str]:
    if session.tiny:
        return (session.dtype,)
    halves = ("bfloat16", "float16") if session.device.type == "cuda" else ("bfloat16",)
    return (*halves, "float32")


def workloads(session: Session, dtype: str, size: str) -> Iterator[tuple[OpCase, str]]:
    """Every case of every operation that the library has, and the policy of a recursion."""
    batch = None if size == "tiny" else BOARDS
    for op in backends.EXTENSION_OPS[BACKENDS[session.device.type]]:
        for case in op_cases.cases(op, size, batch, dtype):
            if op != "deep_recursion":
                yield case, ""
                continue
            for policy in POLICIES[: session.count(len(POLICIES))]:
                yield op_cases.deep_recursion(replace(case.config, policy=policy)), f" {policy}"


def function_of(session: Session, case: OpCase, backend: str) -> Function:
    found, absent = functions(case, session.device)
    if backend not in found:
        raise Skip(f"{backend} does not serve {case.op}: {absent[backend]}")
    return found[backend]


def correct(session: Session) -> Rows:
    """Every operation in every dtype, forward and backward, against a wider one; each policy.

    Raises:
        ParityError: one of them computes something else.
    """
    backend = backend_of(session)
    for dtype in dtypes(session):
        for case, policy in workloads(session, dtype, session.size):
            judged, function = case.judged or case, function_of(session, case, backend)
            for direction in session.directions(case):
                wide = oracle_dtype(judged)
                expectation = expect(judged, direction, 0, session.device, wide)
                error = expectation.check(function, backend)
                name = f"compiled/{case.op}/{case.name}/{direction} {dtype_tag(case)}{policy}"
                yield measurement(name, error, "of allowed", contender=backend)


class Calls(TorchDispatchMode):
    """The library's operations that are called inside, with their arguments, each once."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func._schema.name
        if func.namespace == EXTENSION:
            if name.endswith("_bwd"):  # is given tensors with a gradient, and has none itself
                args = tree_map_only(Tensor, Tensor.detach, args)
            self.found.setdefault(name, (func, args))
        return func(*args, **(kwargs or {}))


def registered(session: Session) -> Rows:
    """What `torch.library.opcheck` says of each operation, forward and backward, at tiny sizes.

    Raises:
        OpCheckError: one is registered as something that it is not.
    """
    backend = backend_of(session)
    for case, policy in workloads(session, session.dtype, "tiny"):
        inputs = make_inputs(case, 0, session.device)
        with Calls() as calls:
            RUN[case.directions[-1]](function_of(session, case, backend), inputs)
        for name, (op, args) in calls.found.items():
            torch.library.opcheck(op, args)
            yield measurement(f"registered/{name}/{case.name}{policy}", 1.0, "of 1")


def step(session: Session, mixer: str) -> Rows:
    """Our train step on this library, its loss, and what its kernels took."""
    config = replace(session.config(mixer, 768), policy="save")
    contender = Contender("compiled library", backend=backend_of(session), policy="save")
    entry = contenders.prepare(contender, config, "train", None, session.device)
    name = f"{contender.name}/{mixer}"
    yield from step_rows(session, name, entry, session.count(15))
    yield measurement(f"{name}/loss", check_loss(session, entry), "off the reference")
    yield from breakdown(session, f"{name}/kernels", entry.run)
