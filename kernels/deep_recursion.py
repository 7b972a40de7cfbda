"""deep_recursion: all H x L passes of the network as one operation, with its backward by hand.

Owns the op and the policies of its backward. The cycles before the last keep nothing. Of the last
one `save` keeps what the backward reads, and one matrix product per weight covers all passes:
their gradients are written over what was kept, so that such a backward works once per forward;
`light` keeps the same without gate and up and adds up weight gradients pass by pass; `recompute`
keeps the states between passes and runs each pass again.
Imported by `trm_fast.backends` alone. Source: Jolicoeur-Martineau 2025 (arXiv 2510.04871),
Algorithm 3.

Dims legend: B batch, S tokens incl. prefix, D width, N = B*S rows, P = L_cycles + 1 passes of a
cycle, T tiles of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trm_fast.kernels import rope_attention, token_mix
from trm_fast.kernels._common import (
    Shape,
    check,
    unsupported_dtype,
    unsupported_width,
)
from trm_fast.kernels.linear_rmsnorm import new_squares
from trm_fast.kernels.network import (
    WEIGHTS,
    Grads,
    Network,
    State,
    Tape,
    add_weight_grads,
    backward,
    forward,
    new_tape,
    new_works,
    rows_of,
    store_unpacked,
    tape_fields,
)
from trm_fast.kernels.registration import TRITON, register
from trm_fast.kernels.residual_rmsnorm import finish_norm

__all__ = ["deep_recursion", "unsupported"]

POLICIES = ("none", "save", "light", "recompute")  # none: no gradient is asked for


@dataclass(frozen=True)
class _Settings:
    """The arguments of the operation that are not tensors, in the order of its schema.

    fp8: whether the cycles that keep nothing make the channel MLP's products in 8 bits.
    """

    mlp_t: bool
    H_cycles: int
    L_cycles: int
    heads: int
    eps: float
    policy: str
    fp8: bool = False

    @property
    def passes(self) -> int:
        return self.L_cycles + 1


_SETTINGS_SCHEMA = "bool mlp_t, int H_cycles, int L_cycles, int heads, float eps, str policy"


def _cycle(
    net: Network,
    x: Tensor,
    y: State,
    z: State,
    s: _Settings,
    keep: Callable[[int, State], Sequence[Tape] | None],
    a: Tensor,
) -> tuple[State, State, Tensor, Tensor]:
    """The latent L_cycles times, the answer once; also what was injected: y + x, and y.

    `keep` is told the state that goes into each pass and returns the tapes that take the pass.
    """
    answer = y.total if y.ssq is None else finish_norm(*y, net.eps)
    injected = answer + x
    for i in range(s.L_cycles):
        z = forward(net, z, injected, a, keep(i, z))
    y = forward(net, z, answer, a, keep(s.L_cycles, z))
    return y, z, injected, answer


def _new_saved(x: Tensor, weights: Sequence[Tensor], s: _Settings) -> list[Tensor]:
    """Empty tensors that the forward fills and the backward reads."""
    count, width = x.shape[0] * x.shape[1], x.shape[2]
    if s.policy == "none":
        return []
    if s.policy == "recompute":
        states = x.new_empty(s.passes, count, width)
        squares = new_squares(x, count, width)
        squares = squares.new_empty(s.passes, *squares.shape)
        return [states, squares, x.new_empty(count, width), x.new_empty(count, width)]
    return [t for tape in _new_tapes(x, weights, s, s.passes) for t in tape.tensors()]


def _new_tapes(x: Tensor, weights: Sequence[Tensor], s: _Settings, passes: int) -> list[Tape]:
    inner = weights[3].shape[1]
    with_gu = s.policy != "light"
    return [
        new_tape(x, s.mlp_t, s.heads, block, inner, passes, with_gu)
        for block in range(len(weights) // WEIGHTS)
    ]


def _as_tapes(saved: Sequence[Tensor], s: _Settings) -> list[Tape]:
    tapes: list[Tape] = []
    rest = list(saved)
    while rest:
        names = tape_fields(s.mlp_t, len(tapes), s.policy != "light")
        tapes.append(Tape(**dict(zip(names, rest, strict=False))))
        rest = rest[len(names) :]
    return tapes


def _tapes_of_pass(tapes: Sequence[Tape], index: int) -> list[Tape]:
    return [tape.of_pass(index) for tape in tapes]


def deep_recursion_fwd(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    weights: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """x, y, z [B,S,D], master weights four a block -> y, z [B,S,D], and what the policy keeps."""
    s = _Settings(*settings)
    saved = _new_saved(x, weights, s)
    if not x.numel():
        return torch.empty_like(y), torch.empty_like(z), saved
    net = Network.pack(weights, x, s.mlp_t, s.heads, s.eps, (cos, sin))
    question = rows_of(x)
    answer, latent = State(rows_of(y), None), State(rows_of(z), None)
    a = question.new_empty(len(question), net.blocks[0].down.shape[1])
    free = net.in_e4m3(weights) if s.fp8 else net
    for _ in range(s.H_cycles - (s.policy != "none")):
        answer, latent, _, _ = _cycle(free, question, answer, latent, s, lambda i, state: None, a)
    if s.policy != "none":
        keep = _keep_states(saved) if s.policy == "recompute" else _keep_tapes(saved, s)
        answer, latent, injected, before = _cycle(net, question, answer, latent, s, keep, a)
        if s.policy == "recompute":
            saved[2].copy_(injected)
            saved[3].copy_(before)
    new_y, new_z = (finish_norm(t.total, t.ssq, s.eps).view(x.shape) for t in (answer, latent))
    return new_y, new_z, saved


def _keep_states(saved: Sequence[Tensor]) -> Callable[[int, State], None]:
    def keep(i: int, state: State) -> None:
        saved[0][i].copy_(state.total)
        if state.ssq is not None and len(state.ssq) == saved[1].shape[1]:
            saved[1][i].copy_(state.ssq)
        else:  # none, or those of the narrower tiles of e4m3
            saved[1][i].zero_()
            if state.ssq is not None:
                saved[1][i, 0].copy_(state.ssq.sum(0))

    return keep


def _keep_tapes(saved: Sequence[Tensor], s: _Settings) -> Callable[[int, State], Sequence[Tape]]:
    tapes = _as_tapes(saved, s)
    return lambda i, state: _tapes_of_pass(tapes, i)


def deep_recursion_bwd(
    grad: Tensor,
    saved: Sequence[Tensor],
    weights: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, list[Tensor]]:
    """Gradients to x [B,S,D], in its dtype, and to the weights, in theirs, from that of y."""
    d_weights = [torch.empty_like(w) for w in weights]
    d_x = _run_backward(grad, saved, d_weights, weights, cos, sin, _Settings(*settings), False)
    return d_x, d_weights


def deep_recursion_bwd_(
    grad: Tensor,
    saved: Sequence[Tensor],
    d_weights: Sequence[Tensor],
    weights: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    *settings: Any,
) -> Tensor:
    """The same over `saved`, where gate and up need no room again; `d_weights` take gradients."""
    return _run_backward(grad, saved, d_weights, weights, cos, sin, _Settings(*settings), True)


def _run_backward(
    grad: Tensor,
    saved: Sequence[Tensor],
    d_weights: Sequence[Tensor],
    weights: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    s: _Settings,
    in_place: bool,
) -> Tensor:
    if not grad.numel():
        for d_weight in d_weights:
            d_weight.zero_()
        return torch.zeros_like(grad)
    net = Network.pack(weights, grad, s.mlp_t, s.heads, s.eps, (cos, sin))
    grads: Grads = [None] * len(weights)
    if s.policy == "recompute":
        steps = _backward_recomputed(net, rows_of(grad), saved, weights, s, grads)
    else:
        steps = _backward_saved(net, rows_of(grad), saved, s, grads, in_place)
    d_x = torch.zeros_like(rows_of(grad), dtype=torch.float32)
    for i, d in steps:
        if i < s.L_cycles:
            d_x += d
    store_unpacked(net, grads, d_weights)
    return d_x.to(grad.dtype).view(grad.shape)


def _backward_saved(
    net: Network,
    d: Tensor,
    saved: Sequence[Tensor],
    s: _Settings,
    grads: Grads,
    in_place: bool,
) -> Iterator[tuple[int, Tensor]]:
    """The gradient of each pass's input, the last pass first."""
    tapes = _as_tapes(saved, s)
    together = s.policy == "save"
    # Shared by all passes, the work of one cannot lie over the first one's tape.
    works = new_works(net, tapes if together else _tapes_of_pass(tapes, 0), in_place and together)
    for i in range(s.L_cycles, -1, -1):
        tape = _tapes_of_pass(tapes, i)
        work = [w.of_pass(i) for w in works] if together else works
        d = backward(net, d, tape, work, grads)
        if not together:
            add_weight_grads(net, tape, work, grads)
        yield i, d
    if together:
        add_weight_grads(net, tapes, works, grads)


def _backward_recomputed(
    net: Network,
    d: Tensor,
    saved: Sequence[Tensor],
    weights: Sequence[Tensor],
    s: _Settings,
    grads: Grads,
) -> Iterator[tuple[int, Tensor]]:
    states, squares, injected, answer = saved
    tapes = _tapes_of_pass(_new_tapes(d.view(net.shape), weights, s, 1), 0)
    works = new_works(net, tapes, in_place=True)
    for i in range(s.L_cycles, -1, -1):
        deferred = i > 0 or s.H_cycles > 1  # the caller's own z is normed already
        state = State(states[i], squares[i] if deferred else None)
        forward(net, state, injected if i < s.L_cycles else answer, works[0].a, tapes)
        d = backward(net, d, tapes, works, grads)
        add_weight_grads(net, tapes, works, grads)
        yield i, d


def _fwd_fake(
    x: Tensor, y: Tensor, z: Tensor, weights: Sequence[Tensor], cos: Any, sin: Any, *settings: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return torch.empty_like(y), torch.empty_like(z), _new_saved(x, weights, _Settings(*settings))


def _bwd_fake(
    grad: Tensor, saved: Sequence[Tensor], weights: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, list[Tensor]]:
    return torch.empty_like(grad), [torch.empty_like(w) for w in weights]


def _bwd_in_place_fake(grad: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(grad)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, _, _, weights, cos, sin, *settings, _ = inputs  # its backward knows nothing of fp8
    _, z, saved = output
    ctx.mark_non_differentiable(z, *saved)
    ctx.save_for_backward(cos, sin, *weights, *saved)
    ctx.count, ctx.settings = len(weights), settings


def _backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Any, ...]:
    cos, sin, *rest = ctx.saved_tensors
    weights, saved = rest[: ctx.count], rest[ctx.count :]
    given = (weights, cos, sin, *ctx.settings)
    # A compiler that traces this cannot let go of what was saved: it would copy it first.
    if type(grad) is Tensor and ctx.settings[-1] == "save":
        d_weights = [torch.empty_like(w) for w in weights]
        d_x = _bwd_in_place(grad.contiguous(), saved, d_weights, *given)
    else:
        d_x, d_weights = _bwd(grad.contiguous(), saved, *given)
    return d_x, None, None, d_weights, None, None, *(None for _ in ctx.settings), None


_bwd = register(
    TRITON,
    "deep_recursion_bwd(Tensor grad, Tensor[] saved, Tensor[] weights, Tensor? cos, Tensor? sin,"
    f" {_SETTINGS_SCHEMA}) -> (Tensor, Tensor[])",
    _bwd_fake,
    deep_recursion_bwd,
)
_bwd_in_place = register(
    TRITON,
    "deep_recursion_bwd_(Tensor grad, Tensor(a!)[] saved, Tensor(b!)[] d_weights,"
    f" Tensor[] weights, Tensor? cos, Tensor? sin, {_SETTINGS_SCHEMA}) -> Tensor",
    _bwd_in_place_fake,
    deep_recursion_bwd_,
    mutates=(1, 2),
)
_fwd = register(
    TRITON,
    "deep_recursion(Tensor x, Tensor y, Tensor z, Tensor[] weights, Tensor? cos, Tensor? sin,"
    f" {_SETTINGS_SCHEMA}, bool fp8) -> (Tensor, Tensor, Tensor[])",
    _fwd_fake,
    deep_recursion_fwd,
    save=_save,
    backward=_backward,
)


def deep_recursion(
    ops: Any,
    x: Tensor,
    y: Tensor,
    z: Tensor,
    blocks: Sequence[Any],
    rotary: tuple[Tensor, Tensor] | None,
    r: Any,
) -> tuple[Tensor, Tensor]:
    """x, y, z [B,S,D], master weights, settings -> y, z [B,S,D]; see `trm_fast.ops`.

    The other operations of the table are not used: their kernels are called directly.

    Raises:
        ValueError: a dtype or width that the kernels do not serve, dropout, or products that the
            GPU does not have.
    """
    mlp_t = hasattr(blocks[0].mixer, "gate_up")
    tokens, width = x.shape[1:]
    head_dim, rest = divmod(width, r.heads)
    graded = torch.is_grad_enabled()
    check(
        "deep_recursion",
        unsupported_dtype(x.dtype),
        unsupported_width(width),
        "serves no dropout" if r.dropout else None,
        None if r.quantize == "int8" and graded else unsupported_products(r.quantize, x.device),
    )
    if not mlp_t:
        check(
            "deep_recursion",
            f"needs {r.heads} heads of one size" if rest else None,
            rope_attention.unsupported_head(head_dim),
            *(rope_attention.unsupported_table(t, tokens, head_dim) for t in rotary or ()),
        )
    weights = [
        t.contiguous() for block in blocks for t in (*block.mixer, block.gate_up, block.down)
    ]
    cos, sin = (t.contiguous() for t in rotary) if rotary and not mlp_t else (None, None)
    fp8 = r.quantize == "fp8"
    # Where gradients are on, the last cycle is not quantised, whoever asks for one.
    tracked = graded and (fp8 or any(t.requires_grad for t in (x, *weights)))
    new_y, new_z, _ = _fwd(
        x.contiguous(), y.detach().contiguous(), z.detach().contiguous(), weights, cos, sin, mlp_t,
        r.H_cycles, r.L_cycles, r.heads, r.eps, r.policy if tracked else "none", fp8,
    )  # fmt: skip
    return new_y, new_z.detach()


def unsupported_products(name: str, device: torch.device | None) -> str | None:
    """Why products quantised to `name` are not served there, or None."""
    if name == "none":
        return None
    if name != "fp8":
        return f"has no products in {name} on GPUs"
    if device is None or device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= (8, 9):
        return None
    return f"has products in fp8 from compute capability 8.9 on, this GPU has {major}.{minor}"


def unsupported(
    dtype: torch.dtype, config: Shape | None, device: torch.device | None = None
) -> str | None:
    if config is None:
        return unsupported_dtype(dtype)
    if config.dropout:
        return "serves no dropout: the composition of the other operations does"
    if reason := unsupported_products(config.quantize, device):
        return reason
    parts = token_mix if config.mlp_t else rope_attention
    return parts.unsupported(dtype, config)


def examples(make: Callable[..., Tensor]) -> Iterator[None]:
    """The launches of a step of both official Sudoku models, for the report: each distinct one."""
    batch, tokens, width, heads = 768, 97, 512, 8
    x = make(batch, tokens, width)
    for mlp_t in (True, False):
        mixer = [(1024, tokens), (tokens, 512)] if mlp_t else [(3 * width, width), (width, width)]
        sizes = [*mixer, (3072, width), (width, 1536)] * 2
        weights = [make(*size, dtype=torch.float32) for size in sizes]
        table = None if mlp_t else make(tokens, width // heads, dtype=torch.float32)
        for policy in POLICIES:
            settings = (mlp_t, 2, 1, heads, 1e-5, policy)
            _, _, saved = deep_recursion_fwd(x, x, x, weights, table, table, *settings)
            yield
            deep_recursion_fwd(x, x, x, weights, table, table, *settings, True)
            yield
            if saved:
                deep_recursion_bwd(x, saved, weights, table, table, *settings)
                yield
