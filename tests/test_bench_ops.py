"""The per-operation benchmarks: counts that agree with the design, parity before timing, results.

No test looks at how long anything took.
"""

import ast
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parity import TOLERANCES
from torch.utils.flop_counter import FlopCounterMode

from trm_fast import backends, op_bench, op_cases, reference
from trm_fast.backends import Row
from trm_fast.contenders import ParityError
from trm_fast.flops import recursion_flops
from trm_fast.op_cases import case, cases, network, parameter_shapes
from trm_fast.ops import OP_NAMES

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
PEAKS = {"matmul_tflop_per_s": 2.0, "copy_gb_per_s": 10.0}
TINY = [c for op in OP_NAMES for c in cases(op, "tiny", dtype="float32")]
IDS = [f"{c.op}-{c.name}" for c in TINY]

# GFLOP forward, and MB forward and of both directions, at the official sizes with 768 boards.
COUNTS = {
    ("swiglu_rmsnorm", "channel"): (234.3 + 117.2, None, None),
    ("token_mix", "mlp_t"): (78.1 + 39.1, None, None),
    ("linear_rmsnorm", "o_proj"): (39.1, 229, None),
    ("linear_rmsnorm", "down"): (117.2, None, None),
    ("rope_attention", "sudoku"): (14.8, 305, 305 + 534),
    ("residual_rmsnorm", "features"): (0, 229, 458),
    ("inject", "sudoku"): (0, 305, 305),
    ("adam_atan2_ema_", "mlp_t"): (0, 191, 191),
}


@pytest.mark.parametrize(("op", "name"), COUNTS)
def test_counts_of_the_official_sizes(op, name):
    gflop, forward, both = COUNTS[op, name]
    found = case(op, name)
    assert found.flops[0] / 1e9 == pytest.approx(gflop, abs=0.06)
    for got, want in zip(found.bytes, (forward, both), strict=True):
        assert want is None or got / 1e6 == pytest.approx(want, rel=0.005)


@pytest.mark.parametrize(
    ("mixer", "layer", "forward", "step"),
    [("mlp_t", 468.7, 19.68, 32.81), ("attention", 522.5, 21.95, 36.68)],
)
def test_flops_of_the_whole_recursion(mixer, layer, forward, step):
    config = network(mixer)
    found = recursion_flops(config)
    assert [x / 1e12 for x in found] == pytest.approx([forward, step], abs=0.006)
    one = recursion_flops(replace(config, H_cycles=1, L_cycles=1, L_layers=1))[0] / 2
    assert one / 1e9 == pytest.approx(layer, abs=0.1)
    assert case("deep_recursion", mixer).flops == found


def test_flops_of_mazes():
    """312.3 TFLOP for 768 of them; the case has a quarter."""
    config = case("rope_attention", "maze").config
    assert config.batch_size == 192
    assert 4 * recursion_flops(config)[1] / 1e12 == pytest.approx(312.3, abs=0.1)


@pytest.mark.parametrize(("mixer", "count"), [("mlp_t", 5_028_866), ("attention", 6_828_034)])
def test_the_optimizer_updates_every_weight(mixer, count):
    assert sum(map(math.prod, parameter_shapes(network(mixer)))) == count


def test_dtype_and_batch_change_the_bytes_in_proportion():
    plain, wide = case("inject", "sudoku"), case("inject", "sudoku", batch=8, dtype="float32")
    assert wide.bytes[0] == plain.bytes[0] * 2 * 8 / 768
    with pytest.raises(ValueError, match="inject has the cases sudoku, not 'sudoko'"):
        case("inject", "sudoko")


@pytest.mark.parametrize("c", TINY, ids=IDS)
def test_the_flops_are_those_that_run(c):
    """As PyTorch counts them in the reference; attention's gradient needs the scores again."""
    for direction in c.directions:
        with FlopCounterMode(display=False) as counter:
            op_bench.RUN[direction](op_bench.plain_function(c.op), op_bench.make_inputs(c, 0, CPU))
        counted = counter.get_total_flops()
        if "attention" in (c.op.removeprefix("rope_"), c.name):
            # The plain attention of the CPU saves its scores.
            assert counted <= c.cost(direction)[0]
        else:
            assert counted == c.cost(direction)[0]


def test_every_operation_has_a_benchmark_of_its_name():
    found = {p.stem for p in (ROOT / "bench").glob("bench_*.py")} - {
        "bench_model",
        "bench_micro",
        "bench_memory",
        "bench_reasoning",
    }
    assert found == {f"bench_{op}" for op in OP_NAMES}


@pytest.mark.parametrize("op", OP_NAMES)
def test_a_benchmark_names_every_case(op):
    tree = ast.parse((ROOT / "bench" / f"bench_{op}.py").read_text(encoding="utf-8"))
    named = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    assert {c.name for c in cases(op)} <= named


def test_the_floors_are_those_of_the_tests():
    assert {d: TOLERANCES[d] for d in op_bench.FLOORS} == op_bench.FLOORS


@pytest.fixture
def contender(monkeypatch):
    """Makes `function` the Triton implementation of an op, serving everywhere."""

    def register(op, function, reason=None):
        row = Row(op, "triton", lambda: function, lambda *_: reason)
        others = tuple(r for r in backends.ROWS if r.backend == "reference")
        monkeypatch.setattr(backends, "ROWS", (row, *others))

    return register


def wrong_swiglu(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return torch.sigmoid(gate) * up


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t):
        return t.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.1 * grad


def swiglu_with_an_unwritten_row(gate_up):
    # (Not by torch.empty, whose memory is NaN in every test.)
    shape = (*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    out = torch.empty_permuted(shape, (0, 1, 2), dtype=gate_up.dtype)
    out[:-1] = reference.swiglu(gate_up)[:-1]
    return out


@pytest.mark.parametrize(
    ("function", "direction", "said"),
    [
        (wrong_swiglu, "forward", r"triton, swiglu \(channel\), forward, seed 0: result 0 is off"),
        (lambda t: reference.swiglu(_WrongGradient.apply(t)), "both", "result 1 is off by"),
        (lambda t: reference.swiglu(t)[:1], "forward", r"result 0 is \[1, 11, 48\], not \[2, 11"),
        (lambda t: reference.swiglu(t) / 0, "forward", "result 0 is off by inf"),
        (swiglu_with_an_unwritten_row, "forward", "result 0 is off by nan"),
        (lambda t: (reference.swiglu(t),) * 2, "forward", "2 results, expected 1"),
    ],
    ids=["value", "gradient", "shape", "not finite", "unwritten", "results"],
)
def test_a_wrong_contender_is_an_error_and_nothing_is_timed(contender, function, direction, said):
    contender("swiglu", function)
    with pytest.raises(ParityError, match=said):
        op_bench.set_up(case("swiglu", "channel", "tiny", dtype="float32"), direction, CPU)


def test_integers_must_be_equal(contender):
    def other_predictions(logits, labels):
        loss, preds, correct = reference.stablemax_loss(logits, labels)
        return loss, 10 - preds, correct

    contender("stablemax_loss", other_predictions)
    with pytest.raises(ParityError, match="result 1 is off by inf"):
        op_bench.set_up(case("stablemax_loss", "sudoku", "tiny", dtype="float32"), "forward", CPU)


def test_in_place_work_is_judged_by_what_it_changed(contender):
    def without_average(*lists, **settings):
        reference.adam_atan2_ema_(*lists[:4], [], lists[5], **settings)

    given = case("adam_atan2_ema_", "mlp_t", "tiny", dtype="float32")
    assert given.directions == ("forward",)
    contender("adam_atan2_ema_", reference.adam_atan2_ema_)
    assert len(op_bench.set_up(given, "forward", CPU).entries) == 2
    contender("adam_atan2_ema_", without_average)
    count = len(parameter_shapes(given.config))
    with pytest.raises(ParityError, match=f"result {4 * count} is off"):
        op_bench.set_up(given, "forward", CPU)


def test_a_contender_as_good_as_the_reference_takes_part(contender):
    contender("swiglu", lambda t: reference.swiglu(t) * (1 + 1e-7))
    race = op_bench.set_up(case("swiglu", "channel", "tiny", dtype="float32"), "both", CPU)
    assert [e.name for e in race.entries] == ["reference", "triton"]
    assert 0 < race.entries[1].error < 1


def test_one_that_does_not_serve_or_run_says_why(contender):
    def no_memory(t):
        raise RuntimeError("out of memory\nlong story")

    given = case("swiglu", "channel", "tiny", dtype="float32")
    contender("swiglu", reference.swiglu, "serves NVIDIA GPUs only")
    assert op_bench.set_up(given, "forward", CPU).absent == {"triton": "serves NVIDIA GPUs only"}
    contender("swiglu", no_memory)
    race = op_bench.set_up(given, "forward", CPU)
    assert race.absent == {"triton": "failed: out of memory"}
    assert [e.name for e in race.entries] == ["reference"]


def test_a_missing_kernel_file_is_a_reason(monkeypatch):
    row = Row("swiglu", "triton", lambda: __import__("trm_fast.kernels.none"), lambda *_: None)
    monkeypatch.setattr(backends, "ROWS", (row,))
    found, absent = op_bench.fused_functions("swiglu", network("mlp_t", "tiny"), CPU)
    assert found == {}
    assert absent == {"triton": "cannot be loaded: No module named 'trm_fast.kernels.none'"}


def test_deep_recursion_is_judged_at_one_update_of_each_state():
    deep = replace(network("mlp_t", "tiny"), H_cycles=2, L_cycles=2, forward_dtype="float32")
    given = op_cases.deep_recursion(deep)
    assert (given.judged.config.H_cycles, given.judged.config.L_cycles) == (1, 1)
    assert given.judged.judged is None


def test_deep_recursion_runs_on_fused_operations_where_it_has_no_kernel_itself(contender):
    calls = []

    def counted(*given):
        calls.append(1)
        return reference.swiglu_rmsnorm(*given)

    contender("swiglu_rmsnorm", counted)
    given = case("deep_recursion", "attention", "tiny", dtype="float32")
    race = op_bench.set_up(given, "both", CPU)
    assert [e.name for e in race.entries] == ["reference", "reference of fused ops"]
    assert len(calls) == 2  # one block, one update of each state


def test_upstream_gradients_and_inputs_are_the_same_for_everybody():
    given = case("token_mix", "mlp_t", "tiny", dtype="float32")
    a, b = (op_bench.make_inputs(given, 3, CPU) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))
    assert not torch.equal(a.tensors[0], op_bench.make_inputs(given, 4, CPU).tensors[0])
    wide = a.widened(torch.float64)
    assert torch.equal(a.gradient(a.tensors[0]), wide.gradient(wide.tensors[0]))
    assert wide.gradient(wide.tensors[0]).dtype == torch.float64


def test_turns_rates_and_ratios(contender):
    contender("linear_rmsnorm", reference.linear_rmsnorm)
    given = case("linear_rmsnorm", "o_proj", "tiny", dtype="float32")
    race = op_bench.set_up(given, "forward", CPU)
    race.run(3)
    assert [len(e.seconds) for e in race.entries] == [3, 3]
    race.entries[0].seconds = [2e-3, 4e-3, 9e-3]
    race.entries[1].seconds = [1e-3, 1e-3, 2e-3]
    result = race.result(PEAKS)
    assert result["speedup"] == {"triton": 4.0}
    flops, moved = given.cost("forward")
    assert flops == 2 * 2 * 11 * 32 * 32
    row = result["rows"][1]
    assert row["ms"] == pytest.approx({"median": 1.0, "min": 1.0})
    assert row["tflop_per_s"] == pytest.approx(flops / 1e-3 / 1e12)
    assert row["gb_per_s"] == pytest.approx(moved / 1e-3 / 1e9)
    assert row["fraction_of_matmul"] == pytest.approx(row["tflop_per_s"] / 2.0)
    assert row["fraction_of_copy"] == pytest.approx(row["gb_per_s"] / 10.0)
    assert row["launch_ms"] is None
    lines = op_bench.table(result).splitlines()
    assert lines[0].startswith("linear_rmsnorm (o_proj), forward: float32, B=2")
    assert lines[2].split()[:3] == ["reference", "4.000", "2.000"]
    assert lines[3].endswith("4.00x")


def test_a_slow_race_gets_fewer_turns(contender):
    contender("swiglu", reference.swiglu)
    race = op_bench.set_up(case("swiglu", "channel", "tiny", dtype="float32"), "forward", CPU)
    race.run(5, seconds=0.0)
    assert [len(e.seconds) for e in race.entries] == [1, 1]


def test_poisoned_memory_ends_with_the_block():
    with op_bench.poisoned_memory():
        assert torch.empty_permuted((3,), (0,)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
