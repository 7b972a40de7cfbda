"""The driver of deep_recursion for CUDA, compiled for the CPU: its logic, without a GPU.

The same C++ source, registered as `trm_fast_driver::deep_recursion` for CPU tensors, calls the
CPU's elementwise operations. Which kernels PyTorch takes for products and attention is all that
differs on a GPU.
"""

import pytest
import torch
from op_checks import case_ids
from recursion_cases import (
    HEADS,
    MIXERS,
    assert_as_good,
    exact_step,
    leaves_for,
    rotary,
    states,
    step,
)

from trm_fast.extension import (
    build,
    inject,
    recursion_driver,
    residual_rmsnorm,
    swiglu,
)
from trm_fast.kernels.registration import register
from trm_fast.ops import POLICIES

CALLED = (inject, residual_rmsnorm, swiglu)  # their schemas, by being imported
SETTINGS = "bool mlp_t, int H_cycles, int L_cycles, int heads, float eps, str policy"
SHAPES = [(2, 97, 32), (1, 9, 16), (0, 9, 16)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _fwd_fake(x, y, z, weights, cos, sin, mlp_t, H_cycles, L_cycles, heads, eps, policy):
    saved = recursion_driver.new_saved(x, weights, mlp_t, L_cycles, heads, policy)
    return torch.empty_like(y), torch.empty_like(z), saved


def _bwd_fake(grad, saved, weights, *rest):
    return torch.empty_like(grad), [torch.empty_like(w) for w in weights]


def _save(ctx, inputs, output):
    _, _, _, weights, cos, sin, *settings = inputs
    _, z, saved = output
    ctx.mark_non_differentiable(z, *saved)
    ctx.save_for_backward(cos, sin, *weights, *saved)
    ctx.count, ctx.settings = len(weights), settings


def _backward(ctx, grad, *unused):
    cos, sin, *rest = ctx.saved_tensors
    d_x, d_weights = BACKWARD(
        grad.contiguous(), rest[ctx.count :], rest[: ctx.count], cos, sin, *ctx.settings
    )
    return d_x, None, None, d_weights, None, None, *(None for _ in ctx.settings)


BACKWARD = register(
    "trm_fast_driver",
    "deep_recursion_bwd(Tensor grad, Tensor[] saved, Tensor[] weights, Tensor? cos, Tensor? sin,"
    f" {SETTINGS}) -> (Tensor, Tensor[])",
    _bwd_fake,
)
FORWARD = register(
    "trm_fast_driver",
    "deep_recursion(Tensor x, Tensor y, Tensor z, Tensor[] weights, Tensor? cos, Tensor? sin,"
    f" {SETTINGS}) -> (Tensor, Tensor, Tensor[])",
    _fwd_fake,
    save=_save,
    backward=_backward,
)


@pytest.fixture(scope="module")
def driver(request):
    """The source compiled for the CPU, kept between runs under the key of what it is made of."""
    folder = build.source_folder()
    sources = [folder / "cuda" / name for name in ("deep_recursion.cpp", "network.cpp")]
    names = ["-DTRM_RECURSION_NAMESPACE=trm_fast_driver", "-DTRM_RECURSION_KEY=CPU"]
    flags = [*build.CXX_FLAGS, "-O1", *names, "-isystem", str(build.torch_folder() / "include")]
    key = build.digest((flags, torch.__version__), [*build.headers("cuda"), *sources])
    library = request.config.cache.mkdir("recursion-driver") / f"{key}.so"
    if not library.exists():
        objects = [str(library.with_name(f"{source.stem}-{key}.o")) for source in sources]
        try:
            command = build.compiler()
        except build.BuildError as error:
            pytest.skip(error.reason)
        for source, made in zip(sources, objects, strict=True):
            build.run([*command, *flags, "-c", str(source), "-o", made])
        link = ["-L", str(build.torch_folder() / "lib"), "-ltorch_cpu"]
        part = library.with_suffix(".part")
        build.run([*command, "-shared", *objects, *link, "-o", str(part)])
        part.replace(library)
    torch.ops.load_library(str(library))


def driven(ops, x, y, z, blocks, rotary, r):
    weights = [t for b in blocks for t in (*b.mixer, b.gate_up, b.down)]
    mlp_t = hasattr(blocks[0].mixer, "gate_up")
    cos, sin = rotary or (None, None)
    settings = (mlp_t, r.H_cycles, r.L_cycles, r.heads, r.eps, r.policy)
    new_y, new_z, _ = FORWARD(x, y, z, weights, cos, sin, *settings)
    return new_y, new_z.detach()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=case_ids("B S D", SHAPES))
@pytest.mark.parametrize("mixer", MIXERS)
def test_values_and_gradients_under_every_policy(mixer, shape, dtype, extension, driver):
    flat, inputs = leaves_for(mixer, *shape[1:]), states(*shape, dtype=dtype)
    exact = exact_step(mixer, inputs, flat, HEADS, 2, 2)
    plain = step(mixer, inputs, flat)
    found = {p: step(mixer, inputs, flat, policy=p, function=driven) for p in POLICIES}
    assert_as_good(found["save"], plain, exact, dtype)
    assert [t.dtype for t in found["save"]] == [t.dtype for t in plain]
    # What is computed again is computed alike.
    for other in ("light", "recompute"):
        assert all(torch.equal(a, b) for a, b in zip(found["save"], found[other], strict=True))


@pytest.mark.parametrize("cycles", [(1, 0), (1, 3), (3, 1)], ids=["H1-L0", "H1-L3", "H3-L1"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_other_cycles(mixer, cycles, extension, driver):
    flat, inputs = leaves_for(mixer, 9, 16), states(2, 9, 16)
    exact = exact_step(mixer, inputs, flat, HEADS, *cycles) if cycles[1] else None
    settings = {"H_cycles": cycles[0], "L_cycles": cycles[1]}
    got = step(mixer, inputs, flat, function=driven, **settings)
    if exact is None:  # the question is not looked at
        assert not got[2].any()
        return
    assert_as_good(got, step(mixer, inputs, flat, **settings), exact, torch.float32)


def test_attention_without_positions(extension, driver):
    flat, inputs = leaves_for("attention", 9, 16), states(2, 9, 16)
    got = step("attention", inputs, flat, rope=False, function=driven)
    for a, b in zip(got, step("attention", inputs, flat, rope=False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixer", MIXERS)
def test_nothing_is_kept_without_a_gradient(mixer, extension, driver):
    flat = [t.detach() for t in leaves_for(mixer, 9, 16)]
    inputs = states(2, 9, 16)
    tables = rotary(9, 8) if mixer == "attention" else (None, None)
    common = (*inputs, flat, *tables, mixer == "mlp_t", 2, 2, HEADS, 1e-5)
    y, z, saved = FORWARD(*common, "none")
    want_y, want_z, kept = FORWARD(*common, "save")
    assert saved == []
    assert kept
    assert torch.equal(y, want_y)
    assert torch.equal(z, want_z)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mixer", MIXERS)
def test_what_is_saved_is_foreseen(mixer, policy, extension, driver):
    flat = [t.detach() for t in leaves_for(mixer, 9, 16)]
    inputs = states(2, 9, 16, torch.bfloat16)
    tables = rotary(9, 8) if mixer == "attention" else (None, None)
    settings = (mixer == "mlp_t", 2, 2, HEADS, 1e-5, policy)
    *_, saved = FORWARD(*inputs, flat, *tables, *settings)
    foreseen = recursion_driver.new_saved(inputs[0], flat, settings[0], 2, HEADS, policy)
    assert [(t.shape, t.dtype) for t in saved] == [(t.shape, t.dtype) for t in foreseen]


def test_refusals(extension, driver):
    flat = [t.detach() for t in leaves_for("mlp_t", 9, 16)]
    x, y, z = states(2, 9, 16)
    good = {"x": x, "y": y, "z": z, "weights": flat, "mlp_t": True}
    good |= {"heads": HEADS, "policy": "save"}

    def call(**changes):
        a = {**good, **changes}
        settings = (a["mlp_t"], 2, 2, a["heads"], 1e-5, a["policy"])
        return FORWARD(a["x"], a["y"], a["z"], a["weights"], None, None, *settings)

    for changes, text in (
        ({"policy": "much"}, "policy is 'much'"),
        ({"y": y[:1]}, r"y is \[1, 9, 16\], expected \[2, 9, 16\]"),
        ({"z": z.bfloat16()}, "z has dtype"),
        ({"x": x[0]}, r"x is \[9, 16\], expected \[B, S, D\]"),
        ({"x": x.mT.contiguous().mT}, "x is not contiguous"),
        ({"weights": flat[:3]}, "got 3 weights, expected four a block"),
        ({"weights": [flat[0][:, :8], *flat[1:]]}, "the token mixer's gate_up is"),
        ({"mlp_t": False, "heads": 3}, "do not make 3 heads"),
    ):
        with pytest.raises(RuntimeError, match=text):
            call(**changes)
    *_, saved = call()
    settings = (True, 2, 2, HEADS, 1e-5, "save")
    for given in (saved[:-1], [*saved, x]):
        with pytest.raises(RuntimeError, match="saved tensors, expected"):
            BACKWARD(y, given, flat, None, None, *settings)
