"""One case run by the official code: its values, its float64 oracle, and both as a file.

Owns: running the official classes on the cases of cases.py, the float64 patches, and the mapping of
a Recording to and from tensors plus JSON.
Imported by record.py, which writes the files, by tests/test_golden.py, which reads them, and by
tests/test_official.py, which makes the same recordings live.
Source: the official checkout; where it crashes, the smallest change that lets its own lines run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from golden.cases import (
    SKETCH_OVER,
    Case,
    compact,
    digest,
    fill_weights,
    make_batch,
    run_step,
    states,
    step_seed,
)
from official import NETWORKS, Official
from parity import relative_l2
from torch import nn

# Rows that the recorder wants clear of a decision: |q| and the lead of the best logit.
MARGIN = {"float32": 2e-3, "float64": 2e-3, "bfloat16": 3e-2, "float16": 1e-2}
EXACT = ("steps", "halted", "random", "data/", "out/preds")
COUNTS = ("metric/count", "metric/exact_accuracy", "metric/q_halt_accuracy", "metric/steps")


def is_exact(name: str) -> bool:
    """Whether a value of run_step has to be equal, not close."""
    return name.startswith(EXACT) or name in COUNTS


def is_state(name: str) -> bool:
    """Whether a value of run_step is a recurrent state."""
    return name.startswith("z_")


@dataclasses.dataclass
class Recording:
    """A case as run: per supervision step the batch, values, oracle values and official errors."""

    case: Case
    dtypes: dict[str, str]
    steps: list[dict[str, torch.Tensor]]
    batches: list[dict[str, torch.Tensor]]
    oracle: list[dict[str, torch.Tensor]]
    errors: list[dict[str, float]]
    weights: str


class _Tables64(nn.Module):
    """The rotary tables of the published formula in float64, in the place of RotaryEmbedding."""

    def __init__(self, dim: int, max_position_embeddings: int, base: float) -> None:
        super().__init__()
        frequency = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angle = torch.arange(max_position_embeddings, dtype=torch.float64)[:, None] * frequency
        self.angle = torch.cat((angle, angle), dim=-1)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.angle.cos(), self.angle.sin()


def _rms_norm64(hidden_states: torch.Tensor, variance_epsilon: float) -> torch.Tensor:
    mean_square = (hidden_states * hidden_states).mean(-1, keepdim=True)
    return hidden_states / (mean_square + variance_epsilon).sqrt()


@contextlib.contextmanager
def in_float64(official: Official) -> Iterator[None]:
    """Official models built and run inside compute in float64 (q logits still leave as fp32)."""
    with contextlib.ExitStack() as patches:
        for kind in NETWORKS:
            network = official.network(kind)
            patches.enter_context(mock.patch.object(network, "rms_norm", _rms_norm64))
            patches.enter_context(mock.patch.object(network, "RotaryEmbedding", _Tables64))
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def official_head(official: Official, config: dict[str, Any], loss_type: str) -> Any:
    """Official model in the official loss head, with its crashes stepped around.

    The head hands valid_mask to softmax_cross_entropy, which does not take it, and logits with the
    prefix cut off, which it cannot view; the second inner call of no_ACT_continue=False is unpacked
    into five values where the inner model returns three.
    """
    model = official.model(config)
    head = official.ACTLossHead(model, loss_type)
    if loss_type == "softmax_cross_entropy":
        head.loss_fn = lambda logits, labels, ignore_index, valid_mask: (
            official.losses.softmax_cross_entropy(
                logits.contiguous(), labels, ignore_index=ignore_index
            )
        )
    if not config["no_ACT_continue"] and config.get("name", "trm").startswith("trm"):
        plain, calls = model.inner.forward, [0]

        def padded(carry: Any, batch: Any) -> tuple[Any, ...]:
            calls[0] += 1
            second = model.training and config["halt_max_steps"] > 1 and calls[0] % 2 == 0
            return (*plain(carry, batch), None, None) if second else plain(carry, batch)

        model.inner.forward = padded
    return head


def weights_digest(model: nn.Module, case: Case) -> str:
    """sha256 over all state_dict entries (without the twin's puzzle rows), sorted by name."""
    state = sorted(model.state_dict().items())
    kept = [f"{k} {digest(v)}" for k, v in state if not (case.twin and "puzzle_emb" in k)]
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()


def _double(carry: Any) -> Any:
    wide = {name: state.double() for name, state in states(carry.inner_carry).items()}
    inner = dataclasses.replace(carry.inner_carry, **wide)
    return dataclasses.replace(carry, inner_carry=inner)


def poisoned(carry: Any) -> Any:
    """The first carry is uninitialised memory: make sure that none of it is read."""
    for state in states(carry.inner_carry).values():
        state.fill_(math.nan)
    for value in carry.current_data.values():
        value.fill_(0)
    return carry


def _labels_from_predictions(head: Any, batches: list[dict[str, torch.Tensor]], seed: int) -> None:
    """Row 1 gets three labels, what the model will say when it halts: a solved puzzle."""
    if len(batches[0]["inputs"]) == 1:
        return
    carry = poisoned(head.initial_carry(batches[0]))
    taken = 0
    for step, batch in enumerate(batches):
        taken = step if bool(carry.halted[1]) else taken
        carry, made = run_step(head, carry, batch, step_seed(seed, step))
        batches[taken]["labels"][1] = -100
        batches[taken]["labels"][1, :3] = made["out/preds"][1, :3].to(torch.int32)


def _lacks(steps: list[dict[str, torch.Tensor]], case: Case) -> str | None:
    """What a recording does not show or decides too closely, or None."""
    margin = MARGIN[case.own_config["forward_dtype"]]
    for made in steps:
        q = made["out/q_halt_logits"]
        best = made["out/logits"].double().topk(2).values
        if not case.own_config["no_ACT_continue"]:
            q = torch.stack((q, q - made["out/q_continue_logits"]))
        if float(q.abs().min()) < margin:
            return "a q logit close to its threshold"
        if float((best[..., 0] - best[..., 1]).min()) < margin * 0.1:
            return "two nearly equal best logits"
    if case.train:
        early = torch.stack([s["halted"] for s in steps[:-1]])
        limit = case.own_config["halt_max_steps"]
        stopped = torch.stack([s["halted"] & (s["steps"] < limit) for s in steps])
        held = torch.stack([~s["halted"] & (s["out/q_halt_logits"] > 0) for s in steps])
        continues = not case.own_config["no_ACT_continue"]
        if bool(early.all()) or not bool(early.any()) or not bool(stopped.any()):
            return "no mixture of halted and running rows"
        if not bool(held.any()) and not continues:
            return "no row kept running by exploration"
    if not any(int(s["metric/exact_accuracy"]) > 0 for s in steps):
        return "no solved row"
    return None


def record_case(
    official: Official, case: Case, *, over: int | None = SKETCH_OVER, search: bool = True
) -> Recording:
    """The case by the official code, under the first seed >= case.seed that shows everything.

    over: elements from which gradients are sketched, None for never. search: False takes case.seed
    even if that lacks something (a batch of one row cannot show a mixture).
    """
    for seed in range(case.seed, case.seed + 400):
        recording = _record(official, dataclasses.replace(case, seed=seed), over, search)
        if isinstance(recording, Recording):
            return recording
    raise RuntimeError(f"{case.name}: no seed in 400 shows everything; last reason: {recording}")


def _error(made: torch.Tensor, true: torch.Tensor, over: int | None) -> float:
    """relative_l2 as the comparison will see it, to four digits."""
    return float(f"{relative_l2(compact(made, over), compact(true, over)):.4g}")


def _record(official: Official, case: Case, over: int | None, demanding: bool) -> Recording | str:
    config = case.official_config
    head = official_head(official, config, case.loss_type).train(case.train)
    fill_weights(head.model, case.seed, zero_rows=case.twin)
    batches = [make_batch(config, case.seed, s) for s in range(case.supervision_steps)]
    _labels_from_predictions(head, batches, case.seed)
    carries = [poisoned(head.initial_carry(batches[0]))]
    steps = []
    for step, batch in enumerate(batches):
        carry, made = run_step(head, carries[-1], batch, step_seed(case.seed, step))
        carries.append(carry)
        steps.append(made)
    lack = _lacks(steps, case) if demanding else None
    if lack is not None:
        return lack
    oracle: list[dict[str, torch.Tensor]] = []
    errors: list[dict[str, float]] = []
    if case.oracle:
        with in_float64(official):
            exact = official_head(official, config | {"forward_dtype": "float64"}, case.loss_type)
            exact.train(case.train).load_state_dict(head.state_dict())
            for step, batch in enumerate(batches):
                _, made = run_step(exact, _double(carries[step]), batch, step_seed(case.seed, step))
                oracle.append({k: v for k, v in made.items() if not is_exact(k)})
        for made, true in zip(steps, oracle, strict=True):
            errors.append({k: _error(made[k], true[k], over) for k in true})
    dtypes = {k: str(v.dtype).removeprefix("torch.") for k, v in steps[0].items()}
    for values in [*steps, *oracle]:
        # Full states are needed only as the carry into a next step.
        last = values is steps[-1] or any(values is true for true in oracle)
        for name in list(values):
            if case.twin and name.startswith("grad/") and "puzzle_emb" in name:
                del values[name]
            elif name.startswith("grad/") or (last and is_state(name)):
                values[name] = compact(values[name], over)
    weights = weights_digest(head.model, case)
    return Recording(case, dtypes, steps, batches, oracle, errors, weights)


def flatten(recording: Recording) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A recording as (tensors for safetensors, a JSON-able dict): scalars go to the latter."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: list[dict[str, Any]] = []
    for step, made in enumerate(recording.steps):
        scalars.append({k: v.item() for k, v in made.items() if v.ndim == 0})
        for name, value in made.items():
            replaced = recording.oracle and not is_exact(name) and not is_state(name)
            if value.ndim > 0 and not replaced:
                tensors[f"{step}/{name}"] = value
        for name, value in recording.batches[step].items():
            tensors[f"{step}/batch/{name}"] = value
    for step, true in enumerate(recording.oracle):
        scalars[step]["oracle"] = {k: v.item() for k, v in true.items() if v.ndim == 0}
        for name, value in true.items():
            if value.ndim > 0:
                tensors[f"{step}/oracle/{name}"] = value.float()
    text = {
        "case": dataclasses.asdict(recording.case),
        "weights": recording.weights,
        "dtypes": recording.dtypes,
        "scalars": scalars,
        "errors": recording.errors,
    }
    return {k: v.contiguous().clone() for k, v in tensors.items()}, text


def unflatten(tensors: dict[str, torch.Tensor], text: dict[str, Any]) -> Recording:
    """The inverse of flatten; what an oracle replaced is left out of `steps`."""
    count = len(text["scalars"])
    steps: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
    batches: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
    oracle: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
    for key, value in tensors.items():
        index, name = key.split("/", 1)
        kind, _, rest = name.partition("/")
        if kind == "batch":
            batches[int(index)][rest] = value
        elif kind == "oracle":
            oracle[int(index)][rest] = value
        else:
            steps[int(index)][name] = value
    for step, scalars in enumerate(text["scalars"]):
        for name, number in scalars.items():
            if name == "oracle":
                oracle[step] |= {k: torch.tensor(v, dtype=torch.float64) for k, v in number.items()}
            else:
                dtype = torch.int64 if isinstance(number, int) else torch.float64
                steps[step][name] = torch.tensor(number, dtype=dtype)
    case = Case(**text["case"])
    return Recording(
        case,
        text["dtypes"],
        steps,
        batches,
        oracle if case.oracle else [],
        text["errors"],
        text["weights"],
    )
