"""The moving average of the weights: against a loop, swapped in and out, stored and restored."""

import pytest
import torch
from test_optim import Head, Toy, assert_same, state_of, train
from torch import nn

from trm_fast.ema import EMA
from trm_fast.optim import AdamATan2


@pytest.mark.parametrize("warmup", [False, True])
def test_ema_is_the_loop(warmup):
    model = Toy()
    model.q_head.bias.requires_grad_(False)
    ema = EMA(model, 0.8, warmup)
    expected = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert "q_head.bias" not in expected
    for step in range(1, 60):
        with torch.no_grad():
            for p in model.parameters():
                p.normal_()
        ema.update(model)
        decay = min(0.8, (1 + step) / (10 + step)) if warmup else 0.8
        for name, p in model.named_parameters():
            if name in expected:
                expected[name] = (1.0 - decay) * p.detach() + decay * expected[name]
    assert ema.updates == 59
    assert_same(ema.shadow, expected)  # bitwise: rounds as the two products and their sum


def test_ema_of_a_frozen_model_is_empty_and_harmless():
    model = Toy(rows=False).requires_grad_(False)
    ema = EMA(model)
    ema.update(model)
    with ema.swap(model):
        assert ema.shadow == {} and ema.updates == 1


def test_ema_swap_is_exact_and_leaves_storages_and_buffers():
    model = Toy()
    ema = EMA(model, 0.5)
    train(model, [(AdamATan2(model.parameters(), 0.1), 0.1)], 3)
    ema.update(model)
    before, average = state_of(model), {n: v.clone() for n, v in ema.shadow.items()}
    pointers = [p.data_ptr() for p in model.parameters()]
    with ema.swap(model):
        inside = state_of(model)
        assert_same({n: inside[n] for n in average}, average)
        assert torch.equal(inside["puzzle_emb.weights"], before["puzzle_emb.weights"])
        with torch.no_grad():
            model.q_head.weight.zero_()  # not into the average, nor into what comes back
    assert_same(state_of(model), before)
    assert_same(ema.shadow, average)
    assert pointers == [p.data_ptr() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="in the middle"), ema.swap(model):
        raise RuntimeError("in the middle")
    assert_same(state_of(model), before)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_ema_merged_is_a_whole_state_dict_and_comes_back():
    model = Toy()
    ema = EMA(Head(model), 0.5)
    train(model, [(AdamATan2(model.parameters(), 0.1), 0.1)], 2)
    ema.update(model)
    merged = ema.merged(model.state_dict())
    assert merged.keys() == model.state_dict().keys()
    assert torch.equal(merged["q_head.bias"], ema.shadow["q_head.bias"])
    assert not torch.equal(merged["q_head.bias"], model.q_head.bias)
    assert torch.equal(merged["puzzle_emb.weights"], model.puzzle_emb.weights)
    for prefix in ("", "model.", "_orig_mod.model."):
        again = EMA(model, 0.5)
        again.load_merged({prefix + name: value for name, value in merged.items()}, ema.updates)
        assert_same(again.shadow, ema.shadow)
        assert again.updates == 1
        assert again.shadow["q_head.bias"].data_ptr() != ema.shadow["q_head.bias"].data_ptr()


def test_ema_refuses_what_does_not_fit():
    model = Toy()
    ema = EMA(model)
    with pytest.raises(ValueError, match="ema decay is 1.5"):
        EMA(model, 1.5)
    with pytest.raises(ValueError, match="differ in 1 parameters, first 'extra'"):
        model.extra = nn.Parameter(torch.ones(1))
        ema.update(model)
    state = ema.state_dict()
    state["shadow"]["q_head.bias"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"'q_head.bias' has shape \(3,\); the model has \(2,\)"):
        ema.load_state_dict(state)
    with pytest.raises(ValueError, match="differ in 4 parameters"):
        EMA(Toy()).load_merged({f"x.{n}": t for n, t in Toy().state_dict().items()}, 1)
