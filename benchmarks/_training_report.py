"""Training runs to tables, a figure, and the answer to one question: is it sooner?"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks._report import table
from recipes.distil.measure import Rate, pool

Record = dict[str, Any]
Curve = list[dict[str, Any]]
"""Points with `responses`, `cpu_seconds` and pooled measures."""
MEASURES = (
    "adherence",
    "adherence_sampled",
    "fact",
    "kl_own",
    "kl_chat",
    "same_chat",
    "leak",
    "unsafe_refused",
)
RIVALS = ("grpo", "rloo", "dpo, prompt", "dpo, linear alignment")
ENOUGH = 0.9


def pooled(records: Sequence[Record]) -> Curve:
    """Return the mean curve of runs that differ in their seed alone."""
    curves = [r["curve"] for r in records]
    return [
        {
            "responses": points[0]["responses"],
            "cpu_seconds": sum(p["cpu_seconds"] for p in points) / len(points),
            **{name: pool([p[name] for p in points]) for name in MEASURES},
        }
        for points in zip(*curves, strict=True)
    ]


def groups(
    records: Sequence[Record], group: str, key: Callable[[Record], Any] = lambda r: r["way"]
) -> dict[Any, Curve]:
    """Return the mean curves of one comparison, by `key`."""
    found: dict[Any, list[Record]] = {}
    for record in records:
        if record["group"] == group:
            found.setdefault(key(record), []).append(record)
    return {name: pooled(rows) for name, rows in found.items()}


def reached(curve: Curve, goal: float, measure: str = "adherence_sampled") -> dict[str, Any] | None:
    """Return the first point at which the mean is at least `goal`."""
    return next((p for p in curve if p[measure]["mean"] >= goal), None)


def best(curve: Curve) -> dict[str, Any]:
    """Return the point of the largest adherence times facts: before a collapse, if there is one."""
    return max(curve, key=lambda p: p["adherence_sampled"]["mean"] * p["fact"]["mean"])


def claims(curves: dict[str, Curve], ours: str) -> list[dict[str, Any]]:
    """Compare `ours` with each rival: half the responses to its adherence, at no larger KL?

    Against the rival's last point, and against its best one where that is another.
    """
    rows = []
    for rival in RIVALS:
        if rival not in curves or ours not in curves:
            continue
        last, peak = curves[rival][-1], best(curves[rival])
        if last["adherence_sampled"]["mean"] - curves[rival][0]["adherence_sampled"]["mean"] < 0.1:
            continue  # it learnt nothing, which the curves show; there is nothing to reach
        for name, theirs in (("last", last), ("best", peak)):
            if name == "best" and peak is last:
                continue
            mine = reached(curves[ours], theirs["adherence_sampled"]["mean"])
            row: dict[str, Any] = {"ours": ours, "rival": rival, "point": name, "theirs": theirs}
            row |= {"mine": mine, "sooner": False, "no_larger_kl": False}
            if mine is not None:
                row["sooner"] = mine["responses"] <= theirs["responses"] / 2
                row["no_larger_kl"] = all(
                    mine[kl]["mean"] <= theirs[kl]["mean"] for kl in ("kl_own", "kl_chat")
                )
            rows.append(row)
    return rows


def show(value: Rate, digits: int = 3) -> str:
    """A number with its standard error."""
    return f"{value['mean']:.{digits}f} ± {value['se']:.{digits}f}"


def _race(curves: dict[str, Curve], rates: dict[str, float]) -> str:
    head = ["", "lr", f"responses to {ENOUGH:.0%}", "CPU s to it", "CPU s in all"]
    head += ["adherence, greedy", "sampled", "fact", "KL own, nats", "KL chat", "unsafe refused"]
    rows = []
    for way, curve in curves.items():
        first, last = reached(curve, ENOUGH), curve[-1]
        row = [way, f"{rates[way]:g}", str(first["responses"]) if first else "-"]
        row += [f"{first['cpu_seconds']:.1f}" if first else "-", f"{last['cpu_seconds']:.1f}"]
        row += [show(last[m]) for m in ("adherence", "adherence_sampled", "fact")]
        row += [show(last["kl_own"], 2), show(last["kl_chat"]), show(last["unsafe_refused"], 2)]
        rows.append(row)
    return table(head, rows)


def _curve_table(curves: dict[str, Curve], measure: str) -> str:
    points = [p["responses"] for p in next(iter(curves.values()))]
    rows = [[way, *(show(p[measure]) for p in curve)] for way, curve in curves.items()]
    return table([measure, *(str(n) for n in points)], rows)


def _claims(rows: list[dict[str, Any]]) -> str:
    head = ["ours", "rival", "its point", "its adherence", "its responses", "ours gets there at"]
    head += ["KL own: its, ours", "KL chat: its, ours", "half the responses", "no larger KL"]
    lines = []
    for r in rows:
        theirs, mine = r["theirs"], r["mine"]
        line = [r["ours"], r["rival"], r["point"], show(theirs["adherence_sampled"])]
        line += [theirs["responses"], mine["responses"] if mine else "never"]
        for kl in ("kl_own", "kl_chat"):
            own = f"{mine[kl]['mean']:.3f}" if mine else "-"
            line.append(f"{theirs[kl]['mean']:.3f}, {own}")
        line += ["yes" if r["sooner"] else "**no**", "yes" if r["no_larger_kl"] else "**no**"]
        lines.append(line)
    return table(head, lines)


def _options(record: Record) -> tuple[Any, ...]:
    o = record["options"]
    return o["loss"], o["ratio"], o["candidates"]


def _last_table(curves: dict[Any, Curve], head: list[str]) -> str:
    names = ("adherence", "adherence_sampled", "fact", "kl_own", "kl_chat", "leak")
    rows = []
    for key, curve in curves.items():
        cells = [str(k) for k in (key if isinstance(key, tuple) else (key,))]
        rows.append(cells + [show(curve[-1][n], 2 if n == "kl_own" else 3) for n in names])
    return table([*head, *names], rows)


def markdown(found: dict[str, Any], told: str) -> str:
    """Return the whole report."""
    records, rates = found["runs"], found["learning_rates"]
    seeds = len({r["seed"] for r in records if r["group"] == "race"})
    m = found["machine"]
    text = f'# Inverse-Q* against TRL, principle "{told}"\n\n{m["cpu"]}; {m["threads"]} thread; '
    text += f"torch {m['torch']}, transformers {m['transformers']}; {m['date']}\n\n"
    for group, title in (("race", "From a warm start"), ("cold", "From the bundled model")):
        curves = groups(records, group)
        if not curves:
            continue
        text += f"## {title}\n\n{seeds} seeds, mean ± standard error over seeds.\n\n"
        text += _race(curves, rates) + "\n"
        for measure in ("adherence_sampled", "adherence", "fact", "kl_own", "kl_chat"):
            text += _curve_table(curves, measure) + "\n"
        for ours in ("inverse-q", "inverse-q, on-policy"):
            text += _claims(claims(curves, ours)) + "\n"
    ablation = groups(records, "ablation", _options)
    if ablation:
        text += "## Loss x ratio x mask, on-policy, warm start, last point\n\n"
        text += _last_table(ablation, ["loss", "ratio", "candidates"]) + "\n"
    guided = groups(records, "guided", lambda r: r["options"]["guided"])
    if guided:
        text += "## Share of answers that the teacher draws, imitation, bundled model\n\n"
        text += _last_table(guided, ["guided"]) + "\n"
    same = groups(records, "sdft")
    if same:
        gradient = found.get("sdft_gradient", {})
        text += "## SDFT and Inverse-Q* at ratio 0\n\nLargest relative difference of gradients: "
        text += ", ".join(f"{k} {v:.1e}" for k, v in gradient.items()) + ".\n\n"
        for measure in ("adherence_sampled", "kl_own", "kl_chat"):
            text += _curve_table(same, measure) + "\n"
    if "effects" in found:
        text += "## What a teacher has to teach, before training, nats a token\n\n"
        names = ("name", "principle", "linear-alignment")
        head = ["", "principle in the prompt", "linear-alignment"]
        rows = [[r[n] if n == "name" else f"{r[n]:.5f}" for n in names] for r in found["effects"]]
        text += table(head, rows) + "\n"
    return text


def draw(curves: dict[str, Curve], path: Path) -> None:
    """Draw adherence and both divergences over responses and over CPU seconds."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = (
        ("adherence_sampled", "adherence, sampled"),
        ("kl_chat", "KL on other chat, nats/token"),
    )
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), sharey="row", layout="constrained")
    colours = dict(zip(curves, pyplot.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    for (measure, label), pair in zip(rows, axes, strict=True):
        for (x, x_label), ax in zip(
            (("responses", "responses used"), ("cpu_seconds", "CPU seconds")), pair, strict=True
        ):
            for way, curve in curves.items():
                xs = [p[x] for p in curve]
                ys = [p[measure]["mean"] for p in curve]
                se = [p[measure]["se"] for p in curve]
                style = "-" if way.startswith("inverse-q") else "--"
                ax.plot(xs, ys, style, color=colours[way], label=way, marker=".")
                low, high = ([y + k * s for y, s in zip(ys, se, strict=True)] for k in (-1, 1))
                ax.fill_between(xs, low, high, color=colours[way], alpha=0.15, linewidth=0)
            ax.set_xlabel(x_label)
            if x == "responses":
                ax.set_ylabel(label)
            if measure == "kl_chat":
                ax.set_yscale("symlog", linthresh=0.01)
                ax.set_ylim(bottom=0)
    axes[0, 1].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_price(curves: dict[str, Curve], path: Path) -> None:
    """Draw adherence over the divergence from the start: what it costs, however fast it came."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey="row", layout="constrained")
    for ax, (measure, label) in zip(
        axes,
        (("kl_own", "KL on its own answers, nats"), ("kl_chat", "KL on other chat, nats/token")),
        strict=True,
    ):
        for way, curve in curves.items():
            style = "-" if way.startswith("inverse-q") else "--"
            xs, ys = ([p[m]["mean"] for p in curve] for m in (measure, "adherence_sampled"))
            ax.plot(xs, ys, style, label=way, marker=".")
        ax.set_xlabel(label)
    axes[1].set_xscale("symlog", linthresh=0.01)
    axes[0].set_ylabel("adherence, sampled")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write(found: dict[str, Any], folder: Path, told: str) -> str:
    """Write inverse_q.json, .md and two pictures into `folder`; return the text."""
    text = markdown(found, told)
    folder.mkdir(parents=True, exist_ok=True)
    records = found["runs"]
    kept = {k: v for k, v in found.items() if k != "runs"}
    kept["claims"] = [
        dict(row.items())
        for group in ("race", "cold")
        for ours in ("inverse-q", "inverse-q, on-policy")
        for row in claims(groups(records, group), ours)
    ]
    kept["curves"] = {group: groups(records, group) for group in ("race", "cold", "sdft")}
    for group, key in (("ablation", _options), ("guided", lambda r: r["options"]["guided"])):
        curves = groups(records, group, key)
        kept["curves"][group] = {str(name): curve for name, curve in curves.items()}
    (folder / "inverse_q.json").write_text(json.dumps(kept) + "\n", encoding="utf-8")
    (folder / "inverse_q.md").write_text(text, encoding="utf-8")
    if curves := groups(records, "race"):
        draw(curves, folder / "inverse_q.png")
        draw_price(curves, folder / "price.png")
    return text
