"""The three stages: which items, in which order, with which limits.

Owns `STAGES`. Imported by `bench/gpu_suite.py`. What matters most comes first: the budget may be
over before the end.
"""

from __future__ import annotations

from functools import partial

from trm_fast.contenders import Contender
from trm_fast.ops import OP_NAMES
from trm_fast.suite import ceilings, compiled, engine, speed, steps, truth, tuning, why
from trm_fast.suite.session import Item

EAGER = Contender("official eager", official=True)
COMPILED = Contender("official compiled", official=True, compiled=True)
PADDED = Contender("official compiled, padded", official=True, compiled=True, padded=112)
MAIN = ("token_mix/mlp_t", "swiglu_rmsnorm/channel", "rope_attention/sudoku")
CUDA_LIBRARY = ("deep_recursion/attention", "deep_recursion/mlp_t", "embed_reset/sudoku")
TUNED = ("token_mix", "swiglu_rmsnorm", "rope_attention", "linear_rmsnorm", "residual_rmsnorm")

A = (
    Item("GPU state", ceilings.gpu_state, 30),
    Item("peaks", ceilings.peaks, 30),
    Item("products", ceilings.products, 40),
    Item("token products", ceilings.token_products, 40),
    Item("products of all passes", ceilings.all_passes, 30),
    Item("launches", ceilings.launches, 20),
    Item("elementwise", ceilings.elementwise, 20),
    Item("compiled library", compiled.ready, 240),
    *(Item(f"correct {op}", partial(truth.operation, op=op), 60, gate=True) for op in OP_NAMES),
    Item("compiled library, correct", compiled.correct, 60, gate=True),
    Item("compiled library, registered", compiled.registered, 60, gate=True),
    Item("supervision steps mlp_t", partial(truth.supervision_steps, mixer="mlp_t"), 60, gate=True),
    Item(
        "supervision steps attention",
        partial(truth.supervision_steps, mixer="attention"),
        60,
        gate=True,
    ),
    *(
        Item(f"captured step {mixer}", partial(engine.exact, mixer=mixer), 60, gate=True)
        for mixer in ("mlp_t", "attention")
    ),
    *(
        Item(
            f"{EAGER.name} {mixer}",
            partial(steps.official_steps, mixer=mixer, contender=EAGER, count=5),
            60,
        )
        for mixer in ("mlp_t", "attention")
    ),
    Item(
        f"{COMPILED.name} mlp_t",
        partial(steps.official_steps, mixer="mlp_t", contender=COMPILED, count=15),
        240,
    ),
    Item(
        f"{PADDED.name} mlp_t",
        partial(steps.official_steps, mixer="mlp_t", contender=PADDED, count=15),
        240,
    ),
    Item("correct in other dtypes", partial(truth.other_dtypes, ops=OP_NAMES), 120),
    Item(
        f"{COMPILED.name} attention",
        partial(steps.official_steps, mixer="attention", contender=COMPILED, count=15),
        240,
    ),
)
B = (
    Item("trainer's step mlp_t", partial(engine.trainer_step, mixer="mlp_t"), 60),
    Item(
        "trainer's step attention", partial(engine.trainer_step, mixer="attention"), 60, dry=False
    ),
    Item("step mlp_t", partial(steps.our_steps, mixer="mlp_t"), 90),
    Item("step attention", partial(steps.our_steps, mixer="attention"), 60, dry=False),
    *(
        Item(f"op {op}", partial(speed.operation, op=op), 60, dry=op != "deep_recursion")
        for op in OP_NAMES
    ),
    *(
        Item(
            f"step {mixer} {policy}",
            partial(steps.our_steps, mixer=mixer, policy=policy),
            45,
            dry=(mixer, policy) == ("attention", "recompute"),
        )
        for mixer in ("mlp_t", "attention")
        for policy in ("light", "recompute")
    ),
    *(
        Item(
            f"step {mixer} compiled library",
            partial(compiled.step, mixer=mixer),
            60,
            dry=mixer == "attention",
        )
        for mixer in ("mlp_t", "attention")
    ),
    Item("step mlp_t reference", partial(steps.our_steps, mixer="mlp_t", fused=False), 45),
    *(
        Item(
            f"inference {mixer} B{batch}",
            partial(steps.throughput, mixer=mixer, batch=batch),
            45,
            dry=(mixer, batch) == ("mlp_t", 768),
        )
        for mixer, batch in (
            *(("mlp_t", batch) for batch in (768, 1, 8, 64, 1536)),
            *(("attention", batch) for batch in (768, 1)),
        )
    ),
    *(
        Item(
            f"answers {mixer} B{batch}",
            partial(engine.answers, mixer=mixer, batch=batch),
            45,
            dry=mixer == "attention",
        )
        for mixer, batch in (
            *(("mlp_t", batch) for batch in (1, 8, 64, 768)),
            ("attention", 1),
        )
    ),
    *(Item(f"rows {op}", partial(tuning.operation, op=op), 90, dry=op == TUNED[0]) for op in TUNED),
    Item("curve mlp_t", partial(steps.curve, mixer="mlp_t", steps=300), 300),
)
C = (
    *(Item(f"counters {what}", partial(why.counters, what=f"{what}/both"), 90) for what in MAIN),
    Item("second round of rows", tuning.second_round, 120),
    *(
        Item(f"memory check {op}", partial(why.memory_check, what=f"{op}/both"), 60)
        for op in (*MAIN, "linear_rmsnorm/o_proj", "residual_rmsnorm/tokens", "embed_reset/sudoku")
    ),
    *(
        Item(
            f"memory check {op}, CUDA library",
            partial(why.memory_check, what=f"{op}/both/cuda"),
            120,
        )
        for op in CUDA_LIBRARY
    ),
)
STAGES = {"A": A, "B": B, "C": C}
