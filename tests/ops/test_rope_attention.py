"""rope_attention(qkv, rotary, heads): rotate queries and keys, then plain softmax attention."""

import re
from types import SimpleNamespace

import pytest
import torch
from extension_checks import check_extension_refusals, check_same_bits, extension_cases
from kernel_checks import DEVICE, check_fullgraph, check_refusals, check_registered
from op_checks import CPU, EPS, case_ids, cases, check_op, token_major
from parity import assert_parity, make_inputs

from trm_fast.extension import rope_attention as compiled
from trm_fast.kernels import rope_attention as kernel
from trm_fast.kernels._runtime import recording
from trm_fast.reference import _rotate, rope_attention

SHAPES = [(4, 64, 2, 16), (2, 97, 8, 64), (1, 97, 3, 10), (0, 97, 2, 8)]

# For the kernel: every tile of tokens, full and not; heads that are no powers of two.
TILE_SHAPES = [
    *((1, 5, 1, 48), (3, 16, 1, 32), (1, 64, 3, 16), (2, 97, 2, 64), (1, 128, 1, 16)),
    (0, 97, 2, 16),
]
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# More tokens and larger heads than a tile has; float32, which has none.
BEYOND_A_TILE = {
    "S130-K48-bf16": (1, 130, 2, 48, torch.bfloat16),
    "S130-K48-fp32": (1, 130, 1, 48, torch.float32),
    "S97-K128-fp16": (1, 97, 1, 128, torch.float16),
    "S97-K64-fp32": (2, 97, 3, 64, torch.float32),
    "S5-K16-fp32": (1, 5, 1, 16, torch.float32),
    "B0-fp32": (0, 97, 2, 16, torch.float32),
}

# For the extension: one query, fewer than a block of rows, odd counts of tokens, several blocks
# of queries in the gradient too; heads whose halves are no whole vectors, and of two panels.
EXTENSION_SHAPES = [
    *((2, 1, 2, 16), (1, 5, 3, 48), (2, 97, 2, 64), (1, 64, 1, 16)),
    *((1, 130, 2, 48), (1, 81, 1, 128), (1, 200, 1, 80), (0, 97, 2, 16)),
]


def angles(tokens, head_dim, base=10000.0):
    """Position times frequency, [S, K/2] float64."""
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return torch.arange(tokens, dtype=torch.float64).unsqueeze(1) * frequency


def tables(tokens, head_dim):
    twice = angles(tokens, head_dim).repeat(1, 2)
    return twice.cos().float(), twice.sin().float()


def rotate(t, by):
    """Element i of the first half and i of the second are the parts of one complex number."""
    wide = t.to(torch.promote_types(t.dtype, torch.float32))
    half = wide.shape[-1] // 2
    turned = torch.complex(wide[..., :half], wide[..., half:]) * torch.polar(
        torch.ones_like(by), by
    ).to(wide.dtype.to_complex())
    return torch.cat((turned.real, turned.imag), -1).to(t.dtype)


def formula(qkv, heads, rope):
    batch, tokens, width = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    if rope:
        q, k = (rotate(t, angles(tokens, t.shape[-1])) for t in (q, k))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    weights = scores.double().exp()
    weights = (weights / weights.sum(-1, keepdim=True)).to(v.dtype)
    return (weights @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("rope", [True, False], ids=["rope", "none"])
@pytest.mark.parametrize("shape, dtype", cases("B S H K", SHAPES))
def test_value_and_gradient(shape, dtype, rope):
    batch, tokens, heads, head_dim = shape
    (qkv,) = make_inputs((batch, tokens, 3 * heads * head_dim), dtype=dtype)
    rotary = tables(tokens, head_dim) if rope else None
    check_op(
        lambda t: rope_attention(t, rotary, heads),
        lambda t: formula(t, heads, rope),
        [qkv],
        dtype,
    )


def test_gradient_is_the_derivative():
    (qkv,) = make_inputs((2, 3, 24), dtype=torch.float64, requires_grad=True)
    rotary = tables(3, 4)
    assert torch.autograd.gradcheck(lambda t: rope_attention(t, rotary, 2), (qkv,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_rotation_rounds_once(dtype):
    (t,) = make_inputs((2, 97, 8), dtype=dtype)
    cos, sin = tables(97, 8)
    exact = rotate(t.double(), angles(97, 8))
    ulp = torch.finfo(dtype).eps
    # Half a unit in the last place: a rotation in the low precision is off by more.
    error = (_rotate(t, cos, sin).double() - exact).abs()
    assert (error <= 0.51 * ulp * exact.abs() + 1e-6).all()


def test_scores_depend_on_the_distance_only():
    (token,) = make_inputs((1, 1, 24))
    cos, sin = tables(8, 8)
    far = rope_attention(token.expand(1, 4, 24), (cos[4:], sin[4:]), 1)
    torch.testing.assert_close(rope_attention(token.expand(1, 4, 24), (cos[:4], sin[:4]), 1), far)


def test_either_memory_layout():
    (qkv,) = make_inputs((3, 5, 24))
    rotary = tables(5, 4)
    torch.testing.assert_close(
        rope_attention(token_major(qkv), rotary, 2), rope_attention(qkv, rotary, 2)
    )


def on_device(rotary):
    return tuple(t.to(DEVICE) for t in rotary)


def check_kernel(qkv, heads, rotary, wanted, dtype):
    rotary = rotary and on_device(rotary)
    check_op(lambda t: kernel.rope_attention(t, rotary, heads), wanted, [qkv], dtype, DEVICE)


def check_rotated(batch, tokens, heads, head_dim, dtype):
    (qkv,) = make_inputs((batch, tokens, 3 * heads * head_dim), dtype=dtype)
    rotary = tables(tokens, head_dim)
    check_kernel(qkv, heads, rotary, lambda t: formula(t, heads, True), dtype)


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("shape", TILE_SHAPES, ids=case_ids("B S H K", TILE_SHAPES))
def test_kernel(shape, dtype, architecture):
    check_rotated(*shape, dtype)


@pytest.mark.parametrize("case", BEYOND_A_TILE.values(), ids=BEYOND_A_TILE)
def test_kernel_beyond_a_tile(case):
    check_rotated(*case)


@pytest.mark.parametrize(
    "tokens, dtype",
    [(9, torch.bfloat16), (130, torch.float16), (9, torch.float32)],
    ids=["S9-bf16", "S130-fp16", "S9-fp32"],
)
def test_kernel_without_rotation(tokens, dtype):
    (qkv,) = make_inputs((2, tokens, 3 * 2 * 32), dtype=dtype)
    check_kernel(qkv, 2, None, lambda t: formula(t, 2, False), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_kernel_takes_the_tables_as_they_are(dtype):
    """Published tables have two equal halves; nothing relies on it."""
    qkv, cos, sin = make_inputs((1, 20, 48), (20, 16), (20, 16), scale=(1.0, 0.7, 0.7))
    check_kernel(qkv, 1, (cos, sin), lambda t: rope_attention(t, (cos, sin), 1), dtype)


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_kernel_with_scores_far_below_zero(dtype):
    """The keys that fill up a tile score 0; each score of the others is -160 and less."""
    (qkv,) = make_inputs((1, 70, 48), scale=0.1)
    qkv[..., 0], qkv[..., 16] = 10.0, -64.0
    check_kernel(qkv, 1, None, lambda t: formula(t, 1, False), dtype)


def check_deferred_and_in_place(tokens, dtype):
    """What the recursion does: rows still to be scaled, results where it says, d over qkv."""
    heads, head_dim = 3, 32
    width = heads * head_dim
    (rows,) = make_inputs((2, tokens, 3 * width), dtype=dtype, scale=4.0)
    (ssq,) = make_inputs((2, 2 * tokens))
    ssq = 4 * width * (1 + ssq.square())
    scale = (ssq.double().sum(0) / width + EPS).rsqrt().view(2, tokens, 1)
    (grad,) = make_inputs((2, tokens, width), dtype=dtype, seed=1)
    exact, plain = ((scale * rows).to(t).requires_grad_() for t in (torch.float64, dtype))
    want, base = formula(exact, heads, True), formula(plain, heads, True)
    (d_want,) = torch.autograd.grad(want, exact, grad.double())
    (d_base,) = torch.autograd.grad(base, plain, grad)
    qkv, cos, sin = on_device((rows, *tables(tokens, head_dim)))
    deferred = {"ssq": ssq.to(DEVICE), "eps": EPS}
    out = torch.empty_like(grad, device=DEVICE)
    lse = out.new_empty(kernel.new_lse(out, heads), dtype=torch.float32)
    found = kernel.rope_attention_fwd(qkv, cos, sin, heads, **deferred, out=(out, lse))
    assert found[0] is out and found[1] is lse
    assert_parity(out, want, base)
    qkv = qkv.clone()
    given = grad.to(DEVICE), qkv, out, lse, cos, sin, heads
    assert kernel.rope_attention_bwd(*given, **deferred, out=qkv) is qkv
    assert_parity(qkv, d_want, d_base)


@pytest.mark.parametrize("tokens, dtype", [(40, torch.bfloat16), (97, torch.float16)])
def test_rows_of_a_deferred_norm_and_in_place(tokens, dtype, architecture):
    check_deferred_and_in_place(tokens, dtype)


@pytest.mark.parametrize("tokens, dtype", [(130, torch.bfloat16), (20, torch.float32)])
def test_the_same_beyond_a_tile(tokens, dtype):
    check_deferred_and_in_place(tokens, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [97, 130])
def test_shapes_on_a_gpu_are_those_promised(tokens, dtype):
    """PyTorch's attention there saves other shapes than on the CPU, and pads them for float32."""
    qkv = torch.empty(2, tokens, 3 * 48, dtype=dtype, device="meta")
    table = torch.empty(tokens, 16, device="meta")
    promised = kernel._fwd_fake(qkv, table, table, 3)
    with recording(90):
        found = kernel.rope_attention_fwd(qkv, table, table, 3)
        d = kernel.rope_attention_bwd(found[0], qkv, *found, table, table, 3)
    for got, want in zip((*found, d), (*promised, qkv), strict=True):
        assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_kernel_is_registered(dtype):
    (qkv,) = make_inputs((2, 5, 48), dtype=dtype, device=DEVICE)
    cos, sin = on_device(tables(5, 16)) if dtype == torch.bfloat16 else (None, None)
    check_registered(kernel._fwd, [qkv.clone().requires_grad_(), cos, sin, 1])
    out, lse = kernel._fwd(qkv, cos, sin, 1)
    check_registered(kernel._bwd, [out, qkv, out, lse, cos, sin, 1])


def test_kernel_compiles_whole():
    (qkv,) = make_inputs((2, 5, 48), dtype=torch.bfloat16)
    rotary = on_device(tables(5, 16))
    check_fullgraph(lambda t: kernel.rope_attention(t, rotary, 1), [qkv])


def test_kernel_refuses():
    (qkv,) = make_inputs((1, 4, 96))
    check_refusals(lambda t: kernel.rope_attention(t, on_device(tables(4, 16)), 2), [qkv])
    for heads, rotary, text in (
        (4, None, "needs a head size that is a multiple of 16 up to 128, not 8"),
        (5, None, "takes q, k and v of 5 heads, not 96 features"),
        (2, tables(5, 16), r"needs cos and sin of \[4, 16\] float32, not \[5, 16\] float32"),
        (2, [t.double() for t in tables(4, 16)], r"not \[4, 16\] float64"),
    ):
        with pytest.raises(ValueError, match=f"rope_attention of the triton backend .*{text}"):
            kernel.rope_attention(qkv, rotary, heads)


@pytest.mark.parametrize(
    "size, heads, mlp_t, reason",
    [
        (512, 8, False, None),
        (144, 3, False, None),
        (40, 8, True, None),
        (40, 8, False, "hidden size"),
        (512, 3, False, "3 heads of one size"),
        (512, 2, False, "head size .* not 256"),
    ],
)
def test_kernel_says_what_it_does_not_serve(size, heads, mlp_t, reason):
    config = SimpleNamespace(hidden_size=size, num_heads=heads, mlp_t=mlp_t, dropout=0.0)
    found = kernel.unsupported(torch.bfloat16, config)
    assert found is None if reason is None else found is not None and re.search(reason, found)
    assert "not float64" in kernel.unsupported(torch.float64, config)


@pytest.mark.parametrize("rope", [True, False], ids=["rope", "none"])
@pytest.mark.parametrize("shape, dtype", extension_cases("B S H K", EXTENSION_SHAPES))
def test_extension(shape, dtype, rope, extension):
    batch, tokens, heads, head_dim = shape
    (qkv,) = make_inputs((batch, tokens, 3 * heads * head_dim), dtype=dtype)
    rotary = tables(tokens, head_dim) if rope else None
    check_op(
        lambda t: compiled.rope_attention(t, rotary, heads),
        lambda t: formula(t, heads, rope),
        [qkv],
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_extension_takes_the_tables_as_they_are(dtype, extension):
    qkv, cos, sin = make_inputs((1, 20, 96), (20, 16), (20, 16), scale=(1.0, 0.7, 0.7))
    check_op(
        lambda t: compiled.rope_attention(t, (cos, sin), 2),
        lambda t: rope_attention(t, (cos, sin), 2),
        [qkv],
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_extension_with_scores_far_below_zero(dtype, extension):
    (qkv,) = make_inputs((1, 70, 48), scale=0.1)
    qkv[..., 0], qkv[..., 16] = 10.0, -64.0
    check_op(
        lambda t: compiled.rope_attention(t, None, 1),
        lambda t: formula(t, 1, False),
        [qkv],
        dtype,
    )


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_extension_lets_a_nan_through(part, extension):
    (qkv,) = make_inputs((1, 20, 48))
    qkv[0, 7, "qkv".index(part) * 16] = float("nan")
    found = compiled.rope_attention(qkv, None, 1).isnan()
    assert torch.equal(found, rope_attention(qkv, None, 1).isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_extension_gives_the_same_bits_on_any_threads(dtype, extension):
    (qkv,) = make_inputs((2, 130, 3 * 3 * 32), dtype=dtype, requires_grad=True)
    rotary = tables(130, 32)

    def step():
        out = compiled.rope_attention(qkv, rotary, 3)
        return [out, *torch.autograd.grad(out.square().sum(), [qkv])]

    check_same_bits(step)


def test_extension_keeps_the_logarithms_of_the_sums(extension):
    (qkv,) = make_inputs((2, 20, 96))
    _, lse = compiled._fwd(qkv, None, None, 2)
    q, k, _ = qkv.view(2, 20, 3, 2, 16).permute(2, 0, 3, 1, 4)
    exact = (q.double() @ k.double().mT / 4).logsumexp(-1) / torch.tensor(2.0).double().log()
    assert_parity(lse, exact)


def test_extension_is_registered(extension):
    (qkv,) = make_inputs((2, 5, 96))
    cos, sin = tables(5, 16)
    check_registered(compiled._fwd, [qkv.clone().requires_grad_(), cos, sin, 2])
    out, lse = compiled._fwd(qkv, cos, sin, 2)
    check_registered(compiled._bwd, [out, qkv, out, lse, cos, sin, 2])
    check_fullgraph(lambda t: compiled.rope_attention(t, None, 2), [qkv])


def test_extension_refuses(extension):
    (qkv,) = make_inputs((1, 4, 96))
    check_extension_refusals(lambda t: compiled.rope_attention(t, tables(4, 16), 2), [qkv])
    for heads, rotary, text in (
        (4, None, "needs a head size that is a multiple of 16 up to 128, not 8"),
        (5, None, "takes q, k and v of 5 heads, not 96 features"),
        (0, None, "needs 1 head or more, not 0"),
        (2, tables(5, 16), r"needs cos and sin of \[4, 16\] float32, not \[5, 16\] float32"),
    ):
        with pytest.raises(ValueError, match=f"rope_attention of the compiled extension .*{text}"):
            compiled.rope_attention(qkv, rotary, heads)
    with pytest.raises(ValueError, match=r"needs q, k and v of \[B, S, 3HK\], not \[4, 96\]"):
        compiled.rope_attention(qkv[0], None, 2)
    cos, sin = tables(4, 16)
    for given, text in (
        ((qkv[0], cos, sin, 2), r"qkv is \[4, 96\], expected \[B, S, 3\*H\*K\]"),
        ((qkv, cos, sin, 0), "qkv has 96 features, expected 3\\*0 heads"),
        ((qkv, cos, sin, 3), "expected 3\\*3 heads of a multiple of 16"),
        ((qkv, cos[:3], sin, 2), r"cos is \[3, 16\], expected \[4, 16\]"),
        ((qkv, cos, sin.double(), 2), "sin has dtype"),
        ((qkv, cos, None, 2), "cos and sin, or neither"),
        ((qkv.repeat(1, 1, 2)[..., ::2], cos, sin, 2), "qkv is not contiguous"),
        ((qkv.half(), cos, sin, 2), "expected float32 or bfloat16"),
    ):
        with pytest.raises(RuntimeError, match=text):
            compiled._fwd(*given)
    out, lse = compiled._fwd(qkv, cos, sin, 2)
    for given, text in (
        ((out[:, :3], qkv, out, lse), r"grad is \[1, 3, 32\], expected \[1, 4, 32\]"),
        ((out, qkv, out.bfloat16(), lse), "out has dtype"),
        ((out, qkv, out, lse[..., :3]), "lse is"),
    ):
        with pytest.raises(RuntimeError, match=text):
            compiled._bwd(*given, cos, sin, 2)


@pytest.mark.parametrize(
    "size, heads, mlp_t, reason",
    [
        (512, 8, False, None),
        (40, 8, True, None),
        (40, 8, False, "hidden size"),
        (512, 3, False, "3 heads of one size"),
        (512, 2, False, "head size .* not 256"),
    ],
)
def test_extension_says_what_it_does_not_serve(size, heads, mlp_t, reason):
    config = SimpleNamespace(hidden_size=size, num_heads=heads, mlp_t=mlp_t, dropout=0.0)
    found = compiled.unsupported(torch.bfloat16, config, CPU)
    assert found is None if reason is None else found is not None and re.search(reason, found)
    assert "not float64" in compiled.unsupported(torch.float64, config, CPU)
