"""From times to rows, ratios and tables: the results of whole steps.

Imported by `bench.py`. A ratio is the time of a base over the time of a row, of one race: how many
times faster the row is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trm_fast.contenders import COMPILED, OFFICIAL, OWN_WIDTH, PRODUCTS, Entry
from trm_fast.flops import device_peak, step_flops
from trm_fast.timing import basis, device_name, summary

BASES = ("reference", OFFICIAL, COMPILED, OWN_WIDTH, PRODUCTS)
_CLOCKS = {"cpu": "CPU", "wall": "wall"}
_HEADS = {
    "reference": "/reference",
    OFFICIAL: "/official",
    COMPILED: "/compiled",
    OWN_WIDTH: "/own width",
    PRODUCTS: "/matmuls",
}


def row(entry: Entry, step: str, device: torch.device) -> dict:
    """One line of the results."""
    flops = step_flops(entry.config, step)
    seconds = min(getattr(entry, basis(device)))
    rate = flops / seconds / 1e9
    known = device_peak(device_name(device)) if device.type == "cuda" else None
    sixteen = entry.config.forward_dtype in ("bfloat16", "float16")
    return {
        "contender": entry.contender.name,
        "available": True,
        "note": "",
        "policy": entry.config.policy if step == "train" and entry.ours else None,
        "quantize": entry.config.quantize,
        "runs": len(entry.wall),
        "wall_ms": summary(entry.wall),
        "cpu_ms": summary(entry.cpu),
        "inner_widths": {
            "channel": entry.config.channel_width,
            "token": entry.config.token_width if entry.config.mlp_t else None,
        },
        "useful_gflop": flops / 1e9,
        "gflop_per_s": rate,
        "mfu": rate / 1e3 / known.tflop_per_s if known and sixteen else None,
        "boards_per_s": entry.config.batch_size / seconds,
        "saved_mib": None if entry.saved_bytes is None else entry.saved_bytes / 2**20,
        "peak_mib": None if entry.peak_bytes is None else entry.peak_bytes / 2**20,
        "launches": entry.launches,
        "captured": entry.captured(),
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
    """One race as text, at most 136 columns wide."""
    config, threads = result["config"], result["threads"]
    pinned = "" if result["cpus"] is None else " (pinned)"
    bases = [b for b in BASES if any(b in of for of in result["ratios"].values())]
    lines = [
        f"{result['case']}, {named(result['step'], config)}, {config['forward_dtype']}, "
        f"B={config['batch_size']}, {threads} thread{'s' * (threads > 1)}{pinned}, "
        f"ratios by {_CLOCKS[result['clock']]} time",
        f"  {'':<25}{'wall ms':>16}{'CPU ms':>16}{'GFLOP':>8}{'':>5}{_MEMORY[_kept(result)]:>9}"
        f"{_LAUNCHES[result['launched']]:>8}" + "".join(f"{_HEADS[b]:>11}" for b in bases),
        f"  {'':<25}{'median':>8}{'min':>8}{'median':>8}{'min':>8}{'/s':>8}{'MFU':>5}{'MiB':>9}"
        f"{'':>8}" + "".join(f"{'min|median':>11}" for _ in bases),
    ]
    for r in result["rows"]:
        if not r["available"]:
            lines.append(f"  {r['contender']:<25}{r['note']}"[:120])
            continue
        times = "".join(
            f"{_short(r[clock][which]):>8}"
            for clock in ("wall_ms", "cpu_ms")
            for which in ("median", "min")
        )
        kept = r[_kept(result)]
        memory = "" if kept is None else f"{kept:.1f}"
        launched = "" if r["launches"] is None else f"{r['launches']:,}"
        of = result["ratios"].get(r["contender"], {})
        lines.append(
            f"  {r['contender']:<25}{times}{_short(r['gflop_per_s']):>8}{utilization(r):>5.0%}"
            f"{memory:>9}{launched:>8}" + "".join(_pair(of.get(b)).rjust(11) for b in bases)
        )
    return "\n".join(line.rstrip() for line in lines)


_MEMORY = {"peak_mib": "peak", "saved_mib": "kept"}
_LAUNCHES = {"kernels": "kernels", "operations": "ops"}


def _kept(result: Mapping[str, Any]) -> str:
    """Which figure of memory a race has: the allocator's, else what is kept for the backward."""
    peaks = any(r["available"] and r["peak_mib"] is not None for r in result["rows"])
    return "peak_mib" if peaks else "saved_mib"


def named(step: str, config: Mapping[str, Any]) -> str:
    """A step as a reader knows it."""
    return f"{config['halt_max_steps']}-step solve" if step == "solve" else f"{step} step"


def utilization(r: Mapping[str, Any]) -> float:
    """MFU: useful operations over the maker's peak, or over torch.mm's where that is not known."""
    return r["fraction_of_peak"] if r["mfu"] is None else r["mfu"]


def gains(found: Mapping[str, Any]) -> str:
    """What a user gains here: our fastest row of each race beside the official code's."""
    lines = [f"what you gain with trm_fast on {found['device']}"]
    heads = f"  {'':<46}{'ms':>9}{'boards/s':>10}{'MFU':>5}{'MiB':>9}   "
    told = [line for result in found["results"] if (line := _gain(result))]
    if not told:
        return ""
    return "\n".join([*lines, heads + "times faster than (memory, % of its)", *told])


def _gain(result: Mapping[str, Any]) -> str:
    """One line of `gains`; "" where no row of ours is."""
    clock, config = f"{result['clock']}_ms", result["config"]
    rows = {r["contender"]: r for r in result["rows"] if r["available"]}
    ours = [
        r
        for name, r in rows.items()  # what is quantised computes something else
        if not name.startswith((PRODUCTS, OFFICIAL)) and r["quantize"] == "none"
    ]
    if not ours:
        return ""
    best = min(ours, key=lambda r: r[clock]["min"])
    kept = _kept(result)
    threads = "" if result["launched"] == "kernels" else f", {result['threads']} thr."
    name = f"{result['case']} {config['forward_dtype']}, B={config['batch_size']}{threads}"
    line = f"  {name + ', ' + named(result['step'], config):<46}{_short(best[clock]['min']):>9}"
    line += f"{_short(best['boards_per_s']):>10}{utilization(best):>5.0%}"
    line += f"{best[kept]:>9.1f}   " if best[kept] is not None else f"{'':>12}"
    usual = [b for b in (OFFICIAL, COMPILED, OWN_WIDTH) if b in rows]
    bases = usual or [b for b in ("reference",) if b in rows]
    beside = []
    for base in bases:
        times = rows[base][clock]["min"] / best[clock]["min"]
        beside.append(f"{times:.2f}x {base}")
        if best[kept] is not None and rows[base][kept]:
            beside[-1] += f" ({best[kept] / rows[base][kept]:.0%})"
    return f"{line}{best['contender']}: {', '.join(beside)}"


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
    machine = (
        f"trm_fast {found['version']} ({found['commit'] or 'no commit'}), torch "
        f"{found['torch']}\n{found['device']}, instruction set of the extension: "
        f"{found['instruction_set'] or 'none'}, {found['cores']} cores, wait policy "
        f"{found['wait_policy']}"
    )
    if not found["results"]:  # no race, so no table to explain
        return machine
    return (
        f"{machine}\ntorch.mm peak in GFLOP/s: {peaks}\n"
        "/x: time of x over the row's, minima|medians, above 1 the row is faster; no optimizer in "
        "the train step\nMFU: useful operations over the maker's peak, where unknown over "
        "torch.mm's; kept: for the backward; ops: operations without views"
    )
