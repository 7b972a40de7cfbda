"""Ways of asking the model that comes with the package, on boards made for it here.

Protocol: the boards of each range of clues are those of one seed; the ways take turns, so that all
of them ran in the same minutes, and the best of their turns counts; the reference is one run of 16
fixed steps. Beside the time stand the mean and largest number of passes and the share of boards
right; `pytest bench/bench_reasoning.py --benchmark-only -s` prints them.
"""

import time

import numpy as np
import pytest
import torch

from trm_fast import Model
from trm_fast.console import say
from trm_fast.data.sudoku_generator import generate

REFERENCE = "16 fixed steps"
WAYS = {
    REFERENCE: {},
    "halting by q": {"select": "first-q", "halt": "q"},
    "restarts": {"reasoning": "restarts"},
    "restarts, rules": {"reasoning": "restarts", "select": "valid", "halt": "never"},
    "vote": {"reasoning": "vote"},
    "ptrm of 16": {"reasoning": "ptrm", "rollouts": 16, "depth": 16},
}
CLUES = {"easy": (36, 50), "medium": (28, 32), "hard": (23, 27)}


@pytest.fixture(scope="module", params=CLUES)
def boards(request):
    count = 8 if request.config.getoption("--bench-quick") else 256
    puzzles, grids = generate(count, clues=CLUES[request.param], seed=20261122)
    inputs, labels = (torch.from_numpy(t.astype(np.int32)) + 1 for t in (puzzles, grids))
    return request.param, inputs, labels


def bench_reasoning(boards, benchmark, request):
    name, inputs, labels = boards
    model = Model.from_pretrained("shipped").to(request.config.getoption("--bench-device"))
    taken = {}

    def ask(way):
        began = time.perf_counter()
        answers = model.predict(inputs, **WAYS[way])  # on the CPU when it returns
        taken.setdefault(way, []).append(time.perf_counter() - began)
        return answers

    def others():
        for way in list(WAYS)[1:]:
            ask(way)

    rounds = 1 if request.config.getoption("--bench-quick") else 3
    benchmark.pedantic(ask, (REFERENCE,), setup=others, rounds=rounds, warmup_rounds=1)
    for way, settings in WAYS.items():
        answers = model.predict(inputs, **settings)
        best = min(taken[way])
        row = {
            "ms a board": 1e3 * best / len(inputs),
            "times as fast": min(taken[REFERENCE]) / best,
            "passes": float(answers.passes.double().mean()),
            "at most": int(answers.passes.max()),
            "% right": 100 * float((answers.tokens == labels).all(-1).double().mean()),
        }
        benchmark.extra_info[way] = row
        shown = " ".join(f"{k} {v:8.2f}" for k, v in row.items())
        say(f"\n{name:<7}{way:<16} {shown}", end="")
