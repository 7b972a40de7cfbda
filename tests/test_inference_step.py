"""One step for every answer: padded, captured, borrowed, used again; the answers stay the same."""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from answering import boards, tiny_config, tiny_model, with_given
from capturing import InPlace, NeverWaits, Recorded

from trm_fast import backends, inference_step
from trm_fast.inference import predict, supervision_steps
from trm_fast.inference_step import InferenceStep, borrowed, padded_size
from trm_fast.model import Model

STEPS = 3


@pytest.fixture
def model():
    return tiny_model().eval()


@pytest.fixture
def in_place(monkeypatch):
    """Steps as they are on a GPU, of sizes as there."""
    monkeypatch.setattr(inference_step, "Capture", InPlace)
    monkeypatch.setattr(inference_step, "_is_captured", lambda device: True)


def batch_of(count, seed=0):
    inputs = torch.as_tensor(boards(count, seed), dtype=torch.int32)
    ids = torch.arange(count, dtype=torch.int32) % 2
    return {"inputs": inputs, "puzzle_identifiers": ids}


def by_hand(model, batch, steps=STEPS):
    """(preds, q, logits) of each step, straight from the model."""
    found, carry = [], model.initial_carry(batch)
    with torch.no_grad():
        for _ in range(steps):
            carry, outputs = model(carry, batch)
            carry.halted = torch.zeros_like(carry.halted)
            found.append(
                (outputs["logits"].argmax(-1), outputs["q_halt_logits"], outputs["logits"])
            )
    return found


def assert_same(found, wanted):
    assert len(found) == len(wanted)
    for out, (preds, q, logits) in zip(found, wanted, strict=True):
        torch.testing.assert_close(out.logits, logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out.q, q, rtol=1e-5, atol=1e-5)
        assert torch.equal(out.preds, preds)


def test_sizes_of_graphs():
    assert [padded_size(n) for n in (0, 1, 2, 3, 4, 5, 33, 64)] == [1, 1, 2, 4, 4, 8, 64, 64]
    assert [padded_size(n) for n in (65, 128, 500, 768)] == [128, 128, 512, 768]


@pytest.mark.parametrize("count", [1, 3, 5])
def test_padding_changes_no_answer(model, count):
    step = InferenceStep(model, 8)
    for seed in (0, 1):
        batch = batch_of(count, seed)
        with torch.inference_mode():
            step.start(batch)
            assert_same([step.run() for _ in range(STEPS)], by_hand(model, batch))


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("capture", [InPlace, Recorded])
def test_captured_or_not(model, count, capture, in_place, monkeypatch):
    """All outputs are looked at after the last step: each is its reader's own."""
    monkeypatch.setattr(inference_step, "Capture", capture)
    Recorded.made = 0
    for seed in range(4):
        batch = batch_of(count, seed)
        outs = list(supervision_steps(model, batch, STEPS))
        assert_same(outs, by_hand(model, batch))
    assert Recorded.made == (capture is Recorded)


def test_what_is_not_a_number_is_never_the_best(model, in_place, monkeypatch):
    def forward(carry, batch, real=model.forward):
        carry, outputs = real(carry, batch)
        outputs["q_halt_logits"] = outputs["q_halt_logits"].masked_fill(bad, torch.nan)
        return carry, outputs

    bad = torch.tensor([False] * 4)
    first, second = batch_of(4), batch_of(4, 1)
    predict(model, *first.values(), depth=STEPS)
    bad = torch.tensor([True, False, False, True])
    monkeypatch.setattr(model, "forward", forward)
    found = predict(model, *second.values(), depth=STEPS)
    preds, _, _ = by_hand(model, second)[0]
    assert torch.equal(found.tokens[bad], with_given(model, second["inputs"], preds)[bad])
    assert found.step[bad].tolist() == [1, 1]
    assert found.q[bad].tolist() == [-torch.inf] * 2


def test_everything_stays_in_its_place(model, in_place):
    with borrowed(model, 5) as step, torch.inference_mode():
        places = []
        for seed in (0, 1):
            step.start(batch_of(5, seed))
            for _ in range(STEPS):
                step.run()
                carry = step._carry
                held = list(step._data.values())
                held += [*vars(carry.inner_carry).values(), carry.steps, carry.halted]
                held += carry.current_data.values()
                places.append([t.data_ptr() for t in held])
        assert all(place == places[0] for place in places)


@pytest.mark.parametrize("select", ["last", "q"])
def test_answers_of_padded_steps(model, select, in_place):
    inputs, ids = batch_of(11).values()
    found = predict(model, inputs, ids, depth=STEPS, select=select, batch_size=4)
    steps = by_hand(model, {"inputs": inputs, "puzzle_identifiers": ids})
    q = torch.stack([q for _, q, _ in steps])
    chosen = torch.full((11,), STEPS - 1) if select == "last" else q.argmax(0)
    rows = torch.arange(11)
    assert torch.equal(found.step, chosen + 1)
    tokens = torch.stack([p for p, _, _ in steps])[chosen, rows]
    assert torch.equal(found.tokens, with_given(model, inputs, tokens))
    torch.testing.assert_close(found.q, q[chosen, rows], rtol=1e-5, atol=1e-5)


def test_a_step_is_used_again_by_one_at_a_time(model, in_place):
    with borrowed(model, 5) as first, borrowed(model, 7) as second:
        assert first is not second
    with borrowed(model, 8) as again, borrowed(model, 6) as other:
        assert {id(again), id(other)} == {id(first), id(second)}
        with borrowed(model, 9) as larger:
            assert larger not in (first, second)
    both = zip(
        supervision_steps(model, batch_of(3), STEPS),
        supervision_steps(model, batch_of(3, 1), STEPS),
        strict=True,
    )
    ones, others = zip(*both, strict=True)
    assert_same(ones, by_hand(model, batch_of(3)))
    assert_same(others, by_hand(model, batch_of(3, 1)))


def test_few_are_kept(model, in_place):
    for count in (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448):
        with borrowed(model, count):
            pass
    assert len(inference_step._free[model]) == inference_step.KEPT


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("mixer", ["attention", "mlp_t"])
def test_weights_are_rounded_once_to_the_same_bits(mixer, dtype, in_place):
    """Where plain PyTorch serves, which rounds them in every step."""
    changes = {"mlp_t": True, "pos_encodings": "none"} if mixer == "mlp_t" else {}
    model = tiny_model(**changes, forward_dtype=dtype, backend="reference")
    with borrowed(model, 4) as step, torch.inference_mode():
        assert step._rounded.keys() == dict(model.named_parameters()).keys()
        for scale in (1.0, 0.5):
            for p in model.parameters():
                p.mul_(scale)
            step.start(batch_of(4))
            found = [step.run() for _ in range(STEPS)]
            for out, (preds, q, logits) in zip(found, by_hand(model, batch_of(4)), strict=True):
                assert torch.equal(out.logits, logits) and torch.equal(out.q, q)
                assert torch.equal(out.preds, preds)


def test_other_weights_are_read_and_moved_ones_found(model, in_place):
    batch = batch_of(3)
    before = list(supervision_steps(model, batch, 1))
    with torch.no_grad():
        model.inner.lm_head.weight.mul_(-1)
    with borrowed(model, 3) as step:
        pass
    assert_same(list(supervision_steps(model, batch, 1)), by_hand(model, batch, 1))
    assert not torch.equal(before[0].logits, by_hand(model, batch, 1)[0][2])
    model.inner.lm_head.weight.data = model.inner.lm_head.weight.data.clone()
    with borrowed(model, 3) as another:
        assert another is not step


@pytest.mark.parametrize("what", ["ops", "config"])
def test_what_decides_the_work_is_found_too(model, in_place, what):
    with borrowed(model, 3) as step:
        pass
    if what == "ops":
        model.inner.ops = replace(model.inner.ops, inject=backends.table("reference").swiglu)
    else:
        model.inner.config = replace(model.inner.config, L_cycles=2)
    with borrowed(model, 3) as another:
        assert another is not step


def test_hooks_are_called_every_time(model, in_place):
    seen = []
    model.inner.register_forward_hook(lambda *_: seen.append(1))
    list(supervision_steps(model, batch_of(3), STEPS))
    assert len(seen) == STEPS
    with borrowed(model, 3) as step:
        assert step.size == 3, "as it is, without a graph"


def test_without_graphs_on_request(model, in_place, monkeypatch):
    asked = []
    monkeypatch.setattr(
        inference_step, "Capture", lambda *args: asked.append(args[2]) or InPlace(*args)
    )
    list(supervision_steps(model, batch_of(3), 1))
    list(supervision_steps(model, batch_of(3), 1, cuda_graph=False))
    assert asked == [True, False]


def test_a_model_is_copied_and_forgotten_without_its_steps(model, in_place):
    with borrowed(model, 3):
        pass
    twin, reference = copy.deepcopy(model), weakref.ref(model)
    assert twin not in inference_step._free
    del model
    gc.collect()
    # The fixture holds it still; but nothing of ours does.
    assert all(not isinstance(r, InferenceStep) for r in gc.get_referrers(reference()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_nothing_in_it_waits_for_the_device(dtype, backend):
    config = {"forward_dtype": dtype, "hidden_size": 32, "num_heads": 2, "backend": "reference"}
    model = Model(tiny_config(**config)).to("meta").eval()
    if backend == "triton":
        model.inner.ops = backends.table("triton")
    step = InferenceStep(model, 4)
    with torch.inference_mode():
        step._run()
        with NeverWaits("meta") as mode:
            step._run()
    assert mode.calls > 20
