"""The workloads of the benchmarks: which networks, in which dtypes and batch sizes.

Owns the cases and their expansion into a plan. Imported by `contenders.py`, `bench.py` and
`memory_bench.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trm_fast.config import ModelConfig

STEPS = ("train", "inference")


@dataclass(frozen=True)
class Case:
    """One workload.

    Attributes:
        config: as `ModelConfig` takes it.
        rounds: timed turns per contender.
        dtypes: it is run in.
        single: whether one board alone is an inference step of its own.
        policies: of the recursion's memory that a train step is run with.
    """

    name: str
    about: str
    config: Mapping[str, Any]
    rounds: int
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    single: bool = False
    policies: tuple[str, ...] = ("save",)

    @property
    def model(self) -> ModelConfig:
        return ModelConfig.from_dict(dict(self.config))

    def of(self, dtype: str, batch: int) -> Case:
        """The same in a dtype and batch size; more turns where there are fewer boards."""
        small = batch * 4 <= self.config["batch_size"]
        changes = {"forward_dtype": dtype, "batch_size": batch}
        rounds = 3 * self.rounds if small else self.rounds
        return replace(self, config={**self.config, **changes}, rounds=rounds)


OFFICIAL: dict[str, Any] = {
    "batch_size": 8,
    "seq_len": 81,
    "vocab_size": 11,
    "num_puzzle_identifiers": 1,
    "puzzle_emb_ndim": 512,
    "puzzle_emb_len": 16,
    "hidden_size": 512,
    "expansion": 4,
    "num_heads": 8,
    "H_cycles": 3,
    "L_cycles": 6,
    "L_layers": 2,
    "halt_max_steps": 16,
    "halt_exploration_prob": 0.1,
    "forward_dtype": "bfloat16",
}
_RECIPE = OFFICIAL | {
    "batch_size": 64,
    "puzzle_emb_ndim": 0,
    "puzzle_emb_len": 0,
    "hidden_size": 48,
    "num_heads": 4,
    "H_cycles": 1,
    "L_cycles": 2,
    "L_layers": 1,
    "forward_dtype": "float32",
    "mlp_t": True,
    "pos_encodings": "none",
    "intermediate_size": 96,
    "token_intermediate_size": 96,
}
CASES = {
    case.name: case
    for case in (
        Case(
            "official",
            "the official Sudoku mlp_t configuration",
            OFFICIAL | {"mlp_t": True, "pos_encodings": "none"},
            7,
            single=True,
            policies=("save", "light", "recompute"),
        ),
        Case(
            "recipe",
            "the default job's network: 81 tokens of 48, no prefix",
            _RECIPE,
            40,
            dtypes=("float32", "bfloat16"),
        ),
        Case(
            "attention",
            "the official attention configuration",
            OFFICIAL | {"mlp_t": False, "pos_encodings": "rope"},
            7,
            single=True,
        ),
    )
}
_QUICK = {"batch_size": 2, "seq_len": 9, "hidden_size": 16, "num_heads": 2, "H_cycles": 1}
_QUICK_PREFIX = {"puzzle_emb_ndim": 16, "puzzle_emb_len": 2}


def quick(case: Case) -> Case:
    """The same case at a size for tests: nothing about its times means anything."""
    small = _QUICK | (_QUICK_PREFIX if case.config["puzzle_emb_len"] else {})
    return replace(case, config={**case.config, **small, "L_cycles": 2}, rounds=2)


def plan(
    chosen: Iterable[Case],
    dtypes: Sequence[str] = (),
    batches: Sequence[int] = (),
    steps: Sequence[str] = STEPS,
) -> list[tuple[Case, str]]:
    """Every (case, step) to run; `dtypes` and `batches` in place of the cases' own."""
    found = []
    for case in chosen:
        for dtype in dtypes or case.dtypes:
            size = case.config["batch_size"]
            for batch in batches or ((size, 1) if case.single else (size,)):
                alone = not batches and batch != size
                for step in [s for s in steps if not alone or s == "inference"]:
                    found.append((case.of(dtype, batch), step))
    return found
