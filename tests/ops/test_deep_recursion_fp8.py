"""The channel MLP in e4m3 as the Triton kernels make it, and the recursion on them.

What a product computes has the same definition as the reference's, up to the order of float32 sums;
a last bit of one may turn a number into the next e4m3, which then differs by a part of what
quantising does to it.
"""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from kernel_checks import DEVICE, OPCHECKS, check_registered
from op_checks import EPS, case_ids, rms_norm
from parity import L2_FLOORS, assert_l2, make_inputs, relative_l2
from recursion_cases import MIXERS, OPS, blocks_of, leaves_for, rotary, states

from trm_fast import fp8, reference
from trm_fast.kernels import deep_recursion as kernel
from trm_fast.kernels._common import E4M3, down, e4m3_rows, e4m3_step, up
from trm_fast.kernels._runtime import forced_architecture
from trm_fast.kernels.network import Network
from trm_fast.kernels.swiglu_rmsnorm import pack_e4m3, swiglu_e4m3
from trm_fast.ops import BlockWeights, Recursion, TokenMixWeights

no_e4m3 = DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9)
pytestmark = pytest.mark.skipif(no_e4m3, reason="this GPU has no e4m3")
FLIPS = 0.3  # of the quantising error


@triton.jit
def _there_and_back_kernel(x_ptr, out_ptr, back_ptr, COUNT: tl.constexpr):
    offs = tl.arange(0, COUNT)
    tl.store(out_ptr + offs, down(tl.load(x_ptr + offs), tl.float8e4nv))
    tl.store(back_ptr + offs, up(tl.load(out_ptr + offs)))


def test_numbers_are_rounded_and_read_as_pytorch_does():
    """All 256 codes, all numbers halfway between two, others of any size, what is not finite."""
    numbers = torch.arange(256).to(torch.uint8).view(E4M3).float()
    ordered = numbers[:127]
    halfway = (ordered[1:] + ordered[:-1]) / 2
    (drawn,) = make_inputs((3000,))
    x = [numbers, halfway, -halfway, drawn * 2.0 ** (9 * drawn).round()]
    x = torch.cat([*x, torch.tensor([464.1, -1e30, torch.inf, -torch.inf, 1e-40, -0.0])])
    x = torch.cat((x, torch.zeros(4096 - len(x)))).to(DEVICE)
    out, back = torch.empty_like(x, dtype=E4M3), torch.empty_like(x)
    _there_and_back_kernel[(1,)](x, out, back, 4096)
    want = fp8.rounded(x, 1)
    for got in (out.float(), back):
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))
    zeros = want == 0
    assert torch.equal(out.float()[zeros].signbit(), x[zeros].signbit())


@triton.jit
def _step_kernel(x_ptr, step_ptr, inverse_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    offs = rows[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    step, inverse = e4m3_step(tl.load(x_ptr + offs))
    tl.store(step_ptr + rows, step)
    tl.store(inverse_ptr + rows, inverse)


def test_steps_are_those_of_the_definition():
    (x,) = make_inputs((64, 16))
    x *= torch.logspace(-38, 37, 64).view(64, 1)
    x[3], x[4], x[5] = 0, 1e-42, 1.0
    x[6, 1:] = 0.999
    x = x.to(DEVICE)
    step, inverse = (x.new_empty(64) for _ in range(2))
    _step_kernel[(1,)](x, step, inverse, 64, 16)
    assert torch.equal(step, fp8.row_steps(x).view(-1))
    assert torch.equal(inverse, 1 / step)
    narrow, also = e4m3_rows(x)
    assert torch.equal(also, step)
    assert torch.equal(narrow.float() * step[:, None], fp8.rounded(x, step[:, None]))


# Rows, width, inner width: whole and broken tiles of 128 features, more rows than sm_80's tile.
SHAPES = [(70, 48, 100), (35, 64, 300), (5, 16, 16), (3, 144, 256)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("deferred", [False, True], ids=["normed", "deferred"])
@pytest.mark.parametrize("shape", SHAPES, ids=case_ids("N D F", SHAPES))
def test_channel_mlp(shape, deferred, dtype, architecture):
    rows, width, inner = shape
    sizes = (rows, width), (2 * inner, width), (width, inner)
    h, *weights = make_inputs(*sizes, scale=[3, width**-0.5, inner**-0.5])
    h = h.to(dtype)
    normed = rms_norm(h, -1)
    ready = fp8.weights(BlockWeights(TokenMixWeights(*weights), *weights), dtype)
    update = fp8.channel_swiglu(normed, ready.gate_up, ready.down, fp8.norm_step(width))
    want = normed.double() + update.double()

    packed = pack_e4m3(*(w.to(DEVICE) for w in weights), width)
    assert packed.h_step == fp8.norm_step(width)
    given, ssq = normed, None
    if deferred:
        given, ssq = h, h.float().square().sum(1)[None].to(DEVICE)
    total, squares = swiglu_e4m3(given.to(DEVICE), packed, ssq, EPS)
    assert total.dtype == dtype
    # In 16 bits a deferred norm may be rounded otherwise, and an e4m3 be the next one then.
    plain = normed.double() + _plain(normed, *weights)
    limit = L2_FLOORS[dtype] + deferred * FLIPS * relative_l2(want, plain)
    assert_l2(total, want, limit)
    assert_l2(squares.sum(0), want.square().sum(1), max(limit, 1e-3))
    assert relative_l2(want, plain) > 5e-3


def _plain(h, w_gate_up, w_down):
    g, u = (h.double() @ w.double().t() for w in w_gate_up.chunk(2))
    return g * torch.sigmoid(g) * u @ w_down.double().t()


def test_the_tiles_of_every_gpu_compute_the_same():
    if DEVICE.type == "cuda":
        pytest.skip("a GPU runs the rows of its own architecture only")
    h, *weights = make_inputs((70, 48), (600, 48), (48, 300), scale=[1, 0.1, 0.1])
    found = []
    for arch in (80, 90, 100):
        with forced_architecture(arch):
            found.append(swiglu_e4m3(h, pack_e4m3(*weights, 48), None, EPS)[0])
    for other in found[1:]:
        assert_l2(other, found[0], 1e-6)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_what_is_not_finite_becomes_nan_in_its_row(bad):
    h, *weights = make_inputs((5, 32), (320, 32), (32, 160))
    packed = pack_e4m3(*(w.to(DEVICE) for w in weights), 32)
    whole, _ = swiglu_e4m3(h.to(DEVICE), packed, None, EPS)
    h[2, 7] = bad
    got, squares = swiglu_e4m3(h.to(DEVICE), packed, None, EPS)
    assert got[2].isnan().all() and squares[:, 2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(got[others], whole[others])
    weights[0][3, 1] = bad
    got, _ = swiglu_e4m3(h.to(DEVICE), pack_e4m3(*(w.to(DEVICE) for w in weights), 32), None, EPS)
    assert got.isnan().all()


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of the interpreter
def test_large_numbers_saturate_and_rows_of_any_size_are_kept():
    h, w_gate_up, w_down = make_inputs((6, 32), (320, 32), (32, 160))
    packed = pack_e4m3(w_gate_up.to(DEVICE) * 1e5, w_down.to(DEVICE) * 1e-9, 32)
    h *= torch.tensor([0, 1e-6, 1e-2, 1, 1e6, 1e30]).view(6, 1)
    got, _ = swiglu_e4m3(h.to(DEVICE), packed, None, EPS)
    assert got.isfinite().all() and not got[0].any()
    update = (got.cpu().double() - h.double())[3]
    ready = [fp8.rounded(w, fp8.row_steps(w)) for w in (w_gate_up * 1e5, w_down * 1e-9)]
    want = fp8.channel_swiglu(h, *ready, fp8.norm_step(32))
    assert_l2(update, want[3], 1e-4)


# --- the recursion ---


def call(function, mixer, inputs, flat, cycles, *, quantized="fp8", policy="save", grad=True):
    """y, z and, with `grad`, the gradients to x and the weights."""
    x, y, z = (t.detach().clone() for t in inputs)
    x.requires_grad_(grad)
    tables = None
    if mixer == "attention":
        tables = tuple(t.to(x.device) for t in rotary(x.shape[1], 16))
    settings = Recursion(*cycles, x.shape[2] // 16, EPS, policy, quantize=quantized)
    with torch.set_grad_enabled(grad):
        new_y, new_z = function(OPS, x, y, z, blocks_of(mixer, flat), tables, settings)
    found = [new_y.detach(), new_z]
    if grad:
        upstream = torch.linspace(-1, 1, new_y.numel()).view(new_y.shape).to(new_y)
        found += torch.autograd.grad(new_y, [x, *flat], upstream)
    return found


def on_device(tensors, dtype=torch.float32):
    return [t.detach().to(DEVICE, dtype).requires_grad_(t.requires_grad) for t in tensors]


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize(
    "grad, shape, layers, cycles",
    [(False, (1, 97, 32), 1, (2, 1)), (True, (1, 12, 48), 2, (2, 1))],
    ids=["answers", "training"],
)
def test_as_the_reference(mixer, grad, shape, layers, cycles):
    flat, inputs = leaves_for(mixer, *shape[1:], layers=layers), states(*shape)
    given = on_device(inputs), on_device(flat)
    got = call(kernel.deep_recursion, mixer, *given, cycles, grad=grad)
    want, exact = (
        call(reference.deep_recursion, mixer, inputs, flat, cycles, grad=grad, quantized=q)
        for q in ("fp8", "none")
    )
    for i, (g, w, e) in enumerate(zip(got, want, exact, strict=True)):
        quantising = relative_l2(w, e)
        assert quantising > 2e-3, i
        assert relative_l2(g, w) < FLIPS * quantising, i


@pytest.mark.parametrize("mixer, count", [("mlp_t", 97), ("attention", 32)])
def test_the_norm_in_front_decides_the_step(mixer, count):
    """A step twice as large would show in the smallest numbers only."""
    flat = [t.detach() for t in on_device(leaves_for(mixer, 97, 32))]
    like = torch.zeros(1, 97, 32, device=DEVICE)
    net = Network.pack(flat, like, mixer == "mlp_t", 2, EPS, (None, None))
    steps = {block.e4m3.h_step for block in net.in_e4m3(flat).blocks}
    assert steps == {fp8.norm_step(count)}
    assert fp8.norm_step(97) != fp8.norm_step(32)


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_cycle_with_a_gradient_is_not_quantised(mixer):
    """Bit by bit that of no quantisation, from the states that the cycles before it leave."""
    flat, inputs = on_device(leaves_for(mixer, 12, 48, layers=1)), on_device(states(1, 12, 48))
    alone = [
        call(kernel.deep_recursion, mixer, inputs, flat, (1, 1), quantized=q)
        for q in ("fp8", "none")
    ]
    assert all(torch.equal(a, b) for a, b in zip(*alone, strict=True))
    whole = call(kernel.deep_recursion, mixer, inputs, flat, (2, 1))
    between = call(kernel.deep_recursion, mixer, inputs, flat, (1, 1), grad=False)
    again = call(kernel.deep_recursion, mixer, [inputs[0], *between], flat, (1, 1))
    # States between the cycles are not rounded within one call.
    for a, b in zip(whole, again, strict=True):
        assert relative_l2(a, b) < 1e-4


@pytest.mark.parametrize("mixer", MIXERS)
def test_policies_agree(mixer):
    """The squares of e4m3's tiles are others than those that "recompute" keeps."""
    flat, inputs = on_device(leaves_for(mixer, 12, 48, layers=1)), on_device(states(1, 12, 48))
    save, again = (
        call(kernel.deep_recursion, mixer, inputs, flat, (2, 1), policy=policy)
        for policy in ("save", "recompute")
    )
    for a, b in zip(save, again, strict=True):
        assert_l2(b, a, 1e-5)


def test_squares_of_more_tiles_than_are_kept_lose_none():
    """On Hopper those of e4m3 are half as wide as those of 16 bits, which kept squares are of."""
    flat = on_device(leaves_for("mlp_t", 5, 144, layers=1))
    inputs = [t.bfloat16() for t in on_device(states(1, 5, 144))]
    with forced_architecture(90):
        save, again = (
            call(kernel.deep_recursion, "mlp_t", inputs, flat, (2, 1), policy=policy)
            for policy in ("save", "recompute")
        )
    for a, b in zip(save, again, strict=True):
        assert_l2(b, a, 1e-2)


def test_where_gradients_are_on_the_last_cycle_is_the_usual_one():
    """Also if no input asks for one; and without a gradient all cycles are quantised."""
    flat = [t.detach() for t in leaves_for("mlp_t", 12, 32, layers=1)]
    inputs, blocks = on_device(states(2, 12, 32)), blocks_of("mlp_t", on_device(flat))
    settings = Recursion(1, 1, 2, EPS)
    plain, given = (
        kernel.deep_recursion(OPS, *inputs, blocks, None, r)[0]
        for r in (settings, replace(settings, quantize="fp8"))
    )
    assert torch.equal(plain, given)
    with torch.no_grad():
        given, _ = kernel.deep_recursion(
            OPS, *inputs, blocks, None, replace(settings, quantize="fp8")
        )
    assert relative_l2(given, plain) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_in_16_bits(mixer, dtype, architecture):
    """One update of each state: its error is quantising's, as the reference's is."""
    flat, inputs = leaves_for(mixer, 12, 32, layers=1), states(2, 12, 32)
    low = [t.to(dtype) for t in inputs]
    exact = call(reference.deep_recursion, mixer, inputs, flat, (1, 1), quantized="none")[:2]
    plain = call(reference.deep_recursion, mixer, low, flat, (1, 1), grad=False)
    given = [t.to(DEVICE) for t in low], on_device(flat)
    got = call(kernel.deep_recursion, mixer, *given, (1, 1), grad=False)
    for g, p, e in zip(got, plain, exact, strict=True):
        assert g.dtype == dtype
        assert_l2(g, e, 1.3 * relative_l2(p, e))


def test_without_boards():
    flat = on_device(leaves_for("mlp_t", 12, 32, layers=1))
    empty = [t[:0] for t in on_device(states(2, 12, 32))]
    outcome = call(kernel.deep_recursion, "mlp_t", empty, flat, (2, 1))
    assert outcome[0].shape == (0, 12, 32) and not any(g.any() for g in outcome[3:])
    packed = pack_e4m3(flat[2].detach(), flat[3].detach(), 12)
    assert swiglu_e4m3(empty[0].flatten(0, 1), packed, None, EPS)[0].shape == (0, 32)


def test_registered():
    flat = on_device(leaves_for("mlp_t", 5, 16, layers=1))
    x, y, z = on_device(states(1, 5, 16))
    given = [x.requires_grad_(), y, z, flat, None, None, True, 2, 1, 1, EPS, "light", True]
    check_registered(kernel._fwd, given, OPCHECKS[:3])


def test_refuses(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    cuda = torch.device("cuda")
    said = kernel.unsupported_products("fp8", cuda)
    assert said == "has products in fp8 from compute capability 8.9 on, this GPU has 8.6"
    assert kernel.unsupported_products("none", cuda) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    assert kernel.unsupported_products("fp8", cuda) is None
    assert kernel.unsupported_products("fp8", torch.device("cpu")) is None  # interpreted
    assert kernel.unsupported_products("int8", cuda) == "has no products in int8 on GPUs"
