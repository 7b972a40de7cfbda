"""From times to rows, ratios and tables: the results of whole steps.

Imported by `bench.py`. A ratio is the time of a base over the time of a row, of one race: how many
times faster the row is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trm_fast.contenders import OWN_WIDTH, PRODUCTS, Entry
from trm_fast.flops import step_flops
from trm_fast.timing import basis, summary

BASES = ("reference", "official", OWN_WIDTH, PRODUCTS)
_CLOCKS = {"cpu": "CPU", "wall": "wall"}
_HEADS = {
    "reference": "/reference",
    "official": "/official",
    OWN_WIDTH: "/own width",
    PRODUCTS: "/matmuls",
}


def row(entry: Entry, step: str, device: torch.device) -> dict:
    """One line of the results."""
    flops = step_flops(entry.config, step)
    rate = flops / min(getattr(entry, basis(device))) / 1e9
    return {
        "contender": entry.contender.name,
        "available": True,
        "note": "",
        "policy": entry.config.policy if step == "train" and entry.ours else None,
        "runs": len(entry.wall),
        "wall_ms": summary(entry.wall),
        "cpu_ms": summary(entry.cpu),
        "inner_widths": {
            "channel": entry.config.channel_width,
            "token": entry.config.token_width if entry.config.mlp_t else None,
        },
        "useful_gflop": flops / 1e9,
        "gflop_per_s": rate,
        "saved_mib": None if entry.saved_bytes is None else entry.saved_bytes / 2**20,
        "errors": entry.errors,
    }


def add_fractions(
    results: Sequence[dict[str, Any]], peaks: Mapping[str, Mapping[str, float]]
) -> None:
    """`fraction_of_peak` of every row, by the peaks on as many threads in the same dtype."""
    for result in results:
        peak = peaks[str(result["threads"])][result["config"]["forward_dtype"]]
        for r in result["rows"]:
            if r["available"]:
                r["fraction_of_peak"] = r["gflop_per_s"] / peak


def ratios(rows: Sequence[dict], clock: str) -> dict[str, dict[str, dict[str, float]]]:
    """row -> base -> how many times faster it is, by minima and by medians of the clock."""
    times = {r["contender"]: r[f"{clock}_ms"] for r in rows if r["available"]}
    return {
        name: {
            base: {which: times[base][which] / taken[which] for which in ("min", "median")}
            for base in BASES
            if base in times and base != name
        }
        for name, taken in times.items()
    }


def table(result: dict[str, Any]) -> str:
    """One race as text, at most 120 columns wide."""
    config, threads = result["config"], result["threads"]
    pinned = "" if result["cpus"] is None else " (pinned)"
    bases = [b for b in BASES if any(b in of for of in result["ratios"].values())]
    lines = [
        f"{result['case']}, {result['step']} step, {config['forward_dtype']}, "
        f"B={config['batch_size']}, {threads} thread{'s' * (threads > 1)}{pinned}, "
        f"ratios by {_CLOCKS[result['clock']]} time",
        f"  {'':<20}{'wall ms':>16}{'CPU ms':>16}{'GFLOP':>7}{'of':>5}{'kept':>8}"
        + "".join(f"{_HEADS[b]:>11}" for b in bases),
        f"  {'':<20}{'median':>8}{'min':>8}{'median':>8}{'min':>8}{'/s':>7}{'peak':>5}{'MiB':>8}"
        + "".join(f"{'min|median':>11}" for _ in bases),
    ]
    for r in result["rows"]:
        if not r["available"]:
            lines.append(f"  {r['contender']:<20}{r['note']}"[:120])
            continue
        times = "".join(
            f"{_short(r[clock][which]):>8}"
            for clock in ("wall_ms", "cpu_ms")
            for which in ("median", "min")
        )
        kept = "" if r["saved_mib"] is None else f"{r['saved_mib']:.1f}"
        of = result["ratios"].get(r["contender"], {})
        lines.append(
            f"  {r['contender']:<20}{times}{r['gflop_per_s']:>7.1f}{r['fraction_of_peak']:>5.0%}"
            f"{kept:>8}" + "".join(_pair(of.get(b)).rjust(11) for b in bases)
        )
    return "\n".join(line.rstrip() for line in lines)


def _short(ms: float) -> str:
    """Milliseconds with what of them is known."""
    return f"{ms:.2f}" if ms < 100 else f"{ms:.1f}" if ms < 1000 else f"{ms:.0f}"


def _pair(ratio: Mapping[str, float] | None) -> str:
    if ratio is None:
        return ""
    return "|".join(
        f"{x:.2f}" if x < 10 else f"{x:.1f}" if x < 100 else f"{x:.0f}"
        for x in (ratio["min"], ratio["median"])
    )


def head(found: dict[str, Any]) -> str:
    """What the numbers depend on, and what the columns are."""
    peaks = "; ".join(
        f"{count} thread{'s' * (count != '1')} " + ", ".join(f"{n} {v:.0f}" for n, v in of.items())
        for count, of in found["peak_gflop_per_s"].items()
    )
    return (
        f"trm_fast {found['version']} ({found['commit'] or 'no commit'}), torch "
        f"{found['torch']}\n{found['device']}, instruction set of the extension: "
        f"{found['instruction_set'] or 'none'}, {found['cores']} cores, wait policy "
        f"{found['wait_policy']}\n"
        f"torch.mm peak in GFLOP/s: {peaks}\n"
        "/x: time of x over the row's, minima|medians, above 1 the row is faster; no optimizer in "
        "the train step"
    )
