"""Measurements that decode: refusal, adherence, and personal preference by letters."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from trueline.cli.folders import command, finish, model_settings, run_folder, sources
from trueline.cli.options import load, parse_weighted
from trueline.errors import ConfigError
from trueline.methods import METHODS
from trueline.types import SamplingParams, check_seed

if TYPE_CHECKING:
    from trueline.evals.items import Item
    from trueline.evals.sweep import Point
    from trueline.records.run_folder import RunFolder

DEFAULT_METHOD = {"refusal": "self-cd"}


def run_points(args: argparse.Namespace) -> None:
    """Decode every point on every prompt, judge, and write the run's folder."""
    from trueline.evals.metrics import fitting
    from trueline.evals.sweep import GOALS
    from trueline.records.hashes import digest
    from trueline.records.run_folder import RunFolder

    metric = metric_of(args)
    items = items_of(args, metric)
    points = points_of(args, metric, items)
    _check_plot(args)
    from trueline.cli.judging import make_judge, spent
    from trueline.engine.decoding import Decoder

    model = load(args)
    decoder, given = Decoder(model), len(items)
    items = fitting(decoder, points, items, skip=args.skip_long)
    data = {"sources": sources(args), "n": len(items), "skipped": given - len(items)}
    data["sha256"] = digest([asdict(i) for i in items])
    settings = {
        **model_settings(args, model),
        "method": {"name": points[-1].method, **fixed_fields(points[-1])},
        "sampling": base_sampling(args, points[-1].method).__dict__ | {"stop": args.stop},
        "seed": args.seed,
        "batch_size": args.batch_size,
        "data": data,
    }
    run = RunFolder(
        run_folder(args, metric, settings), metric, settings,
        command=command(args), overwrite=args.overwrite,
    )  # fmt: skip
    start, fresh, judge = time.perf_counter(), [0], None
    try:
        run.start()
        judge, judged_by = make_judge(args, metric, run.folder, model)
        rows, values = _measure(args, run, decoder, metric, items, points, judge, judged_by, fresh)
        results: dict[str, Any] = {
            "title": f"{metric.capitalize()}: {points[-1].method} on {args.model}",
            "metric": metric,
            "judge": judged_by,
            "points": rows,
        }
        goal = GOALS.get(metric)
        if goal and {goal.measure, goal.bounds[-1].measure} <= values[points[-1].label].keys():
            results["recommendation"] = recommendation(args, metric, items, points, values)
        _finish(args, run, results | spent(judge)[0])
    finally:
        seconds = round(time.perf_counter() - start, 1)
        run.close({"new_responses": fresh[0], "seconds": seconds, **spent(judge)[1]})


def metric_of(args: argparse.Namespace) -> str:
    """Return which metric the options ask for."""
    if args.what == "refusal":
        return "refusal"
    if args.what == "sweep":
        return str(args.metric)
    return "personal" if args.questions else "adherence"


def items_of(args: argparse.Namespace, metric: str) -> list[Item]:
    """Return the prompts; the bundled ones are for the bundled model alone."""
    from trueline.evals import items as known
    from trueline.evals.datasets import load_personal

    files = {
        "refusal": ("safe", "unsafe"),
        "adherence": ("prompts",),
        "personal": ("questions",),
    }[metric]
    given = {name: getattr(args, name, None) for name in ("safe", "unsafe", "prompts", "questions")}
    if wrong := [name for name, value in given.items() if value and name not in files]:
        raise ConfigError(f"`--{wrong[0]}` is not for the metric {metric}. Leave it out.")
    if not any(given[name] for name in files):
        needed = " and ".join(f"--{name} FILE" for name in files)
        if metric == "personal":
            raise ConfigError(f"The metric personal needs {needed}.")
        if args.model != "tiny":
            raise ConfigError(
                f'Model "{args.model}" needs {needed}; the bundled prompts are for model "tiny".'
            )
    if metric == "refusal":
        return known.refusal_items(args.safe, args.unsafe, args.limit)
    if metric == "personal":
        return known.personal_items(load_personal(args.questions)[: args.limit])
    pattern = args.pattern
    if pattern is not None:
        # Case does not count; `--absent` turns the pattern round.
        pattern = f"(?is)\\A(?!.*(?:{pattern}))" if args.absent else f"(?i)(?:{pattern})"
    principle = getattr(args, "method_principle", None)
    items = known.adherence_items(
        args.prompts, principle=principle, pattern=pattern, limit=args.limit, seed=args.seed
    )
    if args.judge is None and (bare := next((i for i in items if i.pattern is None), None)):
        raise ConfigError(
            f'Prompt "{bare.id}" has no pattern. Give --pattern REGEX, or --judge local or model.'
        )
    return items


def points_of(args: argparse.Namespace, metric: str, items: Sequence[Item]) -> list[Point]:
    """Return the points of the sweep, behind the plain model as the baseline."""
    from trueline.evals.sweep import Point, grid_points, parse_grid

    name = args.method or DEFAULT_METHOD.get(metric, "linear-alignment")
    given = {k.removeprefix("method_"): v for k, v in vars(args).items() if k.startswith("method_")}
    if "principles" in given:
        given["principles"] = tuple(map(parse_weighted, given["principles"]))
    sampling = base_sampling(args, name)
    if name in METHODS and "top_p" not in METHODS[name].__dataclass_fields__:
        given = {k: v for k, v in given.items() if k != "top_p" or isinstance(v, tuple)}
    lists = {k: v for k, v in given.items() if isinstance(v, tuple) and k != "principles"}
    single = {k: (v,) for k, v in given.items() if type(v) in (int, float)}
    grid = {**parse_grid(getattr(args, "grid", []), name), **lists, **single}
    fixed = {k: v for k, v in given.items() if k not in grid}
    stand_in = next((i.principle for i in items if i.principle), None)
    takes = name in METHODS and "principle" in METHODS[name].__dataclass_fields__
    if takes and stand_in is not None:
        fixed.pop("principle", None)
    points = grid_points(name, fixed, grid, sampling, principle=stand_in)
    if name == "plain":
        return points
    return [Point("plain", "plain", {}, sampling, baseline=True), *points]


def fixed_fields(point: Point) -> dict[str, Any]:
    """Return the options of the method that no point varies."""
    return {k: v for k, v in point.fields.items() if k not in point.settings}


def base_sampling(args: argparse.Namespace, method: str) -> SamplingParams:
    """Return the sampling that all points share."""
    check_seed(args.seed)
    names = ("max_new_tokens", "temperature", "top_k", "min_p", "repetition_penalty")
    given: dict[str, Any] = {name: getattr(args, name) for name in names}
    top_p = getattr(args, "method_top_p", 1.0)
    own = method in METHODS and "top_p" in METHODS[method].__dataclass_fields__
    if not own and not isinstance(top_p, tuple):
        given["top_p"] = top_p
    return SamplingParams(**given, stop=tuple(args.stop))


def _measure(
    args: argparse.Namespace,
    run: RunFolder,
    decoder: Any,
    metric: str,
    items: Sequence[Item],
    points: Sequence[Point],
    judge: Any,
    judged_by: Mapping[str, Any],
    fresh: list[int],
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the numbers of every point, and label -> measure -> a value for each prompt.

    `fresh` counts new responses.
    """
    from tqdm import tqdm

    from trueline.evals import metrics
    from trueline.evals.sweep import paired_test
    from trueline.records.hashes import digest

    keys = [digest([metric, run.settings, p.describe(), p.baseline]) for p in points]
    kept, judged_rows = run.rows("responses.jsonl"), run.rows("verdicts.jsonl")
    rows: list[dict[str, Any]] = []
    values: dict[str, Any] = {}
    there = sum(kept.done(key, len(items)) for key in dict.fromkeys(keys))
    if there:
        print(f"{there} responses are there already; going on.", file=sys.stderr)
    every = 0.2 if sys.stderr.isatty() else 30.0
    with tqdm(total=len(points) * len(items), initial=there, unit="prompt", mininterval=every,
              file=sys.stderr) as bar:  # fmt: skip

        def count(new: int) -> None:
            fresh[0] += new
            bar.update(new)

        for point, key in zip(points, keys, strict=True):
            bar.set_postfix_str(point.label, refresh=False)
            responses = metrics.respond(
                decoder, kept, key, point, items,
                batch_size=args.batch_size, seed=args.seed, on_done=count,
            )  # fmt: skip
            texts = [row["text"] for row in responses]

            def judged(batch: Sequence[Item], first: int, texts: Any = texts) -> Any:
                own = texts[first : first + len(batch)]
                found = metrics.judge_responses(metric, batch, own, judge)
                return [{"id": i.id, **v} for i, v in zip(batch, found, strict=True)]

            verdicts = judged_rows.compute(digest([key, judged_by]), items, 64, judged)
            numbers = metrics.summarise(metric, responses, verdicts)
            values[point.label] = {n: [v.get(n) for v in verdicts] for n in numbers["measures"]}
            losses = [(row["base_nll"], len(row["token_ids"])) for row in responses]
            values[point.label]["perplexity"] = losses
            about = {"label": point.label, **point.describe(), "settings": dict(point.settings)}
            rows.append({**about, "baseline": point.baseline, "key": key, **numbers})
    if points[0].baseline:
        flags = [
            {n: metrics.read_outcomes(m["outcomes"]) for n, m in row["measures"].items()}
            for row in rows
        ]
        for row, own in list(zip(rows, flags, strict=True))[1:]:
            row["p_baseline"] = {
                name: paired_test(values, flags[0][name])
                for name, values in own.items()
                if isinstance(row["measures"][name]["outcomes"], str)
            }
    return rows, values


def recommendation(
    args: argparse.Namespace,
    metric: str,
    items: Sequence[Item],
    points: Sequence[Point],
    values: Mapping[str, Any],
) -> dict[str, Any] | None:
    """Return the recommended point as plain numbers, or None where nothing can be recommended."""
    from trueline.evals.sweep import choose, default_label, with_floor

    found = choose(
        with_floor(metric, args.floor), values, [i.prompt for i in items], seed=args.seed,
        baseline=points[0].label if points[0].baseline else None, default=default_label(points),
    )  # fmt: skip
    if found is None:
        return None
    point = next(p for p in points if p.label == found.label and not p.baseline)
    return {**found.as_dict(), "settings": dict(point.settings)}


def _finish(args: argparse.Namespace, run: RunFolder, results: dict[str, Any]) -> None:
    """Write and print the results and draw the plot."""
    from trueline.evals import figures

    def draw() -> Any:
        points, title = results["points"], results["title"]
        both = all(
            {"over_refusal", "harmful_refusal"} <= set(point["measures"]) for point in points
        )
        if both:
            found = results.get("recommendation") or {}
            label = found["label"] if found.get("meets_floor") else None
            return figures.draw_frontier(points, title, label, args.floor)
        return figures.draw_grid(points, title)

    finish(args, run, results, draw)


def _check_plot(args: argparse.Namespace) -> None:
    if not args.no_plot:
        from trueline.records.style import need_matplotlib

        need_matplotlib()
