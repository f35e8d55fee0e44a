"""Report: the numbers of a run as Markdown, and runs side by side as Markdown or one HTML page."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trueline.evals.metrics import read_outcomes
from trueline.evals.statistics import paired_difference
from trueline.evals.sweep import paired_test
from trueline.records.manifest import different
from trueline.records.style import cell, decimal, p_value

Table = tuple[list[str], list[list[str]]]
"""Column names and rows of cells."""


def percent(e: Mapping[str, Any] | None) -> str:
    """Return an estimate as "55.0 % [50, 61] n=72"."""
    if e is None or e["value"] is None:
        return "-"
    unknown = f" ({e['unknown']} unknown)" if e.get("unknown") else ""
    low, high = 100 * e["low"], 100 * e["high"]
    return f"{100 * e['value']:.1f} % [{low:.0f}, {high:.0f}] n={e['n']}{unknown}"


def point_table(points: Sequence[Mapping[str, Any]], first: Sequence[str] = ()) -> Table:
    """Return a row for each point: its measures, then length, repetition and perplexity.

    Where a baseline is among them, with the p-value of every measure against it.
    """
    names = list(dict.fromkeys(name for p in points for name in p["measures"]))
    tested = [name for name in names if any(name in p.get("p_baseline", {}) for p in points)]
    head = ["setting", *(name.replace("_", " ") for name in names)]
    head += ["length", "repetition", "perplexity", *(f"p {n.replace('_', ' ')}" for n in tested)]
    rows = []
    for i, p in enumerate(points):
        q = p["quality"]
        row = [f"{first[i]}: {p['label']}" if first else p["label"]]
        row += [percent(p["measures"].get(name)) for name in names]
        row += [decimal(q["length"]["value"], 1), decimal(q["repetition"]["value"], 3)]
        row += [
            decimal(q["perplexity"]),
            *(p_value(p.get("p_baseline", {}).get(n)) for n in tested),
        ]
        rows.append(row)
    return head, rows


def recommendation_lines(r: Mapping[str, Any] | None) -> list[str]:
    """Return what to use and what to expect of it, in sentences."""
    if r is None:
        return ["No recommendation: each half needs prompts of every kind."]
    chosen = r["chosen_on"]
    names = [name for name in chosen if isinstance(chosen[name], Mapping)]

    def shown(numbers: Mapping[str, Any]) -> str:
        return ", ".join(f"{n.replace('_', ' ')} {_measured(n, numbers[n])}" for n in names)

    lines = [f"Recommended: {r['label']}"]
    if not r["meets_floor"]:
        kept = " and ".join(_bound(b) for b in r["bounds"])
        lines = [f"No recommendation: no point keeps {kept}. Nearest: {r['label']}"]
    lines += [
        f"  chosen on one half: {shown(chosen)}",
        f"  on the other half:  {shown(r['reported_on'])}",
    ]
    if r.get("baseline_on"):
        lines.append(f"  the baseline there: {shown(r['baseline_on'])}")
    if r["default_label"] is not None:
        tests = [r[f"p_{n}"] for n in names if r.get(f"p_{n}") is not None]
        test = f"; McNemar p {' and '.join(map(p_value, tests))}" if tests else ""
        lines.append(f"  the default there ({r['default_label']}): {shown(r['default_on'])}{test}")
    return lines


def _measured(name: str, e: Mapping[str, Any]) -> str:
    return _interval(e) if name == "perplexity" else percent(e)


def _bound(b: Mapping[str, Any]) -> str:
    limit = f"{100 * b['limit']:g} %" if b["at_least"] else f"{b['limit']:g} times"
    whose = " the baseline's" if b["of_baseline"] else ""
    name = b["measure"].replace("_", " ")
    return f"{name} {'of at least' if b['at_least'] else 'within'} {limit}{whose}"


def render_table(table: Table) -> str:
    """Return a table as text with columns of equal width."""
    head, rows = table
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in (head, *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(table: Table) -> str:
    """Return a table as Markdown."""
    head, rows = table
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in lines)


def numbers_table(results: Mapping[str, Any]) -> Table:
    """Return the single numbers of a run that has no points, such as a win rate."""
    rows = []
    for name, value in results["numbers"].items():
        if isinstance(value, Mapping) and "low" in value:
            share = value["low"] >= 0 and value["high"] <= 1
            text = percent(value) if share else _interval(value)
        else:
            text = decimal(value, 3) if isinstance(value, float) else str(value)
        rows.append([name.replace("_", " "), text])
    return ["measure", "value"], rows


def render_run(results: Mapping[str, Any], settings: Mapping[str, Any], command: str) -> str:
    """Return one run's Markdown: numbers, recommendation, and what repeats it."""
    lines = [f"# {results['title']}", ""]
    if "points" in results:
        lines += [markdown_table(point_table(results["points"])), ""]
        lines += ["Intervals are Wilson, 95 %; p is McNemar's exact test against the baseline.", ""]
    if "numbers" in results:
        lines += [markdown_table(numbers_table(results)), ""]
    if "recommendation" in results:
        lines += ["    " + line for line in recommendation_lines(results["recommendation"])] + [""]
    if results.get("plot"):
        lines += ["![plot](plot.png)", ""]
    lines += ["## Settings", "", f"    {command}", ""]
    lines += [markdown_table((["setting", "value"], _flat(settings))), ""]
    return "\n".join(lines)


def shown_point(results: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the point that stands for a run: the recommended one, else the best first measure."""
    points = [p for p in results.get("points", ()) if not p["baseline"]]
    if not points:
        return None
    label = (results.get("recommendation") or {}).get("label")
    for point in points:
        if point["label"] == label:
            return point
    if results["metric"] == "refusal":
        return points[0]
    name = next(iter(points[0]["measures"]))
    return max(points, key=lambda p: p["measures"][name]["value"] or 0.0)


def compare_runs(runs: Sequence[Mapping[str, Any]]) -> Table | None:
    """Return paired tests between the runs' chosen points on the same prompts, if there are any."""
    head = ["measure", "first", "second", "difference", "p", "n"]
    rows = []
    for i, a in enumerate(runs):
        for b in runs[i + 1 :]:
            first, second = shown_point(a), shown_point(b)
            data = [r["settings"].get("data", {}).get("sha256") for r in (a, b)]
            if first is None or second is None or data[0] != data[1]:
                continue
            for name in (n for n in first["measures"] if n in second["measures"]):
                values = [read_outcomes(p["measures"][name]["outcomes"]) for p in (first, second)]
                pairs = [(x, y) for x, y in zip(*values, strict=True) if None not in (x, y)]
                if not pairs:
                    continue
                difference = paired_difference([x for x, _ in pairs], [y for _, y in pairs])
                graded = any(v not in (0, 1, None) for part in values for v in part)
                p = difference.p_value if graded else paired_test(*values)
                names = [f"{r['name']}: {q['label']}" for r, q in ((a, first), (b, second))]
                low, high = 100 * difference.low, 100 * difference.high
                shift = f"{100 * difference.value:+.1f} points [{low:+.1f}, {high:+.1f}]"
                row = [name.replace("_", " "), *names, shift, p_value(p), str(len(pairs))]
                rows.append(row)
    return (head, rows) if rows else None


def sections(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any]]:
    """Return the parts of a report as (kind, content): heading, table, text, image."""
    parts: list[tuple[str, Any]] = []
    kinds = list(dict.fromkeys(r["metric"] for r in runs))
    for kind in kinds:
        own = [r for r in runs if r["metric"] == kind]
        parts.append(("heading", kind.replace("_", " ").capitalize()))
        pointed = [(r["name"], p) for r in own for p in r.get("points", ())]
        if pointed:
            names = [name for name, _ in pointed] if len(own) > 1 else []
            parts.append(("table", point_table([p for _, p in pointed], names)))
        for r in own:
            if "numbers" in r:
                parts += [("text", f"{r['name']}:"), ("table", numbers_table(r))]
            if "recommendation" in r:
                text = "\n".join([f"{r['name']}:", *recommendation_lines(r["recommendation"])])
                parts.append(("text", text))
        if table := compare_runs(own):
            parts += [("heading", "Paired tests on the same prompts"), ("table", table)]
        for r in own:
            if (Path(r["folder"]) / "plot.png").is_file():
                parts.append(("image", (r["name"], Path(r["folder"]) / "plot.png")))
    if len(runs) > 1:
        changed = {k for r in runs[1:] for k, _, _ in different(runs[0]["settings"], r["settings"])}
        flat = [dict(_flat(r["settings"])) for r in runs]
        rows = [[k, *(f.get(k, "-") for f in flat)] for k in sorted(changed)]
        head = ["setting", *(r["name"] for r in runs)]
        parts += [("heading", "What differs"), ("table", (head, rows))]
    parts.append(("heading", "Commands"))
    parts.append(("text", "\n".join(f"{r['name']}: {r['command']}" for r in runs)))
    return parts


def render_markdown(runs: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """Return the report as Markdown; pictures are named relative to `folder`."""
    import os

    lines = ["# Report", ""]
    for kind, content in sections(runs):
        if kind == "heading":
            lines.append(f"## {content}")
        elif kind == "table":
            lines.append(markdown_table(content))
        elif kind == "text":
            lines += [f"    {line}" for line in content.splitlines()]
        else:
            name, path = content
            lines.append(f"![{name}]({Path(os.path.relpath(path, folder)).as_posix()})")
        lines.append("")
    return "\n".join(lines)


def render_html(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the report as one HTML page with no script and no outside resource."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("trueline", "assets"), autoescape=True, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    parts = [
        (kind, (content[0], base64.b64encode(content[1].read_bytes()).decode()))
        if kind == "image"
        else (kind, content)
        for kind, content in sections(runs)
    ]
    template = environment.get_template("report.html.jinja")
    return template.render(parts=parts, names=[r["name"] for r in runs])


def _flat(settings: Any, name: str = "") -> list[list[str]]:
    if isinstance(settings, Mapping) and settings:
        pairs = [(f"{name}.{k}" if name else str(k), v) for k, v in settings.items()]
        return [row for full, value in pairs for row in _flat(value, full)]
    return [[name, "-" if settings is None else str(settings)]]


def _interval(e: Mapping[str, Any]) -> str:
    return f"{decimal(e['value'])} [{decimal(e['low'])}, {decimal(e['high'])}] n={e['n']}"
