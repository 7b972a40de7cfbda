"""One helper that makes a function an operation of PyTorch: schema, fake tensors, autograd.

Owns `register`; used once per op and backend: `trm_fast_triton::<op>` for the kernels here,
`trm_fast_ext::<op>` for the compiled extension. Imports torch only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

TRITON = "trm_fast_triton"
_libraries: list[torch.library.Library] = []  # what they register lives as long as they do


def register(
    namespace: str,
    schema: str,
    fake: Callable[..., Any],
    forward: Callable[..., Any] | None = None,
    *,
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    mutates: Sequence[int] = (),
) -> Callable[..., Any]:
    """The operation `<namespace>::<name of the schema>`, callable.

    Args:
        schema: "name(Tensor x, float eps) -> (Tensor, Tensor)".
        fake: the results' shapes and dtypes; gets the same arguments, returns empty tensors.
        forward: computes them on any device; None where compiled code supplies it.
        save: setup_context(ctx, inputs, output) of `torch.library.register_autograd`.
        backward: (ctx, *gradients) -> one gradient or None per input. It may call registered
            operations only, so that a compiler can look through it. Works once: asking for
            second derivatives is an error.
        mutates: positions of the arguments, tensors or lists of them, that forward writes to. The
            schema says the same with `(a!)`. Autograd then refuses a backward pass that needs
            their old values.
    """
    name = schema[: schema.index("(")]
    qualified = f"{namespace}::{name}"
    torch.library.define(qualified, schema[len(name) :], tags=(torch.Tag.needs_fixed_stride_order,))
    if forward is not None:
        torch.library.impl(qualified, "default", _counted(forward, mutates))
    elif mutates:
        _count_compiled(namespace, name, mutates)
    torch.library.register_fake(qualified, _of_one_device(qualified, fake))
    if backward is not None:
        torch.library.register_autograd(
            qualified, _once(qualified, backward), setup_context=_sparing(save)
        )
    return getattr(getattr(torch.ops, namespace), name).default


def _counted(forward: Callable[..., Any], mutates: Sequence[int]) -> Callable[..., Any]:
    """`forward`, after which the tensors it wrote to count as changed."""
    if not mutates:
        return forward

    def counted(*args: Any) -> Any:
        result = forward(*args)
        _count(args, mutates)
        return result

    return counted


def _count(args: Sequence[Any], mutates: Sequence[int]) -> None:
    for position in mutates:
        written = args[position]
        for t in written if isinstance(written, list | tuple) else (written,):
            torch.autograd.graph.increment_version(t)


def _count_compiled(namespace: str, name: str, mutates: Sequence[int]) -> None:
    """The same where compiled code is called: on the way to it, as PyTorch's own operations do."""

    def counted(keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        _count(args, mutates)
        op = getattr(getattr(torch.ops, namespace), name).default
        return op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args)

    library = torch.library.Library(namespace, "FRAGMENT")
    library.impl(name, counted, "ADInplaceOrView", with_keyset=True)
    _libraries.append(library)


def _sparing(save: Callable[..., None] | None) -> Callable[..., None]:
    """`save`, after which results without a gradient get None in the backward, not zeros: what a
    forward keeps is returned too, and zeros of its size would be as large."""

    def spare(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        if save is not None:
            save(ctx, inputs, output)

    return spare


def _once(name: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    def once(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(f"{name} is once_differentiable: no second derivatives")
        if next(_tensors(grads), None) is None:  # nothing downstream gave one
            needs = ctx.needs_input_grad
            return tuple([None] * len(n) if isinstance(n, list | tuple) else None for n in needs)
        return backward(ctx, *grads)

    return once


def _of_one_device(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """`fake`, which answers for meta tensors too: with one of them among real ones PyTorch would
    take its empty results for real."""

    def checked(*args: Any) -> Any:
        devices = {str(t.device) for t in _tensors(args)}
        if len(devices) > 1:
            raise RuntimeError(f"{name} was given tensors on {', '.join(sorted(devices))}")
        return fake(*args)

    return checked


def _tensors(args: Any) -> Iterator[torch.Tensor]:
    for value in args:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def refuse_forward_mode(op: str) -> None:
    """NotImplementedError where forward derivatives are asked for: they would be silently zero."""
    if torch.autograd.forward_ad._current_level >= 0:
        reason = "no forward-mode derivatives; those of backend='reference' are PyTorch's"
        raise NotImplementedError(f"{op}: {reason}")
