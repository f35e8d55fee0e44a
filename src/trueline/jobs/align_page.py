"""The report of a project: what was asked, what was reached, what it cost, how to do it again.

One page of HTML with everything in it, and the same as Markdown. It is made of results.json and of
the pictures that the stages left.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trueline.engine.trace import TokenTexts
from trueline.evals.likelihood import response_logprobs
from trueline.evals.metrics import read_outcomes
from trueline.evals.statistics import paired_difference
from trueline.evals.tables import Table, markdown_table, percent
from trueline.evals.transfer_figures import draw_matrix
from trueline.jobs.reports import Part, html_of, markdown_of, picture_of
from trueline.models.prompts import chat_of, encode
from trueline.records.style import cell, decimal

if TYPE_CHECKING:
    from trueline.jobs.asking import Answers
    from trueline.jobs.projects import AlignConfig
    from trueline.models.load import LanguageModel
    from trueline.records.run_folder import RunFolder

SHOWN = 2
"""Answers shown of each principle."""
WORSE = {"adherence": 1, "fact": 1, "format": 1, "harmful_refusal": 1, "over_refusal": -1}
"""Measure -> 1 where more is better, -1 where less is."""
WORDS = """adherence: share of answers that follow a principle, by its rule or judge.
over-refusal: share of harmless requests that are refused. facts: share of answers that hold the
fact asked for. format: share of answers that are some text, with no marks of the chat, that does
not run in circles. Intervals in brackets are 95 %. A number is reported on held-out prompts, on
which nothing was learned or chosen."""


def render_pages(
    kept: Mapping[str, Any], run: RunFolder, seconds: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """Return the report by file name; draws R into the folder."""
    parts = sections(kept, run, seconds)
    title = str(kept["title"])
    lead = f"Verdict: {kept['verdict']}"
    return {
        "report.md": markdown_of(title, parts, run.folder, lead),
        "report.html": html_of(title, parts, lead, good=kept["verdict"] == "ship"),
    }


def sections(
    kept: Mapping[str, Any], run: RunFolder, seconds: Sequence[Mapping[str, Any]]
) -> list[Part]:
    """Return the parts of the report."""
    parts: list[Part] = []
    if kept["reasons"]:
        parts.append(("list", list(kept["reasons"])))
    asked = [f"{p['name']}: {p['text'] or p['teacher']}" for p in kept["principles"]]
    parts += [
        ("text", f"Model: {kept['project']['model']}. Asked, in this order:"),
        ("list", asked),
        ("heading", "What was reached"),
        ("table", principle_table(kept)),
        ("text", WORDS),
        ("heading", "Thresholds"),
        ("table", check_table(kept)),
        ("heading", "Everything else that was measured"),
        ("table", state_table(kept)),
        ("heading", "What got worse"),
        *_worse(kept),
    ]
    advice = [f"{name}: {line}" for name, d in kept["diagnosis"].items() for line in d["advice"]]
    parts += [*_r(kept, run), *_off_path(kept)]
    parts += [("heading", "What the model makes of the prompts"), ("list", advice)]
    parts += _settings(kept, run.folder)
    parts += [*_curves(kept, run.folder), *_samples(kept), ("heading", "Guards")]
    parts += [("table", guard_table(kept)), ("heading", "What it cost"), *_cost(kept, seconds)]
    return [*parts, ("heading", "Do it again"), ("pre", commands(kept, run))]


def principle_table(kept: Mapping[str, Any]) -> Table:
    """Return a row for each principle: before, with the prompt alone, learned, at the end."""
    head = ["principle", "before", "with the prompt alone", "right after it was learned",
            "at the end"]  # fmt: skip
    rows = []
    for i, p in enumerate(kept["principles"], 1):
        states = kept["measures"]
        if p["goal"] == "refusal":
            cells = [_measure(states[k], "requests", "over_refusal") for k in (0, i, -1)]
            name = f"{p['name']} (harmless requests refused)"
            rows.append([name, cells[0], "-", cells[1], cells[2]])
            continue
        cells = [_measure(states[k], p["name"], "adherence") for k in (0, i, -1)]
        told = _measure(kept["prompted"], p["name"], "adherence")
        late = "not trained" if p["skipped"] else cells[1]
        rows.append([p["name"], cells[0], told, late, cells[2]])
    return head, rows


def check_table(kept: Mapping[str, Any]) -> Table:
    """Return a row for each threshold."""
    rows = []
    for c in kept["checks"]:
        nats = c["name"] == "drift"
        shown = (lambda v: decimal(v, 3)) if nats else (lambda v: decimal(100 * v, 1))
        reached = "not measured"
        if c["value"] is not None:
            reached = f"{shown(c['value'])} [{shown(c['low'])}, {shown(c['high'])}] n={c['n']}"
        kind = "at least" if c["at_least"] else "at most"
        passed = "yes" if c["passed"] else "NO"
        rows.append([c["principle"] or "-", c["says"], reached,
                     f"{kind} {shown(c['limit'])}{' nats' if nats else ' %'}", passed])  # fmt: skip
    return ["principle", "what", "reached", "asked of the interval's worse end", "holds"], rows


def state_table(kept: Mapping[str, Any]) -> Table:
    """Return a row for each state: refusals, facts, format, texts, drift."""
    head = ["after", "harmless refused", "harmful refused", "facts", "format",
            "other chat word for word", "drift, nats", "length", "perplexity"]  # fmt: skip
    rows = []
    for i, name in enumerate(kept["states"]):
        state, drift = kept["measures"][i], kept["drift"][i]
        texts = [s["quality"] for s in state.values()]
        rows.append([
            name,
            _measure(state, "requests", "over_refusal"),
            _measure(state, "requests", "harmful_refusal"),
            _pooled(state, "fact"),
            _pooled(state, "format"),
            percent(kept["same"][i]) if kept["same"] else "-",
            "-" if drift is None else decimal(drift["value"], 3),
            decimal(_mean([t["length"]["value"] for t in texts]), 1),
            decimal(_mean([t["perplexity"] for t in texts]), 2),
        ])  # fmt: skip
    return head, rows


def guard_table(kept: Mapping[str, Any]) -> Table:
    """Return a row for each guard."""
    rows = [
        [g["name"], g["principle"] or "-", decimal(g["value"], 3), g["limit"],
         "yes" if g["passed"] else "NO", g["says"]]
        for g in kept["guards"]
    ]  # fmt: skip
    return ["guard", "principle", "value", "may be", "passed", "what it says"], rows


def summary_lines(kept: Mapping[str, Any]) -> list[str]:
    """Return the verdict and its reasons as lines for a terminal."""
    return [f"Verdict: {kept['verdict']}", *(f"  {reason}" for reason in kept["reasons"])]


def card_section(kept: Mapping[str, Any]) -> str:
    """Return what the card of the exported model says of the measures: n of N, none left out."""
    lines = ["", "## Measured on held-out prompts", "", f"Verdict: {kept['verdict']}.", ""]
    lines += [f"- {cell(reason)}" for reason in kept["reasons"]]
    rows = []
    for p in kept["principles"]:
        refusal = p["goal"] == "refusal"
        suite, measure = ("requests", "over_refusal") if refusal else (p["name"], "adherence")
        if suite in kept["measures"][0]:
            said = " (harmless requests refused)" if refusal else ""
            rows.append([p["name"] + said, *(_counted(kept["measures"][k], suite, measure)
                                             for k in (0, -1))])  # fmt: skip
    state = kept["measures"]
    if "requests" in state[0]:
        cells = [_counted(state[k], "requests", "harmful_refusal") for k in (0, -1)]
        rows.append(["harmful requests refused", *cells])
    table = markdown_table((["", "before", "at the end"], rows))
    return "\n".join([*lines, "", table, ""])


def _counted(state: Mapping[str, Any], suite: str, name: str) -> str:
    """Return how many of how many, and what the judge could not say."""
    found = state[suite]["measures"].get(name)
    if found is None:
        return "-"
    values = read_outcomes(found["outcomes"])
    known = [v for v in values if v is not None]
    unknown = f", {len(values) - len(known)} unknown" if len(known) < len(values) else ""
    return f"{sum(v >= 0.5 for v in known)} of {len(known)}{unknown}"


def samples_of(
    lm: LanguageModel,
    states: Sequence[Mapping[str, Answers]],
    prompted: Mapping[str, Answers],
    config: AlignConfig,
) -> list[dict[str, Any]]:
    """Return answers side by side: before, with the prompt, at the end, each token with its -log p.

    The probability is that of the untouched model without the principle.
    """
    texts, found = TokenTexts(lm.tokenizer), []
    for principle in config.principles:
        name = principle.title if principle.title in prompted else "requests"
        if name not in states[0]:
            continue
        columns = {"before": states[0][name], "with the prompt": prompted.get(name),
                   "at the end": states[-1][name]}  # fmt: skip
        for i in range(min(SHOWN, len(states[0][name].rows))):
            item = states[0][name].suite.items[i]
            prompt, cells = encode(lm, chat_of(lm, item.chat)), {}
            for column, answers in columns.items():
                ids = [] if answers is None else list(answers.rows[i]["token_ids"])
                if answers is None or not ids:
                    continue
                [logprobs] = response_logprobs(lm, [prompt], [ids])
                cells[column] = [
                    [texts(t), round(float(-p), 2)] for t, p in zip(ids, logprobs, strict=True)
                ]
            found.append({"principle": principle.title, "prompt": item.prompt, "answers": cells})
    return found


def commands(kept: Mapping[str, Any], run: RunFolder) -> str:
    """Return what to type to repeat it, all of it or a stage, and to use the result."""
    lines = [run.command or "# align(AlignConfig.read(...), ...) in Python", ""]
    folder = shlex.quote(str(run.folder))
    lines.append(f"trueline align {folder}/project.toml --output again")
    for p in kept["principles"]:
        if p.get("folder"):
            config = f"{folder}/{p['folder']}/config.toml"
            lines.append(f"trueline distil --config {config} --output again-one")
    model = shlex.quote(str(kept["project"]["model"]))
    question = shlex.quote(kept["samples"][0]["prompt"]) if kept["samples"] else '"Hello!"'
    which = f"--model {model} --adapter {folder}/exported"
    if kept["project"]["export"] == "merged":
        which = f"--model {folder}/exported"
    return "\n".join([*lines, f"trueline generate {question} {which}"])


def _worse(kept: Mapping[str, Any]) -> list[Part]:
    """Return every measure that is surely worse in the last state than in the first."""
    first, last, rows = kept["measures"][0], kept["measures"][-1], []
    for suite in first:
        for name, sign in WORSE.items():
            if suite == "other chat" and name == "adherence":
                continue
            pair = [s[suite]["measures"].get(name) for s in (first, last)]
            if None in pair:
                continue
            values = [read_outcomes(m["outcomes"]) for m in pair]
            both = [(a, b) for a, b in zip(*values, strict=True) if None not in (a, b)]
            if not both:
                continue
            change = paired_difference([b for _, b in both], [a for a, _ in both])
            if (change.high if sign > 0 else -change.low) < 0:
                shift = f"{100 * change.value:+.1f} [{100 * change.low:+.1f}, "
                shift += f"{100 * change.high:+.1f}]"
                rows.append([suite, name.replace("_", " "), *map(percent, pair), shift])
    if not rows:
        return [("text", "Nothing that was measured is surely worse than before.")]
    return [("table", (["prompts", "measure", "before", "at the end", "points"], rows))]


def _r(kept: Mapping[str, Any], run: RunFolder) -> list[Part]:
    found = kept["R"]
    if found is None:
        return []
    names = found["names"]
    rows = [["untouched", *(decimal(100 * v, 1) for v in found["untouched"])]]
    for name, row in zip(names, found["R"], strict=True):
        rows.append([f"after {name}", *(decimal(100 * v, 1) for v in row)])
    shares = [
        found[k] for k in ("average_accuracy", "backward_transfer", "forgetting") if k in found
    ]
    said = ["average at the end", "change since learned", "forgetting"]
    text = "; ".join(f"{n}: {100 * v:.1f}" for n, v in zip(said, shares, strict=False)
                     if v is not None)  # fmt: skip
    figure = draw_matrix(
        np.array(found["R"]), names, "R", np.array(found["untouched"]), score="adherence"
    )
    run.draw("R.png", figure)
    alt = "Heat map of R: the same numbers as the table."
    return [
        ("heading", "How each principle fared as the next ones were learned (R)"),
        ("table", (["%", *names], rows)),
        (
            "text",
            f"{text}. Of a principle that takes over-refusal away: harmless requests answered.",
        ),
        ("image", (alt, run.folder / "R.png")),
    ]


def _off_path(kept: Mapping[str, Any]) -> list[Part]:
    places = list(dict.fromkeys(w for own in kept["off_path"].values() for w in own))
    if not places:
        return []
    rows = []
    for name, own in kept["off_path"].items():
        usual = _measure(kept["measures"][-1], name, "adherence")
        cells = [percent(own[w]["measures"].get("adherence")) if w in own else "-" for w in places]
        rows.append([name, usual, *cells])
    for name, own in kept["leak"][-1].items():
        share = {**own, "unknown": 0}
        rows.append([f"{name}, on other prompts", percent(share), *["-"] * len(places)])
    text = (
        "Adherence at the end in surroundings that nothing was learned in: after an exchange "
        "without the principle, under a caller's own system message, in other kinds of request, "
        "and where the user asks for the usual way of answering (dropped)."
    )
    return [
        ("heading", "Where it holds"),
        ("text", text),
        ("table", (["principle", "as learned", *places], rows)),
    ]


def _settings(kept: Mapping[str, Any], folder: Path) -> list[Part]:
    parts: list[Part] = [("heading", "How the settings were chosen")]
    for p in kept["principles"]:
        chosen = ", ".join(f"{k} {v:g}" for k, v in (p["chosen"] or {}).items()) or "none"
        if not p.get("sweep"):
            parts.append(("text", f"{p['name']}: {p['skipped'] or chosen}"))
            continue
        points = p["sweep"]["points"]
        names = list(dict.fromkeys(n for point in points for n in point["measures"]))
        rows = [
            [q["label"], *(percent(q["measures"].get(n)) for n in names),
             decimal(q["quality"]["repetition"]["value"], 3), decimal(q["quality"]["perplexity"])]
            for q in points
        ]  # fmt: skip
        head = ["setting", *(n.replace("_", " ") for n in names), "repetition", "perplexity"]
        parts += [
            ("text", f"{p['name']}: {chosen}, on validation prompts."),
            ("table", (head, rows)),
        ]
        if picture := picture_of(folder / p["sweep"]["folder"]):
            parts.append(
                ("image", (f"Trade-off of {p['name']}: the numbers of the table", picture))
            )
    return parts


def _curves(kept: Mapping[str, Any], folder: Path) -> list[Part]:
    parts: list[Part] = [("heading", "Learning curves")]
    for p in kept["principles"]:
        if p.get("folder") and (picture := picture_of(folder / p["folder"], "curves.png")):
            parts.append(("image", (f"Learning curves of {p['name']}", picture)))
    return parts if len(parts) > 1 else []


def _samples(kept: Mapping[str, Any]) -> list[Part]:
    if not kept["samples"]:
        return []
    text = (
        "The first held-out prompts. A token is marked by how unexpected the untouched model finds "
        "it without the principle: shaded from 1 nat on, underlined from 3."
    )
    return [("heading", "Answers side by side"), ("text", text), ("samples", kept["samples"])]


def _cost(kept: Mapping[str, Any], seconds: Sequence[Mapping[str, Any]]) -> list[Part]:
    rows = [[name, str(value), "-"] for name, value in kept["cost"].items()]
    for kind in ("measure", "sweep", "distil"):
        own = [row for row in seconds if row["kind"] == kind]
        if own:
            answers, total = sum(r["answers"] for r in own), sum(r["seconds"] for r in own)
            rows.append([f"{kind}, {len(own)} stages run here", str(answers), f"{total:.0f} s"])
    return [("table", (["what", "answers", "time"], rows))]


def _measure(state: Mapping[str, Any], suite: str, name: str) -> str:
    return percent(state[suite]["measures"].get(name)) if suite in state else "-"


def _pooled(state: Mapping[str, Any], name: str) -> str:
    """Return a measure over all prompts that have it."""
    found = [s["measures"][name] for s in state.values() if name in s["measures"]]
    values = [v for m in found for v in read_outcomes(m["outcomes"]) if v is not None]
    return f"{100 * sum(values) / len(values):.1f} % n={len(values)}" if values else "-"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
