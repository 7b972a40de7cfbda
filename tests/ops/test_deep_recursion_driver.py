"""The driver of deep_recursion for CUDA, compiled for the CPU: its logic, without a GPU.

The same C++ source, registered as `trm_fast_driver::deep_recursion` for CPU tensors, calls the
CPU's elementwise operations. Which kernels PyTorch takes for products and attention is all that
differs on a GPU.
"""

import inspect
import itertools
import re
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from kernel_checks import check_registered
from op_checks import case_ids
from recursion_cases import (
    HEADS,
    MIXERS,
    OPS,
    assert_as_good,
    blocks_of,
    exact_step,
    leaves_for,
    rotary,
    states,
    step,
)
from tiny import tiny_config
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from trm_fast import memory, reference
from trm_fast.config import ModelConfig
from trm_fast.extension import build, recursion_driver
from trm_fast.extension import deep_recursion as compiled
from trm_fast.layers import Network
from trm_fast.ops import POLICIES, Recursion

SHAPES = [(2, 97, 32), (1, 9, 16), (0, 9, 16)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORWARD, BACKWARD = compiled.operations("trm_fast_driver", recursion_driver.new_saved)


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


def driven(*args):
    """The public function, with the driver in place of the CPU's engine."""
    serves = mock.Mock(return_value=None)  # the sizes are those of a GPU's kernels
    with mock.patch.multiple(compiled, _fwd=FORWARD, _unsupported_sizes=serves):
        return compiled.deep_recursion(*args)


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


@pytest.mark.parametrize("mixer", MIXERS)
def test_autocast_changes_nothing(mixer, extension, driver):
    flat, inputs = leaves_for(mixer, 9, 16), states(2, 9, 16)
    want = step(mixer, inputs, flat, function=driven)
    with torch.autocast("cpu", torch.bfloat16):
        got = step(mixer, inputs, flat, function=driven)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


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


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_sum_of_the_question_is_rounded_first(mixer, extension, driver):
    """z + (y + x), as published: in another order a small z would be lost in bfloat16."""
    x, _, z = states(2, 9, 16, torch.bfloat16)
    x, z = torch.ones_like(x), z * 2**-12
    flat = [t.detach() for t in leaves_for(mixer, 9, 16)]
    settings = (mixer == "mlp_t", 1, 1, HEADS, 1e-5, "recompute")
    *_, saved = FORWARD(x, -x, z, flat, None, None, *settings)
    shown = saved[0].view(9, 2, 16).transpose(0, 1) if mixer == "mlp_t" else saved[0].view(2, 9, 16)
    assert torch.equal(shown, z)


@pytest.mark.parametrize("mixer", MIXERS)
def test_epsilon(mixer, extension, driver):
    flat, inputs = [t.detach() for t in leaves_for(mixer, 9, 16)], states(2, 9, 16)
    tables = rotary(9, 8) if mixer == "attention" else None
    given = (OPS, *inputs, blocks_of(mixer, flat), tables, Recursion(1, 1, HEADS, 0.5, "save"))
    for got, want in zip(driven(*given), reference.deep_recursion(*given), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_attention_without_positions(extension, driver):
    flat, inputs = leaves_for("attention", 9, 16), states(2, 9, 16)
    got = step("attention", inputs, flat, rope=False, function=driven)
    for a, b in zip(got, step("attention", inputs, flat, rope=False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def arguments(mixer, inputs, flat, policy, rope=True):
    """Of the registered operations: x, y, z or grad and saved, then the rest."""
    tables = (None, None)
    if mixer == "attention" and rope:
        tables = rotary(inputs[0].shape[1], 8)
    return *inputs, flat, *tables, mixer == "mlp_t", 2, 2, HEADS, 1e-5, policy


@pytest.mark.parametrize("mixer", MIXERS)
def test_nothing_is_kept_without_a_gradient(mixer, extension, driver):
    flat = [t.detach() for t in leaves_for(mixer, 9, 16)]
    inputs = states(2, 9, 16)
    y, z, saved = FORWARD(*arguments(mixer, inputs, flat, "none"))
    want_y, want_z, kept = FORWARD(*arguments(mixer, inputs, flat, "save"))
    assert saved == []
    assert kept
    assert torch.equal(y, want_y)
    assert torch.equal(z, want_z)
    blocks, tables = blocks_of(mixer, flat), rotary(9, 8) if mixer == "attention" else None
    with torch.no_grad():
        got = driven(None, *inputs, blocks, tables, Recursion(2, 2, HEADS, 1e-5, "save"))
    assert torch.equal(got[0], want_y)


@pytest.mark.parametrize("mixer", MIXERS)
def test_weights_in_the_dtype_of_the_states(mixer, extension, driver):
    """As good as masters of the same values, whose gradients are float32, rounded."""
    flat = [t.detach().bfloat16() for t in leaves_for(mixer, 9, 16)]
    wide = [t.float() for t in flat]
    inputs = states(2, 9, 16, torch.bfloat16)
    grad = inputs[0].flip(0)
    found = []
    for weights in (flat, wide):
        given = arguments(mixer, inputs, weights, "light")
        y, z, saved = FORWARD(*given)
        d_x, d_weights = BACKWARD(grad, saved, *given[3:])
        assert [t.dtype for t in d_weights] == [t.dtype for t in weights]
        found.append([y, z, d_x, *(t.bfloat16() for t in d_weights)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mixer", MIXERS)
def test_registered(mixer, policy, extension, driver):
    """What is kept is foreseen, the gradients are PyTorch's to find."""
    flat, inputs = leaves_for(mixer, 9, 16), states(2, 9, 16, torch.bfloat16)
    given = arguments(mixer, inputs, flat, policy)
    if policy != "light":  # between the other two, and slow to check
        check_registered(FORWARD, given)
    given = arguments(mixer, inputs, [t.detach() for t in flat], policy)
    *_, saved = FORWARD(*given)
    foreseen = recursion_driver.new_saved(inputs[0], flat, given[6], 2, HEADS, policy)
    assert [(t.shape, t.dtype) for t in saved] == [(t.shape, t.dtype) for t in foreseen]
    if policy == "save":
        check_registered(BACKWARD, (inputs[1], saved, *given[3:]))


def test_all_that_the_driver_calls_is_registered_with_it():
    folder = build.source_folder() / "cuda"
    text = "".join((folder / n).read_text() for n in ("deep_recursion.cpp", "network.cpp"))
    called = set(re.findall(r'"(trm_fast_ext::\w+)"', text))
    modules = [m for m in vars(recursion_driver).values() if inspect.ismodule(m)]
    there = [getattr(m, name) for m in modules for name in ("_fwd", "_bwd") if hasattr(m, name)]
    assert called == {op._schema.name for op in there}


@pytest.mark.parametrize("mixer", MIXERS)
def test_what_is_summed_over_the_passes_is_float32(mixer, extension, driver):
    """Of 2 blocks and 3 passes: the gradients of 8 weights; of 2 that see the question, its own."""
    flat = [t.detach() for t in leaves_for(mixer, 9, 16)]
    given = arguments(mixer, states(2, 9, 16, torch.bfloat16), flat, "save")
    y, _, saved = FORWARD(*given)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        BACKWARD(y, saved, *given[3:])
    sums = [e for e in seen.profiler.kineto_results.events() if e.name() == "aten::sub"]
    assert [e.dtypes()[0] for e in sums] == ["float"] * (8 * 2 + 1)
    # Nor is a term of theirs rounded.
    *_, saved = FORWARD(*given[:8], 0, *given[9:])
    _, d_weights = BACKWARD(y, saved, *given[3:8], 0, *given[9:])
    assert not any(torch.equal(g, g.bfloat16().float()) for g in d_weights)


def most_held(function):
    """Bytes of the memory that PyTorch takes inside, at the worst moment."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as taken:
        function()
    events = [e for e in taken.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mixer", MIXERS)
def test_the_memory_estimate(mixer, policy, extension, driver):
    """Against what is kept, and what the backward holds at its worst."""
    sizes = {"seq_len": 30, "intermediate_size": 96, "token_intermediate_size": 64, "L_layers": 2}
    changes = {"hidden_size": 16, "num_heads": 2, "L_cycles": 3, "mlp_t": mixer == "mlp_t"}
    config = ModelConfig.from_dict(tiny_config(**sizes, **changes))
    weights = [
        t.detach()
        for b in Network(config, config.L_layers).weights()
        for t in (*b.mixer, b.gate_up, b.down)
    ]
    x = torch.randn(64, config.total_len, 16)
    tables = (None, None) if config.mlp_t else rotary(config.total_len, 8)
    settings = (config.mlp_t, 1, config.L_cycles, 2, 1e-5, policy)
    *_, saved = FORWARD(x, x, x, weights, *tables, *settings)
    kept = sum(t.nbytes for t in saved)
    bytes_each = 64 * x.element_size()
    # One float per row and norm, and lse, are not counted.
    assert kept == pytest.approx(
        bytes_each * memory.engine_saved_elements(config, policy, "cuda"), rel=0.08
    )
    held = most_held(lambda: BACKWARD(x, saved, weights, *tables, *settings)) + kept + x.nbytes
    need = (memory.step_bytes(config, n, policy, "cuda") for n in (64, 0))
    states_and_loss = 64 * (6 * x[0].nbytes + 8 * config.seq_len * config.vocab_size * 5)
    assert held == pytest.approx(next(need) - next(need) - states_and_loss, rel=0.06)


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


# What a GPU would be given, on tensors without memory. (Autograd needs the device itself.)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mixer", MIXERS)
def test_what_the_driver_keeps_is_foreseen_on_cuda(mixer, policy, dtype):
    """Three heads of 8 features, which the CPU's engine does not serve."""
    sizes = [t.shape for t in leaves_for(mixer, 9, 24)]
    with FakeTensorMode():
        masters = [torch.empty(s, device="cuda") for s in sizes]
        x, y, z = torch.empty(3, 2, 9, 24, dtype=dtype, device="cuda")
        tables = None if mixer == "mlp_t" else tuple(torch.empty(2, 9, 8, device="cuda"))
        settings = Recursion(2, 3, 3, 1e-5, policy)
        with mock.patch.object(compiled, "_fwd", side_effect=compiled._fwd) as called:
            states = compiled.deep_recursion(
                None, x, y, z, blocks_of(mixer, masters), tables, settings
            )
        given = called.call_args.args
        *_, saved = compiled._fwd(*given[:-1], policy)
        backward = torch.ops.trm_fast_ext.deep_recursion_bwd
        d_x, d_weights = backward(x, saved, *given[3:-1], policy)
        foreseen = recursion_driver.new_saved(x, masters, mixer == "mlp_t", 3, 3, policy)
    assert all(a is b for a, b in zip(given[3], masters, strict=True))  # nothing is copied
    assert [(t.shape, t.dtype) for t in saved] == [(t.shape, t.dtype) for t in foreseen]
    assert all(t.device.type == "cuda" for t in (*states, *saved, d_x))
    assert all((t.shape, t.dtype) == (x.shape, dtype) for t in (*states, d_x))
    assert [(t.shape, t.dtype) for t in d_weights] == [(s, torch.float32) for s in sizes]


def test_what_cuda_does_not_serve():
    """Any width, but heads of PyTorch's attention; the CPU's engine has its own."""
    cuda, cpu = torch.device("cuda"), torch.device("cpu")

    def said(device, **changes):
        config = {"hidden_size": 24, "num_heads": 3, "mlp_t": False, "dropout": 0.0}
        config |= {"quantize": "none"} | changes
        dtype = torch.float16 if device == cuda else torch.float32
        return compiled.unsupported(dtype, SimpleNamespace(**config), device)

    assert said(cuda) is None
    assert said(cpu) == "needs a hidden size that is a multiple of 16, not 24"
    assert said(cuda, hidden_size=192, num_heads=1) is None
    assert said(cuda, hidden_size=7, mlp_t=True) is None
    for width, heads in ((24, 2), (200, 1), (25, 3)):
        text = "needs heads of a size that is a multiple of 8 up to 192, not {} features in {}"
        assert said(cuda, hidden_size=width, num_heads=heads) == text.format(width, heads)
        with FakeTensorMode(), pytest.raises(ValueError, match="multiple of 8 up to 192"):
            x = torch.empty(1, 9, width, device="cuda")
            blocks = blocks_of("attention", [x] * 4)
            compiled.deep_recursion(None, x, x, x, blocks, None, Recursion(1, 1, heads, 1e-5))
    assert "serves no dropout" in said(cuda, dropout=0.1)
    assert "no products in int8 on GPUs" in said(cuda, quantize="int8")
    assert compiled.unsupported(torch.float16, None, cuda) is None
    assert "not float16" in compiled.unsupported(torch.float16, None, cpu)
    assert "not float64" in compiled.unsupported(torch.float64, None, cuda)
