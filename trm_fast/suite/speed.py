"""How fast each operation is at real sizes, beside the reference, and what its kernels take.

Owns these items of stage B. Imported by `stages.py`.
"""

from __future__ import annotations

from trm_fast.op_bench import OpRace, set_up
from trm_fast.op_cases import OpCase
from trm_fast.suite.predictions import Prediction, operation_ms
from trm_fast.suite.records import measurement
from trm_fast.suite.session import Rows, Session
from trm_fast.suite.steps import breakdown

ROUNDS = 30
SECONDS = 4.0  # of one race; a slow operation gets fewer rounds


def predicted(case: OpCase, direction: str) -> Prediction:
    return operation_ms(case.op, case.name, direction, *case.cost(direction))


def operation(session: Session, op: str) -> Rows:
    """Every case of an operation, forward and both, then its kernels."""
    for case in session.cases(op):
        for direction in session.directions(case):
            race = set_up(case, direction, session.device, interpreted=session.interpreted)
            race.run(session.count(ROUNDS), SECONDS)
            yield from race_rows(session, race)
            fused = race.entries[-1]
            shown = op == "swiglu" or not session.tiny  # one is enough for the dry run
            if shown and direction == case.directions[-1] and fused.name != "reference":
                step = race.step(fused)
                name = f"op/{op}/{case.name}/{fused.name} kernels"
                yield from breakdown(session, name, lambda step=step: step(0))  # type: ignore[misc]


def race_rows(session: Session, race: OpRace) -> Rows:
    """One row per contender; the prediction is of the fused ones only."""
    case, direction = race.case, race.direction
    result = race.result(session.peaks())
    for row in result["rows"]:
        name = f"op/{case.op}/{case.name}/{direction}/{row['contender']}"
        if not row["available"]:
            yield measurement(name, None, "ms", note=row["note"])
            continue
        fused = row["contender"] != "reference"
        rates = f"{row['tflop_per_s']:.3g} TFLOP/s, {row['gb_per_s']:.4g} GB/s"
        if fused:
            rates += f", x{result['speedup'][row['contender']]:.2f} of the reference"
        yield measurement(
            name,
            row["ms"]["median"],
            "ms",
            predicted(case, direction) if fused else None,
            note=rates,
            **{key: row[key] for key in ("ms", "launch_ms", "runs", "error_over_allowed")},
            **{key: row[key] for key in ("fraction_of_matmul", "fraction_of_copy")},
        )
