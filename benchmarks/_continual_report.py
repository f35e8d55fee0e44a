"""Results of the continual benchmark as Markdown and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._continual import (
    MEASURES,
    PROTOCOLS,
    TUNE_ORDERS,
    Choice,
    Results,
    estimates,
    matrix,
    measures,
)
from benchmarks._report import table
from trueline.continual.strategies import STRATEGIES
from trueline.evals.statistics import Estimate
from trueline.evals.transfer import mean_matrix, over_seeds, summary

GIVEN = {
    "per-task": "text, and which task it is",
    "multi-task": "text; all tasks' rows at once in training",
    "replay": "text; 32 rows of each earlier task in training",
}
"""What a strategy is given beyond the text alone."""
CURVE = ("inc-lora", "o-lora", "drift")
PAIRS = (("o-lora", "inc-lora"), ("drift", "o-lora"), ("drift", "inf-lora"), ("drift", "replay"))


def write(folder: Path, protocol: str) -> str:
    """Draw all pictures of a protocol into `folder` and return its tables."""
    rows = Results(folder / f"{protocol}.json").rows
    tuned = Results(folder / f"tuning-{protocol}.json").rows
    swept = Results(folder / f"sweep-{protocol}.json").rows
    names = [name for name in STRATEGIES if any(r["strategy"] == name for r in rows)]
    of = {name: [r for r in rows if r["strategy"] == name] for name in names}
    found = {name: estimates(own) for name, own in of.items()}
    text = f'### Protocol "{protocol}"\n\n' + main_table(of, found) + "\n"
    text += paired(of) + "\n" + other_view(of, protocol) + "\n" + by_task(of) + "\n"
    if tuned:
        text += tuning_table(tuned)
    if found:
        draw(folder, protocol, of, found, tuned, swept)
    return text


def cell(e: Estimate) -> str:
    """Return a share in per cent with its standard error."""
    spread = "" if np.isnan(e.standard_error) else f" ± {100 * e.standard_error:.1f}"
    return f"{100 * e.value:.1f}{spread}"


def main_table(
    of: Mapping[str, Sequence[Mapping[str, Any]]], found: Mapping[str, Mapping[str, Estimate]]
) -> str:
    """Return strategies by measures, in per cent, mean and standard error over runs."""
    head = ["", "runs", *(name.replace("_", " ") for name in MEASURES), "95 % of average",
            "given at the test", "setting"]  # fmt: skip
    lines = []
    for name, values in found.items():
        e = values["average_accuracy"]
        low_high = "" if np.isnan(e.low) else f"{100 * e.low:.1f} to {100 * e.high:.1f}"
        row = of[name][0]
        lines.append([
            name, e.n, *(cell(values[m]) if m in values else "" for m in MEASURES), low_high,
            GIVEN.get(name, "text"), Choice(row["learning_rate"], row["options"]).text(),
        ])  # fmt: skip
    untouched = [np.mean(row["untouched"]) for rows in of.values() for row in rows]
    if untouched:
        lines.insert(0, ["untouched", "", f"{100 * np.mean(untouched):.1f}", *[""] * 6, ""])
    return table(head, lines)


def paired(of: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return differences between strategies on the same orders and seeds, in points."""
    lines = []
    for ours, other in PAIRS:
        both = [
            {(r["order"], r["seed"]): measures(r) for r in of.get(n, ())} for n in (ours, other)
        ]
        cells = [key for key in both[0] if key in both[1]]
        if cells:
            line = [f"{ours} less {other}", len(cells)]
            for m in ("average_accuracy", "backward_transfer", "learning_accuracy"):
                e = over_seeds([both[0][key][m] - both[1][key][m] for key in cells])
                line.append(f"{cell(e)} [{100 * e.low:.1f}, {100 * e.high:.1f}]")
            lines.append(line)
    head = ["", "pairs", "average accuracy", "backward transfer", "learning accuracy"]
    return "Paired, points, 95 % interval:\n\n" + table(head, lines)


def other_view(of: Mapping[str, Sequence[Mapping[str, Any]]], protocol: str) -> str:
    """Return the same models scored by the other protocol: means over runs, in per cent."""
    other = next(name for name in PROTOCOLS if name != protocol)
    lines = []
    for name, rows in of.items():
        found = [summary(matrix(row[f"R_{other}"])) for row in rows if f"R_{other}" in row]
        if found:
            shown = ("average_accuracy", "backward_transfer", "learning_accuracy")
            lines.append([name, *(cell(over_seeds([f[m] for f in found])) if m in found[0] else ""
                                  for m in shown)])  # fmt: skip
    head = ["", "average accuracy", "backward transfer", "learning accuracy"]
    return f'The same models, scored as in "{other}":\n\n' + table(head, lines)


def by_task(of: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return accuracies by task, right after its training and at the end; means over runs."""
    tasks = _tasks(of)
    lines = []
    for name, rows in of.items():
        if STRATEGIES[name][1] in ("apart", "joint"):
            continue
        pairs: dict[str, list[tuple[float, float]]] = {task: [] for task in tasks}
        for row in rows:
            R = matrix(row["R"])
            for j, task in enumerate(_order(row)):
                pairs[task].append((R[j, j], R[-1, j]))
        lines.append([name, *(_arrow(pairs[task]) for task in tasks)])
    return "Right after its training → at the end, %:\n\n" + table(["", *tasks], lines)


def tuning_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return every setting tried, on validation rows."""
    lines = [
        [row["strategy"], row["order"], Choice(row["learning_rate"], row["options"]).text(),
         *(f"{100 * measures(row)[m]:.1f}" if m in measures(row) else ""
           for m in ("average_accuracy", "learning_accuracy", "backward_transfer"))]
        for row in rows
    ]  # fmt: skip
    head = ["", "order", "setting", "average", "learning", "backward"]
    return "Settings tried (one seed, validation rows):\n\n" + table(head, lines)


def draw(
    folder: Path,
    protocol: str,
    of: Mapping[str, Sequence[Mapping[str, Any]]],
    found: Mapping[str, Mapping[str, Estimate]],
    tuned: Sequence[Mapping[str, Any]],
    swept: Sequence[Mapping[str, Any]],
) -> None:
    """Write the strategies side by side, R of each as a heat map, and the curve."""
    from trueline.evals.transfer_figures import draw_matrix, draw_strategies

    shown = ("average_accuracy", "backward_transfer", "learning_accuracy")
    bars = {n: {m: v for m, v in values.items() if m in shown} for n, values in found.items()}
    figure = draw_strategies(bars, f"{protocol}: strategies, mean and 95 % interval")
    figure.savefig(folder / f"{protocol}.png", dpi=110)
    for name in of:
        first = [r for r in of[name] if r["order"] == TUNE_ORDERS[0]]
        if first and STRATEGIES[name][1] not in ("apart", "joint"):
            figure = draw_matrix(
                mean_matrix([matrix(r["R"]) for r in first]),
                _order(first[0]),
                f"{name}, {protocol}, {len(first)} seeds",
                np.mean([r["untouched"] for r in first], axis=0),
            )
            figure.savefig(folder / f"{protocol}-{name}.png", dpi=80)
    if swept:
        curve([r for r in (*tuned, *swept) if r["order"] == TUNE_ORDERS[0]], protocol).savefig(
            folder / f"{protocol}-curve.png", dpi=110
        )


def curve(tuned: Sequence[Mapping[str, Any]], protocol: str) -> Any:
    """Return backward transfer against learning accuracy, one line for each strategy."""
    from trueline.evals.transfer_figures import draw_trade_off

    points = []
    for name in (*CURVE, "replay"):
        own = [row for row in tuned if row["strategy"] == name]
        own.sort(key=lambda r: (r["options"].get("lambda_1", 0), r["options"].get("strength", 0),
                                r["learning_rate"]))  # fmt: skip
        # Joined along the learning rate; drift, which has few, along its strength.
        fixed = "learning_rate" if name == "drift" else "lambda_1"
        points += [
            {"strategy": name, "label": _short(row), "line": {**row, **row["options"]}.get(fixed),
             **measures(row)} for row in own
        ]  # fmt: skip
    joint = [measures(row)["average_accuracy"] for row in tuned if row["strategy"] == "multi-task"]
    if joint:
        bound = {"learning_accuracy": max(joint), "backward_transfer": 0.0}
        points.append({"strategy": "joint bound", **bound})
    return draw_trade_off(points, f"{protocol}: stability against plasticity, validation rows")


def _short(row: Mapping[str, Any]) -> str:
    values = [f"{v:g}" for v in row["options"].values() if isinstance(v, float)]
    return "/".join([f"{row['learning_rate']:g}", *values])


def _order(row: Mapping[str, Any]) -> list[str]:
    from benchmarks._continual import ORDERS

    return ORDERS[row["order"]][: len(row["untouched"])]


def _tasks(of: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    return list(dict.fromkeys(t for rows in of.values() for row in rows for t in _order(row)))


def _arrow(pairs: Sequence[tuple[float, float]]) -> str:
    if not pairs:
        return ""
    then, now = np.mean(pairs, axis=0)
    return f"{100 * then:.0f} → {100 * now:.0f}"
