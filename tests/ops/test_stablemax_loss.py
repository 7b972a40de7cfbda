"""stablemax_loss: cross entropy of s(x) = 1 + x or 1 / (1 - x), predictions, correctness."""

import pytest
import torch
from op_checks import DTYPES, cases, token_major
from parity import assert_parity, make_inputs

from trm_fast.reference import stablemax_loss

IGNORED = -100
SHAPES = [(4, 64, 8), (2, 81, 11), (1, 97, 3), (0, 81, 11)]
# Where the two branches meet, where the float32 textbook form divides by zero, and extremes.
SPECIAL = [1.0, 0.0, -0.0, -1.0, 1e4, -1e4, 1e-30, -1e-30, 0.5, 3.0e4, -3.0e4]


def formula(logits, labels):
    """The textbook: s is made positive piece by piece, then normalised; mean of -log p_label."""
    x = logits.double()
    s = torch.stack([1 / (1 - v) if v < 0 else 1 + v for v in x.flatten()] or [x.sum()])
    s = s[: x.numel()].view(x.shape)
    p = s / s.sum(-1, keepdim=True)
    valid = labels != IGNORED
    picked = p.gather(-1, labels.clamp_min(0).long().unsqueeze(-1)).squeeze(-1)
    return -picked.log() * valid


def labels_for(shape, ignored=0.3, dtype=torch.int32):
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(shape[-1], shape[:-1], generator=generator, dtype=dtype)
    labels[torch.rand(shape[:-1], generator=generator) < ignored] = IGNORED
    return labels


def gradient(loss, logits):
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=torch.float64).view(loss.shape)
    return torch.autograd.grad(loss, logits, upstream.to(loss.dtype))[0]


@pytest.fixture
def in_float32(monkeypatch):
    """The closed form in float32, which devices without float64 run."""

    def patched(logits, labels):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "device", property(lambda self: torch.device("mps")))
            return stablemax_loss(logits, labels)

    return patched


@pytest.mark.parametrize("shape, dtype", cases("B L V", SHAPES))
def test_values_and_gradient(shape, dtype):
    (logits,) = make_inputs(shape, dtype=dtype, scale=3.0, requires_grad=True)
    labels = labels_for(shape)
    before, labels_before = logits.detach().clone(), labels.clone()
    loss, preds, correct = stablemax_loss(logits, labels)
    exact_logits = logits.detach().double().requires_grad_()
    exact = formula(exact_logits, labels)
    assert loss.dtype == torch.float64
    assert (preds.dtype, correct.dtype) == (torch.int64, torch.bool)
    assert_parity(loss, exact, name="loss")
    assert torch.equal(preds, logits.argmax(-1))
    assert torch.equal(correct, (logits.argmax(-1) == labels) & (labels != IGNORED))
    got = gradient(loss, logits)
    assert got.dtype == dtype
    if loss.numel():
        assert_parity(got, gradient(exact, exact_logits), name="gradient")
    assert torch.equal(logits, before)
    assert torch.equal(labels, labels_before)
    assert not preds.requires_grad and not correct.requires_grad


def test_gradient_is_the_derivative():
    (logits,) = make_inputs((2, 3, 5), dtype=torch.float64, scale=2.0, requires_grad=True)
    labels = labels_for((2, 3, 5))
    assert torch.autograd.gradcheck(lambda t: stablemax_loss(t, labels)[0], (logits,))


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("column", range(len(SPECIAL)), ids=[f"label{v}" for v in SPECIAL])
def test_special_logits(column, precision, in_float32):
    values = torch.tensor([[SPECIAL, SPECIAL[::-1]]], dtype=torch.float32, requires_grad=True)
    labels = torch.full((1, 2), column, dtype=torch.int32)
    op = stablemax_loss if precision == "float64" else in_float32
    loss = op(values, labels)[0]
    assert loss.dtype == getattr(torch, precision)
    exact_values = values.detach().double().requires_grad_()
    exact = formula(exact_values, labels)
    rtol = 1e-12 if precision == "float64" else 2e-6
    torch.testing.assert_close(loss.double(), exact, rtol=rtol, atol=0)
    torch.testing.assert_close(
        gradient(loss, values).double(),
        gradient(exact, exact_values),
        rtol=2e-6,  # the gradient is rounded to the logits' float32
        atol=1e-38,
    )


def test_float32_closed_form_on_random_and_on_confident_rows(in_float32):
    (noise,) = make_inputs((3, 2000, 11), scale=1.0)
    logits = noise * torch.tensor([1.0, 100.0, 1e4]).view(3, 1, 1)
    labels = labels_for((3, 2000, 11))
    confident = torch.zeros_like(logits).scatter_(-1, labels.clamp_min(0).long().unsqueeze(-1), 1e6)
    for values in (logits, logits + confident):
        values = values.detach().requires_grad_()
        loss = in_float32(values, labels)[0]
        exact_values = values.detach().double().requires_grad_()
        exact = stablemax_loss(exact_values, labels)[0]
        torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=0)
        torch.testing.assert_close(
            gradient(loss, values).double(), gradient(exact, exact_values), rtol=2e-6, atol=0
        )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_ignored_labels_cost_nothing(dtype):
    (logits,) = make_inputs((2, 5, 4), dtype=dtype, requires_grad=True)
    labels = torch.full((2, 5), IGNORED)
    loss, preds, correct = stablemax_loss(logits, labels)
    assert torch.equal(loss, torch.zeros(2, 5, dtype=torch.float64))
    assert torch.equal(gradient(loss, logits), torch.zeros(2, 5, 4, dtype=dtype))
    assert torch.equal(preds, logits.argmax(-1))
    assert not correct.any()


def test_by_hand():
    # s = 2, 1, 1/2 of a total of 3.5
    logits = torch.tensor([[[1.0, 0.0, -1.0]]] * 1).expand(1, 3, 3)
    loss, preds, correct = stablemax_loss(logits, torch.tensor([[0, 1, 2]]))
    want = torch.tensor([[3.5 / 2, 3.5, 7.0]], dtype=torch.float64).log()
    torch.testing.assert_close(loss, want)
    assert preds.tolist() == [[0, 0, 0]]
    assert correct.tolist() == [[True, False, False]]


def test_infinite_loss_is_not_hidden():
    logits = torch.tensor([[[float("nan"), 0.0]]])
    assert torch.isnan(stablemax_loss(logits, torch.tensor([[1]]))[0]).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_label_dtypes_and_layouts(dtype):
    (logits,) = make_inputs((3, 5, 4))
    labels = labels_for((3, 5, 4), ignored=0.0)
    want = stablemax_loss(logits, labels)
    for got in (
        stablemax_loss(logits, labels.to(dtype)),
        stablemax_loss(token_major(logits), labels.to(dtype)),
    ):
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_second_derivatives_are_refused():
    (logits,) = make_inputs((1, 2, 4), requires_grad=True)
    loss = stablemax_loss(logits, torch.zeros(1, 2, dtype=torch.int32))[0].square().sum()
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
