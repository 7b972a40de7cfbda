"""The matrix products of a step: how many operations they are, and PyTorch doing nothing else.

What the "matmuls only" contender runs: `torch.mm` on operands that lie contiguous and into results
that exist already, so neither allocation nor anything element-wise is in it; that is less than any
code on PyTorch's matrix products can do. Imported by `contenders.py` and `bench_report.py`.

Dims legend: B batch, S tokens incl. prefix, D width, F and F_t widths of the two SwiGLUs, V
vocabulary, K head dim; n rows, i inner width, o output width of one product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from trm_fast.config import ModelConfig


def useful_flops(config: ModelConfig, step: str) -> float:
    """Multiplications and additions of the matrix products of one step, nothing recomputed."""
    s, d = config.total_len, config.hidden_size
    channel = 3 * s * d * config.channel_width
    mixer = 3 * s * d * config.token_width if config.mlp_t else 4 * s * d * d + 2 * s * s * d
    block_pass = 2 * config.batch_size * config.L_layers * (channel + mixer)
    head = 2 * config.batch_size * s * d * config.vocab_size
    with_gradient = config.L_cycles + 1
    passes = config.H_cycles * with_gradient
    if step == "train":
        return float((passes + 2 * with_gradient) * block_pass + 3 * head)
    return float(passes * block_pass + head)


class _Linear:
    """y [n,o] = x [n,i] w^T, as F.linear calls it; backward dx and dw."""

    def __init__(self, n: int, i: int, o: int, dtype: torch.dtype, device: torch.device) -> None:
        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device).to(dtype)

        self.x, self.w, self.dy = draw(n, i), draw(o, i), draw(n, o)
        self.y, self.dx, self.dw = draw(n, o), draw(n, i), draw(o, i)

    def forward(self) -> None:
        torch.mm(self.x, self.w.t(), out=self.y)

    def backward(self) -> None:
        torch.mm(self.dy, self.w, out=self.dx)
        torch.mm(self.dy.t(), self.x, out=self.dw)


class _Attention:
    """Scores [B*H,S,S] = q k^T and p v; backward of both."""

    def __init__(self, c: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        s, heads = c.total_len, c.batch_size * c.num_heads

        def draw(width: int) -> torch.Tensor:
            return torch.randn(heads, s, width, device=device).to(dtype)

        k = c.hidden_size // c.num_heads
        self.q, self.k, self.v, self.dout, self.out, self.grad = (draw(k) for _ in range(6))
        self.p, self.scores = draw(s), draw(s)

    def forward(self) -> None:
        torch.bmm(self.q, self.k.transpose(1, 2), out=self.scores)
        torch.bmm(self.p, self.v, out=self.out)

    def backward(self) -> None:
        torch.bmm(self.p.transpose(1, 2), self.dout, out=self.grad)  # of v
        torch.bmm(self.dout, self.v.transpose(1, 2), out=self.scores)  # of p
        torch.bmm(self.p, self.k, out=self.grad)  # of q
        torch.bmm(self.p.transpose(1, 2), self.q, out=self.grad)  # of k


def matmuls(config: ModelConfig, step: str, device: torch.device) -> Callable[[], None]:
    """A function that does the step's matrix products: every pass forward; for "train" also the
    gradients of inputs and weights of the last cycle's passes. The halting head is left out."""
    b, s, d, dtype = (
        *(config.batch_size, config.total_len, config.hidden_size),
        getattr(torch, config.forward_dtype),
    )

    def linear(n: int, i: int, o: int) -> _Linear:
        return _Linear(n, i, o, dtype, device)

    layers: list[_Linear | _Attention] = []
    for _ in range(config.L_layers):
        if config.mlp_t:
            layers += [
                linear(b * d, s, 2 * config.token_width),
                linear(b * d, config.token_width, s),
            ]
        else:
            layers += [linear(b * s, d, 3 * d), _Attention(config, dtype, device)]
            layers += [linear(b * s, d, d)]
        layers += [linear(b * s, d, 2 * config.channel_width)]
        layers += [linear(b * s, config.channel_width, d)]
    head = linear(b * s, d, config.vocab_size)
    with_gradient = config.L_cycles + 1

    @torch.no_grad()
    def run() -> None:
        for _ in range(config.H_cycles * with_gradient):
            for one in layers:
                one.forward()
        head.forward()
        if step == "train":
            head.backward()
            for _ in range(with_gradient):
                for one in reversed(layers):
                    one.backward()

    return run
