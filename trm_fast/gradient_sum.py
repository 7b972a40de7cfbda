"""Gradients added up over the processes of a run while the backward that makes them goes on.

Owns `GradientSum`: which gradients go together, and when. Gradients are summed, as the official
code sums them: each process divides its loss by the global batch. Imported by the training step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from trm_fast.distributed import Ranks
from trm_fast.flat import joined

__all__ = ["GradientSum"]


class GradientSum:
    """Adds gradients up over the processes, in stretches.

    Between `begin` and `finish` a stretch is sent as soon as a backward has made all of it, in the
    same order everywhere. `finish` sends what was not, and waits; without `begin` that is all of
    it, which is what a step needs whose backward is a replayed graph. With one process nothing is
    done.

    Args:
        places: parameters with the tensors that are their gradients.
        bytes_at_once: stretches are of about this size; gradients that lie one after another in
            memory go together.
    """

    def __init__(
        self,
        places: Sequence[tuple[Tensor, Tensor]],
        ranks: Ranks,
        bytes_at_once: int = 4 << 20,
    ) -> None:
        self.ranks, self._open = ranks, False
        self._stretches: list[Tensor] = []
        self._full: list[int] = []
        self._missing: list[int] = []
        self._sent: list[Callable[[], None]] = []
        if ranks.world == 1:
            return
        for index, (parameters, gradients) in enumerate(_stretches(places, bytes_at_once)):
            self._stretches.append(gradients)
            self._full.append(len(parameters))
            for p in parameters:
                p.register_post_accumulate_grad_hook(lambda _, i=index: self._arrived(i))  # type: ignore[attr-defined]

    def begin(self) -> None:
        """Before the backward after which no gradient changes any more."""
        self._open, self._missing, self._sent = True, list(self._full), []

    def finish(self) -> None:
        """After it: every gradient is the sum when this returns, those that it did not make too."""
        while len(self._sent) < len(self._stretches):
            self._send()
        for wait in self._sent:
            wait()
        self._open, self._sent = False, []

    def _arrived(self, index: int) -> None:
        if not self._open:
            return
        self._missing[index] -= 1
        while len(self._sent) < len(self._stretches) and self._missing[len(self._sent)] == 0:
            self._send()

    def _send(self) -> None:
        self._sent.append(self.ranks.start_adding_up(self._stretches[len(self._sent)]))


def _stretches(
    places: Sequence[tuple[Tensor, Tensor]], bytes_at_once: int
) -> list[tuple[list[Tensor], Tensor]]:
    """From the last parameter, to which a backward comes first, to the first one: parameters, and
    one tensor over all of their gradients."""
    found: list[tuple[list[Tensor], list[Tensor]]] = []
    size = bytes_at_once
    for p, grad in reversed(places):
        if size >= bytes_at_once or len(joined([grad, *found[-1][1]])) > 1:
            found.append(([], []))
            size = 0
        found[-1][0].append(p)
        found[-1][1].insert(0, grad)
        size += grad.numel() * grad.element_size()
    return [(parameters, joined(grads)[0]) for parameters, grads in found]
