"""The workloads of the benchmarks: which networks, in which dtypes and batch sizes.

Owns the cases and their expansion into a plan, which depends on the device: a GPU gets the sizes of
the published runs, a CPU some that end. Imported by `contenders.py`, `bench.py` and
`memory_bench.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trm_fast.config import ModelConfig
from trm_fast.ops import POLICIES

# Of a run without --step. The inference step is one of the halt_max_steps of "solve".
_CPU_STEPS, _GPU_STEPS = ("train", "inference"), ("train", "solve")


@dataclass(frozen=True)
class Case:
    """One workload.

    Attributes:
        config: as `ModelConfig` takes it, with the CPU's batch size.
        rounds: timed turns per contender.
        dtypes: it is run in, on the CPU.
        single: whether one board alone is an inference step of its own, on the CPU.
        policies: of the recursion's memory that a train step is run with, on the CPU.
        solved: batch sizes whose solving is timed on the CPU without being asked for.
        gpu_batch: boards of a GPU's train step; 0 where GPUs have nothing to do with the case.
        gpu_solved: batch sizes whose solving is timed there.
        on_cpu: whether a CPU runs it without being asked for.
    """

    name: str
    about: str
    config: Mapping[str, Any]
    rounds: int
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    single: bool = False
    policies: tuple[str, ...] = ("save",)
    solved: tuple[int, ...] = ()
    gpu_batch: int = 0
    gpu_solved: tuple[int, ...] = ()
    on_cpu: bool = True

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
            policies=POLICIES,
            gpu_batch=768,
            gpu_solved=(768, 1, 8, 64),
        ),
        Case(
            "recipe",
            "the default job's network: 81 tokens of 48, no prefix",
            _RECIPE,
            40,
            dtypes=("float32", "bfloat16"),
            solved=(64, 1),
        ),
        Case(
            "attention",
            "the official attention configuration",
            OFFICIAL | {"mlp_t": False, "pos_encodings": "rope"},
            7,
            single=True,
            gpu_batch=768,
            gpu_solved=(768, 1, 8, 64),
        ),
        Case(
            "maze",
            "the official Maze configuration: attention over 916 tokens",
            OFFICIAL
            | {"mlp_t": False, "pos_encodings": "rope", "seq_len": 900, "vocab_size": 6}
            | {"L_cycles": 4, "batch_size": 1},
            3,
            dtypes=("bfloat16",),
            gpu_batch=192,
            gpu_solved=(192, 1),
            on_cpu=False,
        ),
        Case(
            "nano-trm",
            "nano-trm's settings for Sudoku: token mixing over 81 tokens, no puzzle tokens",
            OFFICIAL
            | {"mlp_t": True, "pos_encodings": "none", "puzzle_emb_ndim": 0, "puzzle_emb_len": 0},
            7,
            dtypes=("bfloat16",),
            single=True,
            gpu_batch=768,
            gpu_solved=(768, 1),
            on_cpu=False,
        ),
    )
}
_QUICK = {"batch_size": 2, "seq_len": 9, "hidden_size": 16, "num_heads": 2, "H_cycles": 1}
_QUICK_PREFIX = {"puzzle_emb_ndim": 16, "puzzle_emb_len": 2}


def quick(case: Case) -> Case:
    """The same case at a size for tests: nothing about its times means anything."""
    small = _QUICK | (_QUICK_PREFIX if case.config["puzzle_emb_len"] else {})
    return replace(
        case,
        config={**case.config, **small, "L_cycles": 2, "halt_max_steps": 3},
        rounds=2,
        solved=tuple(min(n, 2) for n in case.solved),
        gpu_batch=min(case.gpu_batch, 2),
        gpu_solved=tuple(min(n, 2) for n in case.gpu_solved[:2]),
    )


def default_cases(device_type: str = "cpu") -> list[Case]:
    """Those that a run on such a device has without being told."""
    if device_type == "cuda":
        return [case for case in CASES.values() if case.gpu_batch]
    return [case for case in CASES.values() if case.on_cpu]


def plan(
    chosen: Iterable[Case],
    dtypes: Sequence[str] = (),
    batches: Sequence[int] = (),
    steps: Sequence[str] = (),
    device_type: str = "cpu",
) -> list[tuple[Case, str]]:
    """Every (case, step) to run; `dtypes`, `batches` and `steps` in place of the cases' own."""
    found = []
    for case in chosen:
        on_gpu = device_type == "cuda" and case.gpu_batch > 0
        if on_gpu:
            case = replace(
                case,
                config={**case.config, "batch_size": case.gpu_batch},
                dtypes=("bfloat16",),
                policies=POLICIES,
            )
        for dtype in dtypes or case.dtypes:
            found += [
                (case.of(dtype, batch), step)
                for batch, step in _sizes(case, batches, steps, on_gpu)
            ]
    return found


def _sizes(
    case: Case, batches: Sequence[int], steps: Sequence[str], on_gpu: bool
) -> list[tuple[int, str]]:
    """(boards, step) of a case in one dtype."""
    size = case.config["batch_size"]
    solved = case.gpu_solved if on_gpu else case.solved
    alone = (1,) if case.single and not on_gpu and size != 1 else ()
    own = {"train": (size,), "inference": (size, *alone), "solve": solved or (size, *alone)}
    wanted = steps or (_GPU_STEPS if on_gpu else _CPU_STEPS)
    if not steps and solved and "solve" not in wanted:
        wanted = (*wanted, "solve")
    sizes = {step: tuple(batches) or own[step] for step in wanted}
    order = dict.fromkeys(batch for of in sizes.values() for batch in of)
    return [(batch, step) for batch in order for step in wanted if batch in sizes[step]]
