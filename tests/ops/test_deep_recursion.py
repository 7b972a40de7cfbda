"""deep_recursion: all cycles, the last one with gradient, under every policy of what to keep."""

import pytest
import torch
from kernel_checks import DEVICE, OPCHECKS, check_fullgraph, check_registered
from op_checks import DTYPES, EPS, case_ids, counted_ops, rms_norm, token_major
from parity import assert_l2
from recursion_cases import (
    HEADS,
    MIXERS,
    OPS,
    SHAPES,
    assert_as_good,
    blocks_of,
    exact_step,
    formula,
    leaves_for,
    rotary,
    states,
    step,
)
from tiny import HeldStorages

from trm_fast import reference
from trm_fast.kernels import deep_recursion as kernel
from trm_fast.ops import POLICIES, Ops, Recursion
from trm_fast.reference import deep_recursion


@pytest.mark.parametrize("H_cycles, L_cycles", [(1, 1), (2, 3), (3, 1)])
@pytest.mark.parametrize("shape", SHAPES, ids=case_ids("B S D", SHAPES))
@pytest.mark.parametrize("mixer", MIXERS)
def test_against_every_cycle_written_out(mixer, shape, H_cycles, L_cycles):
    flat = leaves_for(mixer, *shape[1:], dtype=torch.float64)
    x, y, z = states(*shape, dtype=torch.float64)
    got = step(mixer, (x, y, z), flat, H_cycles=H_cycles, L_cycles=L_cycles)
    leaf = x.clone().requires_grad_()
    want_y, want_z = formula(mixer, leaf, y, z, flat, H_cycles, L_cycles)
    upstream = torch.linspace(-1, 1, want_y.numel()).view(want_y.shape).double()
    want = [want_y, want_z, *torch.autograd.grad(want_y, [leaf, *flat], upstream)]
    # The rotary tables are float32 on both sides; rounding differs by the order of sums alone.
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert_l2(g, w, 1e-9, name=f"tensor {i}")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("policy", ["light", "recompute"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_policies_are_bitwise_equal(mixer, policy, dtype):
    flat = leaves_for(mixer, 12, 16)  # master weights in float32, cast inside
    inputs = states(3, 12, 16, dtype)
    saved = step(mixer, inputs, flat)
    other = step(mixer, inputs, flat, policy=policy)
    assert saved[0].dtype == saved[1].dtype == saved[2].dtype == dtype
    assert all(g.dtype == torch.float32 for g in saved[3:])
    assert all(torch.equal(a, b) for a, b in zip(saved, other, strict=True))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mixer", MIXERS)
def test_dropout(mixer, policy):
    flat = leaves_for(mixer, 12, 16)
    inputs = states(3, 12, 16)

    def dropped(seed, policy=policy, dropout=0.4):
        torch.manual_seed(seed)
        return step(mixer, inputs, flat, policy=policy, dropout=dropout)

    first, again, other = dropped(1), dropped(1), dropped(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    # What is drawn again in the backward is what was drawn in the forward.
    assert all(torch.equal(a, b) for a, b in zip(first, dropped(1, "save"), strict=True))
    # So little dropout that nothing is dropped is none; nearly all leaves the norm of h.
    for kept, plain in zip(dropped(1, dropout=1e-12), step(mixer, inputs, flat), strict=True):
        torch.testing.assert_close(kept, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", MIXERS)
def test_dropout_spares_the_residual(mixer):
    flat = leaves_for(mixer, 12, 16)
    inputs = states(3, 12, 16)
    x, y, z = inputs
    got_y, got_z = step(
        mixer, inputs, flat, H_cycles=1, L_cycles=1, dropout=1 - 1e-12, policy="save"
    )[:2]

    def normed(h):
        for _ in range(2):
            h = rms_norm(rms_norm(h, 1 if mixer == "mlp_t" else -1), -1)
        return h

    want_z = normed(z + (y + x))
    torch.testing.assert_close(got_z, want_z)
    torch.testing.assert_close(got_y, normed(y + want_z))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("H_cycles", [1, 2])
@pytest.mark.parametrize("mixer", MIXERS)
def test_no_gradient_to_the_states(mixer, H_cycles, policy):
    flat = leaves_for(mixer, 6, 8)
    x, y, z = (t.requires_grad_() for t in states(2, 6, 8))
    tables = rotary(6, 8 // HEADS) if mixer == "attention" else None
    settings = Recursion(H_cycles, 2, HEADS, EPS, policy)
    new_y, new_z = deep_recursion(OPS, x, y, z, blocks_of(mixer, flat), tables, settings)
    assert new_y.requires_grad
    assert not new_z.requires_grad
    new_y.sum().backward()
    assert y.grad is None
    assert z.grad is None
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("mixer", MIXERS)
def test_values_without_gradient_are_the_same(mixer):
    flat = leaves_for(mixer, 12, 16)
    inputs = states(3, 12, 16)
    want_y, want_z = step(mixer, inputs, flat)[:2]
    tables = rotary(12, 16 // HEADS) if mixer == "attention" else None
    settings = Recursion(2, 2, HEADS, EPS, "recompute")
    with torch.no_grad():
        y, z = deep_recursion(OPS, *inputs, blocks_of(mixer, flat), tables, settings)
    assert torch.equal(y, want_y)
    assert torch.equal(z, want_z)
    assert not y.requires_grad


@pytest.mark.parametrize("mixer", MIXERS)
def test_positions_count_only_for_attention_with_tables(mixer):
    flat = leaves_for(mixer, 12, 16)
    inputs = states(3, 12, 16)
    with_tables, without = (step(mixer, inputs, flat, rope=rope)[0] for rope in (True, False))
    assert torch.equal(with_tables, without) == (mixer == "mlp_t")


@pytest.mark.parametrize("mixer", MIXERS)
def test_inputs_are_unchanged_and_either_layout_serves(mixer):
    flat = leaves_for(mixer, 12, 16)
    inputs = states(3, 12, 16)
    before = [t.detach().clone() for t in (*inputs, *flat)]
    plain = step(mixer, inputs, flat)
    other = step(mixer, [token_major(t) for t in inputs], flat)
    assert all(torch.equal(a, b) for a, b in zip(before, (*inputs, *flat), strict=True))
    for a, b in zip(plain, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_token_mixing_stays_token_major():
    """Three copies of the states on the way in; none if they lie token-major already."""
    flat = leaves_for("mlp_t", 12, 16)
    settings = Recursion(2, 2, HEADS, EPS)
    for layout, copies in ((torch.Tensor.detach, 3), (token_major, 0)):
        inputs = [layout(t) for t in states(3, 12, 16)]
        with torch.no_grad(), counted_ops() as names:
            y, z = deep_recursion(OPS, *inputs, blocks_of("mlp_t", flat), None, settings)
        assert names.count("clone") == copies
        assert y.transpose(0, 1).is_contiguous()
        assert z.transpose(0, 1).is_contiguous()


@pytest.mark.parametrize("name", ["inject", "swiglu_rmsnorm", "token_mix", "rope_attention"])
def test_runs_on_the_ops_that_it_is_given(name):
    calls = []

    def counting(*args):
        calls.append(name)
        return getattr(reference, name)(*args)

    ops = Ops(**{**vars(OPS), name: counting})
    mixer = "mlp_t" if name == "token_mix" else "attention"
    settings = Recursion(H_cycles=3, L_cycles=4, heads=HEADS, eps=EPS)
    flat = leaves_for(mixer, 6, 8)
    deep_recursion(ops, *states(2, 6, 8), blocks_of(mixer, flat), None, settings)
    passes = 3 * 4 if name == "inject" else 3 * 5 * 2  # the network has two blocks
    assert len(calls) == passes


@pytest.mark.parametrize("mixer", MIXERS)
def test_each_policy_keeps_less(mixer):
    batch, tokens, width = 8, 32, 32
    flat = leaves_for(mixer, tokens, width)
    tables = rotary(tokens, width // HEADS) if mixer == "attention" else None
    held = {}
    for policy in POLICIES:
        inputs = states(batch, tokens, width)
        settings = Recursion(2, 2, HEADS, EPS, policy)
        with HeldStorages([*inputs, *flat]) as storages:
            out = deep_recursion(OPS, *inputs, blocks_of(mixer, flat), tables, settings)
        held[policy] = storages.held_bytes(but=out)
    assert held["save"] > 1.5 * held["light"] > 1.5 * 1.5 * held["recompute"]
    assert held["recompute"] == 3 * 4 * batch * tokens * width  # the inputs of three passes


# Heads of 16 features. Shape, blocks, cycles, policy: every pass is some twenty launches, so each
# policy has a case of its own; that they agree is a test of its own.
KERNEL_CASES = [
    ((2, 12, 32), 2, (2, 1), "save"),
    ((2, 12, 32), 2, (1, 2), "recompute"),
    ((1, 97, 48), 1, (1, 1), "light"),
]


def on_device(tensors, dtype):
    return [t.detach().to(DEVICE, dtype).requires_grad_(t.requires_grad) for t in tensors]


@pytest.mark.parametrize(
    "shape, layers, cycles, policy",
    KERNEL_CASES,
    ids=[
        f"{name}-{case[3]}"
        for name, case in zip(
            case_ids("B S D", [case[0] for case in KERNEL_CASES]), KERNEL_CASES, strict=True
        )
    ],
)
@pytest.mark.parametrize("mixer", MIXERS)
def test_kernel(mixer, shape, layers, cycles, policy):
    flat, inputs = leaves_for(mixer, *shape[1:], layers=layers), states(*shape)
    heads = shape[2] // 16
    options = {"H_cycles": cycles[0], "L_cycles": cycles[1], "heads": heads, "policy": policy}
    given, weights = on_device(inputs, torch.float32), on_device(flat, torch.float32)
    got = step(mixer, given, weights, function=kernel.deep_recursion, **options)
    plain = step(mixer, inputs, flat, **options)
    assert_as_good(got, plain, exact_step(mixer, inputs, flat, heads, *cycles), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_kernel_in_16_bits(mixer, dtype, architecture):
    """One update of each state from there: a longer recursion is chaos in so few bits."""
    flat = leaves_for(mixer, 12, 32, layers=2 if mixer == "attention" else 1)
    inputs = states(2, 12, 32, dtype)
    options = {"H_cycles": 1, "L_cycles": 1}
    given, weights = on_device(inputs, dtype), on_device(flat, torch.float32)
    got = step(mixer, given, weights, function=kernel.deep_recursion, **options)
    assert got[0].dtype == got[1].dtype == got[2].dtype == dtype
    assert all(g.dtype == torch.float32 for g in got[3:])
    plain = step(mixer, inputs, flat, **options)
    assert_as_good(got, plain, exact_step(mixer, inputs, flat, HEADS, 1, 1), dtype)


@pytest.mark.parametrize("mixer", MIXERS)
def test_kernel_policies_agree(mixer):
    flat = on_device(leaves_for(mixer, 12, 32), torch.float32)
    inputs = on_device(states(2, 12, 32), torch.bfloat16)
    saved, light, again = (
        step(
            mixer,
            inputs,
            flat,
            H_cycles=1,
            L_cycles=1,
            function=kernel.deep_recursion,
            policy=policy,
        )
        for policy in POLICIES
    )
    for a, b, c in zip(saved[:3], light[:3], again[:3], strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    for a, b, c in zip(saved[3:], light[3:], again[3:], strict=True):
        assert torch.equal(b, c)  # one product over all passes adds up in another order
        assert_l2(a, b, 1e-5)


@pytest.mark.parametrize("mixer", MIXERS)
def test_kernel_without_gradient_and_without_boards(mixer):
    flat = on_device(leaves_for(mixer, 12, 32, layers=1), torch.float32)
    inputs = on_device(states(2, 12, 32), torch.float32)
    want_y, want_z = step(mixer, inputs, flat, L_cycles=1, function=kernel.deep_recursion)[:2]
    tables = tuple(t.to(DEVICE) for t in rotary(12, 16)) if mixer == "attention" else None
    settings = Recursion(2, 1, HEADS, EPS, "save")
    with torch.no_grad():
        y, z = kernel.deep_recursion(OPS, *inputs, blocks_of(mixer, flat), tables, settings)
    assert torch.equal(y, want_y) and torch.equal(z, want_z) and not y.requires_grad
    for policy in POLICIES:
        empty = [t[:0] for t in inputs]
        outcome = step(mixer, empty, flat, function=kernel.deep_recursion, policy=policy)
        assert outcome[0].shape == outcome[1].shape == outcome[2].shape == (0, 12, 32)
        assert not any(g.any() for g in outcome[3:])


@pytest.mark.parametrize("policy", POLICIES)
def test_kernel_is_registered(policy):
    flat = on_device(leaves_for("mlp_t", 5, 16, layers=1), torch.float32)
    x, y, z = on_device(states(1, 5, 16), torch.float32)
    given = [x.requires_grad_(), y, z, flat, None, None, True, 1, 1, 1, EPS, policy]
    # The last check compares outputs after the backward, which with "save" writes over them;
    # test_kernel_compiles_as_one_graph stands in for it.
    checks = OPCHECKS[: 3 if policy == "save" else 4]
    check_registered(kernel._fwd, [*given, False], checks)
    out, _, saved = kernel._fwd(*given, False)
    masters = [t.detach() for t in flat]
    saved = [t.detach() for t in saved]
    check_registered(kernel._bwd, [out.detach(), saved, masters, *given[4:]])
    d_weights = [torch.zeros_like(t) for t in masters]
    check_registered(kernel._bwd_in_place, [out.detach(), saved, d_weights, masters, *given[4:]])


@pytest.mark.parametrize("mixer", MIXERS)
def test_kernel_compiles_as_one_graph(mixer):
    tables = tuple(t.to(DEVICE) for t in rotary(5, 16)) if mixer == "attention" else None
    settings = Recursion(2, 1, 1, EPS, "save")

    def answer(x, y, z, *flat):
        blocks = blocks_of(mixer, flat)
        return kernel.deep_recursion(OPS, x, y.detach(), z, blocks, tables, settings)[0] + 0 * (
            y + z
        )

    check_fullgraph(answer, [*states(1, 5, 16), *leaves_for(mixer, 5, 16, layers=1)])


def test_kernel_in_float16_takes_the_norm_before_q_k_and_v():
    """The first block's sums are thousands; of those q, k and v would be beyond 65,504."""
    flat = leaves_for("attention", 12, 32)
    for i, factor in ((3, 5e3), (4, 20.0)):  # the first block's down, the second one's qkv
        flat[i] = (flat[i].detach() * factor).requires_grad_()
    inputs = on_device(states(2, 12, 32), torch.float16)
    weights = on_device(flat, torch.float32)
    options = {"H_cycles": 1, "L_cycles": 1, "function": kernel.deep_recursion}
    for t in step("attention", inputs, weights, **options):
        assert torch.isfinite(t).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_kernel_backward_in_place_is_the_same(policy):
    flat = [t.detach() for t in on_device(leaves_for("attention", 5, 16), torch.float32)]
    x, y, z = on_device(states(1, 5, 16), torch.float32)
    given = [flat, None, None, False, 1, 1, 1, EPS, policy]
    _, _, saved = kernel.deep_recursion_fwd(x, y, z, *given)
    want, want_weights = kernel.deep_recursion_bwd(y, saved, *given)
    got_weights = [torch.empty_like(w) for w in flat]
    got = kernel.deep_recursion_bwd_(y, saved, got_weights, *given)
    for a, b in zip([got, *got_weights], [want, *want_weights], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("policy", POLICIES)
def test_kernel_backward_over_what_was_kept_works_once(policy):
    flat = on_device(leaves_for("mlp_t", 5, 16, layers=1), torch.float32)
    inputs = on_device(states(1, 5, 16), torch.float32)
    inputs[0].requires_grad_()
    settings = Recursion(1, 1, 1, EPS, policy)
    y, _ = kernel.deep_recursion(OPS, *inputs, blocks_of("mlp_t", flat), None, settings)
    (first,) = torch.autograd.grad(y.sum(), inputs[0], retain_graph=True)
    if policy == "save":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    else:
        assert torch.equal(torch.autograd.grad(y.sum(), inputs[0])[0], first)
    y, _ = kernel.deep_recursion(OPS, *inputs, blocks_of("mlp_t", flat), None, settings)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(y.square().sum(), inputs[0], create_graph=True)


def test_kernel_refuses():
    flat = leaves_for("attention", 5, 16, layers=1)
    blocks, given = blocks_of("attention", flat), states(1, 5, 16)
    for settings, text in (
        (Recursion(1, 1, 1, EPS, dropout=0.1), "serves no dropout"),
        (Recursion(1, 1, 2, EPS), "head"),
    ):
        with pytest.raises(ValueError, match=f"deep_recursion of the triton backend .*{text}"):
            kernel.deep_recursion(OPS, *given, blocks, None, settings)
    with pytest.raises(ValueError, match="not float64"):
        wide = [t.double() for t in given]
        kernel.deep_recursion(OPS, *wide, blocks, None, Recursion(1, 1, 1, EPS))
