"""One pass of the network forward and backward, by hand, on the fused kernels.

Owns what `deep_recursion` strings together: `Network` (packed weights and settings), the tape that
a pass writes for its backward, `forward` and `backward`, and the weight gradients. Nothing here is
tracked by autograd. Norms over features are deferred: a state is a sum and its rows' squares.
Imported by `deep_recursion`.

Dims legend: B batch, S tokens incl. prefix, D width, N = B*S rows, F inner width (F' rounded up to
whole 16s), S' tokens rounded up likewise, H heads, P passes, T tiles of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from trm_fast.kernels import swiglu_rmsnorm, token_mix
from trm_fast.kernels._common import round_up, weight_grad
from trm_fast.kernels.linear_rmsnorm import linear, new_squares
from trm_fast.kernels.residual_rmsnorm import finish_norm, norm_bwd
from trm_fast.kernels.rope_attention import new_lse, rope_attention_bwd, rope_attention_fwd
from trm_fast.kernels.swiglu_rmsnorm import (
    ChannelE4M3,
    gate_up,
    pack_e4m3,
    swiglu_bwd,
    swiglu_e4m3,
)
from trm_fast.kernels.token_mix import token_mix_bwd, token_mix_fwd

WEIGHTS = 4  # of a block: the mixer's two, gate_up, down


class State(NamedTuple):
    """rms_norm(total) if there is `ssq`, the norm not taken yet; else total itself. [N, D]."""

    total: Tensor
    ssq: Tensor | None


class Block(NamedTuple):
    """Packed weights: of the mixer (token_mix.pack, or qkv and out), of SwiGLU.

    e4m3: of SwiGLU, where its products are made in 8 bits.
    """

    mixer: tuple[Tensor, Tensor]
    gate_up: Tensor
    down: Tensor
    e4m3: ChannelE4M3 | None = None


@dataclass(frozen=True)
class Network:
    """Everything that every pass of one call shares."""

    blocks: tuple[Block, ...]
    shape: tuple[int, int, int]
    mlp_t: bool
    heads: int
    eps: float
    cos: Tensor | None
    sin: Tensor | None

    @staticmethod
    def pack(
        weights: Sequence[Tensor],
        like: Tensor,
        mlp_t: bool,
        heads: int,
        eps: float,
        rotary: tuple[Tensor | None, Tensor | None],
    ) -> Network:
        """From master weights, four a block, for states [B,S,D] like `like`, in its dtype."""
        blocks = []
        for first in range(0, len(weights), WEIGHTS):
            a, b, w_gate_up, w_down = weights[first : first + WEIGHTS]
            if mlp_t:
                mixer = token_mix.pack(a, b, like.dtype)
            else:
                mixer = (a.to(like.dtype), b.to(like.dtype))
            blocks.append(Block(mixer, *swiglu_rmsnorm.pack(w_gate_up, w_down, like.dtype)))
        batch, tokens, width = like.shape
        return Network(tuple(blocks), (batch, tokens, width), mlp_t, heads, eps, *rotary)

    def in_e4m3(self, weights: Sequence[Tensor]) -> Network:
        """The same with SwiGLU over the features in 8 bits, of these master weights."""
        _, tokens, width = self.shape
        count = tokens if self.mlp_t else width  # numbers of the norm in front of it
        channel = zip(weights[2::WEIGHTS], weights[3::WEIGHTS], strict=True)
        blocks = tuple(
            block._replace(e4m3=pack_e4m3(w_gate_up, w_down, count))
            for block, (w_gate_up, w_down) in zip(self.blocks, channel, strict=True)
        )
        return replace(self, blocks=blocks)


@dataclass
class Tape:
    """What the backward of one block reads. None is what this mixer or policy does not keep.

    Attributes:
        s: the block's input [N, D]; of attention the first block's only, for a later block's is
            the total of the block before.
        qkv [N, 3D], out [N, D], lse: attention.  rstd [B, D] float32: token mixing.
        mid: the mixer's output [N, D]: token mixing, normed; attention, the sum before the norm.
        mid_ssq [T, N] float32: its deferred norm (attention).
        gu: gate and up [N, 2, F'].
        total [N, D], ssq [T, N] float32: the block's output, its norm deferred.
    """

    mid: Tensor
    total: Tensor
    ssq: Tensor
    s: Tensor | None = None
    rstd: Tensor | None = None
    qkv: Tensor | None = None
    out: Tensor | None = None
    lse: Tensor | None = None
    mid_ssq: Tensor | None = None
    gu: Tensor | None = None

    def of_pass(self, index: int) -> Tape:
        """The tape of one pass, from one whose tensors have a leading axis P."""
        tensors = {name: t[index] for name, t in self.named()}
        return Tape(**tensors)

    def named(self) -> list[tuple[str, Tensor]]:
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        return [(name, t) for name, t in pairs if t is not None]

    def tensors(self) -> list[Tensor]:
        return [t for _, t in self.named()]


def tape_fields(mlp_t: bool, block: int, with_gu: bool) -> list[str]:
    """The names that `Tape.named` gives for a block, in its order."""
    kept = {"mid", "total", "ssq"} | ({"rstd"} if mlp_t else {"qkv", "out", "lse", "mid_ssq"})
    if mlp_t or not block:
        kept.add("s")
    if with_gu:
        kept.add("gu")
    return [field.name for field in fields(Tape) if field.name in kept]


def new_tape(
    like: Tensor, mlp_t: bool, heads: int, block: int, inner: int, passes: int, with_gu: bool
) -> Tape:
    """Empty tape of one block over `passes` passes: every tensor with a leading axis P."""
    batch, tokens, width = like.shape
    count = batch * tokens
    squares = new_squares(like, count, width)
    shapes = {
        "mid": (count, width),
        "total": (count, width),
        "s": (count, width),
        "out": (count, width),
        "qkv": (count, 3 * width),
        "gu": (count, 2, round_up(inner)),
    }
    wide = {"rstd": (batch, width), "ssq": squares.shape, "mid_ssq": squares.shape}
    if not mlp_t:
        wide["lse"] = new_lse(like, heads)
    made = {}
    for name in tape_fields(mlp_t, block, with_gu):
        shape, dtype = (shapes[name], like.dtype) if name in shapes else (wide[name], torch.float32)
        made[name] = like.new_empty(passes, *shape, dtype=dtype)
    return Tape(**made)


def forward(
    net: Network, state: State, add: Tensor | None, a: Tensor, tapes: Sequence[Tape] | None
) -> State:
    """network(state + add).

    Args:
        add: what is injected, [N, D], or None.
        a: scratch of [N, F'].
        tapes: one per block, that takes what `backward` reads; None: nothing is kept.
    """
    mix = _token_mix if net.mlp_t else _attention
    for i, block in enumerate(net.blocks):
        tape = tapes[i] if tapes else None
        mid, mid_ssq = mix(net, block, state, add, tape)
        add = None
        if block.e4m3 is not None:
            assert tape is None, "a gradient needs the products as they are"
            state = State(*swiglu_e4m3(mid, block.e4m3, mid_ssq, net.eps))
            continue
        gate_up(mid, block.gate_up, a=a, gu=tape.gu if tape else None, ssq=mid_ssq, eps=net.eps)
        total, ssq = linear(
            a, block.down, mid, h_ssq=mid_ssq, eps=net.eps,
            squares=tape.ssq if tape else True, out=tape.total if tape else None,
        )  # fmt: skip
        state = State(total, ssq)
    return state


def _token_mix(
    net: Network, block: Block, state: State, add: Tensor | None, tape: Tape | None
) -> tuple[Tensor, None]:
    shape, out = net.shape, None
    if tape:
        assert tape.s is not None and tape.rstd is not None
        out = (tape.mid.view(shape), tape.rstd, tape.s.view(shape))
    mid, _, _ = token_mix_fwd(
        state.total.view(shape), *block.mixer, net.eps, ssq=state.ssq,
        add=None if add is None else add.view(shape), keep=tape is not None, out=out,
    )  # fmt: skip
    return mid.view(-1, shape[2]), None


def _attention(
    net: Network, block: Block, state: State, add: Tensor | None, tape: Tape | None
) -> tuple[Tensor, Tensor | None]:
    w_qkv, w_out = block.mixer
    shape, width = net.shape, net.shape[2]
    if add is not None:
        state = _injected(state, add, net.eps, tape.s if tape else None)
    elif not _defers_qkv(state.total):
        assert state.ssq is not None
        state = State(finish_norm(state.total, state.ssq, net.eps), None)
    qkv = torch.mm(state.total, w_qkv.t(), out=tape.qkv if tape else None)
    out = None
    if tape:
        assert tape.out is not None and tape.lse is not None
        out = (tape.out.view(shape), tape.lse)
    attended, _ = rope_attention_fwd(
        qkv.view(*shape[:2], 3 * width), net.cos, net.sin, net.heads, ssq=state.ssq, eps=net.eps,
        out=out,
    )  # fmt: skip
    return linear(
        attended.view(-1, width), w_out, state.total, h_ssq=state.ssq, eps=net.eps,
        squares=True if tape is None or tape.mid_ssq is None else tape.mid_ssq,
        out=tape.mid if tape else None,
    )  # fmt: skip


def _defers_qkv(like: Tensor) -> bool:
    """Whether q, k and v may be those of a sum whose norm is still to be taken: float16 ends at
    65,504, and a sum is larger than its norm."""
    return like.dtype != torch.float16


def _injected(state: State, add: Tensor, eps: float, out: Tensor | None) -> State:
    """state + add, rounded; there the norm of a deferred one is taken."""
    if state.ssq is None:
        return State(torch.add(state.total, add, out=out), None)
    return State(finish_norm(state.total, state.ssq, eps, add, out), None)


@dataclass
class Work:
    """What the backward of one block writes: the factors of its weight gradients.

    Attributes:
        d_total: gradient of the block's sum, [N, D].  a: silu(g) * u again, [N, F'].
        d_gu: of gate and up, [N, 2, F'].
        d_mid: of attention's sum, [N, D].  d_qkv: [N, 3D].  mid: the norm of that sum, [N, D].
        total: the norm of the block's sum, [N, D], where the next block's q, k, v read it.
    """

    d_total: Tensor
    a: Tensor
    d_gu: Tensor
    d_mid: Tensor | None = None
    d_qkv: Tensor | None = None
    mid: Tensor | None = None
    total: Tensor | None = None

    def of_pass(self, index: int) -> Work:
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        return Work(**{name: t[index] for name, t in pairs if t is not None})


def new_works(net: Network, tapes: Sequence[Tape], in_place: bool) -> list[Work]:
    """Empty work for tapes that hold one pass or, with a leading axis, several.

    `in_place`: over the tapes, what is as large as something there.
    """
    works = []
    for i, tape in enumerate(tapes):
        lead, inner = tape.total.shape[:-1], net.blocks[i].down.shape[1]
        gu = tape.total.new_empty(*lead, 2, inner) if tape.gu is None else _place(tape.gu, in_place)
        work = Work(torch.empty_like(tape.total), gu.new_empty(*lead, inner), gu)
        if not net.mlp_t:
            assert tape.qkv is not None
            work.d_mid = torch.empty_like(tape.mid)
            work.d_qkv, work.mid = _place(tape.qkv, in_place), _place(tape.mid, in_place)
            if i + 1 < len(tapes):
                work.total = _place(tape.total, in_place)
        works.append(work)
    return works


def _place(t: Tensor, in_place: bool) -> Tensor:
    return t if in_place else torch.empty_like(t)


Grads = list[Tensor | None]  # float32, four a block in the order of the weights, as packed


def backward(
    net: Network, grad: Tensor, tapes: Sequence[Tape], works: Sequence[Work], into: Grads
) -> Tensor:
    """The gradient of the pass's input from that of its normed output, both [N, D].

    Writes `works`, and adds the token mixers' weight gradients to `into`.
    """
    mix = _token_mix_bwd if net.mlp_t else _attention_bwd
    for i in range(len(net.blocks) - 1, -1, -1):
        block, tape, work = net.blocks[i], tapes[i], works[i]
        d = norm_bwd(grad, tape.total, tape.ssq, net.eps, out=work.d_total, normed=work.total)
        gu = tape.gu
        if gu is None:
            gu = work.d_gu
            gate_up(tape.mid, block.gate_up, gu=gu, ssq=tape.mid_ssq, eps=net.eps)
        swiglu_bwd(d, block.down, gu, d_gu=work.d_gu, a=work.a)
        weight = block.gate_up.flatten(0, 1)
        grad, _ = linear(work.d_gu.flatten(1), weight, d, w_is_kn=True)
        grad = mix(net, i, grad, tapes, work, into)
    return grad


def _token_mix_bwd(
    net: Network, i: int, grad: Tensor, tapes: Sequence[Tape], work: Work, into: Grads
) -> Tensor:
    tape, shape, first = tapes[i], net.shape, WEIGHTS * i
    d_gate_up, d_down = into[first : first + 2]
    so_far = None if d_gate_up is None or d_down is None else (d_gate_up, d_down)
    assert tape.s is not None and tape.rstd is not None
    grad, into[first], into[first + 1] = token_mix_bwd(
        grad.view(shape), tape.s.view(shape), tape.mid.view(shape), tape.rstd,
        *net.blocks[i].mixer, into=so_far,
    )  # fmt: skip
    return grad.view(-1, shape[2])


def _attention_bwd(
    net: Network, i: int, grad: Tensor, tapes: Sequence[Tape], work: Work, into: Grads
) -> Tensor:
    tape, (w_qkv, w_out) = tapes[i], net.blocks[i].mixer
    assert tape.mid_ssq is not None and tape.qkv is not None and work.d_qkv is not None
    assert tape.out is not None and tape.lse is not None
    d_mid = norm_bwd(grad, tape.mid, tape.mid_ssq, net.eps, out=work.d_mid, normed=work.mid)
    packed = (*net.shape[:2], 3 * net.shape[2])
    d_qkv = rope_attention_bwd(
        torch.mm(d_mid, w_out).view(net.shape), tape.qkv.view(packed), tape.out.view(net.shape),
        tape.lse, net.cos, net.sin, net.heads, out=work.d_qkv.view(packed), eps=net.eps,
        ssq=tapes[i - 1].ssq if i and _defers_qkv(grad) else None,
    )  # fmt: skip
    return linear(d_qkv.view(-1, packed[2]), w_qkv, d_mid, w_is_kn=True)[0]


def add_weight_grads(
    net: Network, tapes: Sequence[Tape], works: Sequence[Work], into: Grads
) -> None:
    """What `backward` left in works, one product per weight over all passes they hold."""
    for i, (tape, work) in enumerate(zip(tapes, works, strict=True)):
        mid = tape.mid if work.mid is None else work.mid
        factors: list[tuple[int, Tensor | None, Tensor | None]] = [
            (2, work.d_gu.flatten(-2), mid),
            (3, work.d_total, work.a),
        ]
        if not net.mlp_t:
            factors += [(0, work.d_qkv, works[i - 1].total if i else tape.s)]
            factors += [(1, work.d_mid, tape.out)]
        for offset, d, x in factors:
            assert d is not None and x is not None
            at = WEIGHTS * i + offset
            into[at] = weight_grad(rows_of(d), rows_of(x), into[at])


def rows_of(t: Tensor) -> Tensor:
    """[..., W] -> [N, W]."""
    return t.reshape(-1, t.shape[-1])


def store_unpacked(net: Network, grads: Grads, out: Sequence[Tensor]) -> None:
    """Write gradients of the packed weights to `out`, shaped and typed as the master weights."""
    for at, (grad, weight) in enumerate(zip(grads, out, strict=True)):
        assert grad is not None
        if at % WEIGHTS == 2 or (net.mlp_t and at % WEIGHTS == 0):
            halves = grad.view(2, -1, grad.shape[-1])
            weight.view(2, -1, weight.shape[1]).copy_(
                halves[:, : weight.shape[0] // 2, : weight.shape[1]]
            )
        else:
            weight.copy_(grad[: weight.shape[0], : weight.shape[1]])
