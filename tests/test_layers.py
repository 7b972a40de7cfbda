"""Parameters: how they are drawn, what they are called, and the rows of puzzles."""

import math

import pytest
import torch
from parity import assert_parity, make_inputs
from tiny import tiny_config

from trm_fast.config import ModelConfig
from trm_fast.layers import (
    Attention,
    Block,
    Embedding,
    HaltingHead,
    Linear,
    Network,
    PuzzleEmbedding,
    RotaryTables,
    SwiGLU,
    truncated_normal_,
)
from trm_fast.ops import AttentionWeights, TokenMixWeights
from trm_fast.optim import SparseEmbeddingSignSGD


@pytest.mark.parametrize("std", [0.02, 1.0])
def test_truncated_normal_has_the_deviation_asked_for(std):
    drawn = truncated_normal_(torch.empty(200_000), std)
    # A unit normal cut at 2 has the deviation 0.8796, so the cut is at 2 / 0.8796 of the wanted.
    bound = 2 / 0.8796256610342398 * std
    assert drawn.abs().max().item() <= bound * (1 + 1e-6)
    assert drawn.abs().max().item() > 0.99 * bound
    assert drawn.std().item() == pytest.approx(std, rel=0.01)
    assert drawn.mean().item() == pytest.approx(0, abs=0.01 * std)
    # 0.6827 of a normal lies within one sigma, 0.9545 within the cut.
    inside = (drawn.abs() < bound / 2).double().mean().item()
    assert inside == pytest.approx(0.6826895 / 0.9544997, abs=0.005)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_truncated_normal_draws_once_in_the_dtype_of_the_tensor(dtype):
    torch.manual_seed(3)
    drawn = truncated_normal_(torch.empty(64, dtype=dtype), 0.5)
    after = torch.rand(())
    torch.manual_seed(3)
    edge = math.erf(math.sqrt(2))
    uniform = torch.empty(64, dtype=dtype).uniform_(-edge, edge)
    assert torch.equal(torch.rand(()), after)
    exact = torch.erfinv(uniform.double()) * math.sqrt(2) * 0.5 / 0.8796256610342398
    assert drawn.dtype == dtype
    assert_parity(drawn, exact)


def test_truncated_normal_of_a_parameter_records_no_gradient():
    weight = torch.nn.Parameter(torch.zeros(4))
    assert truncated_normal_(weight, 1.0).grad_fn is None
    assert weight.abs().sum() > 0


def test_linear_and_embedding_deviations():
    assert Linear(64, 3000).weight.shape == (3000, 64)
    assert Linear(64, 3000).weight.std().item() == pytest.approx(1 / 8, rel=0.02)
    table = Embedding(3000, 64).embedding_weight
    assert table.shape == (3000, 64)
    assert table.std().item() == pytest.approx(1 / 8, rel=0.02)


def test_halting_head_starts_at_almost_never_but_draws_like_a_linear():
    torch.manual_seed(0)
    head = HaltingHead(8, 2)
    after = torch.rand(())
    torch.manual_seed(0)
    Linear(8, 2)
    assert torch.equal(torch.rand(()), after)
    assert torch.equal(head.weight, torch.zeros(2, 8))
    assert torch.equal(head.bias, torch.full((2,), -5.0))


@pytest.mark.parametrize("base", [10000.0, 500.0])
def test_rotary_tables(base):
    module = RotaryTables(head_dim=6, tokens=50, base=base)
    cos, sin = module.tables()
    for table, function in ((cos, math.cos), (sin, math.sin)):
        assert (table.shape, table.dtype) == ((50, 6), torch.float32)
        want = [[function(s / base ** (2 * (i % 3) / 6)) for i in range(6)] for s in range(50)]
        torch.testing.assert_close(table, torch.tensor(want), atol=2e-6, rtol=0)
    assert module.state_dict() == {}


def test_shapes_and_names_of_the_blocks():
    assert {n: tuple(p.shape) for n, p in SwiGLU(8, 12).named_parameters()} == {
        "gate_up_proj.weight": (24, 8),
        "down_proj.weight": (8, 12),
    }
    assert {n: tuple(p.shape) for n, p in Attention(8, 6).named_parameters()} == {
        "qkv_proj.weight": (18, 8),
        "o_proj.weight": (8, 6),
    }
    config = ModelConfig.from_dict(tiny_config(intermediate_size=20))
    block = Block(config)
    assert {n.partition(".")[0] for n, _ in block.named_parameters()} == {"self_attn", "mlp"}
    weights = block.weights()
    assert isinstance(weights.mixer, AttentionWeights)
    assert weights.mixer.qkv is block.self_attn.qkv_proj.weight
    assert weights.mixer.out is block.self_attn.o_proj.weight
    assert weights.gate_up is block.mlp.gate_up_proj.weight
    assert weights.down is block.mlp.down_proj.weight
    assert weights.down.shape == (16, 20)


def test_token_mixing_block():
    config = ModelConfig.from_dict(tiny_config(mlp_t=True, token_intermediate_size=7))
    block = Block(config)
    assert {n.partition(".")[0] for n, _ in block.named_parameters()} == {"mlp_t", "mlp"}
    mixer = block.weights().mixer
    assert isinstance(mixer, TokenMixWeights)
    assert mixer.gate_up is block.mlp_t.gate_up_proj.weight
    assert mixer.down is block.mlp_t.down_proj.weight
    assert (mixer.gate_up.shape, mixer.down.shape) == ((14, 12), (12, 7))


def test_network_hands_out_its_blocks_in_order():
    network = Network(ModelConfig.from_dict(tiny_config(L_layers=2)), 3)
    weights = network.weights()
    assert len(weights) == 3
    for i, block in enumerate(weights):
        assert block.down is network.layers[i].mlp.down_proj.weight
    assert "layers.2.self_attn.qkv_proj.weight" in network.state_dict()


def rows(count=10, width=4, batch_size=4):
    module = PuzzleEmbedding(count, width, batch_size)
    module.weights.copy_(torch.arange(count * width).view(count, width))
    return module


def test_puzzle_rows_start_at_zero_in_three_buffers():
    module = PuzzleEmbedding(10, 4, 3)
    assert [name for name, _ in module.named_buffers()] == ["weights", "local_weights", "local_ids"]
    assert list(module.parameters()) == []
    assert list(module.state_dict()) == ["weights"]
    assert torch.equal(module.weights, torch.zeros(10, 4))
    assert module.local_weights.requires_grad
    assert (module.local_weights.shape, module.local_ids.dtype) == ((3, 4), torch.int32)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_puzzle_rows_in_evaluation(dtype):
    module = rows().eval()
    ids = torch.tensor([7, 0, 7, 3, 2, 1], dtype=dtype)
    out = module(ids)
    assert torch.equal(out, module.weights[ids.long()])
    assert not out.requires_grad
    assert torch.equal(module.local_ids, torch.zeros(4, dtype=torch.int32))


@pytest.mark.parametrize("ids", [[7, 0, 7, 3], [5, 6], [9, 8, 7, 6, 5, 5, 0]], ids=len)
def test_puzzle_rows_in_training_for_any_batch(ids):
    module = rows()
    identifiers = torch.tensor(ids, dtype=torch.int32)
    out = module(identifiers)
    assert torch.equal(out, module.weights[identifiers.long()])
    assert torch.equal(module.local_ids[: len(ids)], identifiers)
    upstream = make_inputs((len(ids), 4))[0]
    out.backward(upstream)
    assert torch.equal(module.local_weights.grad[: len(ids)], upstream)
    assert torch.equal(module.local_weights.grad[len(ids) :], torch.zeros(max(0, 4 - len(ids)), 4))
    assert module.weights.grad is None


def test_row_update_touches_exactly_the_rows_used():
    """By the optimizer made before the batch size changed: smaller, larger, smaller again."""
    module = rows()
    optimizer = SparseEmbeddingSignSGD(module.buffers(), lr=0.5, weight_decay=0.1)
    for ids in ([3, 3, 1, 0], [5], [9, 8, 7, 9, 5, 4], [2, 6]):
        before = module.weights.clone()
        optimizer.zero_grad()
        out = module(torch.tensor(ids, dtype=torch.int32))
        upstream = make_inputs(out.shape, seed=len(ids))[0]
        out.backward(upstream)
        optimizer.step()
        want = before.clone()
        for identifier in set(ids):
            total = sum(upstream[i] for i, other in enumerate(ids) if other == identifier)
            want[identifier] = before[identifier] * (1 - 0.5 * 0.1) - 0.5 * total.sign()
        torch.testing.assert_close(module.weights, want)


@pytest.mark.parametrize("where", ["meta", torch.float64], ids=str)
def test_rows_still_take_their_gradient_on_another_device_or_dtype(where):
    emb = PuzzleEmbedding(5, 4, 3).to(where).train()
    rows = emb.local_weights
    assert (
        rows.is_leaf and rows.requires_grad and rows is dict(emb.named_buffers())["local_weights"]
    )
    emb(torch.tensor([0, 4, 0], device=rows.device)).sum().backward()
    assert rows.grad.shape == (3, 4)
    assert list(emb.state_dict()) == ["weights"]


def test_no_puzzles_at_all():
    module = rows()
    assert module(torch.zeros(0, dtype=torch.int32)).shape == (0, 4)
    assert module.eval()(torch.zeros(0, dtype=torch.int32)).shape == (0, 4)


def test_an_unknown_puzzle_is_an_error():
    for module in (rows(), rows().eval()):
        with pytest.raises(IndexError):
            module(torch.tensor([10], dtype=torch.int32))
