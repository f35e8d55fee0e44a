"""`trueline demo`: principle adherence and over-refusal on the bundled model, as a report."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trueline.evals.statistics import Estimate
    from trueline.jobs.demo import Adherence, HeldOut, Refusal

EXAMPLES = """examples:
  trueline demo
  trueline demo --limit 60 --output /tmp/demo

Writes report.md, results.json (every number and every answer) and demo.png into the folder. About a
minute on one core; `--limit` makes it shorter.
"""
FIGURE = "demo.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add = parser.add_argument
    add("--output", default="demo", metavar="DIR", help="folder for the files (demo)")
    add("--limit", type=int, metavar="N", help="at most N answers a row of the report")
    add("--seed", type=int, default=0, metavar="N", help="which pairs and requests are drawn (0)")


def run(args: argparse.Namespace) -> None:
    """Measure on the bundled model and write the report."""
    from trueline.jobs.demo_figure import draw_demo
    from trueline.records.run_folder import RunFolder
    from trueline.records.style import need_matplotlib

    need_matplotlib()
    import torch
    from tqdm import tqdm

    from trueline.engine.decoding import Decoder
    from trueline.jobs import demo
    from trueline.models.load import load_model

    demo.check_limit(args.limit)
    folder, start = Path(args.output).expanduser(), time.perf_counter()
    written = RunFolder(folder, "demo", {}, overwrite=True)
    try:
        held_out = demo.load_held_out(
            str(resources.files("trueline") / "assets/tiny/held_out.json")
        )
        torch.set_num_threads(1)
        decoder = Decoder(load_model("tiny"), batch_size=demo.BATCH)
        total = demo.count_requests(held_out, args.limit)
        with tqdm(total=total, unit="answer", disable=None, leave=False) as bar:
            options: Any = {"limit": args.limit, "seed": args.seed, "on_done": bar.update}
            adherence = demo.measure_adherence(decoder, held_out, **options)
            refusal = demo.measure_refusal(decoder, held_out, **options)
        seconds = round(time.perf_counter() - start, 1)
        settings = describe(args, seconds)
        written.start()
        written.write("results.json", results_text(args, held_out, adherence, refusal, settings))
        written.write("report.md", render_report(args, held_out, adherence, refusal, settings))
        written.draw(FIGURE, draw_demo(adherence, refusal))
    finally:
        written.close()
    print(summary(adherence, refusal))
    print(f"\n{seconds} seconds, {total} answers")
    for name in ("report.md", FIGURE, "results.json"):
        print(folder / name)


def describe(args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Return the settings and versions that the numbers belong to."""
    import torch
    import transformers

    import trueline
    from trueline.jobs.demo import SAMPLING

    return {
        "model": "tiny",
        "limit": args.limit,
        "seed": args.seed,
        "decoding": f"greedy, at most {SAMPLING.max_new_tokens} tokens",
        "trueline": trueline.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "seconds": seconds,
    }


def results_text(
    args: argparse.Namespace,
    held_out: HeldOut,
    adherence: Sequence[Adherence],
    refusal: Sequence[Refusal],
    settings: dict[str, Any],
) -> str:
    """Return every number and every answer as JSON."""
    from trueline.jobs.demo import choose_pairs, choose_requests

    pairs = choose_pairs(held_out, args.limit, args.seed)
    content = {
        "settings": settings,
        "pairs": [dataclasses.asdict(p) | dataclasses.asdict(q) for p, q in pairs],
        "safe_triggers": choose_requests(held_out.safe_triggers, args.limit, args.seed),
        "unsafe": choose_requests(held_out.unsafe, args.limit, args.seed),
        "adherence": [dataclasses.asdict(row) for row in adherence],
        "refusal": [dataclasses.asdict(row) for row in refusal],
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def render_report(
    args: argparse.Namespace,
    held_out: HeldOut,
    adherence: Sequence[Adherence],
    refusal: Sequence[Refusal],
    settings: dict[str, Any],
) -> str:
    """Return the report as Markdown."""
    from jinja2 import Environment, PackageLoader

    from trueline.jobs import demo

    environment = Environment(
        loader=PackageLoader("trueline", "assets"), trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"interval": interval, "cell": cell}
    shown = [row for row in adherence if row.ratio in (None, 0.0, 2.0)]
    shown_refusal = [row for row in refusal if row.name in demo.SHOWN_REFUSAL]
    pairs = demo.choose_pairs(held_out, args.limit, args.seed)
    options = "".join(
        f" --{name} {value}"
        for name, value in (("limit", args.limit), ("seed", args.seed or None))
        if value is not None
    )
    return environment.get_template("demo.md.jinja").render(
        options=options,
        seconds=settings["seconds"],
        figure=FIGURE,
        adherence=adherence,
        refusal=refusal,
        shown=shown,
        shown_refusal=shown_refusal,
        pairs=pairs,
        examples=demo.example_pairs(pairs, shown[1], shown[2]),
        refusal_examples=demo.example_requests(held_out, args.limit, args.seed, shown_refusal),
        settings=settings.items(),
    )


def interval(estimate: Estimate) -> str:
    """Return a rate as "55 % [50, 61]"."""
    low, high = 100 * estimate.low, 100 * estimate.high
    return f"{100 * estimate.value:.0f} % [{low:.0f}, {high:.0f}]"


def cell(text: str) -> str:
    """Return text that cannot break out of a cell of a Markdown table."""
    for sign in "\\`*_[]<>|":
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split()) or " "


def summary(adherence: Sequence[Adherence], refusal: Sequence[Refusal]) -> str:
    """Return the two tables for the terminal."""
    width = max(len(name) for rows in (adherence, refusal) for name in (r.name for r in rows))
    lines = [f"{'':{width}}  follows the principle  fact right"]
    for row in adherence:
        lines.append(f"{row.name:{width}}  {interval(row.followed):21}  {interval(row.facts)}")
    lines += ["", f"{'':{width}}  harmless, refused      harmful, refused"]
    for line in refusal:
        rates = f"{interval(line.over_refusal):21}  {interval(line.harmful_refusal)}"
        lines.append(f"{line.name:{width}}  {rates}")
    return "\n".join(lines)
