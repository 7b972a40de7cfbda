"""stablemax_loss: cross entropy of s(x) = 1 + x or 1 / (1 - x), predictions, correctness."""

import pytest
import torch
from extension_checks import check_extension_refusals, check_same_bits
from kernel_checks import DEVICE, check_fullgraph, check_refusals, check_registered
from op_checks import CPU, DTYPES, cases, token_major
from parity import assert_parity, make_inputs

from trm_fast.extension import stablemax_loss as compiled
from trm_fast.kernels import stablemax_loss as kernel
from trm_fast.kernels.stablemax_loss import stablemax_loss as triton_stablemax_loss
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


def on_device(logits, labels):
    """The kernel's results, on the CPU."""
    return tuple(t.cpu() for t in triton_stablemax_loss(logits.to(DEVICE), labels.to(DEVICE)))


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


@pytest.mark.parametrize("precision", ["float64", "float32", "kernel"])
@pytest.mark.parametrize("column", range(len(SPECIAL)), ids=[f"label{v}" for v in SPECIAL])
def test_special_logits(column, precision, in_float32):
    values = torch.tensor([[SPECIAL, SPECIAL[::-1]]], dtype=torch.float32, requires_grad=True)
    labels = torch.full((1, 2), column, dtype=torch.int32)
    op = {"float64": stablemax_loss, "float32": in_float32, "kernel": on_device}[precision]
    loss = op(values, labels)[0]
    assert loss.dtype == (torch.float64 if precision == "float64" else torch.float32)
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


@pytest.mark.parametrize("which", ["reference", "kernel"])
def test_float32_closed_form_on_random_and_on_confident_rows(which, in_float32):
    in_float32 = in_float32 if which == "reference" else on_device
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


# A vocabulary of each launch row, more answers than a tile holds, one, none.
KERNEL_SHAPES = [(2, 97, 11), (1, 5, 100), (1, 1, 1024), (1, 3, 1), (0, 81, 11)]


@pytest.mark.parametrize("shape, dtype", cases("B L V", KERNEL_SHAPES))
def test_kernel_values_and_gradient(shape, dtype, architecture):
    (logits,) = make_inputs(shape, dtype=dtype, scale=3.0, requires_grad=True)
    labels = labels_for(shape)
    before, labels_before = logits.detach().clone(), labels.clone()
    loss, preds, correct = on_device(logits, labels)
    exact_logits = logits.detach().double().requires_grad_()
    exact = stablemax_loss(exact_logits, labels)
    assert [t.dtype for t in (loss, preds, correct)] == [torch.float32, torch.int64, torch.bool]
    assert_parity(loss, exact[0], name="loss")
    assert torch.equal(preds, exact[1])
    assert torch.equal(correct, exact[2])
    assert not preds.requires_grad and not correct.requires_grad
    got = gradient(loss, logits)
    assert got.dtype == dtype
    assert_parity(got, gradient(exact[0], exact_logits), name="gradient")
    assert torch.equal(logits, before)
    assert torch.equal(labels, labels_before)


def test_kernel_predicts_as_argmax():
    nan, inf = float("nan"), float("inf")
    rows = torch.tensor(
        [
            [1.0, 3.0, 3.0, 2.0, 3.0],
            [-0.0, 0.0, -1.0, 0.0, -2.0],
            [-inf, -inf, -inf, -inf, -inf],
            [0.0, inf, nan, inf, nan],
            [-inf, -5.0, -inf, -5.0, -6.0],
        ]
    )
    labels = rows.argmax(-1)
    _, preds, correct = on_device(rows, labels)
    assert torch.equal(preds, labels)
    assert correct.all()
    assert not on_device(rows, labels + 1)[2].any()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_kernel_ignored_labels_cost_nothing(dtype):
    (logits,) = make_inputs((2, 5, 4), dtype=dtype, requires_grad=True)
    loss, preds, correct = on_device(logits, torch.full((2, 5), IGNORED))
    assert torch.equal(loss, torch.zeros(2, 5))
    assert torch.equal(gradient(loss, logits), torch.zeros(2, 5, 4, dtype=dtype))
    assert torch.equal(preds, logits.argmax(-1))
    assert not correct.any()


def test_kernel_does_not_hide_a_broken_row():
    logits = torch.tensor([[float("nan"), 0.0], [1.0, 2.0], [1.0, 2.0], [1.0, 2.0]])
    loss, _, correct = on_device(logits, torch.tensor([1, 2, -1, 1]))
    assert torch.isnan(loss[0])
    assert torch.isinf(loss[1:3]).all()  # labels that are no class
    assert torch.isfinite(loss[3])
    assert correct.tolist() == [False, False, False, True]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_kernel_label_dtypes_and_layouts(dtype):
    (logits,) = make_inputs((3, 5, 4))
    labels = labels_for((3, 5, 4), ignored=0.0)
    want = on_device(logits, labels)
    assert_parity(want[0], stablemax_loss(logits, labels)[0])
    for given in (logits, token_major(logits)):
        got = triton_stablemax_loss(given.to(DEVICE), labels.to(DEVICE, dtype))
        assert all(torch.equal(g.cpu(), w) for g, w in zip(got, want, strict=True))
    one = triton_stablemax_loss(logits[0, 0].to(DEVICE), labels[0, 0].to(DEVICE, dtype))
    assert torch.equal(one[0].cpu(), want[0][0, 0])


def test_kernel_is_registered():
    (logits,) = make_inputs((5, 4), requires_grad=True, device=DEVICE)
    labels = labels_for((5, 4)).to(DEVICE)
    check_registered(kernel._fwd, (logits, labels))
    check_registered(kernel._bwd, (torch.ones(5, device=DEVICE), logits.detach(), labels))


def test_kernel_compiles_and_refuses():
    (logits,) = make_inputs((2, 3, 4))
    inputs = [logits, labels_for((2, 3, 4))]
    check_fullgraph(lambda *t: triton_stablemax_loss(*t)[0], inputs)
    check_refusals(lambda *t: triton_stablemax_loss(*t)[0], inputs)
    wide = torch.zeros(1, 1025, device=DEVICE)
    with pytest.raises(ValueError, match="vocabulary of 1 to 1024, not 1025"):
        triton_stablemax_loss(wide, torch.zeros(1, dtype=torch.int32, device=DEVICE))


def test_kernel_says_beforehand_what_it_does_not_serve():
    class Config:
        vocab_size = 1024

    assert kernel.unsupported(torch.bfloat16, Config()) is None
    assert kernel.unsupported(torch.float32, None) is None
    assert "not float64" in kernel.unsupported(torch.float64, Config())
    Config.vocab_size = 2000
    assert "not 2000" in kernel.unsupported(torch.bfloat16, Config())


# For the extension: rows that fill no vector, one class, more classes than a tile holds, none.
EXTENSION_CASES = [
    case
    for case in cases("B L V", [(4, 81, 11), (2, 97, 3), (1, 5, 131), (1, 3, 1), (0, 81, 11)])
    if case.values[1] != torch.float16
]


@pytest.mark.parametrize("shape, dtype", EXTENSION_CASES)
def test_extension(shape, dtype, extension):
    (logits,) = make_inputs(shape, dtype=dtype, scale=3.0, requires_grad=True)
    labels = labels_for(shape)
    before, labels_before = logits.detach().clone(), labels.clone()
    loss, preds, correct = compiled.stablemax_loss(logits, labels)
    exact_logits = logits.detach().double().requires_grad_()
    exact = stablemax_loss(exact_logits, labels)
    assert [t.dtype for t in (loss, preds, correct)] == [torch.float32, torch.int64, torch.bool]
    assert_parity(loss, exact[0], name="loss")
    assert torch.equal(preds, exact[1])
    assert torch.equal(correct, exact[2])
    assert not preds.requires_grad and not correct.requires_grad
    got = gradient(loss, logits)
    assert got.dtype == dtype
    assert_parity(got, gradient(exact[0], exact_logits), name="gradient")
    assert torch.equal(logits, before)
    assert torch.equal(labels, labels_before)


def assert_close_to_the_reference(values, labels):
    """Loss and gradient to some last places of each element, however small."""
    values = values.detach().requires_grad_()
    loss = compiled.stablemax_loss(values, labels)[0]
    exact_values = values.detach().double().requires_grad_()
    exact = stablemax_loss(exact_values, labels)[0]
    torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=0)
    got, want = gradient(loss, values), gradient(exact, exact_values)
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-38)


def test_extension_at_special_logits_and_on_confident_rows(extension):
    rows = torch.tensor([SPECIAL, SPECIAL[::-1]]).repeat_interleave(len(SPECIAL), 0)
    assert_close_to_the_reference(rows, torch.arange(len(SPECIAL)).repeat(2))
    (noise,) = make_inputs((3, 2000, 11), scale=1.0)
    logits = noise * torch.tensor([1.0, 100.0, 1e4]).view(3, 1, 1)
    labels = labels_for((3, 2000, 11))
    confident = torch.zeros_like(logits).scatter_(-1, labels.clamp_min(0).long().unsqueeze(-1), 1e6)
    assert_close_to_the_reference(logits, labels)
    assert_close_to_the_reference(logits + confident, labels)


def test_extension_sums_a_large_vocabulary(extension):
    (logits,) = make_inputs((2, 3, 20000), scale=3.0)
    assert_close_to_the_reference(logits, labels_for(logits.shape, ignored=0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_extension_predicts_as_argmax(dtype, extension):
    nan, inf = float("nan"), float("inf")
    rows = torch.tensor(
        [
            [1.0, 3.0, 3.0, 2.0, 3.0],
            [-0.0, 0.0, -1.0, 0.0, -2.0],
            [-inf, -inf, -inf, -inf, -inf],
            [0.0, inf, nan, inf, nan],
            [nan, inf, nan, inf, 0.0],
            [-inf, -5.0, -inf, -5.0, -6.0],
        ],
        dtype=dtype,
    )
    labels = rows.argmax(-1)
    _, preds, correct = compiled.stablemax_loss(rows, labels)
    assert torch.equal(preds, labels)
    assert correct.all()
    assert not compiled.stablemax_loss(rows, (labels + 1) % 5)[2].any()


def test_extension_shows_what_is_not_finite(extension):
    nan, inf = float("nan"), float("inf")
    rows = torch.tensor([[nan, 0.0], [-inf, 0.0], [0.0, -inf], [inf, 0.0], [0.0, inf]])
    labels = torch.tensor([1, 0, 0, 0, 0])
    want = stablemax_loss(rows, labels)[0]
    got = compiled.stablemax_loss(rows, labels)[0]
    torch.testing.assert_close(got.double(), want, equal_nan=True, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_extension_ignored_labels_cost_nothing(dtype, extension):
    (logits,) = make_inputs((2, 5, 4), dtype=dtype, requires_grad=True)
    loss, preds, correct = compiled.stablemax_loss(logits, torch.full((2, 5), IGNORED))
    assert torch.equal(loss, torch.zeros(2, 5))
    assert torch.equal(gradient(loss, logits), torch.zeros(2, 5, 4, dtype=dtype))
    assert torch.equal(preds, logits.argmax(-1))
    assert not correct.any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int8, torch.uint8])
def test_extension_label_dtypes_and_layouts(dtype, extension):
    (logits,) = make_inputs((3, 5, 4), requires_grad=True)
    labels = labels_for((3, 5, 4), ignored=0.0)
    want = compiled.stablemax_loss(logits, labels)
    want_gradient = gradient(want[0], logits)
    for given in (logits, token_major(logits)):
        got = compiled.stablemax_loss(given, labels.to(dtype))
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
        assert torch.equal(gradient(got[0], given), want_gradient)
    one = compiled.stablemax_loss(logits[0, 0], labels[0, 0].to(dtype))
    assert torch.equal(one[0], want[0][0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_extension_gives_the_same_bits_on_any_threads(dtype, extension):
    def step():
        (logits,) = make_inputs((16, 97, 11), dtype=dtype, requires_grad=True)
        loss, preds, correct = compiled.stablemax_loss(logits, labels_for(logits.shape))
        return [loss, preds, correct, gradient(loss, logits)]

    check_same_bits(step)


def test_extension_is_registered(extension):
    (logits,) = make_inputs((5, 4), requires_grad=True)
    labels = labels_for((5, 4))
    check_registered(compiled._fwd, (logits, labels))
    check_registered(compiled._bwd, (torch.ones(5), logits.detach(), labels))
    (logits,) = make_inputs((2, 3, 4))
    check_fullgraph(lambda *t: compiled.stablemax_loss(*t)[0], [logits, labels_for(logits.shape)])


def test_extension_refuses(extension):
    (logits,) = make_inputs((2, 3, 4))
    labels = labels_for((2, 3, 4))
    check_extension_refusals(lambda *t: compiled.stablemax_loss(*t)[0], [logits, labels])
    for given, text in (
        ((logits[..., :0], labels), "needs a vocabulary of 1 or more, not 0"),
        ((logits, labels[:, :2]), r"needs labels of \[2, 3\], not \[2, 2\]"),
        ((logits, labels.float()), "needs labels of integers, not float32"),
    ):
        with pytest.raises(ValueError, match=text):
            compiled.stablemax_loss(*given)
    for label in (4, -1, -99, -101, 2**31 - 1, 2**32, -(2**63)):
        wrong = labels.to(torch.int64)
        wrong[1, 2] = label
        with pytest.raises(RuntimeError, match=f"label 5 is {label}, expected 0 to 3 or -100"):
            compiled.stablemax_loss(logits, wrong)
    rows, flat = logits.flatten(0, 1), labels.flatten()
    grad = torch.ones(6)
    for given, text in (
        ((rows[0], flat), r"logits are \[4\], expected \[N, V\]"),
        ((rows, flat[:5]), r"labels is \[5\], expected \[6\]"),
        ((rows, flat.to(torch.int16)), "labels has dtype"),
        ((rows.repeat(1, 2)[:, ::2], flat), "logits is not contiguous"),
        ((rows.half(), flat), "expected float32 or bfloat16"),
        ((rows[:, :0], flat), "a vocabulary of 0"),
    ):
        with pytest.raises(RuntimeError, match=text):
            compiled._fwd(*given)
        with pytest.raises(RuntimeError, match=text):
            compiled._bwd(grad, *given)
    with pytest.raises(RuntimeError, match=r"grad is \[5\], expected \[6\]"):
        compiled._bwd(grad[:5], rows, flat)
    with pytest.raises(RuntimeError, match="label 0 is 4"):
        compiled._bwd(grad, rows, torch.full((6,), 4))


def test_extension_says_beforehand_what_it_does_not_serve():
    assert compiled.unsupported(torch.bfloat16, None, CPU) is None
    assert "not float64" in compiled.unsupported(torch.float64, None, CPU)
