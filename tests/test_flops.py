"""The arithmetic of matrix products: against the published table, and against what really runs."""

import math
from dataclasses import replace

import pytest
import torch
from tiny import MIXERS, loss_of, tiny_batch, tiny_config, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from trm_fast import backends, flops
from trm_fast.config import ModelConfig
from trm_fast.flops import device_peak, step_flops
from trm_fast.ops import POLICIES
from trm_fast.workloads import CASES

SIZES = {"hidden_size": 32, "seq_len": 13, "L_layers": 2, "L_cycles": 3, "halt_max_steps": 3}
MLP_T = CASES["official"].model
ATTENTION = CASES["attention"].model
MAZE = replace(ATTENTION, seq_len=900, L_cycles=4)
NANO = replace(MLP_T, puzzle_emb_ndim=0, puzzle_emb_len=0)


@pytest.mark.parametrize(
    ("config", "batch", "tera", "giga"),
    [
        (MLP_T, 768, 32.81, 25.6),
        (ATTENTION, 768, 36.68, 28.6),
        (MAZE, 768, 312.3, 238.9),
        (NANO, 768, 23.97, 18.7),
    ],
    ids=["mlp_t", "attention", "maze", "81-tokens"],
)
def test_the_table_of_the_design(config, batch, tera, giga):
    """Operations of a train step, and of one inference step of one board."""
    assert step_flops(config, "train", batch, scores_again=True) / 1e12 == pytest.approx(
        tera, rel=3e-4
    )
    assert step_flops(config, "inference", 1) / 1e9 == pytest.approx(giga, rel=3e-3)
    assert step_flops(config, "solve", 1) == 16 * step_flops(config, "inference", 1)


def test_the_maze_step_at_the_rate_of_large_products():
    ms = step_flops(MAZE, "train", 192, scores_again=True) / 790e12 * 1e3
    assert ms == pytest.approx(98.8, abs=0.1)


def test_useful_leaves_out_what_is_made_again():
    """Of attention half a core of each block and pass with gradient; of token mixing nothing."""
    core = 4 * 768 * 97 * 97 * 512
    found = [step_flops(ATTENTION, "train", 768, scores_again=again) for again in (True, False)]
    assert found[0] - found[1] == 7 * 2 * core // 2
    assert step_flops(MLP_T, "train") == step_flops(MLP_T, "train", scores_again=True)


def test_one_board_at_a_time_adds_up():
    """342 GFLOP: 35 passes of two blocks of 610 MFLOP per board, and the heads, 8 boards."""
    block, head = 2 * 97 * 512 * 3 * (1536 + 512), 2 * (97 * 512 * 11 + 512 * 2)
    assert step_flops(MLP_T, "train") == 8 * (35 * 2 * block + 3 * head)
    assert step_flops(MLP_T, "inference") == 8 * (21 * 2 * block + head)
    assert step_flops(MLP_T, "train", 1) * 8 == step_flops(MLP_T, "train")
    with pytest.raises(ValueError, match="step must be one of train, inference, solve, got 'eval'"):
        step_flops(MLP_T, "eval")


def counted(model, batch, train):
    """What PyTorch's counter finds in one supervision step, of which the formulas know all."""
    model.train(train)
    carry = model.initial_carry(batch)
    with FlopCounterMode(display=False) as counter, torch.inference_mode(not train):
        loss = loss_of(model(carry, batch)[1])
        if train:
            loss.backward()
    total, config = counter.get_total_flops(), model.config
    if not train and config.forward_dtype == "float32":
        # Not a product of matrices then, so that a board's q is the same in every batch.
        total += 2 * len(batch["inputs"]) * config.hidden_size * config.q_logits
    return total


@pytest.mark.parametrize("train", [True, False], ids=["train", "inference"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_backend_counts_as_plain_pytorch_does(mixer, dtype, train, extension):
    changes = MIXERS[mixer] | SIZES | {"forward_dtype": dtype}
    batch = tiny_batch(3, length=13)
    want = step_flops(
        ModelConfig.from_dict(tiny_config(**changes)), "train" if train else "inference", 3, True
    )
    found = {
        backend: counted(tiny_model(**changes, backend=backend), batch, train)
        for backend in ("reference", "cpp")
    }
    assert found == {"reference": want, "cpp": want}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mixer", MIXERS)
def test_operations_count_what_is_useful_under_every_policy(mixer, policy, extension):
    """Plain PyTorch really makes products again, and has them counted."""
    changes = MIXERS[mixer] | SIZES | {"policy": policy}
    batch = tiny_batch(2, length=13)
    config = ModelConfig.from_dict(tiny_config(**changes))
    want = step_flops(config, "train", 2, scores_again=True)
    assert counted(tiny_model(**changes, backend="cpp"), batch, True) == want
    plain = counted(tiny_model(**changes, backend="reference"), batch, True)
    assert (plain > want) == (policy != "save")


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_operations_one_by_one(mixer, extension):
    """The recursion composed of the other operations."""
    model = tiny_model(**MIXERS[mixer], **SIZES)
    model.inner.ops = replace(
        backends.table("cpp"), deep_recursion=backends.table("reference").deep_recursion
    )
    want = step_flops(model.config, "train", 3, scores_again=True)
    assert counted(model, tiny_batch(3, length=13), True) == want


@pytest.mark.parametrize("policy", ["save", "recompute"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_triton_operations_count_without_running(mixer, policy):
    """On tensors without data, where no kernel is launched."""
    pytest.importorskip("triton")
    config = ModelConfig.from_dict(tiny_config(**MIXERS[mixer], **SIZES, policy=policy))
    want = step_flops(config, "train", 3, scores_again=True)
    ops = backends.table("triton")
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = tiny_model(**MIXERS[mixer], **SIZES, policy=policy)
        model.inner.ops = ops
        assert counted(model, tiny_batch(3, length=13), True) == want


def test_the_backward_in_place_counts_as_the_other_one():
    """It is given the gradients of the weights before the weights."""
    weights = [(24, 7), (7, 12), (40, 16), (16, 20)]
    settings = (None, None, True, 2, 3, 1, 1e-5, "save")
    want = 4 * 2 * (6 * 3 * 7 * 16 * 12 + 6 * 3 * 7 * 16 * 20)
    assert flops._recursion_bwd((3, 7, 16), [], weights, *settings) == want
    assert flops._recursion_bwd_in_place((3, 7, 16), [], [], weights, *settings) == want


def test_every_operation_with_products_has_a_formula(extension):
    for backend in ("cpp", "triton"):
        backends.table(backend)
    for name in flops.FORMULAS:
        for namespace in flops.NAMESPACES:
            packet = getattr(getattr(torch.ops, namespace), name, None)
            assert packet is None or packet in flop_registry
    assert torch.ops.trm_fast_ext.deep_recursion_int8 in flop_registry


@pytest.mark.parametrize("mixer", MIXERS)
def test_products_in_eight_bits(mixer, extension):
    changes = MIXERS[mixer] | SIZES | {"quantize": "int8", "backend": "cpp"}
    model = tiny_model(**changes).eval()
    want = step_flops(model.config, "inference", 3)
    assert counted(model, tiny_batch(3, length=13), train=False) == want


def test_registering_again_changes_nothing():
    before = dict(flop_registry)
    flops.register_formulas()
    assert {k: flop_registry[k] for k in before} == before


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA GeForce RTX 3080", None),  # two cards of one name
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("", None),
    ],
)
def test_a_gpu_is_known_by_its_whole_name(name, rate):
    found = device_peak(name)
    assert (found and found.tflop_per_s) == rate


@pytest.mark.parametrize("kind", [("H100 80GB HBM3", "H200"), ("H100 NVL", "H200 NVL")])
def test_of_one_generation_the_memory_differs_and_the_rate_does_not(kind):
    older, newer = (flops.PEAKS[name] for name in kind)
    assert older.tflop_per_s == newer.tflop_per_s
    assert older.gb_per_s < newer.gb_per_s


def test_peaks_are_finite_and_positive():
    assert all(math.isfinite(x) and x > 0 for peak in flops.PEAKS.values() for x in peak)
