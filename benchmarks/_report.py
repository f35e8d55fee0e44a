"""Measured rows to Markdown, a bar chart, and the table of targets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Found = dict[str, Any]

LABELS = {
    "generate": "transformers `generate`, greedy",
    "guidance_scale": "transformers `guidance_scale`",
    "two caches, mask": "Linear Alignment's release: two caches in turn, mask by sorting",
    "plain, torch": "ours, plain",
    "plain, packed": "ours, plain, packed weights",
    "LA, torch": "ours, Linear Alignment, no mask",
    "LA, packed": "ours, Linear Alignment, no mask, packed weights",
    "LA mask, torch": "ours, Linear Alignment, candidates 0.8",
    "LA mask, packed": "ours, Linear Alignment, candidates 0.8, packed weights",
    "Self-CD, torch": "ours, Self-CD",
    "Self-CD, packed": "ours, Self-CD, packed weights",
}
MAIN = "LA, packed"
"""The contender that the targets are about: two branches, no mask, as `load_model` makes it."""


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; numbers should come as finished strings."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def markdown(found: Found) -> str:
    """Return the whole report."""
    m = found["machine"]
    threads = f"{m['threads']} of {m['cores']} cores, load {m['load']} at the start"
    versions = f"torch {m['torch']}, transformers {m['transformers']}, Python {m['python']}"
    parts = [f"# Decoding speed\n\n{m['cpu']}; {threads}; {versions}; {m['date']}\n"]
    parts += [_decode(found), _self_cd(found), _arithmetic(found), _products(found)]
    parts += [_prefixes(found), _refill(found), _equal(found), _targets(found)]
    return "\n".join(part for part in parts if part)


def _decode(found: Found) -> str:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in found["decode"]:
        groups.setdefault((row["model"], row["dtype"], row["batch"]), []).append(row)
    head = ["", "tokens/s (CPU)", "tokens/s (wall)", "ratio", "prompt, s", "step, ms", "step ratio"]
    text = f"## Tokens per second, {found['new_tokens']} new tokens\n"
    for (model, dtype, batch), rows in groups.items():
        text += f"\n### {model} {dtype}, batch {batch}\n\n"
        if rows[0]["new_tokens"] < found["new_tokens"]:
            text += f"Stated for {found['new_tokens']} tokens from runs of "
            text += f"{rows[0]['new_tokens']}: prompt + steps.\n\n"
        text += table(
            head,
            [
                [
                    LABELS[r["contender"]],
                    f"{r['tokens_per_second']:.1f}",
                    f"{r['tokens_per_second_wall']:.1f}",
                    f"**{r['ratio']:.2f}**",
                    f"{r['prompt']:.2f}",
                    f"{1000 * r['step']:.1f}",
                    f"{r['step_ratio']:.2f}",
                ]
                for r in rows
            ],
        )
    return text


def _refill(found: Found) -> str:
    rows = found.get("refill")
    if not rows:
        return ""
    text = f"## Places that fill up again, {rows[0]['rows']} rows, answers of unequal length\n\n"
    text += "The same requests with `when_empty` and with `each_step`; tokens of a CPU second.\n\n"
    head = ["", "method", "requests", "tokens", "waiting", "refilled", "times", "same texts"]
    return text + table(
        head,
        [
            [
                f"{r['model']} {r['dtype']}",
                r["method"],
                r["requests"],
                r["tokens"],
                f"{r['when_empty_tokens_per_second']:.1f}",
                f"{r['each_step_tokens_per_second']:.1f}",
                f"**{r['times']:.2f}**",
                r["same_texts"],
            ]
            for r in rows
        ],
    )


def _self_cd(found: Found) -> str:
    rows = found["self_cd"]
    if not rows:
        return ""
    text = f"## The released Self-CD loop at {rows[0]['tokens']} tokens, batch 1\n\n"
    text += "Both contexts are recomputed from their first token at every token. Timed at "
    text += f"{rows[0]['places']} places of the run, summed by interpolation.\n\n"
    head = ["", "release, s", "with the last logits only, s", "ours, s", "ours is faster by"]
    head += ["and by", "same tokens"]
    return text + table(
        head,
        [
            [
                f"{r['model']} {r['dtype']}",
                f"{r['released_seconds']:.1f}",
                f"{r['trimmed_seconds']:.1f}",
                f"{r['ours_seconds']:.2f}",
                f"**{r['released_times']:.1f}**",
                f"{r['trimmed_times']:.1f}",
                r["same_tokens"],
            ]
            for r in rows
        ],
    )


def large_steps(found: Found) -> dict[str, float]:
    """Return the seconds of a two-branch step of the 0.5B model at batch 1, by dtype."""
    return {
        r["dtype"]: r["step"]
        for r in found["decode"]
        if (r["model"], r["batch"], r["contender"]) == ("0.5B", 1, MAIN)
    }


def _arithmetic(found: Found) -> str:
    part, steps = found["arithmetic"], large_steps(found)
    text = f"## Arithmetic of the methods, one request, vocabulary of {part['vocab']}\n\n"
    text += "`combine` and the choice of a token: microseconds, and the share of a 0.5B step.\n"
    text += "Flat logits are a random model's and the worst case.\n\n"
    head = ["method", "choice", "logits", "top-p set", "us", *(f"{d} step" for d in steps)]
    return text + table(
        head,
        [
            [r["method"], r["choice"], r["logits"], r["top_p_set"], f"{1e6 * r['seconds']:.0f}"]
            + [f"{r['seconds'] / step:.1%}" for step in steps.values()]
            for r in part["rows"]
        ],
    )


def _products(found: Found) -> str:
    rows = found["products"]
    if not rows:
        return ""
    text = "## Matrix products of a few rows\n\nMicroseconds of x W^T: torch's own, transposed "
    text += "(W x^T)^T, packed for oneDNN. The fastest in bold.\n\n"
    counts = sorted({r["rows"] for r in rows})
    lines: dict[tuple[str, ...], dict[int, dict[str, float]]] = {}
    for r in rows:
        times = {way: r[way] for way in ("torch", "transposed", "packed") if way in r}
        for way in times:
            line = (r["model"], r["dtype"], f"{r['matrix']} {r['shape']}", way)
            lines.setdefault(line, {})[r["rows"]] = times
    body = []
    for key, by_rows in lines.items():
        cells = [(f"{1e6 * c[key[3]]:.0f}", c[key[3]] == min(c.values())) for c in by_rows.values()]
        body.append([*key, *(f"**{text}**" if best else text for text, best in cells)])
    head = ["model", "dtype", "matrix", "product", *(f"{n} rows" for n in counts)]
    return text + table(head, body)


def _prefixes(found: Found) -> str:
    if not found["prefixes"]:
        return ""
    text = "## System prompts computed once per run\n\nLinear Alignment without mask; one decoder "
    text += "for all batches, with and without `share_prefixes`.\n\n"
    head = ["", "requests", "batches", "new tokens", "prompts apart, s", "prompts shared, s"]
    head += ["ratio", "whole run", "same tokens"]
    return text + table(
        head,
        [
            [
                f"{r['model']} {r['dtype']}",
                r["requests"],
                r["batches"],
                r["new_tokens"],
                f"{r['prompt_seconds_apart']:.2f}",
                f"{r['prompt_seconds_shared']:.2f}",
                f"**{r['prompt_seconds_apart'] / r['prompt_seconds_shared']:.2f}**",
                f"{r['seconds_apart'] / r['seconds_shared']:.2f}",
                _yes(r["equal"]),
            ]
            for r in found["prefixes"]
        ],
    )


def _equal(found: Found) -> str:
    if not found["equal"]:
        return ""
    text = "## Equality, float32, greedy\n\nDistinct: how many different tokens the run has; "
    text += "a run of one token would prove little.\n\n"
    return text + table(
        ["model", "batch", "ours", "same tokens as", "distinct", "equal"],
        [
            [
                r["model"],
                r["batch"],
                LABELS[r["contender"]],
                LABELS[r["reference"]],
                r["distinct"],
                _yes(r["equal"]),
            ]
            for r in found["equal"]
        ],
    )


def _yes(value: bool) -> str:
    return "yes" if value else "**no**"


def targets(found: Found) -> list[Row]:
    """Return each target with what was measured and whether it is met; None where not measured."""
    ratios = {
        (r["model"], r["dtype"], r["contender"]): r["ratio"]
        for r in found["decode"]
        if r["batch"] == 1
    }
    result: list[Row] = []

    def add(what: str, goal: str, value: float | None, met: bool) -> None:
        result.append({"target": what, "goal": goal, "measured": value})
        result[-1]["met"] = None if value is None else met

    for model, dtype, goal in (
        ("135M", "bfloat16", 0.95),
        ("0.5B", "bfloat16", 0.88),
        ("135M", "float32", 0.80),
    ):
        ratio = ratios.get((model, dtype, MAIN))
        met = ratio is not None and ratio >= goal
        add(f"two branches / `generate`, {model} {dtype}", f">= {goal}", ratio, met)
    for model, dtype, goal in (
        ("135M", "bfloat16", 1.7),
        ("0.5B", "bfloat16", 1.7),
        ("0.5B", "float32", 1.25),
    ):
        ratio, rival = (ratios.get((model, dtype, c)) for c in (MAIN, "guidance_scale"))
        gain = ratio / rival if ratio and rival else None
        met = gain is not None and gain >= goal
        add(f"two branches / `guidance_scale`, {model} {dtype}", f">= {goal}", gain, met)
    for r in found["self_cd"]:
        if (r["model"], r["tokens"]) == ("135M", 200):
            what = f"ours / released Self-CD, {r['tokens']} tokens, 135M {r['dtype']}"
            add(what, ">= 20", r["released_times"], r["released_times"] >= 20)
    peaked = [
        r["seconds"]
        for r in found["arithmetic"]["rows"]
        if (r["logits"], r["choice"]) == ("peaked", "greedy") and r["method"].endswith("0.8")
    ]
    for dtype, step in large_steps(found).items():
        share = peaked[0] / step
        add(f"mask and contrast in a step, 0.5B {dtype}", "< 0.03", share, share < 0.03)
    sections = ("equal", "prefixes", "self_cd")
    checks = [r["equal"] for k in sections for r in found[k] if r["dtype"] == "float32"]
    wrong = checks.count(False) if checks else None
    add(f"float32 runs unlike the reference, of {len(checks)}", "0", wrong, not wrong)
    return result


def _targets(found: Found) -> str:
    words = {True: "pass", False: "**fail**", None: "not run"}
    return "## Targets\n\n" + table(
        ["", "goal", "measured", ""],
        [
            [
                r["target"],
                r["goal"],
                "-" if r["measured"] is None else f"{r['measured']:.3g}",
                words[r["met"]],
            ]
            for r in found["targets"]
        ],
    )


def chart(found: Found, path: Path) -> str:
    """Draw the ratios at batch 1, one panel a model and dtype; return what was done."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "No chart: matplotlib is missing (pip install 'trueline[plots]')."
    groups: dict[str, list[Row]] = {}
    for row in found["decode"]:
        if row["batch"] == 1:
            groups.setdefault(f"{row['model']} {row['dtype']}", []).append(row)
    if not groups:
        return "No chart: nothing ran at batch 1."
    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(2.5 + 4.2 * columns, 0.6 + 3.0 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axis in axes.flat[len(groups) :]:
        axis.set_axis_off()
    for axis, (title, rows) in zip(axes.flat, groups.items(), strict=False):
        names = [r["contender"] for r in rows]
        colors = ["tab:blue" if "torch" in n or "packed" in n else "tab:gray" for n in names]
        bars = axis.barh(names, [r["ratio"] for r in rows], color=colors)
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.12)
    axes[0, 0].invert_yaxis()
    figure.supxlabel("speed relative to transformers' greedy generate, batch 1", fontsize=9)
    figure.savefig(path, dpi=120)
    return f"chart: {path}"
