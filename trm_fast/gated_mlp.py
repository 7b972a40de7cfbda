"""The gated residual-MLP network of s4nj1th/tiny-recursive-model, for Sudoku.

Owns its weights, under the names of that project's checkpoints, and both of its recursions. One
state holds the whole board; with `cell_attention` there is one for each cell, and the cells attend
to each other. All cycles have a gradient, nothing is carried from one supervision step to the next,
and there is no halting head: q is what the answer's own probabilities say. Imported by `model.py`.

Dims legend: B batch, L cells, C = digits + 1 input channels (empty, then the digits), D width,
N states of a board (1, or L with cell attention), F inner width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from trm_fast.config import ModelConfig
from trm_fast.recursion import AnyState, NoState
from trm_fast.reference import direct, norm_dtype, recomputed
from trm_fast.served import Served

__all__ = ["GatedMLP"]

OUTPUT_BLOCKS = 2
NEVER = -1e4  # logit of a token that no answer has; by softmax its probability is 0 in any dtype


def linear(module: nn.Linear, h: Tensor) -> Tensor:
    """[..., in] -> [..., out] in the dtype of h."""
    return F.linear(h, module.weight.to(h.dtype), module.bias.to(h.dtype))


def normed(module: nn.LayerNorm, h: Tensor) -> Tensor:
    """[..., D] -> [..., D] in the dtype of h, computed in float32 at least."""
    wide = h.to(norm_dtype(h.dtype))
    scale, shift = module.weight.to(wide.dtype), module.bias.to(wide.dtype)
    return F.layer_norm(wide, module.normalized_shape, scale, shift, module.eps).to(h.dtype)


class ResidualMLP(nn.Module):
    """What a block adds to states [..., D]: norm, D -> F, GELU, F -> D. Names: net.0, net.1,
    net.4."""

    def __init__(self, width: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, inner),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(inner, width),
            nn.Dropout(dropout),
        )

    def forward(self, h: Tensor) -> Tensor:
        norm, widen, gelu, drop, narrow, drop_again = self.net
        inner = drop(gelu(linear(widen, normed(norm, h))))  # type: ignore[arg-type]
        return drop_again(linear(narrow, inner))  # type: ignore[arg-type]


class CellAttention(nn.Module):
    """What attention among the cells adds to their states [B, L, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.o_proj = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        qkv = linear(self.qkv_proj, normed(self.norm, h))
        q, k, v = rearrange(qkv, "b l (n h k) -> n b h l k", n=3, h=self.heads).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v)
        return linear(self.o_proj, rearrange(attended, "b h l k -> b l (h k)"))


class GatedMLP(Served):
    """One supervision step; the interface is that of `model.InnerModel`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        width, cells, channels = config.hidden_size, config.seq_len, config.vocab_size - 1
        inner = round(config.expansion * width)
        whole = 1 if config.cell_attention else cells

        def stack(blocks: int) -> nn.ModuleList:
            made = (ResidualMLP(width, inner, config.dropout) for _ in range(blocks))
            return nn.ModuleList(made)

        # In this order the initial weights of a seed are those of the original.
        self.input_proj = nn.Linear(whole * channels, width)
        self.latent_layers = stack(config.L_layers)
        self.output_layers = stack(OUTPUT_BLOCKS)
        self.output_proj = nn.Linear(width, whole * (channels - 1))
        start = torch.tensor(0.0) if config.semantics == "head" else torch.ones(1)
        shape = (width,) if config.vector_gates else start.shape
        self.latent_gate = nn.Parameter(start.expand(shape).clone())
        self.output_gate = nn.Parameter(start.expand(shape).clone())
        if config.cell_attention:
            self.positions = nn.Parameter(torch.randn(cells, width) / width**0.5)
            self.latent_attention = nn.ModuleList(
                CellAttention(width, config.num_heads) for _ in range(config.L_layers)
            )
        self.serve()

    def like(self) -> Tensor:
        return torch.empty((), dtype=self.forward_dtype, device=self.input_proj.weight.device)

    def empty_carry(self, batch_size: int) -> AnyState:
        """Nothing."""
        self.policy(batch_size)
        return NoState()

    def reset_carry(self, reset_flag: Tensor, carry: AnyState) -> AnyState:
        return carry

    def _gate(self, gate: Tensor) -> Tensor:
        return (gate.sigmoid() if self.config.semantics == "head" else gate).to(self.forward_dtype)

    def _latent(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """A better latent, given question and answer."""
        h, gate = x + y + z, self._gate(self.latent_gate)
        for index, block in enumerate(self.latent_layers):
            if self.config.cell_attention:
                h = h + gate * self.latent_attention[index](h)
            h = h + gate * block(h)
        return h

    def _output(self, y: Tensor, z: Tensor) -> Tensor:
        """A better answer, given the latent."""
        h, gate = y + z, self._gate(self.output_gate)
        for block in self.output_layers:
            h = h + gate * block(h)
        return h

    def _embedded(self, tokens: Tensor) -> Tensor:
        """Tokens [B, L] as x [B, N, D]; padding is no channel at all."""
        channels = self.config.vocab_size - 1
        onehot = F.one_hot(tokens.long(), channels + 1)[..., 1:].to(self.forward_dtype)
        if not self.config.cell_attention:
            return linear(self.input_proj, onehot.flatten(1)).unsqueeze(1)
        return linear(self.input_proj, onehot) + self.positions.to(self.forward_dtype)

    def _recursed(self, x: Tensor, batch: int) -> Tensor:
        config = self.config
        run: Callable[..., Tensor] = direct
        if torch.is_grad_enabled() and self.policy(batch) != "save":
            run = partial(recomputed, draws=config.dropout > 0)
        if config.semantics == "head":
            y = z = x
            for _ in range(1 + config.H_cycles):
                z = run(self._latent, x, y, z)
                y = run(self._output, y, z)
            return y
        y = z = torch.zeros_like(x)
        for _ in range(config.H_cycles):
            for _ in range(config.L_cycles):
                z = run(self._latent, x, y, z)
            y = run(self._output, y, z)
        return y

    def forward(
        self, carry: AnyState, batch: dict[str, Tensor], halted: Tensor | None = None
    ) -> tuple[AnyState, Tensor, tuple[Tensor, Tensor | None]]:
        """Logits [B, L, V] of "inputs" [B, L] int, tokens as everywhere: 0 padding, 1 empty, digit
        d as d + 1; the first two are never the answer. And the log odds [B] float32 that all cells
        are right, if each were right with the probability it gives itself; without a gradient."""
        tokens = batch["inputs"]
        y = self._recursed(self._embedded(tokens), len(tokens))
        digits = linear(self.output_proj, y).reshape(*tokens.shape, self.config.vocab_size - 2)
        logits = F.pad(digits, (2, 0), value=NEVER)
        return carry, logits, (_log_odds(digits.detach()), None)


def _log_odds(logits: Tensor) -> Tensor:
    """Of [B, L, digits]: the product of the cells' highest probabilities, as log odds [B]."""
    highest = logits.float().log_softmax(-1).amax(-1).sum(-1)
    sure = highest.clamp_max(-1e-6)
    return sure - torch.log(-torch.expm1(sure))
