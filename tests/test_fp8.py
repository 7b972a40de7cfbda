"""fp8: e4m3 by hand, the definition in float64, which cycles use it, who serves it."""

import math
from dataclasses import replace

import pytest
import torch
from capturing import NeverWaits
from parity import make_inputs, relative_l2
from tiny import MIXERS, tiny_batch, tiny_config, tiny_model

from trm_fast import backends, fp8, reference
from trm_fast.config import ConfigError, ModelConfig
from trm_fast.losses import ACTLossHead
from trm_fast.model import Model
from trm_fast.ops import (
    AttentionWeights,
    BlockWeights,
    Recursion,
    TokenMixWeights,
)

OPS = backends.table("reference")
# What the compiled operations serve: heads of 16 features.
SIZES = {"hidden_size": 32, "num_heads": 2, "puzzle_emb_ndim": 32}
EPS = 1e-5


def e4m3_numbers():
    """All that are not negative, by the code that they have: 127 of them, 448 the largest."""
    codes = [divmod(code, 8) for code in range(127)]
    return torch.tensor(
        [m * 2.0**-9 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e, m in codes],
        dtype=torch.float64,
    )


def nearest(t):
    """float64 t rounded to e4m3, ties to the even code."""
    numbers = e4m3_numbers()
    size = t.abs().clamp_max(448)
    above = torch.searchsorted(numbers, size).clamp(1, 126)
    low, high = numbers[above - 1], numbers[above]
    up = (size - low > high - size) | ((size - low == high - size) & (above % 2 == 0))
    return torch.where(up, high, low).copysign(t)


def emulated(t, step):
    return nearest(t.double() / step) * step


def emulated_steps(t):
    """2^(e - 7) for each row whose largest magnitude begins with 2^e."""
    return 2.0 ** (t.double().abs().amax(-1, keepdim=True).clamp_min(2.0**-100).log2().floor() - 7)


def emulated_mlp(h, gate_up, down, count):
    """The whole definition in float64, from master weights; tiles of 128 features."""
    step = next(2.0**k for k in range(-20, 20) if 448 * 2.0**k >= math.sqrt(count))
    w_gate_up, w_down = (emulated(w, emulated_steps(w)) for w in (gate_up, down))
    g, u = (emulated(h, step) @ w_gate_up.T).tensor_split(2, -1)
    a = g * torch.sigmoid(g) * u
    tiles = [emulated(part, emulated_steps(part)) for part in a.split(128, -1)]
    return torch.cat(tiles, -1) @ w_down.T


def mlp(h, gate_up, down, count):
    """The same by the module under test."""
    w = fp8.weights(BlockWeights(TokenMixWeights(gate_up, down), gate_up, down), h.dtype)
    assert w.gate_up.dtype == w.down.dtype == torch.float32 and w.mixer.down.dtype == h.dtype
    return fp8.channel_swiglu(h, w.gate_up, w.down, fp8.norm_step(count))


def inputs(rows, width, inner, dtype=torch.float32):
    h, *weights = make_inputs(
        (1, rows, width), (2 * inner, width), (width, inner), scale=[1, width**-0.5, inner**-0.5]
    )
    return reference.residual_rmsnorm(h, torch.zeros_like(h), -1, EPS).to(dtype), *weights


def test_numbers_by_hand():
    given = [0, 1.0625, 1.1875, 17, 19, 463, 465, -1e9, 2**-9, 2**-10, 3 * 2**-10, 0.0156]
    wanted = [0, 1.0, 1.25, 16, 20, 448, 448, -448, 2**-9, 0, 2**-8, 2**-6]
    assert fp8.rounded(torch.tensor(given), 1).tolist() == wanted
    assert fp8.rounded(torch.tensor(given), 0.25).tolist()[1:5] == [1.0, 1.25, 16, 20]
    assert fp8.rounded(torch.tensor([200.0]), 0.25).item() == 112
    assert fp8.rounded(torch.tensor([torch.nan, torch.inf, -torch.inf]), 1).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_number_is_rounded_to_the_nearest(dtype):
    numbers = e4m3_numbers()
    (drawn,) = make_inputs((4000,), scale=1.0)
    between = (numbers[1:] + numbers[:-1]) / 2
    given = torch.cat((numbers, between, -between, drawn.double() * 2.0 ** (drawn * 9).round()))
    given = given.clamp(-60000, 60000).to(dtype)
    got = fp8.rounded(given, 1)
    assert got.dtype == torch.float32
    assert torch.equal(got.double(), nearest(given.float().double()))


def test_steps_of_norms():
    for count in (1, 16, 48, 49, 50, 97, 196, 512, 784, 785, 916, 1024):
        step = fp8.norm_step(count)
        assert math.log2(step) == int(math.log2(step))
        assert 224 * step < math.sqrt(count) <= 448 * step


def test_steps_of_rows():
    t = torch.tensor([[1.0, 0.5], [-0.999, 0], [3e38, 1], [0, 0], [1e-40, 0], [2.0, -127]])
    got = fp8.row_steps(t).view(-1)
    assert got.tolist() == [2.0**e for e in (-7, -8, 120, -107, -107, -1)]
    broken = torch.tensor([[torch.nan, 1], [torch.inf, 1]])
    assert fp8.rounded(broken, fp8.row_steps(broken))[:, 0].isnan().all()


@pytest.mark.parametrize("rows, width, inner", [(64, 48, 96), (30, 64, 300), (7, 16, 128)])
def test_the_definition_in_float64(rows, width, inner):
    given = inputs(rows, width, inner)
    got, want = mlp(*given, width), emulated_mlp(*given, width)
    assert got.dtype == torch.float32 and got.shape == (1, rows, width)
    # The last bit of a sum may turn a number of `a` into the next e4m3: then a row tells.
    errors = [relative_l2(g, w) for g, w in zip(got[0], want[0], strict=True)]
    assert sum(error < 1e-6 for error in errors) >= 0.9 * rows
    assert max(errors) < 1e-2


def test_every_part_counts():
    """Another step or tile, or one operand as it was, would be another definition."""
    h, gate_up, down = inputs(30, 64, 300)
    want = mlp(h, gate_up, down, 64)
    h64, gu64, down64 = (t.double() for t in (h, gate_up, down))
    step = fp8.norm_step(64)

    def differs(h, gate_up, down, split, each):
        g, u = (h @ gate_up.T).tensor_split(2, -1)
        a = (g * torch.sigmoid(g) * u).split(split, -1)
        found = torch.cat([each(part) for part in a], -1) @ down.T
        assert relative_l2(want, found) > 3e-3

    def each(part):
        return emulated(part, emulated_steps(part))

    coarse = emulated(h, step), emulated(gu64, emulated_steps(gu64)), each(down64)
    differs(h64, *coarse[1:], 128, each)
    differs(coarse[0], gu64, coarse[2], 128, each)
    differs(*coarse[:2], down64, 128, each)
    differs(*coarse, 128, lambda part: part)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_near_the_real_one(dtype):
    h, gate_up, down = inputs(97, 64, 200, dtype)
    wide = h.double()
    g, u = (wide @ gate_up.double().T).tensor_split(2, -1)
    exact = (g * torch.sigmoid(g) * u) @ down.double().T
    assert 1e-2 < relative_l2(mlp(h, gate_up, down, 64), exact) < 1e-1


def test_finite_numbers_of_any_size_stay_finite():
    h, gate_up, down = inputs(9, 32, 160)
    sizes = torch.logspace(-30, 15, 9).view(1, 9, 1)
    sizes[0, 4] = 0
    got = mlp(h * sizes, gate_up * 1e6, down * 1e-12, 32)
    assert got.isfinite().all() and not got[0, 4].any() and got[0, -1].any()
    # Beyond its bound the input saturates.
    assert torch.equal(mlp(h * 1e9, gate_up, down, 32), mlp(h * 1e12, gate_up, down, 32))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_becomes_nan_in_its_row(bad):
    h, gate_up, down = inputs(5, 32, 160)
    whole = mlp(h, gate_up, down, 32)
    h[0, 2, 7] = bad
    got = mlp(h, gate_up, down, 32)
    assert got[0, 2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(got[0, others], whole[0, others])


def test_no_rows():
    h, gate_up, down = inputs(1, 32, 160)
    assert mlp(h[:, :0], gate_up, down, 32).shape == (1, 0, 32)


# --- which cycles ---


def blocks_of(mixer, tokens, width, layers=2):
    made = []
    for seed in range(layers):
        first = [(4 * width, tokens), (tokens, 2 * width)]
        second = [(3 * width, width), (width, width)]
        sizes = first if mixer == "mlp_t" else second
        sizes += [(4 * width, width), (width, 2 * width)]
        flat = make_inputs(*sizes, seed=seed, scale=width**-0.5, requires_grad=True)
        kind = TokenMixWeights if mixer == "mlp_t" else AttentionWeights
        made.append(BlockWeights(kind(*flat[:2]), *flat[2:]))
    return made


def leaves(blocks):
    return [t for w in blocks for t in (*w.mixer, w.gate_up, w.down)]


@pytest.mark.parametrize("policy", ["save", "recompute"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_the_cycle_with_a_gradient_is_not_quantised(mixer, policy):
    """Bit by bit: the first two of three cycles are those of answers, the last one is the usual."""
    blocks, states = blocks_of(mixer, 9, 32), make_inputs(*[(2, 9, 32)] * 3, seed=5)
    settings = Recursion(3, 2, 2, EPS, policy, quantize="fp8")
    got = reference.deep_recursion(OPS, *states, blocks, None, settings)
    with torch.no_grad():
        two = replace(settings, H_cycles=2)
        between = reference.deep_recursion(OPS, *states, blocks, None, two)
        plain = reference.deep_recursion(OPS, *states, blocks, None, replace(two, quantize="none"))
        assert relative_l2(between[0], plain[0]) > 1e-2
    last = Recursion(1, 2, 2, EPS, policy)
    want = reference.deep_recursion(OPS, states[0], *between, blocks, None, last)
    grads = [torch.autograd.grad(y.square().sum(), leaves(blocks)) for y, _ in (got, want)]
    pairs = zip((*got, *grads[0]), (*want, *grads[1]), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("mixer", MIXERS)
def test_one_cycle_or_dropout_leave_nothing_to_quantise(mixer):
    blocks, states = blocks_of(mixer, 9, 32), make_inputs(*[(2, 9, 32)] * 3, seed=5)
    for settings in (Recursion(1, 2, 2, EPS), Recursion(2, 1, 2, EPS, dropout=0.3)):
        found = []
        for r in (settings, replace(settings, quantize="fp8")):
            torch.manual_seed(1)
            found.append(reference.deep_recursion(OPS, *states, blocks, None, r))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_norm_in_front_decides_the_step():
    """Behind token mixing it ran over the tokens, else over the features."""
    for mixer, count in (("mlp_t", 300), ("attention", 32)):
        w = blocks_of(mixer, 300, 32, 1)[0]
        ops = fp8.operations(OPS, w, torch.zeros(2, 300, 32))
        h, ready = make_inputs((2, 300, 32))[0], fp8.weights(w, torch.float32)
        update = fp8.channel_swiglu(h, ready.gate_up, ready.down, fp8.norm_step(count))
        want = reference.residual_rmsnorm(h, update, -1, EPS)
        assert torch.equal(ops.swiglu_rmsnorm(h, ready.gate_up, ready.down, EPS), want)
    assert fp8.norm_step(300) != fp8.norm_step(32)


def answers(model, grad=False, training=False):
    batch = tiny_batch()
    model.train(training)
    with torch.set_grad_enabled(grad):
        return model(model.initial_carry(batch), batch)[1]["logits"].detach()


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_model_uses_it_in_answers_and_in_training(mixer, backend, extension):
    exact, given = (
        tiny_model(**SIZES, **MIXERS[mixer], backend=backend, quantize=q) for q in ("none", "fp8")
    )
    for options in ({}, {"grad": True}, {"grad": True, "training": True}, {"training": True}):
        error = relative_l2(answers(given, **options), answers(exact, **options))
        assert 1e-3 < error < 0.5, options
    one = (tiny_model(**SIZES, **MIXERS[mixer], H_cycles=1, quantize=q) for q in ("none", "fp8"))
    assert torch.equal(*(answers(model, grad=True, training=True) for model in one))


def test_training_steps_run_and_reach_every_weight():
    model = tiny_model(**SIZES, H_cycles=3, quantize="fp8")
    head = ACTLossHead(model.train(), "stablemax_cross_entropy")
    batch = tiny_batch()
    carry = head.initial_carry(batch)
    for _ in range(2):
        carry, loss, _, _, _ = head(return_keys=[], carry=carry, batch=batch)
        loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


# --- the option, and who serves it ---


def test_the_option():
    assert ModelConfig.from_dict(tiny_config(quantize="fp8")).quantize == "fp8"
    with pytest.raises(ConfigError, match="quantize must be one of none, int8, fp8, got 'e4m3'"):
        ModelConfig.from_dict(tiny_config(quantize="e4m3"))


def recursion_on(device, backend="auto"):
    config = ModelConfig.from_dict(tiny_config(**SIZES, quantize="fp8"))
    (found,) = (
        choice
        for choice in backends.report(backend, torch.device(device), torch.float32, config)
        if choice.op == "deep_recursion"
    )
    return found


def test_on_cpus_the_reference_serves_the_recursion():
    found = recursion_on("cpu")
    assert found.implementation == "reference"
    assert "cpp: has no products in fp8" in found.reason
    with pytest.raises(ValueError, match="'cpp' cannot serve deep_recursion .* products in fp8"):
        recursion_on("cpu", "cpp")


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0)])
def test_gpus_from_capability_8_9_on_have_kernels(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(backends.library, "unavailable", lambda kind: None)
    found = recursion_on("cuda")
    if capability >= (8, 9):
        assert found.implementation == "triton"
        return
    assert found.implementation == "reference"
    said = "has products in fp8 from compute capability 8.9 on, this GPU has 8."
    assert f"triton: {said}{capability[1]}" in found.reason
    assert "cuda: has no products in fp8" in found.reason
    with pytest.raises(ValueError, match="cannot serve deep_recursion"):
        recursion_on("cuda", "triton")


def test_where_there_are_no_8_bit_floats_it_is_refused():
    with pytest.raises(ValueError, match="deep_recursion on mps .*PyTorch has no 8-bit floats"):
        recursion_on("mps")


@pytest.mark.parametrize("grad", [False, True], ids=["answers", "training"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_nothing_waits_for_the_device(backend, grad):
    """So that a step can be captured."""
    config = tiny_config(**SIZES, forward_dtype="bfloat16", backend="reference", quantize="fp8")
    model = Model(config).to("meta").train(grad)
    if backend == "triton":
        model.inner.ops = backends.table("triton")
    batch = {name: t.to("meta") for name, t in tiny_batch().items()}

    def step():
        with torch.set_grad_enabled(grad):
            logits = model(model.initial_carry(batch), batch)[1]["logits"]
            if grad:
                logits.float().sum().backward()

    step()  # makes what is made once
    with NeverWaits("meta") as mode:
        step()
    assert mode.calls > 30
