"""Optimizers against loops over Python floats, clipping, and exact continuation.

Left out: AdamW's own arithmetic, which is PyTorch's.
"""

import copy
import io
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from trm_fast.optim import (
    AdamATan2,
    Muon,
    SparseEmbeddingSignSGD,
    build_optimizers,
    clip_gradients,
    cosine_schedule,
    gradient_norm,
    learning_rate,
    set_learning_rates,
)


def config(**changes):
    """The keys that `build_optimizers` reads."""
    values = {
        "optimizer": "adam_atan2",
        "lr": 1e-2,
        "muon_lr": 4e-2,
        "weight_decay": 0.1,
        "weight_decay_on": "all",
        "beta1": 0.9,
        "beta2": 0.95,
        "puzzle_emb_lr": 1e-1,
        "puzzle_emb_weight_decay": 0.2,
        "freeze_weights": False,
    }
    return SimpleNamespace(**{**values, **changes})


class PuzzleRows(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.Buffer(torch.randn(7, 4))
        self.local_weights = nn.Buffer(torch.zeros(6, 4, requires_grad=True), persistent=False)
        self.local_ids = nn.Buffer(torch.zeros(6, dtype=torch.int32), persistent=False)


class Toy(nn.Module):
    """Parameter names and ranks as a model's: blocks, embedding, head, bias, puzzle rows."""

    def __init__(self, rows=True):
        super().__init__()
        self.L_level = nn.Module()
        self.L_level.layers = nn.ModuleList([nn.Linear(4, 8, bias=False)])
        self.embed_tokens = nn.Embedding(5, 4)
        self.q_head = nn.Linear(8, 2)
        if rows:
            self.puzzle_emb = PuzzleRows()

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        if hasattr(self, "puzzle_emb"):
            rows = self.puzzle_emb
            with torch.no_grad():
                rows.local_ids.copy_(tokens)
                rows.local_weights.copy_(rows.weights[tokens])
            x = x + rows.local_weights
        return self.q_head(self.L_level.layers[0](x).tanh())


class Head(nn.Module):
    """A loss head: the model one level down."""

    def __init__(self, model):
        super().__init__()
        self.model = model


def train(model, optimizers, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        set_learning_rates(optimizers, torch.tensor(step), 3, 20, 0.1)
        tokens = torch.randint(0, 5, (6,), generator=generator)
        model(tokens).square().sum().backward()
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def scalar_adam_atan2(p, grads, rates, decay, beta1, beta2):
    """One float64 weight through the gradients of its steps."""
    m = v = 0.0
    for step, (g, lr) in enumerate(zip(grads, rates, strict=True), start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        p -= lr * decay * p
        p -= lr / (1 - beta1**step) * math.atan2(m, math.sqrt(v / (1 - beta2**step)))
    return p


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str)
def test_adam_atan2_is_the_scalar_formula(dtype, rtol):
    start = torch.randn(3, 5, dtype=torch.float64)
    grads = torch.randn(30, 3, 5, dtype=torch.float64) * torch.logspace(-6, 3, 5)
    rates = [1e-2 * (1 + step % 4) for step in range(30)]
    p = nn.Parameter(start.to(dtype, copy=True))
    optimizer = AdamATan2([p], 0.0, (0.9, 0.95), 0.3)
    for grad, lr in zip(grads, rates, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        p.grad = grad.to(dtype)
        optimizer.step()
    expected = [
        scalar_adam_atan2(x, [float(g) for g in column], rates, 0.3, 0.9, 0.95)
        for x, column in zip(start.flatten().tolist(), grads.flatten(1).T, strict=True)
    ]
    torch.testing.assert_close(
        p.detach().double().flatten(),
        torch.tensor(expected, dtype=torch.float64),
        rtol=rtol,
        atol=rtol,
    )


def test_adam_atan2_first_step_does_not_depend_on_the_gradient_scale():
    steps = []
    for scale in (1e-30, 1.0, 1e15):
        p = nn.Parameter(torch.ones(2, dtype=torch.float64))
        p.grad = torch.tensor([scale, -scale], dtype=torch.float64)
        AdamATan2([p], 0.5, (0.9, 0.95), 0.0).step()
        steps.append(p.detach() - 1)
    # m = .1 g and sqrt(v / bc2) = g: atan2 of 0.1, times lr / bc1 = 5.
    for step in steps:
        torch.testing.assert_close(
            step, torch.tensor([-1.0, 1.0], dtype=torch.float64) * 5 * math.atan(0.1)
        )


def test_adam_atan2_skips_parameters_without_gradient_and_counts_each_its_steps():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = AdamATan2([a, b], 0.1)
    a.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(b.detach(), torch.ones(2)) and b not in optimizer.state
    b.grad = torch.ones(2)
    optimizer.step()
    assert (optimizer.state[a]["step"], optimizer.state[b]["step"]) == (2, 1)
    alone = nn.Parameter(torch.ones(2))
    alone.grad = torch.ones(2)
    AdamATan2([alone], 0.1).step()
    assert torch.equal(b.detach(), alone.detach())


def test_adam_atan2_keeps_float32_state_for_low_precision_weights():
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = AdamATan2([p], 0.1)
    p.grad = torch.full_like(p, 1.003)
    optimizer.step()
    restored = AdamATan2([p], 0.1)
    restored.load_state_dict(optimizer.state_dict())
    for name in ("exp_avg", "exp_avg_sq"):
        assert restored.state[p][name].dtype == torch.float32
        assert torch.equal(restored.state[p][name], optimizer.state[p][name])
        assert restored.state[p][name].data_ptr() != optimizer.state[p][name].data_ptr()


def test_adam_atan2_calls_the_given_op_and_keeps_it_in_copies():
    calls = []

    def op(params, grads, exp_avgs, exp_avg_sqs, emas, copies, **settings):
        calls.append((len(params), emas, copies, settings))

    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = AdamATan2([p], 0.25, (0.8, 0.9), 0.5, SimpleNamespace(adam_atan2_ema_=op))
    optimizer.step()
    copied = copy.deepcopy(optimizer)
    assert copied._update is op
    settings = {
        "lr": 0.25,
        "weight_decay": 0.5,
        "beta1": 0.8,
        "beta2": 0.9,
        "step": 1,
        "ema_decay": 0.0,
        "found_inf": 0.0,
    }
    assert calls == [(1, [], [], settings)]


def test_adam_atan2_returns_the_loss_of_its_closure():
    p = nn.Parameter(torch.ones(2))

    def closure():
        loss = (p * 3).sum()
        loss.backward()
        return loss

    assert AdamATan2([p], 0.1).step(closure).item() == 6.0
    assert p.grad is not None and (p < 1).all()


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"betas": (0.9, 1.0)}, "betas is"),
        ({"betas": (0.9,)}, "betas is"),
    ],
)
def test_adam_atan2_refuses_bad_settings(settings, said):
    with pytest.raises(ValueError, match=said):
        AdamATan2([nn.Parameter(torch.ones(1))], **settings)


def test_adam_atan2_refuses_sparse_gradients():
    p = nn.Parameter(torch.ones(3, 2))
    p.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (3, 2), check_invariants=True)
    with pytest.raises(ValueError, match="sparse"):
        AdamATan2([p]).step()


def dictionary_sign_descent(weights, grad, ids, lr, decay):
    """The rule, one identifier and one element at a time."""
    sums = {}
    for slot, identifier in enumerate(ids.tolist()):
        row = sums.setdefault(identifier, [0.0] * grad.shape[1])
        for column, value in enumerate(grad[slot].tolist()):
            row[column] += value
    result = weights.double().tolist()
    for identifier, row in sums.items():
        for column, total in enumerate(row):
            sign = (total > 0) - (total < 0)
            old = result[identifier][column]
            result[identifier][column] = old * (1 - lr * decay) - lr * sign
    return torch.tensor(result)


@pytest.mark.parametrize(
    "ids", [[0, 0, 0, 0, 0, 0], [3, 0, 3, 6, 0, 3], [5, 4, 3, 2, 1, 0], [6] * 6], ids=str
)
def test_sign_descent_is_the_dictionary_loop(ids):
    rows = PuzzleRows()
    rows.local_ids.copy_(torch.tensor(ids))
    # Quarters: sums are exact, and many are exactly zero, whose sign is zero.
    rows.local_weights.grad = torch.randint(-2, 3, (6, 4)) * 0.25
    expected = dictionary_sign_descent(
        rows.weights, rows.local_weights.grad, rows.local_ids, 0.1, 2.0
    )
    before = rows.weights.clone()
    SparseEmbeddingSignSGD(rows.buffers(), 0.1, 2.0).step()
    torch.testing.assert_close(rows.weights, expected, rtol=1e-6, atol=1e-7)
    unused = sorted(set(range(7)) - set(ids))
    assert torch.equal(rows.weights[unused], before[unused])


def test_sign_descent_rounds_as_unique_and_scatter_do():
    rows = PuzzleRows()
    rows.local_ids.copy_(torch.tensor([2, 2, 5, 2, 5, 2]))
    grad = rows.local_weights.grad = torch.randn(6, 4) * torch.logspace(-8, 8, 6)[:, None]
    unique, inverse = rows.local_ids.unique(return_inverse=True)
    sums = torch.zeros(len(unique), 4).scatter_add_(0, inverse[:, None].expand(-1, 4), grad)
    expected = rows.weights.clone()
    changed = expected[unique].mul_(1.0 - 0.01 * 0.1).add_(sums.sign(), alpha=-0.01)
    expected[unique] = changed
    SparseEmbeddingSignSGD(rows.buffers(), 0.01, 0.1).step()
    assert torch.equal(rows.weights, expected)


def test_sign_descent_without_gradient_or_slots_changes_nothing():
    rows = PuzzleRows()
    before = rows.weights.clone()
    optimizer = SparseEmbeddingSignSGD(rows.buffers(), 0.1, 2.0)
    optimizer.step()
    rows.local_weights.data, rows.local_ids.data = (
        torch.zeros(0, 4),
        torch.zeros(0, dtype=torch.int32),
    )
    rows.local_weights.grad = torch.zeros(0, 4)
    optimizer.step()
    assert torch.equal(rows.weights, before)


def test_sign_descent_wants_the_three_buffers():
    rows = PuzzleRows()
    with pytest.raises(ValueError, match=r"shapes \[\(7, 4\)\]"):
        SparseEmbeddingSignSGD([rows.weights])
    with pytest.raises(ValueError, match="three buffers"):
        SparseEmbeddingSignSGD([rows.weights, rows.weights.clone(), rows.local_ids])
    with pytest.raises(ValueError, match="weight_decay is -1"):
        SparseEmbeddingSignSGD(rows.buffers(), 0.1, -1.0)


def test_schedule_values():
    # The step counts before the schedule is read: the first rate is base / 2000, not 0.
    assert cosine_schedule(1, 1e-4, 2000, 10000, 0.1) == 1e-4 / 2000
    assert cosine_schedule(1999, 1e-4, 2000, 10000) == 1e-4 * 1999.0 / 2000.0
    assert cosine_schedule(2000, 1e-4, 2000, 10000, 0.1) == 1e-4
    assert cosine_schedule(6000, 1.0, 2000, 10000, 0.1) == pytest.approx(0.55)
    assert cosine_schedule(10000, 1.0, 2000, 10000, 0.1) == pytest.approx(0.1)
    assert cosine_schedule(4000, 1.0, 2000, 10000) == pytest.approx(0.5 + 0.25 * math.sqrt(2))
    assert [cosine_schedule(s, 3.0, 0, 10, 1.0) for s in (1, 5, 10)] == [3.0, 3.0, 3.0]
    assert cosine_schedule(5, 1.0, 5, 5) == 1.0  # warm-up as long as the run


def test_learning_rates_follow_the_schedule_in_every_group():
    model = Toy()
    optimizers = build_optimizers(model, config())
    assert [base for _, base in optimizers] == [1e-1, 1e-2]
    assert all(g["lr"] == 0.0 for o, _ in optimizers for g in o.param_groups)
    set_learning_rates(optimizers, torch.tensor(1), 2000, 10000, 1.0)
    assert [o.param_groups[0]["lr"] for o, _ in optimizers] == [1e-1 / 2000, 1e-2 / 2000]


@pytest.mark.parametrize(("warmup", "total", "ratio"), [(5, 40, 0.1), (0, 40, 0.0), (40, 40, 0.5)])
def test_the_schedule_counted_on_the_device_is_the_same(warmup, total, ratio):
    for step in range(1, total + 1):
        rate = learning_rate(torch.tensor(step), 3e-4, warmup, total, ratio)
        assert rate.dtype == torch.float64 and rate.shape == ()
        want = cosine_schedule(step, 3e-4, warmup, total, ratio)
        assert float(rate) == pytest.approx(want, rel=1e-14, abs=1e-20)


def kinds(optimizers):
    return [type(optimizer).__name__ for optimizer, _ in optimizers]


def test_which_optimizers_are_built():
    assert kinds(build_optimizers(Toy(rows=False), config())) == ["AdamATan2"]
    assert kinds(build_optimizers(Head(Toy()), config())) == ["SparseEmbeddingSignSGD", "AdamATan2"]
    assert kinds(build_optimizers(Toy(rows=False), config(optimizer="adamw"))) == ["AdamW"]
    ((adamw, _),) = build_optimizers(Toy(rows=False), config(optimizer="adamw"))
    assert adamw.param_groups[0]["capturable"], "PyTorch refuses a capture otherwise"
    frozen = build_optimizers(Head(Toy()), config(freeze_weights=True))
    assert kinds(frozen) == ["SparseEmbeddingSignSGD"] and frozen[0][1] == 1e-1
    with pytest.raises(ValueError, match="no block matrices"):
        build_optimizers(nn.Linear(2, 2), config(optimizer="muon"))


def test_muon_takes_the_block_matrices_and_adamw_the_rest():
    model = Toy()
    optimizers = build_optimizers(model, config(optimizer="muon"))
    assert kinds(optimizers) == ["SparseEmbeddingSignSGD", "Muon", "AdamW"]
    (_, (muon, _), (adamw, _)) = optimizers
    matrix = model.L_level.layers[0].weight
    assert [id(p) for p in muon.param_groups[0]["params"]] == [id(matrix)]
    others = {id(p) for p in model.parameters()} - {id(matrix)}
    assert {id(p) for p in adamw.param_groups[0]["params"]} == others
    assert [base for _, base in optimizers] == [1e-1, 4e-2, 1e-2]
    before = state_of(model)
    train(model, optimizers, 1)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    # A third of the full rate; the step is nearly orthogonal, times sqrt(8 / 4) for its shape.
    rate = 4e-2 / 3
    moved = matrix.detach() - before["L_level.layers.0.weight"] * (1 - rate * 0.1)
    size = torch.linalg.matrix_norm(moved, ord=2) / (rate * math.sqrt(2))
    assert 0.7 < size < 1.3, size


@pytest.mark.parametrize("shape", [(8, 4), (4, 8), (6, 6)])
def test_muon_is_pytorchs(shape):
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    optimizers = Muon([ours], 0.02, 0.1), torch.optim.Muon([theirs], 0.02, 0.1)
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_muon_refuses():
    with pytest.raises(ValueError, match=r"a tensor of shape \(3,\), not a matrix"):
        Muon([nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match=r"momentum is 1.0; a number in \[0, 1\)"):
        Muon([nn.Parameter(torch.ones(3, 3))], momentum=1.0)


@pytest.mark.parametrize("kind", ["adam_atan2", "adamw", "muon"])
def test_saved_state_continues_bitwise(kind):
    straight = Toy()
    optimizers = build_optimizers(straight, config(optimizer=kind))
    train(straight, optimizers, 4, seed=1)
    stored = io.BytesIO()
    torch.save([straight.state_dict(), [o.state_dict() for o, _ in optimizers]], stored)
    train(straight, optimizers, 4, seed=2)

    stored.seek(0)
    weights, states = torch.load(stored, weights_only=True)
    resumed = Toy()
    resumed.load_state_dict(weights)
    optimizers = build_optimizers(resumed, config(optimizer=kind))
    for (optimizer, _), state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(state)
    train(resumed, optimizers, 4, seed=2)
    assert_same(state_of(resumed), state_of(straight))


def test_gradient_norm_and_clipping():
    a, b, c = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    optimizers = [(AdamATan2([a, b, c]), 1.0)]
    assert gradient_norm([a, b]).item() == 0.0
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert gradient_norm([a, b]).item() == 5.0
    for off in (None, 0.0, 10.0):
        assert clip_gradients(optimizers, off).item() == 5.0
        assert a.grad.tolist() == [3.0, 0.0]
    assert clip_gradients(optimizers, 1.0).item() == 5.0
    torch.testing.assert_close(
        torch.cat([a.grad, b.grad]), torch.tensor([0.6, 0, 0, 0.8]), rtol=1e-5, atol=0
    )


def test_puzzle_rows_are_watched_and_not_clipped():
    model = Toy()
    optimizers = build_optimizers(model, config())
    model(torch.arange(5).repeat(2)[:6]).sum().backward()
    rows = model.puzzle_emb.local_weights
    weights_only, kept = gradient_norm(model.parameters()), rows.grad.clone()
    assert torch.equal(clip_gradients(optimizers, 1e-3), weights_only)
    assert torch.equal(rows.grad, kept)
    rows.grad[0, 0] = math.inf
    assert math.isnan(clip_gradients(optimizers))
    frozen = build_optimizers(model, config(freeze_weights=True))
    assert clip_gradients(frozen).item() == math.inf


def test_sign_descent_takes_the_official_arguments():
    rows = PuzzleRows()
    optimizer = SparseEmbeddingSignSGD(rows.buffers(), world_size=1, lr=0.1, weight_decay=2.0)
    assert optimizer.param_groups[0]["lr"] == 0.1
    with pytest.raises(ValueError, match="world_size is 2; torch.distributed has 1 here"):
        SparseEmbeddingSignSGD(rows.buffers(), world_size=2)
