"""Tables: the numbers of a run as text for a terminal and as Markdown.

What others wrote (labels, names, cells of files) reaches neither a terminal with its control
characters nor a page as HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trueline.records.style import cell, decimal, p_value, printable, shortened

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
    compared = any("dominated_by" in p for p in points)
    head += ["dominated by"] * compared
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
        rows.append(row + [p.get("dominated_by") or "-"] * compared)
    return head, rows


def recommendation_lines(r: Mapping[str, Any] | None) -> list[str]:
    """Return what to use and what to expect of it, in sentences."""
    if r is None:
        return ["No recommendation: each half needs prompts of every kind."]
    chosen = r["chosen_on"]
    names = [name for name in chosen if isinstance(chosen[name], Mapping)]

    def shown(numbers: Mapping[str, Any]) -> str:
        return ", ".join(f"{n.replace('_', ' ')} {_measured(n, numbers[n])}" for n in names)

    what = r["label"] + (", and no contrast" if r.get("contrast") is False else "")
    lines = [f"Recommended: {what}"]
    if not r["meets_floor"]:
        kept = " and ".join(_bound(b) for b in r["bounds"])
        lines = [f"No recommendation: no point keeps {kept}. Nearest: {what}"]
        if any(b["of_baseline"] for b in r["bounds"]) and "floor" in r:
            lines = [
                f"No recommendation: no point refuses {100 * r['floor']:g} % of harmful prompts.",
                f"Least over-refusal at the plain model's harmful refusals: {what}",
            ]
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
    if r.get("contrast") is False and r.get("best_contrast"):
        lines.append(f"  of the method's own settings: {r['best_contrast']}")
    return lines


def frontier_lines(results: Mapping[str, Any]) -> list[str]:
    """Return what the frontier of refusals says, in sentences; none where there is no frontier."""
    lines = []
    if areas := results.get("frontier"):
        texts, both, gain = (areas[name] for name in ("texts", "all", "gain"))
        lines += [
            "Area under over-refusal against harmful refusals (0.5 is a coin, 1 is perfect):",
            f"  system texts alone {_area(texts)}, with the method {_area(both)}",
            f"  the method adds {gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}], "
            f"p {p_value(gain['p_value'])}",
        ]
    for e in results.get("effects", ()):
        with_text, without = e["with_rates"], e["without_rates"]
        lines.append(f'The text "{shortened(one_line(e["text"]), 60)}" {EFFECTS[_sign(e)]}')
        lines.append(
            f"  refused with it: {_pair(with_text)}; without it: {_pair(without)}; "
            f"McNemar p {p_value(e['p_value'])}"
        )
    return lines


EFFECTS = {
    1: "adds refusals, which a contrast can take away:",
    0: "changes refusals little: a contrast has little to work with:",
    -1: "takes refusals away, so a contrast that takes its effect away adds them (reversed):",
}


def _sign(effect: Mapping[str, Any]) -> int:
    return (effect["direction"] > 0) - (effect["direction"] < 0)


def _pair(rates: Sequence[float]) -> str:
    return f"{100 * rates[0]:.1f} % of safe, {100 * rates[1]:.1f} % of harmful prompts"


def _area(e: Mapping[str, Any]) -> str:
    return f"{e['value']:.3f} [{e['low']:.3f}, {e['high']:.3f}]"


def _measured(name: str, e: Mapping[str, Any]) -> str:
    return _interval(e) if name == "perplexity" else percent(e)


def _bound(b: Mapping[str, Any]) -> str:
    limit = f"{100 * b['limit']:g} %" if b["at_least"] else f"{b['limit']:g} times"
    whose = " the baseline's" if b["of_baseline"] else ""
    name = b["measure"].replace("_", " ")
    return f"{name} {'of at least' if b['at_least'] else 'within'} {limit}{whose}"


def prompts_line(results: Mapping[str, Any]) -> str:
    """Return how many of the data's prompts were measured; empty where all were."""
    counts = results.get("prompts") or {}
    n, of = counts.get("n"), counts.get("of")
    if n is None or n == of:
        return ""
    skipped = results.get("settings", {}).get("data", {}).get("skipped", 0)
    return f"{n} of {of} prompts" + (f", {skipped} too long for the model" if skipped else "")


def render_table(table: Table) -> str:
    """Return a table as text with columns of equal width."""
    head, *rows = ([one_line(c) for c in row] for row in (table[0], *table[1]))
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
            ends = [value["low"], value["high"]]
            share = all(isinstance(end, (int, float)) and 0 <= end <= 1 for end in ends)
            text = percent(value) if share else _interval(value)
        else:
            text = decimal(value, 3) if isinstance(value, float) else str(value)
        rows.append([name.replace("_", " "), text])
    return ["measure", "value"], rows


def render_run(results: Mapping[str, Any], settings: Mapping[str, Any], command: str) -> str:
    """Return one run's Markdown: numbers, recommendation, and what repeats it."""
    lines = [results_markdown({**results, "settings": settings})]
    if results.get("plot"):
        lines += ["![plot](plot.png)", ""]
    lines += ["## Settings", "", f"    {one_line(command)}", ""]
    lines += [markdown_table((["setting", "value"], flat(settings))), ""]
    return "\n".join(lines)


def render_results(results: Mapping[str, Any]) -> str:
    """Return the numbers of a run for a terminal."""
    parts = []
    if "points" in results:
        parts.append(render_table(point_table(results["points"])))
    if "numbers" in results:
        parts.append(render_table(numbers_table(results)))
    if line := prompts_line(results):
        parts.append(line)
    if "recommendation" in results:
        lines = [*frontier_lines(results), *recommendation_lines(results["recommendation"])]
        parts.append("\n".join(["", *map(printable, lines)]))
    if results.get("warning"):
        parts += ["", f"warning: {printable(str(results['warning']))}"]
    return "\n".join(parts)


def results_markdown(results: Mapping[str, Any]) -> str:
    """Return the numbers of a run as Markdown, without its settings."""
    lines = [f"# {cell(results['title'])}", ""]
    if "points" in results:
        lines += [markdown_table(point_table(results["points"])), ""]
        lines += ["Intervals are Wilson, 95 %; p is McNemar's exact test against the baseline.", ""]
    if "numbers" in results:
        lines += [markdown_table(numbers_table(results)), ""]
    if line := prompts_line(results):
        lines += [line + ".", ""]
    if "recommendation" in results:
        found = [*frontier_lines(results), *recommendation_lines(results["recommendation"])]
        lines += ["    " + printable(line) for line in found] + [""]
    if results.get("warning"):
        lines += [f"Warning: {cell(results['warning'])}", ""]
    return "\n".join(lines)


def flat(settings: Any, name: str = "") -> list[list[str]]:
    """Return [name with dots, value] of every setting."""
    if isinstance(settings, Mapping) and settings:
        pairs = [(f"{name}.{k}" if name else str(k), v) for k, v in settings.items()]
        return [row for full, value in pairs for row in flat(value, full)]
    return [[name, "-" if settings is None else str(settings)]]


def _interval(e: Mapping[str, Any]) -> str:
    return f"{decimal(e['value'])} [{decimal(e['low'])}, {decimal(e['high'])}] n={e['n']}"


def one_line(text: object) -> str:
    """Return text on one line, every control character as its escape."""
    return " ".join(printable(str(text)).split())
