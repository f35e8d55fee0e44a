"""The report of `measurement.py` as Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from trueline.evals.tables import (
    markdown_table,
    percent,
    point_table,
    recommendation_lines,
)
from trueline.records.style import decimal

HEADINGS = {
    "frontier": "Frontier over alpha",
    "ratio": "Ratio and candidates",
    "recommended": "Recommended settings",
    "real": "Real data and models",
    "hh": "Implicit reward on HH pairs",
    "throughput": "Throughput",
}


def markdown(found: Mapping[str, Any]) -> str:
    """Return the parts that were measured, in a fixed order, each with what it took."""
    writers = {
        "frontier": _sweep,
        "ratio": _sweep,
        "recommended": _recommended,
        "real": _real,
        "hh": _hh,
        "throughput": _throughput,
    }
    lines = ["# Measurement", ""]
    for name, writer in writers.items():
        if name not in found:
            continue
        part = found[name]
        m = part["machine"]
        seconds = f"{part['seconds']:.0f} s, " if "points" in part else ""
        lines += [f"## {HEADINGS[name]}", "", *writer(part), ""]
        lines += [
            f"*{seconds}{m['threads']} thread of {m['cores']} cores, {m['cpu']}, load {m['load']}, "
            f"torch {m['torch']}, transformers {m['transformers']}, {m['date']}.*",
            "",
        ]
    return "\n".join(lines)


def _sweep(part: Mapping[str, Any]) -> list[str]:
    lines = [f"    {part['call']}", "", markdown_table(point_table(part["points"]))]
    if part.get("recommendation"):
        lines += ["", *(f"    {x}" for x in recommendation_lines(part["recommendation"]))]
    return lines


def _recommended(part: Mapping[str, Any]) -> list[str]:
    lines = []
    head = ["against the default, on the other half", "mean difference", "better", "equal", "worse"]
    head += ["better, p < 0.05", "worse, p < 0.05"]
    for name, found in part.items():
        if name == "machine":
            continue
        chosen = ", ".join(f"{label} ({n})" for label, n in found["chosen"].items())
        rows = [
            [
                measure.replace("_", " "),
                f"{100 * m['difference']:+.2f} points" if m["difference"] is not None else "-",
                *(str(m[k]) for k in ("better", "equal", "worse")),
                *(str(m[k]) for k in ("clearly_better", "clearly_worse")),
            ]
            for measure, m in found["measures"].items()
        ]
        floor = found.get("floor_met")
        reached = f" The floor was reached in {floor}." if floor is not None else ""
        lines += [
            f"{name.capitalize()}: default {found['default']}, {found['halvings']} halvings. "
            f"Chosen: {chosen or 'none'}.{reached}",
            "",
            markdown_table((head, rows)),
            "",
        ]
    return lines[:-1]


def _real(part: Mapping[str, Any]) -> list[str]:
    head = ["model", "data", "n", "left out", "setting", "result", "length", "repetition"]
    head += ["perplexity", "s"]
    rows = []
    for row in part["rows"]:
        start = [row["model"], row["data"]]
        if "error" in row:
            error = re.sub(r'"[^"]*/([^"/]+)"', r'"\1"', row["error"])
            rows.append([*start, "-", "-", "-", error, *["-"] * 4])
            continue
        start += [str(row["n"]), str(row["skipped"])]
        for point in row.get("points", ()):
            quality = point["quality"]
            shown = [f"{n.replace('_', ' ')} {percent(m)}" for n, m in point["measures"].items()]
            cells = [point["label"], "; ".join(shown), decimal(quality["length"]["value"], 1)]
            cells += [decimal(quality["repetition"]["value"], 3), decimal(quality["perplexity"])]
            rows.append([*start, *cells, f"{row['seconds']:.0f}"])
        for name, value in row.get("numbers", {}).items():
            cells = ["-", f"{name} {percent(value)}", "-", "-", "-"]
            rows.append([*start, *cells, f"{row['seconds']:.0f}"])
    return [markdown_table((head, rows))]


def _hh(part: Mapping[str, Any]) -> list[str]:
    head = ["model", "pairs", "too long, left out", "accuracy", "margin, nats"]
    head += ["the longer answer, same pairs", "s"]
    rows = []
    for row in part["rows"]:
        if "error" in row:
            rows.append([row["model"], "-", "-", row["error"], "-", "-", "-"])
            continue
        n, m = row["numbers"], row["numbers"]["margin"]
        margin = f"{m['value']:.2f} [{m['low']:.2f}, {m['high']:.2f}]"
        cells = [str(n["accuracy"]["n"]), str(n["skipped"]), percent(n["accuracy"]), margin]
        rows.append([row["model"], *cells, percent(row["longer"]), f"{row['seconds']:.0f}"])
    start = f'Principle "{part["principle"]}", Linear Alignment\'s branches, {part["pairs"]} pairs.'
    return [start, "", markdown_table((head, rows))]


def _throughput(part: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            "`generate`, end of text ignored: every completion has 64 tokens",
            f"{part['tokens']:,}",
            f"{part['seconds']:.1f} ({part['cpu_seconds']:.1f} of CPU)",
            f"{part['tokens'] / part['seconds']:,.0f}",
        ],
        [
            "`measure` at alpha 2.5 as it is used: two settings (self-cd, "
            "plain), end of text ends, judged, perplexity, files",
            f"{part['run_tokens']:.1f} a prompt",
            f"{part['run_seconds']:.1f}",
            "-",
        ],
    ]
    head = [f"Self-CD, {part['prompts']} prompts", "tokens", "seconds", "tokens/s"]
    return [markdown_table((head, rows))]
