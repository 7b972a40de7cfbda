"""Our code beside the official code, live: `pytest --official PATH`.

The recorded comparisons again with full tensors, larger models, free-running training, the official
`train_batch` with our two classes, either loss head on either model, and the places where the
official code crashes. Without `--official` every test here is skipped.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from golden.cases import (
    CASES,
    INITIAL,
    Case,
    clear_gradients,
    digest,
    fill_weights,
    gradients,
    make_batch,
    run_step,
    step_seed,
)
from golden.compare import assert_within, compare, recorded
from golden.recording import official_head, record_case
from official import OFFICIAL_COMMIT, Official, hashes_of, load_official, official_module
from parity import assert_l2

from trm_fast.losses import ACTLossHead
from trm_fast.model import Model
from trm_fast.optim import AdamATan2, SparseEmbeddingSignSGD

STABLEMAX = "stablemax_cross_entropy"


@pytest.fixture(scope="session")
def official(official_path: Path) -> Official:
    return load_official(official_path)


def _larger() -> list[Case]:
    wide: dict[str, Any] = {
        "batch_size": 7,
        "seq_len": 33,
        "vocab_size": 13,
        "hidden_size": 96,
        "num_heads": 6,
        "puzzle_emb_ndim": 100,
        "puzzle_emb_len": 3,
        "num_puzzle_identifiers": 40,
        "L_layers": 2,
        "L_cycles": 3,
        "halt_max_steps": 4,
    }
    mlp = wide | {"mlp_t": True, "pos_encodings": "none"}
    published = wide | {
        "hidden_size": 128,
        "num_heads": 2,
        "puzzle_emb_ndim": 128,
        "seq_len": 81,
        "batch_size": 3,
    }
    block = {"H_cycles": 1, "L_cycles": 1, "L_layers": 1, "forward_dtype": "bfloat16"}
    one_row = {"batch_size": 1, "puzzle_emb_len": 0, "pos_encodings": "learned", "H_cycles": 2}
    return [
        Case("large-attn-rope", wide),
        Case("large-attn-published-prefix", published | {"puzzle_emb_len": 16}),
        Case("large-attn-one-row", wide | one_row),
        Case("large-attn-rope-theta-none", wide | {"pos_encodings": "none", "expansion": 2.5}),
        Case("large-mlp-H1", mlp | {"H_cycles": 1}),
        Case("large-mlp-rope-H1", mlp | {"H_cycles": 1, "pos_encodings": "rope"}),
        Case("large-mlp-deep", mlp | {"L_cycles": 6}, oracle=True),
        Case("large-mlp-deep-eval", mlp, train=False, oracle=True),
        Case("large-attn-bf16-block", wide | block, oracle=True),
        Case("large-mlp-bf16-block", mlp | block, oracle=True),
    ]


LARGER = {case.name: case for case in _larger()}


def test_checkout_is_the_recorded_one(official: Official) -> None:
    assert recorded()["commit"] == OFFICIAL_COMMIT
    assert hashes_of(official.path) == recorded()["sha256"]


def test_official_modules_leave_no_trace(official: Official) -> None:
    assert official.pretrain.train_batch is not None
    names = {"models", "utils", "dataset", "puzzle_dataset", "pretrain", "wandb", "adam_atan2"}
    assert not names & set(sys.modules)
    assert str(official.path) not in sys.path


@pytest.mark.parametrize("name", CASES)
def test_recorded_case_live_with_full_gradients(official: Official, name: str) -> None:
    seed = recorded()["cases"][name]["case"]["seed"]
    case = dataclasses.replace(CASES[name], seed=seed)
    assert_within(compare(record_case(official, case, over=None, search=False)))


@pytest.mark.parametrize("name", LARGER)
def test_larger_model(official: Official, name: str) -> None:
    assert_within(compare(record_case(official, LARGER[name], over=None, search=False)))


@pytest.mark.parametrize("name", INITIAL)
def test_state_dicts_load_in_each_other(official: Official, name: str) -> None:
    config = INITIAL[name]
    torch.manual_seed(0)
    theirs = official.model(config)
    state = digest(torch.get_rng_state())
    torch.manual_seed(0)
    ours = Model(config)
    assert digest(torch.get_rng_state()) == state
    own, other = ours.state_dict(), theirs.state_dict()
    assert list(own) == list(other)
    for key, value in other.items():
        assert own[key].dtype == value.dtype and torch.equal(own[key], value), key
    for target, source in ((ours, theirs), (theirs, ours)):
        with torch.no_grad():
            for value in source.state_dict().values():
                value.copy_(torch.full_like(value, 0.25))
        target.load_state_dict(source.state_dict(), strict=True)
        assert all(bool((v == 0.25).all()) for v in target.state_dict().values())
    heads = [official.ACTLossHead(theirs, STABLEMAX), ACTLossHead(ours, STABLEMAX)]
    assert list(heads[0].state_dict()) == list(heads[1].state_dict())


def _pair(official: Official, config: dict[str, Any], seed: int = 3) -> tuple[Any, Any]:
    """Official model and ours in training, with the same portable weights; ours in plain PyTorch,
    which rounds alike: the compiled operations are held to the golden cases."""
    pair = official.Model(config), Model({**config, "backend": "reference"})
    for model in pair:
        fill_weights(model.train(), seed)
    return pair


def test_same_surface(official: Official) -> None:
    theirs, ours = _pair(official, CASES["attn-rope"].own_config)
    batch = make_batch(CASES["attn-rope"].own_config, 0, 0)
    results = [model(carry=model.initial_carry(batch), batch=batch) for model in (theirs, ours)]
    (their_carry, their_outputs), (our_carry, our_outputs) = results
    assert our_outputs.keys() == their_outputs.keys()
    for a, b in ((our_carry, their_carry), (our_carry.inner_carry, their_carry.inner_carry)):
        names = [[f.name for f in dataclasses.fields(x)] for x in (a, b)]
        assert names[0] == names[1]
    rows = [dict(model.puzzle_emb.named_buffers()) for model in (theirs, ours)]
    assert list(rows[0]) == list(rows[1])
    for name, buffer in rows[0].items():
        own = rows[1][name]
        assert (own.shape, own.dtype) == (buffer.shape, buffer.dtype)
        assert (own.requires_grad, own.is_leaf) == (buffer.requires_grad, buffer.is_leaf)
    assert ours.puzzle_emb is ours.inner.puzzle_emb


@pytest.mark.parametrize("positions", ["rope", "learned", "none"])
def test_free_running_training_draws_and_halts_alike(official: Official, positions: str) -> None:
    config = CASES["attn-rope"].own_config
    config |= {"batch_size": 16, "halt_max_steps": 5, "pos_encodings": positions}
    theirs, ours = _pair(official, config)
    heads = [official.ACTLossHead(theirs, STABLEMAX), ACTLossHead(ours, STABLEMAX)]
    carries = [head.initial_carry(make_batch(config, 3, 0)) for head in heads]
    seen = []
    for step in range(8):
        batch = make_batch(config, 3, step)
        made: list[dict[str, torch.Tensor]] = []
        for i, head in enumerate(heads):
            carries[i], values = run_step(head, carries[i], batch, step_seed(3, step))
            made.append(values)
        for name in ("halted", "steps", "random", "data/inputs", "data/labels"):
            assert torch.equal(made[0][name], made[1][name]), (step, name)
        assert_l2(made[1]["loss"], made[0]["loss"], 1e-5, f"step {step} loss")
        assert_l2(made[1]["z_H"], made[0]["z_H"], 1e-5, f"step {step} z_H")
        seen.append(made[1]["halted"])
    halted = torch.stack(seen)
    assert bool(halted.any()) and not bool(halted.all())


@pytest.mark.parametrize("rows", [1, 3, 9])
def test_any_batch_size(official: Official, rows: int) -> None:
    config = CASES["attn-rope"].own_config
    theirs = official.Model(config | {"batch_size": rows}).train()
    ours = Model(config).train()
    batch = make_batch(config | {"batch_size": rows}, 5, 0)
    made = []
    for model, kind in ((theirs, official.ACTLossHead), (ours, ACTLossHead)):
        fill_weights(model, 5)
        head = kind(model, STABLEMAX).train()
        made.append(run_step(head, head.initial_carry(batch), batch, 11)[1])
    local = "grad/inner.puzzle_emb.local_weights"
    for name, want in made[0].items():
        got = made[1][name]
        if name == local:
            assert not bool(got[rows:].any()), "slots beyond the batch have no gradient"
            got = got[:rows]
        if want.is_floating_point():
            assert_l2(got, want, 1e-5, name)
        else:
            assert torch.equal(got, want), name
    after = []
    for model, kind in ((theirs, official.SignSGD), (ours, SparseEmbeddingSignSGD)):
        extra = {"world_size": 1} if kind is official.SignSGD else {}
        kind(model.puzzle_emb.buffers(), lr=0.1, weight_decay=0.1, **extra).step()
        after.append(model.puzzle_emb.weights)
    assert_l2(after[1], after[0], 1e-6, "puzzle rows")


@pytest.mark.parametrize("swapped", ["official head, our model", "our head, official model"])
def test_either_head_on_either_model(official: Official, swapped: str) -> None:
    config = CASES["attn-rope"].own_config
    theirs, ours = _pair(official, config)
    batch = make_batch(config, 3, 0)
    want_head = official.ACTLossHead(theirs, STABLEMAX)
    _, want = run_step(want_head, want_head.initial_carry(batch), batch, 5)
    clear_gradients(theirs)
    if swapped.startswith("official"):
        mixed = official.ACTLossHead(ours, STABLEMAX)
    else:
        mixed = ACTLossHead(theirs, STABLEMAX)
    _, got = run_step(mixed.train(), mixed.initial_carry(batch), batch, 5)
    assert got.keys() == want.keys()
    for name, value in want.items():
        if value.is_floating_point():
            assert_l2(got[name], value, 1e-5, name)
        else:
            assert torch.equal(got[name], value), name


def test_official_ema_copies_our_model(official: Official) -> None:
    config = CASES["attn-rope"].own_config
    head: Any = ACTLossHead(Model(config), STABLEMAX).eval()
    helper = official.ema.EMAHelper(mu=0.5)
    helper.register(head)
    before = head.model.inner.lm_head.weight.detach().clone()
    head.model.inner.lm_head.weight.data.add_(1.0)
    helper.update(head)
    copied = helper.ema_copy(copy.deepcopy(head))
    torch.testing.assert_close(copied.model.inner.lm_head.weight.data, before + 0.5)
    batch = make_batch(config, 0, 0)
    _, loss, *_ = copied([], carry=copied.initial_carry(batch), batch=batch)
    assert bool(torch.isfinite(loss))


class _TorchOnCPU:
    """`torch`, except that its device("cuda") is the CPU: what the official trainer sees here."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def device(_name: str) -> torch.device:
        return torch.device("cpu")


@pytest.fixture
def pretrain(official: Official, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The official pretrain module, able to train on the CPU with our AdamATan2."""
    module = official.pretrain
    monkeypatch.setattr(module, "torch", _TorchOnCPU())
    monkeypatch.setattr(module, "AdamATan2", AdamATan2)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor, *_: tensor)
    monkeypatch.setenv("DISABLE_COMPILE", "1")
    return module


def _trained(
    official: Official, pretrain: Any, config: dict[str, Any], classes: dict[str, Any], **extra: Any
) -> tuple[Any, list[dict[str, float]]]:
    """Train state and metrics after 5 calls of the official train_batch on `classes`."""
    given = ("batch_size", "seq_len", "vocab_size", "num_puzzle_identifiers", "causal")
    arch = {k: v for k, v in config.items() if k not in given}
    settings = pretrain.PretrainConfig(
        arch=pretrain.ArchConfig(
            name="model", loss=pretrain.LossConfig(name="head", loss_type=STABLEMAX), **arch
        ),
        data_paths=["none"],
        global_batch_size=config["batch_size"],
        epochs=10,
        lr=1e-3,
        lr_min_ratio=0.1,
        lr_warmup_steps=2,
        weight_decay=1.0,
        beta1=0.9,
        beta2=0.95,
        puzzle_emb_lr=1e-2,
        puzzle_emb_weight_decay=1.0,
        **extra,
    )
    metadata = official_module(official.path, "dataset.common").PuzzleDatasetMetadata(
        pad_id=0,
        ignore_label_id=0,
        blank_identifier_id=0,
        vocab_size=config["vocab_size"],
        seq_len=config["seq_len"],
        num_puzzle_identifiers=config["num_puzzle_identifiers"],
        total_groups=config["batch_size"],
        mean_puzzle_examples=1.0,
        total_puzzles=config["batch_size"],
        sets=["all"],
    )
    pretrain.load_model_class = lambda name, *_: classes[name]
    torch.manual_seed(0)
    state = pretrain.init_train_state(settings, metadata, 0, 1)
    state.model.train()
    metrics = []
    for step in range(5):
        batch = make_batch(config, 17, step)
        made = pretrain.train_batch(settings, state, batch, config["batch_size"], 0, 1)
        metrics.append({k: float(v) for k, v in made.items()})
    return state, metrics


TRAINED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "attention": (CASES["attn-rope"].own_config, {}),
    "attention-learned": (CASES["attn-learned-ceil1"].own_config, {}),
    "attention-no-rows": (CASES["attn-rope-norows"].own_config, {}),
    "attention-frozen": (CASES["attn-rope"].own_config, {"freeze_weights": True}),
    "mlp-H1": (CASES["mlp-none-H1"].own_config, {}),
}


@pytest.mark.parametrize("name", TRAINED)
def test_official_train_batch_with_our_two_classes(
    official: Official,
    pretrain: Any,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, extra = TRAINED[name]
    monkeypatch.setattr(pretrain, "load_model_class", pretrain.load_model_class)
    theirs = {"model": official.Model, "head": official.ACTLossHead}
    state, want = _trained(official, pretrain, config, theirs, **extra)
    ours = {"model": Model, "head": ACTLossHead}
    own_state, got = _trained(official, pretrain, config, ours, **extra)
    capsys.readouterr()
    assert isinstance(own_state.model.model, Model)
    for step, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-9), step
    torch.manual_seed(0)
    start = official.Model(config).state_dict()
    for key, value in state.model.model.state_dict().items():
        own = own_state.model.model.state_dict()[key]
        moved = value.double() - start[key].double()
        assert_l2(own, value, 1e-4, key)
        fixed = key.endswith(("H_init", "L_init")) or (
            extra.get("freeze_weights", False) and "puzzle_emb" not in key
        )
        assert bool(moved.any()) != fixed, key
    assert torch.equal(own_state.carry.halted, state.carry.halted)


def test_prefix_without_puzzle_rows(official: Official) -> None:
    """puzzle_emb_ndim=0 with puzzle_emb_len=16: a crash there, 16 zero tokens here."""
    config = CASES["attn-rope"].own_config | {"puzzle_emb_ndim": 0, "puzzle_emb_len": 16}
    batch = make_batch(config, 3, 0)
    crashing = official.Model(config).train()
    with pytest.raises(RuntimeError, match="must match the size"):
        crashing(carry=crashing.initial_carry(batch), batch=batch)
    twin = official.Model(config | {"puzzle_emb_ndim": 1}).train()
    ours = Model(config).train()
    fill_weights(twin, 3, zero_rows=True)
    fill_weights(ours, 3)
    made = []
    for head in (official.ACTLossHead(twin, STABLEMAX), ACTLossHead(ours, STABLEMAX)):
        made.append(run_step(head.train(), head.initial_carry(batch), batch, 7)[1])
    assert made[1]["z_H"].shape == (4, 26, 32)
    for name, got in made[1].items():
        if got.is_floating_point():
            assert_l2(got, made[0][name], 1e-5, name)
    with pytest.raises(AttributeError):
        _ = ours.puzzle_emb


def test_continue_logits(official: Official) -> None:
    """no_ACT_continue=False: a crash there; here the next step's best q, checked by hand."""
    config = CASES["attn-rope"].own_config | {"no_ACT_continue": False, "halt_max_steps": 2}
    theirs, ours = _pair(official, config)
    head = ACTLossHead(ours, STABLEMAX)
    batches = [make_batch(config, 3, s) for s in range(2)]
    with pytest.raises(ValueError, match="unpack"):
        theirs(carry=theirs.initial_carry(batches[0]), batch=batches[0])
    carry = head.initial_carry(batches[0])
    last_seen = []
    for step, batch in enumerate(batches):
        carry, made = run_step(head, carry, batch, step_seed(3, step))
        with torch.no_grad():
            _, _, (halt, go_on) = theirs.inner(carry.inner_carry, carry.current_data)
        last = carry.steps >= 2
        last_seen.append(last)
        value = torch.where(last, halt, torch.stack((halt, go_on)).amax(0))
        target = 1.0 / (1.0 + (-value.double()).exp())
        assert_l2(made["out/target_q_continue"], target, 1e-5, f"step {step} target")
        q = made["out/q_continue_logits"].double()
        entropy = q.clamp_min(0) - q * target + (-q.abs()).exp().log1p()
        assert_l2(made["metric/q_continue_loss"], entropy.sum(), 1e-6, "loss of q_continue")
        parts = made["metric/q_halt_loss"] + made["metric/q_continue_loss"]
        assert_l2(made["loss"], made["metric/lm_loss"] + 0.5 * parts, 1e-6, "loss")
        wants = made["out/q_halt_logits"] > made["out/q_continue_logits"]
        assert not bool((made["halted"] & ~(last | wants)).any())
    assert bool(torch.stack(last_seen).any()) and not bool(torch.stack(last_seen).all())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_softmax_loss_head(official: Official, dtype: str) -> None:
    """softmax_cross_entropy: a crash in the official head; here log-softmax by hand."""
    config = CASES["attn-rope-H1"].own_config | {"forward_dtype": dtype}
    theirs, ours = _pair(official, config)
    batch = make_batch(config, 3, 0)
    with pytest.raises(TypeError, match="valid_mask"):
        crashing = official.ACTLossHead(theirs, "softmax_cross_entropy")
        crashing([], carry=crashing.initial_carry(batch), batch=batch)
    head = ACTLossHead(ours, "softmax_cross_entropy")
    _, made = run_step(head, head.initial_carry(batch), batch, 3)
    logits, labels = made["out/logits"].double(), batch["labels"].long()
    chosen = logits.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    cells = (logits.exp().sum(-1).log() - chosen) * (labels != -100)
    rows = cells.sum(-1) / (labels != -100).sum(-1).clamp_min(1)
    assert_l2(made["metric/lm_loss"], rows.sum(), 1e-6, "loss")
    lead = official_head(official, config, "softmax_cross_entropy").train()
    fill_weights(lead.model, 3)
    run_step(lead, lead.initial_carry(batch), batch, 3)
    want = gradients(lead)
    for name, grad in gradients(head).items():
        assert_l2(grad, want[name], {"float32": 1e-5, "bfloat16": 2e-2}[dtype], name)
