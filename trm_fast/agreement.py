"""Whether a graph says what the model says, measured on boards.

Owns the comparison that every exported file passes before it is put in its place. A recursion makes
small errors grow, so a step is compared on its own, fed the model's states, and whole answers by
their cells; the model in float64 says how large an error rounding alone makes. Imported by
`export.py`.

Dims legend: B items, L puzzle tokens, M supervision steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trm_fast.data.sudoku_generator import generate
from trm_fast.model import Model
from trm_fast.portable import NEW, ExportError, Solve, Step, examples, plain_model, state_shape
from trm_fast.rules import sudoku_side

__all__ = ["Agreement", "Expected", "Graph", "some_boards"]

# Beyond twice the error of the model against float64: relative L2 of one step, and the part of all
# cells. A number that falls on the other side of a rounding to 8 bits moves by one step of 127.
ERROR = {"none": 1e-5, "int8": 1e-2}
CELLS = {"none": 0.001, "int8": 0.02}
ALONE = 3  # steps that are compared by themselves

Graph = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Agreement:
    """A graph against the model, both on the same boards.

    Attributes:
        error: largest relative L2 distance from the model of what one supervision step gives.
        unlike: cells with another answer, over all supervision steps.  cells: all of them.
    """

    error: float
    unlike: int
    cells: int


def some_boards(model: Model, count: int) -> Tensor:
    """Tokens [count, L] int32: Sudoku of the middle range where the model is for that, else drawn
    evenly from all but padding."""
    side, config = sudoku_side(model.config), model.config
    if side is not None:
        clues = {4: (4, 8), 6: (8, 16), 9: (28, 40)}[side]
        boards, _ = generate(count, clues=clues, size=side, seed=1)
        return torch.from_numpy(boards.astype(np.int32)) + 1
    draw = np.random.Generator(np.random.Philox(1))
    drawn = draw.integers(min(1, config.vocab_size - 1), config.vocab_size, (count, config.seq_len))
    return torch.from_numpy(drawn.astype(np.int32))


class Expected:
    """What the model says of some boards, computed once for all of its graphs.

    Args:
        model: of `plain_model`.  inputs: [B, L] int32.  steps: M.
    """

    def __init__(self, model: Model, inputs: Tensor, steps: int) -> None:
        self.steps, self._inputs = steps, inputs
        self._products = model.config.quantize
        self._shape = state_shape(model)
        self._first = examples(model, inputs)
        step = Step(model)
        exact = Step(plain_model(model, self._products, "float64"))
        self._given: list[dict[str, Tensor]] = []
        self._alone: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
        given = self._first
        with torch.no_grad():
            for _ in range(min(ALONE, steps)):
                found = step(given)
                self._given.append(given)
                self._alone.append((found, exact(_wide(given))))
                given = self._after(given, found)
            solve = {name: t for name, t in self._first.items() if name not in self._shape}
            solve.pop("halted", None)
            self._solve_given = solve
            found = Solve(step, self._shape, steps)(solve)
            truth = Solve(exact, self._shape, steps)(solve)
        self._solved = found
        self._cells = int(found["preds"].numel())
        self._own_unlike = int((found["preds"] != truth["preds"]).sum())

    def _after(self, given: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a step takes behind the one that gave `found`."""
        states = {name: found[NEW + name] for name in self._shape}
        halted = {"halted": torch.zeros_like(given["halted"])} if states else {}
        return {**given, **states, **halted}

    def of_step(self, graph: Graph) -> Agreement:
        """Compare a graph of one step. Raises ExportError where it says something else."""
        error = 0.0
        for given, (own, truth) in zip(self._given, self._alone, strict=True):
            for rows in (slice(None), slice(1)):
                found = graph({name: t[rows] for name, t in given.items()})
                error = max(error, self._error(found, own, truth, rows))
        given, preds = self._first, []
        for _ in range(self.steps):
            found = graph(given)
            preds.append(found["preds"])
            given = self._after(given, found)
        return Agreement(error, self._unlike(torch.stack(preds, 1)), self._cells)

    def of_solve(self, graph: Graph) -> Agreement:
        """Compare a graph of M steps. Raises ExportError where it says something else."""
        found = graph(self._solve_given)
        preds, q = found["preds"], found["q_halt_logits"]
        own, truth = ({"q_halt_logits": t["q_halt_logits"]} for t in self._alone[0])
        error = self._error({"q_halt_logits": q[:, 0]}, own, truth, slice(None))
        best = preds[torch.arange(len(q)), q.argmax(1)]
        if not torch.equal(found["answer"], best):
            raise ExportError("the answer is not that of the step with the highest q")
        one = graph({name: t[:1] for name, t in self._solve_given.items()})
        if int((one["preds"] != preds[:1]).sum()) > self._allowed(preds[:1].numel()):
            raise ExportError("one board alone is answered otherwise than among others")
        return Agreement(error, self._unlike(preds), self._cells)

    def _error(
        self,
        found: dict[str, Tensor],
        own: dict[str, Tensor],
        truth: dict[str, Tensor],
        rows: slice,
    ) -> float:
        """How far a step is from the model; ExportError where it is further than rounding makes."""
        worst = 0.0
        for name, exact in truth.items():
            if name == "preds":
                continue
            error, usual = (_distance(t, exact[rows]) for t in (found[name], own[name][rows]))
            limit = 2 * usual + ERROR[self._products]
            if not error <= limit:
                raise ExportError(
                    f"{name} of a step has a relative error of {error:.1e}, up to {limit:.1e} "
                    "comes from rounding"
                )
            worst = max(worst, _distance(found[name], own[name][rows]))
        if "logits" in found and not torch.equal(found["preds"], found["logits"].argmax(-1).int()):
            raise ExportError("the answer of a step is not that of its logits")
        return worst

    def _allowed(self, cells: int) -> float:
        return 2 * self._own_unlike + CELLS[self._products] * cells

    def _unlike(self, preds: Tensor) -> int:
        unlike = int((preds != self._solved["preds"]).sum())
        if unlike > self._allowed(self._cells):
            raise ExportError(
                f"after {self.steps} supervision steps {unlike} of {self._cells} cells have "
                f"another answer, {self._own_unlike} are the model's own rounding"
            )
        return unlike


def _wide(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in given.items()}


def _distance(t: Tensor, exact: Tensor) -> float:
    """|t - exact| / |exact|, or |t - exact| where that is zero; NaN where a number is NaN."""
    exact = exact.double()
    size = float(exact.norm())
    return float((t.double() - exact).norm()) / (size or 1.0)
