"""The networks beside TRM: what depends on what, memory policies, and a run from end to end."""

import math

import pytest
import torch
from tiny import gradients, loss_of, step, tiny_batch, tiny_model
from training import assert_same, everything, make_config, make_data, make_trainer

from trm_fast.data.dataset import PuzzleDataset, PuzzleDatasetConfig
from trm_fast.inference import evaluate
from trm_fast.loading import load
from trm_fast.memory import parameter_count
from trm_fast.recursion import AnswerState, LatentState, LevelsState, State, named, state_of
from trm_fast.reference import free_network
from trm_fast.variants import VARIANTS

FIXED = {"puzzle_emb_len": 0, "no_ACT_continue": False}
NETWORKS = {
    "trm_singlez": {"name": "trm_singlez"},
    "trm_hier6": {"name": "trm_hier6", "L_cycles": 6},
    "hrm": {"name": "hrm", "H_layers": 2, "L_cycles": 3, **FIXED},
    "transformers_baseline": {
        "name": "transformers_baseline",
        "H_layers": 2,
        "H_cycles": 1,
        "L_cycles": 1,
        **FIXED,
    },
}
STATES = {
    "trm_singlez": LatentState,
    "trm_hier6": LevelsState,
    "hrm": State,
    "transformers_baseline": AnswerState,
}
MLP = {"mlp_t": True, "pos_encodings": "none"}
BOTH = [(kind, {}) for kind in NETWORKS] + [
    (kind, MLP) for kind in NETWORKS if kind != "transformers_baseline"
]


def model_of(kind, **changes):
    return tiny_model(**(NETWORKS[kind] | changes))


@pytest.mark.parametrize(("kind", "mixer"), BOTH)
def test_every_policy_gives_the_same_gradients(kind, mixer):
    kept = gradients(model_of(kind, **mixer).train())
    assert all(g is not None for g in kept.values())
    for policy in ("light", "recompute"):
        made = gradients(model_of(kind, policy=policy, **mixer).train())
        for name, grad in kept.items():
            torch.testing.assert_close(made[name], grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("kind", "mixer"), BOTH)
def test_halted_boards_start_anew_and_others_go_on(kind, mixer):
    model = model_of(kind, **mixer).eval()
    carry, _ = step(model)
    assert isinstance(carry.inner_carry, STATES[kind])
    carry.halted = torch.tensor([True, False, True, False])
    after, outputs = step(model, carry=carry)
    fresh, first = step(model)
    for index, halted in enumerate(carry.halted.tolist()):
        same = torch.equal(outputs["logits"][index], first["logits"][index])
        assert same == halted, index
    assert model.inner.variant is VARIANTS[kind]
    poisoned = state_of(
        {n: torch.full_like(s, math.nan) for n, s in named(carry.inner_carry).items()}
    )
    carry.inner_carry, carry.halted = poisoned, torch.ones(4, dtype=torch.bool)
    _, again = step(model, carry=carry)
    assert torch.equal(again["logits"], first["logits"])
    reset = model.inner.reset_carry(carry.halted, carry.inner_carry)
    assert all(bool(value.isfinite().all()) for value in named(reset).values())


def test_only_the_last_update_of_each_network_of_hrm_has_a_gradient():
    """With a second cycle cut off from the first, only its last two passes count: the same numbers
    as one cycle of one update on the states that those before have made."""
    whole = model_of("hrm").train()
    grads = gradients(whole)
    short = model_of("hrm", H_cycles=1, L_cycles=1).train()
    short.load_state_dict(whole.state_dict())
    with torch.no_grad():
        longer = model_of("hrm", H_cycles=1, L_cycles=3)
        longer.load_state_dict(whole.state_dict())
        batch = tiny_batch()
        begun = longer.eval()(carry=longer.initial_carry(batch), batch=batch)[0].inner_carry
        # The updates of the latent in the second cycle before its last one.
        inner = whole.inner
        x, _ = inner._begin(begun, batch, torch.zeros(4, dtype=torch.bool))
        z = begun.z_L
        settings = inner._recursion(4)
        latent = free_network(
            inner.ops, inner.L_level.weights(), inner._rotary(), settings, x, False
        )
        for _ in range(2):
            z = latent(inner.ops.inject(z, begun.z_H, x))
    carry = short.initial_carry(batch)
    carry.inner_carry, carry.halted = State(begun.z_H, z), torch.zeros(4, dtype=torch.bool)
    carry.current_data = batch
    short.zero_grad()
    loss_of(step(short, batch, carry)[1]).backward()
    for name, p in short.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=2e-5, atol=1e-6)


def test_the_baseline_does_not_look_at_cycles():
    once = model_of("transformers_baseline")
    often = model_of("transformers_baseline", H_cycles=3, L_cycles=2)
    for train in (True, False):
        _, made = step(often.train(train))
        assert torch.equal(made["logits"], step(once.train(train))[1]["logits"])
        with torch.no_grad():
            assert torch.equal(made["logits"], step(often)[1]["logits"])


def test_levels_beyond_the_cycles_stay_as_they_are():
    model = model_of("trm_hier6", L_cycles=4).eval()
    carry, _ = step(model)
    for level in (5, 6):
        start = getattr(model.inner, f"L{level}_init").expand(4, 12, 16)
        assert torch.equal(getattr(carry.inner_carry, f"z_L{level}"), start)
    assert not torch.equal(carry.inner_carry.z_L4[0, 0], model.inner.L4_init)


@pytest.mark.parametrize("kind", NETWORKS)
def test_parameters_are_as_many_as_the_estimate_says(kind):
    model = model_of(kind)
    assert parameter_count(model.config) == sum(p.numel() for p in model.parameters())


def test_q_values_of_the_networks():
    _, outputs = step(model_of("hrm").train())
    assert outputs["target_q_continue"].shape == (4,)
    plain = model_of("transformers_baseline").train()
    assert "target_q_continue" not in step(plain)[1]
    batch = tiny_batch()
    carry = plain.initial_carry(batch)
    _, outputs = plain(carry=carry, batch=batch, compute_target_q=True)
    assert ((outputs["target_q_continue"] > 0) & (outputs["target_q_continue"] < 1)).all()
    single = tiny_model(q_logits=1).train()
    with pytest.raises(ValueError, match="compute_target_q needs q_logits=2, the model has 1"):
        single(carry=single.initial_carry(batch), batch=batch, compute_target_q=True)


def test_act_enabled_and_act_inference():
    never = model_of("transformers_baseline", act_enabled=False).train()
    with torch.no_grad():
        never.inner.q_head.bias.copy_(torch.tensor([9.0, -9.0]))
    before = torch.get_rng_state()
    carry, _ = never(carry=never.initial_carry(tiny_batch()), batch=tiny_batch())
    assert not carry.halted.any() and torch.equal(before, torch.get_rng_state())
    willing = model_of("transformers_baseline", act_inference=True).eval()
    willing.load_state_dict(never.state_dict())
    carry, outputs = step(willing)
    assert carry.halted.all() and outputs["actual_steps"].tolist() == [1.0] * 4
    with torch.no_grad():  # both Q values say yes, the second louder
        willing.inner.q_head.weight.zero_()
        willing.inner.q_head.bias.copy_(torch.tensor([5.0, 9.0]))
    assert not step(willing)[0].halted.any()
    carry, outputs = step(model_of("transformers_baseline").eval())
    assert not carry.halted.any() and "actual_steps" not in outputs


RUNS = {
    "trm_singlez": {},
    "trm_hier6": {"arch__L_cycles": 3},
    "hrm": {"arch__q_logits": 2, "arch__H_layers": 1, "arch__L_layers": 1},
    "transformers_baseline": {"arch__q_logits": 2, "arch__H_layers": 1, "arch__num_heads": 7},
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_resumes_bitwise_and_its_checkpoint_answers(kind, tmp_path):
    data = make_data(tmp_path / "data")
    config = make_config(
        data, steps=6, eval_steps=6, save_interval=3, arch__name=kind, **RUNS[kind]
    )
    whole = make_trainer(config, tmp_path / "whole")
    whole.run()
    resumed = make_trainer(config, tmp_path / "again")
    resumed.resume(tmp_path / "whole" / "step_3")
    assert resumed.step == 3 and resumed.run()
    assert_same(everything(resumed), everything(whole))
    loaded = load(tmp_path / "whole", weights="ema")
    assert loaded.model.config.kind == kind
    options = PuzzleDatasetConfig(
        seed=0, dataset_paths=(str(data),), global_batch_size=8, test_set_mode=True
    )
    (report,) = evaluate(loaded.model, PuzzleDataset(options, "test"), steps=2).values()
    assert len(report.accuracy) == 2 and report.accuracy == pytest.approx(
        whole.validation.reports["all"].accuracy[:2]
    )
