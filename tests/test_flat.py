"""Tensors in one buffer: where they lie, and that optimizers and average find them there."""

import pytest
import torch
from torch import nn

from trm_fast.ema import EMA
from trm_fast.flat import ALIGNMENT, bits_sum, joined, lay_out
from trm_fast.optim import AdamATan2

SHAPES = [(3, 5), (1,), (64,), (2, 3, 4)]


def filled(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def test_laid_out_tensors_are_zeros_one_after_another():
    places = lay_out([t.double() for t in filled()])
    assert [t.shape for t in places] == [torch.Size(shape) for shape in SHAPES]
    assert all(t.dtype == torch.float64 and not t.any() and t.is_contiguous() for t in places)
    starts = [t.data_ptr() - places[0].data_ptr() for t in places]
    assert starts == [0, ALIGNMENT, 2 * ALIGNMENT, 4 * ALIGNMENT]
    assert lay_out([]) == []
    halves = [t.half() for t in filled()]
    mixed = lay_out([halves[0], filled()[1], halves[2]], torch.float32)
    assert [t.dtype for t in mixed] == [torch.float32] * 3
    mixed = lay_out([halves[0], filled()[1], halves[2]])
    assert [t.dtype for t in mixed] == [torch.float16, torch.float32, torch.float16]
    assert len(joined([mixed[0], mixed[2]])) == 1 and len(joined(mixed)) == 3


def test_joined_covers_them_all():
    places = lay_out(filled())
    for t, values in zip(places, filled(), strict=True):
        t.copy_(values)
    (whole,) = joined(places)
    assert whole.sum() == pytest.approx(float(sum(t.sum() for t in filled())), rel=1e-5)
    whole.fill_(2.0)
    assert all((t == 2).all() for t in places)
    (part,) = joined(places[1:])
    assert part.data_ptr() == places[1].data_ptr()


def test_what_lies_otherwise_is_left_apart():
    places = lay_out(filled())
    apart = filled()
    others = [
        apart,
        places[::-1],
        [*places[:3], places[3].permute(2, 0, 1)],
        [*places[:3], apart[3]],
        [places[0], places[2]],
    ]
    for tensors in others:
        assert [t is u for t, u in zip(joined(tensors), tensors, strict=True)] == [True] * len(
            tensors
        )
    assert joined([]) == []


def module(flat):
    model = nn.Module()
    values = filled(1)
    if flat:
        places = lay_out(values)
        for place, value in zip(places, values, strict=True):
            place.copy_(value)
        values = places
    model.weights = nn.ParameterList([nn.Parameter(t) for t in values])
    grads = lay_out(list(model.weights)) if flat else [torch.zeros_like(p) for p in model.weights]
    for p, grad in zip(model.weights, grads, strict=True):
        p.grad = grad
    return model


@pytest.mark.parametrize("together", [True, False], ids=["in the same pass", "apart"])
def test_updated_as_one_as_each_alone(together):
    found = []
    for flat in (True, False):
        model = module(flat)
        optimizer = AdamATan2(model.parameters(), 1e-2, capturable=True)
        calls = []
        update = optimizer._update
        optimizer._update = lambda *lists, calls=calls, update=update, **settings: (
            calls.append([len(tensors) for tensors in lists]),
            update(*lists, **settings),
        )
        ema = EMA(model, 0.9)
        for step in range(4):
            for p, values in zip(model.weights, filled(step), strict=True):
                p.grad.copy_(values)
            if together:
                optimizer.step(emas=list(ema.shadow.values()), ema_decay=ema.advance())
            else:
                optimizer.step()
                ema.update(model)
        count = 1 if flat else 4
        assert calls == [[count] * 4 + [count if together else 0, 0]] * 4
        found.append([*model.weights, *ema.shadow.values()])
        assert ema.updates == 4
    for one, alone in zip(*found, strict=True):  # PyTorch's atan2 of odd ends rounds otherwise
        torch.testing.assert_close(one, alone, rtol=1e-6, atol=1e-7)


def test_a_sum_over_all_bits(monkeypatch):
    tensors = [
        torch.arange(10.0).view(2, 5).t(),
        torch.tensor([1, -2], dtype=torch.int8),
        torch.tensor([True, False]),
        torch.ones(3, dtype=torch.bfloat16),
        torch.tensor(0.5, dtype=torch.float64),
    ]
    whole = bits_sum(tensors)
    assert bits_sum([t.clone() for t in tensors]) == whole and 0 <= whole < 1 << 62
    for index, t in enumerate(tensors):
        other = t.clone()
        first = other.view(-1) if other.is_contiguous() else other[0]
        first[:1] = ~first[:1] if t.dtype == torch.bool else first[:1] + 1
        changed = [*tensors[:index], other, *tensors[index + 1 :]]
        assert bits_sum(changed) != whole, index
    monkeypatch.setattr("trm_fast.flat.CHUNK", 3)
    assert bits_sum(tensors) == bits_sum([t.clone() for t in tensors])
