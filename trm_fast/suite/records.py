"""The results file of the suite: one JSON object a line, each complete the moment it is written.

Owns writing, reading and the closing table. Imported by the other modules of `suite`; loads no
torch, so that the process that watches over the measuring one stays small.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# What an item can end as. "wrong" computed something else, "overtime" ran past its deadline,
# "killed" did not even stop then, "stopped" was interrupted from outside.
STATUSES = ("ok", "skipped", "wrong", "failed", "overtime", "killed", "stopped")
BAD = ("wrong", "failed", "overtime", "killed")


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a line, and wait until it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path, run: str | None = None) -> list[dict[str, Any]]:
    """All records, or those of one run; a last line that was cut off is left out."""
    found = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return [r for r in found if run is None or r.get("run") == run]


def latest(records: Iterable[dict[str, Any]], stage: str) -> list[dict[str, Any]]:
    """The items of the last run of a stage."""
    items = [r for r in records if r.get("stage") == stage and "item" in r]
    return [r for r in items if r["run"] == items[-1]["run"]] if items else []


def measurement(
    name: str, value: float | None, unit: str, predicted: Any = None, **more: Any
) -> dict[str, Any]:
    """One number of a record, None for what could not be measured; with its `Prediction`."""
    row: dict[str, Any] = {"name": name, "value": value, "unit": unit}
    if predicted is not None and value is not None:
        row |= {"predicted": predicted.value, "ratio": predicted.ratio(value)}
        if predicted.low is not None or predicted.high is not None:
            row["range"] = [predicted.low, predicted.high]
        row["source"] = predicted.source
    return row | more


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def line(row: dict[str, Any]) -> str:
    """One measurement as text, the prediction and the ratio beside it."""
    shown = f"  {row['name']:<52}{number(row['value']):>10} {row['unit']:<12}"
    if "predicted" in row:
        shown += f"predicted {number(row['predicted']):>7}  x{row['ratio']:.2f}"
    return (shown + ("  " + row["note"] if row.get("note") else "")).rstrip()


def table(records: Sequence[dict[str, Any]]) -> str:
    """Everything that was measured, and how the items ended that were not all right."""
    lines = []
    for record in records:
        if "item" not in record:
            continue
        rows = record["rows"]
        if record["status"] != "ok" or not rows:
            reason = f": {record['reason']}" if record["reason"] else ""
            lines.append(f"{record['stage']} {record['item']}: {record['status']}{reason}")
        else:
            lines.append(f"{record['stage']} {record['item']} ({record['seconds']:.0f} s)")
        lines += [line(row) for row in rows]
    counts = [(s, sum(r.get("status") == s for r in records)) for s in STATUSES]
    lines.append("; ".join(f"{count} {status}" for status, count in counts if count))
    return "\n".join(lines)
