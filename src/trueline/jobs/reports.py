"""Reports: runs side by side as Markdown and as one HTML page."""

from __future__ import annotations

import base64
import os
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from trueline.errors import ConfigError, DataError
from trueline.evals.choice import paired_test
from trueline.evals.metrics import read_outcomes
from trueline.evals.shapes import results_misfit
from trueline.evals.statistics import paired_difference
from trueline.evals.tables import (
    Table,
    flat,
    frontier_lines,
    markdown_table,
    numbers_table,
    point_table,
    recommendation_lines,
)
from trueline.records.manifest import different
from trueline.records.run_folder import RunFolder, read_results
from trueline.records.style import cell, p_value, printable

Part = tuple[str, Any]
"""A part of a report, by its kind: heading or text, a string; list, strings; pre, lines as they
are; table, names and rows; image, what it shows and its path; samples, answers by tokens."""
PICTURE = b"\x89PNG\r\n\x1a\n"
LARGEST = 32 * 2**20
"""Bytes of a run's picture."""


@dataclass(frozen=True)
class ReportConfig:
    """The runs that are put side by side."""

    runs: Sequence[str | Path]
    """Folders of finished measurements, each once."""

    def __post_init__(self) -> None:
        if isinstance(self.runs, (str, Path)) or not self.runs:
            raise ConfigError(f"`runs` must be a list of folders, got {self.runs!r}.")
        if len({Path(folder).resolve() for folder in self.runs}) < len(self.runs):
            raise ConfigError("A run is named twice. Give each folder once.")


@dataclass(frozen=True)
class ReportResults:
    """A written report: report.md and report.html in `folder`."""

    folder: Path
    runs: tuple[Mapping[str, Any], ...]
    """Each run's results.json, with its `name` and `folder`."""
    markdown: str

    def as_dict(self) -> dict[str, Any]:
        """Return the runs and the folder."""
        return {"runs": list(self.runs), "folder": str(self.folder)}

    def _repr_markdown_(self) -> str:
        return self.markdown


def report(
    config: ReportConfig | Sequence[str | Path], folder: str | Path = "report"
) -> ReportResults:
    """Write report.md and report.html of runs, paired tests where their prompts are the same.

    >>> report(["runs/self-cd", "runs/ada-cd"], "comparison")
    """
    config = config if isinstance(config, ReportConfig) else ReportConfig(config)
    runs = [read_run(path) for path in config.runs]
    names = [Path(path).name or str(path) for path in config.runs]
    for i, (name, results) in enumerate(zip(names, runs, strict=True)):
        results["name"] = name if names.count(name) == 1 else str(config.runs[i])
    folder = Path(folder).expanduser()
    text, page = render_markdown(runs, folder), render_html(runs)
    settings = {"runs": [str(path) for path in config.runs]}
    # A report is made of the runs alone, so that an earlier one of ours may go.
    written = RunFolder(folder, "report", settings, overwrite=True)
    try:
        written.start()
        written.write("report.md", text)
        written.write("report.html", page)
        written.finish({"title": "Report"})
    finally:
        written.close()
    return ReportResults(folder, tuple(runs), text)


def read_run(folder: str | Path) -> dict[str, Any]:
    """Return the results of a run; `DataError` for what no measurement wrote."""
    results = read_results(folder)
    if misfit := results_misfit(results):
        raise DataError(f"{Path(folder) / 'results.json'}: not the results of a run: {misfit}.")
    return results


def picture_of(folder: str | Path, name: str = "plot.png") -> Path | None:
    """Return the run's picture: a PNG file of its own, no link to another."""
    path = Path(folder) / name
    if path.is_symlink() or not path.is_file() or path.stat().st_size > LARGEST:
        return None
    with open(path, "rb") as file:
        return path if file.read(len(PICTURE)) == PICTURE else None


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
                if len(values[0]) != len(values[1]):
                    continue
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


def sections(runs: Sequence[Mapping[str, Any]]) -> list[Part]:
    """Return the parts of a report."""
    parts: list[Part] = []
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
                parts += [("pre", f"{r['name']}:"), ("table", numbers_table(r))]
            if "recommendation" in r:
                own_lines = [*frontier_lines(r), *recommendation_lines(r["recommendation"])]
                text = "\n".join([f"{r['name']}:", *own_lines])
                parts.append(("pre", text))
        if table := compare_runs(own):
            parts += [("heading", "Paired tests on the same prompts"), ("table", table)]
        for r in own:
            if picture := picture_of(r["folder"]):
                parts.append(("image", (r["name"], picture)))
    if len(runs) > 1:
        changed = {k for r in runs[1:] for k, _, _ in different(runs[0]["settings"], r["settings"])}
        values = [{row[0]: row[1] for row in flat(r["settings"])} for r in runs]
        rows = [[k, *(own.get(k, "-") for own in values)] for k in sorted(changed)]
        head = ["setting", *(r["name"] for r in runs)]
        parts += [("heading", "What differs"), ("table", (head, rows))]
    parts.append(("heading", "Commands"))
    parts.append(("pre", "\n".join(f"{r['name']}: {r['command']}" for r in runs)))
    return parts


def markdown_of(title: str, parts: Sequence[Part], folder: Path, lead: str = "") -> str:
    """Return a report as Markdown; pictures are named relative to `folder`."""
    lines = [f"# {cell(title)}", "", *([f"**{cell(lead)}**", ""] if lead else [])]
    for kind, content in parts:
        if kind == "heading":
            lines.append(f"## {cell(content)}")
        elif kind == "table":
            lines.append(markdown_table(content))
        elif kind == "text":
            lines.append(cell(content))
        elif kind == "list":
            lines += [f"- {cell(line)}" for line in content]
        elif kind == "pre":
            lines += [f"    {printable(line)}" for line in content.split("\n")]
        elif kind == "samples":
            lines.append(markdown_table(_sample_table(content)))
        else:
            name, path = content
            place = urllib.parse.quote(Path(os.path.relpath(path, folder)).as_posix())
            lines.append(f"![{cell(name).replace(']', ' ')}]({place})")
        lines.append("")
    return "\n".join(lines)


def _sample_table(samples: Sequence[Mapping[str, Any]]) -> Table:
    """Return answers side by side, without the colours of their tokens."""
    columns = list(dict.fromkeys(c for s in samples for c in s["answers"]))
    rows = [
        [s["prompt"], *("".join(t for t, _ in s["answers"].get(c, ())) for c in columns)]
        for s in samples
    ]
    return ["prompt", *columns], rows


def html_of(
    title: str, parts: Sequence[Part], lead: str = "", *, name: str = "", good: bool = True
) -> str:
    """Return a report as one HTML page with no script and no outside resource.

    Args:
        title: Its heading.
        parts: What it says.
        lead: A sentence above all of them.
        name: In the title of the page; the heading by default.
        good: Whether what the lead says is good news.
    """
    environment = Environment(
        loader=PackageLoader("trueline", "assets"), autoescape=True, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    shown = [
        (kind, (content[0], base64.b64encode(content[1].read_bytes()).decode()))
        if kind == "image"
        else (kind, content)
        for kind, content in parts
    ]
    template = environment.get_template("report.html.jinja")
    return template.render(parts=shown, title=title, lead=lead, good=good, name=name or title)


def render_markdown(runs: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """Return runs side by side as Markdown."""
    return markdown_of("Report", sections(runs), folder)


def render_html(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return runs side by side as one HTML page."""
    return html_of("Report", sections(runs), name=", ".join(r["name"] for r in runs))
