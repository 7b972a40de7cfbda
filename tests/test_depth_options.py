"""Options of training that make depth safe: against a loop by hand, and what they leave alone."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from config_errors import message
from depth_loop import HandLoop
from tiny import assert_equal, compilable, gradients, tiny_batch, tiny_config, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from training import assert_same, everything, make_config, make_data, make_trainer

from trm_fast import noise
from trm_fast.config import ModelConfig, TrainConfig
from trm_fast.data.dataset import PuzzleDataset, PuzzleDatasetConfig
from trm_fast.flops import step_flops
from trm_fast.foreign_write import Parcel
from trm_fast.inference import evaluate, supervision_steps
from trm_fast.interop import load_weights
from trm_fast.loading import load
from trm_fast.losses import ACTLossHead
from trm_fast.memory import step_bytes
from trm_fast.model import Model
from trm_fast.portable import plain_model
from trm_fast.recursion import Exploration
from trm_fast.workloads import CASES

TINY = {
    "mlp_t": True,
    "pos_encodings": "none",
    "puzzle_emb_ndim": 0,
    "puzzle_emb_len": 0,
    "forward_dtype": "float64",
}
RANDOM, REFERENCE = {"random_init": True}, {"arch__backend": "reference"}
EQR = {"damping": 0.95, "noise": 0.01, "random_init": True}
# Model keys, decay of the loss, cycles of a stage.
OPTIONS = {
    "none": ({}, 1.0, None),
    "random-init": ({"random_init": True}, 1.0, None),
    "noise": ({"noise": 0.3}, 1.0, None),
    "damping": ({"damping": 0.6}, 1.0, None),
    "eqr": (EQR, 1.0, None),
    "eqr-one-cycle": ({**EQR, "H_cycles": 1}, 1.0, None),
    "fixed-count": ({"act_enabled": False}, 1.0, None),
    "stage": ({}, 0.7, (1, 1)),
    "eqr-stage": (EQR, 0.7, (1, 2)),
    "latents": ({"latents": 4}, 1.0, None),
    "latents-one-cycle": ({"latents": 3, "H_cycles": 1}, 1.0, None),
    "damped-latents-stage": ({"latents": 2, "damping": 0.8}, 0.7, (1, 2)),
}


def streams_of(number):
    torch.manual_seed(number)
    return noise.starts(torch.randint(1 << 32, (4, noise.WORDS)))


def drawn(number):
    never = torch.ones(4), torch.full((4,), 2)
    return Exploration(*never, streams_of(number))


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_are_those_of_a_loop_by_hand(name):
    changes, decay, cycles = OPTIONS[name]
    model = tiny_model(**(TINY | changes)).double().train()
    hand = HandLoop(model, decay, cycles)
    head = ACTLossHead(model, "stablemax_cross_entropy", step_decay=decay)
    model.inner.cycles = cycles
    carry, restarted, winners = head.initial_carry(tiny_batch()), [], set()
    for number in range(6):
        batch = tiny_batch(seed=number)
        carry, loss, _, _, _ = head((), carry, batch, drawn(number))
        loss.backward()
        wanted = hand.step(batch, streams_of(number))
        torch.testing.assert_close(loss.detach(), wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(carry.inner_carry.z_H, hand.carry[1], rtol=0, atol=1e-12)
        z = carry.inner_carry.z_L
        assert z.dim() == 3 + (model.config.latents > 1)
        z_hand = hand.carry[2] if z.dim() == 4 else hand.carry[2][:, 0]
        torch.testing.assert_close(z, z_hand, rtol=0, atol=1e-12)
        assert torch.equal(carry.halted, hand.halted)
        assert carry.steps.tolist() == hand.carry[3].tolist()
        restarted += carry.halted.tolist()
        winners |= set(hand.winner.tolist())
        for key, p in model.named_parameters():
            grad = hand.weights[key.removeprefix("inner.")].grad
            assert grad.abs().max() > 1e-8, key
            torch.testing.assert_close(p.grad, grad, rtol=1e-12, atol=1e-12, msg=key)
    assert 0 < sum(restarted) < len(restarted)
    assert len(winners) > 1 or model.config.latents == 1


@pytest.mark.parametrize("policy", ["light", "recompute"])
def test_every_policy_gives_the_same_gradients(policy):
    kept = gradients(tiny_model(**EQR).train())
    made = gradients(tiny_model(**EQR, policy=policy).train())
    for name, grad in kept.items():
        torch.testing.assert_close(made[name], grad, rtol=1e-5, atol=1e-7)


def test_latents_take_memory():
    """Of four, all go forward before one goes back: 4 x (question, both states before and behind,
    and what a block holds), or more."""
    one, four = (ModelConfig.from_dict(tiny_config(latents=n, L_cycles=1)) for n in (1, 4))
    apart = step_bytes(four, 8, "recompute") - step_bytes(one, 8, "recompute")
    assert apart > 8 * 4 * (3 * 3 * 12 * 16)


def test_every_option_is_another_training():
    found = {}
    for name, (changes, decay, cycles) in OPTIONS.items():
        model = tiny_model(**(TINY | changes)).double().train()
        head = ACTLossHead(model, "stablemax_cross_entropy", step_decay=decay)
        model.inner.cycles, carry = cycles, head.initial_carry(tiny_batch())
        for number in range(3):
            carry, loss, _, _, _ = head((), carry, tiny_batch(), drawn(number))
            loss.backward()
        found[name] = model.inner.lm_head.weight.grad
    names = list(found)
    for index, name in enumerate(names):
        for other in names[:index]:
            assert not torch.allclose(found[name], found[other], rtol=1e-6), (name, other)


def test_the_defaults_draw_and_keep_what_they_did():
    plain = tiny_model()
    assert not [name for name in plain.state_dict() if "more" in name]
    torch.manual_seed(3)
    before = Model(tiny_config()).state_dict()
    torch.manual_seed(3)
    with_latents = Model(tiny_config(latents=3)).state_dict()
    more = with_latents.pop("inner.L_init_more")
    assert_equal(with_latents, before)
    assert more.shape == (2, 16) and len({tuple(row.tolist()) for row in more}) == 2
    state = torch.get_rng_state()
    for changes in ({}, {"damping": 0.9}):
        model = tiny_model(act_enabled=False, **changes).train()
        torch.set_rng_state(state)
        model(carry=model.initial_carry(tiny_batch()), batch=tiny_batch())
        assert torch.equal(torch.get_rng_state(), state)


def test_without_draws_the_generator_is_asked():
    """Users' own loops: every step other numbers, the same after the same seed."""
    model = tiny_model(**EQR).train()
    batch, found = tiny_batch(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(model(carry=model.initial_carry(batch), batch=batch)[1]["logits"])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_an_evaluation_is_damped_and_has_no_noise():
    batch = tiny_batch()
    outputs = {}
    for name, changes in {"eqr": EQR, "damped": {"damping": 0.95}, "plain": {}}.items():
        model = tiny_model(**changes).eval()
        outputs[name] = [out.logits for out in supervision_steps(model, batch, 3)]
    for eqr, damped, plain in zip(*outputs.values(), strict=True):
        assert torch.equal(eqr, damped) and not torch.allclose(damped, plain, atol=1e-3)


def test_an_evaluation_has_one_latent_and_all_cycles():
    batch, model = tiny_batch(), tiny_model(latents=3)
    plain = tiny_model()
    weights = model.state_dict()
    del weights["inner.L_init_more"]
    plain.load_state_dict(weights)
    model.inner.cycles = (1, 1)
    steps = [supervision_steps(m.eval(), batch, 3) for m in (model, plain)]
    for one, other in zip(*steps, strict=True):
        assert torch.equal(one.logits, other.logits) and torch.equal(one.q, other.q)
    flag = torch.tensor([True, False, True, False])
    model.train()
    carry = model.inner.empty_carry(4)
    assert carry.z_H.shape == (4, 12, 16) and carry.z_L.shape == (4, 3, 12, 16)
    carry.z_L.zero_()
    reset = model.inner.reset_carry(flag, carry).z_L
    starts = torch.cat([model.inner.L_init[None], model.inner.L_init_more])
    for index, again in enumerate(flag.tolist()):
        want = starts[:, None].expand(3, 12, 16) if again else torch.zeros(3, 12, 16)
        assert torch.equal(reset[index], want)
    with pytest.raises(ValueError, match="latents=3 is trained through ACTLossHead"):
        model(carry=model.initial_carry(batch), batch=batch)


def test_a_fixed_count_replaces_nothing_early():
    model = tiny_model(act_enabled=False, halt_exploration_prob=1.0).train()
    with torch.no_grad():
        model.inner.q_head.bias.fill_(9)  # always willing to halt
    batch, seen = tiny_batch(), []
    carry = model.initial_carry(batch)
    for _ in range(9):
        carry, _ = model(carry=carry, batch=batch)
        seen.append((carry.steps.tolist(), carry.halted.tolist()))
    assert seen == [([n % 4 + 1] * 4, [n % 4 == 3] * 4) for n in range(9)]


@pytest.mark.parametrize("changes", [EQR, {"latents": 3}], ids=["eqr", "latents"])
def test_what_is_exported_is_damped_and_has_one_latent(changes):
    model = tiny_model(**changes).eval()
    plain = plain_model(model)
    assert plain.config.latents == 1 and not plain.config.draws_states
    steps = [supervision_steps(m, tiny_batch(), 2) for m in (model, plain)]
    for one, other in zip(*steps, strict=True):
        torch.testing.assert_close(one.logits, other.logits, rtol=1e-5, atol=1e-5)


def test_weights_go_from_one_latent_to_several_and_back(tmp_path):
    """Also to other projects, which have no damping."""
    plain, many = tiny_model(), tiny_model(1, latents=3)
    for name, model in {"plain": plain, "many": many}.items():
        model.save_pretrained(tmp_path / name)
    again = Model.from_pretrained(tmp_path / "many")
    assert_equal(again.state_dict(), many.state_dict())
    parcel = Parcel(many.config, many.state_dict(), many.state_dict())
    assert "L_init_more" not in parcel.weights and "L_init" in parcel.raw
    own = many.inner.L_init_more.clone()
    load_weights(many, tmp_path / "plain")
    assert torch.equal(many.inner.L_init_more, own)
    assert torch.equal(many.inner.lm_head.weight, plain.inner.lm_head.weight)
    load_weights(plain, tmp_path / "many")
    assert torch.equal(plain.inner.lm_head.weight, again.inner.lm_head.weight)
    damped = tiny_model(damping=0.9)
    with pytest.raises(ValueError, match="they have no damping, this model 0.9"):
        Parcel(damped.config, damped.state_dict(), damped.state_dict())


FUSED = {
    "damping": ({"damping": 0.9}, False, False),
    "noise": ({"noise": 0.1}, False, True),
    "both": ({"damping": 0.9, "noise": 0.1}, False, False),
    "random-init": (RANDOM, True, True),
    "latents": ({"latents": 3}, True, True),
}


@pytest.mark.parametrize("case", FUSED)
def test_where_the_fused_recursion_runs(case, extension):
    """In training and in answers: what the report says, what is asked, and what comes out."""
    changes, *expected = FUSED[case]
    model, plain = (tiny_model(backend=b, num_heads=1, **changes) for b in ("cpp", "reference"))
    asked = []
    fused = model.inner.ops.deep_recursion

    def counted(*args):
        asked.append(fused.__module__)
        return fused(*args)

    model.inner.ops = replace(model.inner.ops, deep_recursion=counted)
    for training, want in zip((True, False), expected, strict=True):
        model.train(training)
        (choice,) = [c for c in model.backend_report() if c.op == "deep_recursion"]
        assert choice.implementation == ("cpp" if want else "reference")
        came = "damping comes" if "damping" in changes else "noise in training comes"
        assert want or choice.reason == f"{came} between its passes: composed of the others"
        asked.clear()
        if training:
            head = ACTLossHead(model, "softmax_cross_entropy")
            batch = {**tiny_batch(), "labels": tiny_batch()["inputs"]}
            head(carry=head.initial_carry(batch), batch=batch, return_keys=[])
        else:
            steps = [supervision_steps(m.eval(), tiny_batch(), 3) for m in (model, plain)]
            for one, other in zip(*steps, strict=True):
                torch.testing.assert_close(one.logits, other.logits, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(one.q, other.q, rtol=1e-4, atol=1e-4)
        assert set(asked) == ({"trm_fast.extension.deep_recursion"} if want else set())


def test_noise_leaves_no_trace_in_answers():
    """Not even that of another order of the same operations."""
    batch = tiny_batch()
    steps = [supervision_steps(tiny_model(**c).eval(), batch, 3) for c in ({"noise": 0.3}, {})]
    for noisy, plain in zip(*steps, strict=True):
        assert torch.equal(noisy.logits, plain.logits) and torch.equal(noisy.q, plain.q)


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path / "data")


RUNS = {
    "eqr": {f"arch__{key}": value for key, value in EQR.items()},
    "stages": {"depth_stages": ["0.5:1x1", "0.8:1x2"], "step_loss_decay": 0.7},
    "latents": {"arch__latents": 3, "arch__mlp_t": True, "arch__pos_encodings": "none"},
    "fixed-count": {"arch__act_enabled": False},
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_resumes_bitwise_and_its_checkpoint_answers(data, tmp_path, kind):
    """In the middle of a stage of cycles (steps 1 to 5) and behind it."""
    config = make_config(
        data, steps=10, eval_steps=10, save_interval=3, arch__L_cycles=2, **RUNS[kind]
    )
    whole = make_trainer(config, tmp_path / "whole")
    whole.run()
    for step in (3, 6):
        resumed = make_trainer(config, tmp_path / f"again-{step}")
        resumed.resume(tmp_path / "whole" / f"step_{step}")
        assert resumed.step == step and resumed.run()
        assert_same(everything(resumed), everything(whole))
    loaded = load(tmp_path / "whole", weights="ema")
    assert loaded.model.config.damping == config.arch.damping
    options = PuzzleDatasetConfig(
        seed=0, dataset_paths=(str(data),), global_batch_size=8, test_set_mode=True
    )
    (report,) = evaluate(loaded.model, PuzzleDataset(options, "test")).values()
    assert report.accuracy == pytest.approx(whole.validation.reports["all"].accuracy)


def test_cycles_of_a_run(data, tmp_path):
    """Which cycles each step has; the evaluation has those of the model."""
    config = make_config(data, steps=10, arch__L_cycles=2, **RUNS["stages"])
    trainer = make_trainer(config, tmp_path)
    inner, seen = trainer.model.inner, []
    real = inner._recursion

    def asked(batch):
        settings = real(batch)
        seen.append((inner.training, settings.H_cycles, settings.L_cycles))
        return settings

    inner._recursion = asked
    trainer.run()
    trained = [cycles for training, *cycles in seen if training]
    assert trained == [[1, 1]] * 5 + [[1, 2]] * 3 + [[2, 2]] * 2
    assert {tuple(cycles) for training, *cycles in seen if not training} == {(2, 2)}
    assert [config.cycles(step, 10) for step in (1, 5, 6, 8, 9)] == [
        (1, 1), (1, 1), (1, 2), (1, 2), (2, 2)
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["latents", "stages"])
def test_operations_are_counted(data, tmp_path, kind):
    config = make_config(data, steps=10, arch__L_cycles=2, **RUNS[kind])
    config = config.replace({"arch.mlp_t": True, "arch.pos_encodings": "none"})
    trainer = make_trainer(config.replace({"arch.backend": "reference"}), tmp_path)
    batches, useful = trainer.dataset.choices(), []
    for _ in range(5):
        trainer.step = len(useful) * 2
        with FlopCounterMode(display=False) as counter:
            trainer.advance(*next(batches))
        H, L = config.cycles(trainer.step, 10)
        staged = replace(trainer.model_config, H_cycles=H, L_cycles=L)
        useful.append(step_flops(staged, "train", 4))
        assert useful[-1] == counter.get_total_flops()
    assert len(set(useful)) == (3 if kind == "stages" else 1)
    official = CASES["official"].model
    forward = step_flops(official, "inference")
    four = replace(official, latents=4)
    assert 3.3 < (step_flops(four, "train") - step_flops(official, "train")) / forward < 3.4


def test_a_compiled_step_is_compiled_again_for_other_cycles(data, tmp_path, monkeypatch):
    """By Dynamo alone, which is what notices; its code is the same to the bit."""
    compilable(monkeypatch)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    config = make_config(data, steps=2, depth_stages=["0.5:1x1"], **REFERENCE)
    trained = []
    for compiled in (False, True):
        trainer = make_trainer(config.replace({"compile": compiled}), tmp_path / str(compiled))
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for batch, _ in zip(trainer.dataset.choices(), range(2), strict=False):
            trainer.advance(*batch)
        trained.append(dict(trainer.model.state_dict()))
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
        assert graphs == 2 * compiled
    assert_equal(*trained)


def test_a_profile_of_a_stage_counts_its_cycles(data, tmp_path):
    config = make_config(data, steps=40, depth_stages=["0.5:1x1"], profile=True)
    trainer = make_trainer(config, tmp_path)
    first = trainer._useful_flops()
    trainer.step = 15
    assert first < trainer._useful_flops() == step_flops(trainer.model_config, "train", 4)


def test_what_makes_no_sense_is_refused():
    def model(**changes):
        return message(ModelConfig.from_dict, tiny_config(**changes))

    hrm = {"name": "hrm", "H_layers": 1}
    assert model(damping=0.5, **hrm) == "damping is for arch=trm, got arch=hrm"
    assert model(latents=2, **hrm) == "latents is for arch=trm, got arch=hrm"
    assert model(latents=2, noise=0.1) == "latents=2 needs noise=0.0, got 0.1"
    assert model(latents=2, random_init=True) == "latents=2 needs random_init=false, got true"
    assert model(latents=2, dropout=0.1) == "latents=2 needs dropout=0.0, got 0.1"
    assert "latents=2 needs no_ACT_continue=true" in model(latents=2, no_ACT_continue=False)

    def train(**changes):
        return message(TrainConfig.from_dict, changes)

    growing = "depth_stages must name growing parts of the run between 0 and 1, got"
    assert train(depth_stages=["0.5:1x1", "0.5:1x2"]).startswith(growing)
    assert train(depth_stages=["0.0:1x1"]).startswith(growing)
    for bad in ("0.3", "1.5:1x1", "0.3:1x", "0.3:x2", "a:1x2", "-0.3:1x2"):
        assert train(depth_stages=[bad]) == f"depth_stages must be texts like 0.3:1x2, got {bad!r}"
    within = "depth_stages must be within arch.H_cycles x arch.L_cycles = 3x6, got "
    assert train(depth_stages=["0.3:4x1"]) == within + "4x1"
    assert train(depth_stages=["0.3:1x7"]) == within + "1x7"
    assert train(depth_stages=["0.3:0x1"]) == within + "0x1"
    plain = train(depth_stages=["0.3:1x1"], arch="transformers_baseline")
    assert plain == "depth_stages is for recursions of H x L cycles, not transformers_baseline"
    assert "arch.damping=1 and arch.latents=1, got 0.9 and 1" in train(
        official=True, **{"arch.damping": 0.9}
    )
    assert "got 1.0 and 4" in train(official=True, **{"arch.latents": 4})
