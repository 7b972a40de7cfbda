"""Our code against tensors recorded from the official code (tests/golden, `recorded.json`).

Initial weights and every discrete value are equal; tensors are compared per supervision step from
the official carry: 1e-5 relative L2 for attention and for H_cycles = 1; deep mlp_t and low
precision: at most twice the official error against the official code in float64, plus a floor.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden.cases import CASES, INITIAL, compact, digest, make_batch
from golden.compare import assert_within, compare, load_case, own_head, recorded, tensors_of
from golden.record import ADAM, ADAM_PARAMS, ADAM_RATES, erfinv_probe
from official import OFFICIAL_COMMIT
from parity import assert_l2, relative_l2, splitmix

from trm_fast import reference
from trm_fast.ema import EMA
from trm_fast.losses import LOSSES, ACTLossHead
from trm_fast.model import Model
from trm_fast.optim import AdamATan2, SparseEmbeddingSignSGD, cosine_schedule


def _generator_hash() -> str:
    return digest(torch.get_rng_state())


def test_recordings_are_of_the_named_commit_and_complete() -> None:
    assert recorded()["commit"] == OFFICIAL_COMMIT
    assert set(recorded()["cases"]) == set(CASES)
    assert set(recorded()["initial"]) == set(INITIAL)
    for name, case in CASES.items():
        assert load_case(name).case.own_config == case.own_config, name


def test_portable_numbers_are_what_the_recorder_used() -> None:
    assert f"{int(splitmix(3, 5, 'probe')[2]):016x}" == recorded()["splitmix"]


@pytest.mark.parametrize("name", CASES)
def test_step_equals_official(name: str) -> None:
    assert_within(compare(load_case(name)))


@pytest.mark.parametrize("name", CASES)
def test_step_on_the_compiled_extension_equals_official(name: str, extension: None) -> None:
    """Whatever of a model the extension serves; the rest of it runs on the reference."""
    assert_within(compare(load_case(name), backend="auto"))


@pytest.mark.parametrize("policy", ["save", "light", "recompute"])
@pytest.mark.parametrize("name", ["attn-rope", "mlp-none-H1", "mlp-learned-deep"])
def test_step_equals_official_under_policy(name: str, policy: str) -> None:
    assert_within(compare(load_case(name), policy=policy))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.train])
def test_evaluation_in_inference_mode(name: str) -> None:
    with torch.inference_mode():
        assert_within(compare(load_case(name)))


@pytest.mark.parametrize("name", ["attn-rope", "mlp-none-H1"])
def test_comparison_notices_a_wrong_weight(name: str) -> None:
    recording = load_case(name)
    for made in recording.steps:
        made["grad/inner.lm_head.weight"] = made["grad/inner.lm_head.weight"] * 1.0001
    with pytest.raises(AssertionError, match="lm_head"):
        assert_within(compare(recording))


@pytest.mark.parametrize("name", INITIAL)
def test_initial_weights(name: str) -> None:
    expected = recorded()["initial"][name]
    torch.manual_seed(0)
    model = Model(expected["config"])
    assert _generator_hash() == expected["random"], "another number of random draws"
    state = model.state_dict()
    assert list(state) == list(expected["state"])
    assert [n for n, _ in model.named_parameters()] == expected["parameters"]
    assert sorted(n for n, _ in model.named_buffers()) == sorted(expected["buffers"])
    assert sum(p.numel() for p in model.parameters()) == expected["parameter_count"]
    # Another CPU may round erfinv differently; the probe tells, and then equal means close.
    bitwise = erfinv_probe() == recorded()["erfinv"]
    for key, want in expected["state"].items():
        value = state[key]
        assert list(value.shape) == want["shape"], key
        assert str(value.dtype) == f"torch.{want['dtype']}", key
        if bitwise:
            assert digest(value) == want["sha256"], key
        else:
            first = torch.tensor(want["first"], dtype=torch.float64)
            assert relative_l2(value.double().reshape(-1)[:3], first) <= 1e-6, key
            assert float(value.double().norm()) == pytest.approx(want["norm"], rel=1e-6), key


@pytest.mark.parametrize(
    ("name", "count"), [("sudoku-mlp", 5_028_866), ("sudoku-attention", 6_828_034)]
)
def test_published_parameter_counts(name: str, count: int) -> None:
    assert recorded()["initial"][name]["parameter_count"] == count


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["stablemax", "softmax"])
@pytest.mark.parametrize("masked", [False, True], ids=["ignore_index", "valid_mask"])
def test_loss_functions(kind: str, dtype: str, masked: bool) -> None:
    made = tensors_of("losses")
    logits = made["logits"].to(getattr(torch, dtype)).detach().requires_grad_()
    labels = made["labels"]
    mask = labels != -100 if masked else None
    loss = LOSSES[f"{kind}_cross_entropy"](logits, labels, valid_mask=mask)
    want = made[f"{kind}/{dtype}/loss"]
    assert loss.dtype == want.dtype
    assert_l2(loss, want, 1e-6 if kind == "softmax" else 1e-12, "loss")
    assert torch.equal(loss == 0, want == 0)
    (loss * made["weight"].to(loss.dtype)).sum().backward()
    grad = made[f"{kind}/{dtype}/grad"]
    assert logits.grad is not None and logits.grad.dtype == grad.dtype
    limit = {"float32": 1e-6, "bfloat16": 4e-3}[dtype]
    rows = zip(logits.grad.flatten(0, 1), grad.flatten(0, 1), strict=True)
    for index, (got_row, want_row) in enumerate(rows):
        assert_l2(got_row, want_row, limit, f"gradient of cell {index}")


def test_stablemax_op_predictions() -> None:
    made = tensors_of("losses")
    loss, preds, correct = reference.stablemax_loss(made["logits"], made["labels"])
    assert_l2(loss, made["stablemax/float32/loss"], 1e-6, "loss")
    assert torch.equal(preds, made["logits"].argmax(-1))
    assert torch.equal(correct, (preds == made["labels"]) & (made["labels"] != -100))


def test_puzzle_rows_sign_descent() -> None:
    made = tensors_of("rows")
    weights = made["before"].clone()
    local = torch.zeros(6, 5, requires_grad=True)
    ids = torch.zeros(6, dtype=torch.int32)
    optimizer = SparseEmbeddingSignSGD([weights, local, ids], lr=0.01, weight_decay=0.1)
    before = made["before"]
    for step in range(2):
        ids.copy_(made[f"{step}/ids"])
        local.grad = made[f"{step}/grad"].clone()
        optimizer.param_groups[0]["lr"] = 0.01 / (step + 1)
        optimizer.step()
        after = made[f"{step}/after"]
        torch.testing.assert_close(weights, after, rtol=1e-6, atol=1e-8)
        untouched = [i for i in range(7) if i not in made[f"{step}/ids"].tolist()]
        assert torch.equal(weights[untouched], before[untouched])
        assert not torch.equal(after[0], before[0]), "the blank row is trained, too"
        before = after


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adam_atan2_follows_the_scalar_loop(dtype: torch.dtype) -> None:
    made = tensors_of("adam")
    params = {n: torch.nn.Parameter(made[f"start/{n}"].to(dtype, copy=True)) for n in ADAM_PARAMS}
    optimizer = AdamATan2(
        params.values(),
        lr=0,
        betas=(ADAM["beta1"], ADAM["beta2"]),
        weight_decay=ADAM["weight_decay"],
    )
    limit = {torch.float32: 3e-7, torch.float64: 1e-13}[dtype]
    for step, rate in enumerate(ADAM_RATES):
        optimizer.param_groups[0]["lr"] = rate
        for name, param in params.items():
            param.grad = made[f"{step}/grad/{name}"].to(dtype)
        optimizer.step()
        for name, param in params.items():
            assert_l2(param, made[f"{step}/after/{name}"], limit, f"step {step} {name}")


def test_adam_atan2_leaves_rows_without_gradient_to_decay() -> None:
    made = tensors_of("adam")
    name = ADAM_PARAMS[0]
    assert float(made[f"4/grad/{name}"][0].abs().max()) == 0.0
    factor = 1.0
    for rate in ADAM_RATES:
        factor *= 1.0 - rate * ADAM["weight_decay"]
    param = torch.nn.Parameter(made[f"start/{name}"].double())
    optimizer = AdamATan2([param], lr=0, weight_decay=ADAM["weight_decay"])
    for step, rate in enumerate(ADAM_RATES):
        optimizer.param_groups[0]["lr"] = rate
        param.grad = made[f"{step}/grad/{name}"].double()
        optimizer.step()
    assert_l2(param[0], made[f"start/{name}"].double()[0] * factor, 1e-14)


def test_ema_follows_official() -> None:
    made = tensors_of("ema")
    module = torch.nn.Linear(5, 3)
    module.register_buffer("fixed", torch.ones(2))
    params = dict(module.named_parameters())

    def put(step: int) -> None:
        for name, param in params.items():
            param.data.copy_(made[f"{step}/param/{name}"])

    put(0)
    ema = EMA(module, 0.9)
    for step in range(1, 5):
        put(step)
        ema.update(module)
        with ema.swap(module):
            for name, param in params.items():
                torch.testing.assert_close(
                    param.data, made[f"{step}/ema/{name}"], rtol=3e-7, atol=0
                )
            assert torch.equal(module.get_buffer("fixed"), torch.ones(2))
        for name, param in params.items():
            assert torch.equal(param.data, made[f"{step}/param/{name}"]), "swapped back"


def test_learning_rate_schedule() -> None:
    for step, base, warmup, total, ratio, rate in recorded()["schedule"]:
        got = cosine_schedule(int(step), base, int(warmup), int(total), ratio)
        assert got == rate, (step, base, warmup, total, ratio)


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_any_batch_size_gives_each_row_what_the_recorded_batch_gave(rows: int) -> None:
    """Rows do not see each other: a batch of another size repeats the recorded rows."""
    recording = load_case("attn-rope")
    head = own_head(recording.case)
    index = torch.arange(rows) % 4
    batch = {k: v[index] for k, v in recording.batches[0].items()}
    carry, _, _, outputs, _ = head(
        return_keys=["logits"], carry=head.initial_carry(batch), batch=batch
    )
    assert_l2(outputs["logits"], recording.steps[0]["out/logits"][index], 1e-5, "logits")
    assert_l2(carry.inner_carry.z_L, recording.steps[0]["z_L"][index], 1e-5, "z_L")


def test_sketch_is_linear_and_keeps_the_norm() -> None:
    a, b = (torch.randn(300, 50, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    assert_l2(compact(a + b, 0), compact(a, 0) + compact(b, 0), 1e-6)
    assert float(compact(a, 0).norm() / a.norm()) == pytest.approx(1.0, abs=0.1)
    changed = a.clone()
    changed[17, 3] += 0.01
    assert relative_l2(compact(changed, 0), compact(a, 0)) == pytest.approx(
        relative_l2(changed, a), rel=0.15
    )


def _config(**changes: Any) -> dict[str, Any]:
    return CASES["attn-rope"].own_config | changes


def test_one_state_dict_for_both_precisions() -> None:
    narrow, wide = Model(_config(forward_dtype="bfloat16")), Model(_config())
    wide.load_state_dict(narrow.state_dict(), strict=True)
    assert narrow.inner.H_init.dtype == torch.bfloat16
    assert torch.equal(wide.inner.H_init, narrow.inner.H_init.float())


def test_loss_head_of_a_batch_without_labels_counts_nothing() -> None:
    head = ACTLossHead(Model(_config(halt_max_steps=1)), "stablemax_cross_entropy").train()
    batch = make_batch(_config(), 0, 0)
    batch["labels"].fill_(-100)
    _, loss, metrics, _, halted = head([], carry=head.initial_carry(batch), batch=batch)
    assert bool(halted) and int(metrics["count"]) == 0 and float(metrics["lm_loss"]) == 0.0
    # The q logits are -5 at the start and every empty row counts as solved: softplus(5) each.
    assert float(metrics["q_halt_loss"]) == pytest.approx(4 * 5.006715, rel=1e-6)
    assert float(loss.detach()) == pytest.approx(2 * 5.006715, rel=1e-6)
