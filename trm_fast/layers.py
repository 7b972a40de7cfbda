"""Parameters of the network, under the published names, and their initial values.

Owns how weights are drawn, stored and handed to the recursion; computes nothing itself.
Imported by `model.py`. The names, shapes, dtypes and the order of random draws are those of the
published checkpoints, so that a state_dict of either loads in the other.

Dims legend: B batch, S tokens incl. prefix, D width, H heads, K head dim, F feed-forward width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from trm_fast.config import ModelConfig
from trm_fast.ops import AttentionWeights, BlockWeights, Rotary, TokenMixWeights


def truncated_normal_(tensor: Tensor, std: float) -> Tensor:
    """Fill in place from a normal cut at two sigma whose deviation after the cut is `std`.

    Args:
        tensor: any shape, any floating dtype; drawn in that dtype by one `uniform_`.
        std: deviation of the truncated variable, > 0.

    Source: the truncated normal of JAX's initializers (inverse error function of a uniform).
    """
    if tensor.is_meta:  # of which only the shape is wanted; PyTorch would import seconds for it
        return tensor
    bound, root2 = 2.0, math.sqrt(2)
    edge = math.erf(bound / root2)
    density = (2 * math.pi) ** -0.5 * math.exp(-0.5 * bound**2)
    sigma = std / math.sqrt(1 - 2 * bound * density / edge)
    with torch.no_grad():
        tensor.uniform_(-edge, edge).erfinv_().mul_(root2 * sigma)
        return tensor.clamp_(-bound * sigma, bound * sigma)


class Linear(nn.Module):
    """weight [out, in] float32, LeCun truncated normal."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(truncated_normal_(torch.empty(outputs, inputs), 1 / inputs**0.5))


class HaltingHead(Linear):
    """A Linear with a bias [out] that starts at "almost never halt": weight 0, bias -5."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)  # draws, so that what follows is drawn as published
        nn.init.zeros_(self.weight)
        self.bias = nn.Parameter(torch.full((outputs,), -5.0))


class Embedding(nn.Module):
    """embedding_weight [rows, D] float32."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        std = 1.0 / math.sqrt(width)
        self.embedding_weight = nn.Parameter(truncated_normal_(torch.empty(rows, width), std))


class PuzzleEmbedding(nn.Module):
    """One trainable row per puzzle, too many for a dense gradient.

    A training step copies the rows of its batch into `local_weights`, which receive the gradient;
    `optim.SparseEmbeddingSignSGD` writes them back. Buffers, and nothing else:
        weights [rows, width] float32, saved, zeros at first
        local_weights [batch, width] float32, requires grad, not saved
        local_ids [batch] int32, not saved
    """

    def __init__(self, rows: int, width: int, batch_size: int) -> None:
        super().__init__()
        self.weights = nn.Buffer(torch.zeros(rows, width))
        self.local_weights = nn.Buffer(
            torch.zeros(batch_size, width, requires_grad=True), persistent=False
        )
        self.local_ids = nn.Buffer(torch.zeros(batch_size, dtype=torch.int32), persistent=False)

    def forward(self, identifiers: Tensor) -> Tensor:
        """Rows [B, width] of identifiers [B] int; differentiable in training mode only.

        A batch smaller than the buffers fills the rest of them with its first puzzle, whose
        gradient they leave as it is; a larger one makes the buffers grow.
        """
        if not self.training:
            return self.weights[identifiers]
        batch, slots = len(identifiers), len(self.local_ids)
        if batch < slots and batch > 0:
            identifiers = torch.cat((identifiers, identifiers[:1].expand(slots - batch)))
        with torch.no_grad():
            if batch > slots:
                self._grow(batch)
            if batch > 0:
                self.local_weights.copy_(self.weights[identifiers])
                self.local_ids.copy_(identifiers)
        return self.local_weights[:batch]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PuzzleEmbedding:
        super()._apply(fn, recurse)
        if not self.local_weights.is_leaf:  # autograd saw the move to another device or dtype
            self._buffers["local_weights"] = self.local_weights.detach().requires_grad_()
        return self

    def _grow(self, slots: int) -> None:
        """More slots in the same two tensors, which the optimizer holds."""
        self.local_weights.grad = None
        wider = self.local_weights.new_empty(slots, self.weights.shape[1])
        # The graph of the step before may be alive and with it autograd's node of the old shape.
        # Only another dtype makes autograd drop that node.
        passing = torch.float32 if wider.dtype == torch.float16 else torch.float16
        self.local_weights.data = wider.to(passing)
        self.local_weights.data = wider
        self.local_ids.data = self.local_ids.new_empty(slots)


class RotaryTables(nn.Module):
    """cos_cached and sin_cached [S, K] float32, not saved; rotate-half convention."""

    def __init__(self, head_dim: int, tokens: int, base: float) -> None:
        super().__init__()
        inverse = 1.0 / (base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
        angles = torch.outer(torch.arange(tokens, dtype=torch.float32), inverse).repeat(1, 2)
        self.cos_cached = nn.Buffer(angles.cos(), persistent=False)
        self.sin_cached = nn.Buffer(angles.sin(), persistent=False)

    def tables(self) -> Rotary:
        return self.cos_cached, self.sin_cached


class SwiGLU(nn.Module):
    """gate_up_proj [2F, width], down_proj [width, F]."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(width, 2 * inner)
        self.down_proj = Linear(inner, width)


class Attention(nn.Module):
    """qkv_proj [3*H*K, D] with q, k, v head-major; o_proj [D, H*K]."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.qkv_proj = Linear(width, 3 * inner)
        self.o_proj = Linear(inner, width)


class Block(nn.Module):
    """A mixer over tokens (`self_attn` or `mlp_t`) and a SwiGLU over features (`mlp`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.mlp_t:
            self.mlp_t = SwiGLU(config.total_len, config.token_width)
        else:
            self.self_attn = Attention(config.hidden_size, config.attention_width)
        self.mlp = SwiGLU(config.hidden_size, config.channel_width)

    def weights(self) -> BlockWeights:
        mixer: AttentionWeights | TokenMixWeights
        if hasattr(self, "mlp_t"):
            mixer = TokenMixWeights(self.mlp_t.gate_up_proj.weight, self.mlp_t.down_proj.weight)
        else:
            mixer = AttentionWeights(self.self_attn.qkv_proj.weight, self.self_attn.o_proj.weight)
        return BlockWeights(mixer, self.mlp.gate_up_proj.weight, self.mlp.down_proj.weight)


class Network(nn.Module):
    """The blocks of one network, `layers.0` first."""

    def __init__(self, config: ModelConfig, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(layers))

    def weights(self) -> list[BlockWeights]:
        return [layer.weights() for layer in self.layers]  # type: ignore[operator]
