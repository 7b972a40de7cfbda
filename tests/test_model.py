"""The model as a whole: every option, any batch, copies and compilation.

tests/test_golden.py compares with the official code; here the model is compared with itself and
with what its options promise. What happens between steps is in tests/test_carry.py.
"""

import copy
import io
import pickle

import pytest
import torch
from tiny import (
    IDENTIFIERS,
    MIXERS,
    assert_equal,
    compilable,
    gradients,
    loss_of,
    step,
    tiny_batch,
    tiny_config,
    tiny_model,
)

from trm_fast import backends, memory, reference
from trm_fast.config import ModelConfig
from trm_fast.losses import ACTLossHead
from trm_fast.model import Model
from trm_fast.ops import OP_NAMES, POLICIES
from trm_fast.optim import SparseEmbeddingSignSGD

BOTH = pytest.mark.parametrize("mixer", MIXERS)


def test_from_dict_or_config_and_official_keys_without_meaning():
    extra = {"H_layers": 0, "causal": False, "name": "trm", "loss": {"name": "x"}}
    torch.manual_seed(0)
    first = Model({**tiny_config(), **extra})
    torch.manual_seed(0)
    second = Model(ModelConfig.from_dict(tiny_config()))
    assert first.config == second.config
    assert_equal(first.state_dict(), second.state_dict())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hiden_size": 8}, "did you mean.*hidden_size"),
        ({"hidden_size": 15}, "num_heads"),
        ({"backend": "metal"}, "backend"),
        ({"backend": "cuda"}, "backend 'cuda' cannot serve embed_reset on cpu"),
        ({"q_logits": 1, "no_ACT_continue": False}, "q_logits"),
        ({"policy": "sometimes"}, "policy"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_key_or_value_is_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        Model(tiny_config(**changes))
    assert "\n" not in str(error.value)


def test_state_dict_keys_shapes_and_dtypes():
    model = tiny_model(forward_dtype="bfloat16", L_layers=2, pos_encodings="learned")
    found = {k: (tuple(v.shape), v.dtype) for k, v in model.state_dict().items()}
    f32, bf16 = torch.float32, torch.bfloat16
    want = {
        "inner.embed_tokens.embedding_weight": ((9, 16), f32),
        "inner.lm_head.weight": ((9, 16), f32),
        "inner.q_head.weight": ((2, 16), f32),
        "inner.q_head.bias": ((2,), f32),
        "inner.puzzle_emb.weights": ((IDENTIFIERS, 16), f32),
        "inner.embed_pos.embedding_weight": ((12, 16), f32),
        "inner.H_init": ((16,), bf16),
        "inner.L_init": ((16,), bf16),
    }
    for i in range(2):
        want |= {
            f"inner.L_level.layers.{i}.self_attn.qkv_proj.weight": ((48, 16), f32),
            f"inner.L_level.layers.{i}.self_attn.o_proj.weight": ((16, 16), f32),
            f"inner.L_level.layers.{i}.mlp.gate_up_proj.weight": ((48, 16), f32),
            f"inner.L_level.layers.{i}.mlp.down_proj.weight": ((16, 24), f32),
        }
    assert found == want


def test_puzzle_emb_is_there_or_is_not():
    model = tiny_model()
    assert model.puzzle_emb is model.inner.puzzle_emb
    without = tiny_model(puzzle_emb_ndim=0)
    with pytest.raises(AttributeError, match="puzzle_emb"):
        _ = without.puzzle_emb
    assert not hasattr(without, "puzzle_emb")


@pytest.mark.parametrize(
    "changes",
    [
        {"pos_encodings": "none"},
        {"pos_encodings": "learned"},
        {"mlp_t": True},
        {"puzzle_emb_len": 3},
        {"puzzle_emb_ndim": 8},
        {"rms_norm_eps": 0.1},
        {"rope_theta": 10.0},
        {"num_heads": 4},
        {"H_cycles": 3},
        {"L_cycles": 3},
        {"L_layers": 2},
        {"intermediate_size": 40},
        {"q_readout": "mean"},
        {"dropout": 0.3},
        {"forward_dtype": "bfloat16"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_option_changes_the_outputs(changes):
    base, other = tiny_model(), tiny_model(**changes)
    same = {k: v for k, v in base.state_dict().items() if k in other.state_dict()}
    same = {k: v for k, v in same.items() if v.shape == other.state_dict()[k].shape}
    other.load_state_dict(same, strict=False)
    logits, changed = (step(model)[1] for model in (base, other))
    key = "q_halt_logits" if "q_readout" in changes else "logits"
    assert logits[key].shape == changed[key].shape
    assert not torch.equal(logits[key].float(), changed[key].float())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@BOTH
def test_dtypes(mixer, dtype):
    model = tiny_model(forward_dtype=dtype, **MIXERS[mixer])
    carry, outputs = step(model)
    wanted = getattr(torch, dtype)
    assert outputs["logits"].dtype == carry.inner_carry.z_H.dtype == wanted
    assert carry.inner_carry.z_L.dtype == wanted
    assert outputs["q_halt_logits"].dtype == outputs["q_continue_logits"].dtype == torch.float32
    assert all(torch.isfinite(value).all() for value in outputs.values())
    assert {g.dtype for g in gradients(model).values()} == {torch.float32}


def test_shapes_of_the_outputs():
    carry, outputs = step(tiny_model())
    assert outputs["logits"].shape == (4, 10, 9)
    assert outputs["q_halt_logits"].shape == outputs["q_continue_logits"].shape == (4,)
    assert carry.inner_carry.z_H.shape == (4, 12, 16)
    assert set(outputs) == {"logits", "q_halt_logits", "q_continue_logits"}
    assert (carry.steps.dtype, carry.halted.dtype) == (torch.int32, torch.bool)


def test_q_readout():
    for readout in ("first", "mean"):
        model = tiny_model(q_readout=readout)
        carry, outputs = step(model)
        y = carry.inner_carry.z_H
        source = y[:, 0] if readout == "first" else y.mean(1)
        want = source @ model.inner.q_head.weight.T + model.inner.q_head.bias
        torch.testing.assert_close(outputs["q_halt_logits"], want[:, 0])
        torch.testing.assert_close(outputs["q_continue_logits"], want[:, 1])
        answer = (y @ model.inner.lm_head.weight.T)[:, 2:]
        torch.testing.assert_close(outputs["logits"], answer)


def test_one_q_logit():
    model = tiny_model(q_logits=1)
    _, outputs = step(model)
    assert set(outputs) == {"logits", "q_halt_logits"}
    assert model.inner.q_head.weight.shape == (1, 16)
    head = ACTLossHead(model, "stablemax_cross_entropy")
    batch = tiny_batch()
    _, loss, metrics, _, _ = head(
        return_keys=["q_continue_logits"], carry=head.initial_carry(batch), batch=batch
    )
    loss.backward()
    assert "q_continue_loss" not in metrics
    assert model.inner.q_head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("mixer", MIXERS)
def test_intermediate_sizes(mixer):
    model = tiny_model(intermediate_size=20, token_intermediate_size=6, **MIXERS[mixer])
    layer = model.inner.L_level.layers[0]
    assert layer.mlp.down_proj.weight.shape == (16, 20)
    if mixer == "mlp_t":
        assert layer.mlp_t.down_proj.weight.shape == (12, 6)
    official = tiny_model(intermediate_multiple=256, **MIXERS[mixer])
    assert official.inner.L_level.layers[0].mlp.down_proj.weight.shape == (16, 256)


@BOTH
def test_dropout_is_for_training_only(mixer):
    model = tiny_model(dropout=0.3, **MIXERS[mixer])
    first, again, other = (step(model, seed=seed)[1]["logits"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    model.eval()
    plain = tiny_model(**MIXERS[mixer]).eval()
    assert torch.equal(step(model, seed=1)[1]["logits"], step(model, seed=2)[1]["logits"])
    assert torch.equal(step(model)[1]["logits"], step(plain)[1]["logits"])


@BOTH
def test_policies_give_the_same_gradients(mixer):
    want = gradients(tiny_model(**MIXERS[mixer]))
    for policy in POLICIES:
        assert_equal(gradients(tiny_model(policy=policy, **MIXERS[mixer])), want)


def test_policy_auto_is_decided_once_per_batch_size(monkeypatch):
    asked = []

    def decide(config, batch, device, engine):
        assert engine == backends.recursion_engine(device, torch.float32, config)
        asked.append(batch)
        return "light"

    monkeypatch.setattr(memory, "fastest_policy", decide)
    model = tiny_model(policy="auto")
    carry, _ = step(model)
    step(model, carry=carry)
    assert model.inner._recursion(4).policy == "light"
    step(model, tiny_batch(2))
    assert asked == [4, 2]
    assert tiny_model(policy="recompute").inner._recursion(4).policy == "recompute"
    assert asked == [4, 2]


def test_a_backend_of_gpus_is_refused_where_there_is_none_and_waits_where_there_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="backend 'triton' cannot serve embed_reset on cpu"):
        tiny_model(backend="triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = tiny_model(backend="triton")
    with pytest.raises(ValueError, match="backend 'triton' cannot serve embed_reset on cpu"):
        step(model)


def test_backend_named():
    model = tiny_model(backend="reference")
    assert all(getattr(model.ops, op) is getattr(reference, op) for op in OP_NAMES)
    rows = model.backend_report()
    assert [row.op for row in rows] == list(OP_NAMES)
    assert {row.reason for row in rows} == {"named by the user"}
    assert model.ops is model.inner.ops


@pytest.mark.parametrize("positions", ["rope", "learned", "none"])
@BOTH
def test_every_parameter_gets_a_gradient(mixer, positions):
    model = tiny_model(L_layers=2, **MIXERS[mixer] | {"pos_encodings": positions})
    for name, gradient in gradients(model).items():
        assert gradient is not None and gradient.abs().sum() > 0, name
    assert model.puzzle_emb.local_weights.grad.abs().sum() > 0
    assert model.inner.H_init.grad is None


@BOTH
def test_prefix_without_an_embedding_is_zeros(mixer):
    model = tiny_model(puzzle_emb_ndim=0, puzzle_emb_len=16, **MIXERS[mixer])
    assert model.config.total_len == 26
    batch = tiny_batch()
    _, outputs = step(model, batch)
    with_rows = tiny_model(puzzle_emb_ndim=16, puzzle_emb_len=16, **MIXERS[mixer])
    with_rows.load_state_dict(model.state_dict(), strict=False)
    with_rows.puzzle_emb.weights.zero_()
    assert torch.equal(step(with_rows, batch)[1]["logits"], outputs["logits"])
    others = batch | {"puzzle_identifiers": batch["puzzle_identifiers"].flip(0)}
    assert torch.equal(step(model, others)[1]["logits"], outputs["logits"])


def test_no_prefix_at_all():
    model = tiny_model(puzzle_emb_ndim=0, puzzle_emb_len=0)
    carry, outputs = step(model)
    assert carry.inner_carry.z_H.shape == (4, 10, 16)
    assert outputs["logits"].shape == (4, 10, 9)
    assert all(g is not None for g in gradients(model).values())


@pytest.mark.parametrize("ndim, length, tokens", [(16, 0, 1), (40, 0, 3), (20, 4, 4), (3, 1, 1)])
def test_rows_fill_the_prefix_and_are_padded_with_zeros(ndim, length, tokens):
    model = tiny_model(puzzle_emb_ndim=ndim, puzzle_emb_len=length)
    assert model.config.prefix_len == tokens
    prefix = model.inner._prefix(torch.tensor([3, 1], dtype=torch.int32))
    assert prefix.shape == (2, tokens, 16)
    flat = prefix.reshape(2, -1)
    assert torch.equal(flat[:, :ndim], model.puzzle_emb.weights[[3, 1]])
    assert torch.equal(flat[:, ndim:], torch.zeros(2, tokens * 16 - ndim))


def test_rows_reach_the_answer():
    model = tiny_model()
    _, before = step(model)
    batch = tiny_batch()
    used = int(batch["puzzle_identifiers"][0])
    model.puzzle_emb.weights[used] += 1
    _, after = step(model, batch)
    same = batch["puzzle_identifiers"] != used
    assert torch.equal(before["logits"][same], after["logits"][same])
    assert not torch.equal(before["logits"][~same], after["logits"][~same])


def test_rows_have_no_gradient_in_evaluation():
    model = tiny_model().eval()
    gradients(model)
    assert model.puzzle_emb.local_weights.grad is None
    assert not model.puzzle_emb.weights.requires_grad


@pytest.mark.parametrize("size", [1, 3, 4, 7])
@BOTH
def test_any_batch_size_gives_the_rows_the_same_gradient(mixer, size):
    """A model built for 4 boards and one built for `size` of them."""
    batch = tiny_batch(size)
    fitting = tiny_model(batch_size=size, **MIXERS[mixer])
    want = gradients(fitting, batch)
    model = tiny_model(batch_size=4, **MIXERS[mixer])
    assert_equal(gradients(model, batch), want)
    row_gradient = model.puzzle_emb.local_weights.grad
    assert torch.equal(row_gradient[:size], fitting.puzzle_emb.local_weights.grad)
    assert torch.equal(row_gradient[size:], torch.zeros_like(row_gradient[size:]))


@pytest.mark.parametrize("size", [1, 4, 7])
def test_the_row_optimizer_updates_exactly_the_rows_used(size):
    model = tiny_model()
    optimizer = SparseEmbeddingSignSGD(model.puzzle_emb.buffers(), lr=0.1, weight_decay=0.5)
    batch = tiny_batch(size)
    before = model.puzzle_emb.weights.clone()
    gradients(model, batch)
    optimizer.step()
    used = batch["puzzle_identifiers"].long().unique()
    rest = [i for i in range(IDENTIFIERS) if i not in used]
    assert torch.equal(model.puzzle_emb.weights[rest], before[rest])
    moved = model.puzzle_emb.weights[used] - before[used] * (1 - 0.1 * 0.5)
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 0.1))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@BOTH
def test_no_boards(mixer, training):
    model = tiny_model(halt_exploration_prob=0.5, **MIXERS[mixer]).train(training)
    carry, outputs = step(model, tiny_batch(0))
    assert outputs["logits"].shape == (0, 10, 9)
    assert outputs["q_halt_logits"].shape == carry.steps.shape == (0,)
    loss_of(outputs).backward()


@BOTH
def test_boards_do_not_influence_each_other(mixer):
    model = tiny_model(**MIXERS[mixer]).eval()
    batch = tiny_batch()
    _, together = step(model, batch)
    for i in range(4):
        _, alone = step(model, {name: value[i : i + 1] for name, value in batch.items()})
        torch.testing.assert_close(alone["logits"][0], together["logits"][i], atol=1e-4, rtol=1e-4)


@BOTH
def test_copies_and_files(mixer):
    model = tiny_model(L_layers=2, **MIXERS[mixer])
    want, want_gradients = step(model)[1], gradients(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    model.zero_grad()
    copies = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(buffer, weights_only=False),
    }
    for name, other in copies.items():
        assert other.config == model.config, name
        assert_equal(step(other)[1], want)
        assert_equal(gradients(other), want_gradients)
        with torch.no_grad():
            next(other.parameters()).add_(1)
            other.puzzle_emb.weights.add_(1)
        assert_equal(step(model)[1], want)


@BOTH
def test_state_dict_round_trip(mixer):
    model, other = (tiny_model(seed=s, **MIXERS[mixer]) for s in (0, 1))
    assert not torch.equal(step(model)[1]["logits"], step(other)[1]["logits"])
    other.load_state_dict(model.state_dict(), strict=True)
    assert_equal(step(other)[1], step(model)[1])


def test_moving_selects_the_ops_again():
    model = tiny_model()
    model.inner.ops = None
    model.to(torch.device("meta"))
    assert model.ops.inject is reference.inject
    assert {p.device.type for p in model.parameters()} == {"meta"}
    batch = {name: value.to("meta") for name, value in tiny_batch().items()}
    model.eval()
    with torch.no_grad():
        _, outputs = model(carry=model.initial_carry(batch), batch=batch)
    assert (outputs["logits"].device.type, outputs["logits"].shape) == ("meta", (4, 10, 9))


def test_to_another_dtype_and_back_on_cpu():
    model = tiny_model()
    want = step(model)[1]["logits"]
    model.double()
    assert model.inner.lm_head.weight.dtype == torch.float64
    assert model.ops.inject is reference.inject
    model.float()
    assert torch.equal(step(model)[1]["logits"], want)


@BOTH
def test_compiled_without_a_graph_break_equals_eager(mixer, monkeypatch):
    compilable(monkeypatch)
    changes = {"halt_exploration_prob": 0.5, "L_cycles": 1, "forward_dtype": "bfloat16"}
    model = tiny_model(**changes, **MIXERS[mixer])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        model.zero_grad()
        model.puzzle_emb.local_weights.grad = None
        batch = tiny_batch()
        torch.manual_seed(5)
        carry, outputs = run(carry=model.initial_carry(batch), batch=batch)
        loss_of(outputs).backward()
        found = [*outputs.values(), carry.inner_carry.z_H, carry.inner_carry.z_L, carry.steps]
        found += [p.grad for p in model.parameters()] + [model.puzzle_emb.local_weights.grad]
        results.append([t.detach().clone() for t in found])
    for got, want in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-2)


def test_compiled_in_evaluation(monkeypatch):
    compilable(monkeypatch)
    model = tiny_model(policy="auto").eval()
    batch = tiny_batch()
    carry = model.initial_carry(batch)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        _, got = compiled(carry=carry, batch=batch)
        _, want = model(carry=carry, batch=batch)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value)
