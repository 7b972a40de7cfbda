"""quantize: whole numbers by hand, exact sums, which passes use them, who serves them."""

import pytest
import torch
from parity import make_inputs, relative_l2
from tiny import MIXERS, tiny_batch, tiny_config, tiny_model

from trm_fast import backends, quantize, reference
from trm_fast.config import ConfigError, ModelConfig
from trm_fast.losses import ACTLossHead
from trm_fast.ops import OP_NAMES, Ops

OPS = Ops(**{name: getattr(reference, name) for name in OP_NAMES})
# What the kernels serve: heads of 16 features.
SIZES = {"hidden_size": 32, "num_heads": 2, "puzzle_emb_ndim": 32}


def test_rows_by_hand():
    numbers, steps = quantize.rows(torch.tensor([[1.27, -0.005, 0.015, 0.6], [-254, 1, 3, 5]]))
    assert numbers.tolist() == [[127, 0, 2, 60], [-127, 0, 2, 2]]  # halves go to even numbers
    torch.testing.assert_close(steps, torch.tensor([[0.01], [2.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_row_is_as_near_as_half_a_step(dtype):
    (t,) = make_inputs((5, 7, 33), dtype=dtype)
    numbers, steps = quantize.rows(t)
    assert numbers.dtype == steps.dtype == torch.float32
    assert torch.equal(numbers, numbers.round())
    assert (numbers.abs().amax(-1) == 127).all()
    assert ((numbers * steps - t.float()).abs() <= 0.501 * steps).all()


def test_rows_that_have_no_step():
    nan, inf = torch.nan, torch.inf
    t = torch.tensor([[0.0, 0], [1e-35, -1e-40], [nan, 1], [1, -inf], [inf, nan], [3e38, 1e-30]])
    numbers, steps = quantize.rows(t)
    assert torch.equal(numbers, torch.tensor([[0.0, 0]] * 5 + [[127, 0]]))
    assert steps[:2].tolist() == [[0], [0]]
    assert steps[2:5].isnan().all() and steps[5] > 0


@pytest.mark.parametrize("inner", [16, 1023, 1024, 1025, 3000])
def test_sums_are_exact(inner):
    """At the largest numbers, where float32 would round a whole sum."""
    h = torch.randint(100, 128, (3, 5, inner)).float()
    w = torch.randint(100, 128, (4, inner)).float()
    h[..., 0] = w[:, 0] = 127
    w[1] *= -1
    got = quantize.linear(h, quantize.rows(w))
    want = (h.long().flatten(0, 1) @ w.long().t()).view(3, 5, 4)
    assert torch.equal(got, want.float())


def test_a_product_is_near_the_real_one():
    h, w = make_inputs((2, 9, 96), (48, 96), scale=[1.0, 0.1])
    h *= torch.logspace(-3, 3, 9).view(9, 1)
    for dtype in (torch.float32, torch.bfloat16):
        got = quantize.linear(h.to(dtype), quantize.rows(w))
        assert got.dtype == dtype and got.shape == (2, 9, 48)
        for token in range(9):
            error = relative_l2(got[:, token], h[:, token].double() @ w.double().t())
            assert 1e-3 < error < 2e-2
    assert quantize.linear(h[:0], quantize.rows(w)).shape == (0, 9, 48)


def answers(model, training=False):
    """Logits of two steps without a gradient."""
    batch = tiny_batch()
    model.train(training)
    with torch.no_grad():
        carry = model.initial_carry(batch)
        found = []
        for _ in range(2):
            carry, outputs = model(carry, batch)
            found.append(outputs["logits"])
    return torch.stack(found)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_answers_are_quantised(mixer, backend, extension):
    exact, given = (
        answers(tiny_model(**SIZES, **MIXERS[mixer], backend=backend, quantize=q))
        for q in ("none", "int8")
    )
    assert 1e-4 < relative_l2(given, exact) < 0.5
    plain = answers(tiny_model(**SIZES, **MIXERS[mixer], backend="reference", quantize="int8"))
    assert relative_l2(given, plain) < 0.25 * relative_l2(given, exact)


def two_steps(backend, mixer, quantized, **changes):
    """Losses, gradients and states of training, from the same weights."""
    model = tiny_model(**SIZES, **MIXERS[mixer], **changes, backend=backend, quantize=quantized)
    head = ACTLossHead(model.train(), "stablemax_cross_entropy")
    torch.manual_seed(1)
    batch = tiny_batch()
    carry, found = head.initial_carry(batch), []
    for _ in range(2):
        carry, loss, _, _, _ = head(return_keys=[], carry=carry, batch=batch)
        loss.backward()
        found += [loss.detach(), carry.inner_carry.z_H, carry.inner_carry.z_L]
    return found + [p.grad for p in head.parameters() if p.grad is not None]


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_training_does_not_notice(mixer, backend, extension):
    """Not even the step that looks ahead without a gradient for the worth of going on."""
    for changes in ({}, {"no_ACT_continue": False}):
        plain, given = (two_steps(backend, mixer, q, **changes) for q in ("none", "int8"))
        assert len(plain) == len(given) > 6
        assert all(torch.equal(a, b) for a, b in zip(plain, given, strict=True))


def test_a_model_in_training_mode_or_with_gradients_is_not_quantised():
    exact, given = (tiny_model(quantize=q) for q in ("none", "int8"))
    assert torch.equal(answers(exact, training=True), answers(given, training=True))
    batch = tiny_batch()
    tracked = [m.eval()(m.initial_carry(batch), batch)[1]["logits"] for m in (exact, given)]
    assert torch.equal(*tracked)
    assert not torch.equal(answers(exact), answers(given))


def test_the_option():
    assert ModelConfig.from_dict(tiny_config()).quantize == "none"
    with pytest.raises(ConfigError, match="quantize must be one of none, int8, fp8, got 'int4'"):
        ModelConfig.from_dict(tiny_config(quantize="int4"))


def test_gpus_have_none(monkeypatch):
    """There the recursion falls to the reference, and says why; all else stays."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(backends.library, "unavailable", lambda kind: None)
    config = ModelConfig.from_dict(tiny_config(**SIZES, quantize="int8"))
    found = backends.report("auto", torch.device("cuda"), torch.bfloat16, config)
    for choice in found:
        if choice.op == "deep_recursion":
            assert choice.implementation == "reference"
            for backend in ("triton", "cuda"):
                assert f"{backend}: has no products in int8 on GPUs" in choice.reason
        else:
            assert choice.implementation == "triton"
    for name in ("triton", "cuda"):
        with pytest.raises(ValueError, match="cannot serve deep_recursion .*int8 on GPUs"):
            backends.select(name, torch.device("cuda"), torch.bfloat16, config)
