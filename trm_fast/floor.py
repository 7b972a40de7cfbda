"""The matrix products of a step, and PyTorch doing nothing else.

What the "matmuls only" contender runs: `torch.mm` on operands that lie contiguous and into results
that exist already, so neither allocation nor anything element-wise is in it; that is less than any
code on PyTorch's matrix products can do. Imported by `contenders.py`.

Dims legend: B batch, S tokens incl. prefix, D width, F and F_t widths of the two SwiGLUs, V
vocabulary, K head dim; n rows, i inner width, o output width of one product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from trm_fast.config import ModelConfig


class _Room:
    """Random tensors, one of each shape for a purpose, which all layers share: a floor needs no
    values of its own, and a GPU would be full of them."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._found: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self._device, dtype=self._dtype)

    def shared(self, purpose: str, *shape: int) -> torch.Tensor:
        key = purpose, shape
        if key not in self._found:
            self._found[key] = self.draw(*shape)
        return self._found[key]


class _Linear:
    """y [n,o] = x [n,i] w^T, as F.linear calls it; backward dx and dw."""

    def __init__(self, n: int, i: int, o: int, room: _Room, train: bool) -> None:
        self.x, self.w, self.y = room.shared("in", n, i), room.draw(o, i), room.shared("out", n, o)
        if train:
            self.dy, self.dx = room.shared("gradient", n, o), room.shared("out", n, i)
            self.dw = room.draw(o, i)

    def forward(self) -> None:
        torch.mm(self.x, self.w.t(), out=self.y)

    def backward(self) -> None:
        torch.mm(self.dy, self.w, out=self.dx)
        torch.mm(self.dy.t(), self.x, out=self.dw)


class _Attention:
    """Scores [B*H,S,S] = q k^T and p v; backward of both."""

    def __init__(self, c: ModelConfig, room: _Room) -> None:
        s, heads = c.total_len, c.batch_size * c.num_heads
        k = c.hidden_size // c.num_heads
        self.q, self.k, self.v, self.dout, self.out, self.grad = (
            room.shared(name, heads, s, k) for name in ("q", "k", "v", "gradient", "out", "grad")
        )
        self.p, self.scores = room.shared("in", heads, s, s), room.shared("out", heads, s, s)

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
    gradients of inputs and weights of the last cycle's passes; for "solve" all forward passes
    halt_max_steps times. `flops.step_flops` counts them."""
    b, s, d, dtype = (
        *(config.batch_size, config.total_len, config.hidden_size),
        getattr(torch, config.forward_dtype),
    )

    def linear(n: int, i: int, o: int) -> _Linear:
        return _Linear(n, i, o, room, step == "train")

    room = _Room(dtype, device)
    layers: list[_Linear | _Attention] = []
    for _ in range(config.L_layers):
        if config.mlp_t:
            layers += [
                linear(b * d, s, 2 * config.token_width),
                linear(b * d, config.token_width, s),
            ]
        else:
            layers += [linear(b * s, d, 3 * d), _Attention(config, room)]
            layers += [linear(b * s, d, d)]
        layers += [linear(b * s, d, 2 * config.channel_width)]
        layers += [linear(b * s, config.channel_width, d)]
    heads = [linear(b * s, d, config.vocab_size), linear(b, d, config.q_logits)]
    repeats = config.halt_max_steps if step == "solve" else 1
    with_gradient = config.L_cycles + 1

    @torch.no_grad()
    def run() -> None:
        for _ in range(repeats):
            for _ in range(config.H_cycles * with_gradient):
                for one in layers:
                    one.forward()
            for head in heads:
                head.forward()
        if step == "train":
            for head in heads:
                head.backward()
            for _ in range(with_gradient):
                for one in reversed(layers):
                    one.backward()

    return run
